"""The key/value cache of incremental decoding: plain pytrees of fixed size, filled from the front.

Keys and values of all layers are one array, for layers that are scanned, or one array a layer, for layers that stand
apart (`functions.apart`): an array that holds all must be cut for each layer, which on a CPU copies it.

Letters: X layers · B batch · L new tokens · S key length · K key/value heads · H head width · G rows that one text has
become (beams). Heads stand before places: the products of a step then read the cache as it lies.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig
from jaxlm.parallel.rules import constrain


@flax.struct.dataclass
class Rounded:
    """Keys or values in int8, with a float32 scale for each head and place (…, S, 1): of float32 they take 27% of the
    bytes at heads of 64 numbers."""

    number: jax.Array
    scale: jax.Array


Held = jax.Array | Rounded
Layers = Held | tuple[Held, ...]
"""(X, B, K, S, H) of all layers, or (B, K, S, H) of each."""


@flax.struct.dataclass
class Source:
    """What the layers of a decoder read of an encoder's text, computed once: keys, values, and where no padding is."""

    k_XBKSH: Layers
    v_XBKSH: Layers
    segments_BS: jax.Array | None = None


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, `length` of them in every row."""

    k_XBKSH: Layers
    v_XBKSH: Layers
    length: jax.Array
    """() of all rows, or (B,) of each."""
    start_B: jax.Array | None = None
    """Where each row's text begins; before it stands padding, which nothing sees. None: at 0."""
    holder_BGS: jax.Array | None = None
    """After `spread`: which of a text's rows holds the keys and values of each place of each of them."""
    source: Source | None = None
    """Of an encoder-decoder, once it has seen its encoder's text. It may have fewer rows: those of `spread` share one."""
    size: int = flax.struct.field(pytree_node=False, kw_only=True)
    """How many tokens it has room for."""
    limits: tuple[int | None, ...] = flax.struct.field(pytree_node=False, default=())
    """Of layers that stand apart, the most places that each has: one with fewer than `size` is a ring, in which a token at
    place p lies at p mod its places."""

    def map(self, change: Callable[[jax.Array], jax.Array]) -> "Cache":
        """The same with other keys and values, each array of (…, B, K, S, H) changed."""
        k, v = jax.tree.map(change, (self.k_XBKSH, self.v_XBKSH))
        return dataclasses.replace(self, k_XBKSH=k, v_XBKSH=v)


@flax.struct.dataclass
class At:
    """Where a call writes in a layer's keys and values, and who holds what it reads."""

    length: jax.Array
    holder_BGS: jax.Array | None = None
    ring: bool = flax.struct.field(pytree_node=False, default=False)
    """Of a ring the last places are read in their order, up to the last new one."""


def empty_cache(
    config: TransformerConfig, batch: int, size: int | None = None, *, apart: bool = False, piece: int | None = None
) -> Cache:
    """A cache for `batch` rows of up to `size` tokens (default: the model's positions), for layers that stand `apart` or not.

    With `piece`, the most tokens of a call, layers that stand apart and see a window only have room for window + piece:
    the length may then be set back by what the last call wrote, and no further.
    """
    layers, size = config.stacks["decoder"], size or config.positions
    limits: tuple[int | None, ...] = ()
    if apart:
        ring = None if piece is None else config.window + piece
        limits = tuple(ring if local else None for local in config.local(layers))

    # Each an array of its own: a jitted step that donates the cache may not be given a buffer twice.
    def zeros(room: int, *more: int) -> Held:
        whole = (*more, batch, config.K, room, config.H)

        def of(dtype: Any, width: int) -> jax.Array:
            return constrain(jnp.zeros((*whole[:-1], width), dtype), "XBKSH"[-len(whole) :])

        return Rounded(of(jnp.int8, config.H), of(jnp.float32, 1)) if config.cache == "int8" else of(config.dtype, config.H)

    k, v = (tuple(zeros(_room(size, most)) for most in limits) if apart else zeros(size, layers) for _ in range(2))
    return Cache(k, v, jnp.zeros((), jnp.int32), size=size, limits=limits)


def _room(size: int, most: int | None) -> int:
    return size if most is None else min(size, most)


def grow(cache: Cache, size: int) -> Cache:
    """The same with room for `size` tokens."""
    assert size >= cache.size, "a cache does not shrink"

    def wider(held: Held, most: int | None) -> Held:
        def pad(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, _room(size, most) - x.shape[-2]), (0, 0)])

        padded: Held = jax.tree.map(pad, held)
        return padded

    def each(layers: Layers) -> Layers:
        return tuple(map(wider, layers, cache.limits)) if isinstance(layers, tuple) else wider(layers, None)

    cache = dataclasses.replace(cache, k_XBKSH=each(cache.k_XBKSH), v_XBKSH=each(cache.v_XBKSH), size=size)
    if cache.holder_BGS is None:
        return cache
    rows, times, old = cache.holder_BGS.shape
    holder_BGS = jnp.concatenate([cache.holder_BGS, _itself(rows, times, size - old)], axis=2)
    return dataclasses.replace(cache, holder_BGS=holder_BGS)


def extend(held: Held, new_BLKH: jax.Array, layer: jax.Array | int, at: At) -> tuple[Held, jax.Array]:
    """`new_BLKH` written behind the `at.length` tokens of a layer, in what all layers hold or this one; what this one holds
    then, (B, S, K, H)."""
    holder_BGS, L = at.holder_BGS, new_BLKH.shape[1]
    new = jnp.swapaxes(new_BLKH, 1, 2)
    coded = _rounded(new) if isinstance(held, Rounded) else new
    held = jax.tree.map(lambda all_, one: _write(all_, one, layer, at), held, coded)

    def read(x: jax.Array) -> jax.Array:
        own = jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) if x.ndim == 5 else x
        if at.ring:
            size = own.shape[2]
            from_BS = jnp.atleast_1d(at.length + L)[:, None] + jnp.arange(size)[None, :]
            own = jnp.take_along_axis(own, (from_BS % size)[:, None, :, None], axis=2)
        if holder_BGS is None:
            return own
        grouped = own.reshape(*holder_BGS.shape[:2], *own.shape[1:])
        return jnp.take_along_axis(grouped, holder_BGS[:, :, None, :, None], axis=1).reshape(own.shape)

    own: Held = jax.tree.map(read, held)
    if isinstance(own, Rounded):
        own = own.number.astype(new.dtype) * own.scale.astype(new.dtype)
    return held, jnp.swapaxes(own, 1, 2)


def _write(held: jax.Array, new_BKLH: jax.Array, layer: jax.Array | int, at: At) -> jax.Array:
    length = at.length
    if at.ring:
        (rows, _, size, _), L = held.shape, new_BKLH.shape[2]
        place_BL = jnp.broadcast_to(jnp.atleast_1d(length)[:, None] + jnp.arange(L)[None, :], (rows, L)) % size
        return jax.vmap(lambda row, new, place: row.at[:, place].set(new))(held, new_BKLH, place_BL)
    if held.ndim == 5:
        assert length.ndim == 0, "rows of different lengths need layers that stand apart"
        return jax.lax.dynamic_update_slice(held, new_BKLH[None], (layer, 0, 0, length, 0))
    if length.ndim == 0:
        return jax.lax.dynamic_update_slice(held, new_BKLH, (0, 0, length, 0))
    return jax.vmap(lambda row, new, place: jax.lax.dynamic_update_slice(row, new, (0, place, 0)))(held, new_BKLH, length)


def _rounded(x_BKLH: jax.Array) -> Rounded:
    """To the nearest of 255 numbers, up to the largest of each head at each place."""
    largest = jnp.max(jnp.abs(x_BKLH.astype(jnp.float32)), axis=-1, keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
    return Rounded(jnp.round(x_BKLH.astype(jnp.float32) / scale).astype(jnp.int8), scale)


def repeat(cache: Cache, times: int) -> Cache:
    """Each row `times` times, one behind the other; they go on sharing their source."""
    start_B = None if cache.start_B is None else jnp.repeat(cache.start_B, times)
    cache = cache.map(lambda x: constrain(jnp.repeat(x, times, axis=-4), "XBKSH"[-x.ndim :]))
    return dataclasses.replace(cache, start_B=start_B)


def level(cache: Cache, row_B: jax.Array) -> Cache:
    """After `repeat` and one more token of each row: all rows of a text hold what its row `row_B` holds of that token."""
    assert cache.length.ndim == 0, "rows that level each other are of one length"
    rows = jax.tree.leaves(cache.k_XBKSH)[0].shape[-4]
    times, place = rows // row_B.shape[0], cache.length - 1
    from_R = jnp.repeat(jnp.arange(0, rows, times) + row_B, times)

    def change(x: jax.Array) -> jax.Array:
        at = place % x.shape[-2]
        last = jnp.take(jax.lax.dynamic_slice_in_dim(x, at, 1, x.ndim - 2), from_R, axis=x.ndim - 4)
        return jax.lax.dynamic_update_slice_in_dim(x, last, at, x.ndim - 2)

    return cache.map(change)


def spread(cache: Cache, times: int) -> Cache:
    """`repeat`, of rows that will take each other's place (`reorder`)."""
    rows = jax.tree.leaves(cache.k_XBKSH)[0].shape[-4]
    return dataclasses.replace(repeat(cache, times), holder_BGS=_itself(rows, times, cache.size))


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
