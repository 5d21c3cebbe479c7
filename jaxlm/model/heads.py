"""What stands on the hidden states: heads over the vocabulary with their loss, and heads over labels.

Letters: B batch · L length · D model width · U the same, after a dense layer · W width of the token embeddings ·
V vocabulary · C classes, or in the loss a chunk of the length.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.cache import Cache
from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import Linear, Norm, activate, divisor, parameter
from jaxlm.model.transformer import Batch, Output, Transformer
from jaxlm.parallel.rules import constrain, length_ways


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(logits / cap): bounded, and nearly the logits where they are small (Gemma 2, 2024, §2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _logits(hidden_BCD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, cap: float | None) -> jax.Array:
    table_VD = table_VD.astype(hidden_BCD.dtype)
    if hidden_BCD.shape[0] * hidden_BCD.shape[1] <= 64:
        # As few rows as in decoding: with the table first a CPU multiplies about twice as fast.
        logits_VBC = jnp.einsum("VD,BCD->VBC", table_VD, hidden_BCD, preferred_element_type=jnp.float32)
        logits_BCV = jnp.moveaxis(logits_VBC, 0, 2)
    else:
        logits_BCV = jnp.einsum("BCD,VD->BCV", hidden_BCD, table_VD, preferred_element_type=jnp.float32)
    if bias_V is not None:
        logits_BCV = logits_BCV + bias_V.astype(jnp.float32)[None, None, :]
    return constrain(soft_cap(logits_BCV, cap), "BLV")


def _cut(length: int, chunk: int) -> tuple[int, int]:
    """Devices that share the length, and chunks of it; each holds a part of every device's places, so that all have work."""
    ways = length_ways() if length % length_ways() == 0 else 1
    return ways, length // ways // divisor(length // ways, chunk)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, L, …) → (number of chunks, B, chunk, …): along the length, so that rows stay on their devices."""
    ways, count = _cut(x.shape[1], chunk)
    split = x.reshape(x.shape[0], ways, count, -1, *x.shape[2:])
    return jnp.moveaxis(split, 2, 0).reshape(count, x.shape[0], -1, *x.shape[2:])


def _joined(y: jax.Array, length: int, chunk: int) -> jax.Array:
    """What chunks gave, in the order of the length again."""
    ways, count = _cut(length, chunk)
    split = y.reshape(count, y.shape[1], ways, -1, *y.shape[3:])
    return jnp.moveaxis(split, 0, 2).reshape(y.shape[1], length, *y.shape[3:])


def _over_chunks(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, chunk: int) -> tuple[Any, Any]:
    """`lax.scan` over chunks of the length; a single chunk is computed without the loop."""
    xs = jax.tree.map(lambda x: _chunks(x, chunk), xs)
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs)
    carry, ys = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def linear_cross_entropy(
    hidden_BLD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, targets_BL: jax.Array, weights_BL: jax.Array,
    chunk: int, z_loss: float, cap: float | None, smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Sum over tokens of weight · (cross-entropy + z_loss · log²Z), and of weight · cross-entropy, in nats.

    In the first sum the target is (1 − smoothing) on the token and `smoothing` spread evenly over the vocabulary
    (Szegedy et al. 2016, §7), in the second it is the token alone.

    Logits exist for up to `chunk` positions of each row (on each device, where the length is split) at a time, in
    float32, and never for the whole batch. Under differentiation the gradients are computed together with the logits, so
    that those are computed once. Only the first sum is differentiable, and only in `hidden_BLD`, `table_VD` and `bias_V`.

    log²Z is the z-loss of Chowdhery et al. 2022, "PaLM", §5.
    """

    def step(sums: Any, part: Any) -> tuple[Any, None]:
        hidden_BCD, targets_BC, weights_BC = part
        logits_BCV = _logits(hidden_BCD, table_VD, bias_V, cap)
        return _add(sums, logits_BCV, *_losses(logits_BCV, targets_BC), weights_BC, z_loss, smoothing), None

    sums, _ = _over_chunks(step, (jnp.zeros(()), jnp.zeros(())), (hidden_BLD, targets_BL, weights_BL), chunk)
    return sums


def _losses(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
    return lse_BC - picked_BC, lse_BC


def _add(
    sums: Any, logits_BCV: jax.Array, nll_BC: jax.Array, lse_BC: jax.Array, weights_BC: jax.Array, z_loss: float, smoothing: float
) -> Any:
    loss_BC = nll_BC
    if smoothing:
        loss_BC = (1 - smoothing) * nll_BC + smoothing * (lse_BC - jnp.mean(logits_BCV, axis=-1))
    if z_loss:
        loss_BC = loss_BC + z_loss * jnp.square(lse_BC)
    return sums[0] + jnp.sum(loss_BC * weights_BC), sums[1] + jnp.sum(nll_BC * weights_BC)


def _forward(hidden_BLD, table_VD, bias_V, targets_BL, weights_BL, chunk, z_loss, cap, smoothing):  # type: ignore[no-untyped-def]
    def step(carry: Any, part: Any) -> tuple[Any, jax.Array]:
        sums, grad_VD, grad_V = carry
        hidden_BCD, targets_BC, weights_BC = part
        logits_BCV = _logits(hidden_BCD, table_VD, bias_V, cap)
        nll_BC, lse_BC = _losses(logits_BCV, targets_BC)
        # d/dlogits of nll is softmax − onehot, of log²Z it is 2 · logZ · softmax.
        softmax_BCV = jnp.exp(logits_BCV - lse_BC[:, :, None])
        onehot_BCV = targets_BC[:, :, None] == jnp.arange(logits_BCV.shape[-1])[None, None, :]
        grad_BCV = softmax_BCV * (1 + 2 * z_loss * lse_BC[:, :, None]) - (1 - smoothing) * onehot_BCV.astype(jnp.float32)
        if smoothing:
            grad_BCV = grad_BCV - smoothing / logits_BCV.shape[-1]
        grad_BCV = grad_BCV * weights_BC[:, :, None]
        if cap is not None:
            grad_BCV = grad_BCV * (1 - jnp.square(logits_BCV / cap))
        if grad_V is not None:
            grad_V += jnp.sum(grad_BCV, axis=(0, 1))
        grad_BCV = constrain(grad_BCV.astype(hidden_BCD.dtype), "BLV")
        grad_BCD = jnp.einsum("BCV,VD->BCD", grad_BCV, table_VD.astype(hidden_BCD.dtype))
        grad_VD += jnp.einsum("BCV,BCD->VD", grad_BCV, hidden_BCD, preferred_element_type=jnp.float32)
        return (_add(sums, logits_BCV, nll_BC, lse_BC, weights_BC, z_loss, smoothing), grad_VD, grad_V), grad_BCD

    bias_grad = None if bias_V is None else jnp.zeros(bias_V.shape, jnp.float32)
    carry = ((jnp.zeros(()), jnp.zeros(())), jnp.zeros(table_VD.shape, jnp.float32), bias_grad)
    (sums, grad_VD, grad_V), grad_XBCD = _over_chunks(step, carry, (hidden_BLD, targets_BL, weights_BL), chunk)
    grad_BLD = _joined(grad_XBCD, hidden_BLD.shape[1], chunk)
    return sums, (grad_BLD, grad_VD.astype(table_VD.dtype), grad_V)


def _backward(chunk, z_loss, cap, smoothing, gradients, cotangents):  # type: ignore[no-untyped-def]
    scale, _ = cotangents
    scaled = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), gradients)
    return *scaled, None, None


linear_cross_entropy.defvjp(_forward, _backward)


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
        return _logits(*self.head(hidden_BLD, self.transformer.embed.table), self.config.logit_softcap)

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
        hidden_BLD, table_VD, bias_V = self.head(output.hidden_BLD, self.transformer.embed.table)

        @jax.checkpoint
        def step(sum_B: jax.Array, part: Any) -> tuple[jax.Array, None]:
            hidden_BCD, targets_BC, weights_BC = part
            nll_BC, _ = _losses(_logits(hidden_BCD, table_VD, bias_V, self.config.logit_softcap), targets_BC)
            return sum_B - jnp.sum(nll_BC * weights_BC, axis=1), None

        parts = (hidden_BLD, scored["targets_BL"], scored["weights_BL"])
        zeros_B = jnp.zeros(hidden_BLD.shape[0], jnp.float32)
        return _over_chunks(step, zeros_B, parts, chunk)[0], router_loss(self.config, output)

    def scores(self, batch: Batch, *, chunk: int) -> tuple[jax.Array, jax.Array]:
        """(B, L) float32 log p(target) in nats, and (B, L) whether no token is likelier; logits exist for `chunk` positions at
        a time."""
        hidden_BLD, table_VD, bias_V = self.head(self.transformer(batch).hidden_BLD, self.transformer.embed.table)

        def step(carry: None, part: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
            hidden_BCD, targets_BC = part
            logits_BCV = _logits(hidden_BCD, table_VD, bias_V, self.config.logit_softcap)
            nll_BC, _ = _losses(logits_BCV, targets_BC)
            return carry, (-nll_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC)

        _, (logp_XBC, first_XBC) = _over_chunks(step, None, (hidden_BLD, batch["targets_BL"]), chunk)
        length = hidden_BLD.shape[1]
        return _joined(logp_XBC, length, chunk), _joined(first_XBC, length, chunk)

    def draw(self, batch: Batch, *, chunk: int, key: jax.Array) -> jax.Array:
        """(B, L) int32: at each position a token drawn from the model's own distribution."""
        parts = self.head(self.transformer(batch).hidden_BLD, self.transformer.embed.table)
        hidden_BLD, table_VD, bias_V = jax.tree.map(jax.lax.stop_gradient, parts)

        def step(key: jax.Array, hidden_BCD: jax.Array) -> tuple[jax.Array, jax.Array]:
            key, own = jax.random.split(key)
            return key, jax.random.categorical(own, _logits(hidden_BCD, table_VD, bias_V, self.config.logit_softcap))

        _, drawn_XBC = _over_chunks(step, key, hidden_BLD, chunk)
        return _joined(drawn_XBC, hidden_BLD.shape[1], chunk).astype(jnp.int32)


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
