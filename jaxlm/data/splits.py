"""Splits: which part of a data set is read, where its path names several."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxlm.config import unknown

_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "dev"), "test": ("test", "testing")}


class Splits(NamedTuple):
    """The splits to look for, in order of preference. Data without splits is read whole."""

    order: tuple[str, ...]
    named: bool = False
    """The user named the split: it is an error if the data has no such split, or no splits at all."""
    exact_key: bool = False
    """`data.rows.under` names a key of this very file; otherwise one of the training file, whose split part is replaced."""

    def choose(self, there: Sequence[str]) -> str | None:
        """The name of the first split that is there, under one of its usual names or, except for training rows, with an ending
        as in validation_matched; None if there is none."""
        for split in self.order:
            for name in (split, *_NAMES.get(split, ())):
                endings = [other for other in there if other.startswith(f"{name}_")] if split != "train" else []
                for found in (name, *endings):
                    if found in there:
                        return found
        return None

    def require(self, there: Sequence[str], where: str) -> str:
        """`choose`, or ValueError with the splits that are there."""
        found = self.choose(there)
        if found is None:
            raise unknown(f"split of {where!r}:", " or ".join(self.order), there)
        return found

    def keys(self, under: str) -> list[str]:
        """The keys below which a .json file may have the rows, if `under` is the key of the training rows."""
        before, dot, last = under.rpartition(".")
        if self.exact_key or last not in _NAMES["train"]:
            return [under]
        return [before + dot + name for split in self.order for name in _NAMES.get(split, (split,))]

    def note(self, split: str) -> str | None:
        """What a person should know of the split that was read."""
        if split == self.order[0] and (self.named or self.order == TRAIN.order):
            return None
        if split in _NAMES["train"]:
            return f"split {split}, as there is no other: the model may have been trained on these rows"
        return f"split {split}"


TRAIN = Splits(("train",), exact_key=True)
HELD_OUT = Splits(("validation", "test"))
UNSEEN = Splits((*HELD_OUT.order, *TRAIN.order))
"""Rows to evaluate on or to predict for: training rows only if there are no others, and then a note says so."""


def named_split(name: str) -> Splits:
    """The split that a user named: any name, or a slice as `datasets` and `tfds` read it (test[:10%])."""
    return Splits((name,), named=True)


def is_slice(name: str) -> bool:
    return re.search(r"[\[+]", name) is not None
