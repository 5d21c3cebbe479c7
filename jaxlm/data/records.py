"""What the readers of labelled rows have in common: a record of a file, a bad one, the options for reading it."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.data.splits import TRAIN, Splits
from jaxlm.text_files import undecodable


class Bad(str):
    """Why a row cannot be used, to be read after its place: "has 1 cell, not 2", "label is empty"."""


Record = tuple[str, Mapping[str, Any] | Bad]
Choose = Callable[[Sequence[str], str], list[str]]
"""(columns of a file, file name) → columns to read. Raises ValueError for a missing required column."""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """Options for reading the files of one table."""

    header: Sequence[str] = ()
    """Names of the columns of a table without a line of names, or of rows that are lists."""
    separator: str | None = None
    """What separates cells; None: a TAB, in .csv what its first line suggests."""
    encoding: str | None = None
    """Text encoding; None: see `text_files`."""
    under: str | None = None
    """Key of a .json file below which the rows are; `a.b` for a key in a key."""
    splits: Splits = TRAIN
    """Which split is read, where the data has several."""
    all_columns: bool = False
    """Records hold all columns, not only those that are wanted."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Notes for the user on what readers inferred from the files; readers append to it."""
    chosen: list[str] = dataclasses.field(default_factory=list)
    """Names of the splits that were read; readers append to it."""

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def take(self, split: str) -> str:
        """The split, noted as the one that is read."""
        if note := self.splits.note(split):
            self.note(note)
        self.chosen.append(split)
        return split

    def columns(self, choose: Choose, names: Sequence[str], where: str) -> list[str]:
        """The columns that records hold. Raises ValueError where one that must be there is not."""
        wanted = choose(names, where)
        return list(names) if self.all_columns else wanted

    def undecodable(self, text: str) -> Bad | None:
        why = undecodable(text, self.encoding)
        return Bad(why) if why else None


def not_as_wide(cells: Sequence[str], width: int) -> Bad | None:
    return None if len(cells) == width else Bad(f"has {len(cells)} cell{'s' * (len(cells) != 1)}, not {width}")


def chosen(choose: Choose, names: Sequence[str], file: pathlib.Path) -> list[str] | None:
    """The columns that are wanted of these, or None where one is missing."""
    try:
        return choose(names, str(file))
    except ValueError:
        return None
