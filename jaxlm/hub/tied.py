"""Tensors that a file holds beside the one that they are tied to.

transformers 5 (`PreTrainedModel.tie_weights`) drops such a copy only where it is equal: where it differs, the config is
wrong and both are used; where the original is missing, the copy stands for it.
"""

import functools
import re

import numpy as np

from jaxlm.hub.files import CHUNK, Tensors
from jaxlm.hub.tensors import Index, Table
from jaxlm.report import warn

EMBEDDING, HEAD = "transformer/embed/table", "head/table"


def read_copies(tensors: Tensors, table: Table, tied: bool) -> bool:
    """Whether the head over the vocabulary is tied to the embeddings, by the tensors of a folder and its config (`tied`).

    Entries that are missing from `tensors.index` though a copy is there are added, and copies that play no part are removed.
    Raises ValueError for token embeddings of an encoder-decoder that differ between the two, for which there is no place.
    """
    names: dict[str, str] = {}  # full name → name in the file
    for stored in tensors.index:
        name = stored
        for pattern, replacement in table.renames:
            name = re.sub(pattern, replacement, name)
        names.setdefault(name, stored)
        names.setdefault(table.prefix + name, stored)

    def drop(copy: str, original: str) -> None:
        if original not in names:
            tensors.index[original] = tensors.index[names[copy]]
        del tensors.index[names[copy]]

    for copy, original in table.copies.items():
        if copy not in names or names[copy] == names.get(original):
            continue
        if original in names and not _equal(tensors, names[copy], names[original]):
            if copy.endswith(".weight"):
                raise ValueError(
                    f"{str(tensors.folder)!r}: {names[copy]} and {names[original]} differ: encoder and decoder with token "
                    "embeddings of their own are not supported"
                )
            del tensors.index[names.pop(original)]  # a bias: the copy is what the head adds
        drop(copy, original)
    places = {path: name for name, parts in table.tensors.items() for path in parts}
    head, embedding = places.get(HEAD), places.get(EMBEDDING)
    if not tied or head not in names or embedding is None:
        return tied
    if embedding in names and not _equal(tensors, names[head], names[embedding]):
        _warn(str(tensors.folder), names[head], names[embedding])
        return False
    drop(head, embedding)
    return True


@functools.cache
def _warn(folder: str, head: str, embedding: str) -> None:
    warn(f"{folder}: {head} and {embedding} differ though config.json ties them: both are used, as in transformers")


def _equal(tensors: Tensors, one: str, other: str) -> bool:
    a, b = tensors.index[one], tensors.index[other]
    if a == b:
        return True
    stamp = tuple(stored.file.stat().st_mtime_ns for stored in (a, b))
    return a.shape == b.shape and _same_values(tensors, one, other, (str(tensors.folder.absolute()), one, other, *stamp))


_COMPARED: dict[tuple, bool] = {}


def _same_values(tensors: Tensors, one: str, other: str, key: tuple) -> bool:
    """Compare two tensors of one shape in blocks of rows; the result is kept under `key`."""
    if key not in _COMPARED:
        shape = tensors.index[one].shape
        rows = max(1, CHUNK // max(1, int(np.prod(shape[1:]))))
        blocks = (
            (slice(start, min(start + rows, shape[0])), *(slice(0, size) for size in shape[1:]))
            for start in range(0, shape[0], rows)
        )

        def read(name: str, block: Index) -> np.ndarray:
            return tensors.read(name, block).astype(np.float32)

        _COMPARED[key] = all(np.array_equal(read(one, block), read(other, block)) for block in blocks)
    return _COMPARED[key]
