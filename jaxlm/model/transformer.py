"""The Transformer: block, stack of blocks, and the one or two stacks of a model, from tokens to hidden states.

The alphabet of every shape in jaxlm, in name suffixes, einsums and logical axes: B batch · L query
length · S key length · D model width · W width of the token embeddings · N query heads · K key/value heads ·
H head width · F MLP width · V vocabulary · P positions · T token types · R buckets of relative positions ·
E experts · C classes · X layers of a stack. `q_BLNH` needs no shape comment.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.model.attention import Attention
from jaxlm.model.cache import At, Cache, KeyValue, Read, Source
from jaxlm.model.config import TransformerConfig
from jaxlm.model.distance_bias import alibi, distance_range
from jaxlm.model.layers import Angles, Embed, Linear, Mlp, Norm, divisor
from jaxlm.model.mask import Mask, places
from jaxlm.model.moe import Moe
from jaxlm.model.pipeline import pipelined, stages
from jaxlm.model.positions import RelativeBias, rotary_angles, sinusoids
from jaxlm.parallel.rules import gathered

Batch = Mapping[str, Any]


@flax.struct.dataclass
class Context:
    """What all blocks of a stack share."""

    mask: Mask
    angles: tuple[Angles, Angles] | None = None
    """Rotary angles of layers that see all and of layers that see a window."""
    bias_1NY: jax.Array | None = None
    """Of the scores, by head and distance; its first dimension tells it from what each row has of its own."""
    at: At | None = None
    """In the cache."""
    read_BSD: jax.Array | None = None
    """The encoder's hidden states, which the blocks of a decoder read."""
    read_mask: Mask | None = None
    """Which of the encoder's tokens each token may read; None: there is no encoder."""
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
        self, x_BLD: jax.Array, layer: jax.Array | int, local: jax.Array | bool, own: KeyValue | None, source: Read | None,
        context: Context,
    ) -> tuple[jax.Array, tuple[KeyValue | None, Read | None, jax.Array]]:  # fmt: skip
        """`layer` is its number, `local` whether it sees a window only; a cache holds of its `own` text and of the `source`
        that the encoder read. Returns, beside the residual stream, these two as they are now, and the router's loss."""
        c, where = self.config, self.config.norm_position
        drop = nn.Dropout(c.dropout, deterministic=not self.train)

        def before(name: str, x_BLD: jax.Array) -> jax.Array:
            y_BLD = Norm(c, c.norm, name=f"{name}_norm")(x_BLD) if where in ("pre", "both") else x_BLD
            return gathered(y_BLD if c.first_norm or name != "attention" else jnp.where(layer == 0, x_BLD, y_BLD))

        def after(name: str, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
            if where in ("both", "output"):
                y_BLD = Norm(c, c.norm, name=f"{name}_output_norm")(y_BLD)
            x_BLD = x_BLD + drop(y_BLD)
            return Norm(c, c.norm, name=f"{name}_norm")(x_BLD) if where == "post" else x_BLD

        start_BLD = x_BLD
        attention = Attention(c, self.train, name="attention")
        bias_NY = None if context.bias_1NY is None else context.bias_1NY[0]
        y_BLD, own = attention(before("attention", x_BLD), own, local, context.mask, context.angles, bias_NY, context.at)
        y_BLD = checkpoint_name(y_BLD, "attention")
        x_BLD = after("attention", x_BLD, y_BLD)
        if context.read_mask is not None:
            cross = Attention(c, self.train, name="cross_attention")
            if source is None:
                assert context.read_BSD is not None, "the first call brings the encoder's text"
                source = cross.source(context.read_BSD)
            y_BLD = cross.read(before("cross_attention", x_BLD), source, context.read_mask)
            x_BLD = after("cross_attention", x_BLD, y_BLD)
        inner_BLD = before("mlp", start_BLD if c.parallel else x_BLD)
        if c.moe.experts:
            y_BLD, auxiliary = Moe(c, name="mlp")(inner_BLD, context.keep_BL)
        else:
            y_BLD, auxiliary = Mlp(c, name="mlp")(inner_BLD), jnp.zeros((), jnp.float32)
        x_BLD = after("mlp", x_BLD, y_BLD)
        self.sow("intermediates", "residual", x_BLD)
        return x_BLD, (own, None if own is None else source, auxiliary)


# What the backward pass may keep, by the config's name for it.
REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["attention"], offload_src="device", offload_dst="pinned_host"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def parted(layers: Any, count: int, shared: bool) -> tuple[Any, ...]:
    """The parameters of each layer, of those that are stacked, that all layers share, or that stand apart already."""
    if isinstance(layers, tuple):
        return layers
    return tuple(layers if shared else jax.tree.map(operator.itemgetter(x), layers) for x in range(count))


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
        hidden states and batch, which the cache keeps for later calls."""
        c, length = self.config, x_BLW.shape[1]
        place_BL = places(length, None if cache is None else cache.length)
        positions_BL = batch.get("positions_BL")
        if positions_BL is None:
            positions_BL = place_BL
            if cache is not None and cache.start_B is not None:
                positions_BL = jnp.maximum(positions_BL - cache.start_B[:, None], 0)
        x_BLD = self._embed(x_BLW, positions_BL, batch.get("types_BL"))
        bias = self._bias()
        context = self._context(batch, place_BL, positions_BL, cache, read, bias)

        if stages() > 1 and cache is None and not self.is_initializing() and not c.share_layers:
            x_BLD, auxiliary = self._in_stages(x_BLD, context)
            return Output(self._end(x_BLD), None, auxiliary)
        layer_X = None if self.is_initializing() else self.variables["params"]["layers"]
        if cache is None and not isinstance(layer_X, tuple):
            stack = self._scanned()(c, self.train, name="layers")
            number_X, local_X = jnp.arange(self.layers), jnp.asarray(c.local(self.layers))
            x_BLD, (_, _, auxiliary_X) = stack(x_BLD, number_X, local_X, None, None, context)
            return Output(self._end(x_BLD), None, jnp.sum(auxiliary_X))
        of_rings = self._of_rings(context, place_BL, cache)
        layer_X = parted(layer_X, self.layers, c.share_layers)
        x_BLD, own_X, source_X, auxiliary = self._apart(layer_X, x_BLD, cache, context, of_rings)
        if cache is not None:
            cache = dataclasses.replace(cache, layers=own_X, length=cache.length + length)
            if read is not None:
                cache = dataclasses.replace(cache, source=Source(source_X, read[1].get("segments_BL")))
        return Output(self._end(x_BLD), cache, auxiliary)

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

    def _end(self, x_BLD: jax.Array) -> jax.Array:
        """What leaves the blocks, for heads and for a decoder that reads it: whole again along the length that tensor split."""
        c = self.config
        return gathered(x_BLD if c.norm_position == "post" else Norm(c, c.norm, name="final_norm")(x_BLD))

    def _bias(self) -> Callable[[jax.Array], jax.Array] | None:
        """Distances (Y,) → the bias of the scores by head and distance, (N, Y)."""
        c = self.config
        if c.position == "relative":
            return RelativeBias(c, self.causal, name="relative_bias")
        return functools.partial(alibi, heads=c.heads) if c.position == "alibi" else None

    def _context(
        self, batch: Batch, place_BL: jax.Array, positions_BL: jax.Array, cache: Cache | None,
        read: tuple[jax.Array, Batch] | None, bias: Callable[[jax.Array], jax.Array] | None,
    ) -> Context:  # fmt: skip
        c, length = self.config, place_BL.shape[1]
        segments_BL = batch.get("segments_BL")
        seen, size = (None, length) if cache is None else (cache.length, cache.size)
        assert segments_BL is None or seen is None, "packed rows are for training: a cache holds one document a row"
        mask = Mask(segments_BL, segments_BL, seen, batch.get("prefix_B"), causal=self.causal)
        context = Context(mask, at=None if cache is None else At(cache.length, cache.holder_BGS, cache.rows_B))
        if segments_BL is not None:
            context = dataclasses.replace(context, keep_BL=segments_BL > 0)
        elif cache is not None and cache.start_B is not None:
            # Padding sees padding, so that no row of scores is empty.
            query, key = ((p >= cache.start_B[:, None]).astype(jnp.int32) for p in (place_BL, places(size, None)))
            context = dataclasses.replace(context, mask=Mask(query, key, seen, causal=self.causal))
        if c.position == "rotary":
            angles = local = rotary_angles(positions_BL, c, c.rope.theta)
            if c.rope.local_theta:
                local = rotary_angles(positions_BL, dataclasses.replace(c, rope=c.rope.local), c.rope.local.theta)
            context = dataclasses.replace(context, angles=(angles, local))
        elif bias is not None:
            context = dataclasses.replace(context, bias_1NY=bias(distance_range(size))[None])
        if read is not None:
            states_BSD, source = read
            mask = Mask(segments_BL, source.get("segments_BL"), causal=False)
            context = dataclasses.replace(context, read_BSD=states_BSD, read_mask=mask)
        elif cache is not None and cache.source is not None:
            context = dataclasses.replace(context, read_mask=Mask(None, cache.source.segments_BS, causal=False))
        return context

    def _of_rings(self, context: Context, place_BL: jax.Array, cache: Cache | None) -> Context:
        """What layers share whose cache is a ring: keys are its last places, of which those before the text are not seen."""
        room = min((most for most in cache.limits if most is not None), default=None) if cache is not None else None
        if cache is None or room is None or room >= cache.size:
            return context
        rows, length = cache.rows, place_BL.shape[1]
        assert length + self.config.window <= room, "a call of more tokens than the ring's piece"
        first_B = jnp.broadcast_to(cache.length + (length - room), rows)
        start_B = jnp.zeros(rows, jnp.int32) if cache.start_B is None else cache.start_B
        key_BS = first_B[:, None] + jnp.arange(room, dtype=jnp.int32)[None, :]
        query, key = ((p >= start_B[:, None]).astype(jnp.int32) for p in (place_BL, key_BS))
        seen = jnp.int32(room - length)
        prefix_B = None if context.mask.prefix_B is None else context.mask.prefix_B - first_B
        holder_BGS = cache.holder_BGS
        if holder_BGS is not None:
            holder_BGS = jnp.take(holder_BGS, jnp.clip(key_BS[0], 0), axis=2)
        return dataclasses.replace(
            context,
            mask=Mask(query, key, seen, prefix_B, causal=self.causal),
            at=At(cache.length, holder_BGS, ring=True),
        )

    def _apart(
        self, layer_X: tuple[Any, ...], x_BLD: jax.Array, cache: Cache | None, context: Context, of_rings: Context
    ) -> tuple[jax.Array, tuple[Any, ...], tuple[Any, ...], jax.Array]:
        """The same as the scan over layers, of layers that have parameters and caches of their own. Returns what the scan
        does: hidden states, what the cache holds of each layer and of its source, and the routers' loss."""
        c, none = self.config, (None,) * self.layers
        own_X = none if cache is None else cache.layers
        read_now = context.read_BSD is not None
        source_X = none if cache is None or cache.source is None or read_now else cache.source.layers
        given, kept = zip(layer_X, c.local(self.layers), own_X, source_X, strict=True), []
        for layer, (params, local, own, source) in enumerate(given):
            block, shared = Block(c, self.train), of_rings if local else context
            x_BLD, one = block.apply({"params": params}, x_BLD, layer, bool(local), own, source, shared)
            kept.append(one)
        own_X, source_X, auxiliary_X = zip(*kept, strict=True)
        return x_BLD, own_X, source_X, jnp.sum(jnp.stack(auxiliary_X))

    def _in_stages(self, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """The layers as stages of a pipeline, which are pure functions of their part of the stacked parameters."""
        c, rows = self.config, x_BLD.shape[0]
        parts = divisor(rows, c.microbatches or stages())
        rounds = c.rounds if parts >= stages() else 1  # of a batch of few rows, as in an evaluation
        keys = {name: self.make_rng(name) for name in ("dropout", "quantize") if self.has_rng(name)}
        local_X = jnp.asarray(c.local(self.layers))

        def run(params: Any, x_BLD: jax.Array, layer: jax.Array, part: jax.Array, context: Any) -> tuple[jax.Array, jax.Array]:
            own = {name: jax.random.fold_in(jax.random.fold_in(key, layer), part) for name, key in keys.items()}
            block = Block(c, self.train)
            y_BLD, (_, _, loss) = block.apply({"params": params}, x_BLD, layer, local_X[layer], None, None, context, rngs=own)
            return jnp.asarray(y_BLD), jnp.asarray(loss)

        if c.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        # In float32, as the gradient of a layer is a sum over the microbatches; what is held in integers has none.
        layers = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            self.variables["params"]["layers"],
        )
        return pipelined(run, layers, x_BLD, context, self.layers, parts, rounds)

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
            split_rngs={"params": not c.share_layers, "dropout": True, "quantize": True},
            in_axes=(0, 0, 0, 0, nn.broadcast),
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
        The cache keeps what the decoder reads of the encoder's text: behind it come tokens alone, as in a decoder.
        """
        if "encoder" in batch:
            read = self.encoder(self._look_up(batch["encoder"]), batch["encoder"])
            states = (read.hidden_BLD, batch["encoder"])
            output = self.decoder(self._look_up(batch["decoder"]), batch["decoder"], cache, states)
            return dataclasses.replace(output, auxiliary=output.auxiliary + read.auxiliary)
        if self.config.architecture == "encoder_decoder":
            assert cache is not None and cache.source is not None, "the first call of an encoder-decoder brings its encoder's text"
        if self.config.architecture == "encoder":
            assert cache is None, "an encoder reads its text at once"
            return self.encoder(self._look_up(batch), batch)
        return self.decoder(self._look_up(batch), batch, cache)

    def _look_up(self, batch: Batch) -> jax.Array:
        x_BLW = self.embed(batch["tokens_BL"])
        return x_BLW * jnp.asarray(self.config.width**0.5, x_BLW.dtype) if self.config.embedding_scale else x_BLW
