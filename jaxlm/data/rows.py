"""Labelled rows from anywhere: files, parallel texts, datasets of others, this Python's own modules.

A task asks for roles (text, label, …); `ColumnsConfig` says which column plays which. Each row is checked for what its roles
need; one that fails is left out and told with its place and the reason, and more than a few of them refuse the data.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.config import unknown
from jaxlm.data.cells import decoded
from jaxlm.data.columns import SYNONYMS, missing_columns, same_name
from jaxlm.data.formats import is_parallel, read_files, read_parallel
from jaxlm.data.records import Bad, Choose, ReadOptions, Record
from jaxlm.data.roles import CONVERSATIONS, MAY_BE_EMPTY, VALUES, conversation, counted, located, numbered_label
from jaxlm.data.sources import docstrings, huggingface, is_saved, modules, split_names, tfds_builder, tfds_rows
from jaxlm.data.splits import TRAIN, UNSEEN, Splits, is_slice
from jaxlm.data.tables import named
from jaxlm.data.tokenizer import expand


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Which column plays which role; null: the one named like the role. `a.b` reads b inside the objects of column a."""

    text: str | None = None
    """Column of the text."""
    pair: str | None = None
    """Column of the second text of a pair."""
    label: str | None = None
    """Column of the class, or of the number to predict."""
    labels: str | None = None
    """Column of the classes where there may be several: a list, or a text divided by `|`, or else by `,`."""
    tokens: str | None = None
    """Column of the words of a sentence."""
    tags: str | None = None
    """Column of their tags."""
    question: str | None = None
    """Column of the question."""
    context: str | None = None
    """Column of the passage that answers it."""
    answers: str | None = None
    """Column of the answers."""
    choices: str | None = None
    """Column of the choices."""
    source: str | None = None
    """Column of the text to translate, to summarise, …"""
    target: str | None = None
    """Column of the text to generate."""
    messages: str | None = None
    """Column of the conversation."""
    prompt: str | None = None
    """Column of the prompt."""
    chosen: str | None = None
    """Column of the preferred answer."""
    rejected: str | None = None
    """Column of the other answer."""
    id: str | None = None
    """Column of the row's identifier."""


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """How labelled rows are read."""

    header: tuple[str, ...] = ()
    """Names of the columns of a tsv or csv file that has no line of names, or of JSON rows that are lists, as in text,label."""
    columns: ColumnsConfig = ColumnsConfig()
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as mrpc of glue."""
    group: str | None = None
    """Column whose equal values all stay on one side of the split, such as title."""
    limit: int | None = None
    """Read at most this many rows."""
    separator: str | None = None
    """What separates the cells of a table; null: a TAB, in .csv files a comma or what their first line suggests."""
    encoding: str | None = None
    """Text encoding of the files, such as latin-1 or gb18030; null: UTF-8, or UTF-16 where a file begins with its mark."""
    under: str | None = None
    """Key of a .json file below which the training rows are, such as train or data.train. Held-out rows are read under its like,
    such as data.validation, or data.test; a file without that key is read whole."""
    speakers: tuple[str, ...] = ()
    """Who is who in conversations whose speakers have other names than the usual ones, as in A=user,B=assistant."""
    max_bad: float = 0.01
    """Share of rows that may be bad before the file is refused; one bad row is let pass unless this is 0."""

    def __post_init__(self) -> None:
        if len(self.header) == 1:  # `--data.rows.header text,label` comes as one text
            object.__setattr__(self, "header", tuple(name.strip() for name in self.header[0].split(",")))
        if len(self.speakers) == 1:
            object.__setattr__(self, "speakers", tuple(pair.strip() for pair in self.speakers[0].split(",")))
        for pair in self.speakers:
            name, _, role = pair.partition("=")
            if not name or role not in ("system", "user", "assistant"):
                raise ValueError(f"rows speakers {pair!r} must be NAME=ROLE, where ROLE is system, user or assistant")
        if self.separator is not None:
            object.__setattr__(self, "separator", {"\\t": "\t", "tab": "\t", "TAB": "\t"}.get(self.separator, self.separator))
        if self.separator == "":
            raise ValueError("rows separator must not be empty")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"rows limit {self.limit} must be at least 1, or null for all rows")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"rows max_bad {self.max_bad} must be a share, from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Table:
    """Checked rows, and those left out."""

    name: str
    """For messages: the file names or the dataset."""
    rows: list[dict[str, Any]]
    """Role → value: the roles asked for, optional ones where a row has them, and `group` where that is configured."""
    where: list[str]
    """The place of each row, such as train.tsv:17."""
    bad: list[tuple[str, str]]
    """(place, reason) of each row left out."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was guessed about the data, and which columns play the roles where these have other names."""

    def without(self, reasons: Mapping[int, str]) -> "Table":
        """The table without some rows (number → why it is left out)."""
        kept = [i for i in range(len(self.rows)) if i not in reasons]
        left_out = [(self.where[i], why) for i, why in reasons.items()]
        rows, where = [self.rows[i] for i in kept], [self.where[i] for i in kept]
        return dataclasses.replace(self, rows=rows, where=where, bad=[*self.bad, *left_out])

    def summary(self) -> str:
        """One line: how many rows, how many left out, and for each reason its first place and how often."""
        first: dict[str, str] = {}
        for where, why in self.bad:
            first.setdefault(why, where)
        counts = collections.Counter(why for _, why in self.bad)
        told = [f"{_told(where, why)} ({counted(counts[why], 'row')})" for why, where in itertools.islice(first.items(), 3)]
        more = [f"{counted(len(first) - 3, 'other reason')}"] if len(first) > 3 else []
        left_out = f"; {len(self.bad):,} left out: {'; '.join(told + more)}" if self.bad else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.name}: {counted(len(self.rows), 'row')}{left_out}{notes}"


def read_rows(
    path: str,
    config: RowsConfig,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    splits: Splits = TRAIN,
    replaceable: Collection[str] = (),
) -> Table:
    """The rows of a path with the values of the roles asked for.

    `path`: a file, folder or glob of .tsv, .csv, .jsonl, .json (SQuAD's too), .parquet or .conll, all but parquet also .gz
    or .zst; a .txt file of TAB-separated rows; parallel texts, as train.{en,de}.txt; a folder that `datasets` saved;
    `hf:ID` and `tfds:NAME`; `embedded:modules`, docstrings of this Python and their modules. Of data with several splits one is
    read, by the order of `splits`.

    Values: texts are str (a list of str is joined with spaces; prompt, chosen, rejected and messages may be lists of
    messages, mappings with role and content); label is str, int or float as found, always str from tsv and csv; labels,
    tokens, tags and choices are lists of str; answers are {"text": [str], "answer_start": [int, in characters; -1 where
    unknown]}, both empty for a question without answer. Class numbers of hf and tfds become the names that they stand for.

    The column of a `replaceable` role that the data lacks is replaced by the one named like the role.

    Raises ValueError, in one line, for data that is not there or cannot be read, a column that is missing, no row at all,
    and more bad rows than max(1, config.max_bad · rows).
    """
    wanted = _Wanted(config, required, optional, replaceable)
    options = _read_options(config, splits)
    name, records = _records(expand(path), config, options, wanted.choose)
    rows, places, bad = list[dict[str, Any]](), list[str](), list[tuple[str, str]]()
    for place, _, row in wanted.read(name, itertools.islice(records, config.limit)):
        if isinstance(row, Bad):
            bad.append((place, str(row)))
        else:
            rows.append(row)
            places.append(place)
    _check_split(name, options)
    notes = [*options.notes, *wanted.used()]
    count = len(rows) + len(bad)
    if not rows or len(bad) > (max(1, config.max_bad * count) if config.max_bad else 0):
        told = "; ".join([*(_told(where, why) for where, why in bad[:3]), *notes])
        allowed = f"data.rows.max_bad {config.max_bad:g} allows fewer" if rows else "none is left"
        hint = "; --data.rows.encoding names another encoding" if any(why.startswith("is not UTF-8") for _, why in bad[:3]) else ""
        raise ValueError(f"{name}: {len(bad):,} of {counted(count, 'row')} cannot be used, {allowed}: {told}{hint}")
    return Table(name, rows, places, bad, notes)


class Input(NamedTuple):
    """A row to predict for."""

    record: dict[str, Any]
    """All its columns as they stand in the data; none where it cannot be read at all."""
    row: dict[str, Any] | None
    """Role → value, of which a text may be empty; None where the row cannot be used."""
    place: str
    why: str | None = None
    """Why it cannot be used."""


def read_inputs(
    path: str,
    config: RowsConfig,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    splits: Splits = UNSEEN,
    replaceable: Collection[str] = (),
) -> tuple[list[Input], list[str]]:
    """Read every row of a path or of one of its splits as `read_rows` does, bad rows included, with notes on what was inferred.

    Raises ValueError, in one line, for data that is not there, cannot be read or holds no rows, and for a column that is missing.
    """
    wanted = _Wanted(config, required, optional, replaceable, inputs=True)
    options = dataclasses.replace(_read_options(config, splits), all_columns=True)
    name, records = _records(expand(path), config, options, wanted.choose)
    inputs = []
    for place, record, row in wanted.read(name, itertools.islice(records, config.limit)):
        whole = {} if isinstance(record, Bad) else dict(record)
        inputs.append(Input(whole, None, place, str(row)) if isinstance(row, Bad) else Input(whole, row, place))
    _check_split(name, options)
    return inputs, [*options.notes, *wanted.used()]


def _read_options(config: RowsConfig, splits: Splits) -> ReadOptions:
    return ReadOptions(config.header, config.separator, config.encoding, config.under, splits)


def _check_split(name: str, options: ReadOptions) -> None:
    """Raises ValueError for a split that was named of data that has none."""
    if options.splits.named and not options.chosen:
        raise ValueError(f"split {options.splits.order[0]!r} was named, but {name} has no splits: leave it out")


def split_rows(table: Table, fraction: float) -> tuple[Table, Table]:
    """(train, held out): about `fraction` of the rows held out, at least one.

    The side of a row follows from a hash of its content, its `id` apart, or of its group: not from its place, nor from the
    other rows, unless there would be none on a side. Rows of equal content, and those of a group, stay together.
    Raises ValueError where all rows are equal or of one group.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"held-out fraction {fraction} must lie between 0 and 1")
    hashes = [_hash(row) for row in table.rows]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        why = "all are of one group" if any("group" in row for row in table.rows) else "they are all equal"
        raise ValueError(f"{table.name}: {counted(len(table.rows), 'row')} cannot be split: {why}")
    # The bound is kept between the smallest and the largest hash, so that neither side is empty.
    bound = min(max(int(fraction * 2**64), distinct[0] + 1), distinct[-1])

    def side(held: bool, name: str, bad: list[tuple[str, str]]) -> Table:
        taken = [i for i, value in enumerate(hashes) if (value < bound) == held]
        notes = [] if held else table.notes
        return Table(name, [table.rows[i] for i in taken], [table.where[i] for i in taken], bad, notes)

    return side(False, table.name, table.bad), side(True, f"{table.name} (held out)", [])


def _hash(row: Mapping[str, Any]) -> int:
    content = row["group"] if "group" in row else {role: value for role, value in row.items() if role != "id"}
    text = json.dumps(content, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _told(where: str, why: str) -> str:
    return f"{where} {why}" if why.startswith(("is ", "has ")) else f"{where}: {why}"


# --- columns and values -----------------------------------------------------------------------


class _Wanted:
    """The roles asked for, their columns, and the way from a record to a row."""

    def __init__(
        self, config: RowsConfig, required: Sequence[str], optional: Sequence[str], replaceable: Collection[str] = (),
        inputs: bool = False,
    ):  # fmt: skip
        """`inputs`: rows are to be predicted for, so texts may be empty."""
        named = {role: getattr(config.columns, role, None) for role in (*required, *optional)}
        self.columns: dict[str, str] = {role: column or role for role, column in named.items()}
        self.required = set(required)
        if config.group is not None and not inputs:
            self.columns["group"] = config.group
            self.required.add("group")
        self.must_exist = self.required | {role for role, column in named.items() if column and not inputs}
        self.inputs, self.replaceable = inputs, replaceable
        self.speakers = dict(pair.split("=") for pair in config.speakers)
        self.found: dict[str, str] = {}
        self.exchange: tuple[tuple[str, ...], str | None] | None = None
        self.system: str | None = None

    def choose(self, names: Sequence[str], where: str, partial: bool = False) -> list[str]:
        """The columns of these that play the roles; ValueError where one that must be there is not, unless `partial`."""
        columns = {role: self._column(role, names) for role in self.columns}
        self.exchange = None
        if columns.get("messages", "") is None and self.columns["messages"] == "messages":
            self.exchange = _exchange(names, self.inputs)
        missing = {role: self.columns[role] for role, name in columns.items() if name is None and role in self.must_exist}
        if self.exchange:
            missing.pop("messages", None)
        if missing and not partial:
            options = {role: "data.rows.group" if role == "group" else f"data.rows.columns.{role}" for role in missing}
            raise missing_columns(missing, names, where, options)
        self.found = {role: name for role, name in columns.items() if name is not None}
        self.system = next((name for name in _SYSTEM if name in names), None) if "messages" in self.columns else None
        parts = [name for name in (*self.exchange[0], self.exchange[1]) if name] if self.exchange else []
        parts += [self.system] if self.system else []
        outer = [_outer(name, names) or name for name in self.found.values()]
        return list(dict.fromkeys([*outer, *parts]))

    def _column(self, role: str, names: Sequence[str]) -> str | None:
        """The column that plays a role, perhaps one inside an object (`a.b`), or None."""
        column = self.columns[role]
        if _outer(column, names) is not None:
            return column
        alike = same_name(column, names) or (same_name(role, names) if role in self.replaceable else None)
        if alike is None and role == "messages" and column == role:
            alike = next((name for name in SYNONYMS["messages"] if name in names), None)
        return alike

    def used(self) -> list[str]:
        """Which columns play the roles, where these have other names."""
        other = [f"{role} from {name}" for role, name in self.found.items() if name != role]
        if self.exchange:
            asked, answer = self.exchange
            other.append(f"messages from {' and '.join(asked)} (user)" + (f" and {answer} (assistant)" if answer else ""))
        if self.system:
            other.append(f"the system message from {self.system}, where messages has none")
        return [f"columns: {', '.join(other)}"] if other else []

    def read(self, name: str, records: Iterator[Record]) -> Iterator[tuple[str, Mapping[str, Any] | Bad, dict[str, Any] | Bad]]:
        """(place, record, row) of each record; ValueError where there is none, or a column that must be there is in none."""
        columns = dict[str, None]()
        place = None
        for place, record in records:
            if isinstance(record, Bad):
                yield place, record, record
                continue
            fresh = [column for column in record if column not in columns]
            if fresh:  # objects of JSON name their columns row by row
                columns.update(dict.fromkeys(fresh))
                self.choose(list(columns), name, partial=True)
            yield place, record, self.row(record)
        if place is None:
            raise ValueError(f"{name} holds no rows")
        if columns:
            self.choose(list(columns), name)

    def row(self, record: Mapping[str, Any]) -> dict[str, Any] | Bad:
        row: dict[str, Any] = {}
        for role in self.columns:
            cell = self._cell(role, record)
            if cell is None or cell != cell:  # null, or not a number
                state = "missing"
            else:
                try:
                    value = self._value(role, cell)
                    if role == "messages" and self.system:
                        value = _with_system(value, record.get(self.system))
                except ValueError as error:
                    return Bad(f"{role} {error}")
                blank = not value.strip() if isinstance(value, str) else value == []
                state = "empty" if blank and not self._may_be_empty(role, value) else "there"
            if state == "there":
                row[role] = value
            elif state == "missing" and _is_field(role):
                row[role] = ""
            elif role in self.required:
                return Bad(f"{role} is {state}{self._inner_names(role, record)}")
        if "choices" in row and "label" in row:
            row["label"] = numbered_label(row["label"], self._cell("choices", record))
        if "tokens" in row and "tags" in row and len(row["tokens"]) != len(row["tags"]):
            return Bad(f"has {counted(len(row['tokens']), 'token')}, but {counted(len(row['tags']), 'tag')}")
        if "answers" in row and "context" in row:
            try:
                row["answers"] = located(row["answers"], row["context"])
            except ValueError as error:
                return Bad(f"answers {error}")
        return row

    def _inner_names(self, role: str, record: Mapping[str, Any]) -> str:
        """The keys of the object in which the column of a role (`a.b`) is not."""
        outer, _, inner = self.found.get(role, self.columns[role]).partition(".")
        held = decoded(record.get(outer)) if inner else None
        return f": {outer} has the keys {', '.join(map(str, held))}"[:100] if isinstance(held, Mapping) else ""

    def _cell(self, role: str, record: Mapping[str, Any]) -> Any:
        if role == "messages" and self.exchange:
            asked, answer = self.exchange
            parts = [record[name] for name in asked if record.get(name)]
            question = parts[0] if len(parts) == 1 else "\n\n".join(map(str, parts))
            return [*_said(question, "user"), *_said(record.get(answer or ""), "assistant")] if parts else None
        column = self.found.get(role, self.columns[role])
        if column not in record and role in self.found:  # of several files each has its own spelling
            column = self._column(role, list(record)) or column
        return _look_up(record, column)

    def _value(self, role: str, cell: Any) -> Any:
        if role in CONVERSATIONS:
            value = conversation(cell, self.speakers, role)
            return value if self.inputs or role != "messages" or isinstance(value, str) else _replied(value)
        return VALUES.get(role, VALUES["text"])(cell)

    def _may_be_empty(self, role: str, value: Any) -> bool:
        """A field of a template that is no role may be empty, as Alpaca's input, and every text that is predicted for."""
        return role in MAY_BE_EMPTY or _is_field(role) or (self.inputs and role in self.required and isinstance(value, str))


def _is_field(role: str) -> bool:
    """Whether a column is wanted for a template alone, under its own name."""
    return role not in VALUES and role not in CONVERSATIONS


def _replied(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation up to its last reply: what follows it is neither learned nor compared with anything."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages) - 1)
    return messages[: last + 1]


def _with_system(messages: Any, text: Any) -> Any:
    """A conversation that begins with the system message of its row, unless it has one itself."""
    if not isinstance(messages, list) or not isinstance(text, str) or not text.strip():
        return messages
    own = any(message["role"] == "system" for message in messages)
    return messages if own else [{"role": "system", "content": text}, *messages]


_SYSTEM = ("system", "system_prompt", "system_message")


def _exchange(names: Sequence[str], inputs: bool) -> tuple[tuple[str, ...], str | None] | None:
    """The columns of a question and of its answer, of rows that are one exchange each; of `inputs` the answer may be missing."""
    found = [(asked, answer) for asked, answer in _EXCHANGES if asked[0] in names]
    answered = [pair for pair in found if pair[1] in names]
    for asked, answer in answered or (found if inputs else ()):
        return tuple(name for name in asked if name in names), answer if answer in names else None
    return None


def _said(cell: Any, role: str) -> list[Any]:
    """What one side of an exchange says: a text, or messages as TRL has them."""
    items = decoded(cell)
    if isinstance(items, list) and items and all(isinstance(item, Mapping) for item in items):
        return items
    if cell is None or cell == "":
        return []
    return [{"role": role, "content": str(cell) if isinstance(cell, int | float) else cell}]


_EXCHANGES = (
    (("instruction", "input"), "output"), (("instruction", "context"), "response"), (("instruction", "input"), "response"),
    (("prompt",), "completion"), (("prompt",), "response"), (("question",), "answer"), (("query",), "response"),
    (("question",), "response"), (("input",), "output"),
)  # fmt: skip


def _outer(column: str, names: Sequence[str]) -> str | None:
    """The column that holds `column`: itself, or its part before the dot."""
    return next((name for name in (column, column.partition(".")[0]) if name in names), None)


def _look_up(record: Mapping[str, Any], column: str) -> Any:
    if column in record or "." not in column:
        return record.get(column)
    outer, _, inner = column.partition(".")
    held = decoded(record.get(outer))
    return _look_up(held, inner) if isinstance(held, Mapping) else None


# --- where rows lie ---------------------------------------------------------------------------


def _records(path: str, config: RowsConfig, options: ReadOptions, choose: Choose) -> tuple[str, Iterator[Record]]:
    """The name and the records of whatever a path means, each with its place."""
    kind, colon, rest = path.partition(":")
    if path == "embedded:modules":
        choose(["text", "label"], path)
        name, records = path, _modules()
    elif colon and kind == "hf":
        name, records = rest, _huggingface(rest, config.subset, options, choose)
    elif colon and kind == "tfds":
        name, records = rest, _tfds(rest, options, choose)
    elif colon and len(kind) > 1 and kind.isalnum() and not pathlib.Path(path).exists():
        raise unknown("source of rows", path, ["embedded:modules", "hf:ID", "tfds:NAME", "a file, folder or glob"])
    elif is_parallel(path):
        name, records = pathlib.Path(path).name, read_parallel(path, options, choose)
    elif is_saved(path):
        name, records = pathlib.Path(path).name, _huggingface(path, None, options, choose)
    else:
        return read_files(path, options, choose)
    return name, ((name + place, row) for place, row in records)


def _huggingface(path: str, subset: str | None, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """Rows of a dataset of the hub, or of a folder that `datasets` saved; class numbers become the names that it has for them."""
    held = huggingface(path, subset, _split(lambda: split_names(path, subset), path, options))
    held = held.select_columns(options.columns(choose, held.column_names, path))
    names = {column: found for column, feature in held.features.items() if (found := _class_names(feature))}
    for i, row in enumerate(held):
        yield f" row {i}", {column: named(value, names.get(column)) for column, value in row.items()}


def _split(names: Callable[[], Sequence[str] | None], path: str, options: ReadOptions) -> str:
    """The split to read, of those that the data has (None: it has no splits)."""
    first = options.splits.order[0]
    if options.splits == TRAIN or is_slice(first):
        return options.take(first)  # the library says what is wrong with it
    there = names()
    return first if there is None else options.take(options.splits.require(there, path))


def _tfds(path: str, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """Rows of a TensorFlow dataset; class numbers become the names that it has for them."""
    info = tfds_builder(path).info
    rows = tfds_rows(path, _split(lambda: list(info.splits), path, options))
    features = info.features
    wanted = options.columns(choose, list(features), path)
    for i in range(len(rows)):
        row = rows[i]
        yield f" row {i}", {name: named(_plain(row[name]), _class_names(features[name])) for name in wanted}


def _class_names(feature: Any) -> Sequence[str] | None:
    """What `datasets` and `tfds` call the classes of a label, or of a list of labels."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _plain(value: Any) -> Any:
    """NumPy's values and byte strings as plain ones."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.decode("utf8", "replace") if isinstance(value, bytes) else value


def _modules(classes: int = 20, most: int = 200) -> Iterator[Record]:
    """Docstrings of the standard library (column text) and the module that each stands in (column label).

    The `classes` modules that have the most, and of each at most `most`, chosen by a hash of the text; a text that
    stands in several modules counts for the first. The same on every run of one Python.
    """
    texts: dict[str, str] = {}
    for module, file in modules():
        if module.isidentifier() and not module.startswith("_") and module not in _NOT_MODULES:
            for text in docstrings(file):
                texts.setdefault(text, module)
    hashed = sorted((hashlib.blake2b(text.encode("utf8", "replace"), digest_size=8).digest(), text) for text in texts)
    sizes = sorted(collections.Counter(texts.values()).items(), key=lambda item: (-item[1], item[0]))
    taken = dict.fromkeys((module for module, _ in sizes[:classes]), 0)
    for _, text in hashed:
        label = texts[text]
        if taken.get(label, most) < most:
            taken[label] += 1
            yield f" row {sum(taken.values()) - 1}", {"text": text, "label": label}


_NOT_MODULES = {"idlelib", "lib2to3", "pydoc_data", "test", "turtledemo"}  # programs, tables and tests
