"""Checkpoints: asynchronous, atomic, the last n and the best; Orbax does the work."""

import logging
import pathlib
from typing import Any

import jax

from jaxlm.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run, each named by the number of steps taken.

    Parameters and optimiser state are separate items, so that a reader of the model alone never
    loads the optimiser. `progress` is a JSON-able dict: where the data goes on.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        # Orbax reports every save in a dozen lines; a person wants the errors.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.ocp = ocp
        best = policies.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1, keep_checkpoints_without_metrics=False)
        preserve = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(preservation_policy=preserve, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        return self.manager.latest_step()

    def best(self) -> int | None:
        """The step with the lowest held-out loss, or the latest where none was evaluated."""
        scored = {step: metrics["loss"] for step in self.manager.all_steps() if (metrics := self.manager.metrics(step)) is not None}
        return min(scored, key=lambda step: scored[step]) if scored else self.latest()

    def save(self, step: int, state: TrainState, progress: Any, metrics: dict[str, float] | None = None) -> None:
        """Start writing; the state may be donated to the next step at once. A step is saved once."""
        if step in self.manager.all_steps():
            return
        save = self.ocp.args
        items = save.Composite(
            params=save.StandardSave(state.params),
            optimizer=save.StandardSave(state.opt_state),
            progress=save.JsonSave({"step": step, "data": progress}),
        )
        self.manager.save(step, args=items, metrics=metrics)

    def restore(self, step: int, shapes: TrainState, shardings: TrainState) -> tuple[TrainState, Any]:
        """The state at `step`, laid out by `shardings` (any mesh), and its data progress."""
        wanted = jax.tree.map(_abstract, shapes, shardings)
        load = self.ocp.args
        found = self.manager.restore(
            step,
            args=load.Composite(
                params=load.StandardRestore(wanted.params),
                optimizer=load.StandardRestore(wanted.opt_state),
                progress=load.JsonRestore(),
            ),
        )
        count = jax.device_put(jax.numpy.asarray(step, shapes.step.dtype), shardings.step)
        return TrainState(count, found.params, found.optimizer), found.progress["data"]

    def restore_params(self, step: int, shapes: Any, shardings: Any) -> Any:
        """The parameters alone."""
        wanted = jax.tree.map(_abstract, shapes, shardings)
        load = self.ocp.args
        return self.manager.restore(step, args=load.Composite(params=load.StandardRestore(wanted))).params

    def close(self) -> None:
        """Wait for what is being written."""
        self.manager.wait_until_finished()
        self.manager.close()


def _abstract(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
