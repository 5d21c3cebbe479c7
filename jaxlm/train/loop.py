"""The loop: takes steps, evaluates, writes samples, saves, and stops when asked.

It is handed its batches, its evaluator and its sampler, and knows nothing of where they come from. The
host dispatches step n, then reads the metrics of step n − 1, so that the device never waits for it.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax

from jaxlm.parallel import settle
from jaxlm.report import Record, bar, count, say
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to look."""

    steps: int = 1000
    """Optimiser steps."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after the other, to save memory."""
    eval_every: int = 200
    """Steps between evaluations of the held-out text, each with a sample and a checkpoint."""
    log_every: int = 10
    """Steps between rows of metrics."""
    keep: int = 2
    """Newest checkpoints kept, besides the best one."""
    z_loss: float = 0.0
    """Weight of log²Z beside the cross-entropy."""
    loss_chunk: int = 128
    """Positions of each row whose logits exist at a time."""
    sample_prompt: str = "The"
    """What the samples written during training begin with."""
    sample_tokens: int = 80
    """Length of those samples in tokens; 0: none."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "eval_every", "log_every", "keep", "loss_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.z_loss < 0 or self.sample_tokens < 0:
            raise ValueError(f"z_loss ({self.z_loss}) and sample_tokens ({self.sample_tokens}) must not be negative")


class Batches(Protocol):
    """Batches on the device, each with the progress of the data after it."""

    wait_seconds: float

    def __next__(self) -> tuple[Mapping[str, jax.Array], Any]: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: `finished`, `interrupted` by a signal, or `exhausted` data."""

    state: TrainState
    step: int
    ended: Literal["finished", "interrupted", "exhausted"]


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it SIGINT and SIGTERM ask for a stop after the step at hand; a second SIGINT stops at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log:
    """Turns the metrics of logged steps into rows; speeds are over the steps since the last row."""

    def __init__(self, record: Record, batches: Batches, bits: float, flops: float, peak: float | None):
        self.record, self.batches, self.bits, self.flops, self.peak = record, batches, bits, flops, peak
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, leaving out what passed since the last row (an evaluation, a checkpoint)."""
        self.began, self.waited, self.tokens, self.steps = time.monotonic(), self.batches.wait_seconds, 0.0, 0

    def add(self, step: int, metrics: Mapping[str, jax.Array], write: bool) -> dict[str, str]:
        """Read one step's metrics; returns the figures to show where a row was written."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.tokens += values.pop("weight")
        self.steps += 1
        if values["skipped"]:
            say(f"step {step}: loss or gradient not finite, update skipped")
        if not write:
            return {}
        elapsed = max(time.monotonic() - self.began, 1e-9)
        speed = self.tokens / elapsed
        timing = {
            "tokens_per_second": speed,
            "step_seconds": elapsed / self.steps,
            "data_wait_seconds": (self.batches.wait_seconds - self.waited) / self.steps,
            "model_flops_per_second": speed * self.flops,
            **({"mfu": speed * self.flops / self.peak} if self.peak else {}),
        }
        bits = values["nll"] * self.bits
        self.record.write("train", step, **values, bits_per_byte=bits, **timing)
        self.restart()
        return {"loss": f"{values['loss']:.3f}", "bits/byte": f"{bits:.3f}", "tokens/s": count(speed)}


def fit(
    config: TrainConfig,
    state: TrainState,
    start: int,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Batches,
    *,
    mesh: jax.sharding.Mesh,
    evaluate: Callable[[Any, Callable[[], bool]], dict[str, float] | None],
    sample: Callable[[Any], str] | None,
    checkpoints: Checkpoints,
    record: Record,
    bits_per_nat: float,
    flops_per_token: float,
    peak_flops: float | None,
) -> Outcome:
    """Train from step `start` to `config.steps`.

    `evaluate(params, stop)` gives the row of an evaluation, `loss` and `bits_per_byte` among it, or None
    once `stop()` is true; `sample(params)` a text. `bits_per_nat` turns nats per token into bits per byte of the training text.
    """
    log = _Log(record, batches, bits_per_nat, flops_per_token, peak_flops)
    pending: tuple[int, Mapping[str, jax.Array]] | None = None
    progress: Any = None
    step, ended = start, "finished"

    with interruptible() as asked, bar("training", config.steps, "steps", start) as shown:

        def look() -> dict[str, float] | None:
            scores = evaluate(state.params, asked)
            if scores is None:
                return None
            record.write("eval", step, **scores)
            say(f"step {step:,}: held-out loss {scores['loss']:.4f}, {scores['bits_per_byte']:.4f} bits per byte")
            if sample:
                text = sample(state.params)
                record.write("sample", step, text=text)
                say(f"  {' '.join(text.split())[:300]}")
            return scores

        def flush() -> None:
            nonlocal pending
            if pending is not None:
                shown.advance(1, **log.add(*pending, write=pending[0] % config.log_every == 0))
                pending = None

        if start and (start % config.eval_every == 0 or start == config.steps) and not record.evaluated(start):
            if scores := look():  # the run was interrupted between this step and the end of its evaluation
                checkpoints.score(start, scores)
            log.restart()
        while step < config.steps and not asked():
            try:
                batch, progress = next(batches)
            except StopIteration:
                ended = "exhausted"
                break
            state, metrics = train_step(state, batch)
            settle(mesh, metrics)
            flush()
            step += 1
            pending = (step, metrics)
            if step % config.eval_every == 0 and step < config.steps and not asked():
                flush()
                if scores := look():
                    checkpoints.save(step, state, progress, scores)
                log.restart()
        flush()
        due = ended == "exhausted" or step == config.steps
        scores = look() if step > start and due and not asked() else None
        if asked() and not record.evaluated(config.steps):
            ended = "interrupted"
            say(f"interrupted at step {step:,}: saving")
        if step > start:
            checkpoints.save(step, state, progress, scores)
    batches.close()
    return Outcome(state, step, ended)  # type: ignore[arg-type]
