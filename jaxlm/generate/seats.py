"""The slots of an engine as its host knows them: whose text each holds, and what of a prompt another may go on from."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from jaxlm.generate.guiding import GuideWorker
from jaxlm.generate.request import Event, Request, Tell, Token

_log = logging.getLogger(__name__)


class Ticket:
    """A request that was taken: it has exactly one event that says `ended`, the last one."""

    def __init__(self, request: Request, tell: Tell):
        self.request, self.cancelled, self._tell = request, False, tell
        self.over = False
        self.failure: BaseException | None = None
        """What its own listener raised: the request is to be ended with an error."""

    def tell(self, event: Event) -> None:
        """Hand an event to the listener, unless the last one was; a listener that raises disturbs no other request."""
        if self.over or (self.failure is not None and event.ended is None):
            return
        if self.failure is not None:
            event = Event(ended="error", reason=line(self.failure))
        self.over = event.ended is not None
        try:
            self._tell(event)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            _log.exception("a listener failed")
            self.failure = error

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        self.tell(Event(ended="error", reason=line(error)))


def line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclasses.dataclass(eq=False)
class Seat:
    """A slot as the host knows it."""

    ticket: Ticket | None = None
    todo: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """Pieces of the prompt that are still to be read."""
    held: tuple[int, ...] = ()
    """Whole pieces of a prompt whose keys and values it holds."""
    salt: str = ""
    """`Request.cache_salt` of that prompt."""
    used: int = 0
    """When it was last taken."""
    scores: list[Token] = dataclasses.field(default_factory=list)
    """Of the prompt's tokens, until all of them are there."""
    guide: GuideWorker | None = None
    mask_V: np.ndarray | None = None
    """The tokens that the guide allows next; None: it is still at work, and the text waits."""
    allowed_V: np.ndarray | None = None
    """`Request.allowed`, which holds beside what the guide allows."""
    held_back: list[Token] = dataclasses.field(default_factory=list)
    """New tokens that the guide has not taken yet."""

    @property
    def running(self) -> bool:
        return self.ticket is not None and not self.todo

    @property
    def ready(self) -> bool:
        """Nothing has to be waited for before its next token."""
        return self.guide is None or self.mask_V is not None

    def free(self) -> None:
        """Forget its request; what the slot's cache holds stays there for others."""
        if self.guide is not None:
            self.guide.close()
        self.ticket, self.todo, self.scores, self.guide, self.mask_V, self.held_back = None, [], [], None, None, []
        self.allowed_V = None


def choose(seats: Sequence[Seat], prompt: tuple[int, ...], chunk: int, salt: str = "") -> tuple[int, int, int]:
    """For a prompt: a free slot, the slot that holds most of its beginning, and how many tokens that is.

    Where no free one holds as many, it is the one that was longest not used, for what is held to be copied to. Whole pieces
    alone are reused, so that what is computed behind them is the same without, and never the prompt's last token. Slots whose
    cache was computed under another `salt` are not reused.
    """

    def common(seat: Seat) -> int:
        if seat.salt != salt or not prompt:
            return 0
        most = min(len(seat.held), len(prompt) - 1) // chunk * chunk
        ends = range(chunk, most + 1, chunk)
        return next((end - chunk for end in ends if seat.held[end - chunk : end] != prompt[end - chunk : end]), most)

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
