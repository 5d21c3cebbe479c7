"""Hugging Face tensors ↔ our parameters: one table of patterns, read in both directions.

A pattern names the axes of the Hugging Face tensor by the letters of our leaf (`jaxlm/model/transformer.py`
has the alphabet); letters in brackets are merged into one axis, the first one outermost:

    "h.{x}.mlp.c_fc.weight": {"layers/mlp/up/kernel": "D F"}
    "layers.{x}.self_attn.q_proj.weight": {"layers/attention/query/kernel": "(N H) D"}

`{x}` and `{e}` in a name spread the axes X (layers) and E (experts) of our leaf over several tensors; a `1` is an
axis of length one. Several of our leaves may share a tensor, one behind the other along the axis that a `*` marks,
which is counted before merging: "(*N H) D" stands whole before the next part (Phi-3), "(N *H) D" takes turns with
it in every head (GPT-NeoX).
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Slices of every axis, with start and stop and a step of one.
Index = tuple[slice, ...]
# (name, slices) → that part of a Hugging Face tensor.
Reader = Callable[[str, Index], np.ndarray]
# (path, slices) → that part of one of our leaves.
Getter = Callable[[str, Index], np.ndarray]

SPREAD = {"x": "X", "e": "E"}
# Elements that are copied at a time where two arrays lie differently: a square of 256 × 256.
TILE = 1 << 16


@dataclasses.dataclass(frozen=True)
class Table:
    """How a family names and lays out its tensors.

    `tensors` maps each full name to its parts: path of ours → pattern. It may name more than a model has
    (biases, an untied head): what the model lacks is left out. Names are accepted without `prefix` too, as
    checkpoints of a base model have them. `ignored` are regexes of tensors that need no place (buffers);
    `renames` are (regex, replacement) for names as older files have them. Both see names as they stand in the file.
    """

    tensors: Mapping[str, Mapping[str, str]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Full name of a tensor that some files hold beside the one that it is tied to → full name of that one; a head tied to
    the embeddings needs no entry."""
    write_copies: bool = False
    absent: tuple[str, ...] = ()
    """Regexes of full names that no file has although our leaf has a place for them: it is filled with ones there."""

    def lacks(self, name: str) -> bool:
        """Whether files do without this tensor."""
        return any(re.search(pattern, name) for pattern in self.absent)


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our leaves inside a Hugging Face tensor."""

    path: str
    axes: str
    """Letters of the leaf, in its order."""
    shape: tuple[int, ...]
    """Shape of the leaf."""
    groups: tuple[tuple[str, ...], ...]
    """For each axis of the tensor, the letters merged into it."""
    sizes: Mapping[str, int]
    """Length of each of those letters in the tensor: along the shared one, of all parts together."""
    shared: str
    """The letter along which the tensor's parts stand one behind the other, or nothing."""
    start: int
    """Where this part begins along it."""

    @functools.cached_property
    def letters(self) -> list[str]:
        """The tensor's own letters in its order, `1` left out."""
        return [letter for group in self.groups for letter in group if letter != "1"]

    @functools.cached_property
    def order(self) -> list[int]:
        """The transposition from the tensor's letters to the leaf's, without those that are spread over names."""
        return [self.letters.index(letter) for letter in self.axes if letter in self.letters]

    def place(self, letter: str, span: slice) -> slice:
        """The leaf's span of a letter, counted in the tensor."""
        return slice(span.start + self.start, span.stop + self.start) if letter == self.shared else span

    def read(self, name: str, index: Index, read: Reader) -> np.ndarray:
        """The leaf at `index` (one element long where axes are spread over names), from the tensor `name`."""
        spans = {letter: self.place(letter, span) for letter, span in zip(self.axes, index, strict=True)} | {"1": slice(0, 1)}
        covers, picks = [], []
        for group in self.groups:
            flat = np.zeros((1,), np.int64)
            for letter in group:
                inner = np.arange(spans[letter].start, spans[letter].stop)
                flat = (flat[:, None] * self.sizes[letter] + inner).reshape(-1)
            covers.append(slice(int(flat[0]), int(flat[-1]) + 1))
            picks.append(flat - flat[0])
        block = read(name, tuple(covers))
        for axis, pick in enumerate(picks):
            if pick.size < block.shape[axis]:  # a span of an inner letter is not one run of the merged axis
                block = np.take(block, pick, axis)
        block = block.reshape([_length(spans[letter]) for letter in self.letters]).transpose(self.order)
        return block.reshape([_length(span) for span in index])

    def write(self, out: np.ndarray, index: Index, get: Getter) -> None:
        """Put the leaf at `index` in its place of `out`, the tensor with all letters apart."""
        leaf = get(self.path, index)
        spans = {letter: self.place(letter, span) for letter, span in zip(self.axes, index, strict=True)}
        target = out[tuple(spans[letter] for letter in self.letters)]
        copy(target.transpose(self.order), leaf.reshape([target.shape[axis] for axis in self.order]))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a table, fitted to a model: a Hugging Face tensor, or one a layer (and expert)."""

    name: str
    parts: tuple[Part, ...]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        part = self.parts[0]
        return tuple(math.prod(part.sizes[letter] for letter in group) for group in part.groups)

    @functools.cached_property
    def spread(self) -> dict[str, int]:
        """Letter → length of the axes that are spread over names."""
        part = self.parts[0]
        lengths = dict(zip(part.axes, part.shape, strict=True))
        return {letter: lengths[letter] for key, letter in SPREAD.items() if f"{{{key}}}" in self.name}

    def names(self, spans: Mapping[str, slice] | None = None) -> Iterator[tuple[str, dict[str, int]]]:
        """Every name with its place on the spread axes, within `spans` of them."""
        ranges = [range(*(spans or {}).get(letter, slice(0, size)).indices(size)) for letter, size in self.spread.items()]
        for place in itertools.product(*ranges):
            at = dict(zip(self.spread, place, strict=True))
            yield self.name.format(**{key: at[letter] for key, letter in SPREAD.items() if letter in at}), at

    def write(self, at: Mapping[str, int], get: Getter, dtype: Any) -> np.ndarray:
        """The tensor at a place on the spread axes, from our leaves."""
        first = self.parts[0]
        out = np.empty([first.sizes[letter] for letter in first.letters], dtype)
        for part in self.parts:
            part.write(out, tuple(_at(at, letter, size) for letter, size in zip(part.axes, part.shape, strict=True)), get)
        return out.reshape(self.shape)


def resolve(table: Table, shapes: Mapping[str, Sequence[int]], axes: Mapping[str, Any]) -> list[Tensor]:
    """Fit a table to a model: path → shape and path → letters (`letters_of` says which forms those may have).

    Raises ValueError for parameters that the table has no place for.
    """
    tensors = []
    for name, parts in table.tensors.items():
        known = {path: pattern for path, pattern in parts.items() if path in shapes}
        if known:
            assert len(known) == len(parts), f"{name}: the model has only {sorted(known)} of {sorted(parts)}"
            tensors.append(_fit(name, known, shapes, axes))
    placed = [part.path for tensor in tensors for part in tensor.parts]
    assert len(set(placed)) == len(placed), f"table: a leaf has two places: {sorted(p for p in placed if placed.count(p) > 1)}"
    if left := sorted(set(shapes) - set(placed)):
        raise ValueError(f"the Hugging Face layout has no place for these parameters of the model: {', '.join(left)}")
    return tensors


def _fit(name: str, patterns: Mapping[str, str], shapes: Mapping[str, Sequence[int]], axes: Mapping[str, Any]) -> Tensor:
    spread = "".join(letter for key, letter in SPREAD.items() if f"{{{key}}}" in name)
    parts: list[Part] = []
    start = 0
    for path, pattern in patterns.items():
        groups = tuple(tuple((merged or single).split()) for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", pattern))
        shared = "".join(letter[1] for group in groups for letter in group if letter[0] == "*")
        groups = tuple(tuple(letter.lstrip("*") for letter in group) for group in groups)
        own = spread + "".join(letter for group in groups for letter in group if letter != "1")
        letters = letters_of(axes[path], own)
        assert sorted(own) == sorted(letters) and len(set(own)) == len(own), f"{name}: {pattern!r} does not match {path} {letters}"
        assert len(shared) == (len(patterns) > 1), f"{name}: a star marks the axis that parts share, and only that"
        sizes = dict(zip(letters, map(int, shapes[path]), strict=True)) | {"1": 1}
        parts.append(Part(path, letters, tuple(map(int, shapes[path])), groups, sizes, shared, start))
        start += sizes[shared] if shared else 0
    fitted = [dataclasses.replace(part, sizes={**part.sizes, **({part.shared: start} if part.shared else {})}) for part in parts]
    tensor = Tensor(name, tuple(fitted))
    for part in fitted:
        apart = [[part.sizes[letter] for letter in group] for group in part.groups]
        assert apart == [[fitted[0].sizes[letter] for letter in group] for group in fitted[0].groups], (
            f"{name}: the parts differ beside the axis that they share"
        )
        assert [part.shape[part.axes.index(letter)] for letter in spread] == list(tensor.spread.values()), f"{name}: unequal stacks"
    return tensor


def letters_of(axes: Any, known: str) -> str:
    """A leaf's letters from its logical axes: a string, or a sequence as `Model.axes` has (X may be called "layers").

    One axis may be None (not split over devices): it is the one of the `known` letters that is not named.
    """
    names = ["X" if name == "layers" else name for name in axes]
    left = [letter for letter in known if letter not in names]
    assert names.count(None) <= 1, f"axes {axes}: which of {left} is which? Only one letter may be left out"
    return "".join(left[0] if name is None and left else str(name) for name in names)


def blocks(tensor: Tensor, part: Part, index: Index, read: Reader) -> Iterator[tuple[Index, np.ndarray]]:
    """The leaf at `index`, a block for each Hugging Face tensor: where it lies in the leaf, and its values."""
    spans = dict(zip(part.axes, index, strict=True))
    for name, at in tensor.names(spans):
        where = tuple(slice(at[letter], at[letter] + 1) if letter in at else spans[letter] for letter in part.axes)
        yield where, part.read(name, where, read)


def paste(out: np.ndarray, index: Index, block: np.ndarray, where: Index) -> None:
    """Copy what a block at `where` of a leaf has in common with `out`, which stands for the leaf at `index`."""
    common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(index, where, strict=True)]
    if all(span.start < span.stop for span in common):
        copy(out[_within(common, index)], block[_within(common, where)])


def copy(out: np.ndarray, values: np.ndarray) -> None:
    """out[...] = values, in tiles: row by row NumPy fetches a cache line for each element of a transposed array,
    which takes five times as long."""
    if out.size <= TILE or (values.flags.c_contiguous and out.flags.c_contiguous):
        out[...] = values
        return
    axis = int(np.argmax(out.shape))
    before, half = (slice(None),) * axis, out.shape[axis] // 2
    copy(out[(*before, slice(half))], values[(*before, slice(half))])
    copy(out[(*before, slice(half, None))], values[(*before, slice(half, None))])


def whole(index: Sequence[slice], shape: Sequence[int]) -> Index:
    """Slices with start and stop, as JAX's shardings leave them out."""
    spans = tuple(slice(*span.indices(size)) for span, size in zip(index, shape, strict=True))
    assert all(span.step == 1 for span in spans), f"slices with a step: {index}"
    return spans


def flatten(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested dicts → path → leaf, as in `layers/mlp/up/kernel`."""
    flat: dict[str, Any] = {}
    for name, below in tree.items():
        flat |= flatten(below, f"{above}{name}/") if isinstance(below, Mapping) else {above + name: below}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        here = tree
        for name in parents:
            here = here.setdefault(name, {})
        here[last] = leaf
    return tree


def _at(at: Mapping[str, int], letter: str, size: int) -> slice:
    return slice(at[letter], at[letter] + 1) if letter in at else slice(0, size)


def _length(span: slice) -> int:
    return span.stop - span.start


def _within(spans: Sequence[slice], outer: Index) -> Index:
    return tuple(slice(span.start - frame.start, span.stop - frame.start) for span, frame in zip(spans, outer, strict=True))
