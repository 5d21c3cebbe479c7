"""The texts of one HTTP request while they are written: events from the engine's thread → pieces in the event loop."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from jaxlm.data import Tokenizer
from jaxlm.generate.request import Event, Full, Token
from jaxlm.generate.text import TextStream
from jaxlm.serve.asks import Ask
from jaxlm.serve.errors import ApiError, busy, unavailable
from jaxlm.serve.fields import bad
from jaxlm.serve.metrics import Metrics


class Placed(NamedTuple):
    """A token and the character of its text where it begins."""

    token: Token
    at: int
    end: int
    begins: bool = False
    """No text precedes it: some decoders drop its leading space."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What there is more of one text."""

    index: int
    text: str = ""
    tokens: tuple[Placed, ...] = ()
    """Tokens whose text is shown now or was before."""
    finish: str | None = None
    """stop or length, with the last piece of a text."""
    stop_reason: str | int | None = None
    """The stop string, or the id of the client's stop token, that ended the text."""
    ids: tuple[int, ...] = ()
    """All tokens that came, with the one that ended the text."""
    prompt: tuple[Token, ...] = ()
    """The prompt's tokens with their scores, where they are asked for."""


class Choices:
    """Hands an ask's requests to the engine and gives out what becomes of them.

    Use: `texts = texts_of(…)` in a thread, which has the engine check the requests, `choices = Choices(…)` in the event loop
    (ApiError where the engine takes none of it),
    then `async for piece in choices.pieces()`, and `close()` in any case: it frees the slots of texts that nobody reads any more.
    """

    def __init__(self, engine: Any, texts: "Sequence[_Text]", ask: Ask, metrics: Metrics, timeout: float):
        self._engine, self._ask, self._metrics = engine, ask, metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._began = time.monotonic()
        self._texts = texts
        self._tickets: dict[int, Any] = {}
        """Of the texts that are not ended."""
        if not engine.stats().alive:
            raise unavailable("the engine has ended: the server must be started again")
        try:
            for i, request in enumerate(ask.requests):
                self._tickets[i] = engine.submit(request, self._teller(i), checked=True)
        except BaseException as error:
            self.close()
            if isinstance(error, Full):
                raise busy("the server is busy: its queue is full, try again in a moment") from None
            raise
        self._timer = self._loop.call_later(timeout, self._events.put_nowait, None)

    @property
    def new_tokens(self) -> int:
        """Tokens that the model wrote so far."""
        return sum(text.new for text in self._texts)

    def _teller(self, index: int) -> Any:
        def tell(event: Event) -> None:  # in the engine's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return tell

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces of all texts, as they come. ApiError where the engine fails or time runs out before the first token."""
        for text in self._texts:
            if piece := text.opening():
                yield piece
        while self._tickets:
            told = await self._events.get()
            if told is None:
                async for piece in self._late():
                    yield piece
                return
            index, event = told
            if index not in self._tickets:
                continue
            text = self._texts[index]
            self._measure(text, event)
            piece = text.take(event)
            if piece.finish is not None:
                ticket = self._tickets.pop(index)
                if event.ended is None:  # a stop string: the engine knows nothing of it
                    self._engine.cancel(ticket)
            if piece.text or piece.tokens or piece.finish or piece.prompt or piece.ids:
                yield piece

    async def _late(self) -> AsyncIterator[Piece]:
        """Time is up: every open text ends as it stands."""
        open_ = list(self._tickets)
        self.close()
        if not self.new_tokens:
            raise unavailable("the server was too busy to begin with this request: try again later")
        for index in open_:
            yield self._texts[index].take(Event(ended="length"))

    def _measure(self, text: "_Text", event: Event) -> None:
        if not event.tokens:
            return
        now = time.monotonic()
        if text.last is None:
            self._metrics.first_token.observe(now - self._began)
        else:
            for _ in event.tokens:
                self._metrics.next_token.observe((now - text.last) / len(event.tokens))
        text.last = now

    def close(self) -> None:
        """Cancel what is still being written; again does nothing."""
        if hasattr(self, "_timer"):
            self._timer.cancel()
        tickets, self._tickets = self._tickets, {}
        for ticket in tickets.values():
            self._engine.cancel(ticket)


def texts_of(tokenizer: Tokenizer, ask: Ask, engine: Any) -> "list[_Text]":
    """The state of each text of an ask, before its first token. ApiError for a request that the engine cannot answer."""
    try:
        for request in ask.requests:
            engine.check(request)
    except ValueError as error:
        raise bad(str(error)) from None
    return [_Text(i, tokenizer, ask) for i in range(len(ask.requests))]


class _Text:
    """One text: which of its characters and tokens may be shown."""

    def __init__(self, index: int, tokenizer: Tokenizer, ask: Ask):
        self.index, self.new = index, 0
        self.last: float | None = None
        """When its last token came."""
        prompt = ask.requests[index].prompt
        self._tokenizer, self._unseen = tokenizer, ask.unseen
        self._stream = TextStream(tokenizer, ask.stop, trim=ask.trim, prompt=prompt, keep_stop=ask.keep_stop)
        self._begins = ask.logprobs is not None and not tokenizer.decode(prompt)
        """No text has come yet, the prompt's included."""
        self._waiting: collections.deque[Placed] = collections.deque()
        self._tells, self._ask = ask.logprobs is not None, ask
        self._least = ask.requests[index].min_tokens
        self._echo = None if ask.echoes is None else ask.echoes[index]
        self._offset = len(self._echo or "")

    def opening(self) -> Piece | None:
        """The prompt, where it is shown and its scores are not waited for."""
        return None if self._echo is None or self._ask.echo_scored else Piece(self.index, self._echo)

    def take(self, event: Event) -> Piece:
        """ApiError where the engine says that it failed."""
        if event.ended == "error":
            raise ApiError(500, f"the model failed: {event.reason or 'no reason given'}", code="engine_error")
        if event.ended == "stuck":
            raise bad(event.reason, code="constraint_failed")
        if event.ended == "cancelled":
            raise unavailable("the server is stopping and ended this text")
        text, tokens, ids = "", [], []
        if event.prompt and self._echo is not None and self._ask.echo_scored:
            text = self._echo
            tokens += self._placed(event.prompt[self._unseen :])
        for token in event.tokens:
            if self._stream.stopped is None:
                self.new += 1
                ids.append(token.id)
                at = self._stream.seen
                text += self._stream.push(token.id, watch=self.new > self._least)
                if self._tells:
                    self._waiting.append(Placed(token, at, self._stream.seen, self._begins))
                    self._begins = self._begins and not self._stream.seen
        if event.stop is not None and self._stream.stopped is None:
            ids.append(event.stop.id)
            if self._ask.keep_stop:
                text += self._stream.push(event.stop.id, watch=False)
        if event.ended is not None:
            text += self._stream.flush()
        finish = "stop" if self._stream.stopped is not None else event.ended
        while self._waiting and self._may_be_shown(self._waiting[0], finish):
            placed = self._waiting.popleft()
            tokens.append(placed._replace(at=placed.at + self._offset, end=placed.end + self._offset))
        prompt = event.prompt if self._ask.prompt_logprobs is not None else ()
        return Piece(self.index, text, tuple(tokens), finish, self._stop_reason(event), tuple(ids), prompt)

    def _stop_reason(self, event: Event) -> str | int | None:
        if self._stream.stopped is not None:
            return self._stream.stopped
        return event.stop.id if event.stop is not None and event.stop.id in self._ask.stop_ids else None

    def _may_be_shown(self, placed: Placed, finish: str | None) -> bool:
        """A token is told with the last of its text, at the end of the text at any rate, of a stop string never."""
        if finish is None:
            return placed.end <= self._stream.shown
        return self._stream.stopped is None or placed.at < self._stream.shown

    def _placed(self, prompt: tuple[Token, ...]) -> list[Placed]:
        stream, made = TextStream(self._tokenizer), []
        for token in prompt:
            at = stream.seen
            stream.push(token.id)
            made.append(Placed(token, at, stream.seen, not at))
        return made
