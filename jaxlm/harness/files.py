"""Local files of a suite → questions, or whole texts."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxlm.data.formats import FORMATS, read_files
from jaxlm.data.records import Bad, ReadOptions, Record
from jaxlm.data.sources import find_files, format_of
from jaxlm.harness.suites import READY, Form, Question, Suite, pages
from jaxlm.text_files import read_lines, read_text, undecodable

HELLASWAG_LINES = 6  # of the plain-text form: context, number of the right ending, four endings


class Read(NamedTuple):
    """What a file holds, each with its place for a person."""

    places: list[str]
    questions: list[Question]


def read_questions(suite: Suite, path: str, limit: int | None = None) -> Read:
    """The first `limit` questions of a file, folder or glob (jsonl, json, csv, tsv, parquet; of hellaswag also text, six lines
    a question). ValueError: nothing there, columns that no form of the suite has, a row that is none."""
    plain = suite.name == "hellaswag" and all(format_of(file) == ".txt" for file in find_files(path, [*FORMATS, ".txt"]))
    records = _six_lines(path) if plain else read_files(path, ReadOptions(), lambda columns, where: list(columns))[1]
    places, questions = [], []
    for place, row in itertools.islice(records, limit):
        if isinstance(row, Bad):
            raise ValueError(f"{place} {row}")
        form = READY if plain else _form(suite, list(row), place)
        try:
            questions.append(form.question(row))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        places.append(place)
    if not questions:
        raise ValueError(f"{path} holds no rows")
    return Read(places, questions)


def _form(suite: Suite, columns: Sequence[str], where: str) -> Form:
    for form in suite.forms:
        if set(form.columns) <= set(columns):
            return form
    wanted = " or ".join(", ".join(form.columns) for form in suite.forms)
    raise ValueError(f"{where} has the columns {', '.join(columns) or 'none'}: task {suite.name} reads {wanted}")


def _six_lines(path: str) -> Iterator[Record]:
    for file in find_files(path, [".txt"]):
        lines = [line for _, line in read_lines(file)]
        if why := undecodable("\n".join(lines)):
            raise ValueError(f"{file} {why}")
        for start in range(0, len(lines), HELLASWAG_LINES):
            query, gold, *endings = (*lines[start : start + HELLASWAG_LINES], "", "")
            place = f"{file.name}:{start + 1}"
            if len(endings) != HELLASWAG_LINES:
                yield place, Bad(f"begins a question of {len(endings)} lines: each has {HELLASWAG_LINES}")
                return
            yield place, {"query": query, "gold": gold, "choices": endings[:-2]}


def read_pages(path: str, limit: int | None = None) -> list[str]:
    """The first `limit` articles of WikiText: of text files cut at their titles, of tables the column `page`."""
    found = list(itertools.islice(_pages(path), limit))
    if not found:
        raise ValueError(f"{path} holds no text")
    return found


def _pages(path: str) -> Iterator[str]:
    if all(format_of(file) in (".txt", ".tokens", ".raw") for file in find_files(path, ())):
        for file in find_files(path, ()):
            yield from pages(read_text(file).replace("\r\n", "\n"))
        return
    for place, row in read_files(path, ReadOptions(), lambda columns, where: list(columns))[1]:
        if isinstance(row, Bad):
            raise ValueError(f"{place} {row}")
        if not isinstance(row.get("page"), str):
            raise ValueError(f"{place} has the columns {', '.join(row) or 'none'}: task wikitext reads texts in the column page")
        if row["page"].strip():
            yield row["page"]
