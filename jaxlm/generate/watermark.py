"""A watermark: tokens are slightly likelier if they are green, which only who has the key can tell (Kirchenbauer et al. 2023).

Letters: B rows · V vocabulary · P pairs of a token and the one after it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Watermark:
    """Which tokens are green behind a token, and how much likelier they become."""

    key: int
    """The secret, from 0 to 2³² − 1: who knows it finds the mark, and can forge it."""
    share: float = 0.25
    """Share of the vocabulary that is green behind each token (γ)."""
    bias: float = 2.0
    """Added to the logits of green tokens, before the temperature (δ)."""

    def __post_init__(self) -> None:
        if not 0 <= self.key < 2**32:
            raise ValueError(f"watermark key is {self.key}: it must be from 0 to {2**32 - 1}")
        if not 0 < self.share < 1:
            raise ValueError(f"watermark share is {self.share}: it must be above 0 and below 1")
        if not 0 < self.bias < 100:
            raise ValueError(f"watermark bias is {self.bias}: it must be above 0 and below 100")


class Detection(NamedTuple):
    """How a text looks to who has the key."""

    green: int
    pairs: int
    """Different pairs of a token and the one after it: those that come again prove nothing new."""
    z: float
    """(green − γ·pairs) / √(pairs·γ·(1 − γ)), equation 3: about N(0, 1) in a text that was written without the key."""
    p: float
    """The probability that a text written without the key is at least as green, by that normal distribution."""


def green(watermark: Watermark, before: jax.Array, token: jax.Array) -> jax.Array:
    """Whether one token is green behind another: for each pair an own draw, so that each is known without all others."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(jnp.uint32(watermark.key)), before), token)
    return jax.random.uniform(key) < watermark.share


def marked(watermark: Watermark, before_B: jax.Array, V: int) -> jax.Array:
    """What is added to the logits behind the tokens `before_B`, (B, V) float32: the soft rule, algorithm 2."""
    row = jax.vmap(lambda before, token: green(watermark, before, token), in_axes=(None, 0))
    green_BV = jax.vmap(row, in_axes=(0, None))(before_B, jnp.arange(V, dtype=jnp.int32))
    return jnp.where(green_BV, jnp.float32(watermark.bias), 0)


def detect(watermark: Watermark, tokens: Sequence[int]) -> Detection:
    """Whether a text carries the mark. `tokens` are its ids, with the last one of the prompt in front if it is known."""
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: at least 2 are needed to look for a watermark")
    ids = np.asarray(tokens, np.int32)
    pairs_P2 = np.unique(np.stack([ids[:-1], ids[1:]], axis=1), axis=0)
    P = len(pairs_P2)
    padded = np.pad(pairs_P2, ((0, (1 << (P - 1).bit_length()) - P), (0, 0)))  # few sizes, so few compilations
    count = int(np.asarray(_greens(watermark, padded[:, 0], padded[:, 1]))[:P].sum())
    z = (count - watermark.share * P) / math.sqrt(P * watermark.share * (1 - watermark.share))
    return Detection(count, P, z, math.erfc(z / math.sqrt(2)) / 2)


_greens = jax.jit(jax.vmap(green, in_axes=(None, 0, 0)), static_argnums=0)
