"""The words behind a verb: what it works on, then flags."""

import itertools
from collections.abc import Sequence

from jaxlm import config as configs


def split_words(words: Sequence[str], *whats: str, default: str | None = None) -> tuple[list[str], dict[str, configs.Text]]:
    """The positional words, one for each of `whats`, and the flags behind them; the only one may have a default."""
    given = list(itertools.takewhile(lambda word: not word.startswith("--"), words))[: len(whats)]
    if not given and default is not None:
        given = [default]
        return given, configs.parse_flags(words)
    if len(given) < len(whats):
        raise ValueError(f"{whats[len(given)]} is missing: give {' and '.join(whats)} first")
    return given, configs.parse_flags(words[len(given) :])
