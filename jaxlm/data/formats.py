"""Rows of labelled data in files: which reader reads which format.

A reader is an iterator of records (`jaxlm.data.records`). What is wrong with a file as a whole is a ValueError of one line.
A reader that knows its columns before its rows asks `Choose` which are wanted.
"""

import collections
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from jaxlm.data.json_rows import read_json, read_jsonl
from jaxlm.data.records import Bad, Choose, ReadOptions, Record, chosen
from jaxlm.data.sources import find_files, format_of
from jaxlm.data.tables import read_csv, read_parquet, read_tsv
from jaxlm.text_files import read_lines

# --- CoNLL and parallel text ------------------------------------------------------------------


_CONLLU_INDEX = re.compile(r"\d+([-.]\d+)?")


def read_conll(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """A token a line, its tag in the last column, TABs or else spaces between (ASCII ones: a no-break space is part of a token);
    sentences end at blank lines, a lone TAB included. In CoNLL-U, lines of ten columns that begin with a number, the token is the
    second column and the tag the fourth (UPOS); ranges such as 2-3 and empty nodes such as 2.1 are no tokens.

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
        if len(cells) == 10 and (index := _CONLLU_INDEX.fullmatch(cells[0])):
            options.note(f"{file.name} is CoNLL-U: tags are its parts of speech (UPOS)")
            if index[1]:
                continue
            cells = [cells[1], cells[3]]
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
    ".conllu": read_conll,
}


def read_files(path: str, options: ReadOptions, choose: Choose) -> tuple[str, Iterator[Record]]:
    """The name and the records of a file, folder or glob; a .txt file that is named itself is read as TAB-separated or CoNLL."""
    readers = FORMATS if pathlib.Path(path).is_dir() else {**FORMATS, ".txt": _read_txt}
    files = find_files(path, list(readers))
    names = _short_names(files)

    def records() -> Iterator[Record]:
        for name, file in zip(names, files, strict=True):
            for place, row in readers[format_of(file)](file, options, choose):
                yield name + place, row

    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} … ({len(names)} files)", records()


def _read_txt(file: pathlib.Path, options: ReadOptions, choose: Choose) -> Iterator[Record]:
    """A table, or, where tokens and tags are wanted and no line names columns, CoNLL's lines, as in CoNLL-2003's train.txt."""
    first = next((line for _, line in read_lines(file, options.encoding) if line), "").split(options.separator or "\t")
    tagged = not options.header and chosen(choose, ["tokens", "tags"], file) and not chosen(choose, first, file)
    return (read_conll if tagged else read_tsv)(file, options, choose)


def _short_names(files: Sequence[pathlib.Path]) -> list[str]:
    """File names, with as much of their folders as tells them apart."""
    names = [file.name for file in files]
    if len(set(names)) == len(names):
        return names
    depth = 1
    while len({file.parts[-depth:] for file in files}) < len(files):
        depth += 1
    return ["/".join(file.parts[-depth:]) for file in files]
