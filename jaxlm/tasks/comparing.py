"""Comparing: vectors of similar texts, preferred answers, a reward for answers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxlm import metrics
from jaxlm.data import Chat, Example, Tokenizer
from jaxlm.data.text_encoding import UNLIMITED
from jaxlm.tasks.task import ONE, Examples, Outputs, Prediction, Row, Task, of_columns
from jaxlm.train import Objective, objectives


class Embedding(Task):
    """Vectors that are near for texts that belong together; the other rows of a batch are what they are told from."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "embedding"}
    required = ("text", "pair")
    optional = ("rejected",)
    metric = "mrr@10"

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        check_texts(rows, where)
        roles = {"anchor": "text", "positive": "pair", "negative": "rejected"}
        there = {name: role for name, role in roles.items() if all(role in row for row in rows)}
        columns = {name: self.encoded([row[role] for row in rows]) for name, role in there.items()}
        items = [{**{name: column[i] for name, column in columns.items()}, "weights": ONE} for i in range(len(rows))]
        return Examples(items, np.arange(len(items)))

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.contrast(self.config.temperature)

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for name in ("anchor", "positive") if name in batch]
        return {f"{name}_BD": objectives.unit(objectives.scores_of(apply, params, batch[name])) for name in names}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        """The text's vector, and its pair's where there is one."""
        return [{name.removesuffix("_BD"): x.tolist() for name, x in output.items()} for output in outputs]

    def statistic(self) -> Callable[..., dict[str, float]]:
        """How well each text finds its own pair among those of all rows, each of which counts once."""

        def columns(predictions: Sequence[Prediction], rows: Sequence[Row]) -> Sequence[Any]:
            anchors, pairs = (np.array([p[name] for p in predictions]) for name in ("anchor", "positive"))
            number = {pair: d for d, pair in enumerate(dict.fromkeys(row["pair"] for row in rows))}
            return anchors, pairs, np.array([number[row["pair"]] for row in rows])

        return of_columns(metrics.weighted_pair_retrieval(), columns)

    def show(self, row: Row, prediction: Prediction) -> str:
        return " ".join(f"{x:.4f}" for x in prediction["anchor"])


def check_texts(rows: Sequence[Row], where: Sequence[str] | None) -> None:
    """Raises ValueError for a conversation where a text is expected, with its place."""
    for i, row in enumerate(rows):
        if not isinstance(row.get("rejected") or "", str):
            raise ValueError(f"{where[i] if where else f'row {i}'}: rejected is a list of messages, not a text")


def answers(row: Row) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of a row of texts; without a prompt it is what both texts begin with, up to a whole word. The
    space before that word is the answer's, as a model writes it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        return row["prompt"], chosen, rejected
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    while same and not chosen[same - 1].isspace():
        same -= 1
    same -= chosen[:same].endswith(" ")
    return chosen[:same], chosen[same:], rejected[same:]


Turns = list[Mapping[str, str]]


def turns(row: Row) -> tuple[Turns, Turns, Turns] | None:
    """(prompt, chosen, rejected) of a row in TRL's conversational form, each a list of messages; None for a row of texts.

    Without a prompt it is the messages that both conversations begin with; a prompt that both repeat is taken off them. A text
    among messages is the user's as a prompt, the assistant's as an answer.
    """
    parts = {role: row[role] for role in ("prompt", "chosen", "rejected") if row.get(role) is not None}
    if all(isinstance(value, str) for value in parts.values()):
        return None
    speaker = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    lists: dict[str, Turns] = {
        role: [{"role": speaker[role], "content": part}] if isinstance(part, str) else list(part) for role, part in parts.items()
    }
    chosen, rejected, prompt = lists["chosen"], lists["rejected"], lists.get("prompt")
    if prompt is None:
        pairs = enumerate(zip(chosen, rejected, strict=False))
        same = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
        prompt = chosen[:same]
        chosen, rejected = chosen[same:], rejected[same:]
    elif chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt or not chosen or not rejected:
        raise ValueError("has no prompt and two answers: chosen and rejected must begin alike and then differ")
    return prompt, chosen, rejected


class _Pairs(Task):
    """Two answers behind one prompt: texts, or messages that the chat template writes."""

    required = ("chosen", "rejected")
    optional = ("prompt",)

    @functools.cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer, self.config.chat_template, split_special_tokens=self.config.split_special_tokens)

    @property
    def saved_tokenizer(self) -> Tokenizer:
        """With the chat template, where there are conversations."""
        talks = "chat" in vars(self) and self.chat.template != self.tokenizer.chat_template
        return self.tokenizer.with_chat_template(self.chat.template) if talks else self.tokenizer

    @property
    def spelled(self) -> int:
        return self.text_encoder.spelled + (self.chat.spelled if "chat" in vars(self) else 0)

    def check(self, row: Row, *, training: bool = True) -> None:
        """A conversation that the template cannot write is left out."""
        if "chosen" in row and (parts := turns(row)) is not None:
            self.conversations(*parts)

    def idle_options(self) -> dict[str, str]:
        given = self.config.chat_template is not None and "chat" not in vars(self)
        return {"chat_template": "no row holds messages"} if given else {}

    def parts(self, rows: Sequence[Row], where: Sequence[str] | None) -> list[tuple[Turns, Turns, Turns] | None]:
        """`turns` of each row. Raises ValueError with the place of a row that has neither form."""
        made = []
        for i, row in enumerate(rows):
            try:
                made.append(turns(row))
            except ValueError as error:
                raise ValueError(f"{where[i] if where else f'row {i}'} {error}") from None
        return made

    def conversations(self, prompt: Turns, *replies: Turns) -> list[np.ndarray]:
        """The ids of the prompt with each reply, up to the end of the reply's last turn."""
        encoded = [self.chat.encode([*prompt, *reply]) for reply in replies]
        return [ids[: np.flatnonzero(trained)[-1] + 1] for ids, trained in encoded]


class Preference(_Pairs):
    """The preferred of two answers made likelier, the other less likely, compared with the model at the start."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "language_model"}
    given = ("prompt", "chosen", "rejected")
    refers = True
    chunk = 128
    """Positions of a row whose logits exist at a time: the objective's."""

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        parts = self.parts(rows, where)
        texts = dict(zip([i for i, part in enumerate(parts) if part is None], self._of_texts(rows, parts), strict=True))
        items = [texts[i] if part is None else self._of_messages(*part) for i, part in enumerate(parts)]
        return Examples(items, np.arange(len(items)))

    def _of_texts(self, rows: Sequence[Row], parts: Sequence[Any]) -> list[Example]:
        """Examples of the rows that hold texts."""
        plain = [answers(row) for row, part in zip(rows, parts, strict=True) if part is None]
        if not plain:
            return []
        prompts, *texts = zip(*plain, strict=True)
        before = [encoding.ids.tolist() for encoding in self.text_encoder.encode(prompts, max_length=UNLIMITED)]
        end = [self.tokenizer.eos_id] * self.config.append_eos
        ends = [[[*ids.tolist(), *end] for ids in self.text_encoder.bare(some)] for some in texts]
        return [self._pair(*each) for each in zip(before, *ends, strict=True)]

    def _of_messages(self, prompt: Turns, *replies: Turns) -> Example:
        """Both replies behind one conversation: as TRL has it, what the template writes beyond the prompt for generation."""
        before, *whole = (ids.tolist() for ids in (self.chat.prompt(prompt), *self.conversations(prompt, *replies)))
        columns = enumerate(zip(before, *whole, strict=False))
        size = next((i for i, ids in columns if len(set(ids)) > 1), min(map(len, (before, *whole))))
        return self._pair(before[:size], *(ids[size:] for ids in whole))

    def _pair(self, before: list[int], *ends: list[int]) -> Example:
        """Both answers behind one prompt, which is cut at its beginning where the longer one leaves it no room, down to half
        a row; then the answers are cut."""
        whole = max(map(len, ends))
        room = min(whole, max(self.length // 2, self.length + 1 - len(before)))
        self.text_encoder.truncated += whole + len(before) > self.length + 1
        before = before[-(self.length + 1 - room) :]
        chosen, rejected = (self._row(before, end[:room]) for end in ends)
        return {"chosen": chosen, "rejected": rejected, "weights": ONE}

    def _row(self, prompt: list[int], target: list[int]) -> Example:
        whole = np.array([*prompt, *target], np.int32)
        weights = (np.arange(1, len(whole)) >= len(prompt)).astype(np.float32)
        return {"tokens": whole[:-1], "targets": whole[1:], "weights": weights, "segments": np.ones(len(whole) - 1, np.int32)}

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        self.chunk = chunk
        return objectives.preference(self.config.preference, self.config.beta, chunk)

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The log-likelihood of both answers, in nats."""

        def total(name: str) -> Any:  # with the options of the objective, so that both are computed once
            return apply(params, batch[name], train=False, rng=None, method="log_likelihood", chunk=self.chunk)[0]

        return {"chosen_B": total("chosen"), "rejected_B": total("rejected")}

    def refer(self, examples: Examples, outputs: Outputs) -> None:
        for item, output in zip(examples.items, outputs, strict=True):
            item |= {f"reference_{name}": np.float32(output[f"{name}_B"]) for name in ("chosen", "rejected")}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        """The reward of both answers: how much likelier they are than at the start, in nats, times beta."""
        made = []
        for item, output in zip(examples.items, outputs, strict=True):
            gains = {n: float(output[f"{n}_B"] - item.get(f"reference_{n}", np.float32(0))) for n in ("chosen", "rejected")}
            made.append({name: self.config.beta * gain for name, gain in gains.items()})
        return made

    def statistic(self) -> Callable[..., dict[str, float]]:
        return lambda predictions, rows: metrics.preference(*([p[name] for p in predictions] for name in ("chosen", "rejected")))


class Reward(_Pairs):
    """A number for an answer, higher for the preferred one."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "sequence", "labels": 1}
    given = ("text",)

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        if "text" in rows[0]:
            return Examples(
                [{**example, "weights": ONE} for example in self._ends([row["text"] for row in rows])], np.arange(len(rows))
            )
        talks = {i: parts for i, parts in enumerate(self.parts(rows, where)) if parts is not None}
        texts = {i: answers(row) for i, row in enumerate(rows) if i not in talks}
        ends = self._ends([prompt + text for prompt, *both in texts.values() for text in both])
        pairs = dict(zip(texts, zip(ends[::2], ends[1::2], strict=True), strict=True))
        pairs |= {i: tuple(self._last(ids) for ids in self.conversations(*parts)) for i, parts in talks.items()}  # type: ignore[misc]
        items = [{"chosen": pairs[i][0], "rejected": pairs[i][1], "weights": ONE} for i in range(len(rows))]
        return Examples(items, np.arange(len(items)))

    def _last(self, ids: np.ndarray) -> Example:
        """The last tokens of a conversation, as many as a row has."""
        self.text_encoder.truncated += len(ids) > self.length
        ids = ids[-self.length :]
        return {"tokens": ids, "segments": np.ones(len(ids), np.int32)}

    def _ends(self, texts: Sequence[str]) -> list[Example]:
        """Texts as the model reads them; one that is too long loses its beginning, since the answer stands at its end."""
        made = []
        for encoding in self.text_encoder.encode(texts, max_length=UNLIMITED):
            excess = max(len(encoding.ids) - self.length, 0)
            self.text_encoder.truncated += excess > 0
            ids = np.delete(encoding.ids, np.flatnonzero(encoding.sequence == 0)[:excess])
            made.append({"tokens": ids, "segments": np.ones(len(ids), np.int32)})
        return made

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.reward()

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        if "chosen" not in batch:
            return {"reward_B": objectives.scores_of(apply, params, batch)[:, 0]}
        return {f"{name}_B": objectives.scores_of(apply, params, batch[name])[:, 0] for name in ("chosen", "rejected")}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        return [{name.removesuffix("_B"): float(x) for name, x in output.items()} for output in outputs]

    def statistic(self) -> Callable[..., dict[str, float]]:
        return lambda predictions, rows: metrics.preference(*([p[name] for p in predictions] for name in ("chosen", "rejected")))
