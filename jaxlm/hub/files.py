"""Hugging Face folders in and out: safetensors read slice by slice into shardings, and streamed back.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header (name → dtype, shape, place)
and the tensors' bytes. It is read here with plain file reads: a memory map would count every page that it touched as
memory of this process, and the library's NumPy face knows no bfloat16.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxlm.config import nearest, unknown
from jaxlm.data.tokenizer import expand
from jaxlm.hub.tensors import Index, Part, Table, Tensor, blocks, flatten, nest, paste, resolve, whole
from jaxlm.report import bar, say

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
# What makes a tokenizer folder; the last is jaxlm's own card.
TOKENIZER = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*", "additional_chat_templates", "jaxlm_tokenizer.json",
)  # fmt: skip
# Bytes read at once where only a part of each row is wanted.
CHUNK = 4 << 20
# Loads and saves of more bytes than this show a bar.
LARGE = 1 << 30


# --- finding ---------------------------------------------------------------------------------


def find(argument: str) -> pathlib.Path:
    """The folder of a model: a folder as it is, else a hub id, downloaded or from the cache.

    Only configs, tokenizers and safetensors are fetched, no code and no pickles. Raises ValueError, in one line,
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
        # A repository's top level only: folders below hold other formats of the same weights.
        folder = huggingface_hub.snapshot_download(
            argument,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*"],
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


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{folder / INDEX} is not an index of safetensors files: it has no weight_map") from None
        if lost := [name for name in names if pathlib.Path(name).name != name or not (folder / name).is_file()]:
            raise ValueError(f"{folder / INDEX} names files that are not there: {_some(lost)}")
        return [folder / name for name in names]
    there = sorted(file.name for file in folder.iterdir() if file.is_file())
    if pickles := [name for name in there if name.endswith(PICKLES)]:
        raise ValueError(
            f"{str(folder)!r} holds weights only as {_some(pickles)}, which may run code when opened and are not read here: where "
            "you trust the file, convert it with transformers and torch: AutoModel….from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise ValueError(f"{str(folder)!r} holds no {WEIGHTS} and no {INDEX}; there are: {_some(there) or 'no files'}")


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


# --- loading ---------------------------------------------------------------------------------


def load(
    tensors: Tensors, table: Table, shapes: Any, axes: Any, shardings: Any, dtype: Any = None,
    *, ignored: Sequence[str] = (), optional: Sequence[str] = (), fresh: Callable[[], Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Parameters from a Hugging Face folder, each read straight into its sharding.

    `shapes`, `axes` and `shardings` are trees like the parameters; `dtype` is theirs, by default that of `shapes`.
    `ignored` are regexes of file tensors that need no place, beside the table's own. Leaves whose path matches one of
    the regexes `optional` may be missing or of another shape: they are then taken from `fresh`, a jit-able function
    that gives the whole tree (`lambda: model.init(key)`), of which only those leaves are computed.

    Each Hugging Face tensor is read once on each host, and only the slices that lie there. Raises one ValueError with
    everything that is missing, extra or misshapen.
    """
    leaves, places = flatten(shapes), flatten(shardings)
    rows = resolve(table, {path: leaf.shape for path, leaf in leaves.items()}, flatten(axes))
    names, new = _match(tensors, table, rows, ignored, optional if fresh else ())
    dtypes = {path: np.dtype(leaf.dtype if dtype is None else dtype) for path, leaf in leaves.items()}

    def read(name: str, slices: Index) -> np.ndarray:
        advance()
        if table.lacks(name):
            return np.ones([span.stop - span.start for span in slices], np.float32)
        return tensors.read(names[name], slices)

    todo = [(row, part) for row in rows for part in row.parts if part.path not in new]
    total = sum(math.prod(row.spread.values()) for row, _ in todo)
    size = sum(math.prod(part.shape) * dtypes[part.path].itemsize for _, part in todo)
    params: dict[str, Any] = {}
    with _progress(f"loading {tensors.folder.name}", total, size) as advance:
        for row, part in todo:
            params[part.path] = _place(row, part, places[part.path], read, dtypes[part.path])
    if new:
        assert fresh is not None, "leaves may be optional only where something can replace them"
        say(f"{tensors.folder}: not in the checkpoint, or of another shape, and so initialised anew: {_some(new)}")

        def pick() -> dict[str, jax.Array]:
            return {path: leaf.astype(dtypes[path]) for path, leaf in flatten(fresh()).items() if path in new}

        params |= jax.jit(pick, out_shardings={path: places[path] for path in new})()
    return nest({path: params[path] for path in leaves})


def _match(
    tensors: Tensors, table: Table, rows: Sequence[Tensor], ignored: Sequence[str], optional: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Full name → name in the file, and the leaves to initialise anew; or ValueError with all that does not fit."""
    wanted = {name: row for row in rows for name, _ in row.names() if not table.lacks(name)}
    names: dict[str, str] = {}
    extra = []
    for stored in tensors.index:
        name = stored
        for pattern, replacement in table.renames:
            name = re.sub(pattern, replacement, name)
        name = name if name in wanted else table.prefix + name
        if name in wanted and name not in names:
            names[name] = stored
        elif not any(re.search(pattern, stored) for pattern in (*table.ignored, *ignored)):
            extra.append(stored)
    missing = {name for name in wanted if name not in names}
    misshapen = {}
    for name, stored in names.items():
        entry, shape = tensors.index[stored], wanted[name].shape
        if entry.dtype not in DTYPES:
            misshapen[name] = f"{stored} is {entry.dtype}, expected one of {', '.join(DTYPES)}"
        elif entry.shape != shape:
            misshapen[name] = f"{stored} {_shape(entry.shape)}, expected {_shape(shape)}"
    new = []
    for row in rows:
        own = {name for name, _ in row.names()}
        paths = [part.path for part in row.parts]
        if own <= missing | misshapen.keys() and all(any(re.fullmatch(p, path) for p in optional) for path in paths):
            missing -= own
            misshapen = {name: text for name, text in misshapen.items() if name not in own}
            new += paths
    found = {"missing": [name for name in wanted if name in missing], "extra": extra, "misshapen": list(misshapen.values())}
    if any(found.values()):
        text = "; ".join(f"{what}: {_some(items)}" for what, items in found.items() if items)
        raise ValueError(f"the checkpoint in {str(tensors.folder)!r} does not fit the model: {text}")
    return names, new


def _place(row: Tensor, part: Part, sharding: jax.sharding.Sharding, read: Any, dtype: np.dtype) -> jax.Array:
    """One leaf, laid out: every shard that lies on this host filled block by block, then handed to its devices."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(part.shape).items():
        assert index is not None, "a device without a place"
        devices.setdefault(tuple((span.start, span.stop) for span in whole(index, part.shape)), []).append(device)
    shards = {key: _roomy([stop - start for start, stop in key], dtype) for key in devices}
    cover = tuple(slice(min(start for start, _ in ends), max(stop for _, stop in ends)) for ends in zip(*shards, strict=True))
    for where, block in blocks(row, part, cover, read):
        for key, shard in shards.items():
            paste(shard, tuple(slice(*ends) for ends in key), block, where)
    arrays = []
    for key in list(shards):
        shard = shards.pop(key)  # freed as soon as it is copied, so that a leaf is never in memory twice
        arrays += [jax.device_put(shard, device) for device in devices[key]]
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(part.shape, sharding, arrays)


def _roomy(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array with room behind it: once freed, XLA's aligned copy of the next shard fits in its place.

    With `jaxlm.host`'s malloc, which gives nothing back, the peak is 1.09 times the model instead of 1.28.
    """
    size = math.prod(shape) * dtype.itemsize
    return np.empty(size + 4096, np.uint8)[:size].view(dtype).reshape(shape)


# --- saving ----------------------------------------------------------------------------------


def save(
    folder: pathlib.Path | str, table: Table, params: Any, axes: Any, *, dtype: str = "float32", config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None, tokenizer: pathlib.Path | str | None = None,
    card: str = "", max_shard_bytes: int = 5_000_000_000, carried: Sequence["Carried"] = (),
) -> pathlib.Path:  # fmt: skip
    """Write a folder that `from_pretrained` opens; returns it. `card` is the README, `tokenizer` a folder, `carried`
    are tensors taken over from another folder.

    Tensors are fetched and written one by one: the host holds one layer of one leaf, never a whole file. The folder
    appears only when it is complete. With several processes all must call this; the first one writes.
    Raises ValueError for a folder that is not empty, or weights that the dtype cannot hold.
    """
    codes = {kind.name: code for code, kind in DTYPES.items()}
    if dtype not in codes:
        raise unknown("dtype", dtype, codes)
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is there already and not empty: give a new folder, or remove it first")
    fetch = _Fetch(flatten(params))
    rows = resolve(table, {path: leaf.shape for path, leaf in fetch.leaves.items()}, flatten(axes))
    kind = DTYPES[codes[dtype]]
    items = [*_in_layer_order(rows, table), *((tensor.name, tensor, {}) for tensor in carried)]
    files = _split(items, kind.itemsize, max_shard_bytes)
    if jax.process_index() > 0:
        for _, row, at in (item for items in files.values() for item in items):
            row.write(at, fetch, kind)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        total = sum(map(len, files.values()))
        size = sum(math.prod(row.shape) for _, row, _ in items) * kind.itemsize
        with _progress(f"writing {folder.name}", total, size) as advance:
            for file, items in files.items():
                _write_file(partial / file, items, fetch, kind, codes[dtype], advance)
        if len(files) > 1:
            where = {name: file for file, items in files.items() for name, _, _ in items}
            _write_json(partial / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        _write_json(partial / "config.json", config)
        if generation_config is not None:
            _write_json(partial / "generation_config.json", generation_config)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def copy_tokenizer(source: pathlib.Path | str, target: pathlib.Path) -> None:
    """Copy the tokenizer's files from one folder to another, weights and configs left behind."""
    for pattern in TOKENIZER:
        for file in pathlib.Path(source).glob(pattern):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target / file.name)


@dataclasses.dataclass(frozen=True)
class Carried:
    """A tensor that our model has no parameter for (a pooler that nothing here reads), taken over as it is."""

    name: str
    stored: str
    source: Tensors

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.index[self.stored].shape

    def write(self, at: Mapping[str, int], fetch: Any, dtype: np.dtype) -> np.ndarray:
        return self.source.read(self.stored, tuple(slice(0, length) for length in self.shape)).astype(dtype)


Item = tuple[str, Tensor | Carried, dict[str, int]]


def _in_layer_order(rows: Iterable[Tensor], table: Table) -> list[Item]:
    """What to write: tensors without layers first, then all of the first layer, …; rows keep their order within."""
    items: list[Item] = [(name, row, at) for row in rows for name, at in row.names() if not table.lacks(name)]
    return sorted(items, key=lambda item: item[2].get("X", -1))


def _split(items: Sequence[Item], itemsize: int, limit: int) -> dict[str, list[Item]]:
    """File name → its tensors, no file larger than the limit unless one tensor is."""
    files: list[list[Item]] = [[]]
    room = limit
    for item in items:
        size = math.prod(item[1].shape) * itemsize
        if files[-1] and size > room:
            files.append([])
            room = limit
        files[-1].append(item)
        room -= size
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    return {f"model-{i + 1:05d}-of-{len(files):05d}.safetensors": items for i, items in enumerate(files)}


def _write_file(
    file: pathlib.Path, items: Sequence[Item], fetch: "_Fetch", dtype: np.dtype, code: str, advance: Callable[[], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, row, _ in items:
        start, end = end, end + math.prod(row.shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(row.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin on a multiple of eight
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, row, at in items:
            try:
                with np.errstate(over="raise"):
                    values = row.write(at, fetch, dtype)
            except FloatingPointError:
                raise ValueError(f"{name} has values that {dtype.name} cannot hold: save as bfloat16 or float32") from None
            stream.write(memoryview(values.reshape(-1).view(np.uint8)))
            advance()


@jax.jit
def _layer(leaf: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(leaf, i, 1, axis=0)


@dataclasses.dataclass
class _Fetch:
    """Values of a leaf, brought to the host a layer at a time.

    The last layer is kept, as its experts are asked for one by one. Values are taken from copies on the device: asking
    an array itself for them would leave them in host memory for as long as the array lives.
    """

    leaves: dict[str, Any]
    kept: tuple[tuple[str, int], np.ndarray] | None = None

    def __call__(self, path: str, index: Index) -> np.ndarray:
        leaf, row = self.leaves[path], index[0] if index else slice(0, 1)
        if isinstance(leaf, np.ndarray):
            return leaf[index]
        one = leaf.ndim > 0 and row.stop - row.start < leaf.shape[0]
        assert not one or row.stop - row.start == 1, "layers come one by one"
        key = (path, row.start if one else -1)
        if self.kept is None or self.kept[0] != key:
            self.kept = None
            self.kept = key, _to_host(_layer(leaf, np.int32(row.start)) if one else leaf)
        return self.kept[1][(slice(None), *index[1:])] if one else self.kept[1][index]


def _to_host(value: jax.Array) -> np.ndarray:
    if not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    out = np.empty(value.shape, value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id == 0:
            out[shard.index] = np.asarray(jax.numpy.copy(shard.data))
    return out


# --- small things ----------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(title: str, total: int, size: int) -> Iterator[Callable[[], None]]:
    """A bar over tensors where there are many bytes, nothing where it is done at once."""
    if size < LARGE:
        yield lambda: None
        return
    with bar(title, total, "tensors") as shown:
        yield shown.advance


def _write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _some(names: Sequence[str], most: int = 8) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
