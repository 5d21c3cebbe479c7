"""What a task is: how rows become examples, what is minimised, how predictions are read off, what is scored."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from jaxlm.config import unknown
from jaxlm.data import CorruptConfig, Example, Table, TextEncoder, Tokenizer
from jaxlm.generate import NO_RULES, DecodeConfig, LogitsRules
from jaxlm.metrics import PerClass, Weighted
from jaxlm.metrics.texts import Tokenizer as BleuTokenizer
from jaxlm.train import Objective

PRETRAINING = ("causal", "masked", "replaced", "span", "mixture", "prefix", "denoising")
Row = Mapping[str, Any]
Prediction = dict[str, Any]
"""Plain JSON: what was predicted for a row, with probabilities where there are any."""
Outputs = list[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is learned: an objective over unlabelled text, or a task over rows."""

    kind: Literal[
        "causal", "masked", "replaced", "span", "mixture", "prefix", "denoising",
        "classification", "multilabel", "regression", "tagging", "extractive_qa", "multiple_choice",
        "text_to_text", "chat", "embedding", "preference", "reward",
    ] = "causal"  # fmt: skip
    """Of text: the next token, masked tokens, replaced tokens, spans (T5), a mixture of spans (UL2), the text behind a
    prefix, the text below noise (BART). Of rows: one class or several, a number, a tag for each word, a span of a
    context, one of some choices, another text, the assistant's turns, vectors of similar texts, preferred answers by
    DPO, a reward for answers."""
    labels: tuple[str, ...] = ()
    """Names of the classes or tags in their order; empty: those of the training rows, sorted."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class counts inversely to its share of the training rows."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, or over the vocabulary."""
    threshold: float = 0.5
    """Probability from which on a class of several is predicted."""
    stride: int = 128
    """Tokens that neighbouring windows of a long context share."""
    answer_length: int = 30
    """Most tokens of an extracted answer."""
    template: str | None = None
    """What text_to_text reads, made of a row's fields, such as "question: {question} context: {context}"; empty:
    {source}."""
    target_length: int = 128
    """Most tokens of a target text."""
    append_eos: bool = True
    """End what text_to_text and preference learn to write with the end-of-text token, where the tokenizer does not end a text
    itself, so that the model learns to stop."""
    split_special_tokens: bool = False
    """Read special tokens that rows spell, such as </s>, as ordinary text; false: as special tokens, as `tokenizer(text)` and
    `apply_chat_template` of transformers do."""
    scores: Literal["auto", "translation", "summarisation", "answers"] = "auto"
    """What text_to_text is scored with: BLEU, chrF and TER; ROUGE; exact match and F1. auto: answers where rows have
    them, else translation."""
    tokenize: BleuTokenizer = "auto"
    """How BLEU cuts texts into words, by sacrebleu's name. auto: zh, ja-mecab or ko-mecab by the script of the references,
    char for others without spaces, else 13a."""
    positive: str | None = None
    """The positive class of two, which precision, recall, F1, AUROC and AUPRC are of; empty: the one called positive, pos,
    yes, true or 1, else the second."""
    chat_template: str | None = None
    """Jinja template of a conversation; empty: the tokenizer's own, or a plain one."""
    packed: bool = True
    """Several conversations share a row, without seeing each other."""
    temperature: float = 0.05
    """What cosines are divided by in embedding."""
    preference: Literal["dpo", "ipo"] = "dpo"
    """The loss over preferred answers."""
    beta: float = 0.1
    """How near preference stays to the reference."""
    generator: float = 0.25
    """Width of the generator of replaced tokens, as a share of the discriminator's."""
    detection: float = 50.0
    """Weight of the discriminator's loss beside the generator's."""
    corrupt: CorruptConfig = CorruptConfig()
    decode: DecodeConfig = DecodeConfig()

    def __post_init__(self) -> None:
        if len(self.labels) == 1:  # on the command line a list is spelt with commas
            object.__setattr__(self, "labels", tuple(name.strip() for name in self.labels[0].split(",")))
        for name in ("label_smoothing", "threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        for name in ("temperature", "beta", "answer_length", "target_length", "generator", "detection"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive")
        if self.stride < 0:
            raise ValueError(f"stride is {self.stride}: it must not be negative")
        if self.class_weights != "none" and self.kind not in ("classification", "multilabel"):
            raise ValueError(f"class_weights {self.class_weights} is for classification and multilabel, not for {self.kind}")
        if self.label_smoothing and self.kind not in (*PRETRAINING, "classification", "tagging", "text_to_text", "chat"):
            raise ValueError(f"label_smoothing {self.label_smoothing:g} is for classes and tokens, not for {self.kind}")
        if self.tokenize != "auto" and self.kind != "text_to_text":
            raise ValueError(f"tokenize {self.tokenize} is for the BLEU of text_to_text, not for {self.kind}")
        if self.positive is not None and self.kind != "classification":
            raise ValueError(f"positive {self.positive!r} is for classification, not for {self.kind}")
        doubled = [label for label in self.labels if self.labels.count(label) > 1]
        if doubled:
            raise ValueError(f"labels names {doubled[0]!r} twice")

    @property
    def pretraining(self) -> bool:
        """The task is learned from unlabelled text."""
        return self.kind in PRETRAINING


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of some rows: a long context gives several."""

    items: list[Example]
    row: np.ndarray
    """Which row each was made of."""
    about: list[Any] = dataclasses.field(default_factory=list)
    """What reading its prediction off needs."""

    def __len__(self) -> int:
        return len(self.items)

    def first(self, rows: int) -> "Examples":
        """Those of the first so many rows."""
        kept = np.flatnonzero(self.row < rows)
        return Examples([self.items[i] for i in kept], self.row[kept], [self.about[i] for i in kept] if self.about else [])


class Task:
    """A task over labelled rows. Subclasses say the rest; everything but `outputs` and `objective` runs on the host."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "sequence"}
    """Fields of the model's head that the task needs."""
    required: ClassVar[tuple[str, ...]] = ()
    """Roles that every row has."""
    optional: ClassVar[tuple[str, ...]] = ()
    given: ClassVar[tuple[str, ...]] = ("text",)
    """Roles that a prediction needs; the first is what `--text` gives."""
    metric: ClassVar[str] = "accuracy"
    """The score by which checkpoints are compared, the higher the better unless it is the loss."""
    unit: ClassVar[str] = "rows"
    """What the weights of the objective count."""
    generates: ClassVar[bool] = False
    """Predictions are written token by token."""
    refers: ClassVar[bool] = False
    """Examples hold what the model at the start gave for them: `refer` is called before they are learned or read."""

    def __init__(
        self, config: TaskConfig, tokenizer: Tokenizer, length: int, *,
        labels: Sequence[str] = (), architecture: str = "encoder", start_id: int | None = None,
    ):  # fmt: skip
        """`length` is that of the model's rows in tokens; `start_id` what a decoder that reads an encoder begins with."""
        self.config, self.tokenizer, self.length, self.architecture = config, tokenizer, length, architecture
        self.labels = tuple(labels or config.labels)
        self.start_id = tokenizer.eos_id if start_id is None else start_id
        self.text_encoder = TextEncoder(tokenizer, length, split_special_tokens=config.split_special_tokens)
        self.class_weights: list[float] | None = None
        self.rules: LogitsRules = NO_RULES
        """Constraints on what is written, as the model's own settings have them."""
        self.ends: frozenset[int] = frozenset()
        """Tokens that end what is written, beside the task's own."""
        self.remarks: list[str] = []
        """What a person should know of the examples made so far: `examples` adds to it."""

    @classmethod
    def roles(cls, config: TaskConfig, architecture: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The roles that training rows must have, and those that they may have."""
        return cls.required, cls.optional

    @property
    def saved_tokenizer(self) -> Tokenizer:
        """The tokenizer for the run's folder: with it alone transformers gives the ids that were trained on."""
        return self.tokenizer

    @property
    def spelled(self) -> int:
        """Texts so far that spell a special token."""
        return self.text_encoder.spelled

    @property
    def pad_id(self) -> int:
        return self.tokenizer.special.get("pad", self.tokenizer.eos_id)

    def learn(self, rows: Sequence[Row]) -> None:
        """What the training rows decide: names of labels, weights of classes."""

    def check(self, row: Row, *, training: bool = True) -> None:
        """Raise ValueError, to be read after the row's place, for a row that gives no example (not `training`: no prediction)."""

    def unusable(self, rows: Sequence[Row], *, training: bool = True) -> dict[int, str]:
        """Number of each row that `check` refuses → why."""
        found = {}
        for i, row in enumerate(rows):
            try:
                self.check(row, training=training)
            except ValueError as error:
                found[i] = str(error)
        return found

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        """The examples of labelled rows; rows without what is to be predicted give examples without it."""
        raise NotImplementedError

    def idle_options(self) -> dict[str, str]:
        """Options of `TaskConfig` that were given and that the examples made so far did not need → why."""
        return {}

    def refer(self, examples: Examples, outputs: Outputs) -> None:
        """Keep with each example what the model at the start gave for it, where the task `refers`."""
        raise NotImplementedError

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        """What a step minimises. `chunk` and `z_loss` are for a loss over the vocabulary: positions of a row whose logits exist
        at a time, and the weight of log²Z."""
        raise NotImplementedError

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays with B first that predictions are read off; pure, on the device."""
        raise NotImplementedError

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        """A prediction for each row."""
        raise NotImplementedError

    @property
    def scoring_options(self) -> dict[str, str | None]:
        """The options of `TaskConfig` that only scores depend on → None if this task reads them, else when they are read."""
        return {"tokenize": "in the BLEU of text_to_text only", "positive": "in classification with two classes only"}

    def statistic(self) -> Callable[..., dict[str, float]]:
        """The scores, a function of (predictions, rows); a `Weighted` one where they are to be had fast for resamples."""
        raise NotImplementedError

    def scores(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> dict[str, float]:
        """Name → score of the predictions."""
        return dict(self.statistic()(predictions, rows))

    def signatures(self, rows: Sequence[Row]) -> dict[str, str]:
        """How scores were computed, for others to repeat, where a score has a signature."""
        return {}

    def title(self, score: str) -> str:
        """The name of a score for a person."""
        return score

    def notes(self, rows: Sequence[Row]) -> dict[str, str]:
        """What a reader of the scores has to know, by a name for it."""
        return {}

    def report(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> dict[str, PerClass]:
        """Scores of each class (or type of span), and their means, where the task has classes."""
        return {}

    def confusion(self, rows: Sequence[Row], predictions: Sequence[Prediction]) -> tuple[Sequence[str], np.ndarray] | None:
        """(labels, counts of actual × predicted) where the task has one label a row."""
        return None

    def wrong(self, row: Row, prediction: Prediction) -> tuple[float, str, str] | None:
        """(how wrong, expected, predicted) of a prediction that is not right, or None."""
        return None

    def show(self, row: Row, prediction: Prediction) -> str:
        """One line of a prediction for a person."""
        return json.dumps(prediction, ensure_ascii=False)

    def encoded(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Example]:
        """Texts, or pairs of them, as the model reads them."""
        made = []
        for encoding in self.text_encoder.encode(texts, pairs):
            example: Example = {"tokens": encoding.ids, "segments": np.ones(len(encoding.ids), np.int32)}
            made.append(example | {"types": encoding.types} if pairs is not None else example)
        return made


def usable(task: Task, table: Table) -> Table:
    """The table without the rows that the task refuses (`Task.check`). Raises ValueError where none is left."""
    reasons = task.unusable(table.rows)
    if reasons and len(reasons) == len(table.rows):
        number, why = next(iter(reasons.items()))
        raise ValueError(f"{table.name}: none of {len(table.rows):,} rows can be used: {table.where[number]}: {why}")
    return table.without(reasons) if reasons else table


ONE = np.float32(1)


def label_names(found: Collection[str], config: TaskConfig, source: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the labels in their order: the config's, which must cover those found; else those found, in the order of
    the `source` (the labels of the model that the run starts from) where it has the same ones, else sorted, numbers by value.
    """
    if config.labels:
        for name in sorted(found):
            if name not in config.labels:
                raise unknown("label", name, config.labels)
        return config.labels
    _check_spellings(found)
    if len(found) < 2:
        raise ValueError(f"the training rows have one label only, {next(iter(found), None)!r}: two are the least to tell apart")

    def key(name: str) -> tuple[int, float, str]:
        try:
            number = float(name)
        except ValueError:
            number = math.nan
        return (0, number, name) if math.isfinite(number) else (1, 0.0, name)  # "nan" is no number: it has no order

    names = tuple(sorted(found, key=key))
    order = label_order(source, names)
    return names if order is None else tuple(name for _, name in sorted(zip(order, names, strict=True)))


def _check_spellings(found: Collection[str]) -> None:
    """Raise ValueError for two labels that are probably one class: 1 and 1.0, true and True, 1 and true."""
    classes: dict[str, str] = {}
    for name in sorted(found):
        key = {"true": "1", "false": "0"}.get(name.casefold()) or re.sub(r"^([+-]?\d+)\.0*$", r"\1", name)
        if key in classes:
            raise ValueError(
                f"labels {classes[key]!r} and {name!r} of the training rows look like one class: write it in one way, or name both "
                "in task.labels"
            )
        classes[key] = name


def check_not_swapped(labels: Sequence[str], texts: Sequence[str]) -> None:
    """Raise ValueError where (nearly) every row has a label of its own, or labels differ where texts repeat: the columns are
    probably swapped. `texts` has the text of each row, `labels` its label, or all labels of all rows."""
    distinct, rows = len(set(labels)), len(labels)
    repeated = len(set(texts)) < 0.5 * min(distinct, len(texts))
    if rows < 8 or (distinct < 0.9 * rows and not (distinct > 0.5 * rows and repeated)):
        return
    raise ValueError(
        f"{distinct:,} labels for {rows:,} training rows, such as {labels[0][:40]!r}: are text and label swapped? "
        "--data.rows.columns.text and --data.rows.columns.label name the columns; task.labels names labels that are meant; "
        "task.kind regression learns numbers"
    )


def label_order(source: Sequence[str], labels: Sequence[str], ordered: bool = False) -> list[int] | None:
    """Index of each label among the labels of the source model; None if the two sets differ.

    Labels are the same if they are spelt alike, but for letter case where that leaves no doubt. Numbers from 0 on are places
    among names that are not numbers themselves, as transformers takes integer labels. `ordered`: the user named the labels
    in their order, which is what the placeholders LABEL_0, LABEL_1, … stand for.
    """
    if not labels or len(source) != len(labels):
        return None
    spelt: tuple[Callable[[str], str], ...] = (str, lambda name: name.strip().casefold())
    for spell in spelt:
        place = {spell(name): i for i, name in enumerate(source)}
        if len(place) == len(source) and place.keys() == {spell(name) for name in labels}:
            return [place[spell(name)] for name in labels]
    count = range(len(source))
    if sorted(labels) == sorted(map(str, count)) and not any(name.strip().isdecimal() for name in source):
        return [int(name) for name in labels]
    return list(count) if ordered and list(source) == [f"LABEL_{i}" for i in count] else None


def label_ids(names: Sequence[str], labels: Sequence[str], where: Sequence[str] | None) -> np.ndarray:
    """The number of each label. Raises ValueError for one that training did not have, with its place."""
    number = {name: i for i, name in enumerate(labels)}
    for i, name in enumerate(names):
        if name not in number:
            place = f"{where[i]}: " if where else ""
            raise unknown(f"label ({place}it is not among those of the training rows):", name, labels[:20])
    return np.array([number[name] for name in names], np.int32)


def balanced(ids: np.ndarray, classes: int) -> list[float]:
    """n / (classes · count) of each class (King and Zeng 2001); a class without a row counts once."""
    counts = np.maximum(np.bincount(ids, minlength=classes), 1)
    return (len(ids) / (classes * counts)).tolist()


def of_columns(statistic: Weighted, columns: Callable[[Sequence[Prediction], Sequence[Row]], Sequence[Any]]) -> Weighted:
    """A statistic of arrays as one of predictions and rows."""
    return Weighted(lambda predictions, rows: statistic.prepare(*columns(predictions, rows)))


def together(*statistics: Weighted) -> Weighted:
    """The scores of several statistics."""

    def prepare(*arrays: Any) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        prepared = [statistic.prepare(*arrays) for statistic in statistics]
        return lambda weights_NB: {name: x for scores in prepared for name, x in scores(weights_NB).items()}

    return Weighted(prepare)
