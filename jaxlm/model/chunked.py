"""Attention over blocks of keys, one after the other: memory linear in length, on any platform.

Letters: B batch · L query length · S key length · N query heads · K key/value heads · G query heads per
key/value head (N / K) · H head width · Y distances of key and query.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.model.cache import At, KeyValue, block_of
from jaxlm.model.distance_bias import add_block_gradient, block_bias, grouped
from jaxlm.model.mask import Mask


class Plan(NamedTuple):
    """What is known of the blocks when compiling: their sizes, how many keys are true, and the cap."""

    rows: int
    keys: int
    size: int
    softcap: float | None


def chunked(
    q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask,
    scale: float, softcap: float | None, bias_NY: jax.Array | None, block: int = 512,
) -> jax.Array:  # fmt: skip
    """Attention without the matrix of scores: a running softmax over blocks of keys for each block of queries (Milakov
    and Gimelshein 2018), the scores computed again for the gradient (Dao et al. 2022, "FlashAttention", alg. 1 and 4).

    Blocks that the mask's places hide wholly are not computed; segments hide, but save nothing, and with a prefix no
    block is known to be hidden.
    """
    S = k_BSKH.shape[1]
    plan = Plan(even(q_BLNH.shape[1], block), even(S, block), S, softcap)
    k, v = (fill(jnp.swapaxes(x, 1, 2), {2: plan.keys}) for x in (k_BSKH, v_BSKH))
    return _shaped(plan, q_BLNH, k_BSKH.shape[2], mask, scale, bias_NY, lambda q, bias, mask: _stream(plan, q, k, v, bias, mask))


def chunked_cache(
    q_BLNH: jax.Array, held: KeyValue, at: At, mask: Mask,
    scale: float, softcap: float | None, bias_NY: jax.Array | None, size: int,
) -> jax.Array:  # fmt: skip
    """The same over what a layer's cache holds, in blocks of `size` places, of which there must be a whole number: each is
    read as it lies and where it lies, whichever rows of the cache are asked for, and of int8 no more than a block is
    widened. It has no gradient."""
    whole = jax.tree.leaves(held)[0]
    plan = Plan(even(q_BLNH.shape[1], size), size, whole.shape[2], softcap)

    def stream(q: jax.Array, bias: jax.Array | None, mask: Mask) -> jax.Array:
        return stream_forward(plan, q, *held, bias, mask, lambda x, j: block_of(x, at, j, size, q.dtype))[0]

    return _shaped(plan, q_BLNH, whole.shape[1], mask, scale, bias_NY, stream)


def _shaped(
    plan: Plan, q_BLNH: jax.Array, K: int, mask: Mask, scale: float, bias_NY: jax.Array | None,
    stream: Callable[[jax.Array, jax.Array | None, Mask], jax.Array],
) -> jax.Array:  # fmt: skip
    """What `stream` mixes for queries in whole blocks."""
    B, L, N, H = q_BLNH.shape
    q_BKGLH = jnp.moveaxis(q_BLNH.reshape(B, L, K, N // K, H), 1, 3) * jnp.asarray(scale, q_BLNH.dtype)
    if mask.key_segments_BS is not None:
        query = jnp.ones((1, L), jnp.int32) if mask.query_segments_BL is None else mask.query_segments_BL
        mask = dataclasses.replace(
            mask, query_segments_BL=fill(query, {1: plan.rows}), key_segments_BS=fill(mask.key_segments_BS, {1: plan.keys})
        )
    bias_KGY = grouped(bias_NY, K, max(plan.rows, plan.keys))
    mixed_BKGLH = stream(fill(q_BKGLH, {3: plan.rows}), bias_KGY, mask)[:, :, :, :L]
    return jnp.moveaxis(mixed_BKGLH, 3, 1).reshape(B, L, N, H)


def even(length: int, block: int, multiple: int = 16) -> int:
    """The size, at most `block`, of equal blocks over `length` that leaves the least over; a multiple if there are many."""
    if length <= block:
        return length
    return -(-length // -(-length // block) // multiple) * multiple


def fill(x: jax.Array, blocks: dict[int, int]) -> jax.Array:
    """Zeros behind x, so that these axes are whole blocks."""
    return jnp.pad(x, [(0, -length % blocks.get(axis, 1)) for axis, length in enumerate(x.shape)])


def _slice(x: jax.Array, axis: int, index: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _span(first: Any, last: Any, before: int | None, after: int | None, size: int, count: int) -> tuple[Any, Any]:
    """Blocks, from and up to, that hold any of the places first − before … last + after; None: without end."""
    start = 0 if before is None else jnp.clip((first - before) // size, 0, count)
    stop = count if after is None else jnp.clip((last + after) // size + 1, 0, count)
    return start, stop


def sight(mask: Mask) -> tuple[int | None, int | None]:
    """How many places before and after itself a query sees."""
    if mask.causal and mask.prefix_B is not None:
        return None, None
    if mask.causal:
        return None if mask.window is None else mask.window - 1, 0
    return (None, None) if mask.window is None else (mask.window // 2, mask.window // 2)


def _block_mask(plan: Plan, mask: Mask, i: Any, j: Any) -> jax.Array | None:
    """The mask of query block i and key block j, to be broadcast over heads; what was filled in is hidden."""
    query, key = mask.query_segments_BL, mask.key_segments_BS
    query = None if query is None else _slice(query, 1, i, plan.rows)
    key = None if key is None else _slice(key, 1, j, plan.keys)
    # Only the distance of query and key counts: block j's keys begin at 0 here.
    ahead = _ahead(plan, mask, i, j)
    prefix_B = None if mask.prefix_B is None else mask.prefix_B - j * plan.keys
    shown = dataclasses.replace(mask, query_segments_BL=query, key_segments_BS=key, seen=ahead, prefix_B=prefix_B)
    shown_BLS = shown.dense(plan.rows, plan.keys)
    if plan.size % plan.keys:
        true_S = jnp.arange(plan.keys, dtype=jnp.int32) < plan.size - j * plan.keys
        shown_BLS = true_S[None, None] if shown_BLS is None else shown_BLS & true_S[None, None]
    return None if shown_BLS is None else shown_BLS[:, None, None]


def _ahead(plan: Plan, mask: Mask, i: Any, j: Any) -> Any:
    """How many places behind block j's first key block i's first query stands."""
    return i * plan.rows - j * plan.keys + (0 if mask.seen is None else mask.seen)


def _block_scores(
    plan: Plan, q: jax.Array, k: jax.Array, bias: jax.Array | None, mask: Mask, i: Any, j: Any
) -> tuple[jax.Array, Any]:
    """Scores of the queries in block i and the keys in block j, and the slope of the cap where there is one."""
    scores_BKGLS, slope = jnp.einsum("BKGLH,BKSH->BKGLS", q, k, preferred_element_type=jnp.float32), None
    if plan.softcap is not None:
        bent = jnp.tanh(scores_BKGLS / plan.softcap)
        scores_BKGLS, slope = plan.softcap * bent, 1 - jnp.square(bent)
    if bias is not None:
        scores_BKGLS = scores_BKGLS + block_bias(bias, _ahead(plan, mask, i, j), plan.rows, plan.keys)
    return scores_BKGLS, slope


def _hide(shown: jax.Array | None, x: jax.Array, value: float) -> jax.Array:
    return x if shown is None else jnp.where(shown, x, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stream(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: Mask) -> jax.Array:
    return _stream_forward(plan, q, k, v, bias, mask)[0]


def _stream_forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: Mask
) -> tuple[jax.Array, Any]:
    mixed, logs = stream_forward(plan, q, k, v, bias, mask)
    return mixed, (q, k, v, bias, mask, mixed, logs)


def stream_forward(
    plan: Plan, q: jax.Array, k: Any, v: Any, bias: jax.Array | None, mask: Mask,
    take: Callable[[Any, Any], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Of q (B, K, G, L, H), scaled, k, v (B, K, S, H), whole blocks each, and a bias by distance (K, G, Y), a block wider than
    needed on both sides: what is mixed, like q, and the logarithm of
    the sum of all weights (B, K, G, L) in float32; where a query sees no key, that is float32's lowest number. `take` gives
    a block of k or v by its number; both may then be anything with S as their arrays' third axis."""
    take = take or (lambda x, j: _slice(x, 2, j, plan.keys))
    blocks = jax.tree.leaves(k)[0].shape[2] // plan.keys
    before, after = sight(mask)
    seen = jnp.int32(0) if mask.seen is None else mask.seen
    low = float(jnp.finfo(jnp.float32).min)

    def rows(_: None, i: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q_BKGLH = _slice(q, 3, i, plan.rows)

        def keys(j: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            most_BKGL, total_BKGL, mixed_BKGLH = carry
            v_BKSH, shown = take(v, j), _block_mask(plan, mask, i, j)
            scores, _ = _block_scores(plan, q_BKGLH, take(k, j), bias, mask, i, j)
            scores = _hide(shown, scores, low)
            higher_BKGL = jnp.maximum(most_BKGL, jnp.max(scores, axis=-1))
            # Hidden a second time: where no key was seen yet, the highest score is that of the hidden.
            weights = _hide(shown, jnp.exp(scores - higher_BKGL[..., None]), 0)
            shrink_BKGL = jnp.exp(most_BKGL - higher_BKGL)
            added = jnp.einsum("BKGLS,BKSH->BKGLH", weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
            total_BKGL = total_BKGL * shrink_BKGL + jnp.sum(weights, axis=-1)
            return higher_BKGL, total_BKGL, mixed_BKGLH * shrink_BKGL[..., None] + added

        # Rows that have seen different numbers of tokens go through the blocks of all of them.
        first, last = i * plan.rows + jnp.min(seen), (i + 1) * plan.rows - 1 + jnp.max(seen)
        start, stop = _span(first, last, before, after, plan.keys, blocks)
        zeros = jnp.zeros_like(q_BKGLH, dtype=jnp.float32)
        carry = (zeros[..., 0] + low, zeros[..., 0], zeros)
        most, total, mixed = jax.lax.fori_loop(start, stop, keys, carry)
        total = jnp.where(total == 0, 1, total)  # no key was seen at all
        return None, ((mixed / total[..., None]).astype(q.dtype), most + jnp.log(total))

    _, (mixed, logs) = jax.lax.scan(rows, None, jnp.arange(q.shape[3] // plan.rows, dtype=jnp.int32))
    return jnp.moveaxis(mixed, 0, 3).reshape(q.shape), jnp.moveaxis(logs, 0, 3).reshape(q.shape[:-1])


def _stream_backward(plan: Plan, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    q, k, v = saved[:3]
    dq, dk, dv, dbias = stream_backward(plan, saved, grad)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


def stream_backward(plan: Plan, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    """Gradients of q, k, v and the bias in float32, from what the forward pass was given and gave."""
    q, k, v, bias, mask, mixed, logs = saved
    before, after = sight(mask)
    seen = jnp.int32(0) if mask.seen is None else mask.seen
    along = jnp.sum(grad.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1)

    def keys(carry: tuple[Any, ...], j: jax.Array) -> tuple[tuple[Any, ...], tuple[jax.Array, jax.Array]]:
        k_BKSH, v_BKSH = _slice(k, 2, j, plan.keys), _slice(v, 2, j, plan.keys)

        def rows(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            dq, dbias, dk_BKSH, dv_BKSH = carry
            q_BKGLH, grad_BKGLH = _slice(q, 3, i, plan.rows), _slice(grad, 3, i, plan.rows)
            scores, slope = _block_scores(plan, q_BKGLH, k_BKSH, bias, mask, i, j)
            weights = jnp.exp(scores - _slice(logs, 3, i, plan.rows)[..., None])
            weights = _hide(_block_mask(plan, mask, i, j), weights, 0)
            dscores = jnp.einsum("BKGLH,BKSH->BKGLS", grad_BKGLH, v_BKSH, preferred_element_type=jnp.float32)
            dscores = weights * (dscores - _slice(along, 3, i, plan.rows)[..., None])
            if bias is not None:
                dbias = add_block_gradient(dbias, dscores, _ahead(plan, mask, i, j))
            if slope is not None:
                dscores = dscores * slope
            dscores, weights = dscores.astype(q.dtype), weights.astype(q.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            dq_BKGLH = _slice(dq, 3, i, plan.rows) + product("BKGLS,BKSH->BKGLH", dscores, k_BKSH)
            dq = jax.lax.dynamic_update_slice_in_dim(dq, dq_BKGLH, i * plan.rows, 3)
            dk_BKSH += product("BKGLS,BKGLH->BKSH", dscores, q_BKGLH)
            dv_BKSH += product("BKGLS,BKGLH->BKSH", weights, grad_BKGLH)
            return dq, dbias, dk_BKSH, dv_BKSH

        # The queries that see a key are those for which it lies within sight: before and after change places.
        first, last = j * plan.keys - jnp.max(seen), (j + 1) * plan.keys - 1 - jnp.min(seen)
        start, stop = _span(first, last, after, before, plan.rows, q.shape[3] // plan.rows)
        none = jnp.zeros_like(k_BKSH, dtype=jnp.float32)
        dq, dbias, dk_BKSH, dv_BKSH = jax.lax.fori_loop(start, stop, rows, (*carry, none, none))
        return (dq, dbias), (dk_BKSH, dv_BKSH)

    carry: tuple[Any, ...] = (
        jnp.zeros_like(q, dtype=jnp.float32),
        None if bias is None else jnp.zeros((q.shape[0], *bias.shape), jnp.float32),
    )
    (dq, dbias), (dk, dv) = jax.lax.scan(keys, carry, jnp.arange(k.shape[2] // plan.keys, dtype=jnp.int32))
    dk, dv = (jnp.moveaxis(x, 0, 2).reshape(k.shape) for x in (dk, dv))
    return dq, dk, dv, None if dbias is None else jnp.sum(dbias, axis=0)


_stream.defvjp(_stream_forward, _stream_backward)
