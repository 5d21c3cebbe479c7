"""A Hugging Face folder → parameters, each read straight into its sharding."""

import collections
import concurrent.futures
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxlm.hub.files import DTYPES, Tensors, progress, some
from jaxlm.hub.tensors import Index, Part, Table, Tensor, blocks, flatten, nest, paste, resolve, whole
from jaxlm.report import say


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
    with progress(f"loading {tensors.folder.name}", total, size) as advance:
        for row, part in todo:
            params[part.path] = _place(row, part, places[part.path], read, dtypes[part.path])
    if new:
        assert fresh is not None, "leaves may be optional only where something can replace them"
        say(f"{tensors.folder}: not in the checkpoint, or of another shape, and so initialised anew: {some(new)}")

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
        _refuse_wrapped(tensors, [*wanted, *(name.removeprefix(table.prefix) for name in wanted)], extra)
        text = "; ".join(f"{what}: {some(items)}" for what, items in found.items() if items)
        raise ValueError(f"the checkpoint in {str(tensors.folder)!r} does not fit the model: {text}")
    return names, new


# Modules of torch that wrap a model, and put their own name before (or between) those of its tensors.
_WRAPPERS = {
    "module": "DataParallel", "_orig_mod": "torch.compile", "_fsdp_wrapped_module": "FSDP", "_forward_module": "Lightning",
    "base_model": "PEFT",
}  # fmt: skip


def _refuse_wrapped(tensors: Tensors, wanted: Sequence[str], extra: Sequence[str]) -> None:
    """Raise ValueError where most names of a file fit once what a wrapper put into them is taken out."""
    bare = re.compile(rf"(?<![^.])(?:{'|'.join(_WRAPPERS)})\.")
    known, prefixes = set(wanted), collections.Counter[str]()
    for name in extra:
        inner = bare.sub("", name)
        tails = [inner, *(inner[place.end() :] for place in re.finditer(r"\.", inner))]
        tail = next((tail for tail in tails if tail in known), None)
        if tail is not None and tail != name:
            lead = name.removesuffix(tail)
            prefixes[lead if lead != name else next(iter(bare.findall(name)), "")] += 1
    if not prefixes or 2 * prefixes.total() < len(extra):
        return
    prefix, count = prefixes.most_common(1)[0]
    by = next((f", which {wrapper} put there" for part, wrapper in _WRAPPERS.items() if part in prefix), "")
    raise ValueError(
        f"{count:,} names of the tensors in {str(tensors.folder)!r} hold {prefix!r}{by}: take it out, with safetensors.torch: "
        f'save_file({{name.replace("{prefix}", "", 1): x for name, x in load_file(FILE).items()}}, FILE, {{"format": "pt"}})'
    )


def _place(row: Tensor, part: Part, sharding: jax.sharding.Sharding, read: Any, dtype: np.dtype) -> jax.Array:
    """One leaf, laid out: every shard that lies on this host filled block by block, then handed to its devices."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(part.shape).items():
        assert index is not None, "a device without a place"
        devices.setdefault(tuple((span.start, span.stop) for span in whole(index, part.shape)), []).append(device)
    shards = {key: _roomy([stop - start for start, stop in key], dtype) for key in devices}
    cover = tuple(slice(min(start for start, _ in ends), max(stop for _, stop in ends)) for ends in zip(*shards, strict=True))

    def spread(where: Index, block: np.ndarray) -> None:
        for key, shard in shards.items():
            paste(shard, tuple(slice(*ends) for ends in key), block, where)

    # Copying into another order takes longer than reading, and NumPy lets go of Python's lock for it.
    workers = min(4, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        waiting: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        for where, block in blocks(row, part, cover, read):
            waiting.append(pool.submit(spread, where, block))
            if len(waiting) > workers:  # so few blocks are in memory at a time
                waiting.popleft().result()
        for future in waiting:
            future.result()
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


def _shape(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"
