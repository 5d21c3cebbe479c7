"""Continuous batching: requests come and go at any time, and all that run are advanced together (Yu et al. 2022, "Orca")."""

import collections
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jaxlm.generate.request import Ended, Event, Full, Request, Tell, Token
from jaxlm.generate.seats import Seat, Ticket, choose, rows
from jaxlm.generate.slots import BIASES, BURST, STOPS, TOP, Burst, Decoder, Scores, Slots, filled, pieces, row_of
from jaxlm.generate.turns import Turns
from jaxlm.model import Model, Params
from jaxlm.parallel import settle

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How much an engine holds at once."""

    slots: int = 8
    """Texts that are written at the same time."""
    context: int = 2048
    """Most tokens of a prompt with its text; at most the model's positions."""
    queue: int = 256
    """Most requests that wait."""
    chunk: int = 128
    """Tokens of a prompt that are read at once: between two such pieces the other texts go on."""
    burst_s: float = 0.05
    """Seconds that texts are advanced without a look at what has come; the smoother they stream, the shorter."""

    cache: Literal["same", "int8"] = "same"
    """How keys and values are held (`model.cache`)."""
    exact: bool = True
    """All slots are computed at every step, so that a text is the same to the bit however many run beside it. False, on one
    CPU device: few more than hold a text, which is faster while few do; a product of fewer rows adds up in another order, so
    that log-probabilities differ in their last digits and a text may part where two tokens are as good as equally likely."""

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("context", 2), ("queue", 1), ("chunk", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine does now, and has done since it began."""

    running: int
    waiting: int
    slots: int
    requests: int
    prompt_tokens: int
    reused_tokens: int
    """Of prompts: those whose keys and values another request had left."""
    new_tokens: int
    alive: bool
    """Its thread, if it has one, runs."""
    beat_s: float
    """Since it last did something, or saw that there is nothing to do."""


class Engine:
    """Texts of many requests from one model, each as if it were alone.

    `start()` has a thread of its own do the work; `run()` does it here until nothing is left. `vocab_size` is the
    tokenizer's. Raises ValueError for a model that does not write text.
    """

    def __init__(self, model: Model, params: Params, mesh: jax.sharding.Mesh, vocab_size: int, config: EngineConfig | None = None):
        kind = (model.config.architecture, model.config.head.kind)
        if kind != ("decoder", "language_model"):
            raise ValueError(f"text is written by architecture decoder with head language_model, not by {kind[0]} with {kind[1]}")
        config = config or EngineConfig()
        self.config = dataclasses.replace(config, context=min(config.context, model.config.positions))
        # On a CPU only the blocks of the cache that are in use, one after the other; an accelerator rather reads all at once.
        kernel = "chunked" if mesh.devices.flat[0].platform == "cpu" else model.config.kernel
        model = Model(dataclasses.replace(model.config, kernel=kernel, cache=config.cache))
        chunk = min(config.chunk, self.config.context)
        room = -(-(self.config.context + chunk) // 128) * 128  # whole blocks of that kernel
        self.mesh, self.vocab_size, self.chunk = mesh, vocab_size, chunk
        few = [] if config.exact or mesh.size > 1 or kernel != "chunked" else [n for n in (1, 4, 16, 64) if n < config.slots]
        self._sizes = [*few, config.slots]
        """Numbers of rows that are compiled, of which the smallest is used that has room for all running texts."""
        self._decoder = Decoder(model, vocab_size, config.slots, room - chunk, chunk)
        with jax.set_mesh(mesh):
            self._params = self._decoder.split(params)
            self._state: Slots = self._decoder.empty()
        self._seats = [Seat() for _ in range(config.slots)]
        self._waiting = Turns[Ticket]()
        self._gone: list[Ticket] = []
        """Cancelled while they waited, and not yet told so."""
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._stopped = False
        self._clock, self._beat = itertools.count(1), time.monotonic()
        self._step_s: dict[int, float] = {}
        """Of each number of rows."""
        self._counts = collections.Counter[str]()

    # --- what others ask, from any thread ---------------------------------------------------------

    def submit(self, request: Request, tell: Tell) -> Ticket:
        """Take a request; `tell` hears what becomes of it. Raises ValueError for one that cannot be answered, and Full."""
        self._check(request)
        ticket = Ticket(request, tell)
        with self._lock:
            if self._closing:
                raise Full("the engine is closing: it takes no more requests")
            if len(self._waiting) >= self.config.queue:
                raise Full(f"{self.config.queue} requests are waiting: try again later")
            self._waiting.put(request.owner, ticket)
            self._counts["requests"] += 1
            self._lock.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request wherever it is; an event says when its slot is free. No effect on one that is over."""
        with self._lock:
            ticket.cancelled = True
            if self._waiting.discard(ticket.request.owner, ticket):
                self._gone.append(ticket)
            self._lock.notify_all()

    def warm(self) -> None:
        """Compile what plain requests need, here, before `start`: the first ones would wait for it. RuntimeError where the
        model does not compute."""
        with jax.set_mesh(self.mesh):
            for size in self._sizes:
                slot_B, live_B = rows(self._seats, size), np.zeros(size, bool)
                self._state, _ = self._decoder.write(self._params, self._state, slot_B, live_B, np.int32(0), None, scored=False)
        told: list[Event] = []
        for length in {min(length, self.config.context - 1) for length in (1, self.chunk // 8, self.chunk)}:  # each size of a piece
            self.submit(Request((0,) * length, min(2, self.config.context - length)), told.append)
        self.run()
        if failed := next((event.reason for event in told if event.ended == "error"), None):
            raise RuntimeError(f"the model failed: {failed}")

    def start(self) -> None:
        """Work in a thread of its own."""
        assert self._thread is None, "an engine starts once"
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, give those that are here `drain_s` seconds to end, cancel the rest."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread is None:
            self._stopped = True
            self._cancel_all()
            return
        deadline = time.monotonic() + drain_s
        while time.monotonic() < deadline and self._busy() and self._thread.is_alive():
            time.sleep(0.02)
        with self._lock:
            self._stopped = True
            self._lock.notify_all()
        self._thread.join()

    def stats(self) -> EngineStats:
        with self._lock:
            counts = self._counts
            return EngineStats(
                sum(seat.ticket is not None for seat in self._seats), len(self._waiting), self.config.slots, counts["requests"],
                counts["prompt_tokens"], counts["reused_tokens"], counts["new_tokens"],
                not self._stopped and (self._thread is None or self._thread.is_alive()), time.monotonic() - self._beat,
            )  # fmt: skip

    def run(self) -> None:
        """Work here until no request is left."""
        assert self._thread is None, "an engine that has a thread works there"
        while self._busy():
            self.step()

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise ValueError("the prompt is empty: give at least one token (the end-of-text token starts a new text)")
        if not all(0 <= token < self.vocab_size for token in request.prompt):
            raise ValueError(f"a token of the prompt is not among the {self.vocab_size} of the vocabulary")
        if request.max_tokens < 0:
            raise ValueError(f"max_tokens is {request.max_tokens}: it must not be negative")
        if len(request.prompt) + request.max_tokens > self.config.context:
            raise ValueError(
                f"the prompt of {len(request.prompt)} tokens and max_tokens {request.max_tokens} are more than the context of "
                f"{self.config.context}"
            )
        if len(request.stop) > STOPS:
            raise ValueError(f"{len(request.stop)} tokens end the text: at most {STOPS} may")
        if len(request.bias) > BIASES or not all(0 <= token < self.vocab_size for token, _ in request.bias):
            raise ValueError(f"bias must be of up to {BIASES} tokens, all among the {self.vocab_size} of the vocabulary")
        if request.logprobs is not None and not 0 <= request.logprobs <= TOP:
            raise ValueError(f"logprobs is {request.logprobs}: it must be from 0 to {TOP}")

    def _busy(self) -> bool:
        with self._lock:
            return bool(self._waiting or self._gone) or any(seat.ticket is not None for seat in self._seats)

    # --- the work, in one thread ------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                self._beat = time.monotonic()
                if self._stopped:
                    break
                if not self._busy():
                    self._lock.wait(timeout=1.0)
                    continue
            self.step()
        self._cancel_all()

    def step(self) -> None:
        """Seat those who wait, read of their prompts for as long as a burst takes, advance all texts by a burst."""
        self._beat = time.monotonic()
        try:
            with jax.set_mesh(self.mesh):
                self._seat()
                until = time.monotonic() + self.config.burst_s
                while self._read() and time.monotonic() < until:
                    pass
                self._write()
        except Exception as error:
            # What a program that failed was given is gone with it: those who had a slot are told, the others go on.
            _log.exception("a step of the engine failed")
            for seat in self._seats:
                if seat.ticket is not None:
                    seat.ticket.tell(Event(ended="error", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
            self._seats = [Seat() for _ in self._seats]
            with jax.set_mesh(self.mesh):
                self._state = self._decoder.empty()

    def _cancel_all(self) -> None:
        for seat in self._seats:
            self._leave(seat, "cancelled")
        with self._lock:
            tickets, self._gone = self._gone + self._waiting.clear(), []
        for ticket in tickets:
            ticket.tell(Event(ended="cancelled"))

    def _leave(self, seat: Seat, ended: Ended, tokens: Iterable[Token] = (), reason: str = "") -> None:
        if seat.ticket is not None:
            seat.ticket.tell(Event(tuple(tokens), ended=ended, reason=reason))
            seat.ticket, seat.todo, seat.scores = None, [], []

    def _seat(self) -> None:
        """Free the slots of those who left, and give the free ones to those who wait: owners take turns."""
        for seat in self._seats:
            if seat.ticket is not None and seat.ticket.cancelled:
                self._leave(seat, "cancelled")
        with self._lock:
            gone, self._gone = self._gone, []
            free = sum(seat.ticket is None for seat in self._seats)
            seated = [self._waiting.take() for _ in range(min(free, len(self._waiting)))]
        for ticket in gone:
            ticket.tell(Event(ended="cancelled"))
        for ticket in seated:
            self._place(ticket)

    def _place(self, ticket: Ticket) -> None:
        """A free slot for a request, with what another has computed of its prompt's beginning."""
        request = ticket.request
        fresh = request.logprobs is not None and request.prompt_logprobs  # needs all of the prompt's scores
        target, source, start = choose(self._seats, () if fresh else request.prompt, self.chunk)
        if source != target:
            self._state = self._decoder.copy(self._state, np.int32(source), np.int32(target), np.int32(start))
        todo = pieces(len(request.prompt), start, self.chunk)
        self._seats[target] = Seat(ticket, todo, request.prompt[:start], next(self._clock))
        self._counts.update(prompt_tokens=len(request.prompt), reused_tokens=start)

    def _read(self) -> bool:
        """One piece of the prompt that has waited longest; False: there is none."""
        seats = [seat for seat in self._seats if seat.todo]
        if not seats:
            return False
        seat = min(seats, key=lambda seat: seat.used)
        ticket = seat.ticket
        assert ticket is not None
        request = ticket.request
        begin, count, size = seat.todo.pop(0)
        scored = request.logprobs is not None
        allowed_BV = None if seat.todo else self._allowed([seat])
        if seat.ticket is None:  # nothing may come at all
            return True
        prompt_1V = np.zeros((1, self._decoder.model.config.V), bool)
        prompt_1V[0, list(request.prompt)] = True
        tokens = request.prompt[begin : begin + count]
        after = request.prompt[begin + 1 : begin + count + 1]
        self._state, token_1, own, of_prompt = self._decoder.read(
            self._params, self._state, np.int32(self._seats.index(seat)), row_of([request]), prompt_1V, filled(tokens, size),
            filled(after, size), np.int32(begin), np.int32(count), np.bool_(not seat.todo), allowed_BV, scored=scored,
        )  # fmt: skip
        settle(self.mesh, self._state.token_B)
        if count == self.chunk:
            seat.held = request.prompt[: begin + count]
        if scored and request.prompt_logprobs:
            told = jax.device_get(of_prompt)
            seat.scores = seat.scores or [Token(request.prompt[0])]
            seat.scores += [_token(id, told, (i,), request) for i, id in enumerate(after)]
        if seat.todo:
            return True
        if seat.scores:
            ticket.tell(Event(prompt=tuple(seat.scores)))
            seat.scores = []
        token = int(jax.device_get(token_1)[0])
        if request.max_tokens < 1:
            self._leave(seat, "length")
        elif token in request.stop:
            self._leave(seat, "stop")
        else:
            first = _token(token, jax.device_get(own) if scored else None, (0,), request)
            self._hand_on(seat, [first], "length" if request.max_tokens == 1 else None)
        return True

    def _write(self) -> None:
        """A burst of all running texts, as long as `burst_s`."""
        running = sum(seat.running for seat in self._seats)
        if not running:
            return
        size = next(size for size in self._sizes if size >= running)
        slot_B = rows(self._seats, size)
        seats = self._seats if slot_B is None else [self._seats[b] for b in slot_B]
        scored = any(seat.ticket is not None and seat.ticket.request.logprobs is not None for seat in seats)
        allowed_BV = self._allowed(seats)
        live_B = np.array([seat.running for seat in seats])
        step_s = self._step_s.get(size)
        # Where a text is guided, the host must have a look at each token.
        steps = 1 if allowed_BV is not None or step_s is None else int(np.clip(self.config.burst_s / step_s, 1, BURST))
        began = time.monotonic()
        self._state, burst = self._decoder.write(
            self._params, self._state, slot_B, live_B, np.int32(steps), allowed_BV, scored=scored
        )
        settle(self.mesh, self._state.token_B)
        told: Burst = jax.device_get(burst)
        took = (time.monotonic() - began) / max(1, int(told.count_B.max()))
        # The first time counts the compilation too: what is less is believed at once.
        self._step_s[size] = took if step_s is None else min(took, 0.8 * step_s + 0.2 * took)
        for b, seat in enumerate(seats):
            ticket = seat.ticket
            if ticket is None or not live_B[b]:
                continue
            request, count = ticket.request, int(told.count_B[b])
            tokens = [_token(int(told.tokens_BT[b, i]), told.scores, (b, i), request) for i in range(count)]
            going: Ended | None = None if told.running_B[b] else "length" if told.new_B[b] >= request.max_tokens else "stop"
            self._hand_on(seat, tokens, going)

    def _hand_on(self, seat: Seat, tokens: list[Token], ended: Ended | None) -> None:
        """New tokens of a text that goes on, or has ended: perhaps because its guide says so."""
        assert seat.ticket is not None
        self._counts["new_tokens"] += len(tokens)
        guide = seat.ticket.request.guide
        if guide is not None:
            for token in tokens:
                guide.take(token.id)
            if ended is None and guide.ended:
                ended = "stop"
        if ended is not None:
            self._leave(seat, ended, tokens)
        elif tokens:
            seat.ticket.tell(Event(tuple(tokens)))

    def _allowed(self, seats: Sequence[Seat]) -> np.ndarray | None:
        """Which tokens may come next in each of these slots; None where all may in all of them."""
        if not any(seat.running and seat.ticket and seat.ticket.request.guide for seat in seats):
            return None
        allowed_BV = np.ones((len(seats), self._decoder.model.config.V), bool)
        for seat, row_V in zip(seats, allowed_BV, strict=True):
            if not seat.running or seat.ticket is None or seat.ticket.request.guide is None:
                continue
            try:
                may_V = seat.ticket.request.guide.mask()
            except ValueError as error:
                self._leave(seat, "stuck", reason=str(error))
                continue
            row_V[:] = False
            row_V[: len(may_V)] = may_V
        return allowed_BV


def _token(id: int, scores: Any, place: tuple[int, ...], request: Request) -> Token:
    if request.logprobs is None:
        return Token(id)
    told: Scores = scores
    top = [(int(i), float(p)) for i, p in zip(told.id[place], told.top[place], strict=True) if np.isfinite(p)]
    return Token(id, float(told.own[place]), tuple(top[: request.logprobs]))
