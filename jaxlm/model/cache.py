"""The key/value cache of incremental decoding: plain pytrees of fixed size, filled from the front.

Each layer has an array of its own, and a call with a cache goes through the layers one by one: an array that holds all of
them must be cut for each, which on a CPU copies it.

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
from jaxlm.model.mask import places
from jaxlm.parallel.rules import constrain


@flax.struct.dataclass
class Rounded:
    """Keys or values in int8, with a float32 scale for each head and place (…, S, 1): of float32 they take 27% of the
    bytes at heads of 64 numbers."""

    number: jax.Array
    scale: jax.Array


Held = jax.Array | Rounded
KeyValue = tuple[Held, Held]
"""A layer's keys and values, (B, K, S, H) each."""
Read = tuple[jax.Array, jax.Array]
"""The same of an encoder's text, which is never rounded."""


@flax.struct.dataclass
class Source:
    """What the layers of a decoder read of an encoder's text, computed once: keys, values, and where no padding is."""

    layers: tuple[Read, ...]
    segments_BS: jax.Array | None = None


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, `length` of them in every row."""

    layers: tuple[KeyValue, ...]
    length: jax.Array
    """() of all rows, or (B,) of each."""
    start_B: jax.Array | None = None
    """Where each row's text begins; before it stands padding, which nothing sees. None: at 0."""
    holder_BGS: jax.Array | None = None
    """After `spread`: which of a text's rows holds the keys and values of each place of each of them."""
    source: Source | None = None
    """Of an encoder-decoder, once it has seen its encoder's text. It may have fewer rows: those of `spread` share one."""
    rows_B: jax.Array | None = None
    """The cache's rows that the rows of a call are (`only`); None: all, in their order."""
    size: int = flax.struct.field(pytree_node=False, kw_only=True)
    """How many tokens it has room for."""
    limits: tuple[int | None, ...] = flax.struct.field(pytree_node=False, default=())
    """The most places that each layer has: one with fewer than `size` is a ring, in which a token at place p lies at
    p mod its places."""

    @property
    def rows(self) -> int:
        return int(jax.tree.leaves(self.layers)[0].shape[0])

    def map(self, change: Callable[[jax.Array], jax.Array]) -> "Cache":
        """The same with other keys and values, each array of (B, K, S, ·) changed."""
        return dataclasses.replace(self, layers=jax.tree.map(change, self.layers))


@flax.struct.dataclass
class At:
    """Where a call writes in a layer's keys and values, and who holds what it reads."""

    length: jax.Array
    holder_BGS: jax.Array | None = None
    rows_B: jax.Array | None = None
    """Which of the cache's rows these are; None: all."""
    ring: bool = flax.struct.field(pytree_node=False, default=False)
    """Of a ring the last places are read in their order, up to the last new one."""


def empty_cache(config: TransformerConfig, batch: int, size: int | None = None, *, piece: int | None = None) -> Cache:
    """A cache for `batch` rows of up to `size` tokens (default: the model's positions).

    With `piece`, the most tokens of a call, layers that see a window only have room for window + piece: the length may then
    be set back by what the last call wrote, and no further.
    """
    size, ring = size or config.positions, None if piece is None else config.window + piece
    limits = tuple(ring if local else None for local in config.local(config.stacks["decoder"]))

    # Each an array of its own: a jitted step that donates the cache may not be given a buffer twice.
    def zeros(room: int) -> Held:
        def of(dtype: Any, width: int) -> jax.Array:
            return constrain(jnp.zeros((batch, config.K, room, width), dtype), "BKSH")

        return Rounded(of(jnp.int8, config.H), of(jnp.float32, 1)) if config.cache == "int8" else of(config.dtype, config.H)

    layers = tuple((zeros(_room(size, most)), zeros(_room(size, most))) for most in limits)
    return Cache(layers, jnp.zeros((), jnp.int32), size=size, limits=limits)


def _room(size: int, most: int | None) -> int:
    return size if most is None else min(size, most)


def grow(cache: Cache, size: int) -> Cache:
    """The same with room for `size` tokens."""
    assert size >= cache.size, "a cache does not shrink"

    def wider(layer: KeyValue, most: int | None) -> KeyValue:
        def pad(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, 0), (0, 0), (0, _room(size, most) - x.shape[2]), (0, 0)])

        padded: KeyValue = jax.tree.map(pad, layer)
        return padded

    cache = dataclasses.replace(cache, layers=tuple(map(wider, cache.layers, cache.limits)), size=size)
    if cache.holder_BGS is None:
        return cache
    rows, times, old = cache.holder_BGS.shape
    holder_BGS = jnp.concatenate([cache.holder_BGS, _itself(rows, times, size - old)], axis=2)
    return dataclasses.replace(cache, holder_BGS=holder_BGS)


def write(held: Held, new_BLKH: jax.Array, at: At) -> Held:
    """Keys or values of new tokens behind the `at.length` ones that a layer holds."""
    new = jnp.swapaxes(new_BLKH, 1, 2)
    coded = _rounded(new) if isinstance(held, Rounded) else new
    written: Held = jax.tree.map(lambda all_, one: _write(all_, one, at), held, coded)
    return written


def read(held: Held, at: At, new: int, dtype: Any) -> jax.Array:
    """Keys or values that a layer holds once `new` tokens were written: (B, S, K, H)."""
    holder_BGS = at.holder_BGS

    def own(x: jax.Array) -> jax.Array:
        x = x if at.rows_B is None else x[at.rows_B]
        if at.ring:
            size = x.shape[2]
            x = jnp.take_along_axis(x, (places(size, at.length + new) % size)[:, None, :, None], axis=2)
        if holder_BGS is None:
            return x
        grouped = x.reshape(*holder_BGS.shape[:2], *x.shape[1:])
        return jnp.take_along_axis(grouped, holder_BGS[:, :, None, :, None], axis=1).reshape(x.shape)

    return jnp.swapaxes(widened(jax.tree.map(own, held), dtype), 1, 2)


def block_of(held: Held, at: At, index: jax.Array, size: int, dtype: Any) -> jax.Array:
    """Of what a layer holds, no ring, the block `index` of `size` places, as it lies: (B, K, size, H)."""

    def own(x: jax.Array) -> jax.Array:
        place = index * size
        if at.rows_B is None:
            return jax.lax.dynamic_slice_in_dim(x, place, size, axis=2)
        some = (1, x.shape[1], size, x.shape[3])
        return jax.vmap(lambda row: jax.lax.dynamic_slice(x, (row, 0, place, 0), some)[0])(at.rows_B)

    return widened(jax.tree.map(own, held), dtype)


def widened(held: Held, dtype: Any) -> jax.Array:
    return held.number.astype(dtype) * held.scale.astype(dtype) if isinstance(held, Rounded) else held


def _write(held: jax.Array, new_BKLH: jax.Array, at: At) -> jax.Array:
    (B, _, L, _), length, rows_B = new_BKLH.shape, at.length, at.rows_B
    if not at.ring and (length.ndim == 0 or B == 1):  # all of it lies together
        return jax.lax.dynamic_update_slice(held, new_BKLH, (0 if rows_B is None else rows_B[0], 0, jnp.ravel(length)[0], 0))
    place_BL = jnp.broadcast_to(places(L, length), (B, L))
    place_BL = place_BL % held.shape[2] if at.ring else place_BL
    row_B = jnp.arange(B) if rows_B is None else rows_B
    return held.at[row_B[:, None], :, place_BL].set(jnp.swapaxes(new_BKLH, 1, 2), unique_indices=True)


def _rounded(x_BKLH: jax.Array) -> Rounded:
    """To the nearest of 255 numbers, up to the largest of each head at each place."""
    largest = jnp.max(jnp.abs(x_BKLH.astype(jnp.float32)), axis=-1, keepdims=True)
    scale = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
    return Rounded(jnp.round(x_BKLH.astype(jnp.float32) / scale).astype(jnp.int8), scale)


def only(cache: Cache, rows_B: jax.Array) -> Cache:
    """The cache for calls of these of its rows, each named once, which go on in place; there must be no ring."""
    return dataclasses.replace(cache, rows_B=rows_B, length=cache.length[rows_B])


def repeat(cache: Cache, times: int) -> Cache:
    """Each row `times` times, one behind the other; they go on sharing their source."""
    start_B = None if cache.start_B is None else jnp.repeat(cache.start_B, times)
    cache = cache.map(lambda x: constrain(jnp.repeat(x, times, axis=0), "BKSH"))
    return dataclasses.replace(cache, start_B=start_B)


def level(cache: Cache, row_B: jax.Array) -> Cache:
    """After `repeat` and one more token of each row: all rows of a text hold what its row `row_B` holds of that token."""
    assert cache.length.ndim == 0, "rows that level each other are of one length"
    rows = cache.rows
    times, place = rows // row_B.shape[0], cache.length - 1
    from_R = jnp.repeat(jnp.arange(0, rows, times) + row_B, times)

    def change(x: jax.Array) -> jax.Array:
        at = place % x.shape[2]
        last = jnp.take(jax.lax.dynamic_slice_in_dim(x, at, 1, axis=2), from_R, axis=0)
        return jax.lax.dynamic_update_slice_in_dim(x, last, at, axis=2)

    return cache.map(change)


def spread(cache: Cache, times: int) -> Cache:
    """`repeat`, of rows that will take each other's place (`reorder`)."""
    return dataclasses.replace(repeat(cache, times), holder_BGS=_itself(cache.rows, times, cache.size))


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
