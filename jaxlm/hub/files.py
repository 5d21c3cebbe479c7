"""Hugging Face folders: finding them, and the tensors in them by name and slice.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header (name → dtype, shape, place)
and the tensors' bytes. It is read here with plain file reads: a memory map would count every page that it touched as
memory of this process, and the library's NumPy face knows no bfloat16.
"""

import collections
import contextlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.config import nearest
from jaxlm.data.tokenizer import expand
from jaxlm.hub.tensors import Index
from jaxlm.report import bar

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
# Bytes read at once where only a part of each row is wanted.
CHUNK = 4 << 20
# Loads and saves of more bytes than this show a bar.
LARGE = 1 << 30


# --- finding ---------------------------------------------------------------------------------


def find(argument: str, weights: bool = True) -> pathlib.Path:
    """The folder of a model: a folder as it is, else a hub id, downloaded or from the cache.

    Only configs, tokenizers and (with `weights`) safetensors are fetched, no code and no pickles. Raises ValueError, in one line,
    for what is neither.
    """
    path = pathlib.Path(expand(argument))
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"model {argument!r} is a file: give its folder, {str(path.parent)!r}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", argument):
        there = [str(other) for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
        hint = nearest(str(path), there)
        raise ValueError(f"no model folder {argument!r}" + (f": did you mean {hint!r}?" if hint else ""))
    import huggingface_hub

    try:
        # A repository's top level only: folders below hold other formats of the same weights; but for 1_Pooling.
        folder = huggingface_hub.snapshot_download(
            argument,
            allow_patterns=["*.json", *(["*.safetensors"] if weights else []), "*.txt", "*.model", "*.spm", "*.jinja"],
            ignore_patterns=["[!1]*/*", "consolidated*"],
        )
    except Exception as error:  # not found, not allowed, no network: the hub's client raises a dozen kinds
        why = " ".join(str(error).split())[:90]
        raise ValueError(f"{argument!r} is no folder, was not downloaded before, and the hub did not give it ({why})") from None
    return pathlib.Path(folder)


# --- reading ---------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Where a tensor lies: file, first byte, shape, and its dtype by safetensors' name."""

    file: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class Tensors:
    """The tensors of a Hugging Face folder by name, from the headers alone; `read` fetches slices."""

    def __init__(self, folder: pathlib.Path | str):
        self.folder = pathlib.Path(folder)
        self.index: dict[str, Stored] = {}
        for file in _weight_files(self.folder):
            self.index |= _header(file)

    def read(self, name: str, slices: Index) -> np.ndarray:
        """A part of a tensor in the dtype that it is stored in, as an array of its own."""
        stored = self.index[name]
        out = np.empty([span.stop - span.start for span in slices], DTYPES[stored.dtype])
        with stored.file.open("rb") as file:
            _fill(out, file, stored.offset, stored.shape, slices)
        return out


def has_weights(folder: pathlib.Path) -> bool:
    """Whether a folder has safetensors, and not a config alone."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def tensor_names(folder: pathlib.Path) -> list[str]:
    """Names of the tensors, as far as they can be told: of a folder that is all config, none."""
    index = folder / INDEX
    if index.is_file():
        return list(json.loads(index.read_text(encoding="utf8"))["weight_map"])
    return list(Tensors(folder).index) if (folder / WEIGHTS).is_file() else []


def stored_dtype(folder: pathlib.Path) -> str:
    """The dtype that most parameters of a folder are stored in, by NumPy's name; float64 counts as float32."""
    sizes: collections.Counter[str] = collections.Counter()
    for stored in Tensors(folder).index.values():
        sizes[stored.dtype] += math.prod(stored.shape)
    largest = max((name for name in sizes if name in DTYPES), key=lambda name: sizes[name], default="F32")
    return "float32" if largest == "F64" else DTYPES[largest].name


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{folder / INDEX} is not an index of safetensors files: it has no weight_map") from None
        if lost := [name for name in names if pathlib.Path(name).name != name or not (folder / name).is_file()]:
            raise ValueError(f"{folder / INDEX} names files that are not there: {some(lost)}")
        return [folder / name for name in names]
    there = sorted(file.name for file in folder.iterdir() if file.is_file())
    if pickles := [name for name in there if name.endswith(PICKLES)]:
        raise ValueError(
            f"{str(folder)!r} holds weights only as {some(pickles)}, which may run code when opened and are not read here: where "
            "you trust the file, convert it with transformers and torch: AutoModel….from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise ValueError(f"{str(folder)!r} holds no {WEIGHTS} and no {INDEX}; there are: {some(there) or 'no files'}")


def _header(file: pathlib.Path) -> dict[str, Stored]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise ValueError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        if len(first) < 8 or 8 + length > size:
            raise ValueError(f"{file} is not a safetensors file, or is cut short")
        raw = stream.read(length)
    try:
        end, found = 8 + length, {}
        for name, entry in json.loads(raw).items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            stored = Stored(file, start, tuple(entry["shape"]), entry["dtype"])
            if stored.dtype in DTYPES and math.prod(stored.shape) * DTYPES[stored.dtype].itemsize != stop - start:
                raise ValueError(f"{name} has {stop - start} bytes")
            found[name], end = stored, max(end, stop)
    except (ValueError, KeyError, AttributeError, TypeError, IndexError):
        raise ValueError(f"{file} is not a safetensors file: its header cannot be read") from None
    if end > size:
        raise ValueError(f"{file} is cut short: it has {size:,} bytes, its header speaks of {end:,}")
    return found


def _fill(out: np.ndarray, file: BinaryIO, offset: int, shape: Sequence[int], slices: Index) -> None:
    """Read `slices` of the array of `shape` at `offset` into `out`, in runs as long as they come."""
    if not out.size:
        return
    if not shape or all(span == slice(0, size) for span, size in zip(slices[1:], shape[1:], strict=True)):
        row = math.prod(shape[1:]) * out.itemsize
        file.seek(offset + (slices[0].start * row if shape else 0))
        # As bytes: Python's buffers know no bfloat16.
        view = out.reshape(-1).view(np.uint8)
        if file.readinto(memoryview(view)) < view.size:  # type: ignore[attr-defined]
            raise ValueError(f"{file.name} is cut short")
        return
    row = math.prod(shape[1:]) * out.itemsize
    if row > CHUNK:
        for i in range(out.shape[0]):
            _fill(out[i], file, offset + (slices[0].start + i) * row, shape[1:], slices[1:])
        return
    # A part of each row: whole rows are read, a few at a time, and cut.
    step = CHUNK // row
    for start in range(slices[0].start, slices[0].stop, step):
        rows = slice(start, min(start + step, slices[0].stop))
        buffer = np.empty((rows.stop - rows.start, *shape[1:]), out.dtype)
        _fill(buffer, file, offset, shape, (rows, *(slice(0, size) for size in shape[1:])))
        out[rows.start - slices[0].start : rows.stop - slices[0].start] = buffer[(slice(None), *slices[1:])]


@contextlib.contextmanager
def progress(title: str, total: int, size: int) -> Iterator[Callable[[], None]]:
    """A bar over tensors where there are many bytes, nothing where it is done at once."""
    if size < LARGE:
        yield lambda: None
        return
    with bar(title, total, "tensors") as shown:
        yield shown.advance


def some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
