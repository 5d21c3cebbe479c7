"""An engine without a model, behind the contract of the real one: what it writes is known, and it can be slow or fail."""

import dataclasses
import itertools
import logging
import threading
import time
from types import SimpleNamespace

from jaxlm.generate.request import Event, Full, Token


class FakeEngine:
    """Writes `says`, or each prompt's tokens, again and again, then ends with the first token of `stop` that it comes to.

    With `fails` it does so at a token 1 that is not the first, as a model might in the middle of a text.
    """

    def __init__(self, slots=4, context=64, queue=64, delay=0.0, says=None, fails=True):
        self.config = SimpleNamespace(slots=slots, context=context)
        self.fails = fails
        self.says = None if says is None else tuple(says.encode())
        self.queue, self.delay, self.alive, self.beat = queue, delay, True, 0.0
        self.lock = threading.RLock()
        self.numbers = itertools.count()
        self.waiting, self.running, self.cancelled = {}, {}, []
        self.counts = {"prompt_tokens": 0, "reused_tokens": 0, "new_tokens": 0, "requests": 0}
        self.seen = []
        """Requests that were taken."""
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def check(self, request):
        if len(request.prompt) + request.max_tokens > self.config.context:
            raise ValueError(f"{len(request.prompt)} + {request.max_tokens} tokens: the context is {self.config.context}")

    def submit(self, request, tell, *, checked=False):
        if not checked:
            self.check(request)
        with self.lock:
            if len(self.waiting) >= self.queue:
                raise Full
            ticket = next(self.numbers)
            self.waiting[ticket] = (request, safe(tell), 0)
            self.seen.append(request)
            self.counts["requests"] += 1
            return ticket

    def cancel(self, ticket):
        with self.lock:
            for some in (self.waiting, self.running):
                if ticket in some:
                    _, tell, _ = some.pop(ticket)
                    self.cancelled.append(ticket)
                    tell(Event(ended="cancelled"))

    def stats(self):
        with self.lock:
            return SimpleNamespace(
                running=len(self.running), waiting=len(self.waiting), slots=self.config.slots, alive=self.alive,
                beat_s=self.beat, **self.counts,
            )  # fmt: skip

    def start(self):
        """It runs from the beginning."""

    def run(self):
        while self.stats().running + self.stats().waiting:
            time.sleep(0.001)

    def close(self, drain_s=0.0):
        self.alive = False
        for ticket in [*self.waiting, *self.running]:
            self.cancel(ticket)

    def _work(self):
        while self.alive:
            time.sleep(self.delay or 0.0005)
            with self.lock:
                while self.waiting and len(self.running) < self.config.slots:
                    ticket = next(iter(self.waiting))
                    self.running[ticket] = self.waiting.pop(ticket)
                    request, tell, _ = self.running[ticket]
                    self.counts["prompt_tokens"] += len(request.prompt)
                    if request.prompt_logprobs:
                        first, *rest = request.prompt
                        tell(Event(prompt=(Token(first), *(token(i, request.logprobs) for i in rest))))
                    if request.max_tokens == 0:
                        del self.running[ticket]
                        tell(Event(ended="length"))
                for ticket, (request, tell, at) in list(self.running.items()):
                    text = self.says or request.prompt
                    following = text[at % len(text)]
                    if self.fails and following == 1 and at:
                        ended = Event(ended="error", reason="a made-up fault")
                    elif following in request.stop and at:
                        ended = Event(ended="stop", stop=token(following, request.logprobs))
                    else:
                        self.counts["new_tokens"] += 1
                        new = () if following in request.stop else (token(following, request.logprobs),)
                        ended = Event(new, ended="length" if at + 1 == request.max_tokens else None)
                    self.running[ticket] = (request, tell, at + 1)
                    if ended.ended:
                        del self.running[ticket]
                    tell(ended)


def safe(tell):
    """As the real one: a listener that fails stops nobody else."""

    def told(event):
        try:
            tell(event)
        except Exception:
            logging.getLogger(__name__).exception("a listener failed")

    return told


def token(i, logprobs):
    """Log-probabilities that tests can foresee: −i/100 of the token, then −1, −2, … of those after it."""
    if logprobs is None:
        return Token(i)
    return Token(i, -i / 100, tuple((i + k, -i / 100 - k) for k in range(logprobs)), 1)


@dataclasses.dataclass
class Live:
    url: str
    engine: FakeEngine
    service: object
    server: object
