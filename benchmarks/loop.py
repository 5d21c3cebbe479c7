"""Time what the training loop itself adds to a step, as the batch grows with the number of devices (weak scaling).

The step computes nothing, so that emulated devices are not what is measured. Beside the whole loop (rows made on the host,
prefetched and placed, metrics read, rows of metrics written; a terminal's bar is not drawn) stands the bare minimum: the same
function called again and again with one batch. The difference is the loop's own, for one process whose share of the rows grows
with its devices.

    python benchmarks/loop.py --devices 1 2 4 8 --steps 500 --rounds 5
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROWS, LENGTH = 8, 1024
HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


class Unsaved:
    """In place of checkpoints, which are not the loop's."""

    def save(self, *args: object) -> None:
        pass


def measure(devices: int, steps: int, rounds: int) -> None:
    """Print milliseconds a step of the loop and of the bare call, medians of rounds in turns."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.data import prefetch
    from jaxlm.parallel import ParallelConfig, batch_sharding, make_mesh, place_batch
    from jaxlm.report import Record
    from jaxlm.report.console import console
    from jaxlm.train import TrainConfig, TrainState, Work, fit

    mesh = make_mesh(ParallelConfig(), jax.devices()[:devices])
    rows = {name: np.ones((ROWS * devices, LENGTH), np.int32) for name in ("tokens_BL", "targets_BL", "segments_BL", "weights_BL")}
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def nothing(state, batch):
        names = ("loss", "weight", "grad_norm", "learning_rate", "skipped")
        return TrainState(state.step + 1, {}, {}), {name: jnp.zeros((), jnp.float32) for name in names}

    step = jax.jit(nothing, in_shardings=(whole, batch_sharding(mesh)), out_shardings=whole, donate_argnums=0)

    def begin():
        return TrainState(jax.device_put(jnp.zeros((), jnp.int32), whole), {}, {})

    def loop(count: int) -> float:
        source = ((jax.tree.map(np.copy, rows), i) for i in range(count))
        batches = prefetch(source, lambda pair: (place_batch(pair[0], mesh), pair[1]), 2)
        work = Work(evaluate=lambda state, stop: {"loss": 0.0}, metric="loss")
        with tempfile.TemporaryDirectory() as folder:
            record = Record(pathlib.Path(folder), 0)
            began = time.perf_counter()
            fit(TrainConfig(), count, count + 1, begin(), 0, step, batches, work, mesh=mesh, checkpoints=Unsaved(), record=record)
            taken = time.perf_counter() - began
            record.close()
        return taken

    def bare(count: int) -> float:
        state, batch = begin(), place_batch(rows, mesh)
        began, before = time.perf_counter(), None
        for _ in range(count):
            state, metrics = step(state, batch)
            if before is not None:
                jax.block_until_ready(before)
            before = metrics
        jax.block_until_ready(before)
        return time.perf_counter() - began

    console().quiet = True
    with jax.set_mesh(mesh):
        taken = {"loop": [], "bare": []}
        for side in (loop, bare):
            side(20)
        for _ in range(rounds):
            for side in (loop, bare):
                taken[side.__name__].append(1e3 * (side(2 * steps) - side(steps)) / steps)
    print(*(statistics.median(taken[name]) for name in ("loop", "bare")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)  # in a process of its own: how many devices it has
    options = parser.parse_args()
    if options.inside:
        measure(options.inside, options.steps, options.rounds)
        return
    for count in options.devices:
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        words = ["--inside", str(count), "--steps", str(options.steps), "--rounds", str(options.rounds)]
        done = subprocess.run([sys.executable, __file__, *words], env=env, stdout=subprocess.PIPE, text=True, check=True)
        loop, bare = map(float, done.stdout.split()[-2:])
        print(f"{count} device(s), {ROWS * count} rows: {loop:.2f} ms a step, bare {bare:.2f}, the loop adds {loop - bare:.2f}")


if __name__ == "__main__":
    main()
