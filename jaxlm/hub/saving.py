"""Parameters → a Hugging Face folder, streamed tensor by tensor."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.config import unknown
from jaxlm.hub.files import DTYPES, INDEX, WEIGHTS, Tensors, progress
from jaxlm.hub.tensors import Index, Table, Tensor, flatten, resolve

# What makes a tokenizer folder; the last is jaxlm's own card.
TOKENIZER = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.spm",
    "chat_template*", "additional_chat_templates", "jaxlm_tokenizer.json",
)  # fmt: skip


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
    if table.write_copies:
        items += [(copy, row, at) for copy, original in table.copies.items() for name, row, at in items if name == original]
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
        with progress(f"writing {folder.name}", total, size) as advance:
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


def _write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
