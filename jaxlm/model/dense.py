"""Attention by plain products of whole matrices, for XLA to compile anywhere; its gradient written out.

Letters: B batch · L query length · S key length · N query heads · K key/value heads · G query heads per
key/value head (N / K) · H head width · Y distances of key and query.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.model.distance_bias import add_block_gradient, block_bias, grouped
from jaxlm.model.mask import Mask


def xla(
    q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask,
    scale: float, softcap: float | None, bias_NY: jax.Array | None, drop: tuple[float, jax.Array] | None,
) -> jax.Array:  # fmt: skip
    B, L, N, H = q_BLNH.shape
    S, K = k_BSKH.shape[1:3]
    # Heads first: the products are then plain batched matrix products, without a transpose of the scores.
    q_BKGLH = jnp.moveaxis(q_BLNH.reshape(B, L, K, N // K, H), 1, 3) * jnp.asarray(scale, q_BLNH.dtype)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    mask_BLS = mask.dense(L, S)
    mask_BKGLS = None if mask_BLS is None else mask_BLS[:, None, None, :, :]
    bias_KGY, seen = grouped(bias_NY, K), jnp.int32(0) if mask.seen is None else mask.seen
    rate, kept_BKGLS = 0.0, None
    if drop is not None:
        rate, key = drop
        kept_BKGLS = jax.random.bernoulli(key, 1 - rate, (B, K, N // K, L, S))
    # Blocks of queries, each against the keys up to its own end; under 64 rows they cost more than they save.
    square = mask.causal and mask.seen is None and mask.prefix_B is None
    blocks = max(1, min(4, L // 64)) if square else 1
    parts, start = [], 0
    for i in range(blocks):
        rows = slice(start, L * (i + 1) // blocks)
        keys = slice(0, rows.stop if square else S)
        shown, kept = (None if x is None else x[:, :, :, rows, keys] for x in (mask_BKGLS, kept_BKGLS))
        own = (q_BKGLH[:, :, :, rows], k_BKSH[:, :, keys], v_BKSH[:, :, keys], shown)
        parts.append(weigh(softcap, rate, *own, bias_KGY, seen + start, kept))
        start = rows.stop
    mixed_BKGLH = jnp.concatenate(parts, axis=3) if blocks > 1 else parts[0]
    return jnp.moveaxis(mixed_BKGLH, 3, 1).reshape(B, L, N, H)


def _scores(softcap: float | None, q: jax.Array, k: jax.Array, bias: jax.Array | None, ahead: jax.Array) -> jax.Array:
    scores_BKGLS = jnp.einsum("BKGLH,BKSH->BKGLS", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores_BKGLS = softcap * jnp.tanh(scores_BKGLS / softcap)
    return scores_BKGLS if bias is None else scores_BKGLS + block_bias(bias, ahead, q.shape[3], k.shape[2])


def _weights(
    softcap: float | None, q: jax.Array, k: jax.Array, mask: jax.Array | None, bias: jax.Array | None, ahead: jax.Array
) -> jax.Array:
    scores_BKGLS = _scores(softcap, q, k, bias, ahead)
    if mask is not None:
        scores_BKGLS = jnp.where(mask, scores_BKGLS, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores_BKGLS, axis=-1).astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weigh(
    softcap: float | None, rate: float, q_BKGLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array,
    mask_BKGLS: jax.Array | None, bias_KGY: jax.Array | None, ahead: jax.Array, kept_BKGLS: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The products and the softmax; `bias_KGY` are biases by distance, for queries that begin `ahead` places behind the keys,
    and `kept_BKGLS` the weights that dropout at `rate` leaves.

    The gradient is written out: softmax's needs Σ p·dp, which is the row sum of output · gradient (Dao et al. 2022,
    "FlashAttention", §B.2), over H numbers instead of S.
    """
    return _weigh_forward(softcap, rate, q_BKGLH, k_BKSH, v_BKSH, mask_BKGLS, bias_KGY, ahead, kept_BKGLS)[0]


def _kept(rate: float, x: jax.Array, kept: jax.Array | None) -> jax.Array:
    """What is left after dropout, the rest made larger for it."""
    return x if kept is None else jnp.where(kept, x / (1 - rate), 0)


def _weigh_forward(
    softcap: float | None, rate: float, q: jax.Array, k: jax.Array, v: jax.Array,
    mask: jax.Array | None, bias: jax.Array | None, ahead: jax.Array, kept: jax.Array | None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    weights = _weights(softcap, q, k, mask, bias, ahead)
    mixed = jnp.einsum("BKGLS,BKSH->BKGLH", _kept(rate, weights, kept), v)
    # Of the bias only its shape is needed, but residuals are arrays.
    return mixed, (q, k, v, weights, mixed, bias, ahead, kept)


def _weigh_backward(softcap: float | None, rate: float, saved: Any, grad_BKGLH: jax.Array) -> tuple[Any, ...]:
    q, k, v, weights, mixed, bias, ahead, kept = saved
    along = jnp.sum((grad_BKGLH * mixed).astype(jnp.float32), axis=-1, keepdims=True)
    grad_BKGLS = jnp.einsum("BKGLH,BKSH->BKGLS", grad_BKGLH, v, preferred_element_type=jnp.float32)
    grad_BKGLS = weights.astype(jnp.float32) * (_kept(rate, grad_BKGLS, kept) - along)
    grad_bias = None
    if bias is not None:
        zeros_BKGY = jnp.zeros((grad_BKGLS.shape[0], *bias.shape), jnp.float32)
        grad_bias = jnp.sum(add_block_gradient(zeros_BKGY, grad_BKGLS, ahead), axis=0)
    if softcap is not None:  # the cap's slope, 1 − tanh², from the scores computed again
        raw = jnp.einsum("BKGLH,BKSH->BKGLS", q, k, preferred_element_type=jnp.float32)
        grad_BKGLS = grad_BKGLS * (1 - jnp.square(jnp.tanh(raw / softcap)))
    grad_BKGLS = grad_BKGLS.astype(q.dtype)
    return (
        jnp.einsum("BKGLS,BKSH->BKGLH", grad_BKGLS, k),
        jnp.einsum("BKGLS,BKGLH->BKSH", grad_BKGLS, q),
        jnp.einsum("BKGLS,BKGLH->BKSH", _kept(rate, weights, kept), grad_BKGLH),
        None,
        grad_bias,
        None,
        None,
    )


weigh.defvjp(_weigh_forward, _weigh_backward)
