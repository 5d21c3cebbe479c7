"""The key/value cache of incremental decoding: plain pytrees of fixed size, filled from the front.

Letters: X layers · B batch · L new tokens · S key length · K key/value heads · H head width · G rows that one text has
become (beams). Heads stand before places: the products of a step then read the cache as it lies.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig
from jaxlm.parallel.rules import constrain


@flax.struct.dataclass
class Source:
    """What the layers of a decoder read of an encoder's text, computed once: keys, values, and where no padding is."""

    k_XBKSH: jax.Array
    v_XBKSH: jax.Array
    segments_BS: jax.Array | None = None


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, `length` of them in every row."""

    k_XBKSH: jax.Array
    v_XBKSH: jax.Array
    length: jax.Array
    start_B: jax.Array | None = None
    """Where each row's text begins; before it stands padding, which nothing sees. None: at 0."""
    holder_BGS: jax.Array | None = None
    """After `spread`: which of a text's rows holds the keys and values of each place of each of them."""
    source: Source | None = None
    """Of an encoder-decoder, once it has seen its encoder's text. It may have fewer rows: those of `spread` share one."""


def empty_cache(config: TransformerConfig, batch: int, size: int | None = None) -> Cache:
    """A cache for `batch` rows of up to `size` tokens (default: the model's positions)."""
    shape = (config.stacks["decoder"], batch, config.K, size or config.positions, config.H)
    # Two arrays, not one twice: a jitted step that donates the cache may not be given a buffer twice.
    k, v = (constrain(jnp.zeros(shape, config.dtype), "XBKSH") for _ in range(2))
    return Cache(k, v, jnp.zeros((), jnp.int32))


def grow(cache: Cache, size: int) -> Cache:
    """The same with room for `size` tokens."""
    more = size - cache.k_XBKSH.shape[3]
    assert more >= 0, "a cache does not shrink"
    k, v = (jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, more), (0, 0)]) for x in (cache.k_XBKSH, cache.v_XBKSH))
    cache = dataclasses.replace(cache, k_XBKSH=k, v_XBKSH=v)
    if cache.holder_BGS is None:
        return cache
    rows, times, old = cache.holder_BGS.shape
    holder_BGS = jnp.concatenate([cache.holder_BGS, _itself(rows, times, size - old)], axis=2)
    return dataclasses.replace(cache, holder_BGS=holder_BGS)


def extend(
    all_XBKSH: jax.Array, new_BLKH: jax.Array, layer: jax.Array, length: jax.Array, holder_BGS: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`new_BLKH` written behind the `length` tokens of a layer; what that layer holds then, (B, S, K, H)."""
    new = jnp.swapaxes(new_BLKH, 1, 2)[None]
    all_XBKSH = jax.lax.dynamic_update_slice(all_XBKSH, new, (layer, 0, 0, length, 0))
    held_BKSH = jax.lax.dynamic_index_in_dim(all_XBKSH, layer, keepdims=False)
    if holder_BGS is not None:
        grouped = held_BKSH.reshape(*holder_BGS.shape[:2], *held_BKSH.shape[1:])
        grouped = jnp.take_along_axis(grouped, holder_BGS[:, :, None, :, None], axis=1)
        held_BKSH = grouped.reshape(held_BKSH.shape)
    return all_XBKSH, jnp.swapaxes(held_BKSH, 1, 2)


def spread(cache: Cache, times: int) -> Cache:
    """Each row `times` times, one behind the other; they go on sharing their source."""
    k, v = (constrain(jnp.repeat(x, times, axis=1), "XBKSH") for x in (cache.k_XBKSH, cache.v_XBKSH))
    start_B = None if cache.start_B is None else jnp.repeat(cache.start_B, times)
    _, rows, _, size, _ = cache.k_XBKSH.shape
    return dataclasses.replace(cache, k_XBKSH=k, v_XBKSH=v, start_B=start_B, holder_BGS=_itself(rows, times, size))


def _itself(rows: int, times: int, size: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(times, dtype=jnp.int32)[None, :, None], (rows, times, size))


def reorder(cache: Cache, parent_BG: jax.Array) -> Cache:
    """Row g of each text goes on from what its row `parent_BG[:, g]` was. Keys and values stay where they are: it is
    only noted who holds them."""
    assert cache.holder_BGS is not None, "only rows that `spread` has made stand for each other"
    seen_S = jnp.arange(cache.holder_BGS.shape[2]) < cache.length
    parents = jnp.take_along_axis(cache.holder_BGS, parent_BG[:, :, None], axis=1)
    holder_BGS = jnp.where(seen_S[None, None, :], parents, _itself(*parents.shape))
    return dataclasses.replace(cache, holder_BGS=holder_BGS)
