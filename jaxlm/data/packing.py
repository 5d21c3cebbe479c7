"""Token streams → rows of one length: windows of the stream, or whole documents packed by best fit.

Pure arithmetic on arrays, index-addressed: row i of `Windows` or `Packed` is computed when asked for.
In both, every token of the corpus is a target exactly once. A row is a dict of arrays (length,):
`tokens` int32, `targets` int32, `weights` float32 (0: not scored); `Packed` adds `segments` and
`positions` int32. `stack` makes a batch of rows: tokens_BL, targets_BL, …
B rows of the batch · L tokens of a row · O options of a choice.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from jaxlm.data.steps import alone, finished, ranges

Row = dict[str, Any]  # arrays and scalars, or rows again: {"encoder": …, "decoder": …}
Batch = dict[str, Any]

PIECES = 1 << 20
"""Pieces of documents that are packed together, about: it takes some 200 MB of memory."""
PIECE = np.dtype([("start", "<i8"), ("tokens", "<i4"), ("first", "?")])
"""Where a piece begins in the stream, its tokens, and whether it is the first of its document."""


class Rows(Protocol):
    """Rows addressed by number, and the row that stands for none."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Row: ...
    def blank(self) -> Row: ...


def stack(rows: Sequence[Row]) -> Batch:
    """Rows → a batch: scalars get `_B` added to their name, arrays (L,) `_BL`, arrays (O, L) `_BOL`; a name that spells
    its own letters, as `labels_C` does, gets B before them. Rows inside rows stay where they are."""
    batch: Batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, Mapping):
            batch[name] = stack(values)
            continue
        stacked = np.stack(values)
        bare, _, letters = name.rpartition("_")
        if not (bare and letters.isalpha() and letters.isupper()):
            assert stacked.ndim <= 3, f"{name} has {stacked.ndim - 1} axes: a name must spell its letters from three on"
            bare, letters = name, ("", "L", "OL")[stacked.ndim - 1]
        assert len(letters) == stacked.ndim - 1, f"{name} has {stacked.ndim - 1} axes"
        batch[f"{bare}_B{letters}"] = stacked
    return batch


@dataclasses.dataclass(frozen=True)
class Windows:
    """Row i predicts `stream[i L:(i + 1) L]`, each token from the ones before it; the last row is padded.

    The first token of the stream is predicted from `bos_id`, the first of any other row from the
    token that stands before it, so no token is lost at an edge. Padding is `eos_id` with weight 0.
    """

    stream: np.ndarray
    length: int
    bos_id: int
    eos_id: int

    def __len__(self) -> int:
        return -(-len(self.stream) // self.length)

    def __getitem__(self, i: int) -> Row:
        row, start = self.blank(), i * self.length
        targets = self.stream[start : start + self.length]
        n = len(targets)
        row["targets"][:n] = targets
        row["tokens"][0] = self.stream[start - 1] if start else self.bos_id
        row["tokens"][1:n] = targets[:-1]
        row["weights"][:n] = 1
        return row

    def blank(self) -> Row:
        """A row of padding alone."""
        return {
            "tokens": np.full(self.length, self.eos_id, np.int32),
            "targets": np.full(self.length, self.eos_id, np.int32),
            "weights": np.zeros(self.length, np.float32),
        }


class Packed:
    """Rows of whole documents, each document a segment of its own; long ones are cut into pieces of a row.

    Documents do not see each other: `segments` counts them from 1 (0: padding) and `positions` starts
    at 0 in each. A document's first token is predicted from `bos_id`; a later piece of it starts from
    the token before the cut. Which piece lies where is decided by `plan`.
    """

    def __init__(
        self, stream: np.ndarray, offsets: np.ndarray, length: int, bos_id: int, eos_id: int, place: pathlib.Path | None = None
    ):
        """`offsets` (n_docs + 1,): document d is `stream[offsets[d]:offsets[d + 1]]`. Of many documents the plan is kept in the
        folder `place`, where there is one, and made once."""
        self.stream, self.length, self.bos_id, self.eos_id = stream, length, bos_id, eos_id
        self._pieces, self._bounds = plan(offsets, length, place)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, i: int) -> Row:
        row, at = self.blank(), 0
        own = self._pieces[self._bounds[i] : self._bounds[i + 1]]
        for segment, (start, n, first) in enumerate(own.tolist(), 1):
            here = slice(at, at + n)
            row["targets"][here] = self.stream[start : start + n]
            row["tokens"][at] = self.bos_id if first else self.stream[start - 1]
            row["tokens"][at + 1 : at + n] = self.stream[start : start + n - 1]
            row["weights"][here] = 1
            row["segments"][here] = segment
            row["positions"][here] = np.arange(n)
            at += n
        return row

    def blank(self) -> Row:
        """A row of padding alone."""
        row = Windows(self.stream, self.length, self.bos_id, self.eos_id).blank()
        return row | {"segments": np.zeros(self.length, np.int32), "positions": np.zeros(self.length, np.int32)}


def plan(offsets: np.ndarray, length: int, place: pathlib.Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which pieces of documents lie in which row: row b is `pieces[bounds[b]:bounds[b + 1]]`, PIECE each.

    Groups of neighbouring documents with about PIECES pieces are packed with `best_fit_decreasing`, each by itself, so that
    memory is bounded by one group. With `place` the plan of several groups is kept in that folder and opened from there the
    next time; one that was cut off goes on behind its last whole group.
    """
    files = None if place is None else (place / "pieces.npy", place / "bounds.npy")
    if files is None or not files[1].exists():
        groups = list(_groups(offsets, length))
        if files is None or place is None or len(groups) < 2:
            return _joined([_pack(offsets[first : last + 1], length) for first, last in groups])
        with alone(place):
            place.mkdir(exist_ok=True)
            if not files[1].exists():  # another process may have made it while this one waited
                _write_plan(offsets, length, place, groups)
    return np.load(files[0], mmap_mode="r"), np.load(files[1], mmap_mode="r")


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    pieces = [np.empty(0, PIECE), *(own for own, _ in parts)]
    rows = [np.zeros(0, np.int64), *(np.diff(bounds) for _, bounds in parts)]
    return np.concatenate(pieces), np.concatenate([[0], np.cumsum(np.concatenate(rows))])


def _write_plan(offsets: np.ndarray, length: int, place: pathlib.Path, groups: list[tuple[int, int]]) -> None:
    """A file for each group, then both arrays of them all."""
    files = [place / f"{number:06d}.npz" for number in range(len(groups))]
    sizes = np.zeros((len(groups) + 1, 2), np.int64)  # pieces and rows before each group
    for number, (file, (first, last)) in enumerate(zip(files, groups, strict=True)):
        if not file.exists():
            pieces, bounds = _pack(offsets[first : last + 1], length)
            with finished(file) as unfinished, unfinished.open("wb") as out:
                np.savez(out, pieces=pieces, bounds=bounds)
        with np.load(file) as kept:
            rows = len(kept["bounds"]) - 1
            sizes[number + 1] = sizes[number] + (int(kept["bounds"][-1]), rows)
    with finished(place / "bounds.npy") as bounds_file, finished(place / "pieces.npy") as pieces_file:
        all_pieces = np.lib.format.open_memmap(pieces_file, "w+", PIECE, (int(sizes[-1, 0]),))
        all_bounds = np.lib.format.open_memmap(bounds_file, "w+", np.int64, (int(sizes[-1, 1]) + 1,))
        for file, (piece, row) in zip(files, sizes.tolist(), strict=False):
            with np.load(file) as kept:
                all_pieces[piece : piece + len(kept["pieces"])] = kept["pieces"]
                all_bounds[row : row + len(kept["bounds"])] = piece + kept["bounds"]
        all_pieces.flush()
        all_bounds.flush()
    for file in files:
        file.unlink()


def _groups(offsets: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Ranges of neighbouring documents that begin within the same PIECES pieces."""
    starts = range(0, len(offsets) - 1, PIECES)
    parts = (np.asarray(offsets[start : start + PIECES + 1], np.int64) for start in starts)
    return ranges((-(-np.diff(part) // length) for part in parts), PIECES)


def _pack(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of some documents in the order of their rows, and the bounds of the rows."""
    starts, stops, first = cut(offsets, length)
    order, bounds = best_fit_decreasing(stops - starts, length)
    pieces = np.empty(len(order), PIECE)
    pieces["start"], pieces["tokens"], pieces["first"] = starts[order], (stops - starts)[order], first[order]
    return pieces, bounds


def cut(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most `length` tokens: (starts, stops, is the first of its document)."""
    offsets = np.asarray(offsets, np.int64)
    pieces = -(-np.diff(offsets) // length)  # of each document
    document = np.repeat(np.arange(len(pieces)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its document
    starts = offsets[document] + number * length
    return starts, np.minimum(starts + length, offsets[document + 1]), number == 0


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Items into as few bins as a greedy rule finds: bin b holds the items `order[bounds[b]:bounds[b + 1]]`.

    The longest item first, each into the fullest bin that still has room (Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling", §3.2). Sizes from 1 to `capacity`; ties keep the given order.
    Where they walk a tree, one whole number has a bit for every amount of room that some bin has left.
    """
    sizes = np.asarray(sizes, np.int64)
    assert not len(sizes) or (sizes.min() > 0 and sizes.max() <= capacity), f"sizes must lie in 1..{capacity}"
    bin_of = np.empty(len(sizes), np.int64)
    roomy: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins by the room they have left
    rooms = 0  # bit r is set where roomy[r] is not empty
    bins = 0
    decreasing = np.argsort(-sizes, kind="stable")
    for item, size in zip(decreasing.tolist(), sizes[decreasing].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1  # the lowest set bit: the fullest bin that fits
            chosen = roomy[room].pop()
            if not roomy[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, bins
            bins += 1
        bin_of[item] = chosen
        left = room - size
        if left:
            if not roomy[left]:
                rooms |= 1 << left
            roomy[left].append(chosen)
    order = decreasing[np.argsort(bin_of[decreasing], kind="stable")]
    return order, np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=bins))])
