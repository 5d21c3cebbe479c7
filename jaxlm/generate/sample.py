"""Logits → next token."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How the next token is drawn; top_k first, then top_p of what is left."""

    temperature: float = 0.8
    """Divides the logits; 0: always the most likely token."""
    top_k: int | None = None
    """Draw among this many most likely tokens."""
    top_p: float | None = None
    """Draw among the fewest tokens that hold this probability (Holtzman et al. 2020)."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}: it must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1")


def sample(logits_BV: jax.Array, key: jax.Array, config: SampleConfig, vocab_size: int) -> jax.Array:
    """Draw one token a row, (B,) int32, among the first `vocab_size` entries (the rest pad the table)."""
    allowed_V = jnp.arange(logits_BV.shape[-1]) < vocab_size
    logits_BV = jnp.where(allowed_V[None, :], logits_BV.astype(jnp.float32), -jnp.inf)
    if config.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / config.temperature
    if config.top_k is not None:
        kept_BK = jax.lax.top_k(logits_BV, min(config.top_k, logits_BV.shape[-1]))[0]
        logits_BV = jnp.where(logits_BV >= kept_BK[:, -1:], logits_BV, -jnp.inf)
    if config.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token is kept while the probability before it has not reached top_p: at least one always is.
        inside_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV < config.top_p
        least_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)
