"""Cross-entropy over the vocabulary in chunks of the length: logits exist for one chunk at a time.

Letters: B batch · L length · C chunk of the length · D model width · V vocabulary · I devices that split the batch ·
J devices that split the length · X, Y rows and places of one such device.

Where devices split the tokens, each keeps the whole table (its own part of the vocabulary, under `tensor`) for all chunks and
adds up the table's gradient over its own tokens in float32. The table is gathered once a call and the gradients are summed over
devices once a call, however many chunks there are. Both cost memory of the size of the table on each device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.model.chunked import even, fill
from jaxlm.parallel.rules import COMPUTED, Split, constrain, length_ways, split_over, sum_over_devices


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(logits / cap): bounded, and nearly the logits where they are small (Gemma 2, 2024, §2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def vocabulary_logits(hidden_BCD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, cap: float | None) -> jax.Array:
    """Float32 logits (B, C, V) of hidden states."""
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


def gathered_table(table_VD: jax.Array, dtype: Any) -> jax.Array:
    """The table in the dtype of the products, every row whole, for all chunks."""
    return constrain(table_VD.astype(dtype), "VD")


# --- chunks -----------------------------------------------------------------------------------


def _cut(length: int, chunk: int) -> tuple[int, int]:
    """Number of devices that share the length, and positions that each of them has in a chunk."""
    ways = length_ways() if length % length_ways() == 0 else 1
    return ways, even(length // ways, chunk, 1)


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, L, …) → (number of chunks, B, chunk, …). Each chunk holds a part of every device's positions, so that all devices
    have work; the last one is padded with zeros."""
    (B, L), rest = x.shape[:2], x.shape[2:]
    ways, size = _cut(L, chunk)
    split = fill(x.reshape(B, ways, L // ways, *rest), {2: size}).reshape(B, ways, -1, size, *rest)
    return jnp.moveaxis(split, 2, 0).reshape(-1, B, ways * size, *rest)


def _joined(y: jax.Array, length: int, chunk: int) -> jax.Array:
    """Results of chunks, in the order of the length again and without the padding."""
    (count, B), rest = y.shape[:2], y.shape[3:]
    ways, size = _cut(length, chunk)
    split = jnp.moveaxis(y.reshape(count, B, ways, size, *rest), 0, 2).reshape(B, ways, count * size, *rest)
    return split[:, :, : length // ways].reshape(B, length, *rest)


def _over_chunks(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, chunk: int) -> tuple[Any, Any]:
    """`lax.scan` over chunks of the length; a single chunk is computed without the loop."""
    xs = jax.tree.map(lambda x: _chunks(x, chunk), xs)
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs)
    carry, ys = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda y: y[None], ys)


class _Devices(NamedTuple):
    """How devices split the tokens of a chunk."""

    rows: Split
    length: Split

    @classmethod
    def of(cls, rows: int, length: int) -> "_Devices":
        return cls(split_over("B", rows), split_over("L", length))

    def split(self, x_BC: jax.Array) -> jax.Array:
        """(B, C, …) → (I, X, J, Y, …), where each device has an I and a J of its own."""
        (I, J), (B, C), rest = (self.rows.ways, self.length.ways), x_BC.shape[:2], x_BC.shape[2:]
        return x_BC.reshape(I, B // I, J, C // J, *rest)

    def zeros(self, axes: str, *shape: int) -> jax.Array:
        return self.keep(jnp.zeros((self.rows.ways, self.length.ways, *shape), jnp.float32), axes)

    def keep(self, x_IJ: jax.Array, axes: str) -> jax.Array:
        return constrain(x_IJ, f"IJ{axes}", {**COMPUTED, "I": self.rows.axes, "J": self.length.axes})

    def sum(self, x_BC: jax.Array) -> jax.Array:
        """The sums (I, J) of each device's numbers."""
        return self.keep(jnp.sum(self.split(x_BC), axis=(1, 3)), "")


# --- losses of tokens -------------------------------------------------------------------------


def _losses(logits_BCV: jax.Array, targets_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats, and logZ, of each token."""
    lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
    return lse_BC - picked_BC, lse_BC


def _objective(logits_BCV: jax.Array, nll_BC: jax.Array, lse_BC: jax.Array, z_loss: float, smoothing: float) -> jax.Array:
    """The cross-entropy with label smoothing and z-loss."""
    loss_BC = nll_BC
    if smoothing:
        loss_BC = (1 - smoothing) * nll_BC + smoothing * (lse_BC - jnp.mean(logits_BCV, axis=-1))
    return loss_BC + z_loss * jnp.square(lse_BC) if z_loss else loss_BC


def _totals(sums: tuple[jax.Array, jax.Array], z_loss: float, smoothing: float) -> tuple[jax.Array, jax.Array]:
    """Sums over all devices of the objective and of the cross-entropy, of which one is summed where both are the same."""
    total = jnp.sum(sums[0])
    return total, jnp.sum(sums[1]) if z_loss or smoothing else total


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
    devices, table_VD = _Devices.of(*targets_BL.shape), gathered_table(table_VD, hidden_BLD.dtype)

    def step(sums: Any, part: Any) -> tuple[Any, None]:
        hidden_BCD, targets_BC, weights_BC = part
        logits_BCV = vocabulary_logits(hidden_BCD, table_VD, bias_V, cap)
        nll_BC, lse_BC = _losses(logits_BCV, targets_BC)
        loss_BC = _objective(logits_BCV, nll_BC, lse_BC, z_loss, smoothing)
        return jax.tree.map(lambda total, x: total + devices.sum(x * weights_BC), sums, (loss_BC, nll_BC)), None

    zeros = (devices.zeros(""), devices.zeros(""))
    sums, _ = _over_chunks(step, zeros, (hidden_BLD, targets_BL, weights_BL), chunk)
    return _totals(sums, z_loss, smoothing)


def _loss_and_gradients(hidden_BLD, table_VD, bias_V, targets_BL, weights_BL, chunk, z_loss, cap, smoothing):  # type: ignore[no-untyped-def]
    """The sums of `linear_cross_entropy`, and the gradients of the first in hidden states, table and bias."""
    devices, table, dtype = _Devices.of(*targets_BL.shape), gathered_table(table_VD, hidden_BLD.dtype), hidden_BLD.dtype

    def step(carry: Any, part: Any) -> tuple[Any, jax.Array]:
        sums, grad_IJVD, grad_IJV = carry
        hidden_BCD, targets_BC, weights_BC = part
        logits_BCV = vocabulary_logits(hidden_BCD, table, bias_V, cap)
        nll_BC, lse_BC = _losses(logits_BCV, targets_BC)
        loss_BC = _objective(logits_BCV, nll_BC, lse_BC, z_loss, smoothing)
        sums = jax.tree.map(lambda total, x: total + devices.sum(x * weights_BC), sums, (loss_BC, nll_BC))
        # d/dlogits of nll is softmax − onehot, of log²Z it is 2 · logZ · softmax.
        softmax_BCV = jnp.exp(logits_BCV - lse_BC[:, :, None])
        onehot_BCV = targets_BC[:, :, None] == jnp.arange(logits_BCV.shape[-1])[None, None, :]
        grad_BCV = softmax_BCV * (1 + 2 * z_loss * lse_BC[:, :, None]) - (1 - smoothing) * onehot_BCV.astype(jnp.float32)
        if smoothing:
            grad_BCV = grad_BCV - smoothing / logits_BCV.shape[-1]
        grad_BCV = grad_BCV * weights_BC[:, :, None]
        if cap is not None:
            grad_BCV = grad_BCV * (1 - jnp.square(logits_BCV / cap))
        if grad_IJV is not None:
            grad_IJV = devices.keep(grad_IJV + jnp.sum(devices.split(grad_BCV), axis=(1, 3)), "V")
        grad_BCV = constrain(grad_BCV.astype(dtype), "BLV")
        grad_BCD = jnp.einsum("BCV,VD->BCD", grad_BCV, table)
        both = devices.split(grad_BCV), devices.split(hidden_BCD)
        grad_IJVD += jnp.einsum("IXJYV,IXJYD->IJVD", *both, preferred_element_type=jnp.float32)
        return (sums, devices.keep(grad_IJVD, "VD"), grad_IJV), grad_BCD

    carry = (
        (devices.zeros(""), devices.zeros("")),
        devices.zeros("VD", *table_VD.shape),
        None if bias_V is None else devices.zeros("V", *bias_V.shape),
    )
    (sums, grad_IJVD, grad_IJV), grad_XBCD = _over_chunks(step, carry, (hidden_BLD, targets_BL, weights_BL), chunk)
    grad_BLD = _joined(grad_XBCD, hidden_BLD.shape[1], chunk)
    grad_VD = sum_over_devices(grad_IJVD, "VD", *devices)
    grad_V = None if grad_IJV is None else jnp.sum(grad_IJV, axis=(0, 1))
    return _totals(sums, z_loss, smoothing), (grad_BLD, grad_VD.astype(table_VD.dtype), grad_V)


def _loss_backward(chunk, z_loss, cap, smoothing, gradients, cotangents):  # type: ignore[no-untyped-def]
    scale, _ = cotangents
    scaled = jax.tree.map(lambda gradient: gradient * scale.astype(gradient.dtype), gradients)
    return *scaled, None, None


linear_cross_entropy.defvjp(_loss_and_gradients, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_nll(
    hidden_BLD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, targets_BL: jax.Array, chunk: int, cap: float | None
) -> jax.Array:
    """(B, L) float32: cross-entropy of each target in nats; logits exist for `chunk` positions at a time, and are computed
    again in the backward pass."""
    table_VD = gathered_table(table_VD, hidden_BLD.dtype)

    def step(carry: None, part: Any) -> tuple[None, jax.Array]:
        hidden_BCD, targets_BC = part
        return carry, _losses(vocabulary_logits(hidden_BCD, table_VD, bias_V, cap), targets_BC)[0]

    _, nll_XBC = _over_chunks(step, None, (hidden_BLD, targets_BL), chunk)
    return _joined(nll_XBC, hidden_BLD.shape[1], chunk)


def _nll_forward(hidden_BLD, table_VD, bias_V, targets_BL, chunk, cap):  # type: ignore[no-untyped-def]
    return token_nll(hidden_BLD, table_VD, bias_V, targets_BL, chunk, cap), (hidden_BLD, table_VD, bias_V, targets_BL)


def _nll_backward(chunk, cap, saved, grad_BL):  # type: ignore[no-untyped-def]
    """The gradient of a sum of losses whose weights are what comes back for each token."""
    return *_loss_and_gradients(*saved, grad_BL, chunk, 0.0, cap, 0.0)[1], None


token_nll.defvjp(_nll_forward, _nll_backward)


def token_scores(
    hidden_BLD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, targets_BL: jax.Array, chunk: int, cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """(B, L) float32 log p(target) in nats, and (B, L) whether no token is likelier."""
    table_VD = gathered_table(table_VD, hidden_BLD.dtype)

    def step(carry: None, part: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_BCD, targets_BC = part
        logits_BCV = vocabulary_logits(hidden_BCD, table_VD, bias_V, cap)
        nll_BC, _ = _losses(logits_BCV, targets_BC)
        return carry, (-nll_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC)

    _, (logp_XBC, first_XBC) = _over_chunks(step, None, (hidden_BLD, targets_BL), chunk)
    length = hidden_BLD.shape[1]
    return _joined(logp_XBC, length, chunk), _joined(first_XBC, length, chunk)


def draw_tokens(
    hidden_BLD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None, chunk: int, cap: float | None, key: jax.Array
) -> jax.Array:
    """(B, L) int32: at each position a token drawn from the distribution of its logits."""
    table_VD = gathered_table(table_VD, hidden_BLD.dtype)

    def step(key: jax.Array, hidden_BCD: jax.Array) -> tuple[jax.Array, jax.Array]:
        key, own = jax.random.split(key)
        return key, jax.random.categorical(own, vocabulary_logits(hidden_BCD, table_VD, bias_V, cap))

    _, drawn_XBC = _over_chunks(step, key, hidden_BLD, chunk)
    return _joined(drawn_XBC, hidden_BLD.shape[1], chunk).astype(jnp.int32)
