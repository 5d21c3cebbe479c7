"""Rows of tables: .tsv, .csv and .parquet."""

import collections
import csv
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxlm.data.columns import is_header
from jaxlm.data.records import Bad, Choose, ReadOptions, Record, chosen, not_as_wide
from jaxlm.data.sources import opened_parquet
from jaxlm.text_files import open_text, read_lines

SAMPLE = 1000  # rows that decide whether the first line of a table is a header
_QUOTED = re.compile('"(?:[^"]|"")*[^"]""[^"](?:[^"]|"")*"')  # a quoted cell with a doubled quote inside
SEPARATORS = {"\t": "TAB", ",": "comma", ";": "semicolon", "|": "|"}


def read_tsv(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """Lines of cells between TABs. Quote characters are text, unless the first line has all its cells in double quotes, as R's
    `write.table` writes them: such a file is read as CSV."""
    separator = options.separator or "\t"
    first = next((line for _, line in read_lines(file, options.encoding) if line), "").split(separator)
    if len(first) > 1 and len(separator) == 1 and all(re.fullmatch('".+"', cell) for cell in first):
        options.note(f"cells of {file.name} are read as quoted, a guess from its first line")
        return _table(file, _csv_cells(file, len(options.header), separator, options), options, choose, separator)

    def cells() -> Iterator[tuple[int, list[str] | Bad]]:
        blank: list[int] | None = None
        for number, line in read_lines(file, options.encoding):
            if not line:
                if blank is not None:
                    blank.append(number)  # of a table with one column an empty row, unless at the end of the file
                continue
            yield from ((n, [""]) for n in blank or ())
            blank = []
            row = line.split(separator)
            if number <= SAMPLE and (quoted := next(filter(_QUOTED.fullmatch, row), None)):
                options.note(
                    f"{file.name}:{number} holds {quoted[:40]!r}: quotes are text in {file.suffix} files; name it .csv to "
                    "have cells read as quoted"
                )
            yield number, options.undecodable(line) or row

    return _table(file, cells(), options, choose, separator)


def read_csv(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """The csv module's default dialect: commas, cells in double quotes may hold commas, line ends and doubled quotes.

    A file whose first line has no comma but semicolons, TABs or `|` is separated by these. Where the names in the first line all
    have a space behind the comma, the spaces behind commas are not part of the cells.
    """
    separator, spaced = options.separator, False
    if separator is None:
        first = next((line for _, line in read_lines(file, options.encoding) if line.strip()), "")
        first = re.sub(r'"[^"]*"', "", first)
        counts = {mark: first.count(mark) for mark in (",", ";", "\t", "|")}
        separator = "," if counts[","] or not any(counts.values()) else max(counts, key=lambda mark: counts[mark])
        if separator != ",":
            options.note(f"cells of {file.name} are separated by {SEPARATORS[separator]}, a guess from its first line")
        cells = first.split(separator)[1:]
        spaced = bool(cells) and not options.header and all(cell.startswith(" ") for cell in cells)
    elif len(separator) != 1:
        raise ValueError(f"separator {separator!r} of a .csv file must be one character")
    return _table(file, _csv_cells(file, len(options.header), separator, options, spaced), options, choose, separator)


def _csv_cells(
    file: pathlib.Path, width: int, separator: str, options: ReadOptions, spaced: bool = False
) -> Iterator[tuple[int, list[str] | Bad]]:
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
        reader = csv.reader(lines(), strict=True, delimiter=separator, skipinitialspace=spaced)
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
                bad = options.undecodable("".join(cells)) or not_as_wide(cells, width)
            if bad and len(taken) > 1:
                again.extendleft(reversed(taken[1:]))
                del taken[1:]
                reader = csv.reader(lines(), strict=True, delimiter=separator, skipinitialspace=spaced)
            if bad or cells:
                yield from ((n, [""]) for n in blank)
                blank.clear()
                yield number, bad or cells
            elif fixed and width == 1:
                blank.append(number)  # an empty row, unless at the end of the file
            number += len(taken)


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
    try:
        twice = next((name for name in choose(names, str(file)) if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{file} has two columns {twice[:40]!r}")
        names = [f"{name}.{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]  # as in pandas
        wanted = {name: names.index(name) for name in options.columns(choose, names, str(file))}
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    for number, cells in itertools.chain(sample[named:], lines):
        if isinstance(cells, Bad):
            yield f":{number}", cells
        elif cells != [""] or len(names) == 1:
            yield f":{number}", not_as_wide(cells, len(names)) or {name: cells[i] for name, i in wanted.items()}


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
    if chosen(choose, own, file):
        return own, True
    if not is_header(top, rows):
        if len(top) == len(header):
            return header, False
        wanted = chosen(choose, header, file)
        return (wanted, False) if wanted and len(wanted) == len(top) else (header, False)
    moved = any(name in header and header.index(name) != i for i, name in enumerate(own))
    if len(own) != len(header) or moved:
        return own, True
    options.note(f"line 1 of {file.name} names the columns {', '.join(own)}, read as {', '.join(header)}")
    return header, True


def read_parquet(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    with opened_parquet(file) as table:
        schema = table.schema_arrow
        wanted = options.columns(choose, schema.names, str(file))
        names = {column: found for column in wanted if (found := _class_names(schema, column))}
        rows = (row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist())
        for i, row in enumerate(rows):
            texts = {column: cell.decode("utf8", "surrogateescape") for column, cell in row.items() if isinstance(cell, bytes)}
            bad = next(filter(None, map(options.undecodable, texts.values())), None)
            yield f" row {i}", bad or {**row, **texts, **{column: named(row[column], classes) for column, classes in names.items()}}


def _class_names(schema: Any, column: str) -> list[str] | None:
    """What `datasets` noted in a file's schema as the names of a column's class numbers, or of those in its lists."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]
        return feature.get("feature", feature).get("names")
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def named(value: Any, names: Sequence[str] | None) -> Any:
    """The name of a class number, or of each in a list; None for numbers without a name, as in test sets without labels."""
    if isinstance(value, list):
        return [named(item, names) for item in value]
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None
