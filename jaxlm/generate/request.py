"""What is asked of an engine, and what it tells: plain values, so that those who ask need to know no device."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np

from jaxlm.generate.sample import SampleConfig

Ended = Literal["stop", "length", "cancelled", "stuck", "error"]
"""stuck: its guide allows no token at all."""


class Guide(Protocol):
    """Says which tokens may come next, as `constrain.Grammar` does. ValueError: none may."""

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
    """Whose it is: owners take turns, and the requests of one wait for each other."""
    guide: "Guide | None" = None
    """What its text must match; of this request alone, as it remembers how far the text has come."""
    bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit before penalties, temperature and filters)."""


@dataclasses.dataclass(frozen=True)
class Token:
    """A token with the model's log-probabilities at its place, before temperature and filters."""

    id: int
    logprob: float | None = None
    """None: it was not asked for, or this is a prompt's first token, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest, best first."""


@dataclasses.dataclass(frozen=True)
class Event:
    """What has become of a request since the last event. Nothing comes after one that says `ended`."""

    tokens: tuple[Token, ...] = ()
    """New tokens of the text."""
    prompt: tuple[Token, ...] = ()
    """Those of the prompt, once, before any new token, where prompt_logprobs asks for them."""
    ended: Ended | None = None
    reason: str = ""
    """Of an error, for a person."""


Tell = Callable[[Event], None]
"""Called in the engine's thread: hand the event on and return."""


class Full(Exception):  # noqa: N818 (it is no error of anyone)
    """The queue takes no more requests now."""
