"""The settings for writing text that a Hugging Face folder holds."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxlm.hub.convert import is_hugging_face, read_json

GENERATION = "generation_config.json"


def read_generation(folder: pathlib.Path) -> dict[str, Any]:
    """`generation_config.json` of a folder without its nulls. ValueError for a file that is no JSON object.

    Without one the whole `config.json`, which holds such settings in older folders, as transformers reads them; {} without either.
    """
    if (folder / GENERATION).is_file():
        values = _read(folder / GENERATION)
    elif is_hugging_face(folder):  # completed with the family's defaults, which may leave out what the class no longer knows
        values = {**read_json(folder), **_read(folder / "config.json")}
    else:
        values = {}
    return {name: value for name, value in values.items() if value is not None}


def _read(file: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {str(values)[:60]!r}: expected an object")
    return values


def write_generation(folder: pathlib.Path, values: Mapping[str, Any]) -> None:
    (folder / GENERATION).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
