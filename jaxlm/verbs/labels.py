"""jaxlm predict and jaxlm evaluate."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxlm import config as configs
from jaxlm.devices import LoadOptions
from jaxlm.report.console import bar, say
from jaxlm.text_files import read_lines, write_json_lines
from jaxlm.verbs.decoding import SAMPLING
from jaxlm.verbs.suites import evaluate_suite
from jaxlm.verbs.words import split_words

if TYPE_CHECKING:
    from jaxlm.models import Trained
    from jaxlm.tasks import Task


@dataclasses.dataclass(frozen=True)
class PredictOptions(LoadOptions):
    """The flags of `jaxlm predict`."""

    text: str | None = None
    """What to predict for: a text, of tagging a sentence, of a dialogue the user's turn."""
    pair: str | None = None
    """Its second text, where the task is about pairs."""
    question: str | None = None
    """The question about a context or with choices."""
    context: str | None = None
    """What answers the question."""
    choices: str | None = None
    """Choices for an answer, divided by |."""
    file: str | None = None
    """Rows instead: a text a line (.txt), or columns named as the flags above (tsv, csv, jsonl, parquet)."""
    out: str | None = None
    """File of JSON lines to write the predictions to."""
    task: str | None = None
    """The task, where a Hugging Face model's head leaves it open."""
    length: int | None = None
    """Most tokens of a row; empty: as in training, or the model's positions."""
    batch_size: int = 32
    """Rows computed at a time."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.file is not None and any((self.text, self.pair, self.question, self.context, self.choices)):
            raise ValueError("give a file, or the text itself, not both")


def predict(words: Sequence[str]) -> int:
    """jaxlm predict MODEL --text TEXT | --file FILE [--out FILE]: the label (or answer, tags, text) with its probability."""
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(PredictOptions, None, flags).value
    from jaxlm.models import load_model
    from jaxlm.tasks import Predictor

    trained = load_model(argument, options=options)
    task = trained.task(options.task, options.length)
    _tell_settings(trained, task)
    rows = _rows(task, options)
    predictor = Predictor(task, trained.model, trained.mesh, min(options.batch_size, len(rows)))
    predictions = predictor.predict(trained.params, rows)
    assert predictions is not None, "nothing stops it"
    if options.out is not None:
        write_json_lines(pathlib.Path(options.out), ({**row, "prediction": p} for row, p in zip(rows, predictions, strict=True)))
        say(f"{options.out}: {len(rows):,} predictions")
        return 0
    for row, prediction in zip(rows, predictions, strict=True):
        say(task.show(row, prediction))
    return 0


def _rows(task: "Task", options: PredictOptions) -> list[dict[str, Any]]:
    """The rows to predict for, with the roles that the task needs."""
    if options.file is not None:
        file = pathlib.Path(options.file)
        if not file.is_file():
            raise ValueError(f"no file {options.file!r}")
        if file.suffix == ".txt":
            lines = [line for _, line in read_lines(file)]
            if not lines:
                raise ValueError(f"{options.file} holds no text")
            return [_as_given(task, {task.given[0]: line}) for line in lines]
        from jaxlm.data import RowsConfig, read_rows

        return read_rows(options.file, RowsConfig(), task.given, ("pair",) if "pair" in task.optional else ()).rows
    given: dict[str, Any] = {name: getattr(options, name) for name in ("pair", "question", "context")}
    given["choices"] = options.choices.split("|") if options.choices else None
    if options.text is not None:
        given[task.given[0]] = options.text
    given = {name: value for name, value in given.items() if value is not None}
    missing = [name for name in task.given if name not in given]
    if missing:
        known = [f"--{'text' if name == task.given[0] and name not in ('question',) else name}" for name in missing]
        raise ValueError(f"task {task.config.kind} needs {' and '.join(known)} (or --file FILE)")
    return [_as_given(task, given)]


def _as_given(task: "Task", row: dict[str, Any]) -> dict[str, Any]:
    """A text as words where the task is about words: runs of letters and digits, and every other sign."""
    if "tokens" in row and isinstance(row["tokens"], str):
        row = {**row, "tokens": re.findall(r"\w+|[^\w\s]", row["tokens"])}
    return row


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(LoadOptions):
    """The flags of `jaxlm evaluate`."""

    data: str | None = None
    """Labelled rows, as data.train takes them; empty: those that the run held out."""
    header: tuple[str, ...] = ()
    """Names of the columns of a file without them; empty: as in training."""
    columns: str | None = None
    """Roles and their columns, as in text=sentence,label=class; empty: as in training."""
    task: str | None = None
    """The task, where a Hugging Face model's head leaves it open; or a suite: hellaswag, openbookqa, copa, winogrande, wikitext."""
    limit: int | None = None
    """Of a suite: only the first rows."""
    bos: bool | None = None
    """Of a suite: whether texts begin with the beginning of text; empty: as the tokenizer has it."""
    out: str | None = None
    """Folder for scores.json and the predictions; empty: evaluation/ in the run's folder, or ./evaluation (of a suite a folder
    in it)."""
    against: str | None = None
    """Another model's predictions.jsonl for the same rows, to be compared with by a paired test."""
    length: int | None = None
    """Most tokens of a row; empty: as in training, or the model's positions (of a suite always these)."""
    batch_size: int = 32
    """Rows computed at a time."""

    def __post_init__(self) -> None:
        _check_sizes(self, "limit")
        if self.against is not None and not pathlib.Path(self.against).is_file():
            raise ValueError(f"no file {self.against!r}")


def evaluate(words: Sequence[str]) -> int:
    """jaxlm evaluate MODEL [--task TASK|SUITE] [--data FILE] [--against FILE]: scores with intervals, a page of errors."""
    (argument,), flags = split_words(words, "MODEL")
    options = configs.load(EvaluateOptions, None, flags).value
    if _is_suite(options):
        assert options.task and options.data, "_is_suite checks them"
        return evaluate_suite(
            argument, options.task, options.data, limit=options.limit, out=options.out, length=options.length, bos=options.bos,
            batch_size=options.batch_size, loading=options,
        )  # fmt: skip
    from jaxlm.models import load_model
    from jaxlm.tasks import Predictor, paired_scores, paired_tests, write_predictions

    trained = load_model(argument, options=options)
    task = trained.task(options.task, options.length)
    _tell_settings(trained, task)
    held = _held_out(trained.run, task, options)
    predictor = Predictor(task, trained.model, trained.mesh, options.batch_size)
    examples = None if task.generates else task.examples(held.rows, held.where)
    if task.refers and examples is not None:
        passed = predictor.run(trained.start(), examples.items, loss=False)
        assert passed is not None, "nothing stops it"
        task.refer(examples, passed.outputs)
    with bar("predicting", len(held.rows), "rows") as shown:
        predictions = predictor.predict(trained.params, held.rows, examples, advance=shown.advance)
    assert predictions is not None, "nothing stops it"
    folder = pathlib.Path(options.out) if options.out else (trained.run or pathlib.Path()) / "evaluation"
    say(held.summary())
    for name, text in write_predictions(folder, trained.name, task, held.rows, predictions).items():
        say(f"{name + ':':<24}{text}")
    if options.against is not None:
        other = [json.loads(line)["prediction"] for _, line in read_lines(pathlib.Path(options.against)) if line.strip()]
        if len(other) != len(predictions):
            raise ValueError(f"{options.against} holds {len(other):,} predictions, for {len(predictions):,} rows")
        for name, found in paired_scores(task, held.rows, predictions, other).items():
            say(f"{name} less the other's: {found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f}), p = {found.p:.4g}")
        for name, p in paired_tests(task, held.rows, predictions, other).items():
            say(f"{name}: p = {p:.4g}")
    say(f"look at {folder}/scores.html")
    return 0


def _tell_settings(trained: "Trained", task: "Task") -> None:
    """Say which of the model's own settings its texts are written by."""
    if task.generates and (line := trained.generation().told(missing=SAMPLING)):
        say(line)


def _is_suite(options: EvaluateOptions) -> bool:
    """Whether the task is one of lm-evaluation-harness; ValueError for one that is unknown, and for flags of the other kind."""
    from jaxlm.harness import SUITES
    from jaxlm.tasks import TASKS

    if options.task not in SUITES:
        if options.task is not None and options.task not in TASKS:
            raise configs.unknown("task", options.task, [*TASKS, *SUITES])
        if options.limit is not None or options.bos is not None:
            raise ValueError(f"limit and bos are for the suites ({', '.join(SUITES)}): name one with --task")
        return False
    if options.data is None:
        raise ValueError(f"task {options.task} needs --data FILE: rows in the harness's format")
    if options.against or options.header or options.columns:
        raise ValueError(f"against, header and columns are not for task {options.task}, whose rows have one format")
    return True


def _held_out(run: pathlib.Path | None, task: "Task", options: EvaluateOptions) -> Any:
    """The labelled rows to evaluate on."""
    from jaxlm.data import DataConfig, RowsConfig, read_rows, split_rows

    data = DataConfig() if run is None else configs.build(DataConfig, configs.read_yaml(run / "config.yaml")[0]["data"])
    rows: RowsConfig = data.rows
    if options.header:
        rows = dataclasses.replace(rows, header=options.header)
    if options.columns:
        pairs = dict(pair.partition("=")[::2] for pair in options.columns.split(","))
        fields = [field.name for field in dataclasses.fields(rows.columns)]
        for role in pairs:
            if role not in fields:
                raise configs.unknown("role", role, fields)
        rows = dataclasses.replace(rows, columns=dataclasses.replace(rows.columns, **pairs))
    roles = task.roles(task.config, task.architecture)
    if options.data is not None:
        return read_rows(options.data, dataclasses.replace(rows, limit=None), *roles)
    if data.train is None:
        raise ValueError("give the rows to evaluate on: --data FILE")
    if data.validation:
        return read_rows(data.validation, rows, *roles, split="validation")
    return split_rows(read_rows(data.train, rows, *roles), data.holdout.fraction)[1]


def _check_sizes(options: Any, *more: str) -> None:
    for name in ("length", "batch_size", *more):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
