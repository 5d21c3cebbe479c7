"""Run a request's guide in a thread of its own, so that a slow or failing guide affects its own request only."""

import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.generate.deep_stack import start_deep
from jaxlm.generate.request import Guide


class GuideWorker:
    """Advances one guide, one set of tokens at a time; `done` once the result of the last `advance` is there.

    Every method but the guide's own calls runs in the engine's thread.
    """

    def __init__(self, guide: Guide, vocab_size: int, wake: Callable[[], None]):
        """`wake` is called in the worker's thread whenever a result is there."""
        self._guide, self._vocab_size, self._wake = guide, vocab_size, wake
        self._todo: queue.SimpleQueue[Sequence[int] | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._failure: BaseException | None = None
        self._mask: np.ndarray | None = None
        self._since = 0.0
        start_deep(self._work, "guide")
        self.advance(())

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def seconds(self) -> float:
        """How long the guide has been working on the last `advance`."""
        return 0.0 if self.done else time.monotonic() - self._since

    def advance(self, tokens: Sequence[int]) -> None:
        """Hand the guide the next tokens of its text; the result is which may follow."""
        self._done.clear()
        self._since = time.monotonic()
        self._todo.put(tokens)

    def result(self) -> np.ndarray | None:
        """(vocab_size,) True for each token that may follow; None: nothing may follow, the text is complete.

        Raises what the guide raised, and ValueError if it allows no token.
        """
        assert self.done, "wait until it is done"
        if self._failure is not None:
            raise self._failure
        return self._mask

    def close(self) -> None:
        """End the thread once the guide returns."""
        self._todo.put(None)

    def _work(self) -> None:
        while (tokens := self._todo.get()) is not None:
            try:
                self._mask = self._next(tokens)
            except BaseException as error:  # a panic of a library in Rust is no Exception
                self._failure = error
            self._done.set()
            self._wake()

    def _next(self, tokens: Sequence[int]) -> np.ndarray | None:
        for token in tokens:
            self._guide.take(token)
        if self._guide.ended:
            return None
        mask_V = np.asarray(self._guide.mask()).astype(bool)
        if mask_V.ndim != 1 or len(mask_V) > self._vocab_size:
            raise TypeError(f"the guide's mask has shape {mask_V.shape}: it must be ({self._vocab_size},)")
        if not mask_V.any():
            raise ValueError("the guide allows no token")
        return np.pad(mask_V, (0, self._vocab_size - len(mask_V)))
