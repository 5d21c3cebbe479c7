"""Tokens as they come → text that is safe to show, which ends before a stop string."""

from collections.abc import Sequence

from jaxlm.data import StreamDecoder, Tokenizer


class TextStream:
    """The text of one answer, piece by piece.

    What is held back: bytes that are not yet a character, and text that may be the beginning of a stop string. The pieces
    joined are the text by which the tokens continue `prompt`, up to the stop string that is complete first (of two that are
    complete with the same character, the one that began first). With `trim` white space at the beginning is left out.
    """

    stopped: str | None = None
    """The stop string that ended the text; it is not part of it, and nothing comes after it."""
    seen: int = 0
    """Characters of the text so far, those held back too."""
    shown: int = 0
    """Characters that were given out."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, trim: bool = False, prompt: Sequence[int] = (),
        keep_stop: bool = False,
    ):  # fmt: skip
        """`prompt` is the ids that the text continues. With `keep_stop` the text ends behind its stop string, not before it.
        Raises ValueError for a stop string that is empty."""
        if "" in stop:
            raise ValueError("a stop string is empty: give at least one character")
        self._decoder, self._stop, self._trim = StreamDecoder(tokenizer, prompt), tuple(stop), trim
        self._held, self._keep_stop = "", keep_stop

    def push(self, token: int, *, watch: bool = True) -> str:
        """The text that this token makes safe to show, often empty. Stop strings that it completes end the text if `watch`."""
        return "" if self.stopped is not None else self._take(self._decoder.push(token), watch)

    def flush(self) -> str:
        """The text still held back, at the end of the tokens."""
        if self.stopped is not None:
            return ""
        text = self._take(self._decoder.flush())
        rest, self._held = self._held, ""
        self.shown += len(rest)
        return text + rest

    def _take(self, text: str, watch: bool = True) -> str:
        if self._trim:
            text = text.lstrip()
            self._trim = not text
        self.seen += len(text)
        before, text = len(self._held), self._held + text
        places = ((text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in (self._stop if watch else ()))
        found = [(at + len(stop), at, stop) for at, stop in places if at >= 0]  # completed by what is new
        if found:
            behind, end, self.stopped = min(found)
            end = behind if self._keep_stop else end
            self._held = ""
        else:
            end = len(text) - self._beginning(text)
            self._held = text[end:]
        self.shown += end
        return text[:end]

    def _beginning(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
