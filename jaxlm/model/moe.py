"""Mixture of experts: each token goes through a few of many MLPs, chosen by a router.

Letters: B batch · L length · D model width · F width of an expert · E experts · J experts chosen for a token ·
R rows, one for each token and expert chosen for it (B·L·J) · P blocks of M rows, each of one expert ·
Z devices that share the experts · I, O width of what a matrix takes and gives.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig
from jaxlm.model.layers import Mlp, activate, kernel
from jaxlm.model.lora import MatrixAxes
from jaxlm.model.quantized import compose
from jaxlm.parallel.rules import COMPUTED, platform, spec


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
            _Matrix(c, "DE", name="router")().astype(jnp.float32),
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
        w = kernel(self, self.axes, nn.initializers.normal(std))
        return compose(w, MatrixAxes.of(tuple(self.axes))) if isinstance(w, Mapping) else w


def mix(
    config: TransformerConfig, x_BLD: jax.Array, probabilities_BLE: jax.Array,
    up_EDF: jax.Array, gate_EDF: jax.Array | None, down_EFD: jax.Array, ways: int = 1,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Σ_j weight_j · expert_j(x) over each token's chosen experts → (B, L, D), and who they are, (B, L, J). Of `ways`
    devices each has its part of the experts, and the tokens travel to them."""
    J = config.moe.chosen
    weights_BLJ, chosen_BLJ = jax.lax.top_k(probabilities_BLE, J)
    if config.moe.normalize:
        weights_BLJ = weights_BLJ / jnp.sum(weights_BLJ, axis=-1, keepdims=True)
    x_RD, chosen_R = jnp.repeat(x_BLD.reshape(-1, x_BLD.shape[-1]), J, axis=0), chosen_BLJ.reshape(-1)
    run = functools.partial(experts, config.activation, up_EDF=up_EDF, gate_EDF=gate_EDF, down_EFD=down_EFD)
    y_RD = run(x_RD, chosen_R) if ways == 1 else travel(run, x_RD, chosen_R, up_EDF.shape[0], ways)
    y_BLJD = y_RD.reshape(*chosen_BLJ.shape, -1)
    return jnp.einsum("BLJD,BLJ->BLD", y_BLJD, weights_BLJ.astype(y_BLJD.dtype)), chosen_BLJ


def travel(
    run: Callable[[jax.Array, jax.Array], jax.Array], x_RD: jax.Array, chosen_R: jax.Array, held: int, ways: int
) -> jax.Array:
    """`run(rows, their experts)` where those experts are: device i of the axis `expert` holds `held` of them from i · held on.

    Rows are sorted by expert and so by device, sent there, and what comes back is put in order again. No row is turned away:
    a device makes room for all rows of all devices, of which the compiler's ragged exchange sends only those that are there.
    """
    R, D = x_RD.shape
    order_R = jnp.argsort(chosen_R)
    sorted_R = jnp.take(chosen_R, order_R)
    home_R = sorted_R // held
    sent_Z = jnp.sum((home_R[:, None] == jnp.arange(ways, dtype=home_R.dtype)[None]).astype(jnp.int32), axis=0)
    begin_Z = jnp.cumsum(sent_Z) - sent_Z
    swap = functools.partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0)
    x_RD = jnp.take(x_RD, order_R, axis=0)
    if platform() == "cpu":  # which has no ragged exchange: every device gets a whole buffer, mostly empty
        slot_R = home_R * R + jnp.arange(R, dtype=home_R.dtype) - jnp.take(begin_Z, home_R)

        def there(rows: jax.Array, empty: Any) -> jax.Array:
            buffer = jnp.full((ways * R, *rows.shape[1:]), empty, rows.dtype).at[slot_R].set(rows, unique_indices=True)
            return swap(buffer.reshape(ways, R, *rows.shape[1:])).reshape(buffer.shape)

        y_RD = run(there(x_RD, 0), there(sorted_R % held, held))
        y_RD = jnp.take(swap(y_RD.reshape(ways, R, D)).reshape(ways * R, D), slot_R, axis=0, unique_indices=True)
    else:
        # Device z writes its rows for me at z · R of my buffer, and gets them back from there.
        me, mine_Z = jax.lax.axis_index("expert"), swap(sent_Z)
        slots_Z = jnp.arange(ways, dtype=jnp.int32) * R

        def send(rows: jax.Array, empty: Any) -> jax.Array:
            buffer = jnp.full((ways * R, *rows.shape[1:]), empty, rows.dtype)
            at_Z = jnp.full((ways,), me * R, jnp.int32)
            return jax.lax.ragged_all_to_all(rows, buffer, begin_Z, sent_Z, at_Z, mine_Z, axis_name="expert")

        y_RD = run(send(x_RD, 0), send(sorted_R % held, held))
        y_RD = jax.lax.ragged_all_to_all(y_RD, jnp.zeros_like(x_RD), slots_Z, mine_Z, swap(begin_Z), sent_Z, axis_name="expert")
    return jnp.zeros_like(y_RD).at[order_R].set(y_RD, unique_indices=True)


def experts(
    activation: str, x_RD: jax.Array, chosen_R: jax.Array, *, up_EDF: jax.Array, gate_EDF: jax.Array | None, down_EFD: jax.Array
) -> jax.Array:
    """Each row through its expert; a row whose expert is E, one more than there are, is empty and gives zeros.

    Each expert's rows are gathered into blocks of their own, the last of which is filled up.
    """
    E, (R, D) = up_EDF.shape[0], x_RD.shape
    # Large blocks keep matrix units busy; but what fills them up, half a block an expert, is computed too.
    M = min(512, max(8, R // (4 * E)))
    hits_RE = (chosen_R[:, None] == jnp.arange(E, dtype=chosen_R.dtype)[None, :]).astype(jnp.int32)
    rank_R = jnp.take_along_axis(jnp.cumsum(hits_RE, axis=0), jnp.minimum(chosen_R, E - 1)[:, None], axis=1)[:, 0] - 1
    ends_E = jnp.cumsum(-(-jnp.sum(hits_RE, axis=0) // M))  # in blocks
    begin_E = jnp.concatenate([jnp.zeros_like(ends_E[:1]), ends_E[:-1]])

    P = min(R, R // M + E)  # never more blocks than this, whatever the router says
    place_R = jnp.where(chosen_R < E, jnp.take(begin_E, chosen_R, mode="clip") * M + rank_R, P * M)
    x_PMD = jnp.zeros_like(x_RD, shape=(P * M, D)).at[place_R].set(x_RD, mode="drop").reshape(P, M, D)
    expert_P = jnp.minimum(jnp.searchsorted(ends_E, jnp.arange(P, dtype=jnp.int32), side="right"), E - 1)
    multiply = functools.partial(grouped, expert_P=expert_P, used=ends_E[-1])
    inner_PMF = multiply(x_PMD, up_EDF)
    if gate_EDF is None:
        inner_PMF = activate(activation, inner_PMF)
    else:
        inner_PMF = activate(activation, multiply(x_PMD, gate_EDF)) * inner_PMF
    return jnp.take(multiply(inner_PMF, down_EFD).reshape(P * M, D), place_R, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def grouped(x_PMI: jax.Array, w_EIO: jax.Array, expert_P: jax.Array, used: jax.Array) -> jax.Array:
    """Each block of rows times the matrix of its expert, of the first `used` blocks; the others give zeros → (P, M, O).

    `jax.lax.ragged_dot` says the same, but what it is compiled to multiplies all rows with all experts' matrices on CPUs
    and GPUs, and on TPUs at the sizes that we tried (jax 0.10 and 0.12). Autodiff would add a gradient of all matrices
    at every block.
    """

    def one(p: jax.Array, y_PMO: jax.Array) -> jax.Array:
        return y_PMO.at[p].set(x_PMI[p] @ w_EIO[expert_P[p]])

    return jax.lax.fori_loop(0, used, one, jnp.zeros_like(x_PMI, shape=(*x_PMI.shape[:2], w_EIO.shape[2])))


def _grouped_forward(x: jax.Array, w: jax.Array, expert: jax.Array, used: jax.Array) -> tuple[jax.Array, Any]:
    return grouped(x, w, expert, used), (x, w, expert, used)


def _grouped_backward(saved: Any, grad_PMO: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    x_PMI, w_EIO, expert_P, used = saved

    def one(p: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx_PMI, dw_EIO = grads
        dx_MI = jnp.einsum("MO,IO->MI", grad_PMO[p], w_EIO[expert_P[p]])
        dw_IO = jnp.einsum("MI,MO->IO", x_PMI[p], grad_PMO[p], preferred_element_type=jnp.float32)
        return dx_PMI.at[p].set(dx_MI), dw_EIO.at[expert_P[p]].add(dw_IO)

    zeros = (jnp.zeros_like(x_PMI), jnp.zeros_like(w_EIO, dtype=jnp.float32))
    dx_PMI, dw_EIO = jax.lax.fori_loop(0, used, one, zeros)
    return dx_PMI, dw_EIO.astype(w_EIO.dtype), None, None


grouped.defvjp(_grouped_forward, _grouped_backward)


def _split(
    config: TransformerConfig, x: jax.Array, probabilities: jax.Array, up: jax.Array, gate: jax.Array | None, down: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`mix` on a mesh: each device gathers its own rows of the batch, for a top-k or a gather of all would bring every
    token to every device. Devices that share rows each compute a part of F and add up; devices that share the experts
    send each other tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return mix(config, x, probabilities, up, gate, down)
    letters = [(x, "BLD"), (probabilities, "BL·"), (up, "EDF"), (gate, "EDF"), (down, "EFD")]
    specs = [None if array is None else spec(axes, array.shape, mesh, COMPUTED) for array, axes in letters]
    over_F, ways = _axes(specs[2], 2), mesh.shape["expert"] if _axes(specs[2], 0) else 1

    run = functools.partial(mix, config, ways=ways)

    def local(x: jax.Array, probabilities: jax.Array, *matrices: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        y, chosen = run(x, probabilities, *matrices)  # type: ignore[arg-type]
        return jax.lax.psum(y, over_F), chosen

    # What `grouped`, whose gradient is our own, varies over cannot be checked where a pipeline adds its stages to it.
    split = jax.shard_map(local, in_specs=tuple(specs), out_specs=(specs[0], specs[1]), check_vma=False)
    return split(x, probabilities, up, gate, down)


def _axes(of: Any, dimension: int) -> tuple[str, ...]:
    """The mesh axes that a dimension is split over."""
    axes = of[dimension]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


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
