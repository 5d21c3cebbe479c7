"""The Transformer: block, stack of blocks, and the one or two stacks of a model, from tokens to hidden states.

The alphabet of every shape in jaxlm, in name suffixes, einsums and logical axes: B batch · L query
length · S key length · D model width · W width of the token embeddings · N query heads · K key/value heads ·
H head width · F MLP width · V vocabulary · P positions · T token types · R buckets of relative positions ·
E experts · C classes. `q_BLNH` needs no shape comment.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxlm.model.attention import Attention, LayerCache
from jaxlm.model.cache import Cache
from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import Angles, Embed, Linear, Mlp, Norm
from jaxlm.model.mask import Mask
from jaxlm.model.moe import Moe
from jaxlm.model.positions import RelativeBias, alibi, distances, rotary_angles, sinusoids

Batch = Mapping[str, Any]


@flax.struct.dataclass
class Context:
    """What all blocks of a stack share."""

    mask: Mask
    angles: tuple[Angles, Angles] | None = None
    """Rotary angles of layers that see all and of layers that see a window."""
    bias_BNLS: jax.Array | None = None
    read_BSD: jax.Array | None = None
    """The encoder's hidden states, which the blocks of a decoder read."""
    read_mask: Mask | None = None
    keep_BL: jax.Array | None = None
    """False: padding, which does not count for the balance of experts."""


@flax.struct.dataclass
class Output:
    """What a stack gives."""

    hidden_BLD: jax.Array
    cache: Cache | None
    auxiliary: jax.Array
    """The routers' losses, a scalar summed over the layers; 0 without experts."""


class Block(nn.Module):
    """Attention, then (in a decoder that reads an encoder) attention to it, then MLP, each with its norms and
    residual. Norms: before the sub-layer (pre, as GPT-2), after the sum (post, as Vaswani et al. 2017), before
    and after the sub-layer (both, Gemma 2) or after it alone (output, OLMo 2)."""

    config: TransformerConfig
    train: bool

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, cache: LayerCache | None, local: jax.Array, first: jax.Array, context: Context
    ) -> tuple[jax.Array, tuple[LayerCache | None, jax.Array]]:
        c, where = self.config, self.config.norm_position
        drop = nn.Dropout(c.dropout, deterministic=not self.train)

        def before(name: str, x_BLD: jax.Array) -> jax.Array:
            if where not in ("pre", "both"):
                return x_BLD
            y_BLD = Norm(c, c.norm, name=f"{name}_norm")(x_BLD)
            return y_BLD if c.first_norm or name != "attention" else jnp.where(first, x_BLD, y_BLD)

        def after(name: str, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
            if where in ("both", "output"):
                y_BLD = Norm(c, c.norm, name=f"{name}_output_norm")(y_BLD)
            x_BLD = x_BLD + drop(y_BLD)
            return Norm(c, c.norm, name=f"{name}_norm")(x_BLD) if where == "post" else x_BLD

        start_BLD = x_BLD
        attention = Attention(c, self.train, name="attention")
        y_BLD, cache = attention(before("attention", x_BLD), cache, local, context.mask, context.angles, context.bias_BNLS)
        x_BLD = after("attention", x_BLD, y_BLD)
        if context.read_BSD is not None:
            cross = Attention(c, self.train, name="cross_attention")
            assert context.read_mask is not None, "what is read comes with its mask"
            y_BLD = cross.read(before("cross_attention", x_BLD), context.read_BSD, context.read_mask)
            x_BLD = after("cross_attention", x_BLD, y_BLD)
        inner_BLD = before("mlp", start_BLD if c.parallel else x_BLD)
        if c.moe.experts:
            y_BLD, auxiliary = Moe(c, name="mlp")(inner_BLD, context.keep_BL)
        else:
            y_BLD, auxiliary = Mlp(c, name="mlp")(inner_BLD), jnp.zeros((), jnp.float32)
        x_BLD = after("mlp", x_BLD, y_BLD)
        self.sow("intermediates", "residual", x_BLD)
        return x_BLD, (cache, auxiliary)


# What the backward pass may keep, by the config's name for it.
REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nn.Module):
    """Embedded tokens → hidden states; the blocks' parameters are stacked along a leading `layers` axis."""

    config: TransformerConfig
    layers: int
    causal: bool
    train: bool = False

    @nn.compact
    def __call__(
        self, x_BLW: jax.Array, batch: Batch, cache: Cache | None = None, read: tuple[jax.Array, Batch] | None = None
    ) -> Output:
        """`batch` gives `segments_BL`, `positions_BL` and `types_BL` where it has them; `read` are an encoder's
        hidden states and batch."""
        c, length = self.config, x_BLW.shape[1]
        seen = None if cache is None else cache.length
        positions_BL = batch.get("positions_BL")
        if positions_BL is None:
            positions_BL = jnp.arange(length, dtype=jnp.int32)[None, :] + (0 if seen is None else seen)
        x_BLD = self._embed(x_BLW, positions_BL, batch.get("types_BL"))
        size = length if cache is None else cache.k_XBSKH.shape[2]
        context = self._context(batch, positions_BL, length, size, seen, read)

        stack = self._scanned()(c, self.train, name="layers")
        kv = None if cache is None else (cache.k_XBSKH, cache.v_XBSKH)
        local_X, first_X = jnp.asarray(c.local(self.layers)), jnp.arange(self.layers) == 0
        x_BLD, (kv, auxiliary_X) = stack(x_BLD, kv, local_X, first_X, context)
        if c.norm_position != "post":
            x_BLD = Norm(c, c.norm, name="final_norm")(x_BLD)
        if cache is not None:
            assert kv is not None, "layers given a cache return it"
            cache = dataclasses.replace(cache, k_XBSKH=kv[0], v_XBSKH=kv[1], length=cache.length + length)
        return Output(x_BLD, cache, jnp.sum(auxiliary_X))

    def _embed(self, x_BLW: jax.Array, positions_BL: jax.Array, types_BL: jax.Array | None) -> jax.Array:
        c = self.config
        if c.position == "learned":
            places_BLW = Embed(c, "PW", name="embed_positions")(positions_BL + c.position_offset)
            x_BLW = x_BLW + jnp.broadcast_to(places_BLW, x_BLW.shape)
        elif c.position == "sinusoidal":
            x_BLW = x_BLW + jnp.broadcast_to(sinusoids(positions_BL, c.W).astype(c.dtype), x_BLW.shape)
        if c.token_types:
            types_BL = jnp.zeros(x_BLW.shape[:2], jnp.int32) if types_BL is None else types_BL
            x_BLW = x_BLW + Embed(c, "TW", name="embed_types")(types_BL)
        if c.embedding_norm:
            x_BLW = Norm(c, c.norm, "W", name="embed_norm")(x_BLW)
        x_BLW = nn.Dropout(c.dropout, deterministic=not self.train)(x_BLW)
        return x_BLW if not c.factored else Linear(c, "BLW,WD->BLD", bias=True, name="embed_project")(x_BLW)

    def _context(
        self, batch: Batch, positions_BL: jax.Array, length: int, size: int, seen: jax.Array | None,
        read: tuple[jax.Array, Batch] | None,
    ) -> Context:  # fmt: skip
        c = self.config
        segments_BL = batch.get("segments_BL")
        assert segments_BL is None or seen is None, "packed rows are for training: a cache holds one document a row"
        context = Context(Mask(segments_BL, segments_BL, seen, causal=self.causal))
        if segments_BL is not None:
            context = dataclasses.replace(context, keep_BL=segments_BL > 0)
        if c.position == "rotary":
            angles = rotary_angles(positions_BL, c, c.rope.theta, segments_BL)
            local = rotary_angles(positions_BL, c, c.rope.local_theta, segments_BL) if c.rope.local_theta else angles
            context = dataclasses.replace(context, angles=(angles, local))
        elif c.position == "relative":
            bias_BNLS = RelativeBias(c, self.causal, name="relative_bias")(distances(length, size, seen))
            context = dataclasses.replace(context, bias_BNLS=bias_BNLS)
        elif c.position == "alibi":
            context = dataclasses.replace(context, bias_BNLS=alibi(distances(length, size, seen), c.heads))
        if read is not None:
            states_BSD, source = read
            mask = Mask(segments_BL, source.get("segments_BL"), causal=False)
            context = dataclasses.replace(context, read_BSD=states_BSD, read_mask=mask)
        return context

    def _scanned(self) -> Any:
        c, block = self.config, Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=c.unroll)
        axes: dict[Any, Any] = {"intermediates": 0}
        if not c.share_layers:
            axes["params"] = 0
        return nn.scan(
            block,
            variable_axes=axes,
            variable_broadcast="params" if c.share_layers else False,
            split_rngs={"params": not c.share_layers, "dropout": True},
            in_axes=(0, 0, 0, nn.broadcast),
            length=self.layers,
            unroll=self.layers if c.unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )


class Transformer(nn.Module):
    """tokens → hidden states, through the stacks of the architecture."""

    config: TransformerConfig
    train: bool = False

    def setup(self) -> None:
        c = self.config
        self.embed = Embed(c, "VW")
        if "encoder" in c.stacks:
            self.encoder = Stack(c, c.stacks["encoder"], causal=False, train=self.train)
        if "decoder" in c.stacks:
            self.decoder = Stack(c, c.stacks["decoder"], causal=True, train=self.train)

    def __call__(self, batch: Batch, cache: Cache | None = None) -> Output:
        """Hidden states (B, L, D) of `tokens_BL`, and the cache with these tokens added.

        `segments_BL` (0 = padding, documents 1, 2, …) and `positions_BL` are read where the batch has
        them; without them a row is one document from its start, or from where the cache ends. An
        encoder-decoder takes such a batch for each stack, `encoder` and `decoder`, and gives the decoder's.
        """
        if self.config.architecture == "encoder_decoder":
            assert cache is None, "the cache of an encoder-decoder is not there yet"
            read = self.encoder(self._look_up(batch["encoder"]), batch["encoder"])
            states = (read.hidden_BLD, batch["encoder"])
            output = self.decoder(self._look_up(batch["decoder"]), batch["decoder"], read=states)
            return dataclasses.replace(output, auxiliary=output.auxiliary + read.auxiliary)
        if self.config.architecture == "encoder":
            assert cache is None, "an encoder reads its text at once"
            return self.encoder(self._look_up(batch), batch)
        return self.decoder(self._look_up(batch), batch, cache)

    def _look_up(self, batch: Batch) -> jax.Array:
        x_BLW = self.embed(batch["tokens_BL"])
        return x_BLW * jnp.asarray(self.config.width**0.5, x_BLW.dtype) if self.config.embedding_scale else x_BLW
