"""Rows of labelled data in files: one function a format, each an iterator of records.

A record is a place in the file and a row, column → value as found, or `Bad`: why this row is none. What is wrong with a
file as a whole is a ValueError of one line. A reader that knows its columns before its rows asks `Choose` which are wanted.
"""

import collections
import csv
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxlm.data.sources import find_files, format_of, opened_parquet
from jaxlm.text_files import open_text, parse_json, read_lines, read_text, undecodable


class Bad(str):
    """Why a row cannot be used, to be read after its place: "has 1 cell, not 2", "label is empty"."""


Record = tuple[str, Mapping[str, Any] | Bad]
Choose = Callable[[Sequence[str], str], list[str]]
"""(columns of a file, its name) → those wanted; raises ValueError where one that must be there is not."""


def _undecodable(text: str) -> Bad | None:
    why = undecodable(text)
    return Bad(why) if why else None


# --- tables -----------------------------------------------------------------------------------


def read_tsv(file: pathlib.Path, header: Sequence[str], choose: Choose) -> Iterator[Record]:
    """Lines of cells between TABs. There is no quoting: quote characters are text."""
    lines = ((number, _undecodable(line) or line.split("\t")) for number, line in read_lines(file) if line)
    return _table(file, lines, header, choose)


def read_csv(file: pathlib.Path, header: Sequence[str], choose: Choose) -> Iterator[Record]:
    """The csv module's default dialect: commas, cells in double quotes may hold commas, line ends and doubled quotes."""
    return _table(file, _csv_cells(file, len(header)), header, choose)


def _csv_cells(file: pathlib.Path, width: int) -> Iterator[tuple[int, list[str] | Bad]]:
    """The rows, `width` cells each (0: as many as the first), with the numbers of their first lines.

    A row of several lines that turns out bad costs its first line only, and the next is read as a row: a stray quote takes
    in everything up to the next one, perhaps the rest of the file.
    """
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default refuses cells of 128 KiB
    number, taken, again = 1, list[str](), collections.deque[str]()

    def lines() -> Iterator[str]:
        while line := again.popleft() if again else next(text, ""):
            taken.append(line)
            yield line

    with open_text(file) as text:
        reader = csv.reader(lines(), strict=True)
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
            width = width or len(cells)
            if cells:
                bad = _undecodable("".join(cells)) or _not_as_wide(cells, width)
            if bad and len(taken) > 1:
                again.extendleft(reversed(taken[1:]))
                del taken[1:]
                reader = csv.reader(lines(), strict=True)
            if bad or cells:
                yield number, bad or cells
            number += len(taken)


def _not_as_wide(cells: Sequence[str], width: int) -> Bad | None:
    return None if len(cells) == width else Bad(f"has {len(cells)} cell{'s' * (len(cells) != 1)}, not {width}")


def _table(
    file: pathlib.Path, lines: Iterator[tuple[int, list[str] | Bad]], header: Sequence[str], choose: Choose
) -> Iterator[Record]:
    """Rows of cells under the names of `header`, or else of the first row; a first row that repeats `header` is no data."""
    first = list(itertools.islice(lines, 1))
    if not first:
        return
    number, top = first[0]
    if isinstance(top, Bad) and not header:
        raise ValueError(f"{file}:{number} should name the columns but {top}")
    names = list(header or top)
    twice = next((name for name in names if name and names.count(name) > 1), None)
    hint = "" if header else "; --data.rows.header text,label names the columns of a file without names"
    if twice is not None:
        raise ValueError(f"{file} has two columns {twice[:40]!r}{hint}")
    try:
        wanted = {name: names.index(name) for name in choose(names, str(file))}
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    for number, cells in lines if top == names else itertools.chain(first, lines):
        if isinstance(cells, Bad):
            yield f":{number}", cells
        else:
            yield f":{number}", _not_as_wide(cells, len(names)) or {name: cells[i] for name, i in wanted.items()}


def read_parquet(file: pathlib.Path, header: Sequence[str], choose: Choose) -> Iterator[Record]:
    with opened_parquet(file) as table:
        wanted = choose(table.schema_arrow.names, str(file))
        rows = (row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist())
        for i, row in enumerate(rows):
            yield f" row {i}", row


# --- JSON -------------------------------------------------------------------------------------


def read_jsonl(file: pathlib.Path, header: Sequence[str], choose: Choose) -> Iterator[Record]:
    """An object a line."""
    for number, line in read_lines(file):
        if line.strip():
            yield f":{number}", _undecodable(line) or _parsed(line)


def _parsed(line: str) -> Mapping[str, Any] | Bad:
    try:
        return _object(parse_json(line))
    except (ValueError, RecursionError) as error:
        return Bad(f"is not JSON: {getattr(error, 'msg', error)}")


def _object(value: Any) -> Mapping[str, Any] | Bad:
    return value if isinstance(value, dict) else Bad(f"is not an object but {type(value).__name__}")


def read_json(file: pathlib.Path, header: Sequence[str], choose: Choose) -> Iterator[Record]:
    """An array of objects, alone or under "data"; SQuAD's articles, v1.1 or v2, as columns id, title, context, question and
    answers; or objects line by line, which many call .json too."""
    whole = read_text(file)
    try:
        items = parse_json(whole)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", str(error))
        if why != "Extra data":
            raise ValueError(f"{file}:{getattr(error, 'lineno', 1)} is not JSON: {why}") from None
        yield from read_jsonl(file, header, choose)
        return
    if isinstance(items, dict) and isinstance(items.get("data"), list):
        items = items["data"]
    if not isinstance(items, list):
        keys = f" with the keys {', '.join(items)}"[:80] if isinstance(items, dict) else ""
        raise ValueError(f"{file} holds one {type(items).__name__}{keys}: expected an array of objects, or SQuAD's articles")
    for i, item in enumerate(items):
        if isinstance(item, dict) and "paragraphs" in item:
            yield from _article(item, f" article {i}")
        else:
            yield f" row {i}", _object(item)


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


def read_conll(file: pathlib.Path, header: Sequence[str], choose: Choose) -> Iterator[Record]:
    """A token a line, its tag in the last column, TABs or else spaces between (ASCII ones: a no-break space is part of a token);
    sentences end at blank lines, a lone TAB included.

    Lines that begin with `# ` before the first token of a sentence are comments; -DOCSTART- lines are left out.
    """
    choose(["tokens", "tags"], str(file))
    start, tokens, tags = 0, list[str](), list[str]()
    why: Bad | None = None
    for number, line in itertools.chain(read_lines(file), [(0, "")]):
        if not line.strip(" \t"):
            if start:
                yield f":{start}", why or {"tokens": tokens, "tags": tags}
            start, tokens, tags, why = 0, [], [], None
            continue
        if line.startswith("-DOCSTART-") or (not start and line.startswith("# ")):
            continue
        start = start or number
        cells = line.split("\t") if "\t" in line else line.strip(" ").split(" ")
        if bad := _undecodable(line):
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


def read_parallel(path: str, choose: Choose) -> Iterator[Record]:
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
    for number, lines in enumerate(itertools.zip_longest(*map(read_lines, files)), 1):
        texts = {name: line[1] for name, line in zip(names, lines, strict=True) if line is not None}
        counts.update(texts.keys())
        if len(texts) == len(names):
            yield f":{number}", next(filter(None, map(_undecodable, texts.values())), None) or texts
    if len({counts[name] for name in names}) > 1:
        told = ", ".join(f"{file.name} {counts[name]:,}" for file, name in zip(files, names, strict=True))
        raise ValueError(f"parallel files {path!r} have different numbers of lines: {told}")


# --- all of them ------------------------------------------------------------------------------

Reader = Callable[[pathlib.Path, Sequence[str], Choose], Iterator[Record]]
FORMATS: dict[str, Reader] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".conll": read_conll,
}


def read_files(path: str, header: Sequence[str], choose: Choose) -> tuple[str, Iterator[Record]]:
    """The name and the records of a file, folder or glob; a .txt file that is named itself is read as TAB-separated."""
    readers = FORMATS if pathlib.Path(path).is_dir() else {**FORMATS, ".txt": read_tsv}
    files = find_files(path, list(readers))
    names = _short_names(files)

    def records() -> Iterator[Record]:
        for name, file in zip(names, files, strict=True):
            for place, row in readers[format_of(file)](file, header, choose):
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
