"""What stands on the hidden states: the language-model head, its logits and its loss.

Letters: B batch · L length · C chunk of the length · D model width · V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.cache import Cache
from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import Embed
from jaxlm.model.transformer import Batch, Transformer
from jaxlm.parallel.rules import constrain


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(logits / cap): bounded, and nearly the logits where they are small (Gemma 2, 2024, §2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _logits(hidden_BCD: jax.Array, table_VD: jax.Array, cap: float | None) -> jax.Array:
    table_VD = table_VD.astype(hidden_BCD.dtype)
    logits_BCV = jnp.einsum("BCD,VD->BCV", hidden_BCD, table_VD, preferred_element_type=jnp.float32)
    return constrain(soft_cap(logits_BCV, cap), "BLV")


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, L, …) → (L/chunk, B, chunk, …): along the length, so that rows stay on their devices."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _over_chunks(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, chunk: int) -> tuple[Any, Any]:
    """`lax.scan` over chunks of the length; a single chunk is computed without the loop."""
    xs = jax.tree.map(lambda x: _chunks(x, chunk), xs)
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs)
    carry, ys = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def linear_cross_entropy(
    hidden_BLD: jax.Array, table_VD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array,
    chunk: int, z_loss: float, cap: float | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Sum over tokens of weight · (cross-entropy + z_loss · log²Z), and of weight · cross-entropy, in nats.

    Logits exist for `chunk` positions of each row at a time, in float32, and never for the whole
    batch. Under differentiation the gradients are computed together with the logits, so that those are
    computed once. Only the first sum is differentiable, and only in `hidden_BLD` and `table_VD`.

    `chunk` must divide L. log²Z is the z-loss of Chowdhery et al. 2022, "PaLM", §5.
    """

    def step(sums: Any, part: Any) -> tuple[Any, None]:
        hidden_BCD, targets_BC, weights_BC = part
        nll_BC, lse_BC = _losses(_logits(hidden_BCD, table_VD, cap), targets_BC)
        return _add(sums, nll_BC, lse_BC, weights_BC), None

    (loss, z), _ = _over_chunks(step, (jnp.zeros(()), jnp.zeros(())), (hidden_BLD, targets_BL, weights_BL), chunk)
    return loss + z_loss * z, loss


def _losses(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
    return lse_BC - picked_BC, lse_BC


def _add(sums: Any, nll_BC: jax.Array, lse_BC: jax.Array, weights_BC: jax.Array) -> Any:
    return sums[0] + jnp.sum(nll_BC * weights_BC), sums[1] + jnp.sum(jnp.square(lse_BC) * weights_BC)


def _forward(hidden_BLD, table_VD, targets_BL, weights_BL, chunk, z_loss, cap):  # type: ignore[no-untyped-def]
    def step(carry: Any, part: Any) -> tuple[Any, jax.Array]:
        sums, grad_VD = carry
        hidden_BCD, targets_BC, weights_BC = part
        logits_BCV = _logits(hidden_BCD, table_VD, cap)
        nll_BC, lse_BC = _losses(logits_BCV, targets_BC)
        # d/dlogits of nll is softmax − onehot, of log²Z it is 2 · logZ · softmax.
        softmax_BCV = jnp.exp(logits_BCV - lse_BC[:, :, None])
        onehot_BCV = targets_BC[:, :, None] == jnp.arange(logits_BCV.shape[-1])[None, None, :]
        grad_BCV = softmax_BCV * (1 + 2 * z_loss * lse_BC[:, :, None]) - onehot_BCV.astype(jnp.float32)
        grad_BCV = grad_BCV * weights_BC[:, :, None]
        if cap is not None:
            grad_BCV = grad_BCV * (1 - jnp.square(logits_BCV / cap))
        grad_BCV = constrain(grad_BCV.astype(hidden_BCD.dtype), "BLV")
        grad_BCD = jnp.einsum("BCV,VD->BCD", grad_BCV, table_VD.astype(hidden_BCD.dtype))
        grad_VD += jnp.einsum("BCV,BCD->VD", grad_BCV, hidden_BCD, preferred_element_type=jnp.float32)
        return (_add(sums, nll_BC, lse_BC, weights_BC), grad_VD), grad_BCD

    carry = ((jnp.zeros(()), jnp.zeros(())), jnp.zeros(table_VD.shape, jnp.float32))
    ((loss, z), grad_VD), grad_XBCD = _over_chunks(step, carry, (hidden_BLD, targets_BL, weights_BL), chunk)
    grad_BLD = jnp.moveaxis(grad_XBCD, 0, 1).reshape(hidden_BLD.shape)
    return (loss + z_loss * z, loss), (grad_BLD, grad_VD.astype(table_VD.dtype))


def _backward(chunk, z_loss, cap, gradients, cotangents):  # type: ignore[no-untyped-def]
    scale, _ = cotangents
    grad_BLD, grad_VD = gradients
    return grad_BLD * scale.astype(grad_BLD.dtype), grad_VD * scale.astype(grad_VD.dtype), None, None


linear_cross_entropy.defvjp(_forward, _backward)


class LanguageModel(nn.Module):
    """A Transformer with a head over the vocabulary."""

    config: TransformerConfig
    train: bool = False

    def setup(self) -> None:
        self.transformer = Transformer(self.config, self.train)
        if not self.config.tie_embeddings:
            self.head = Embed(self.config, "VD")

    def _table(self) -> jax.Array:
        return self.transformer.embed.table if self.config.tie_embeddings else self.head.table

    def __call__(self, batch: Batch, cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
        """Float32 logits (B, L, V) of the token after each of `tokens_BL`, and the cache."""
        hidden_BLD, cache = self.transformer(batch, cache)
        return _logits(hidden_BLD, self._table(), self.config.logit_softcap), cache

    def loss(self, batch: Batch, *, chunk: int, z_loss: float = 0.0) -> tuple[jax.Array, jax.Array]:
        """Sums over `targets_BL` weighted by `weights_BL`, as `linear_cross_entropy` gives them."""
        hidden_BLD, _ = self.transformer(batch)
        length = hidden_BLD.shape[1]
        chunk = max(size for size in range(1, min(chunk, length) + 1) if length % size == 0)
        return linear_cross_entropy(
            hidden_BLD, self._table(), batch["targets_BL"], batch["weights_BL"], chunk, z_loss, self.config.logit_softcap
        )
