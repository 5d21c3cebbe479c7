"""The Transformer: block, and the stack of them from tokens to hidden states.

The alphabet of every shape in jaxlm, in name suffixes, einsums and logical axes: B batch · L query
length · S key length · D model width · N query heads · K key/value heads · H head width · F MLP width ·
V vocabulary · P positions · E experts · C classes. `q_BLNH` needs no shape comment.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.attention import Angles, Attention, LayerCache, attention_mask
from jaxlm.model.cache import Cache
from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import Embed, Mlp, Norm, rotary_angles

Batch = Mapping[str, jax.Array]


class Block(nn.Module):
    """Attention, then MLP, each with its norm and residual: before the sub-layer (pre, as GPT-2) or
    after the sum (post, as Vaswani et al. 2017)."""

    config: TransformerConfig
    train: bool

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, cache: LayerCache | None, mask_BLS: jax.Array, angles: Angles | None, seen: jax.Array | None
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.config
        pre = c.norm_position == "pre"
        norm_1, norm_2 = Norm(c, c.norm, name="attention_norm"), Norm(c, c.norm, name="mlp_norm")
        drop = nn.Dropout(c.dropout, deterministic=not self.train)
        attention = Attention(c, self.train, name="attention")
        y_BLD, cache = attention(norm_1(x_BLD) if pre else x_BLD, mask_BLS, angles, cache, seen)
        x_BLD = x_BLD + drop(y_BLD)
        x_BLD = x_BLD if pre else norm_1(x_BLD)
        y_BLD = Mlp(c, name="mlp")(norm_2(x_BLD) if pre else x_BLD)
        x_BLD = x_BLD + drop(y_BLD)
        return x_BLD if pre else norm_2(x_BLD), cache


# What the backward pass may keep, by the config's name for it.
REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
    """tokens → hidden states; the layers' parameters are stacked along a leading `layers` axis."""

    config: TransformerConfig
    train: bool = False

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c, "VD")
        if c.position == "learned":
            self.embed_positions = Embed(c, "PD")
        self.drop = nn.Dropout(c.dropout, deterministic=not self.train)
        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=c.unroll)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
            unroll=c.layers if c.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.layers = stack(c, self.train)
        if c.norm_position == "pre":
            self.final_norm = Norm(c, c.norm)

    def __call__(self, batch: Batch, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """Hidden states (B, L, D) of `tokens_BL`, and the cache with these tokens added.

        `segments_BL` (0 = padding, documents 1, 2, …) and `positions_BL` are read where the batch has
        them; without them a row is one document from its start, or from where the cache ends.
        """
        c = self.config
        tokens_BL = batch["tokens_BL"]
        length = tokens_BL.shape[1]
        seen = None if cache is None else cache.length
        positions_BL = batch.get("positions_BL")
        if positions_BL is None:
            positions_BL = jnp.arange(length, dtype=jnp.int32)[None, :] + (0 if seen is None else seen)
        x_BLD = self.embed(tokens_BL)
        if c.position == "learned":
            x_BLD = x_BLD + jnp.broadcast_to(self.embed_positions(positions_BL), x_BLD.shape)
        x_BLD = self.drop(x_BLD)
        angles = rotary_angles(positions_BL, c.H, c.rope_theta) if c.position == "rotary" else None
        size = length if cache is None else cache.k_XBSKH.shape[2]
        mask_BLS = attention_mask(length, batch.get("segments_BL"), seen, size)
        kv = None if cache is None else (cache.k_XBSKH, cache.v_XBSKH)
        x_BLD, kv = self.layers(x_BLD, kv, mask_BLS, angles, seen)
        if c.norm_position == "pre":
            x_BLD = self.final_norm(x_BLD)
        if cache is None:
            return x_BLD, None
        assert kv is not None, "layers given a cache return it"
        return x_BLD, dataclasses.replace(cache, k_XBSKH=kv[0], v_XBSKH=kv[1], length=cache.length + length)
