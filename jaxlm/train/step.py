"""The pure train and eval steps, and the state they carry."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.model import Model
from jaxlm.parallel import batch_sharding, stored_shardings
from jaxlm.train.objectives import Objective

Batch = Mapping[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything a step changes. Randomness is not among it: it is drawn from (seed, step)."""

    step: Any
    params: Any
    opt_state: Any


def state_shapes(model: Model, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, without computing it."""
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), model.shapes, jax.eval_shape(optimizer.init, model.shapes))


def state_shardings(model: Model, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where each part of the state lies: the optimiser's moments lie as their parameters do."""
    whole = NamedSharding(mesh, PartitionSpec())
    params = stored_shardings(model.axes, model.shapes, mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state_shapes(model, optimizer).opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, params, opt_state)


def init_state(model: Model, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """A fresh state, computed straight into its shardings: no device ever holds the whole."""

    def init(key: jax.Array) -> TrainState:
        params = model.init(key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=state_shardings(model, optimizer, mesh))(jax.random.key(seed))


def make_train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    accumulate: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Jitted `(state, batch) → (state, metrics)`; the state is donated.

    With `accumulate` > 1 the rows are taken in that many parts, one after the other, and their
    gradients summed before the division by the total weight: the same update as in one part. An update
    whose loss or gradient is not finite is skipped and counted in the metric `skipped`.
    """
    drops = model.config.dropout > 0

    def loss_sum(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, weight, metrics = objective(model.apply, params, batch, rng)
        return loss, {"loss": loss, "weight": weight, **metrics}

    gradient = jax.grad(loss_sum, has_aux=True)

    def accumulated(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[Any, dict[str, jax.Array]]:
        if accumulate == 1:
            return gradient(params, batch, rng)
        # Every device keeps its rows: part i takes each accumulate-th row, not a run of neighbours.
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)

        def add(total: Any, indexed: Any) -> tuple[Any, None]:
            i, part = indexed
            part_rng = None if rng is None else jax.random.fold_in(rng, i)
            return jax.tree.map(jnp.add, total, gradient(params, part, part_rng)), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first, rng))
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), parts))
        return total

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step) if drops else None
        grads, sums = accumulated(state.params, batch, rng)
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.global_norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer step with floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        params = optax.apply_updates(state.params, updates)
        fine = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(fine, new, old)

        new = TrainState(state.step + 1, jax.tree.map(keep, params, state.params), jax.tree.map(keep, opt_state, state.opt_state))
        means = {name: value / weight for name, value in sums.items() if name != "weight"}
        return new, {
            **means,
            "weight": sums["weight"],
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "skipped": 1 - fine.astype(jnp.int32),
        }

    shardings = state_shardings(model, optimizer, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(train_step, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, whole), donate_argnums=0)


def make_eval_step(model: Model, objective: Objective, mesh: Mesh) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Jitted `(params, batch) → sums` without dropout: `loss`, `weight` and the objective's metrics."""

    def eval_step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        loss, weight, metrics = objective(model.apply, params, batch, None)
        return {"loss": loss, "weight": weight, **metrics}

    params = stored_shardings(model.axes, model.shapes, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(eval_step, in_shardings=(params, batch_sharding(mesh)), out_shardings=whole)
