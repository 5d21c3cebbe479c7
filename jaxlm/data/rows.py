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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxlm.config import unknown
from jaxlm.data.formats import Bad, Choose, Record, is_parallel, read_files, read_parallel
from jaxlm.data.roles import MAY_BE_EMPTY, VALUES, counted, located
from jaxlm.data.sources import docstrings, huggingface, is_saved, modules, tfds_builder, tfds_rows
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
    """Names of the columns of a tsv or csv file that has no line of names, as in text,label."""
    columns: ColumnsConfig = ColumnsConfig()
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as mrpc of glue."""
    group: str | None = None
    """Column whose equal values all stay on one side of the split, such as title."""
    limit: int | None = None
    """Read at most this many rows."""
    max_bad: float = 0.01
    """Share of rows that may be bad before the file is refused; one bad row is let pass unless this is 0."""

    def __post_init__(self) -> None:
        if len(self.header) == 1:  # `--data.rows.header text,label` comes as one text
            object.__setattr__(self, "header", tuple(name.strip() for name in self.header[0].split(",")))
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

    def summary(self) -> str:
        """One line: how many rows, how many left out, and for each reason its first place and how often."""
        first: dict[str, str] = {}
        for where, why in self.bad:
            first.setdefault(why, where)
        counts = collections.Counter(why for _, why in self.bad)
        told = [f"{_told(where, why)} ({counted(counts[why], 'row')})" for why, where in itertools.islice(first.items(), 3)]
        more = [f"{counted(len(first) - 3, 'other reason')}"] if len(first) > 3 else []
        left_out = f"; {len(self.bad):,} left out: {'; '.join(told + more)}" if self.bad else ""
        return f"{self.name}: {counted(len(self.rows), 'row')}{left_out}"


def read_rows(
    path: str, config: RowsConfig, required: Sequence[str], optional: Sequence[str] = (), *, split: str = "train"
) -> Table:
    """The rows of a path with the values of the roles asked for.

    `path`: a file, folder or glob of .tsv, .csv, .jsonl, .json (SQuAD's too), .parquet or .conll, all but parquet also .gz
    or .zst; a .txt file of TAB-separated rows; parallel texts, as train.{en,de}.txt; a folder that `datasets` saved;
    `hf:ID` and `tfds:NAME`, of which `split` is read; `embedded:modules`, docstrings of this Python and their modules.

    Values: texts are str (a list of str is joined with spaces; prompt, chosen, rejected and messages may be lists of
    messages, mappings with role and content); label is str, int or float as found, always str from tsv and csv; labels,
    tokens, tags and choices are lists of str; answers are {"text": [str], "answer_start": [int, in characters; -1 where
    unknown]}, both empty for a question without answer. Class numbers of hf and tfds become the names that they stand for.

    Raises ValueError, in one line, for data that is not there or cannot be read, a column that is missing, no row at all,
    and more bad rows than max(1, config.max_bad · rows).
    """
    wanted = _Wanted(config, required, optional)
    name, records = _records(expand(path), config, split, wanted.choose)
    rows, places, bad, columns = list[dict[str, Any]](), list[str](), list[tuple[str, str]](), dict[str, None]()
    for place, record in itertools.islice(records, config.limit):
        row = record if isinstance(record, Bad) else wanted.row(record)
        if isinstance(row, Bad):
            bad.append((place, str(row)))
        else:
            rows.append(row)
            places.append(place)
        if not isinstance(record, Bad):
            columns.update(dict.fromkeys(record))
    if not rows and not bad:
        raise ValueError(f"{name} holds no rows")
    if columns:
        wanted.choose(list(columns), name)  # objects of JSON name their columns row by row: known only now
    count = len(rows) + len(bad)
    if not rows or len(bad) > (max(1, config.max_bad * count) if config.max_bad else 0):
        told = "; ".join(_told(where, why) for where, why in bad[:3])
        allowed = f"data.rows.max_bad {config.max_bad:g} allows fewer" if rows else "none is left"
        raise ValueError(f"{name}: {len(bad):,} of {counted(count, 'row')} cannot be used, {allowed}: {told}")
    return Table(name, rows, places, bad)


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
        return Table(name, [table.rows[i] for i in taken], [table.where[i] for i in taken], bad)

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

    def __init__(self, config: RowsConfig, required: Sequence[str], optional: Sequence[str]):
        for role in (*required, *optional):
            assert role in VALUES, f"role {role!r} is none of {', '.join(VALUES)}"
        named = {role: getattr(config.columns, role) for role in (*required, *optional)}
        self.columns: dict[str, str] = {role: column or role for role, column in named.items()}
        self.required = set(required)
        if config.group is not None:
            self.columns["group"] = config.group
            self.required.add("group")
        self.must_exist = self.required | {role for role, column in named.items() if column}

    def choose(self, names: Sequence[str], where: str) -> list[str]:
        found = {role: _outer(column, names) for role, column in self.columns.items()}
        for role, name in found.items():
            if name is None and role in self.must_exist:
                shown = [name if len(name) <= 40 else f"{name[:40]}…" for name in names]
                option = "data.rows.group" if role == "group" else f"data.rows.columns.{role}"
                raise ValueError(f"{unknown(f'column of {where}:', self.columns[role], shown)}; --{option} names the {role}")
        return list(dict.fromkeys(name for name in found.values() if name is not None))

    def row(self, record: Mapping[str, Any]) -> dict[str, Any] | Bad:
        row: dict[str, Any] = {}
        for role, column in self.columns.items():
            found = _look_up(record, column)
            if found is None or found != found:  # null, or not a number
                state = "missing"
            else:
                try:
                    value = VALUES[role](found)
                except ValueError as error:
                    return Bad(f"{role} {error}")
                blank = not value.strip() if isinstance(value, str) else value == []
                state = "empty" if blank and role not in MAY_BE_EMPTY else "there"
            if state == "there":
                row[role] = value
            elif role in self.required:
                return Bad(f"{role} is {state}")
        if "tokens" in row and "tags" in row and len(row["tokens"]) != len(row["tags"]):
            return Bad(f"has {counted(len(row['tokens']), 'token')}, but {counted(len(row['tags']), 'tag')}")
        if "answers" in row and "context" in row:
            try:
                row["answers"] = located(row["answers"], row["context"])
            except ValueError as error:
                return Bad(f"answers {error}")
        return row


def _outer(column: str, names: Sequence[str]) -> str | None:
    """The column that holds `column`: itself, or its part before the dot."""
    return next((name for name in (column, column.partition(".")[0]) if name in names), None)


def _look_up(record: Mapping[str, Any], column: str) -> Any:
    if column in record or "." not in column:
        return record.get(column)
    outer, _, inner = column.partition(".")
    held = record.get(outer)
    return _look_up(held, inner) if isinstance(held, Mapping) else None


# --- where rows lie ---------------------------------------------------------------------------


def _records(path: str, config: RowsConfig, split: str, choose: Choose) -> tuple[str, Iterator[Record]]:
    """The name and the records of whatever a path means, each with its place."""
    kind, colon, rest = path.partition(":")
    if path == "embedded:modules":
        choose(["text", "label"], path)
        name, records = path, _modules()
    elif colon and kind == "hf":
        name, records = rest, _huggingface(rest, config.subset, split, choose)
    elif colon and kind == "tfds":
        name, records = rest, _tfds(rest, split, choose)
    elif colon and len(kind) > 1 and kind.isalnum() and not pathlib.Path(path).exists():
        raise unknown("source of rows", path, ["embedded:modules", "hf:ID", "tfds:NAME", "a file, folder or glob"])
    elif is_parallel(path):
        name, records = pathlib.Path(path).name, read_parallel(path, choose)
    elif is_saved(path):
        name, records = pathlib.Path(path).name, _huggingface(path, None, split, choose)
    else:
        return read_files(path, config.header, choose)
    return name, ((name + place, row) for place, row in records)


def _huggingface(path: str, subset: str | None, split: str, choose: Choose) -> Iterator[Record]:
    """Rows of a dataset of the hub, or of a folder that `datasets` saved; class numbers become the names that it has for them."""
    held = huggingface(path, subset, split)
    held = held.select_columns(choose(held.column_names, path))
    names = {column: found for column, feature in held.features.items() if (found := _class_names(feature))}
    for i, row in enumerate(held):
        yield f" row {i}", {column: _named(value, names.get(column)) for column, value in row.items()}


def _tfds(path: str, split: str, choose: Choose) -> Iterator[Record]:
    """Rows of a TensorFlow dataset; class numbers become the names that it has for them."""
    rows = tfds_rows(path, split)
    features = tfds_builder(path).info.features
    wanted = choose(list(features), path)
    for i in range(len(rows)):
        row = rows[i]
        yield f" row {i}", {name: _named(_plain(row[name]), _class_names(features[name])) for name in wanted}


def _class_names(feature: Any) -> Sequence[str] | None:
    """What `datasets` and `tfds` call the classes of a label, or of a list of labels."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None  # -1: a test set that keeps its labels to itself


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
