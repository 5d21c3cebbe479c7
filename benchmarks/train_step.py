"""Time one float32 training step of jaxlm against PyTorch on the CPU.

Both sides run a GPT-2 shaped decoder (learned positions, pre-LayerNorm, tanh GELU, tied head), no
dropout, cross entropy, gradient clipping by global norm and AdamW, from the same initial weights on
the same tokens. The PyTorch side is `GPT2LMHeadModel` from transformers, eager and, where it works,
under `torch.compile`.

Each side lives in a process of its own, so that neither's thread pool or memory allocator disturbs
the other's, and the processes take turns: what slows the machine down for a while then slows all of
them down, and the ratio of neighbouring measurements stays meaningful on a busy machine.

    python benchmarks/train_step.py --shapes 4x128@12x64 --rounds 15
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import platform
import re
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY, CLIP = 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0
TOLERANCE = 1e-3
BLOCK_SECONDS = 0.5  # a measurement repeats the step for about this long


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    batch: int
    length: int
    heads: int
    vocab: int

    @property
    def name(self):
        return f"{self.layers}x{self.width}@{self.batch}x{self.length}"

    @property
    def tokens(self):
        return self.batch * self.length


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(4, 128, 12, 64, heads=4, vocab=128),
        Shape(6, 384, 8, 256, heads=6, vocab=4096),
        Shape(12, 768, 2, 512, heads=12, vocab=50304),
    )
}


def initial_weights(shape):
    """Weights by GPT-2's names (matrices as [in, out]), and one batch of random tokens."""
    rng = np.random.default_rng(0)

    def normal(*dims):
        return (0.02 * rng.standard_normal(dims)).astype(np.float32)

    def constant(value, *dims):
        return np.full(dims, value, np.float32)

    d = shape.width
    weights = {"wte.weight": normal(shape.vocab, d), "wpe.weight": normal(shape.length, d)}
    for i in range(shape.layers):
        for name in ("ln_1", "ln_2"):
            weights[f"h.{i}.{name}.weight"] = constant(1, d)
            weights[f"h.{i}.{name}.bias"] = constant(0, d)
        for name, fan_in, fan_out in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, 4 * d),
            ("mlp.c_proj", 4 * d, d),
        ):
            weights[f"h.{i}.{name}.weight"] = normal(fan_in, fan_out)
            weights[f"h.{i}.{name}.bias"] = constant(0, fan_out)
    weights["ln_f.weight"], weights["ln_f.bias"] = constant(1, d), constant(0, d)
    tokens = rng.integers(0, shape.vocab, (shape.batch, shape.length + 1))
    return weights, tokens[:, :-1], tokens[:, 1:]


# ---------------------------------------------------------------------------------------------
# jaxlm. Only `jaxlm_step` and `keep_freed_memory` are called from outside this section.


def jaxlm_step(shape):
    """Return `(step, state)`, where `step(state)` gives the next state and the loss before the update."""
    import jax

    from jaxlm.config import build
    from jaxlm.model import Model, TransformerConfig
    from jaxlm.parallel import ParallelConfig, make_mesh, place_batch
    from jaxlm.train import OptimConfig, init_state, make_optimizer, make_schedule, make_train_step, objectives

    weights, inputs, targets = initial_weights(shape)
    sizes = {"layers": shape.layers, "width": shape.width, "heads": shape.heads, "vocab_size": shape.vocab}
    config = build(TransformerConfig, {"preset": "gpt2-small", **sizes, "positions": shape.length, "unroll": True})
    model, mesh = Model(config), make_mesh(ParallelConfig(), jax.devices()[:1])
    rates = {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0, "weight_decay": WEIGHT_DECAY}
    optim = OptimConfig(**rates, beta1=BETA1, beta2=BETA2, eps=EPSILON, clip=CLIP)
    schedule = make_schedule(optim, 1)
    optimizer = make_optimizer(optim, schedule)
    batch = {
        "tokens_BL": inputs.astype(np.int32),
        "targets_BL": targets.astype(np.int32),
        "weights_BL": np.ones(targets.shape, np.float32),
    }
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, 0, mesh)
        state = state.replace(params=jax.tree.map(jax.device_put, jaxlm_params(shape, weights), model_shardings(state)))
        chunk = max(1, 512 // shape.batch)
        update = make_train_step(model, objectives.tokens(chunk), optimizer, schedule, mesh, seed=0)
        batch = place_batch(batch, mesh)

    def step(state):
        with jax.set_mesh(mesh):
            state, metrics = update(state, batch)
        return state, metrics["loss"]

    return step, state


def model_shardings(state):
    import jax

    return jax.tree.map(lambda x: x.sharding, state.params)


def jaxlm_params(shape, weights):
    """GPT-2's weights by name as jaxlm's tree: layers stacked, heads as an axis of their own."""
    n, d = shape.heads, shape.width

    def layers(name, *dims):
        return np.stack([weights[f"h.{i}.{name}"].reshape(dims) for i in range(shape.layers)])

    def norm(name):
        return {"scale": layers(f"{name}.weight", d), "bias": layers(f"{name}.bias", d)}

    kernels = np.split(layers("attn.c_attn.weight", d, 3 * d), 3, axis=-1)
    biases = np.split(layers("attn.c_attn.bias", 3 * d), 3, axis=-1)
    attention = {
        name: {"kernel": kernel.reshape(shape.layers, d, n, d // n), "bias": bias.reshape(shape.layers, n, d // n)}
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
    }
    attention["out"] = {"kernel": layers("attn.c_proj.weight", n, d // n, d), "bias": layers("attn.c_proj.bias", d)}
    up = {"kernel": layers("mlp.c_fc.weight", d, 4 * d), "bias": layers("mlp.c_fc.bias", 4 * d)}
    down = {"kernel": layers("mlp.c_proj.weight", 4 * d, d), "bias": layers("mlp.c_proj.bias", d)}
    blocks = {"attention": attention, "attention_norm": norm("ln_1"), "mlp_norm": norm("ln_2"), "mlp": {"up": up, "down": down}}
    return {
        "transformer": {
            "embed": {"table": weights["wte.weight"]},
            "decoder": {
                "embed_positions": {"table": weights["wpe.weight"]},
                "final_norm": {"scale": weights["ln_f.weight"], "bias": weights["ln_f.bias"]},
                "layers": blocks,
            },
        }
    }


# ---------------------------------------------------------------------------------------------
# PyTorch


def torch_step(shape, threads, compiled, adamw):
    """Return `step()`, which gives the loss before the update; `adamw` are the optimizer's extra arguments."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    weights, inputs, targets = initial_weights(shape)
    config = transformers.GPT2Config(
        vocab_size=shape.vocab, n_positions=shape.length, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False, bos_token_id=0, eos_token_id=0,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    model.transformer.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    inputs, targets = torch.from_numpy(inputs), torch.from_numpy(targets).reshape(-1)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (BETA1, BETA2), EPSILON, **adamw)

    def loss_fn(inputs, targets):
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.view(-1, shape.vocab), targets)

    if compiled:
        loss_fn = torch.compile(loss_fn)

    def step():
        loss = loss_fn(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


ADAMW_FORMS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}


def seconds(step, repeats):
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def fastest_adamw(shape, threads):
    times = {}
    for form, extra in ADAMW_FORMS.items():
        step = torch_step(shape, threads, False, extra)
        first = seconds(step, 2)
        times[form] = min(seconds(step, 1) for _ in range(max(2, min(20, int(1 / first)))))
        del step
    return min(times, key=times.get)


# ---------------------------------------------------------------------------------------------
# One process a side


def worker(pipe, side, shape, threads, adamw, keep_memory):
    """Send the first losses, then answer each number of repeats with the seconds one step took."""
    try:
        if hasattr(os, "sched_setaffinity"):
            # XLA makes as many threads as it may use cores, and has no setting for it.
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        os.environ["JAX_PLATFORMS"] = "cpu"
        if keep_memory == "both" or (keep_memory == "jaxlm" and side == "jaxlm"):
            from jaxlm.host import keep_freed_memory  # what `jaxlm train` does by itself

            keep_freed_memory()
        if side == "jaxlm":
            update, state = jaxlm_step(shape)

            def one():
                nonlocal state
                state, loss = update(state)
                return loss

            def timed(repeats):
                # Steps are dispatched ahead, as a training loop does; only the last one is waited for.
                start = time.perf_counter()
                for _ in range(repeats):
                    loss = one()
                float(loss)
                return (time.perf_counter() - start) / repeats
        else:
            if adamw is None:
                adamw = fastest_adamw(shape, threads)
            one = torch_step(shape, threads, side == "torch.compile", ADAMW_FORMS[adamw])
            timed = partial(seconds, one)
        losses = [float(one()) for _ in range(3)]
        pipe.send(("ready", (losses, adamw)))
        while (repeats := pipe.recv()) is not None:
            if repeats > 1:
                timed(1)  # the other side has had the caches since
            pipe.send(("seconds", timed(repeats)))
    except Exception as error:
        pipe.send(("failed", (str(error).strip() or repr(error)).splitlines()[0]))
        if os.environ.get("BENCHMARK_TRACEBACK"):
            traceback.print_exc()


class Side:
    def __init__(self, name, *args):
        context = mp.get_context("spawn")
        self.name, self.problem = name, None
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=worker, args=(other, name, *args), daemon=True)
        self.process.start()
        other.close()  # so that a worker that dies ends the wait for its answer
        ready = self.receive()
        self.losses, self.adamw = ready if ready else (None, None)

    def receive(self):
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            kind, value = "failed", "its process ended"
        if kind == "failed":
            self.problem = value
            return None
        return value

    def measure(self, repeats):
        self.pipe.send(repeats)
        value = self.receive()
        if value is None:
            raise SystemExit(f"{self.name} failed while it was timed: {self.problem}")
        return value

    def close(self):
        if self.process.is_alive() and not self.problem:
            self.pipe.send(None)
        self.process.join()


def relative_difference(a, b):
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def compare(shape, args, say):
    """Median seconds a step by side, the ratios jaxlm/eager of the rounds, and what to remark."""
    names = ["torch eager", "jaxlm"] + (["torch.compile"] if args.compile else [])
    sides, notes, adamw = [], [], None
    try:
        # Eager first: it finds the fastest AdamW, which the compiled side then uses too.
        for name in names:
            say(f"{shape.name}: starting {name}")
            side = Side(name, shape, args.threads, adamw, args.keep_memory)
            sides.append(side)
            if name == "torch eager" and side.adamw:
                adamw = side.adamw
                notes.append(f"{shape.name}: fastest AdamW of torch is {adamw}")
            if side.problem:
                notes.append(f"{shape.name}: {name} does not run here: {side.problem}")
        running = [side for side in sides if not side.problem]
        reference = next((side for side in running if side.name == "torch eager"), None)
        for side in running:
            if reference and side is not reference:
                gap = relative_difference(side.losses, reference.losses)
                if not gap <= TOLERANCE:
                    raise SystemExit(
                        f"{shape.name}: the losses of {side.name} {side.losses} and torch eager "
                        f"{reference.losses} differ by {gap:.1e}: not the same computation, nothing is timed"
                    )
                notes.append(f"{shape.name}: losses of 3 steps, {side.name} against eager: {gap:.0e} apart")
        repeats = {side.name: max(1, round(BLOCK_SECONDS / side.measure(1))) for side in running}
        times = {name: [] for name in repeats}
        for round_ in range(args.rounds):
            say(f"{shape.name}: round {round_ + 1} of {args.rounds}")
            # The order alternates, so that a drift of the machine favours no side.
            for side in running if round_ % 2 else reversed(running):
                times[side.name].append(side.measure(repeats[side.name]))
    finally:
        for side in sides:
            side.close()
    ratio = None
    if {"jaxlm", "torch eager"} <= times.keys():
        ratio = [a / b for a, b in zip(times["jaxlm"], times["torch eager"], strict=True)]
    return {name: statistics.median(ts) for name, ts in times.items()}, ratio, notes


def processor():
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE",
                        help=f"layers x width @ batch x length, of {', '.join(SHAPES)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=11, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads for each side")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile too")
    parser.add_argument("--keep-memory", choices=("none", "jaxlm", "both"), default="jaxlm",
                        help="in which processes malloc keeps freed memory (see jaxlm/host.py)")  # fmt: skip
    args = parser.parse_args()

    from rich.console import Console
    from rich.table import Table

    # A table cut to 80 columns loses its numbers when the output is sent to a file.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    status = Console(stderr=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax", "torch", "transformers"))
    console.print(f"{processor()}, {os.cpu_count()} cores, {args.threads} threads; {platform.platform(terse=True)}")
    console.print(f"Python {platform.python_version()}, {versions}")
    console.print(f"float32, {args.rounds} interleaved rounds, medians; malloc keeps memory for: {args.keep_memory}")

    table = Table(title="Training step")
    columns = ("shape", "jaxlm ms", "eager ms", "compile ms", "jaxlm/eager", "jaxlm tok/s", "eager tok/s", "compile tok/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "shape" else "right")
    remarks, complete = [], True
    with status.status("") as line:
        for name in args.shapes:
            shape = SHAPES[name]
            times, ratio, notes = compare(shape, args, line.update)
            remarks += notes
            order = [times.get(side) for side in ("jaxlm", "torch eager", "torch.compile")]
            complete &= ratio is not None
            if ratio:
                remarks.append(f"{name}: jaxlm/eager between {min(ratio):.3f} and {max(ratio):.3f} over the rounds")
            table.add_row(
                name,
                *(f"{t * 1e3:.1f}" if t else "-" for t in order),
                f"{statistics.median(ratio):.3f}" if ratio else "-",
                *(f"{shape.tokens / t:,.0f}" if t else "-" for t in order),
            )
    console.print(table)
    for remark in remarks:
        console.print(remark, highlight=False)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
