"""Reading: a span of a context that answers a question, and one of some choices."""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jaxlm import metrics
from jaxlm.config import unknown
from jaxlm.tasks.task import ONE, Examples, Outputs, Prediction, Row, Task, of_columns
from jaxlm.train import Objective, objectives

CANDIDATES = 20  # begins and ends of a window that are paired
NOTHING = -1e9  # the score of a span where there is none: finite, as scores and JSON need it


class ExtractiveQa(Task):
    """The answer as a span of the context; a long context is read in overlapping windows, an answer that is not in a
    window, or not there at all, is the first token (Devlin et al. 2019, §4.2 and §4.3)."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "span"}
    required = ("question", "context", "answers")
    optional = ("id",)
    given = ("question", "context")
    metric = "f1"

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        items, number, about = [], [], []
        lost: list[str] = []
        stride = min(self.config.stride, self.length // 2)
        cut = self.text_encoder.windows([row["question"] for row in rows], [row["context"] for row in rows], stride)
        for i, (row, windows) in enumerate(zip(rows, cut, strict=True)):
            tokens = np.concatenate([encoding.offsets[encoding.sequence == 1] for encoding in windows])
            placed = False
            for encoding in windows:
                context = encoding.sequence == 1
                allowed = context.copy()
                allowed[0] = True
                begin, end = _place(row.get("answers"), encoding.offsets, context, tokens)
                placed = placed or begin > 0
                ones = np.ones(len(encoding.ids), np.int32)
                items.append({
                    "tokens": encoding.ids, "segments": ones, "types": encoding.types, "allowed": allowed.astype(np.int32),
                    "begin": np.int32(begin), "end": np.int32(end), "weights": ONE,
                })  # fmt: skip
                number.append(i)
                about.append((encoding.offsets, context))
            if not placed and row.get("answers") and texts_of(row["answers"]):
                lost.append(where[i] if where else f"row {i}")
        if lost:
            self.remarks.append(
                f"{len(lost):,} of {len(rows):,} answers are in no window whole, so their questions count as without answer in "
                f"training: {', '.join(lost[:3])}{' …' if len(lost) > 3 else ''}"
            )
        return Examples(items, np.array(number), about)

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.spans()

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        begin_BL, end_BL = objectives.span_scores(apply, params, batch)
        return {"begin_BL": begin_BL, "end_BL": end_BL}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        """The best span over a row's windows. `no_answer` is how much better no answer scores than the best span; with
        rows that may lack one it decides at 0. Where no begin stands near enough before an end the answer is empty."""
        best: list[tuple[float, str]] = [(NOTHING, "")] * len(rows)
        none = [np.inf] * len(rows)
        for i, (offsets, context), output in zip(examples.row, examples.about, outputs, strict=True):
            begin, end = output["begin_BL"][: len(context)], output["end_BL"][: len(context)]
            none[i] = min(none[i], float(begin[0] + end[0]))
            score, span = _best(begin, end, context, self.config.answer_length)
            if score > best[i][0]:
                best[i] = (score, _text_of(rows[i]["context"], offsets[span[0], 0], offsets[span[1], 1]))
        return [{"answer": text, "score": score, "no_answer": none[i] - score} for i, (score, text) in enumerate(best)]

    def statistic(self) -> Callable[..., dict[str, float]]:
        """With questions that have no answer, one is given where the best span scores higher than none."""

        def columns(predictions: Sequence[Prediction], rows: Sequence[Row]) -> Sequence[Any]:
            answers = [texts_of(row["answers"]) for row in rows]
            if all(answers):
                return [p["answer"] for p in predictions], answers
            given = ["" if p["no_answer"] > 0 else p["answer"] for p in predictions]
            return given, answers, [p["no_answer"] for p in predictions]

        return of_columns(metrics.weighted_squad(), columns)

    def notes(self, rows: Sequence[Row]) -> dict[str, str]:
        return answer_notes(texts_of(row["answers"]) for row in rows)

    def show(self, row: Row, prediction: Prediction) -> str:
        return f"{prediction['answer']!r} (score {prediction['score']:.2f}, no answer {prediction['no_answer']:+.2f})"


def answer_notes(answers: Iterable[Sequence[str]]) -> dict[str, str]:
    """How answers are compared, where that is not by SQuAD's rules."""
    if metrics.choose_words(answers) != "characters":
        return {}
    return {"answers": "of a script without spaces: compared by characters, as CMRC 2018 does"}


def texts_of(answers: Any) -> list[str]:
    """The texts of an `answers` field: SQuAD's dict, a list, or one text."""
    given = answers.get("text", []) if isinstance(answers, Mapping) else answers
    return [given] if isinstance(given, str) else list(given)


def _text_of(context: str, start: int, stop: int) -> str:
    """The characters of a span with the marks on its last letter: a tokenizer that drops accents leaves them to no token."""
    while stop < len(context) and unicodedata.category(context[stop])[0] == "M":
        stop += 1
    return context[start:stop]


def _place(answers: Any, offsets: np.ndarray, context: np.ndarray, tokens: np.ndarray | None = None) -> tuple[int, int]:
    """First and last token of the first answer that the context holds, (0, 0) where the window does not hold it whole.

    `offsets` (n, 2) are the characters of each token of the window, `context` (n,) marks those of the context; `tokens` (m, 2)
    are the characters of all tokens of the context (None: those of this window). Ends of the answer that belong to no token (white
    space, characters that the tokenizer drops) are left out.
    """
    texts = texts_of(answers) if answers is not None else []
    found = [(start, text) for start, text in zip(answers["answer_start"], texts, strict=True) if start >= 0] if texts else []
    if not found:
        return 0, 0
    start, stop = found[0][0], found[0][0] + len(found[0][1])
    tokens = offsets[context] if tokens is None else tokens
    inside = tokens[(tokens[:, 1] > start) & (tokens[:, 0] < stop)]
    if not len(inside):
        return 0, 0
    start, stop = max(start, inside[:, 0].min()), min(stop, inside[:, 1].max())
    begins = np.flatnonzero(context & (offsets[:, 0] <= start) & (start < offsets[:, 1]))
    ends = np.flatnonzero(context & (offsets[:, 0] < stop) & (stop <= offsets[:, 1]))
    return (int(begins[0]), int(ends[-1])) if len(begins) and len(ends) else (0, 0)


def _best(begin: np.ndarray, end: np.ndarray, context: np.ndarray, longest: int) -> tuple[float, tuple[int, int]]:
    """The span of the context with the highest begin + end among the best of each."""
    places = np.flatnonzero(context)
    if not len(places):  # of a context that the tokenizer makes nothing of
        return NOTHING, (0, 0)
    begins = places[np.argsort(-begin[places], kind="stable")[:CANDIDATES]]
    ends = places[np.argsort(-end[places], kind="stable")[:CANDIDATES]]
    apart = ends[None, :] - begins[:, None]
    sums = np.where((apart >= 0) & (apart < longest), begin[begins][:, None] + end[ends][None, :], -np.inf)
    i, j = np.unravel_index(np.argmax(sums), sums.shape)
    return float(sums[i, j]), (int(begins[i]), int(ends[j]))


class MultipleChoice(Task):
    """One of some choices for a question, each read as its second text (Devlin et al. 2019, §4.4)."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "choice"}
    required = ("question", "choices", "label")
    optional = ("context",)
    given = ("question", "choices")

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        lead = [f"{row['context']} {row['question']}" if row.get("context") else row["question"] for row in rows]
        flat = self.encoded(
            [text for text, row in zip(lead, rows, strict=True) for _ in row["choices"]],
            [choice for row in rows for choice in row["choices"]],
        )
        most, at, items = max(len(row["choices"]) for row in rows), 0, []
        for i, row in enumerate(rows):
            options = flat[at : at + len(row["choices"])]
            at += len(options)
            there = np.zeros(most, np.float32)
            there[: len(options)] = 1
            label = self._number(row, where[i] if where else f"row {i}") if "label" in row else 0
            example = {name: _rectangle([option[name] for option in options], most) for name in options[0]}
            items.append({**example, "options_O": there, "labels": np.int32(label), "weights": ONE})
        return Examples(items, np.arange(len(items)))

    @staticmethod
    def _number(row: Row, where: str) -> int:
        """A label is the number of a choice from 0, its letter (A, B, …), or its text; of choices that are numbers
        themselves a text means the choice."""
        choices, label = [choice.strip() for choice in row["choices"]], row["label"]
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
            return int(label)
        if str(label) in choices:
            return choices.index(str(label))
        if label in tuple("ABCDEFGHIJ"[: len(choices)]):
            return "ABCDEFGHIJ".index(str(label))
        if str(label).isdecimal() and int(label) < len(choices):
            return int(label)
        raise unknown(
            f"label ({where}) is neither a choice nor the number of one:", label, [*choices, *map(str, range(len(choices)))]
        )

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.choices()

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"probabilities_BO": jax.nn.softmax(objectives.option_scores(apply, params, batch))}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        made = []
        for row, output in zip(rows, outputs, strict=True):
            given = output["probabilities_BO"][: len(row["choices"])]
            best = int(np.argmax(given))
            made.append({"choice": best, "text": row["choices"][best], "probabilities": given.tolist()})
        return made

    def statistic(self) -> Callable[..., dict[str, float]]:
        def right(predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, np.ndarray]:
            return {"accuracy": np.array([p["choice"] == self._number(row, "") for row, p in zip(rows, predictions, strict=True)])}

        return metrics.averaged(right)

    def show(self, row: Row, prediction: Prediction) -> str:
        return f"{prediction['text']} {prediction['probabilities'][prediction['choice']]:.3f}"


def _rectangle(rows: list[np.ndarray], most: int) -> np.ndarray:
    """Rows of different length as one array (most, L), zeros where there is nothing."""
    made = np.zeros((most, max(map(len, rows))), rows[0].dtype)
    for i, row in enumerate(rows):
        made[i, : len(row)] = row
    return made
