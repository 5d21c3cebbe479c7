"""Examples of a task → batches: rows of different length, padded as little as few shapes allow.

An example is a dict of arrays: a scalar, (L,) numbers of its tokens, (O, L) of its options, or a nested dict; a key with
an upper-case suffix (`labels_C`) names axes that are the same for all. `collate` makes a batch of some: B rows first in
every array, padded with zeros (`tokens` with the pad id) to one length L.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxlm.data.packing import stack
from jaxlm.data.pipeline import rows_of

Example = dict[str, Any]
Batch = dict[str, Any]
RUN = 50  # batches whose examples are sorted by length together


def bucket(length: int) -> int:
    """The padded length: a multiple of 16, from 64 on of a quarter of the power of two below. Few sizes, few
    compilations, and beyond 48 tokens less than a fourth of a row is padding."""
    step = max(16, 1 << (length - 1).bit_length() >> 3)
    return -(-length // step) * step


def length_of(example: Example) -> int:
    """Tokens of an example, over all that is nested in it."""
    lengths = {name: length_of(x) if isinstance(x, dict) else np.shape(x)[-1:] for name, x in example.items()}
    return sum(n if isinstance(n, int) else n[0] for name, n in lengths.items() if name == "tokens" or isinstance(n, int))


def longest_of(example: Example) -> int:
    """The longest row of tokens in an example, over all that is nested in it."""
    sizes = [longest_of(x) if isinstance(x, dict) else np.shape(x)[-1] for name, x in example.items() if _varies(name, x)]
    return max(sizes, default=0)


def _varies(name: str, value: Any) -> bool:
    """The last axis has another size in other examples."""
    return isinstance(value, dict) or (np.ndim(value) > 0 and not name.rpartition("_")[2].isupper())


def collate(examples: Sequence[Example], rows: int, pad_id: int, longest: int | None = None) -> Batch:
    """A batch of `rows` rows: the examples, then rows of padding alone (all zeros, so of weight 0).

    No row is padded beyond `longest`: a table of learned positions ends somewhere.
    """
    assert 0 < len(examples) <= rows, f"{len(examples)} examples for {rows} rows"
    made = _even(list(examples), pad_id, longest)
    return stack(made + [_blank(made[0], pad_id)] * (rows - len(made)))


def _even(examples: list[Example], pad_id: int, longest: int | None) -> list[Example]:
    """The examples with all arrays of one name as large as the largest, the length rounded up."""
    made: list[Example] = [{} for _ in examples]
    for name, first in examples[0].items():
        values = [example[name] for example in examples]
        if isinstance(first, dict):
            values = _even(values, pad_id, longest)
        elif _varies(name, first):
            shape = np.max([np.shape(value) for value in values], axis=0)
            padded = bucket(int(shape[-1]))
            shape[-1] = padded if longest is None else max(int(shape[-1]), min(padded, longest))
            values = [_padded(np.asarray(value), shape, pad_id if name == "tokens" else 0) for value in values]
        for example, value in zip(made, values, strict=True):
            example[name] = value
    return made


def _padded(array: np.ndarray, shape: Sequence[int], fill: int) -> np.ndarray:
    return np.pad(array, [(0, int(to) - have) for have, to in zip(array.shape, shape, strict=True)], constant_values=fill)


def _blank(example: Example, pad_id: int) -> Example:
    def blank(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: blank(inner, x) for inner, x in value.items()}
        return np.full_like(value, pad_id if name == "tokens" else 0)

    return {name: blank(name, value) for name, value in example.items()}


class ExampleBatches:
    """Shuffled batches, addressed by number: the i-th is a pure function of (examples, seed, i).

    With `grouped`, examples of similar length share a batch: the shuffled examples are cut into runs of `RUN` batches,
    each run is sorted by length, longest first, cut into batches, and the batches are shuffled. The last batch of an
    epoch may be short; it is filled with rows of weight 0. No batch is longer than the longest of all examples.
    """

    def __init__(
        self, examples: Sequence[Example], batch_size: int, *, seed: int, epochs: float | None, pad_id: int, grouped: bool = True,
        process_index: int | None = None, process_count: int | None = None,
    ):  # fmt: skip
        self.examples, self.batch_size, self.seed, self.pad_id, self.grouped = examples, batch_size, seed, pad_id, grouped
        self.mine = rows_of(batch_size, process_index, process_count)
        self.per_epoch = -(-len(examples) // batch_size)
        self.total = None if epochs is None else max(1, round(epochs * self.per_epoch))
        self.lengths = np.array([length_of(example) for example in examples])
        self.longest = max(map(longest_of, examples))
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.examples))
        if not self.grouped:
            return np.split(order, range(self.batch_size, len(order), self.batch_size))
        runs = np.split(order, range(RUN * self.batch_size, len(order), RUN * self.batch_size))
        order = np.concatenate([run[np.argsort(-self.lengths[run], kind="stable")] for run in runs])
        batches = np.split(order, range(self.batch_size, len(order), self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]

    def batch(self, i: int) -> Batch:
        """This process's rows of the i-th global batch."""
        chosen = [self.examples[n] for n in self._order(i // self.per_epoch)[i % self.per_epoch]]
        batch = collate(chosen, self.batch_size, self.pad_id, self.longest)
        return batch if len(self.mine) == self.batch_size else _rows(batch, self.mine)

    def iterate(self, start: dict[str, Any] | None = None) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """(batch, state of what comes after it) from a state on, the first batch if None; ends with the epochs."""
        for i in itertools.count(start["batch"] if start else 0):
            if self.total is not None and i >= self.total:
                return
            yield self.batch(i), {"batch": i + 1}


def _rows(batch: Batch, mine: range) -> Batch:
    return {name: _rows(x, mine) if isinstance(x, dict) else x[mine.start : mine.stop] for name, x in batch.items()}


def in_order(
    examples: Sequence[Example], batch_size: int, pad_id: int, longest: int | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(numbers of the examples, batch) that cover every example once, those of similar length together; see `collate`."""
    order = np.argsort([length_of(example) for example in examples], kind="stable")[::-1]
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        yield chosen, collate([examples[n] for n in chosen], batch_size, pad_id, longest)
