"""Labels of texts and of their words: one class, several classes, a number, a tag a word."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jaxlm import metrics
from jaxlm.config import unknown
from jaxlm.data import Tokenizer, with_prefix_space
from jaxlm.tasks.task import (
    ONE,
    Examples,
    Outputs,
    Prediction,
    Row,
    Task,
    balanced,
    check_not_swapped,
    label_ids,
    label_names,
    of_columns,
    together,
)
from jaxlm.train import Objective, objectives


def _texts(rows: Sequence[Row]) -> tuple[list[str], list[str] | None]:
    pairs = [row["pair"] for row in rows if row.get("pair") is not None]
    if pairs and len(pairs) != len(rows):
        raise ValueError(f"{len(pairs)} of {len(rows)} rows have a second text: all must, or none")
    return [row["text"] for row in rows], pairs or None


class _OfTexts(Task):
    """A prediction for a text or a pair of texts."""

    required = ("text", "label")
    optional = ("pair",)

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        made = self.encoded(*_texts(rows))
        for example, targets in zip(made, self._targets(rows, where), strict=True):
            example |= {"labels": targets, "weights": ONE} if not isinstance(targets, dict) else {**targets, "weights": ONE}
        return Examples(made, np.arange(len(made)))

    def _targets(self, rows: Sequence[Row], where: Sequence[str] | None) -> Sequence[Any]:
        raise NotImplementedError


class Classification(_OfTexts):
    """One of several classes for a text or a pair of texts: sentiment, topic, intent, paraphrase, acceptability."""

    def learn(self, rows: Sequence[Row]) -> None:
        names = [str(row["label"]) for row in rows]
        if not self.config.labels:
            check_not_swapped(names, [row["text"] for row in rows])
        self.labels = label_names(set(names), self.config, self.labels)
        if len(set(names)) < 2:
            raise ValueError(f"all training rows have the label {names[0]!r}: two labels are the least to tell apart")
        if self.config.positive is not None and len(self.labels) != 2:
            raise ValueError(f"task.positive {self.config.positive!r} is one of two classes: the rows have {len(self.labels)}")
        if self.config.class_weights == "balanced":
            self.class_weights = balanced(label_ids(names, self.labels, None), len(self.labels))

    @property
    def positive(self) -> str | None:
        """The positive class of two."""
        if len(self.labels) != 2:
            return None
        if self.config.positive is not None:
            if self.config.positive not in self.labels:
                raise unknown("positive class", self.config.positive, self.labels)
            return self.config.positive
        named = [label for label in self.labels if label.strip().casefold() in ("positive", "pos", "yes", "true", "1")]
        return named[0] if len(named) == 1 else self.labels[1]

    @property
    def scoring_options(self) -> dict[str, str | None]:
        return super().scoring_options | ({"positive": None} if len(self.labels) == 2 else {})

    def title(self, score: str) -> str:
        of_one = self.positive is not None and score in ("precision", "recall", "f1", "auroc", "auprc")
        return f"{score} ({self.positive})" if of_one else score

    def notes(self, rows: Sequence[Row]) -> dict[str, str]:
        return {} if self.positive is None else {"positive class": f"{self.positive} (task.positive names another)"}

    def report(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> dict[str, metrics.PerClass]:
        each = metrics.class_scores([p["label"] for p in predictions], [str(row["label"]) for row in rows], self.labels)
        return each | metrics.averages(each)

    def _targets(self, rows: Sequence[Row], where: Sequence[str] | None) -> Sequence[Any]:
        if any("label" not in row for row in rows):
            return [np.int32(0)] * len(rows)
        return list(label_ids([str(row["label"]) for row in rows], self.labels, where))

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.classes(self.class_weights, self.config.label_smoothing)

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"probabilities_BC": jax.nn.softmax(objectives.scores_of(apply, params, batch))}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        made = []
        for output in outputs:
            given = output["probabilities_BC"]
            best = int(np.argmax(given))
            named = {name: float(p) for name, p in zip(self.labels, given, strict=True)}
            made.append({"label": self.labels[best], "probability": float(given[best]), "probabilities": named})
        return made

    def statistic(self) -> Callable[..., dict[str, float]]:
        def columns(predictions: Sequence[Prediction], rows: Sequence[Row]) -> Sequence[Any]:
            probabilities = [[p["probabilities"][name] for name in self.labels] for p in predictions]
            return [p["label"] for p in predictions], [str(row["label"]) for row in rows], probabilities

        def calibrated(predictions: Sequence[Prediction], rows: Sequence[Row]) -> Sequence[Any]:
            _, actual, probabilities = columns(predictions, rows)
            return probabilities, label_ids(actual, self.labels, None)

        scores = of_columns(metrics.weighted_classification(self.labels, self.positive), columns)
        return together(scores, of_columns(metrics.weighted_calibration(), calibrated))

    def confusion(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> tuple[Sequence[str], np.ndarray] | None:
        counts = np.zeros((len(self.labels), len(self.labels)), int)
        for row, prediction in zip(rows, predictions, strict=True):
            counts[self.labels.index(str(row["label"])), self.labels.index(prediction["label"])] += 1
        return self.labels, counts

    def wrong(self, row: Row, prediction: Prediction) -> tuple[float, str, str] | None:
        expected = str(row["label"])
        return None if expected == prediction["label"] else (prediction["probability"], expected, prediction["label"])

    def show(self, row: Row, prediction: Prediction) -> str:
        others = sorted(prediction["probabilities"].items(), key=lambda pair: -pair[1])[1:4]
        rest = ", ".join(f"{name} {p:.3f}" for name, p in others)
        return f"{prediction['label']} {prediction['probability']:.3f}" + (f"  ({rest})" if rest else "")


class Multilabel(_OfTexts):
    """Any number of classes for a text."""

    required = ("text", "labels")
    metric = "f1_micro"

    def learn(self, rows: Sequence[Row]) -> None:
        names = [str(name) for row in rows for name in row["labels"]]
        if not self.config.labels:
            check_not_swapped(names, [row["text"] for row in rows])
        self.labels = label_names(set(names), self.config, self.labels)
        if self.config.class_weights == "balanced":
            yes_C = np.maximum(np.sum([self._vector(row) for row in rows], axis=0), 1)
            no_C = np.maximum(len(rows) - yes_C, 1)  # a class that all have is learned too
            self.class_weights = (no_C / yes_C).tolist()  # of the rows that have it

    def _vector(self, row: Row, where: str | None = None) -> np.ndarray:
        vector_C = np.zeros(len(self.labels), np.float32)
        names = [str(name) for name in row.get("labels", ())]
        if names:
            vector_C[label_ids(names, self.labels, [where] * len(names) if where else None)] = 1
        return vector_C

    def _targets(self, rows: Sequence[Row], where: Sequence[str] | None) -> Sequence[Any]:
        return [{"labels_C": self._vector(row, where[i] if where else None)} for i, row in enumerate(rows)]

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.several_classes(self.class_weights)

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"probabilities_BC": jax.nn.sigmoid(objectives.scores_of(apply, params, batch))}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        made = []
        for output in outputs:
            named = {name: float(p) for name, p in zip(self.labels, output["probabilities_BC"], strict=True)}
            made.append({"labels": [n for n, p in named.items() if p >= self.config.threshold], "probabilities": named})
        return made

    def statistic(self) -> Callable[..., dict[str, float]]:
        def columns(predictions: Sequence[Prediction], rows: Sequence[Row]) -> Sequence[Any]:
            probabilities = [[p["probabilities"][name] for name in self.labels] for p in predictions]
            return np.array(probabilities), np.array([self._vector(row) for row in rows])

        return of_columns(metrics.weighted_multilabel(self.config.threshold), columns)

    def report(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> dict[str, metrics.PerClass]:
        probabilities = [[p["probabilities"][name] for name in self.labels] for p in predictions]
        truths = [self._vector(row) for row in rows]
        each = metrics.multilabel_scores(probabilities, truths, self.labels, self.config.threshold)
        return each | metrics.averages(each)

    def show(self, row: Row, prediction: Prediction) -> str:
        chosen = [f"{name} {prediction['probabilities'][name]:.3f}" for name in prediction["labels"]]
        return ", ".join(chosen) or f"none (below {self.config.threshold:g})"


class Regression(_OfTexts):
    """A number for a text or a pair of texts."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "sequence", "labels": 1}
    metric = "pearson"

    def _targets(self, rows: Sequence[Row], where: Sequence[str] | None) -> Sequence[Any]:
        made = []
        for i, row in enumerate(rows):
            try:
                value = np.float32(row.get("label", 0))
            except ValueError:
                value = np.float32(np.nan)
            if not np.isfinite(value):
                place = where[i] if where else f"row {i}"
                raise ValueError(f"{place}: label {row['label']!r} is no finite number, as task regression needs")
            made.append(value)
        return made

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.squares()

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"value_B": objectives.scores_of(apply, params, batch)[:, 0]}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        return [{"value": float(output["value_B"])} for output in outputs]

    def statistic(self) -> Callable[..., dict[str, float]]:
        return lambda predictions, rows: metrics.regression(
            [p["value"] for p in predictions], [float(row["label"]) for row in rows]
        )

    def show(self, row: Row, prediction: Prediction) -> str:
        return f"{prediction['value']:.4f}"


_SPAN_TAG = re.compile("O|[BIESLU]-.+|[BI]", re.DOTALL)


class Tagging(Task):
    """A tag for each word, of names by BIO tags; the first token of a word stands for it (Devlin et al. 2019, §5.3)."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "token"}
    required = ("tokens", "tags")
    given = ("tokens",)
    unit = "words"

    def learn(self, rows: Sequence[Row]) -> None:
        self.labels = label_names({tag for row in rows for tag in row["tags"]}, self.config, self.labels)
        strange = next((tag for tag in self.labels if not _SPAN_TAG.fullmatch(tag)), None)
        if any(tag.startswith("B-") for tag in self.labels) and strange is not None:
            source = "task.labels: " if strange in self.config.labels else ""
            raise ValueError(
                f"{source}tag {strange!r} is no span's as other tags are: expected O, or one of B-, I-, E-, S-, L-, U- with a type"
            )

    @property
    def saved_tokenizer(self) -> Tokenizer:
        """With a space before each word, where words are tokenised so."""
        return self.tokenizer.with_definition(with_prefix_space(self.tokenizer.definition()))

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "f1" if self.spans else "accuracy"

    @property
    def spans(self) -> bool:
        """The tags name spans (BIO, IOB1, BIOES, BILOU), else parts of speech or the like."""
        return any(label != "O" for label in self.labels) and all(map(_SPAN_TAG.fullmatch, self.labels))

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        items, about = [], []
        for i, (row, encoding) in enumerate(zip(rows, self.text_encoder.words([row["tokens"] for row in rows]), strict=True)):
            words = encoding.words
            first = (words >= 0) & (words != np.concatenate([[-1], words[:-1]]))
            labels = np.zeros(len(words), np.int32)
            if "tags" in row:
                ids = label_ids(list(row["tags"]), self.labels, [where[i]] * len(row["tags"]) if where else None)
                labels[first] = ids[words[first]]
            ones = np.ones(len(words), np.int32)
            items.append({"tokens": encoding.ids, "segments": ones, "labels": labels, "weights": first.astype(np.float32)})
            about.append((words[first], np.flatnonzero(first)))
        return Examples(items, np.arange(len(items)), about)

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.classes(None, self.config.label_smoothing)

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"probabilities_BLC": jax.nn.softmax(objectives.scores_of(apply, params, batch))}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        """Words that were cut off get the tag O, or the first one where there is no O."""
        made = []
        for row, (words, places), output in zip(rows, examples.about, outputs, strict=True):
            tags = ["O" if "O" in self.labels else self.labels[0]] * len(row["tokens"])
            sure = [0.0] * len(tags)
            for word, place in zip(words, places, strict=True):
                given = output["probabilities_BLC"][place]
                tags[word], sure[word] = self.labels[int(np.argmax(given))], float(np.max(given))
            made.append({"tags": tags, "probabilities": sure})
        return made

    def statistic(self) -> Callable[..., dict[str, float]]:
        if self.spans:
            return of_columns(metrics.weighted_spans(), lambda ps, rows: ([p["tags"] for p in ps], [list(r["tags"]) for r in rows]))

        def right(predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, float]:
            pairs = [pair for p, row in zip(predictions, rows, strict=True) for pair in zip(p["tags"], row["tags"], strict=True)]
            return {"accuracy": float(np.mean([a == b for a, b in pairs]))}

        return right

    def report(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> dict[str, metrics.PerClass]:
        """Of spans by their type, else of words by their tag."""
        guesses, truths = [p["tags"] for p in predictions], [list(row["tags"]) for row in rows]
        if self.spans:
            each = metrics.span_scores(guesses, truths)
        else:
            each = metrics.class_scores([t for tags in guesses for t in tags], [t for tags in truths for t in tags], self.labels)
        return each | metrics.averages(each) if each else {}

    def show(self, row: Row, prediction: Prediction) -> str:
        return " ".join(
            f"{word}/{tag}" if tag != "O" else word for word, tag in zip(row["tokens"], prediction["tags"], strict=True)
        )
