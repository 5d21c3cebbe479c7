"""Continuous batching: requests come and go at any time, and all that run are advanced together (Yu et al. 2022, "Orca")."""

import collections
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import jax
import numpy as np

from jaxlm.generate.guiding import GuideWorker
from jaxlm.generate.request import Ended, Event, Full, Request, Tell, Token, check
from jaxlm.generate.seats import Seat, Ticket, choose, line, rows
from jaxlm.generate.slots import BURST, Burst, Decoder, Scores, Slots, filled, pieces, row_of
from jaxlm.generate.turns import FairRequestQueue
from jaxlm.model import Model, Params
from jaxlm.parallel import settle

_log = logging.getLogger(__name__)
T = TypeVar("T")
GUIDE_WAIT_S = 0.002
"""Seconds that other texts wait for a guide before they go on without its text."""
NO_TOKEN_LEFT = "no token may come next: what is allowed, the bad sequences and the least number of tokens exclude each other"


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
    guide_s: float = 10.0
    """Seconds that a request's guide may take for one token; a slower one ends its request."""

    cache: Literal["same", "int8"] = "same"
    """How keys and values are held (`model.cache`)."""
    exact: bool = True
    """All slots are computed at every step, so that a text is the same to the bit however many run beside it. False, on one
    CPU device: few more than hold a text, which is faster while few do; a product of fewer rows adds up in another order, so
    that log-probabilities differ in their last digits and a text may part where two tokens are as good as equally likely."""

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("context", 2), ("queue", 1), ("chunk", 8), ("guide_s", 0)):
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
        self._decoder = Decoder(model, vocab_size, config.slots, room - chunk, chunk, mesh)
        with jax.set_mesh(mesh):
            self._params = self._decoder.split(params)
            self._state: Slots = self._decoder.empty()
        self._seats = [Seat() for _ in range(config.slots)]
        self._waiting = FairRequestQueue[Ticket]()
        self._gone: list[Ticket] = []
        """Cancelled while they waited, and not yet told so."""
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._stopped = False
        self._clock, self._beat = itertools.count(1), time.monotonic()
        self._reads = itertools.count()
        self._step_s: dict[int, float] = {}
        """Of each number of rows."""
        self._counts = collections.Counter[str]()

    # --- what others ask, from any thread ---------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that cannot be answered. Takes time that grows with what the request holds."""
        check(request, self.vocab_size, self.config.context)

    def submit(self, request: Request, tell: Tell, *, checked: bool = False) -> Ticket:
        """Queue a request; `tell` is called with each of its events.

        A full queue still admits a client that holds less than its share of the waiting requests. Raises Full, and ValueError
        for a request that cannot be answered (not checked again if `checked`).
        """
        if not checked:
            self.check(request)
        ticket = Ticket(request, tell)
        with self._lock:
            if self._closing:
                raise Full("the engine is closing: it takes no more requests")
            waiting, share = self._waiting.count(request.owner), self._waiting.share(self.config.queue)
            if len(self._waiting) >= self.config.queue and waiting >= share:
                raise Full(f"{len(self._waiting)} requests are waiting: try again later")
            self._waiting.put(request.owner, ticket, request.user)
            self._counts["requests"] += 1
            self._lock.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request wherever it is; an event says when its slot is free. No effect on one that is over."""
        with self._lock:
            ticket.cancelled = True
            if self._waiting.discard(ticket.request.owner, ticket, ticket.request.user):
                self._gone.append(ticket)
            self._lock.notify_all()

    def warm(self) -> None:
        """Compile every program, before `start`, so that no request waits for the compilation that another one causes.

        Raises RuntimeError where the model does not compute.
        """
        with jax.set_mesh(self.mesh):
            for size in self._sizes:
                slot_B, none_B = rows(self._seats, size), np.zeros(size, bool)
                self._state, _ = self._decoder.write(self._params, self._state, slot_B, none_B, none_B, np.int32(0))
            self._state = self._decoder.copy(self._state, np.int32(0), np.int32(0), np.int32(0))
            self._state = self._decoder.allow(self._state, np.int32(0), np.ones(self._decoder.model.config.V, bool))
        told: list[Event] = []
        for length in {min(length, self.config.context - 1) for length in (1, self.chunk // 8, self.chunk)}:  # each size of a piece
            self.submit(Request((0,) * length, min(2, self.config.context - length)), told.append)
        self.submit(Request((0,), 0, logprobs=1, prompt_logprobs=True), told.append)
        self.run()
        self._counts.clear()
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
            self._end_all(Event(ended="cancelled"))
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
        try:
            while self._busy():
                self.step()
        except Exception as error:
            self._end_all(Event(ended="error", reason=f"the engine has ended: {line(error)}"))
            raise

    def _busy(self) -> bool:
        with self._lock:
            return bool(self._waiting or self._gone) or any(seat.ticket is not None for seat in self._seats)

    # --- the work, in one thread ------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                with self._lock:
                    self._beat = time.monotonic()
                    if self._stopped:
                        break
                    if not self._busy():
                        self._lock.wait(timeout=1.0)
                        continue
                self.step()
        except BaseException as error:
            _log.exception("the engine has ended")
            self._end_all(Event(ended="error", reason=f"the engine has ended: {line(error)}"))
        else:
            self._end_all(Event(ended="cancelled"))

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
            # A program that fails takes the state of all slots with it: those who had one are told, the others go on.
            _log.exception("a step of the engine failed")
            seats, self._seats = self._seats, [Seat() for _ in self._seats]
            for seat in seats:
                self._fail(seat, error)
            with jax.set_mesh(self.mesh):
                self._state = self._decoder.empty()

    def _end_all(self, event: Event) -> None:
        """Tell everybody, and take no more requests."""
        with self._lock:
            self._closing = self._stopped = True
            tickets, self._gone = self._gone + self._waiting.clear(), []
        for seat in self._seats:
            if seat.ticket is not None:
                tickets.append(seat.ticket)
                seat.free()
        for ticket in tickets:
            ticket.tell(Event(ended="cancelled") if ticket.cancelled else event)

    def _leave(self, seat: Seat, ended: Ended, tokens: Iterable[Token] = (), reason: str = "", stop: Token | None = None) -> None:
        if (ticket := seat.ticket) is not None:
            seat.free()
            ticket.tell(Event(tuple(tokens), ended=ended, reason=reason, stop=stop))

    def _fail(self, seat: Seat, error: BaseException) -> None:
        self._leave(seat, "error", reason=line(error))

    def _run(self, program: Callable[[], T]) -> T:
        """Run a program that changes the state for one request. What it raises is the request's own affair as long as the state
        is there: `_RequestError`; otherwise it is everybody's."""
        try:
            return program()
        except Exception as error:
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
                raise
            raise _RequestError(error) from error

    def _seat(self) -> None:
        """Free the slots of those who left, and give the free ones to those who wait: owners take turns."""
        for seat in self._seats:
            if seat.ticket is not None and seat.ticket.cancelled:
                self._leave(seat, "cancelled")
            elif seat.ticket is not None and seat.ticket.failure is not None:
                self._fail(seat, seat.ticket.failure)
        with self._lock:
            gone, self._gone = self._gone, []
        for ticket in gone:
            ticket.tell(Event(ended="cancelled"))
        while any(seat.ticket is None for seat in self._seats):
            with self._lock:
                if not self._waiting:
                    break
                ticket = self._waiting.take()
            try:
                self._place(ticket)
            except _RequestError as failed:
                ticket.fail(failed.error)
            except Exception as error:
                ticket.fail(error)
                if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state)):
                    raise

    def _place(self, ticket: Ticket) -> None:
        """A free slot for a request, with what another has computed of its prompt's beginning."""
        request = ticket.request
        fresh = request.logprobs is not None and request.prompt_logprobs  # needs all of the prompt's scores
        target, source, start = choose(self._seats, () if fresh else request.prompt, self.chunk, request.cache_salt)
        todo = pieces(len(request.prompt), start, self.chunk, whole=fresh)
        V, allowed_V = self._decoder.model.config.V, None
        if request.allowed is not None:
            allowed_V = np.zeros(V, bool)
            allowed_V[list(request.allowed)] = True
        if source != target:
            self._seats[target].held = ()  # whatever fails from here on, the slot's cache has changed
            self._state = self._decoder.copy(self._state, np.int32(source), np.int32(target), np.int32(start))
        guide = None if request.guide is None else GuideWorker(request.guide, V, self._wake)
        self._seats[target] = Seat(
            ticket, todo, request.prompt[:start], request.cache_salt, next(self._clock), guide=guide, allowed_V=allowed_V
        )
        self._counts.update(prompt_tokens=len(request.prompt), reused_tokens=start)

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _read(self) -> bool:
        """Prefill one chunk of a prompt; False if none is left.

        Turns alternate between the prompt that came first and the one with the fewest chunks left: a long prompt does not hold
        back short ones, and however many of those come, the first prompt has half of the turns.
        """
        self._ask_guides()
        seats = [seat for seat in self._seats if seat.todo and (len(seat.todo) > 1 or seat.ready)]
        if not seats:
            return False
        shortest = next(self._reads) % 2
        seat = min(seats, key=lambda seat: (len(seat.todo) if shortest else 0, seat.used))
        try:
            self._read_piece(seat)
        except _RequestError as failed:
            self._fail(seat, failed.error)
        return True

    def _read_piece(self, seat: Seat) -> None:
        ticket = seat.ticket
        assert ticket is not None, "a slot without a request has nothing to read"
        request, V = ticket.request, self._decoder.model.config.V
        (begin, count, size), *rest = seat.todo
        scored = request.logprobs is not None and request.prompt_logprobs

        def run() -> Any:
            prompt_1V, allowed_1V = np.zeros((1, V), bool), np.ones((1, V), bool)
            prompt_1V[0, list(request.prompt)] = True
            if seat.mask_V is not None:
                allowed_1V = seat.mask_V[None]
            elif seat.allowed_V is not None:
                allowed_1V = seat.allowed_V[None]
            tokens = request.prompt[begin : begin + count]
            return self._decoder.read(
                self._params, self._state, np.int32(self._seats.index(seat)), row_of([request]), prompt_1V,
                allowed_1V, filled(tokens, size), filled(after, size), np.int32(begin), np.int32(count),
                np.bool_(not rest), scored=scored,
            )  # fmt: skip

        after = request.prompt[begin + 1 : begin + count + 1]
        self._state, token_1, own, of_prompt = self._run(run)
        settle(self.mesh, self._state.token_B)
        seat.todo = rest
        if count == self.chunk:
            seat.held = request.prompt[: begin + count]
        if scored:
            told = jax.device_get(of_prompt)
            seat.scores = seat.scores or [Token(request.prompt[0])]
            seat.scores += [_token(id, told, (i,), request) for i, id in enumerate(after)]
        if rest:
            return
        if seat.scores:
            ticket.tell(Event(prompt=tuple(seat.scores)))
            seat.scores = []
        first = _token(int(jax.device_get(token_1)[0]), jax.device_get(own), (0,), request)
        if request.max_tokens < 1:
            self._leave(seat, "length")
        elif first.id < 0:
            self._leave(seat, "stuck", reason=NO_TOKEN_LEFT)
        elif first.id in request.stop:
            self._leave(seat, "stop", stop=first)
        else:
            self._hand_on(seat, [first], "length" if request.max_tokens == 1 else None)

    def _write(self) -> None:
        """A burst of all running texts, as long as `burst_s`; those whose guide is still at work wait for the next one."""
        self._ask_guides()
        if not all(seat.ready for seat in self._seats):
            others = any(seat.ticket is not None and seat.ready for seat in self._seats)
            self._await_guides(GUIDE_WAIT_S if others else self.config.burst_s)
        running = [seat for seat in self._seats if seat.running]
        if not any(seat.ready for seat in running):
            return
        size = next(size for size in self._sizes if size >= len(running))
        slot_B = rows(self._seats, size)
        seats = self._seats if slot_B is None else [self._seats[b] for b in slot_B]
        live_B = np.array([seat.running for seat in seats])
        turn_B = np.array([seat.running and seat.ready for seat in seats])
        guided = any(seat.guide is not None for seat in seats if seat.running and seat.ready)
        step_s = self._step_s.get(size)
        # Where a text is guided, the host must have a look at each token.
        steps = 1 if guided or step_s is None else int(np.clip(self.config.burst_s / step_s, 1, BURST))
        began = time.monotonic()
        self._state, burst = self._decoder.write(self._params, self._state, slot_B, live_B, turn_B, np.int32(steps))
        settle(self.mesh, self._state.token_B)
        told: Burst = jax.device_get(burst)
        took = (time.monotonic() - began) / max(1, int(told.count_B.max()))
        # The first time counts the compilation too: what is less is believed at once.
        self._step_s[size] = took if step_s is None else min(took, 0.8 * step_s + 0.2 * took)
        for b, seat in enumerate(seats):
            if turn_B[b] and seat.ticket is not None:
                self._take_burst(seat, seat.ticket.request, told, b)

    def _take_burst(self, seat: Seat, request: Request, told: Burst, b: int) -> None:
        def token(i: int) -> Token:
            return _token(int(told.tokens_BT[b, i]), told.scores, (b, i), request)

        count = int(told.count_B[b])
        tokens = [token(i) for i in range(count)]
        if told.running_B[b]:
            self._hand_on(seat, tokens, None)
        elif told.new_B[b] >= request.max_tokens:
            self._hand_on(seat, tokens, "length")
        elif told.tokens_BT[b, count] < 0:
            self._hand_on(seat, tokens, "stuck")
        else:
            self._hand_on(seat, tokens, "stop", token(count))

    def _hand_on(self, seat: Seat, tokens: list[Token], ended: Ended | None, stop: Token | None = None) -> None:
        """New tokens of a text that goes on, or has ended; a guide takes them first."""
        assert seat.ticket is not None, "a text belongs to a request"
        self._counts["new_tokens"] += len(tokens)
        if seat.guide is not None and tokens and ended is None:  # of a text that has ended it has nothing more to say
            seat.held_back, seat.mask_V = tokens, None
            seat.guide.advance([token.id for token in tokens])
        elif ended is not None:
            self._leave(seat, ended, tokens, NO_TOKEN_LEFT if ended == "stuck" else "", stop)
        elif tokens:
            seat.ticket.tell(Event(tuple(tokens)))

    # --- guides -----------------------------------------------------------------------------------

    def _ask_guides(self) -> None:
        """Look at what guides have found out since, and end the requests of those that failed or take too long."""
        for seat in self._seats:
            if seat.ready or seat.guide is None:
                continue
            if not seat.guide.done:
                if seat.guide.seconds > self.config.guide_s:
                    self._leave(seat, "error", reason=f"its guide took more than {self.config.guide_s:g} s for one token")
                continue
            try:
                mask_V = seat.guide.result()
            except ValueError as error:
                self._leave(seat, "stuck", reason=str(error))
            except BaseException as error:  # whatever a guide raises is its own request's affair
                self._fail(seat, error)
            else:
                self._guided(seat, mask_V)

    def _guided(self, seat: Seat, mask_V: np.ndarray | None) -> None:
        tokens, seat.held_back = seat.held_back, []
        if mask_V is None:
            self._leave(seat, "stop", tokens)
            return
        if tokens and seat.ticket is not None:
            seat.ticket.tell(Event(tuple(tokens)))
        if seat.allowed_V is not None:
            mask_V = mask_V & seat.allowed_V
            if not mask_V.any():
                self._leave(seat, "stuck", reason="none of the allowed tokens may come next")
                return
        seat.mask_V = mask_V
        if seat.running:  # before, the mask comes with the prompt's last piece
            slot = np.int32(self._seats.index(seat))
            try:
                self._state = self._run(lambda: self._decoder.allow(self._state, slot, mask_V))
            except _RequestError as failed:
                self._fail(seat, failed.error)

    def _await_guides(self, seconds: float) -> None:
        """Wait until all guides are done."""
        deadline = time.monotonic() + seconds
        with self._lock:
            while not all(seat.ready or (seat.guide is not None and seat.guide.done) for seat in self._seats):
                left = deadline - time.monotonic()
                if left <= 0 or self._stopped:
                    break
                self._lock.wait(left)
        self._ask_guides()


class _RequestError(Exception):
    """Something failed that concerns one request alone."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def _token(id: int, scores: Any, place: tuple[int, ...], request: Request) -> Token:
    if request.logprobs is None:
        return Token(id)
    told: Scores = scores
    top = [(int(i), float(p)) for i, p in zip(told.id[place], told.top[place], strict=True) if np.isfinite(p)]
    return Token(id, float(told.own[place]), tuple(top[: request.logprobs]), int(told.rank[place]))
