"""Direction of every score: whether a lower or a higher value is better.

Whoever computes a score declares it beside the code that computes it, so that a new score cannot be compared by accident
in the wrong direction: the best checkpoint by an undeclared name is an error.
"""

from collections.abc import Iterable

from jaxlm.config import unknown

_LOWER: dict[str, bool] = {}


def declare(*, higher: Iterable[str] = (), lower: Iterable[str] = ()) -> None:
    """Declare scores by the direction in which they are better. A name has one direction wherever it is computed."""
    for names, is_lower in ((higher, False), (lower, True)):
        for name in names:
            assert _LOWER.setdefault(name, is_lower) == is_lower, f"{name} is declared with both directions"


def lower_is_better(name: str) -> bool:
    """Whether a lower value of the score `name` is better. Raises ValueError for a score that nothing declares."""
    if name not in _LOWER:
        raise unknown("metric", name, sorted(_LOWER))
    return _LOWER[name]
