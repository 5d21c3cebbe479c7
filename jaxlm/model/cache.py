"""The key/value cache of incremental decoding: a plain pytree of fixed size, filled from the front."""

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, `length` of them; X stands for the layers."""

    k_XBSKH: jax.Array
    v_XBSKH: jax.Array
    length: jax.Array


def empty_cache(config: TransformerConfig, batch: int, size: int | None = None) -> Cache:
    """A cache for `batch` rows of up to `size` tokens (default: the model's positions)."""
    shape = (config.layers, batch, size or config.positions, config.K, config.H)
    # Two arrays, not one twice: a jitted step that donates the cache may not be given a buffer twice.
    k, v = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    return Cache(k, v, jnp.zeros((), jnp.int32))
