"""Logits → next token; every row with settings of its own, all in one compiled program.

Letters: B rows · L tokens of a prompt · V vocabulary (as wide as the logits are).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

INFINITY = 0x7F800000  # its bits in float32


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How the next token is drawn: penalties, temperature, then each filter among what the one before it has left."""

    temperature: float = 0.8
    """Divides the logits; 0: always the most likely token."""
    top_k: int | None = None
    """Draw among this many most likely tokens."""
    top_p: float | None = None
    """Draw among the fewest tokens that hold this probability (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Draw among tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""
    typical_p: float | None = None
    """Draw among the tokens whose surprise is nearest to the expected one, until they hold this probability (Meister et al.
    2023)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or text, and multiplies negative ones (Keskar et al. 2019); 1: none."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that stand in the text."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit each time that it stands in the text."""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1")
        for name in ("top_p", "typical_p"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is {share}: it must be above 0 and at most 1")
        # Wide enough for any use, narrow enough for float32; those of the penalties are OpenAI's.
        for name, least, most in (
            ("temperature", 0, 100),
            ("min_p", 0, 1),
            ("repetition_penalty", 0.01, 100),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}: it must be from {least} to {most}")

    @property
    def penalised(self) -> bool:
        """Whether the next token depends on which tokens were seen: `sample` then needs a `Seen`."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@flax.struct.dataclass
class Knobs:
    """The settings of each row, as arrays. What a row leaves off has the value that changes nothing."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    """0: off."""
    top_p_B: jax.Array
    min_p_B: jax.Array
    typical_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array

    @property
    def penalise(self) -> jax.Array:
        """Whether a row has penalties."""
        return jnp.any((self.repetition_B != 1) | (self.presence_B != 0) | (self.frequency_B != 0))


def knobs(configs: Sequence[SampleConfig]) -> Knobs:
    """The settings of as many rows, in NumPy: to be handed to a jitted function or written into those of a larger batch."""

    def floats(values: list[float]) -> Any:
        values_B = np.array(values, np.float64)
        # What float32 can hold only roughly, or as 0, is not left to the device: CPUs flush it, GPUs do not.
        return np.where(np.abs(values_B) < np.finfo(np.float32).tiny, 0, values_B).astype(np.float32)

    top_k_B: Any = np.array([min(config.top_k or 0, np.iinfo(np.int32).max) for config in configs], np.int32)
    return Knobs(
        floats([config.temperature for config in configs]),
        top_k_B,
        floats([1 if config.top_p is None else config.top_p for config in configs]),
        floats([config.min_p or 0 for config in configs]),
        floats([1 if config.typical_p is None else config.typical_p for config in configs]),
        floats([config.repetition_penalty for config in configs]),
        floats([config.presence_penalty for config in configs]),
        floats([config.frequency_penalty for config in configs]),
    )


@flax.struct.dataclass
class Seen:
    """What penalties look at: the tokens that stand in each row."""

    prompt_BV: jax.Array
    """True: the token stands in the prompt."""
    counts_BV: jax.Array
    """How many times each token stands in the text behind the prompt."""

    def take(self, token_B: jax.Array) -> "Seen":
        """The same after one more token of each text."""
        return self.replace(counts_BV=self.counts_BV.at[jnp.arange(token_B.shape[0]), token_B].add(1))  # type: ignore[attr-defined]


def seen_of(prompts: Sequence[Sequence[int]], V: int) -> Seen:
    """Rows with these prompts and no text as yet, in NumPy."""
    prompt_BV: Any = np.zeros((len(prompts), V), bool)
    counts_BV: Any = np.zeros((len(prompts), V), np.int32)
    for row_V, prompt in zip(prompt_BV, prompts, strict=True):
        row_V[np.asarray(prompt, np.int64)] = True
    return Seen(prompt_BV, counts_BV)


def adjust(logits_BV: jax.Array, knobs: Knobs, seen: Seen) -> jax.Array:
    """The logits after the penalties: repetition for prompt and text, as Hugging Face; presence and frequency for the text
    alone, as OpenAI's API and vLLM. Computed only where a row has one."""

    def penalised(logits_BV: jax.Array) -> jax.Array:
        said_BV, times_B1 = seen.counts_BV > 0, knobs.repetition_B[:, None]
        repeated_BV = jnp.where(logits_BV < 0, logits_BV * times_B1, logits_BV / times_B1)
        logits_BV = jnp.where(seen.prompt_BV | said_BV, repeated_BV, logits_BV)
        logits_BV -= knobs.presence_B[:, None] * said_BV.astype(jnp.float32)
        return logits_BV - knobs.frequency_B[:, None] * seen.counts_BV.astype(jnp.float32)

    return jax.lax.cond(knobs.penalise, penalised, lambda x: x, logits_BV)


def penalise_repetition(scores_RV: jax.Array, tokens_RH: jax.Array, penalty: float) -> jax.Array:
    """Scores after one penalty for all tokens of `tokens_RH`, −1 where there is none (Keskar et al. 2019)."""
    R, V = scores_RV.shape
    row_R1, token_RH = jnp.arange(R)[:, None], jnp.where(tokens_RH < 0, V, tokens_RH)
    there_RV = jnp.zeros((R, V), bool).at[row_R1, token_RH].set(True, mode="drop")
    return jnp.where(there_RV, jnp.where(scores_RV < 0, scores_RV * penalty, scores_RV / penalty), scores_RV)


def keep(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """Logits of the distribution that is drawn from: −inf outside, the likeliest token's 0.

    The order is that of Hugging Face: temperature, top_k, top_p, min_p, typical_p. Tokens as likely as the least likely one
    that is kept are kept too. Temperature 0 leaves the most likely token alone. A search of the vocabulary is dear: it is done
    only if some row asks for it.
    """
    warm_B = knobs.temperature_B > 0
    best_BV = jnp.arange(logits_BV.shape[-1])[None, :] == jnp.argmax(logits_BV, axis=-1)[:, None]
    below_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)  # so that no temperature makes infinities of them
    warm_BV = below_BV / jnp.where(warm_B, knobs.temperature_B, 1)[:, None]
    logits_BV = jnp.where(warm_B[:, None], warm_BV, jnp.where(best_BV, 0, -jnp.inf))
    ranked_B = warm_B & ((knobs.top_k_B > 0) | (knobs.top_p_B < 1))
    logits_BV = jax.lax.cond(jnp.any(ranked_B), _likeliest, lambda x, _: x, logits_BV, knobs)
    logits_BV = jnp.where(logits_BV >= jnp.log(knobs.min_p_B)[:, None], logits_BV, -jnp.inf)
    return jax.lax.cond(jnp.any(warm_B & (knobs.typical_p_B < 1)), _typical, lambda x, _: x, logits_BV, knobs)


def _likeliest(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    """top_k, then top_p of what it left: a token stays if the likelier ones are fewer than k, and together less than p."""
    k_B, p_B = knobs.top_k_B, knobs.top_p_B
    least_B1 = _least(logits_BV, lambda above_BV: (k_B > 0) & (jnp.sum(above_BV, axis=-1) >= k_B))
    logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    shares_BV = jax.nn.softmax(logits_BV, axis=-1)
    least_B1 = _least(logits_BV, lambda above_BV: (p_B < 1) & (jnp.sum(jnp.where(above_BV, shares_BV, 0), axis=-1) >= p_B))
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def _typical(logits_BV: jax.Array, knobs: Knobs) -> jax.Array:
    logp_BV, p_B = jax.nn.log_softmax(logits_BV, axis=-1), knobs.typical_p_B
    shares_BV = jnp.exp(logp_BV)
    entropy_B1 = -jnp.sum(jnp.where(shares_BV > 0, shares_BV * logp_BV, 0), axis=-1, keepdims=True)
    near_BV = -jnp.abs(-logp_BV - entropy_B1)
    least_B1 = _least(near_BV, lambda above_BV: (p_B < 1) & (jnp.sum(jnp.where(above_BV, shares_BV, 0), axis=-1) >= p_B))
    return jnp.where(near_BV >= least_B1, logits_BV, -jnp.inf)


def _least(values_BV: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The lowest bound (B, 1) of which the values above it are not `enough`; no value is above 0.

    Found bit by bit, as floats up to 0 stand in the reverse order of their bits, sign aside: 31 sums over the vocabulary,
    which take a tenth of the time of sorting it on a CPU.
    """

    def bound(bits_B: jax.Array) -> jax.Array:
        return -jax.lax.bitcast_convert_type(bits_B, jnp.float32)[:, None]

    def halve(i: jax.Array, bits_B: jax.Array) -> jax.Array:
        tried_B = bits_B + (jnp.int32(1) << (30 - i))
        lower_B = (tried_B <= INFINITY) & ~enough(values_BV > bound(tried_B))
        return jnp.where(lower_B, tried_B, bits_B)

    # Never above the largest value: a share that float32 holds as 0 is enough everywhere.
    start_B = jax.lax.bitcast_convert_type(jnp.abs(jnp.max(values_BV, axis=-1)), jnp.int32)
    return bound(jnp.maximum(start_B, jax.lax.fori_loop(0, 31, halve, jnp.zeros_like(start_B))))


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, knobs: Knobs, vocab_size: int,
    seen: Seen | None = None, allowed_BV: jax.Array | None = None, bias_BV: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Draw one token a row, (B,) int32, among the first `vocab_size` entries (the rest pad the table).

    Each row has its own key, so that what it draws depends on no other row. `seen` is needed where a row has penalties.
    `allowed_BV`: False where a token must not come (a grammar's); each row allows at least one.
    `bias_BV` is added after the penalties (a watermark's, or what a caller asks for). Where no row draws, none of this
    costs more than an argmax.
    """
    assert jnp.issubdtype(keys_B.dtype, jax.dtypes.prng_key) and keys_B.shape == logits_BV.shape[:1], "one key a row"
    logits_BV = real(logits_BV, vocab_size)
    if seen is not None:
        logits_BV = adjust(logits_BV, knobs, seen)
    if bias_BV is not None:
        logits_BV += bias_BV
    if allowed_BV is not None:
        logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)

    def draw(logits_BV: jax.Array) -> jax.Array:
        return jax.vmap(jax.random.categorical)(keys_B, keep(logits_BV, knobs)).astype(jnp.int32)

    def likeliest(logits_BV: jax.Array) -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    return jax.lax.cond(jnp.any(knobs.temperature_B > 0), draw, likeliest, logits_BV)


def real(logits_BV: jax.Array, vocab_size: int) -> jax.Array:
    """In float32, with −inf for entries that only pad the table."""
    real_V = jnp.arange(logits_BV.shape[-1]) < vocab_size
    return jnp.where(real_V[None, :], logits_BV.astype(jnp.float32), -jnp.inf)
