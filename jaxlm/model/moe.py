"""Mixture of experts: each token goes through a few of many MLPs, chosen by a router.

Letters: B batch · L length · D model width · F width of an expert · E experts · J experts chosen for a token ·
T tokens (B·L) · R rows, one for each token and expert chosen for it (T·J).
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import Mlp, activate, parameter
from jaxlm.parallel.rules import COMPUTED, spec


class Moe(nn.Module):
    """In place of an MLP: the sum of the chosen experts, weighed by the router (Shazeer et al. 2017, eq. 1).

    Dropless: no expert has a capacity, so no token is turned away (Gale et al. 2022, "MegaBlocks"). Softmax over all
    experts, then the best, renormalised with `normalize` (Jiang et al. 2024, "Mixtral", §2.1). Experts have no biases.
    Returns the router's losses too, weighed, as one float32 number: means over the tokens that `keep_BL` keeps.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, keep_BL: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        c, moe, dtype = self.config, self.config.moe, jnp.dtype(self.config.dtype)
        # The router alone computes in float32, with TPUs' full passes: in bfloat16 its exponentials are off by so much
        # that training becomes unstable (Fedus et al. 2022, §2.4; Zoph et al. 2022, §3.4).
        logits_BLE = jnp.einsum(
            "BLD,DE->BLE",
            x_BLD.astype(jnp.float32),
            _Matrix(c, "DE", name="router")(),
            precision=jax.lax.Precision.HIGHEST,
        )
        probabilities_BLE = jax.nn.softmax(logits_BLE, axis=-1)
        up_EDF = _Matrix(c, "EDF", name="up")().astype(dtype)
        gate_EDF = _Matrix(c, "EDF", name="gate")().astype(dtype) if c.gated else None
        down_EFD = _Matrix(c, "EFD", residual=True, name="down")().astype(dtype)
        y_BLD, chosen_BLJ = _split(c, x_BLD, probabilities_BLE, up_EDF, gate_EDF, down_EFD)
        if moe.shared:
            y_BLD = y_BLD + Mlp(dataclasses.replace(c, mlp_width=c.F * moe.shared), name="shared")(x_BLD)

        aux = moe.balance_loss * balance_loss(probabilities_BLE, chosen_BLJ, keep_BL)
        return y_BLD, aux + moe.router_z_loss * z_loss(logits_BLE, keep_BL)


class _Matrix(nn.Module):
    """A kernel under a name of its own, as `Linear` has one; `residual` as there."""

    config: TransformerConfig
    axes: str
    residual: bool = False

    @nn.compact
    def __call__(self) -> jax.Array:
        c = self.config
        scaled = self.residual and c.init == "residual_scaled"
        std = c.init_std / math.sqrt(2 * c.layers) if scaled else c.init_std
        return parameter(self, "kernel", self.axes, nn.initializers.normal(std))


def mix(
    config: TransformerConfig, x_BLD: jax.Array, probabilities_BLE: jax.Array,
    up_EDF: jax.Array, gate_EDF: jax.Array | None, down_EFD: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Σ_j weight_j · expert_j(x) over each token's chosen experts → (B, L, D), and who they are, (B, L, J).

    The rows are sorted by expert, so that each expert multiplies one block of them.
    """
    J, E = config.moe.chosen, config.moe.experts
    weights_BLJ, chosen_BLJ = jax.lax.top_k(probabilities_BLE, J)
    if config.moe.normalize:
        weights_BLJ = weights_BLJ / jnp.sum(weights_BLJ, axis=-1, keepdims=True)

    chosen_R = chosen_BLJ.reshape(-1)
    order_R = jnp.argsort(chosen_R)
    back_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(order_R.size, dtype=order_R.dtype), unique_indices=True)
    rows_E = jnp.sum(chosen_R[:, None] == jnp.arange(E, dtype=chosen_R.dtype)[None, :], axis=0, dtype=jnp.int32)

    x_RD = jnp.take(x_BLD.reshape(-1, x_BLD.shape[-1]), order_R // J, axis=0)
    inner_RF = jax.lax.ragged_dot(x_RD, up_EDF, rows_E)
    if gate_EDF is None:
        inner_RF = activate(config.activation, inner_RF)
    else:
        inner_RF = activate(config.activation, jax.lax.ragged_dot(x_RD, gate_EDF, rows_E)) * inner_RF
    y_RD = jnp.take(jax.lax.ragged_dot(inner_RF, down_EFD, rows_E), back_R, axis=0, unique_indices=True)
    y_BLJD = y_RD.reshape(*chosen_BLJ.shape, -1)
    return jnp.einsum("BLJD,BLJ->BLD", y_BLJD, weights_BLJ.astype(y_BLJD.dtype)), chosen_BLJ


def _split(
    config: TransformerConfig, x: jax.Array, probabilities: jax.Array, up: jax.Array, gate: jax.Array | None, down: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`mix` on a mesh: each device sorts its own rows of the batch, for a top-k or a sort of all would bring every token
    to every device. Devices that share rows each compute a part of F and add up."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return mix(config, x, probabilities, up, gate, down)
    letters = [(x, "BLD"), (probabilities, "BLE"), (up, "EDF"), (gate, "EDF"), (down, "EFD")]
    specs = [None if array is None else spec(axes, array.shape, mesh, COMPUTED) for array, axes in letters]
    (over_F,) = spec("F", up.shape[2:], mesh, COMPUTED)

    def local(*arrays: Any) -> tuple[jax.Array, jax.Array]:
        y, chosen = mix(config, *arrays)
        return y if over_F is None else jax.lax.psum(y, over_F), chosen

    return jax.shard_map(local, in_specs=tuple(specs), out_specs=(specs[0], specs[1]))(x, probabilities, up, gate, down)


def balance_loss(probabilities_BLE: jax.Array, chosen_BLJ: jax.Array, keep_BL: jax.Array | None) -> jax.Array:
    """E · Σ_e f_e · p_e, f_e the share of choices that fell on expert e, p_e its mean probability (Fedus et al. 2022,
    "Switch Transformers", eq. 4–6): 1 where the router is indifferent, E / J where it always takes the same J experts."""
    E = probabilities_BLE.shape[-1]
    hits_BLE = jnp.mean(jax.nn.one_hot(chosen_BLJ, E, dtype=jnp.float32), axis=2)
    f_E, p_E = _mean(hits_BLE, keep_BL), _mean(probabilities_BLE, keep_BL)
    return E * jnp.sum(f_E * p_E)


def z_loss(logits_BLE: jax.Array, keep_BL: jax.Array | None) -> jax.Array:
    """Mean of log² Σ_e exp(logit_e), which keeps the logits small (Zoph et al. 2022, "ST-MoE", eq. 5)."""
    return _mean(jnp.square(jax.nn.logsumexp(logits_BLE, axis=-1)), keep_BL)


def _mean(x_BL: jax.Array, keep_BL: jax.Array | None) -> jax.Array:
    """Over the tokens kept; axes after L remain."""
    if keep_BL is None:
        return jnp.mean(x_BL, axis=(0, 1))
    keep = keep_BL.astype(jnp.float32).reshape(keep_BL.shape + (1,) * (x_BL.ndim - 2))
    return jnp.sum(x_BL * keep, axis=(0, 1)) / jnp.maximum(jnp.sum(keep_BL.astype(jnp.float32)), 1.0)
