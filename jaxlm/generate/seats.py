"""The slots of an engine as its host knows them: whose text each holds, and what of a prompt another may go on from."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence

import numpy as np

from jaxlm.generate.request import Event, Request, Tell, Token

_log = logging.getLogger(__name__)


class Ticket:
    """A request that was taken."""

    def __init__(self, request: Request, tell: Tell):
        self.request, self.cancelled, self._tell = request, False, tell
        self.over = False

    def tell(self, event: Event) -> None:
        """A listener that fails is a fault of its own and stops nobody else."""
        self.over = event.ended is not None
        try:
            self._tell(event)
        except Exception:
            _log.exception("a listener failed")
            self.cancelled = True


@dataclasses.dataclass(eq=False)
class Seat:
    """A slot as the host knows it."""

    ticket: Ticket | None = None
    todo: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """Pieces of the prompt that are still to be read."""
    held: tuple[int, ...] = ()
    """Whole pieces of a prompt whose keys and values it holds."""
    used: int = 0
    """When it was last taken."""
    scores: list[Token] = dataclasses.field(default_factory=list)
    """Of the prompt's tokens, until all of them are there."""

    @property
    def running(self) -> bool:
        return self.ticket is not None and not self.todo


def choose(seats: Sequence[Seat], prompt: Sequence[int], chunk: int) -> tuple[int, int, int]:
    """For a prompt: a free slot, the slot that holds most of its beginning, and how many tokens that is.

    Where no free one holds as many, it is the one that was longest not used, for what is held to be copied to. Whole pieces
    alone are reused, so that what is computed behind them is the same without, and never the prompt's last token.
    """

    def common(seat: Seat) -> int:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(seat.held, prompt[:-1], strict=False))
        return sum(1 for _ in same) // chunk * chunk

    lengths = [common(seat) for seat in seats]
    most = max(lengths)
    free = [b for b, seat in enumerate(seats) if seat.ticket is None]
    target = max(free, key=lambda b: (lengths[b], -seats[b].used))
    return target, target if lengths[target] == most else lengths.index(most), most


def rows(seats: Sequence[Seat], size: int) -> np.ndarray | None:
    """`size` slots with all running texts among them; None: all slots."""
    if size == len(seats):
        return None
    return np.array(sorted(range(len(seats)), key=lambda b: not seats[b].running)[:size], np.int32)
