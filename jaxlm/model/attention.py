"""Attention: which key each query may see, the weighted sum, and the layer around it.

Letters: B batch · L query length · S key length · D model width · N query heads · K key/value heads ·
G query heads per key/value head (N / K) · H head width.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import Linear, Norm, rotate

Angles = tuple[jax.Array, jax.Array]
LayerCache = tuple[jax.Array, jax.Array]


def attention_mask(length: int, segments_BL: jax.Array | None, seen: jax.Array | None, size: int) -> jax.Array:
    """True where query l may look at key s: (1 or B, L, S).

    Causal by place in the row; within one segment where segments are given; with a cache the queries
    stand behind its `seen` tokens and the keys are its `size` slots.
    """
    query_L = jnp.arange(length, dtype=jnp.int32) + (0 if seen is None else seen)
    mask = query_L[None, :, None] >= jnp.arange(size, dtype=jnp.int32)[None, None, :]
    if segments_BL is not None:
        assert seen is None, "packed rows are for training: a cache holds one document a row"
        mask = mask & (segments_BL[:, :, None] == segments_BL[:, None, :])
    return mask


def attend(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BLS: jax.Array,
    *,
    causal: bool = False,
    drop: nn.Dropout | None = None,
) -> jax.Array:
    """softmax(q·kᵀ/√H + mask)·v, the softmax in float32 (Vaswani et al. 2017, eq. 1) → (B, L, N, H).

    Query heads share key/value heads in groups of N / K (Ainslie et al. 2023, "GQA"). `causal` promises
    that the mask hides every key behind its query (L = S), most of which are then never computed.
    """
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    # Heads first: the products are then plain batched matrix products, without a transpose of the scores.
    q_BKGLH = jnp.moveaxis(q_BLNH.reshape(B, L, K, N // K, H), 1, 3) * (1 / math.sqrt(H))
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    mask_BKGLS = mask_BLS[:, None, None, :, :]
    if drop is not None:
        mixed_BKGLH = _mix(drop(_weights(q_BKGLH, k_BKSH, mask_BKGLS)), v_BKSH)
    else:
        # Blocks of queries, each against the keys up to its own end; under 64 rows they cost more than they save.
        blocks = max(1, min(4, L // 64)) if causal else 1
        parts, start = [], 0
        for i in range(blocks):
            rows = slice(start, L * (i + 1) // blocks)
            keys = slice(0, rows.stop if causal else k_BKSH.shape[2])
            mask = mask_BKGLS[:, :, :, rows, keys]
            parts.append(weigh(q_BKGLH[:, :, :, rows], k_BKSH[:, :, keys], v_BKSH[:, :, keys], mask))
            start = rows.stop
        mixed_BKGLH = jnp.concatenate(parts, axis=3) if blocks > 1 else parts[0]
    return jnp.moveaxis(mixed_BKGLH, 3, 1).reshape(B, L, N, H)


def _weights(q_BKGLH: jax.Array, k_BKSH: jax.Array, mask_BKGLS: jax.Array) -> jax.Array:
    scores_BKGLS = jnp.einsum("BKGLH,BKSH->BKGLS", q_BKGLH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGLS = jnp.where(mask_BKGLS, scores_BKGLS, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores_BKGLS, axis=-1).astype(q_BKGLH.dtype)


def _mix(weights_BKGLS: jax.Array, v_BKSH: jax.Array) -> jax.Array:
    return jnp.einsum("BKGLS,BKSH->BKGLH", weights_BKGLS, v_BKSH)


@jax.custom_vjp
def weigh(q_BKGLH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BKGLS: jax.Array) -> jax.Array:
    """The attention core. Its gradient is written out: softmax's needs Σ p·dp, which is the row sum of
    output · gradient (Dao et al. 2022, "FlashAttention", §B.2), over H numbers instead of S."""
    return _weigh_forward(q_BKGLH, k_BKSH, v_BKSH, mask_BKGLS)[0]


def _weigh_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    weights = _weights(q, k, mask)
    mixed = _mix(weights, v)
    return mixed, (q, k, v, weights, mixed)


def _weigh_backward(saved: Any, grad_BKGLH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, mixed = saved
    along = jnp.sum((grad_BKGLH * mixed).astype(jnp.float32), axis=-1, keepdims=True)
    grad_BKGLS = jnp.einsum("BKGLH,BKSH->BKGLS", grad_BKGLH, v, preferred_element_type=jnp.float32)
    grad_BKGLS = (weights.astype(jnp.float32) * (grad_BKGLS - along)).astype(q.dtype)
    return (
        jnp.einsum("BKGLS,BKSH->BKGLH", grad_BKGLS, k),
        jnp.einsum("BKGLS,BKGLH->BKSH", grad_BKGLS, q),
        jnp.einsum("BKGLS,BKGLH->BKSH", weights, grad_BKGLH),
        None,
    )


weigh.defvjp(_weigh_forward, _weigh_backward)


class Attention(nn.Module):
    """Self-attention with grouped key/value heads, optional rotary positions, query/key norms and cache."""

    config: TransformerConfig
    train: bool

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, mask_BLS: jax.Array, angles: Angles | None, cache: LayerCache | None, seen: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.config
        q_BLNH = Linear(c, "BLD,DNH->BLNH", name="query")(x_BLD)
        k_BSKH = Linear(c, "BLD,DKH->BLKH", name="key")(x_BLD)
        v_BSKH = Linear(c, "BLD,DKH->BLKH", name="value")(x_BLD)
        if c.qk_norm:
            # One scale for all heads (Dehghani et al. 2023, §2; the form of Qwen 3 and OLMo-style models).
            q_BLNH = Norm(c, "rmsnorm", axis="H", name="query_norm")(q_BLNH)
            k_BSKH = Norm(c, "rmsnorm", axis="H", name="key_norm")(k_BSKH)
        if angles is not None:
            q_BLNH, k_BSKH = rotate(q_BLNH, angles), rotate(k_BSKH, angles)
        if cache is not None:
            assert seen is not None, "a cache comes with the number of tokens it holds"
            start = (0, seen, 0, 0)
            k_BSKH = jax.lax.dynamic_update_slice(cache[0], k_BSKH, start)
            v_BSKH = jax.lax.dynamic_update_slice(cache[1], v_BSKH, start)
            cache = (k_BSKH, v_BSKH)
        drop = nn.Dropout(c.dropout, deterministic=not self.train) if c.dropout else None
        mixed_BLNH = attend(q_BLNH, k_BSKH, v_BSKH, mask_BLS, causal=cache is None, drop=drop)
        return Linear(c, "BLNH,NHD->BLD", residual=True, name="out")(mixed_BLNH), cache
