"""Attention: which key each query may see, the weighted sum, and the layer around it.

Letters: B batch · L query length · S key length · D model width · N query heads · K key/value heads ·
G query heads per key/value head (N / K) · H head width.
"""

import math

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
    q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BLS: jax.Array, drop: nn.Dropout | None = None
) -> jax.Array:
    """softmax(q·kᵀ/√H + mask)·v, the softmax in float32 (Vaswani et al. 2017, eq. 1) → (B, L, N, H).

    Query heads share key/value heads in groups of N / K (Ainslie et al. 2023, "GQA").
    """
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    q_BLKGH = q_BLNH.reshape(B, L, K, N // K, H) * (1 / math.sqrt(H))
    scores_BKGLS = jnp.einsum("BLKGH,BSKH->BKGLS", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGLS = jnp.where(mask_BLS[:, None, None, :, :], scores_BKGLS, jnp.finfo(jnp.float32).min)
    weights_BKGLS = jax.nn.softmax(scores_BKGLS, axis=-1).astype(v_BSKH.dtype)
    if drop is not None:
        weights_BKGLS = drop(weights_BKGLS)
    return jnp.einsum("BKGLS,BSKH->BLKGH", weights_BKGLS, v_BSKH).reshape(B, L, N, H)


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
        mixed_BLNH = attend(q_BLNH, k_BSKH, v_BSKH, mask_BLS, drop)
        return Linear(c, "BLNH,NHD->BLD", residual=True, name="out")(mixed_BLNH), cache
