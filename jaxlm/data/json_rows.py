"""Rows of .jsonl and .json files."""

import itertools
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxlm.config import unknown
from jaxlm.data.records import Bad, Choose, ReadOptions, Record, chosen, not_as_wide
from jaxlm.text_files import parse_json, read_lines, read_text, well_formed_tree

_BETWEEN = re.compile(r"[,\s]*")


def read_jsonl(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """An object a line, or a list with the values of columns (see `_records`). A file that is one array of objects, or whose
    objects take several lines each, is read as `read_json` does."""
    first = next((line.strip() for _, line in read_lines(file, options.encoding) if line.strip()), "")
    if first in ("[", "{") or first.startswith("[{"):
        yield from read_json(file, options, choose)
    else:
        yield from _records(_lines(file, options), file, options, choose)


def _lines(file: pathlib.Path, options: ReadOptions) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(file, options.encoding):
        if line.strip():
            yield f":{number}", options.undecodable(line) or _parsed(line)


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        return Bad(f"is not JSON: {getattr(error, 'msg', error)}")


def _records(values: Iterable[tuple[str, Any]], file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """Objects, and lists under the names of their columns: those of `options.header`, or of a first list that names them."""
    names: Sequence[str] = options.header
    for i, (place, value) in enumerate(values):
        if i == 0 and isinstance(value, list) and value and all(isinstance(cell, str) for cell in value):
            own = [cell.strip() for cell in value]
            if [cell.casefold() for cell in own] == [name.casefold() for name in names] or chosen(choose, own, file):
                names = options.header or own
                continue
        if isinstance(value, list) and names:
            yield place, not_as_wide(value, len(names)) or dict(zip(names, value, strict=True))
        elif isinstance(value, dict | Bad):
            yield place, value
        else:
            hint = ": --data.rows.header text,label names its columns" if isinstance(value, list) else ""
            yield place, Bad(f"is not an object but {type(value).__name__}{hint}")


def read_json(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """An array of objects, or of lists whose columns `options.header` names: alone, under "data", under `options.under` or
    under the split; tables as pandas writes them; SQuAD's articles, v1.1 or v2, as columns id, title, context, question and
    answers; or objects one after another, which many call .json too."""
    whole = read_text(file, options.encoding)
    try:
        value = parse_json(whole)
    except (ValueError, RecursionError) as error:
        why = getattr(error, "msg", str(error))
        if why != "Extra data":
            raise ValueError(f"{file}:{getattr(error, 'lineno', 1)} is not JSON: {why}") from None
        if (objects := _several(whole)) is None:
            yield from _records(_lines(file, options), file, options, choose)
            return
        value = objects
    items = _array(value, file, options, choose)
    if items and isinstance(items[0], dict) and "paragraphs" in items[0]:
        for i, article in enumerate(items):
            yield from _article(article, f" article {i}")
    else:
        yield from _records(((f" row {i}", item) for i, item in enumerate(items)), file, options, choose)


def _several(whole: str) -> list[Any] | None:
    """Objects that follow each other and take several lines each, or None: others are lines, of which each may be bad alone."""
    first, *_ = whole.lstrip().split("\n", 1)
    if not isinstance(_parsed(first), Bad):
        return None
    values, decoder = [], json.JSONDecoder()
    at = len(whole) - len(whole.lstrip())
    try:
        while at < len(whole):
            value, end = decoder.raw_decode(whole, at)
            values.append(well_formed_tree(value))
            at = _BETWEEN.match(whole, end).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return None
    return values


def _array(value: Any, file: pathlib.Path, options: ReadOptions, choose: Choose) -> list[Any]:
    """The rows of a JSON value. Raises ValueError, with the keys to choose from, where it is not clear which these are."""
    if options.under:
        value = _below(value, file, options.under, options)
    if isinstance(value, dict):
        lists = [name for name, inner in value.items() if isinstance(inner, list)]
        if "data" in lists:  # beside "columns" where pandas wrote it with orient="split"
            names = value.get("columns")
            value = [names, *value["data"]] if isinstance(names, list) else value["data"]
        elif split := options.splits.choose(lists):
            value = value[options.take(split)]
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):  # pandas, orient="index"
        rows = list(value.values())
        if chosen(choose, list(dict.fromkeys(itertools.chain.from_iterable(rows))), file):
            value = rows
    if isinstance(value, dict) and value and (columns := _columns(value)) and chosen(choose, list(columns), file):
        value = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if isinstance(value, list):
        return value
    named = f" with the keys {', '.join(value)}"[:80] if isinstance(value, dict) else ""
    keys = [key for key, inner in value.items() if isinstance(inner, list | dict)] if isinstance(value, dict) else []
    under = f"; --data.rows.under {shlex.quote(keys[0])} reads the rows under one key" if keys else ""
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
