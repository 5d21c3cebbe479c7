"""The words behind a verb: what it works on, then flags."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxlm import config as configs

if TYPE_CHECKING:
    from jaxlm.data import RowsConfig

ROWS = "data.rows."


def with_row_flags(flags: Mapping[str, configs.Text]) -> dict[str, configs.Text]:
    """The flags with `--header` and `--columns text=sentence,label=class` spelt as in training: `--data.rows.…`.

    Raises ValueError for `--columns` without ROLE=COLUMN.
    """
    spelt: dict[str, configs.Text] = {}
    for name, value in flags.items():
        if name == "header":
            spelt[f"{ROWS}header"] = value
        elif name == "columns":
            for pair in value.split(","):
                role, equals, column = pair.partition("=")
                if not equals or not column.strip():
                    raise ValueError(f"columns {str(value)!r} must name roles and their columns, as in text=sentence,label=class")
                spelt[f"{ROWS}columns.{role.strip()}"] = configs.Text(column.strip())
        else:
            spelt[name] = value
    return spelt


def split_row_flags(flags: Mapping[str, configs.Text]) -> tuple[dict[str, configs.Text], dict[str, configs.Text]]:
    """(other flags, those that say how rows are read)."""
    spelt = with_row_flags(flags)
    return (
        {name: value for name, value in spelt.items() if not name.startswith(ROWS)},
        {name: value for name, value in spelt.items() if name.startswith(ROWS)},
    )


def rows_config(base: "RowsConfig", flags: Mapping[str, configs.Text]) -> "RowsConfig":
    """How rows are read: as a run reads them, changed by the flags of `split_row_flags`."""
    from jaxlm.data import DataConfig

    data = DataConfig(rows=base)
    tree, origins = {"data": configs.to_dict(data)}, dict[str, str]()
    configs.override(tree, origins, flags)
    root = dataclasses.make_dataclass("Flags", [("data", DataConfig)], frozen=True)
    return configs.build(root, tree, origins).data.rows


def check_out(file: pathlib.Path) -> None:
    """ValueError where a file cannot be written, before the work whose results it is for."""
    if file.is_dir():
        raise ValueError(f"out {str(file)!r} is a folder: name a file in it")
    if not file.parent.is_dir():
        raise ValueError(f"out {str(file)!r}: there is no folder {str(file.parent)!r}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"out {str(file)!r} may not be written")


def split_words(words: Sequence[str], *whats: str, default: str | None = None) -> tuple[list[str], dict[str, configs.Text]]:
    """The positional words, one for each of `whats`, and the flags behind them; the only one may have a default."""
    given = list(itertools.takewhile(lambda word: not word.startswith("--"), words))[: len(whats)]
    if not given and default is not None:
        given = [default]
        return given, configs.parse_flags(words)
    if len(given) < len(whats):
        raise ValueError(f"{whats[len(given)]} is missing: give {' and '.join(whats)} first")
    return given, configs.parse_flags(words[len(given) :])
