"""What stands on the hidden states: heads over the vocabulary with their loss, and heads over labels.

Letters: B batch · L length · D model width · U the same, after a dense layer · W width of the token embeddings ·
V vocabulary · C classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.cache import Cache
from jaxlm.model.config import TransformerConfig
from jaxlm.model.cross_entropy import draw_tokens, linear_cross_entropy, token_nll, token_scores, vocabulary_logits
from jaxlm.model.layers import Linear, Norm, activate, parameter
from jaxlm.model.transformer import Batch, Output, Transformer


class VocabularyHead(nn.Module):
    """Hidden states → what is multiplied with a table of the vocabulary: in a masked language model through a
    dense layer, a non-linearity and a norm first (Devlin et al. 2019), and with a bias."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        masked = c.head.kind == "masked_lm"
        self.transforms = masked and c.head.dense
        if self.transforms:
            self.dense = Linear(c, "BLD,DW->BLW", bias=c.head.dense_bias)
            if c.head.norm:
                self.norm = Norm(c, c.norm, "W")
        if not c.tie_embeddings:
            # Its gradient is a sum over chunks: too many for bfloat16.
            self.table = parameter(self, "table", "VW", nn.initializers.normal(c.init_std)).astype(jnp.float32)
        biased = c.logit_bias or (masked and c.head.bias)
        self.bias = parameter(self, "bias", "V", nn.initializers.zeros).astype(jnp.float32) if biased else None

    def __call__(self, hidden_BLD: jax.Array, embed_VW: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """(B, L, W) features, the table and the bias."""
        c = self.config
        x = hidden_BLD
        if self.transforms:
            x = activate(c.head.activation, self.dense(x))
            x = self.norm(x) if c.head.norm else x
        if c.logit_scale:
            x = x * jnp.asarray(c.width**-0.5, x.dtype)
        return x, embed_VW if c.tie_embeddings else self.table, self.bias


class LanguageModel(nn.Module):
    """A Transformer with a head over the vocabulary: of a decoder the next token's, of an encoder each token's."""

    config: TransformerConfig
    train: bool = False

    def setup(self) -> None:
        self.transformer = Transformer(self.config, self.train)
        self.head = VocabularyHead(self.config)
        if self.config.head.pair:
            self.pair = PairHead(self.config)

    def hidden(self, batch: Batch) -> jax.Array:
        """The last hidden states (B, L, D)."""
        return self.transformer(batch).hidden_BLD

    def states(self, batch: Batch, cache: Cache) -> tuple[jax.Array, Cache | None]:
        """The last hidden states (B, L, D) of a call with a cache, and the cache; `logits` makes logits of those that are
        wanted."""
        output = self.transformer(batch, cache)
        return output.hidden_BLD, output.cache

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """Float32 logits (B, L, V) of last hidden states."""
        return vocabulary_logits(*self.head(hidden_BLD, self.transformer.embed.table), self.config.logit_softcap)

    def __call__(
        self, batch: Batch, cache: Cache | None = None, last: bool = False, at_B: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Float32 logits (B, L, V), with `last` of the last place only (B, 1, V), with `at_B` of one place of each row,
        and the cache."""
        output = self.transformer(batch, cache)
        hidden_BLD = output.hidden_BLD[:, -1:] if last else output.hidden_BLD
        if at_B is not None:
            hidden_BLD = jnp.take_along_axis(hidden_BLD, at_B[:, None, None], axis=1)
        logits_BLV = self.logits(hidden_BLD)
        if self.config.head.pair and self.is_initializing():
            self.pair(output.hidden_BLD[:, 0])
        return logits_BLV, output.cache

    def loss(self, batch: Batch, *, chunk: int, z_loss: float = 0.0, smoothing: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Sums over `targets_BL` weighted by `weights_BL` (of an encoder-decoder those of its decoder), as
        `linear_cross_entropy` gives them; to the first the routers' losses are added, at the same weight."""
        return self._loss(batch, self.transformer(batch), chunk, z_loss, smoothing)

    def loss_and_pair(
        self, batch: Batch, *, chunk: int, z_loss: float = 0.0, smoothing: float = 0.0
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """`loss`, and float32 scores (B, 2): does the second text follow the first (0), or not (1)?"""
        output = self.transformer(batch)
        return self._loss(batch, output, chunk, z_loss, smoothing), self.pair(output.hidden_BLD[:, 0])

    def _loss(self, batch: Batch, output: Output, chunk: int, z_loss: float, smoothing: float) -> tuple[jax.Array, jax.Array]:
        scored = batch["decoder"] if self.config.architecture == "encoder_decoder" else batch
        parts = self.head(output.hidden_BLD, self.transformer.embed.table)
        loss, nll = linear_cross_entropy(
            *parts, scored["targets_BL"], scored["weights_BL"], chunk, z_loss, self.config.logit_softcap, smoothing
        )
        auxiliary = router_loss(self.config, output)
        return loss if auxiliary is None else loss + auxiliary * jnp.sum(scored["weights_BL"]), nll

    def log_likelihood(self, batch: Batch, *, chunk: int) -> tuple[jax.Array, jax.Array | None]:
        """(B,) float32: of each row the sum of weight · log p(target), in nats; logits exist for `chunk` positions at a
        time and are computed again in the backward pass. Also the router loss, None without experts."""
        output = self.transformer(batch)
        scored = batch["decoder"] if self.config.architecture == "encoder_decoder" else batch
        parts = self.head(output.hidden_BLD, self.transformer.embed.table)
        nll_BL = token_nll(*parts, scored["targets_BL"], chunk, self.config.logit_softcap)
        return -jnp.sum(nll_BL * scored["weights_BL"], axis=1), router_loss(self.config, output)

    def scores(self, batch: Batch, *, chunk: int) -> tuple[jax.Array, jax.Array]:
        """(B, L) float32 log p(target) in nats, and (B, L) whether no token is likelier; logits exist for `chunk` positions at
        a time."""
        parts = self.head(self.transformer(batch).hidden_BLD, self.transformer.embed.table)
        return token_scores(*parts, batch["targets_BL"], chunk, self.config.logit_softcap)

    def draw(self, batch: Batch, *, chunk: int, key: jax.Array) -> jax.Array:
        """(B, L) int32: at each position a token drawn from the model's own distribution."""
        parts = self.head(self.transformer(batch).hidden_BLD, self.transformer.embed.table)
        hidden_BLD, table_VD, bias_V = jax.tree.map(jax.lax.stop_gradient, parts)
        return draw_tokens(hidden_BLD, table_VD, bias_V, chunk, self.config.logit_softcap, key)


class PairHead(nn.Module):
    """The first token's hidden state → a dense layer and tanh → two scores (Devlin et al. 2019, §3.1, task 2)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BD: jax.Array) -> jax.Array:
        x_BU = jnp.tanh(Linear(self.config, "BD,DU->BU", bias=True, name="dense")(x_BD))
        return Linear(self.config, "BU,UC->BC", bias=True, name="out")(x_BU).astype(jnp.float32)


class LabelHead(nn.Module):
    """Pooled or single hidden states → a dense layer, a non-linearity, a norm, each on request → the labels' scores."""

    config: TransformerConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, head, lead = self.config, self.config.head, "BL" if x.ndim == 3 else "B"
        if head.dense:
            x = Linear(c, f"{lead}D,DU->{lead}U", bias=head.dense_bias, name="dense")(x)
            x = activate(head.activation, x)
            x = Norm(c, c.norm, name="norm")(x) if head.norm else x
        if head.kind == "embedding":
            return x
        x = nn.Dropout(c.dropout, deterministic=not self.train)(x)
        scores = Linear(c, f"{lead}U,UC->{lead}C", bias=head.bias, name="out")(x).astype(jnp.float32)
        return scores[..., 0] if head.kind in ("choice", "detection") else scores


class Labeller(nn.Module):
    """A Transformer with a head over labels, or none."""

    config: TransformerConfig
    train: bool = False

    def setup(self) -> None:
        self.transformer = Transformer(self.config, self.train)
        self.head = LabelHead(self.config, self.train)

    def hidden(self, batch: Batch) -> jax.Array:
        """The last hidden states (B, L, D)."""
        return self.transformer(batch).hidden_BLD

    def __call__(self, batch: Batch) -> jax.Array:
        """Float32 scores: (B, C) of a sequence, (B,) of a choice, (B, L, C) of a token, (B, L, 2) of a span, (B, L) of
        detection; a vector (B, D) of an embedding."""
        return self.scores_and_router_loss(batch)[0]

    def scores_and_router_loss(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """The scores, and the router loss to add to a row's loss; None without experts."""
        c, output = self.config, self.transformer(batch)
        own = batch["decoder"] if c.architecture == "encoder_decoder" else batch
        single = c.head.kind in ("token", "span", "detection")
        read = output.hidden_BLD if single else pool(output.hidden_BLD, own.get("segments_BL"), c.head.pool)
        return self.head(read), router_loss(c, output)


def router_loss(config: TransformerConfig, output: Output) -> jax.Array | None:
    """The weighted losses of all routers of a call, a scalar; None without experts."""
    return output.auxiliary if config.moe.experts else None


def pool(hidden_BLD: jax.Array, segments_BL: jax.Array | None, kind: str) -> jax.Array:
    """(B, D): the hidden state of the first token, of the last one, or the mean over all but padding (segment 0)."""
    kept_BL = jnp.ones(hidden_BLD.shape[:2], bool) if segments_BL is None else segments_BL > 0
    if kind == "first":
        return hidden_BLD[:, 0]
    if kind == "last":
        last_B = jnp.max(jnp.where(kept_BL, jnp.arange(kept_BL.shape[1])[None, :], 0), axis=1)
        return jnp.take_along_axis(hidden_BLD, last_B[:, None, None], axis=1)[:, 0]
    weights_BL = kept_BL.astype(hidden_BLD.dtype)
    total_BD = jnp.einsum("BLD,BL->BD", hidden_BLD, weights_BL)
    return total_BD / jnp.maximum(jnp.sum(weights_BL, axis=1, keepdims=True), 1)
