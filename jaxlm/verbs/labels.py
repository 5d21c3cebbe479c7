"""jaxlm predict and jaxlm evaluate."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxlm import config as configs
from jaxlm.devices import LoadOptions
from jaxlm.report.console import bar, say
from jaxlm.text_files import json_line, read_lines, undecodable, write_json_lines
from jaxlm.verbs.decoding import SAMPLING, report_spelled
from jaxlm.verbs.suites import evaluate_suite
from jaxlm.verbs.words import check_out, rows_config, split_row_flags, split_words

if TYPE_CHECKING:
    from jaxlm.data import DataConfig, Input, RowsConfig, Splits, Table
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
    """Rows instead, from anything that data.train reads; the columns are those of training. A .txt file without columns holds a
    text a line."""
    header: tuple[str, ...] = ()
    """Names of the columns of a file without them, as in text,label; empty: as in training. All --data.rows.… options of
    training work too."""
    columns: str | None = None
    """Roles and their columns, as in text=sentence,label=class; empty: as in training."""
    split: str | None = None
    """Split of `--file`, where it has several, as hf:ID has; empty: validation, else test, else train."""
    out: str | None = None
    """File of JSON lines to write the predictions to."""
    task: str | None = None
    """The task, where a Hugging Face model's head leaves it open."""
    length: int | None = None
    """Most tokens of a row; empty: as in training, or the model's positions."""
    split_special_tokens: bool | None = None
    """Read special tokens that rows spell, such as </s>, as ordinary text; empty: as in training, or as transformers does, which
    reads them as special tokens."""
    batch_size: int = 32
    """Rows computed at a time."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.file is not None and any((self.text, self.pair, self.question, self.context, self.choices)):
            raise ValueError("give a file, or the text itself, not both")


def predict(words: Sequence[str]) -> int:
    """jaxlm predict MODEL --text TEXT | --file FILE [--out FILE]: the label (or answer, tags, text) with its probability."""
    (argument,), flags = split_words(words, "MODEL")
    flags, row_flags = split_row_flags(flags)
    options = configs.load(PredictOptions, None, flags).value
    if options.out is not None:
        check_out(pathlib.Path(options.out))
    from jaxlm.models import load_model
    from jaxlm.tasks import Predictor

    trained = load_model(argument, options=options)
    task = trained.task(options.task, options.length, options.split_special_tokens)
    if options.length is not None and task.config.kind == "chat":
        raise ValueError(
            f"length {options.length} would do nothing here: a conversation to be continued is read whole; leave it out"
        )
    _tell_settings(trained, task)
    inputs = [_checked(task, item) for item in _rows(task, options, trained.run, row_flags)]
    rows = [item.row for item in inputs if item.row is not None]
    if not rows:
        raise ValueError(f"{options.file}: none of {len(inputs):,} rows can be used: {inputs[0].place}: {inputs[0].why}")
    predictor = Predictor(task, trained.model, trained.mesh, min(options.batch_size, len(rows)))
    predictions = predictor.predict(trained.params, rows)
    assert predictions is not None, "nothing stops it"
    made = iter(predictions)
    results = [(item, None if item.row is None else next(made)) for item in inputs]
    if options.out is not None:
        write_json_lines(pathlib.Path(options.out), (_line(item, prediction) for item, prediction in results))
        bad = [item for item in inputs if item.row is None]
        left = f", of which {len(bad):,} could not be made: {bad[0].place}: {bad[0].why}" if bad else ""
        say(f"{options.out}: {len(results):,} predictions{left}")
        report_spelled(task.spelled, task.config.split_special_tokens)
        return 0
    for item, prediction in results:
        say(f"{item.place}: {item.why}" if item.row is None or prediction is None else task.show(item.row, prediction))
    return 0


def _line(item: "Input", prediction: Any) -> dict[str, Any]:
    """A row's own columns and its prediction, or why there is none."""
    why = {} if item.why is None else {"error": f"{item.place}: {item.why}"}
    return {**item.record, "prediction": prediction, **why}


def _rows(
    task: "Task", options: PredictOptions, run: pathlib.Path | None = None, flags: Mapping[str, configs.Text] | None = None
) -> list["Input"]:
    """What to predict for, with the roles that the task needs; one for each row of a file."""
    from jaxlm.data import Input, read_inputs
    from jaxlm.experiment import check_row_flags

    flags = flags or {}
    if options.file is None:
        unread = ["split"] * (options.split is not None) + list(flags)
        if unread:
            raise ValueError(f"{unread[0]} would do nothing here: it is read with --file only; leave it out")
        row = _given_row(task, options)
        return [Input(row, row, "the row")]
    for name in ("data.rows.group", "data.rows.max_bad"):
        if name in flags:
            raise ValueError(f"{name} would do nothing here: every row is predicted for; leave it out")
    rows, replaceable = _reading(run, flags, other=True)
    if flags:
        check_row_flags(flags, options.file, rows, task.config, task.architecture)
    required = [role for role in task.given if role not in task.optional]
    optional = [role for role in ("prompt", "pair", "context") if role in task.optional]
    lines = _text_lines(options.file, rows, required)
    if lines is None:
        splits = _splits(options.split, flags)
        inputs, notes = read_inputs(options.file, rows, required, optional, splits=splits, replaceable=replaceable)
        for note in notes:
            say(note)
    elif not lines:
        raise ValueError(f"{options.file} holds no text")
    elif len(required) > 1:
        needs = " and ".join(required)
        raise ValueError(f"{options.file} holds one text a line; task {task.config.kind} reads {needs}: name them with --header")
    elif options.split is not None or (columns := [name for name in flags if name.startswith("data.rows.columns.")]):
        idle = "split" if options.split is not None else columns[0]
        raise ValueError(f"{idle} would do nothing here: {options.file} holds one text a line; leave it out")
    else:
        role, lines = required[0], lines[: rows.limit]
        inputs = [Input({role: text}, None if why else {role: text}, place, why) for place, text, why in lines]
    if any("pair" in (item.row or {}) for item in inputs):  # all are pairs, and the second text of some is empty
        inputs = [item._replace(row=item.row and {"pair": "", **item.row}) for item in inputs]
    return inputs


def _checked(task: "Task", item: "Input") -> "Input":
    if item.row is None:
        return item
    row = _as_given(task, item.row)
    why = task.unusable([row], training=False).get(0)
    return item._replace(row=row) if why is None else item._replace(row=None, why=why)


def _text_lines(path: str, rows: "RowsConfig", required: Sequence[str]) -> list[tuple[str, str, str | None]] | None:
    """(place, text, why it cannot be read) of each line of a .txt file without columns; None for everything else."""
    from jaxlm.data.columns import same_name
    from jaxlm.data.sources import format_of

    file = pathlib.Path(path)
    if format_of(file) != ".txt" or not file.is_file():
        return None
    lines = list(read_lines(file, rows.encoding))
    cells = lines[0][1].split(rows.separator or "\t") if lines else []
    names = [getattr(rows.columns, role, None) or role for role in required]
    if len(cells) > 1 and (rows.header or all(same_name(name, cells) for name in names)):
        return None
    return [(f"{file.name}:{number}", line, undecodable(line, rows.encoding)) for number, line in lines]


def _reading(run: pathlib.Path | None, flags: Mapping[str, configs.Text], *, other: bool = False) -> tuple["RowsConfig", list[str]]:
    """How rows are read, as the run reads its own unless flags say otherwise; and the roles whose column no flag names.

    Of `other` rows than the run's own all are read, and none is to be split: they need no column of groups.
    """
    from jaxlm.data import ColumnsConfig, DataConfig

    base = DataConfig().rows if run is None else _data_of(run).rows
    config = rows_config(dataclasses.replace(base, limit=None, group=None) if other else base, flags)
    roles = [field.name for field in dataclasses.fields(ColumnsConfig)]
    return config, [role for role in roles if f"data.rows.columns.{role}" not in flags]


def _splits(name: str | None, flags: Mapping[str, configs.Text]) -> "Splits":
    """Which split of other data than the run's own is read."""
    from jaxlm.data import UNSEEN, named_split

    return (UNSEEN if name is None else named_split(name))._replace(exact_key="data.rows.under" in flags)


def _data_of(run: pathlib.Path) -> "DataConfig":
    from jaxlm.data import DataConfig

    return configs.build(DataConfig, configs.read_yaml(run / "config.yaml")[0]["data"])


def _given_row(task: "Task", options: PredictOptions) -> dict[str, Any]:
    """The row that the flags give."""
    given: dict[str, Any] = {name: getattr(options, name) for name in ("pair", "question", "context")}
    given["choices"] = options.choices.split("|") if options.choices else None
    given = {name: value for name, value in given.items() if value is not None}
    read = [
        name for name in ("text", "pair", "question", "context", "choices") if name in {*task.given, *task.required, *task.optional}
    ]
    if unread := [name for name in given if name not in read]:
        raise ValueError(
            f"{unread[0]} would do nothing here: task {task.config.kind} reads {', '.join(read) or 'text'}; leave it out"
        )
    if options.text is not None:
        if task.given[0] in given:
            raise ValueError(f"text and {task.given[0]} are one and the same to task {task.config.kind}: give one of them")
        given[task.given[0]] = options.text
    missing = [name for name in task.given if name not in given]
    if missing:
        known = [f"--{'text' if name == task.given[0] and name not in ('question',) else name}" for name in missing]
        raise ValueError(f"task {task.config.kind} needs {' and '.join(known)} (or --file FILE)")
    return _as_given(task, given)


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
    split: str | None = None
    """Split of `--data`, where it has several, as hf:ID has; empty: validation, else test, else train."""
    header: tuple[str, ...] = ()
    """Names of the columns of a file without them, as in text,label; empty: as in training. All --data.rows.… options of
    training work too."""
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
    tokenize: str | None = None
    """How BLEU cuts texts into words, by sacrebleu's name (zh, 13a, …); empty: as in training, else by the references' script."""
    positive: str | None = None
    """The positive class of two, for precision, recall and F1; empty: as in training, else the one called so, else the second."""
    against: str | None = None
    """Another model's predictions.jsonl for the same rows, to be compared with by a paired test."""
    length: int | None = None
    """Most tokens of a row; empty: as in training, or the model's positions (of a suite always these)."""
    split_special_tokens: bool | None = None
    """Read special tokens that rows spell, such as </s>, as ordinary text; empty: as in training, or as transformers does, which
    reads them as special tokens."""
    batch_size: int = 32
    """Rows computed at a time."""

    def __post_init__(self) -> None:
        _check_sizes(self, "limit")
        if self.against is not None and not pathlib.Path(self.against).is_file():
            raise ValueError(f"no file {self.against!r}")


def evaluate(words: Sequence[str]) -> int:
    """jaxlm evaluate MODEL [--task TASK|SUITE] [--data FILE] [--against FILE]: scores with intervals, a page of errors."""
    (argument,), flags = split_words(words, "MODEL")
    flags, row_flags = split_row_flags(flags)
    options = configs.load(EvaluateOptions, None, flags).value
    if _is_suite(options, row_flags):
        assert options.task and options.data, "_is_suite checks them"
        return evaluate_suite(
            argument, options.task, options.data, limit=options.limit, out=options.out, length=options.length, bos=options.bos,
            batch_size=options.batch_size, loading=options,
        )  # fmt: skip
    from jaxlm.models import load_model
    from jaxlm.tasks import Predictor, paired_scores, paired_tests, usable, write_predictions

    if options.out is not None and pathlib.Path(options.out).is_file():
        raise ValueError(f"out {options.out!r} is a file: name a folder")
    trained = load_model(argument, options=options)
    task = trained.task(options.task, options.length, options.split_special_tokens)
    scoring = {name: value for name in ("tokenize", "positive") if (value := getattr(options, name)) is not None}
    for name, given in scoring.items():
        if when := task.scoring_options[name]:
            raise ValueError(f"{name} {given} would do nothing here: it is read {when}; leave it out")
    if scoring:
        task.config = configs.build(type(task.config), {**configs.to_dict(task.config), **scoring})
    _tell_settings(trained, task)
    held = usable(task, _held_out(trained.run, task, options, row_flags))
    other = None if options.against is None else _predictions(options.against, task, held)
    predictor = Predictor(task, trained.model, trained.mesh, options.batch_size)
    examples = None if task.generates else task.examples(held.rows, held.where)
    if task.refers and examples is not None:
        passed = predictor.run(trained.start(), examples.items, loss=False)
        assert passed is not None, "nothing stops it"
        task.refer(examples, passed.outputs)
    with bar("predicting", len(held.rows), "rows") as shown:
        predictions = predictor.predict(trained.params, held.rows, examples, advance=shown.advance, likelihood=True)
    assert predictions is not None, "nothing stops it"
    if other is not None and not all(map(_same_form, predictions, other)):
        raise ValueError(
            f"{options.against} holds predictions of another form than those of task {task.config.kind} with these labels"
        )
    folder = pathlib.Path(options.out) if options.out else (trained.run or pathlib.Path()) / "evaluation"
    say(held.summary())
    report_spelled(task.spelled, task.config.split_special_tokens)
    for name, text in write_predictions(folder, trained.name, task, held.rows, predictions).items():
        say(f"{name + ':':<24}{text}")
    if other is not None:
        for name, found in paired_scores(task, held.rows, predictions, other).items():
            say(f"{name} less the other's: {found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f}), p = {found.p:.4g}")
        for name, p in paired_tests(task, held.rows, predictions, other).items():
            say(f"{name}: p = {p:.4g}")
    say(f"look at {folder}/scores.html")
    return 0


def _predictions(file: str, task: "Task", held: "Table") -> list[Any]:
    """The predictions of a predictions.jsonl. Raises ValueError unless they are of the same rows in the same order."""
    try:
        lines = [(number, json.loads(line)) for number, line in read_lines(pathlib.Path(file)) if line.strip()]
        predictions = [line["prediction"] for _, line in lines]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is no predictions.jsonl: each line holds an object with a prediction") from None
    if len(lines) != len(held.rows):
        raise ValueError(f"{file} holds {len(lines):,} predictions, for {len(held.rows):,} rows")
    for (number, line), row, place in zip(lines, held.rows, held.where, strict=True):
        for role in task.given:
            if role in line and role in row and json_line(line[role]) != json_line(row[role]):
                raise ValueError(f"{file}:{number} has another {role} than {place}: predictions are compared row by row")
    return predictions


def _same_form(one: Any, other: Any) -> bool:
    """Whether another prediction has all that this one has."""
    if not isinstance(one, dict):
        return type(one) is type(other) or {type(one), type(other)} == {int, float}
    return isinstance(other, dict) and one.keys() <= other.keys() and all(_same_form(one[name], other[name]) for name in one)


def _tell_settings(trained: "Trained", task: "Task") -> None:
    """Say which of the model's own settings its texts are written by."""
    if task.generates and (line := trained.generation().told(missing=(*SAMPLING, "stop_strings"))):
        say(line)


def _is_suite(options: EvaluateOptions, row_flags: Mapping[str, configs.Text]) -> bool:
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
    if options.against or row_flags:
        raise ValueError(f"against, header and columns are not for task {options.task}, whose rows have one format")
    for name in ("tokenize", "positive", "split", "split_special_tokens"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is not for task {options.task}, whose rows and scores are the harness's: leave it out")
    return True


def _held_out(run: pathlib.Path | None, task: "Task", options: EvaluateOptions, flags: Mapping[str, configs.Text]) -> "Table":
    """The labelled rows to evaluate on."""
    from jaxlm.data import HELD_OUT, DataConfig, read_rows, split_rows
    from jaxlm.experiment import check_row_flags

    data = DataConfig() if run is None else _data_of(run)
    rows, replaceable = _reading(run, flags, other=options.data is not None)
    roles = task.roles(task.config, task.architecture)
    if path := options.data or data.train:
        check_row_flags(flags, path, rows, task.config, task.architecture)
    if options.data is not None:
        if "data.rows.group" in flags:
            raise ValueError("data.rows.group would do nothing here: all rows of --data are scored; leave it out")
        return read_rows(options.data, rows, *roles, splits=_splits(options.split, flags), replaceable=replaceable)
    if data.train is None:
        raise ValueError("give the rows to evaluate on: --data FILE")
    if options.split is not None:
        raise ValueError(f"split {options.split!r} is of --data FILE: without it the rows that the run held out are read")
    if data.validation:
        return read_rows(data.validation, rows, *roles, splits=HELD_OUT)
    return split_rows(read_rows(data.train, rows, *roles), data.holdout.fraction)[1]


def _check_sizes(options: Any, *more: str) -> None:
    for name in ("length", "batch_size", *more):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
