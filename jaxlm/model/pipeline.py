"""A stack's layers in stages on different devices, through which parts of the batch go one behind the other.

Letters: B batch, or rows of a part · L length · D model width · X layers · Z stages · M parts of the batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.parallel.rules import RESIDUAL, constrain

Run = Callable[[Any, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]
"""(parameters of a layer, x_BLD, number of the layer, number of the part, what all layers share) → x_BLD, the router's loss."""


def stages() -> int:
    """Over how many devices the mesh that is set splits the layers."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else int(mesh.shape.get("stage", 1))


def pipelined(run: Run, params: Any, x_BLD: jax.Array, shared: Any, layers: int, parts: int, rounds: int) -> tuple[Any, Any]:
    """x after all layers, and the sum over layers and mean over parts of what `run` gives beside it.

    At each tick every stage computes its layers for one part of the batch, and hands it to the next stage (Huang et al.
    2019, "GPipe"); all are written as one array over stages, which the compiler splits, and whose roll is what is sent
    (Xu et al. 2021, "GSPMD", §3.3). Stages idle in (Z − 1) of M · rounds + Z − 1 ticks. With several rounds a part goes
    round again, each stage holding a run of layers for each round (Narayanan et al. 2021, §2.2, "interleaved"): the same
    idle ticks among more, against more sending, and against moving the layers, which are stored in their order, once a step.

    Layers that the stages do not divide are filled up with ones that do nothing. `parts` divides the rows, and with several
    rounds there are at least as many as stages. Leaves of `shared` with a row for each of the batch are cut with it; those
    with one row, or none, go to all parts.
    """
    ways, rows = stages(), x_BLD.shape[0]
    assert rows % parts == 0 and (rounds == 1 or parts >= ways), f"{parts} parts of {rows} rows for {ways} stages"
    each = -(-layers // (ways * rounds))

    def cut(leaf: jax.Array) -> jax.Array:  # every M-th row, so that each device keeps its own
        return jnp.moveaxis(leaf.reshape(rows // parts, parts, *leaf.shape[1:]), 1, 0)

    def staged(leaf: jax.Array) -> jax.Array:
        """(X, …) → (Z, rounds, layers of a run, …)."""
        leaf = jnp.pad(leaf, [(0, ways * rounds * each - layers), *[(0, 0)] * (leaf.ndim - 1)])
        by_run = jnp.moveaxis(leaf.reshape(rounds, ways, each, *leaf.shape[1:]), 1, 0)
        return constrain(by_run, "Z" + "·" * (by_run.ndim - 1), free=True)

    params_Z = jax.tree.map(staged, params)
    x_MBLD, shared_M = cut(x_BLD), jax.tree.map(lambda leaf: cut(leaf) if _by_row(leaf, rows) else leaf, shared)

    def stage(z: jax.Array, tick: jax.Array, own: Any, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What one stage does at a tick."""
        step = tick - z
        round_, part = jnp.clip(step // parts, 0, rounds - 1), step % parts
        run_of = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, round_, keepdims=False), own)
        about = jax.tree.map(
            lambda leaf, whole: jax.lax.dynamic_index_in_dim(leaf, part, keepdims=False) if _by_row(whole, rows) else leaf,
            shared_M, shared,
        )  # fmt: skip
        first = (round_ * ways + z) * each

        def layer(x_BLD: jax.Array, numbered: Any) -> tuple[jax.Array, jax.Array]:
            i, one = numbered
            y_BLD, loss = run(one, x_BLD, jnp.minimum(first + i, layers - 1), part, about)
            if ways * rounds * each == layers:
                return y_BLD, loss
            there = first + i < layers
            return jnp.where(there, y_BLD, x_BLD), jnp.where(there, loss, 0.0)

        x_BLD, losses = jax.lax.scan(layer, x_BLD, (jnp.arange(each, dtype=jnp.int32), run_of))
        return x_BLD, jnp.where((step >= 0) & (step < parts * rounds), jnp.sum(losses), 0.0)

    all_stages = jax.vmap(stage, in_axes=(0, None, 0, 0), spmd_axis_name="stage")
    number_Z = jnp.arange(ways, dtype=jnp.int32)

    def take(parts_MBLD: jax.Array, t: jax.Array) -> jax.Array:
        return constrain(jax.lax.dynamic_index_in_dim(parts_MBLD, t % parts, keepdims=False), "BLD", RESIDUAL)

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        x_ZBLD, done_MBLD, loss = carry
        # In the first round a part of the batch enters, later what came out of the last stage a round ago. Its sharding is
        # stated before it joins the stages: left to the compiler, a TPU's gathers all parts of all devices at every tick.
        enters = take(x_MBLD, t)
        if rounds > 1:
            enters = jnp.where(t < parts, enters, take(done_MBLD, t))
        x_ZBLD = constrain(x_ZBLD.at[0].set(enters), "ZBLD", RESIDUAL)
        x_ZBLD, losses_Z = all_stages(number_Z, t, params_Z, x_ZBLD)
        x_ZBLD = constrain(x_ZBLD, "ZBLD", RESIDUAL)
        # What comes out before the first part does is overwritten by the part whose place it takes.
        last = constrain(x_ZBLD[-1], "BLD", RESIDUAL)
        done_MBLD = jax.lax.dynamic_update_index_in_dim(done_MBLD, last, (t - (ways - 1)) % parts, 0)
        return (jnp.roll(x_ZBLD, 1, axis=0), done_MBLD, loss + jnp.sum(losses_Z)), None

    start = (jnp.zeros_like(x_MBLD, shape=(ways, *x_MBLD.shape[1:])), jnp.zeros_like(x_MBLD), jnp.zeros((), jnp.float32))
    (_, done_MBLD, loss), _ = jax.lax.scan(tick, start, jnp.arange(parts * rounds + ways - 1, dtype=jnp.int32))
    return jnp.moveaxis(done_MBLD, 0, 1).reshape(x_BLD.shape), loss / parts


def _by_row(leaf: jax.Array, rows: int) -> bool:
    return leaf.ndim > 0 and leaf.shape[0] == rows and rows > 1
