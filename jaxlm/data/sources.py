"""Documents from anywhere: this Python's own texts, files, Hugging Face datasets, TensorFlow datasets.

A source is read by `documents` and known by `describe`: what it is and a fingerprint of what it
holds, so that a cache built from it can tell when the data has changed.
"""

import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from jaxlm.config import nearest, unknown
from jaxlm.data.columns import missing_columns
from jaxlm.data.tokenizer import expand
from jaxlm.text_files import PACKED, parse_json, read_lines, read_text, undecodable

T = TypeVar("T")
FORMATS = (".txt", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where documents come from."""

    kind: Literal["embedded", "files", "huggingface", "tfds"] = "embedded"
    """Python's own documentation (about 2 MB, always there), files, a Hugging Face or a TensorFlow dataset."""
    path: str | None = None
    """File, folder or glob; dataset folder or hub id; tfds name or prepared folder. `${VAR:-default}` and `~` work."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset, such as wikitext-2-raw-v1."""
    split: str = "train"
    """Split of a Hugging Face or TensorFlow dataset."""
    column: str = "text"
    """Column that holds the text, where the data has columns."""
    streaming: bool = False
    """Read a Hugging Face dataset as it arrives, without preparing it first."""
    weight: float = 1.0
    """Share of this source in a mixture, relative to the others."""

    def __post_init__(self) -> None:
        if self.kind == "embedded" and self.path:
            raise ValueError(f"source kind 'embedded' takes no path; for {self.path!r} choose files, huggingface or tfds")
        if self.kind != "embedded" and not self.path:
            raise ValueError(f"source kind {self.kind!r} needs a path")
        if self.subset and self.kind != "huggingface":
            raise ValueError(f"source subset {self.subset!r} is only read by kind 'huggingface', not by {self.kind!r}")
        if self.split != "train" and self.kind not in ("huggingface", "tfds"):
            raise ValueError(f"source split {self.split!r} is only read by kinds 'huggingface' and 'tfds', not by {self.kind!r}")
        if self.column != "text" and self.kind == "embedded":
            raise ValueError(f"source column {self.column!r} is not read by kind 'embedded', whose texts have no columns")
        if self.streaming and self.kind != "huggingface":
            raise ValueError(f"source streaming works with kind 'huggingface' only, not with {self.kind!r}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"source weight {self.weight} must be a positive number")


def documents(source: SourceConfig) -> Iterator[str]:
    """The texts of a source, in an order that is the same each time.

    Raises ValueError, in one line, for data that is not there, cannot be read or lacks the column.
    """
    path = expand(source.path or "")
    if source.kind == "embedded":
        yield from _embedded()
    elif source.kind == "files":
        for file in find_files(path):
            yield from _read(file, source.column)
    else:
        rows = _huggingface(source, path) if source.kind == "huggingface" else tfds_rows(path, source.split)
        for i, row in enumerate(rows):
            yield _text(row, source.column, f"{path} row {i}")


def describe(source: SourceConfig) -> dict[str, Any]:
    """What the source is and a fingerprint of its content, as plain JSON; files are read through.

    A streaming source is known by its name alone, as its content arrives only once; one that `datasets` saved into a local
    folder by its fingerprint too.
    """
    path = expand(source.path or "")
    if source.kind == "embedded":
        digest = hashlib.blake2b(json.dumps(_topics()).encode(), digest_size=16)
        for file in _standard_library():
            digest.update(file.read_bytes())
        return {"kind": "embedded", "python": platform.python_version(), "blake2b": digest.hexdigest()}
    if source.kind == "files":
        files = find_files(path)
        root = os.path.commonpath([file.parent for file in files])
        held = {os.path.relpath(file, root): {"bytes": file.stat().st_size, "blake2b": _digest(file)} for file in files}
        return {"kind": "files", "column": source.column, "files": held}
    known: dict[str, Any] = {"kind": source.kind, "split": source.split, "column": source.column}
    if source.kind == "tfds":
        info = tfds_builder(path).info
        return {**known, "name": info.full_name, "examples": info.splits[source.split].num_examples}
    known = {**known, "name": pathlib.Path(path).name, "subset": source.subset}
    if source.streaming and not is_saved(path):
        return known
    stored = dataclasses.replace(source, streaming=False)
    return {**known, "fingerprint": _huggingface(stored, path)._fingerprint}


def stream(source: SourceConfig) -> Any:
    """A streaming source as a new `datasets.IterableDataset`, which has `state_dict` and `load_state_dict`."""
    assert source.streaming, "only a streaming source has a stream"
    return _huggingface(source, expand(source.path or ""))


def text_of(row: Mapping[str, Any], source: SourceConfig) -> str:
    """The text of one row of a stream; raises ValueError where the column is missing."""
    return _text(row, source.column, f"{source.path}")


# --- embedded ---------------------------------------------------------------------------------

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


def _embedded() -> Iterator[str]:
    """The language reference as pydoc has it, then every docstring of the standard library of some length."""
    yield from _topics().values()
    for file in _standard_library():
        yield from docstrings(file)


def docstrings(file: pathlib.Path) -> Iterator[str]:
    """The docstrings of some length (40 characters) in a Python file: its own, then those of its classes and functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules hold invalid escapes
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return  # the library ships a few files for other versions or with other encodings
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and len(docstring) >= 40:
                yield docstring


def modules() -> Iterator[tuple[str, pathlib.Path]]:
    """The files of the standard library in sorted order, each with the top-level module or package that it belongs to."""
    root = sysconfig.get_path("stdlib")
    for file in _standard_library():
        yield file.relative_to(root).with_suffix("").parts[0], file


def _topics() -> dict[str, str]:
    import pydoc_data.topics

    return dict(sorted(pydoc_data.topics.topics.items()))


def _standard_library() -> list[pathlib.Path]:
    found = []
    for folder, below, names in os.walk(sysconfig.get_path("stdlib")):
        below[:] = set(below) - _SKIPPED  # not entered: site-packages may hold a hundred thousand files
        found += [pathlib.Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


# --- files ------------------------------------------------------------------------------------


def find_files(path: str, formats: Sequence[str] = FORMATS) -> list[pathlib.Path]:
    """The files of a path, folder or glob in sorted order, each of one of the formats (suffixes, or these with .gz, .zst).

    Raises ValueError where there is none, and where a named one has another format; no formats: any file will do.
    """
    given = pathlib.Path(path)
    if given.is_dir():
        found = [file for file in sorted(given.rglob("*")) if file.is_file() and (not formats or format_of(file) in formats)]
        if not found:
            raise ValueError(f"folder {path!r} holds no file ending in {', '.join(formats)} (or these with .gz, .zst)")
        return found
    root = pathlib.Path(given.anchor)
    matches = [given] if given.is_file() else sorted(root.glob(str(given.relative_to(root))))
    found = [file for file in matches if file.is_file()]
    if not found:
        there = sorted(file.name for file in given.parent.iterdir()) if given.parent.is_dir() else []
        stems = {name.split(".")[0]: name for name in reversed(there)}  # the ending, which many have, makes nothing alike
        stem = nearest(given.name.split(".")[0], stems)
        hint = nearest(given.name, [name for name in there if name.split(".")[0] == stem]) or stems.get(stem or "")
        raise ValueError(f"no file matches {path!r}" + (f": did you mean {hint!r}?" if hint else ""))
    for file in found:
        if formats and format_of(file) not in formats:
            raise unknown(f"format of {str(file)!r}:", format_of(file), formats)
    return found


def format_of(file: pathlib.Path) -> str:
    """The suffix of a file in lower case, below that of its compression."""
    return (file.with_suffix("") if file.suffix.lower() in PACKED else file).suffix.lower()


def _read(file: pathlib.Path, column: str) -> Iterator[str]:
    if format_of(file) == ".parquet":
        yield from _read_parquet(file, column)
        return
    if format_of(file) == ".txt":
        yield read_text(file)
        return
    for number, line in read_lines(file):
        if line.strip():
            if why := undecodable(line):
                raise ValueError(f"{file}:{number} {why}")
            try:
                row = parse_json(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}:{number} is not JSON: {error}") from None
            yield _text(row, column, f"{file}:{number}")


@contextlib.contextmanager
def opened_parquet(file: pathlib.Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`."""
    import pyarrow
    import pyarrow.parquet

    if file.suffix in PACKED:
        raise ValueError(f"{file}: parquet files are compressed inside; take the {file.suffix} off")
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def _read_parquet(file: pathlib.Path, column: str) -> Iterator[str]:
    with opened_parquet(file) as table:
        if column not in table.schema_arrow.names:
            raise _no_column(str(file), column, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[column]):
            for i, value in enumerate(batch.column(0).to_pylist()):
                yield _text({column: value}, column, f"{file} row {i}")


def _text(row: Any, column: str, where: str) -> str:
    """The text in a row. A list of texts (the lines of a document, the turns of a dialogue) is joined by line ends; tfds gives
    bytes."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} holds {type(row).__name__}: expected an object with the column {column!r}")
    if column not in row:
        raise _no_column(where, column, list(row))
    value = row[column]
    if isinstance(value, list | tuple) and value and all(isinstance(item, str | bytes) for item in value):
        return "\n".join(map(_decoded, value))
    if isinstance(value, bytes):
        return _decoded(value)
    if not isinstance(value, str):
        texts = [name for name, other in row.items() if isinstance(other, str | bytes)]
        raise ValueError(f"column {column!r} of {where} holds {value!r:.60}, not a text; columns of text: {', '.join(texts)}")
    return value


def _no_column(where: str, column: str, names: Sequence[str]) -> ValueError:
    return missing_columns({"text": column}, names, where, {"text": "data.sources.0.column"})


def _decoded(value: str | bytes) -> str:
    return value.decode("utf8", "replace") if isinstance(value, bytes) else value


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as raw:
        return hashlib.file_digest(raw, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# --- datasets of others -----------------------------------------------------------------------


def _huggingface(source: SourceConfig, path: str) -> Any:
    held = huggingface(path, source.subset, source.split, source.streaming)
    if held.column_names is not None and source.column not in held.column_names:
        raise _no_column(path, source.column, held.column_names)
    return held.select_columns([source.column]) if held.column_names is not None and not source.streaming else held


def is_saved(path: str) -> bool:
    """Whether `datasets` saved a data set, or one with splits, into this folder."""
    return any(pathlib.Path(path, name).exists() for name in ("state.json", "dataset_dict.json"))


def huggingface(path: str, subset: str | None, split: str, streaming: bool = False) -> Any:
    """The `datasets` object: from the hub, from a folder that `datasets` saved, or from a folder of data files."""
    import datasets

    if not is_saved(path):
        return _asked(path, lambda: datasets.load_dataset(path, subset, split=split, streaming=streaming))
    held = _asked(path, lambda: datasets.load_from_disk(path))
    if isinstance(held, datasets.DatasetDict):
        if split not in held:
            raise unknown(f"split of {path!r}:", split, list(held))
        held = held[split]
    return held.to_iterable_dataset() if streaming else held


def split_names(path: str, subset: str | None) -> list[str] | None:
    """The splits of a data set that `huggingface` reads; None for a folder into which `datasets` saved a single one."""
    import datasets

    if not is_saved(path):
        return _asked(path, lambda: datasets.get_dataset_split_names(path, subset))
    file = pathlib.Path(path, "dataset_dict.json")
    return list(json.loads(read_text(file))["splits"]) if file.exists() else None


def tfds_rows(path: str, split: str) -> Any:
    """A random-access source read without TensorFlow (the data must lie in ArrayRecord files)."""
    import tensorflow_datasets as tfds

    if pathlib.Path(path).is_dir():
        builder = tfds_builder(path)
        return _asked(path, lambda: builder.as_data_source(split=split))
    return _asked(path, lambda: tfds.data_source(path, split=split))


def tfds_builder(path: str) -> Any:
    """The `tfds` builder of a name or of a prepared folder."""
    import tensorflow_datasets as tfds

    return _asked(path, lambda: tfds.builder_from_directory(path) if pathlib.Path(path).is_dir() else tfds.builder(path))


def _asked(path: str, load: Callable[[], T]) -> T:
    """`load()`, with whatever a library says against the path told in one line."""
    try:
        return load()
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"dataset {path!r} cannot be read: {type(error).__name__}: {why[:300]}") from None
