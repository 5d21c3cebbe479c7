"""The pure train and eval steps, and the state they carry."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.model import Model, precision
from jaxlm.parallel import batch_sharding, fitting, spread, stored_shardings
from jaxlm.train.objectives import Objective, WholeBatch, split_rows
from jaxlm.train.optim import OptimConfig, at_step
from jaxlm.train.tune import TuneConfig, Tuning

Batch = Mapping[str, Any]
USUAL = OptimConfig()
# Sets the key of a step's rounding apart from those of the parts of its batch.
_ROUNDING = 0x7FFFFFFF


def widened(params: Any) -> Any:
    """Parameters in float32: as the optimiser sees them, and as their average is held."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


@flax.struct.dataclass
class TrainState:
    """Everything a step changes, and what it takes along. Randomness is not among it: it is drawn from (seed, step)."""

    step: Any
    params: Any
    """What is trained: the model's parameters, or the tree that the tuning takes from them."""
    opt_state: Any
    frozen: Any = dataclasses.field(default_factory=dict)
    """What the tuning freezes, which no step changes."""
    average: Any = None
    """Exponential moving average of `params`, where one is kept."""

    @property
    def scored(self) -> Any:
        """What is evaluated and exported: the average where there is one, of schedule_free the one that its parameters were
        made of, else the last parameters."""
        if isinstance(self.opt_state, optax.contrib.ScheduleFreeState):
            # Its z may lie in finer parts than the parameters, or on the host.
            z = jax.tree.map(_beside, self.opt_state.z, self.params)
            return _schedule_free_average(self.opt_state._replace(z=z, base_optimizer_state=()), self.params)
        return self.params if self.average is None else self.average


def _beside(array: jax.Array, like: jax.Array) -> jax.Array:
    return array if array.sharding == like.sharding else jax.device_put(array, like.sharding)


_schedule_free_average = jax.jit(optax.contrib.schedule_free_eval_params)


def state_shapes(
    model: Model, optimizer: optax.GradientTransformation, tuning: Tuning | None = None, optim: OptimConfig = USUAL
) -> TrainState:
    """Shapes and dtypes of the state, without computing it."""
    tuning = tuning or Tuning(TuneConfig(), model)
    wide = jax.eval_shape(widened, tuning.shapes)
    count, opt_state = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(optimizer.init, wide)
    return TrainState(count, tuning.shapes, opt_state, tuning.frozen_shapes, None if optim.average is None else wide)


def state_shardings(
    model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, tuning: Tuning | None = None,
    optim: OptimConfig = USUAL,
) -> TrainState:  # fmt: skip
    """Where each part of the state lies: moments and average as their parameters do, moments also in finer parts or on the host
    if `optim` says so."""
    tuning = tuning or Tuning(TuneConfig(), model)
    whole = NamedSharding(mesh, PartitionSpec())
    params = stored_shardings(tuning.axes, tuning.shapes, mesh)
    frozen = stored_shardings(tuning.frozen_axes, tuning.frozen_shapes, mesh)

    def place(array: Any, sharding: NamedSharding) -> Any:
        if isinstance(array, optax.MaskedNode):
            return array
        there = fitting(array, sharding)
        there = spread(there, array.shape) if optim.zero1 else there
        return there.with_memory_kind("pinned_host") if optim.offload else there

    opt_state = optax.tree_map_params(
        optimizer, place, state_shapes(model, optimizer, tuning).opt_state, params,
        transform_non_params=lambda _: whole, is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )  # fmt: skip
    return TrainState(whole, params, opt_state, frozen, None if optim.average is None else params)


def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    tuning: Tuning | None = None,
    params: Any = None,
    optim: OptimConfig = USUAL,
) -> TrainState:
    """A fresh state, computed straight into its shardings: no device ever holds the whole.

    It starts from `params`, the model's (loaded ones, say), or from parameters drawn from the seed. Those given are taken
    over, as a step takes its state: they are gone afterwards, so that no device holds them twice.
    """
    tuning = tuning or Tuning(TuneConfig(), model)

    def init(key: jax.Array, params: Any) -> TrainState:
        trained, frozen = tuning.split(_begun(model, key, params), jax.random.fold_in(key, 1))
        wide = widened(trained)
        start = None if optim.average is None else jax.tree.map(jnp.copy, wide)
        return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(wide), frozen, start)

    return _start(init, state_shardings(model, optimizer, mesh, tuning, optim), seed, params)


def init_frozen(model: Model, seed: int, mesh: Mesh, tuning: Tuning, params: Any = None) -> Any:
    """The frozen part alone of what `init_state` makes of the same arguments, for checkpoints do not hold it; it takes
    `params` over too."""

    def init(key: jax.Array, params: Any) -> Any:
        return tuning.split(_begun(model, key, params), jax.random.fold_in(key, 1))[1]

    shardings = stored_shardings(tuning.frozen_axes, tuning.frozen_shapes, mesh)
    return _start(init, shardings, seed, params)


def _begun(model: Model, key: jax.Array, params: Any) -> Any:
    """The model's parameters at the start, as it holds them: those given, or drawn."""
    if params is None:
        return model.init(key)
    return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, model.shapes)


def _start(init: Callable[[jax.Array, Any], Any], shardings: Any, seed: int, params: Any) -> Any:
    with warnings.catch_warnings():  # matrices that are held in fewer bits leave no room for those given
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        return jax.jit(init, out_shardings=shardings, donate_argnums=1)(jax.random.key(seed), params)


def make_train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    accumulate: int = 1,
    tuning: Tuning | None = None,
    optim: OptimConfig = USUAL,
    stochastic: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Jitted `(state, batch) → (state, metrics)`; the state is donated.

    The objective is given the model's parameters, which `tuning` makes once a step of those that are trained and those that
    are frozen; gradients are of the former. `optim` says where the optimiser's state lies and whether an average is kept,
    `stochastic` that the objective draws random numbers though the model may drop nothing.

    With `accumulate` > 1 the rows are taken in that many parts, one after the other, and their
    gradients summed before the division by the total weight: the same update as in one part. An objective over the whole
    batch (`objectives.WholeBatch`) runs the model in that many parts itself. An update
    whose loss or gradient is not finite is skipped and counted in the metric `skipped`.
    """
    tuning = tuning or Tuning(TuneConfig(), model)
    if accumulate > 1 and isinstance(objective, WholeBatch):
        objective, accumulate = objective.in_parts(accumulate), 1
    draws = stochastic or model.config.dropout > 0 or model.config.quantize != "none"
    shardings = state_shardings(model, optimizer, mesh, tuning, optim)
    near = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), shardings.opt_state)
    finer = jax.tree.map(lambda sharding, shape: spread(sharding, shape.shape), shardings.params, tuning.shapes)

    def gradients(state: TrainState, batch: Batch, rng: jax.Array | None) -> tuple[Any, dict[str, jax.Array]]:
        def parts(trained: Any) -> tuple[Any, Any]:
            return tuning.parts(trained, state.frozen, jnp.dtype(model.config.dtype), by_layer=True)

        moving, pull, still = jax.vjp(parts, state.params, has_aux=True)

        def loss_sum(moving: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
            loss, weight, metrics = objective(model.apply, tuning.join(moving, still), batch, rng)
            return loss, {"loss": loss, "weight": weight, **metrics}

        def gradient(batch: Batch, rng: jax.Array | None) -> tuple[Any, dict[str, jax.Array]]:
            grads, sums = jax.grad(loss_sum, has_aux=True)(moving, batch, rng)
            grads = widened(pull(grads)[0])  # of the trained numbers alone: what is summed over parts is no larger
            return (jax.lax.with_sharding_constraint(grads, finer) if optim.zero1 else grads), sums

        if accumulate == 1:
            return gradient(batch, rng)
        split = split_rows(batch, accumulate)

        def add(total: Any, indexed: Any) -> tuple[Any, None]:
            i, part = indexed
            part_rng = None if rng is None else jax.random.fold_in(rng, i)
            return jax.tree.map(jnp.add, total, gradient(part, part_rng)), None

        first = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, first, rng))
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulate), split))
        return total

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, sums = gradients(state, batch, rng if draws else None)
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.global_norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer step with floats
            wide = widened(state.params)
            held = jax.device_put(state.opt_state, near) if optim.offload else state.opt_state
            updates, opt_state = optimizer.update(grads, at_step(held, state.step), wide)
            learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
        params = optax.apply_updates(wide, updates)
        if tuning.narrow:
            params = _narrowed(params, state.params, jax.random.fold_in(rng, _ROUNDING))
        averaged = None if optim.average is None else _averaged(optim.average, state.step, state.average, params)
        fine = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(fine, new, old)

        after, before = (params, opt_state, averaged), (state.params, held, state.average)
        new = dataclasses.replace(state, step=state.step + 1)
        params, opt_state, averaged = jax.tree.map(keep, after, before)
        means = {name: value / weight for name, value in sums.items() if name != "weight"}
        return dataclasses.replace(new, params=params, opt_state=opt_state, average=averaged), {
            **means,
            "weight": sums["weight"],
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "skipped": 1 - fine.astype(jnp.int32),
        }

    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(train_step, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=(shardings, whole), donate_argnums=0)


def _narrowed(params: Any, like: Any, key: jax.Array) -> Any:
    """Float32 parameters at random as those held in fewer bits (Zamirai et al. 2020, "Revisiting BFloat16 Training", §3)."""
    leaves, form = jax.tree.flatten(params)
    held = jax.tree.leaves(like)
    keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
    drawn = [precision.stochastic(leaf, own.dtype, one) for leaf, own, one in zip(leaves, held, keys, strict=True)]
    return jax.tree.unflatten(form, drawn)


def _averaged(decay: float, step: jax.Array, average: Any, params: Any) -> Any:
    """average + (1 − d) · (params − average) with d = min(decay, (1 + n) / (10 + n)) after n steps, the warm-up of
    TensorFlow's `ExponentialMovingAverage`: an average of few steps forgets its start, and needs no correction."""
    n = step.astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    return jax.tree.map(lambda mean, new: mean + share * (new - mean), average, widened(params))


def make_eval_step(model: Model, objective: Objective, mesh: Mesh) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Jitted `(params, batch) → sums` without dropout: `loss`, `weight` and the objective's metrics. `params` are the
    model's, merged."""

    def eval_step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        loss, weight, metrics = objective(model.apply, params, batch, None)
        return {"loss": loss, "weight": weight, **metrics}

    params = stored_shardings(model.axes, model.shapes, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(eval_step, in_shardings=(params, batch_sharding(mesh)), out_shardings=whole)
