"""Rows of labelled data in files: one function a format, each an iterator of records.

A record is a place in the file and a row, column → value as found, or `Bad`: why this row is none. What is wrong with a
file as a whole is a ValueError of one line. A reader that knows its columns before its rows asks `Choose` which are wanted.
"""

import collections
import csv
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxlm.config import unknown
from jaxlm.data.columns import is_header
from jaxlm.data.sources import find_files, format_of, opened_parquet
from jaxlm.data.splits import TRAIN, Splits
from jaxlm.text_files import open_text, parse_json, read_lines, read_text, undecodable


class Bad(str):
    """Why a row cannot be used, to be read after its place: "has 1 cell, not 2", "label is empty"."""


Record = tuple[str, Mapping[str, Any] | Bad]
Choose = Callable[[Sequence[str], str], list[str]]
"""(columns of a file, its name) → those wanted; raises ValueError where one that must be there is not."""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """Options for reading the files of one table."""

    header: Sequence[str] = ()
    """Names of the columns of a table without a line of names, or of rows that are lists."""
    separator: str | None = None
    """What separates cells; None: a TAB, in .csv what its first line suggests."""
    encoding: str | None = None
    """Text encoding; None: see `text_files`."""
    under: str | None = None
    """Key of a .json file below which the rows are; `a.b` for a key in a key."""
    splits: Splits = TRAIN
    """Which split is read, where the data has several."""
    all_columns: bool = False
    """Records hold all columns, not only those that are wanted."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was guessed about the files, to be shown: readers add to it."""
    chosen: list[str] = dataclasses.field(default_factory=list)
    """The splits that were read: readers add to it."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def take(self, split: str) -> str:
        """The split, noted as the one that is read."""
        if note := self.splits.note(split):
            self.note(note)
        self.chosen.append(split)
        return split

    def columns(self, choose: Choose, names: Sequence[str], where: str) -> list[str]:
        """The columns that records hold. Raises ValueError where one that must be there is not."""
        wanted = choose(names, where)
        return list(names) if self.all_columns else wanted

    def undecodable(self, text: str) -> Bad | None:
        why = undecodable(text, self.encoding)
        return Bad(why) if why else None


# --- tables -----------------------------------------------------------------------------------

SAMPLE = 1000  # rows that decide whether the first line of a table is a header
SEPARATORS = {"\t": "TAB", ",": "comma", ";": "semicolon", "|": "|"}


def read_tsv(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """Lines of cells between TABs. There is no quoting: quote characters are text."""
    separator = options.separator or "\t"

    def cells() -> Iterator[tuple[int, list[str] | Bad]]:
        blank: list[int] | None = None
        for number, line in read_lines(file, options.encoding):
            if not line:
                if blank is not None:
                    blank.append(number)  # of a table with one column an empty row, unless at the end of the file
                continue
            yield from ((n, [""]) for n in blank or ())
            blank = []
            yield number, options.undecodable(line) or line.split(separator)

    return _table(file, cells(), options, choose, separator)


def read_csv(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """The csv module's default dialect: commas, cells in double quotes may hold commas, line ends and doubled quotes.

    A file whose first line has no comma but semicolons, TABs or `|` is separated by these.
    """
    separator = options.separator
    if separator is None:
        first = next((line for _, line in read_lines(file, options.encoding) if line.strip()), "")
        counts = {mark: re.sub(r'"[^"]*"', "", first).count(mark) for mark in (",", ";", "\t", "|")}
        separator = "," if counts[","] or not any(counts.values()) else max(counts, key=lambda mark: counts[mark])
        if separator != ",":
            options.note(f"cells of {file.name} are separated by {SEPARATORS[separator]}, a guess from its first line")
    elif len(separator) != 1:
        raise ValueError(f"separator {separator!r} of a .csv file must be one character")
    return _table(file, _csv_cells(file, len(options.header), separator, options), options, choose, separator)


def _csv_cells(file: pathlib.Path, width: int, separator: str, options: ReadOptions) -> Iterator[tuple[int, list[str] | Bad]]:
    """The rows, as many cells each as the first (`width` where that is bad), with the numbers of their first lines.

    A row of several lines that turns out bad costs its first line only, and the next is read as a row: a stray quote takes
    in everything up to the next one, perhaps the rest of the file. Blank lines are no rows, but for a table of one column.
    """
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default refuses cells of 128 KiB
    number, taken, again = 1, list[str](), collections.deque[str]()

    def lines() -> Iterator[str]:
        while line := again.popleft() if again else next(text, ""):
            taken.append(line)
            yield line

    fixed = False
    blank = list[int]()
    with open_text(file, options.encoding) as text:
        reader = csv.reader(lines(), strict=True, delimiter=separator)
        while True:
            taken.clear()
            bad: Bad | None = None
            cells: list[str] | None = []
            try:
                cells = next(reader, None)
            except csv.Error as error:
                bad = Bad(f"is not CSV: {error}")
            if cells is None:
                return
            if cells:
                if not fixed and (not width or len(taken) == 1):
                    width = len(cells)
                fixed = True
                bad = options.undecodable("".join(cells)) or _not_as_wide(cells, width)
            if bad and len(taken) > 1:
                again.extendleft(reversed(taken[1:]))
                del taken[1:]
                reader = csv.reader(lines(), strict=True, delimiter=separator)
            if bad or cells:
                yield from ((n, [""]) for n in blank)
                blank.clear()
                yield number, bad or cells
            elif fixed and width == 1:
                blank.append(number)  # an empty row, unless at the end of the file
            number += len(taken)


def _not_as_wide(cells: Sequence[str], width: int) -> Bad | None:
    return None if len(cells) == width else Bad(f"has {len(cells)} cell{'s' * (len(cells) != 1)}, not {width}")


def _table(
    file: pathlib.Path, lines: Iterator[tuple[int, list[str] | Bad]], options: ReadOptions, choose: Choose, separator: str
) -> Iterator[Record]:
    """Rows of cells under the names of their columns, which the first line gives or `options.header`.

    A first line that is a header is never a row, also where `options.header` names the columns.
    """
    sample = list(itertools.islice(lines, SAMPLE))
    if not sample:
        return
    number, top = sample[0]
    if isinstance(top, Bad) and not options.header:
        raise ValueError(f"{file}:{number} should name the columns but {top}")
    names, named = _names(file, top, [cells for _, cells in sample[1:] if not isinstance(cells, Bad)], options, choose)
    spelt = SEPARATORS.get(separator, repr(separator))
    hint = "" if options.header else "; --data.rows.header text,label names the columns of a file without names"
    if len(names) == 1 or file.suffix == ".txt":
        hint += f"; cells were separated by {spelt}, a guess: --data.rows.separator" * (options.separator is None)
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file} has two columns {twice[:40]!r}{hint}")
    try:
        wanted = {name: names.index(name) for name in options.columns(choose, names, str(file))}
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    for number, cells in itertools.chain(sample[named:], lines):
        if isinstance(cells, Bad):
            yield f":{number}", cells
        elif cells != [""] or len(names) == 1:
            yield f":{number}", _not_as_wide(cells, len(names)) or {name: cells[i] for name, i in wanted.items()}


def _names(
    file: pathlib.Path, top: list[str] | Bad, rows: Sequence[list[str]], options: ReadOptions, choose: Choose
) -> tuple[list[str], bool]:
    """The names of the columns, and whether the first line gives names."""
    header = list(options.header)
    if isinstance(top, Bad):
        return header, False
    if not header:
        return [name.strip() for name in top], True
    if [name.strip().casefold() for name in top] == [name.casefold() for name in header]:
        return header, True
    own = [name.strip() for name in top]
    if _chosen(choose, own, file):
        return own, True
    if not is_header(top, rows):
        if len(top) == len(header):
            return header, False
        wanted = _chosen(choose, header, file)
        return (wanted, False) if wanted and len(wanted) == len(top) else (header, False)
    moved = any(name in header and header.index(name) != i for i, name in enumerate(own))
    if len(own) != len(header) or moved:
        return own, True
    options.note(f"line 1 of {file.name} names the columns {', '.join(own)}, read as {', '.join(header)}")
    return header, True


def _chosen(choose: Choose, names: Sequence[str], file: pathlib.Path) -> list[str] | None:
    """The columns that are wanted of these, or None where one is missing."""
    try:
        return choose(names, str(file))
    except ValueError:
        return None


def read_parquet(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    with opened_parquet(file) as table:
        wanted = options.columns(choose, table.schema_arrow.names, str(file))
        rows = (row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist())
        for i, row in enumerate(rows):
            yield f" row {i}", row


# --- JSON -------------------------------------------------------------------------------------


def read_jsonl(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """An object a line, or a list with the values of the columns that `options.header` names."""
    for number, line in read_lines(file, options.encoding):
        if line.strip():
            yield f":{number}", options.undecodable(line) or _parsed(line, options)


def _parsed(line: str, options: ReadOptions) -> Mapping[str, Any] | Bad:
    try:
        return _object(parse_json(line), options)
    except (ValueError, RecursionError) as error:
        return Bad(f"is not JSON: {getattr(error, 'msg', error)}")


def _object(value: Any, options: ReadOptions) -> Mapping[str, Any] | Bad:
    if isinstance(value, list) and options.header:
        return _not_as_wide(value, len(options.header)) or dict(zip(options.header, value, strict=True))
    hint = ": --data.rows.header text,label names its columns" if isinstance(value, list) else ""
    return value if isinstance(value, dict) else Bad(f"is not an object but {type(value).__name__}{hint}")


def read_json(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """An array of objects, or of lists whose columns `options.header` names: alone, under "data", under `options.under` or
    under the split; columns as pandas writes them; SQuAD's articles, v1.1 or v2, as columns id, title, context, question and
    answers; or objects line by line, which many call .json too."""
    whole = read_text(file, options.encoding)
    try:
        value = parse_json(whole)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", str(error))
        if why != "Extra data":
            raise ValueError(f"{file}:{getattr(error, 'lineno', 1)} is not JSON: {why}") from None
        yield from read_jsonl(file, options, choose)
        return
    for i, item in enumerate(_array(value, file, options, choose)):
        if isinstance(item, dict) and "paragraphs" in item:
            yield from _article(item, f" article {i}")
        else:
            yield f" row {i}", _object(item, options)


def _array(value: Any, file: pathlib.Path, options: ReadOptions, choose: Choose) -> list[Any]:
    """The rows of a JSON value. Raises ValueError, with the keys to choose from, where it is not clear which these are."""
    if options.under:
        value = _below(value, file, options.under, options)
    if isinstance(value, dict):
        lists = [name for name, inner in value.items() if isinstance(inner, list)]
        if "data" in lists:
            value = value["data"]
        elif split := options.splits.choose(lists):
            value = value[options.take(split)]
    if isinstance(value, dict) and value and (columns := _columns(value)) and _chosen(choose, list(columns), file):
        value = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if isinstance(value, list):
        return value
    named = f" with the keys {', '.join(value)}"[:80] if isinstance(value, dict) else ""
    under = f"; --data.rows.under {next(iter(value))} reads the rows under one key" if isinstance(value, dict) and value else ""
    raise ValueError(
        f"{file} holds one {type(value).__name__}{named}: expected an array of objects, or SQuAD's articles{under}; docs/tasks.md "
        "shows how to convert other forms"
    )


def _below(value: Any, file: pathlib.Path, under: str, options: ReadOptions) -> Any:
    """What a JSON value holds below the key `under`, or below its like for the split that is read.

    A file of other rows than those for training need not have the key at all: then it is read whole. Raises ValueError, with
    the keys to choose from, for a key that is missing.
    """
    keys = options.splits.keys(under)
    for key in keys:
        found, missing = value, None
        for part in key.split("."):
            if missing is None and isinstance(found, dict) and part in found:
                found = found[part]
            else:
                missing = missing or (part, list(found) if isinstance(found, dict) else [])
        if missing is None:
            if keys != [under]:
                options.take(key.rpartition(".")[2])
            elif not options.splits.exact_key:
                options.note(f"rows of {file.name} under {under}")
            return found
    if not options.splits.exact_key and (isinstance(value, list) or "data" in value):
        return value
    part, there = missing if len(keys) == 1 and missing else (under, list(value) if isinstance(value, dict) else [])
    looked = "" if keys == [under] else f", read here under {' or '.join(keys)}"
    raise unknown(f"key of {str(file)!r} (data.rows.under {under}{looked}):", part, there[:20])


def _columns(value: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """The columns of a table as pandas writes them, {column: [values]} or {column: {row: value}}, or None."""
    columns = {name: list(cells.values()) if isinstance(cells, dict) else cells for name, cells in value.items()}
    if not all(isinstance(cells, list) for cells in columns.values()) or len({len(cells) for cells in columns.values()}) != 1:
        return None
    return columns


def _article(article: Mapping[str, Any], place: str) -> Iterator[Record]:
    """The questions of an article of SQuAD (Rajpurkar et al. 2016; 2018, where `is_impossible` marks those without answer)."""
    try:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [] if qa.get("is_impossible") else qa.get("answers")
                about = {"title": article.get("title"), "context": paragraph.get("context")}
                yield f" {qa.get('id')}", {"id": qa.get("id"), **about, "question": qa.get("question"), "answers": answers}
    except (KeyError, TypeError, AttributeError):
        yield place, Bad("is not as SQuAD has it: paragraphs of a context and qas")


# --- CoNLL and parallel text ------------------------------------------------------------------


def read_conll(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """A token a line, its tag in the last column, TABs or else spaces between (ASCII ones: a no-break space is part of a token);
    sentences end at blank lines, a lone TAB included.

    Lines that begin with `# ` before the first token of a sentence are comments; -DOCSTART- lines are left out.
    """
    choose(["tokens", "tags"], str(file))
    start, tokens, tags = 0, list[str](), list[str]()
    why: Bad | None = None
    for number, line in itertools.chain(read_lines(file, options.encoding), [(0, "")]):
        if not line.strip(" \t"):
            if start:
                yield f":{start}", why or {"tokens": tokens, "tags": tags}
            start, tokens, tags, why = 0, [], [], None
            continue
        if line.startswith("-DOCSTART-") or (not start and line.startswith("# ")):
            continue
        start = start or number
        cells = line.split("\t") if "\t" in line else line.strip(" ").split(" ")
        if bad := options.undecodable(line):
            why = why or bad
        elif len(cells) < 2:
            why = why or Bad("has a line without a tag")
        elif not cells[0].strip(" ") or not cells[-1].strip(" "):
            why = why or Bad("has a line with an empty token or tag")
        tokens.append(cells[0])
        tags.append(cells[-1].strip())


_BRACES = re.compile(r"(.*)\{([^{}/]*,[^{}/]*)\}(.*)")


def is_parallel(path: str) -> bool:
    """Whether a path holds a list in braces, as `train.{en,de}.txt`."""
    return _BRACES.fullmatch(path) is not None


def read_parallel(path: str, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """Line i of each file named by a list in braces is row i, its columns named as in the list."""
    found = _BRACES.fullmatch(path)
    assert found is not None, "is_parallel says whether a path has a list in braces"
    before, listed, after = found.groups()
    names = [name.strip() for name in listed.split(",")]
    files = [find_files(before + name + after, ())[0] for name in names]
    for file in files:
        if format_of(file) in FORMATS:
            raise ValueError(
                f"{path!r} names {file.name!r}: lists in braces are for parallel text files; a glob reads several tables"
            )
    choose(names, path)
    counts = collections.Counter[str]()
    for number, lines in enumerate(itertools.zip_longest(*(read_lines(file, options.encoding) for file in files)), 1):
        texts = {name: line[1] for name, line in zip(names, lines, strict=True) if line is not None}
        counts.update(texts.keys())
        if len(texts) == len(names):
            yield f":{number}", next(filter(None, map(options.undecodable, texts.values())), None) or texts
    if len({counts[name] for name in names}) > 1:
        told = ", ".join(f"{file.name} {counts[name]:,}" for file, name in zip(files, names, strict=True))
        raise ValueError(f"parallel files {path!r} have different numbers of lines: {told}")


# --- all of them ------------------------------------------------------------------------------

Reader = Callable[[pathlib.Path, ReadOptions, Choose], Iterator[Record]]
FORMATS: dict[str, Reader] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".conll": read_conll,
}


def read_files(path: str, options: ReadOptions, choose: Choose) -> tuple[str, Iterator[Record]]:
    """The name and the records of a file, folder or glob; a .txt file that is named itself is read as TAB-separated."""
    readers = FORMATS if pathlib.Path(path).is_dir() else {**FORMATS, ".txt": read_tsv}
    files = find_files(path, list(readers))
    names = _short_names(files)

    def records() -> Iterator[Record]:
        for name, file in zip(names, files, strict=True):
            for place, row in readers[format_of(file)](file, options, choose):
                yield name + place, row

    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} … ({len(names)} files)", records()


def _short_names(files: Sequence[pathlib.Path]) -> list[str]:
    """File names, with as much of their folders as tells them apart."""
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return names
    depth = 1
    while len({file.parts[-depth:] for file in files}) < len(files):
        depth += 1
    return ["/".join(file.parts[-depth:]) for file in files]
