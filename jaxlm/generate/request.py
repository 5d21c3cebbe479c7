"""What is asked of an engine, and what it tells: plain values, so that those who ask need to know no device."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from jaxlm.generate.sample import SampleConfig

TOP = 20
"""Most likeliest tokens told with each one."""
STOPS = 8
"""Most tokens that end a text."""
BIASES = 300
"""Most tokens whose logits a request changes."""
BAD = 128
"""Most token sequences that must not occur in a text."""
BAD_LENGTH = 16
"""Most tokens of such a sequence."""

Ended = Literal["stop", "length", "cancelled", "stuck", "error"]
"""stuck: its guide, allowed tokens, bad sequences and least length together leave no token."""


class Guide(Protocol):
    """Says which tokens may come next, as `constrain.Grammar` does. ValueError: none may.

    The engine calls it in a thread of the request's own, one call at a time, so a slow guide delays no other request; whatever
    it raises ends its own request.
    """

    @property
    def ended(self) -> bool:
        """Nothing may follow."""

    def mask(self) -> np.ndarray:
        """(V,) True for each token that may come."""

    def take(self, token: int) -> None:
        """The next token of the text."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what is wanted behind it."""

    prompt: tuple[int, ...]
    """At least one token."""
    max_tokens: int = 16
    """Most new tokens; 0: only the prompt's scores are wanted."""
    sample: SampleConfig = SampleConfig()
    seed: int = 0
    """The same request with the same seed has the same text, whatever else is computed with it."""
    stop: frozenset[int] = frozenset()
    """Tokens that end the text; the one that did is not part of it."""
    logprobs: int | None = None
    """Likeliest tokens told with each new one, beside its own log-probability; None: neither."""
    prompt_logprobs: bool = False
    """The same of the prompt's tokens, as many as `logprobs` says."""
    owner: str = ""
    """Client that sent it, such as its address: clients take turns."""
    user: str = ""
    """User that the client names: the users of one client take turns within the client's."""
    guide: "Guide | None" = None
    """What its text must match; of this request alone, as it remembers how far the text has come."""
    bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit before penalties, temperature and filters)."""
    min_tokens: int = 0
    """New tokens before which none of `stop` may come."""
    allowed: tuple[int, ...] | None = None
    """The only tokens that may come; None: all."""
    bad: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not occur among the new tokens."""
    cache_salt: str = ""
    """Only requests with the same salt reuse each other's prompt prefixes."""


def check(request: Request, vocab_size: int, context: int) -> None:
    """Raise ValueError for a request that an engine with this vocabulary and context cannot answer."""
    if not request.prompt:
        raise ValueError("the prompt is empty: give at least one token (the end-of-text token starts a new text)")
    if not _within(request.prompt, vocab_size):
        raise ValueError(f"a token of the prompt is not among the {vocab_size} of the vocabulary")
    if request.max_tokens < 0:
        raise ValueError(f"max_tokens is {request.max_tokens}: it must not be negative")
    if len(request.prompt) + request.max_tokens > context:
        raise ValueError(
            f"the prompt of {len(request.prompt)} tokens and max_tokens {request.max_tokens} are more than the context of {context}"
        )
    if len(request.stop) > STOPS:
        raise ValueError(f"{len(request.stop)} tokens end the text: at most {STOPS} may")
    if not 0 <= request.min_tokens <= request.max_tokens:
        raise ValueError(f"min_tokens is {request.min_tokens}: it must be from 0 to max_tokens, {request.max_tokens}")
    if request.allowed is not None and not (request.allowed and _within(request.allowed, vocab_size)):
        raise ValueError(f"allowed must hold at least one token, all among the {vocab_size} of the vocabulary")
    if len(request.bad) > BAD or not all(0 < len(ids) <= BAD_LENGTH for ids in request.bad):
        raise ValueError(f"bad must hold up to {BAD} sequences of 1 to {BAD_LENGTH} tokens")
    if not all(0 <= i < vocab_size for ids in request.bad for i in ids):
        raise ValueError(f"a token of bad is not among the {vocab_size} of the vocabulary")
    never = {ids[0] for ids in request.bad if len(ids) == 1} | (request.stop if request.min_tokens else frozenset())
    if request.allowed is not None and all(i in never for i in request.allowed):
        raise ValueError("none of the allowed tokens may come: bad and min_tokens forbid all of them")
    if len(request.bias) > BIASES or not all(0 <= token < vocab_size for token, _ in request.bias):
        raise ValueError(f"bias must be of up to {BIASES} tokens, all among the {vocab_size} of the vocabulary")
    if request.logprobs is not None and not 0 <= request.logprobs <= TOP:
        raise ValueError(f"logprobs is {request.logprobs}: it must be from 0 to {TOP}")


def _within(ids: tuple[int, ...], vocab_size: int) -> bool:
    return min(ids) >= 0 and max(ids) < vocab_size


@dataclasses.dataclass(frozen=True)
class Token:
    """A token with the model's log-probabilities at its place, before temperature and filters."""

    id: int
    logprob: float | None = None
    """None: it was not asked for, or this is a prompt's first token, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest, best first."""
    rank: int | None = None
    """Its place among all tokens by log-probability, from 1."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What has become of a request since the last event. Nothing comes after one that says `ended`."""

    tokens: tuple[Token, ...] = ()
    """New tokens of the text."""
    prompt: tuple[Token, ...] = ()
    """Those of the prompt, once, before any new token, where prompt_logprobs asks for them."""
    ended: Ended | None = None
    stop: Token | None = None
    """The token of `Request.stop` that ended the text, if one did."""
    reason: str = ""
    """Of an error, for a person."""


Tell = Callable[[Event], None]
"""Called in the engine's thread: hand the event on and return. If it raises, its request ends with an error."""


class Full(Exception):  # noqa: N818 (it is no error of anyone)
    """The queue takes no more requests now."""
