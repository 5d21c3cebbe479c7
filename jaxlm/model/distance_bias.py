"""Biases of attention scores that depend on the distance of key and query alone: made for a block of scores at a time.

Letters: B batch · L query length · S key length · N query heads · K key/value heads · G query heads per key/value head ·
Y distances from −(P − 1) to P − 1, for up to P places.

A bias is held as one number for each head and distance, 2P − 1 instead of P² numbers, and so is its gradient.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


def distance_range(places: int) -> jax.Array:
    """The distances (key − query) that the columns of a bias stand for, (Y,) int32."""
    return jnp.arange(1 - places, places, dtype=jnp.int32)


def grouped(bias_NY: jax.Array | None, kv_heads: int, margin: int = 0) -> jax.Array | None:
    """(K, G, Y): heads by key/value head, with `margin` more distances on both sides, as many as a block that begins among
    the true places may reach beyond them."""
    if bias_NY is None:
        return None
    bias_KGY = bias_NY.astype(jnp.float32).reshape(kv_heads, -1, bias_NY.shape[1])
    return jnp.pad(bias_KGY, ((0, 0), (0, 0), (margin, margin)))


def block_bias(bias_KGY: jax.Array, ahead: Any, L: int, S: int) -> jax.Array:
    """(1 or B, K, G, L, S): the biases of L queries and S keys, the first query `ahead` places behind the first key; () for
    all rows or (B,)."""

    def one(ahead: jax.Array) -> jax.Array:
        start = _start(bias_KGY.shape[-1], ahead, L)
        return _toeplitz(jax.lax.dynamic_slice_in_dim(bias_KGY, start, L + S - 1, axis=2), L)

    ahead = jnp.asarray(ahead)
    return one(ahead)[None] if ahead.ndim == 0 else jax.vmap(one)(ahead)


def add_block_gradient(total_BKGY: jax.Array, grad_BKGLS: jax.Array, ahead: Any) -> jax.Array:
    """`total_BKGY` and the gradient of `block_bias`, row by row: where devices split the rows, nothing is sent yet."""
    L, S = grad_BKGLS.shape[-2:]
    like = jax.ShapeDtypeStruct((*grad_BKGLS.shape[:3], L + S - 1), grad_BKGLS.dtype)
    (sums_BKGY,) = jax.linear_transpose(functools.partial(_toeplitz, L=L), like)(grad_BKGLS)

    def one(total_KGY: jax.Array, sums_KGY: jax.Array, ahead: jax.Array) -> jax.Array:
        start = _start(total_KGY.shape[-1], ahead, L)
        there = jax.lax.dynamic_slice_in_dim(total_KGY, start, L + S - 1, axis=2)
        return jax.lax.dynamic_update_slice_in_dim(total_KGY, there + sums_KGY, start, axis=2)

    ahead = jnp.asarray(ahead)
    return jax.vmap(one, in_axes=(0, 0, None if ahead.ndim == 0 else 0))(total_BKGY, sums_BKGY, ahead)


def _start(distances: int, ahead: jax.Array, L: int) -> jax.Array:
    """The column of the smallest distance in a block, that of its first key and its last query."""
    return (distances - 1) // 2 - ahead - (L - 1)


def _toeplitz(x_Y: jax.Array, L: int) -> jax.Array:
    """(…, L + S − 1) → (…, L, S), whose [l, s] is x[s − l + L − 1]: by copies and reshapes, without a gather."""
    *lead, count = x_Y.shape
    x_Y = jnp.pad(x_Y, [(0, 0)] * len(lead) + [(0, 1)])
    # Repeated and read in rows that are one shorter, each row begins one place earlier than the one before.
    repeated = jnp.broadcast_to(x_Y[..., None, :], (*lead, L, count + 1)).reshape(*lead, -1)
    return repeated[..., L - 1 : L - 1 + L * count].reshape(*lead, L, count)[..., : count - L + 1]


def alibi(distance_Y: jax.Array, heads: int) -> jax.Array:
    """(N, Y): a penalty that grows with the distance, by a slope for each head (Press et al. 2022, "Train Short, Test Long",
    §3; for numbers of heads that are no powers of two as in the released code)."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return -jnp.asarray(slopes, jnp.float32)[:, None] * jnp.abs(distance_Y).astype(jnp.float32)[None, :]
