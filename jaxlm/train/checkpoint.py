"""Checkpoints: asynchronous, atomic, the last n and the best; Orbax does the work."""

import json
import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxlm.train.step import TrainState, widened


class Checkpoints:
    """The checkpoints of one run, each named by the number of steps taken.

    Trained parameters, their average where one is evaluated, and optimiser state are separate items, so that a reader of the
    model alone never loads the optimiser. What a tuning freezes is not saved: the config says how it is made.
    `progress` is a JSON-able dict: where the data goes on. The best is the one with the lowest `metric`, or with the highest.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2, metric: str = "loss", higher: bool = False):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        # Orbax reports every save in a dozen lines; a person wants the errors.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.ocp = ocp

        def rank(metrics: Mapping[str, float]) -> float:
            value = metrics.get(metric, math.nan)
            return -math.inf if math.isnan(value) else value if higher else -value

        self.rank = rank
        best = policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False)
        preserve = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        # The policy alone says what is kept; without a best_fn the metrics would not be written.
        options = ocp.CheckpointManagerOptions(preservation_policy=preserve, best_fn=rank, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def best(self) -> int | None:
        """The step with the best metric, or the latest where none was evaluated."""
        self.manager.wait_until_finished()  # the metrics of a step that is being written are not there yet
        found = {step: self.manager.metrics(step) for step in self.manager.all_steps()}
        scored = {step: self.rank(metrics) for step, metrics in found.items() if metrics is not None}
        return max(scored, key=lambda step: scored[step]) if scored else self.latest()

    def save(self, step: int, state: TrainState, progress: Any, metrics: dict[str, float] | None = None) -> None:
        """Start writing; the state may be donated to the next step at once. A step is saved once."""
        if step in self.manager.all_steps():
            return
        save = self.ocp.args
        scored = state.scored
        average = {} if scored is state.params else {"average": save.StandardSave(scored)}
        items = save.Composite(
            params=save.StandardSave(state.params),
            optimizer=save.StandardSave(state.opt_state),
            progress=save.JsonSave({"step": step, "data": progress}),
            **average,
        )
        self.manager.save(step, args=items, metrics=metrics)

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add its metrics to a step that was saved before it was evaluated."""
        if self.manager.metrics(step) is not None:
            return
        if jax.process_index() == 0:  # as Orbax writes them, which changes nothing that is saved
            folder = pathlib.Path(self.manager.directory) / str(step) / "metrics"
            folder.mkdir(exist_ok=True)
            (folder / "metrics").write_text(json.dumps(dict(metrics)), encoding="utf8")
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"metrics of step {step}")
        self.manager.reload()

    def restore(self, step: int, shapes: TrainState, shardings: TrainState, frozen: Any = None) -> tuple[TrainState, Any]:
        """The state at `step`, laid out by `shardings` (any mesh), and its data progress. `frozen` goes into the state:
        what the tuning freezes, made again (`init_frozen`)."""
        wanted = jax.tree.map(_abstract, shapes, shardings)
        load = self.ocp.args
        average = {} if wanted.average is None else {"average": load.StandardRestore(wanted.average)}
        found = self.manager.restore(
            step,
            args=load.Composite(
                params=load.StandardRestore(wanted.params),
                optimizer=load.StandardRestore(wanted.opt_state),
                progress=load.JsonRestore(),
                **average,
            ),
        )
        count = jax.device_put(jax.numpy.asarray(step, shapes.step.dtype), shardings.step)
        state = TrainState(count, found.params, found.optimizer, frozen or {}, found.average if average else None)
        return state, found.progress["data"]

    def restore_params(self, step: int, shapes: Any, shardings: Any) -> Any:
        """What is evaluated and exported: the average of the trained parameters where the step has one, else themselves."""
        item = "average" if "average" in self.manager.item_metadata(step) else "params"
        wanted = jax.tree.map(_abstract, jax.eval_shape(widened, shapes) if item == "average" else shapes, shardings)
        load = self.ocp.args
        return self.manager.restore(step, args=load.Composite(**{item: load.StandardRestore(wanted)}))[item]

    def close(self) -> None:
        """Wait for what is being written."""
        self.manager.wait_until_finished()
        self.manager.close()


def _abstract(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
