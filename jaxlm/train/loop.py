"""The loop: takes steps, evaluates, writes samples, saves, and stops when asked.

It is handed its batches, its evaluator and its sampler, and knows nothing of where they come from. The
host dispatches step n, then reads the metrics of step n − 1, so that the device never waits for it.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax

from jaxlm.metrics import lower_is_better
from jaxlm.parallel import settle
from jaxlm.report import Record, bar, count, say
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.step import TrainState


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how often to look."""

    steps: int | None = None
    """Optimiser steps; empty: as many as data.epochs take."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after the other, to save memory; the update is that of one part. Contrastive learning
    runs the model once more for it, as each row is compared with all others (GradCache)."""
    eval_every: int | None = None
    """Steps between evaluations of what was held out, each with a checkpoint; empty: an epoch of rows, 200 steps of text."""
    metric: str | None = None
    """Score by which the best checkpoint is chosen; empty: the task's own."""
    patience: int | None = None
    """Evaluations without a better score after which training stops; empty: never."""
    eval_rows: int | None = None
    """Most held-out rows of an evaluation in training, the first ones; empty: all."""
    log_every: int = 10
    """Steps between rows of metrics."""
    keep: int = 2
    """Newest checkpoints kept, besides the best one."""
    z_loss: float = 0.0
    """Weight of log²Z beside a cross-entropy over the vocabulary (Chowdhery et al. 2022, "PaLM", §5)."""
    loss_chunk: int = 128
    """Positions of each row whose logits exist at a time."""
    sample_prompt: str = "The"
    """What the samples written during training begin with."""
    sample_tokens: int = 80
    """Length of those samples in tokens; 0: none."""

    def __post_init__(self) -> None:
        if self.metric is not None:
            lower_is_better(self.metric)  # a name that no score has is told before anything is read
        for name in ("steps", "accumulate", "eval_every", "patience", "eval_rows", "log_every", "keep", "loss_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.z_loss < 0 or self.sample_tokens < 0:
            raise ValueError(f"z_loss ({self.z_loss}) and sample_tokens ({self.sample_tokens}) must not be negative")


class Batches(Protocol):
    """Batches on the device, each with the progress of the data after it."""

    wait_seconds: float

    def __next__(self) -> tuple[Mapping[str, jax.Array], Any]: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: `finished`, `stopped` because the score no longer rose, `interrupted` by a signal, or with
    `exhausted` data."""

    state: TrainState
    step: int
    ended: Literal["finished", "stopped", "interrupted", "exhausted"]


@dataclasses.dataclass(frozen=True)
class Work:
    """What the loop is told of the task: how to evaluate, what to show, how fast that is."""

    evaluate: Callable[[TrainState, Callable[[], bool]], dict[str, float] | None]
    """The row of an evaluation, `loss` and `metric` among it, or None once its second argument, `stop()`, is true."""
    metric: str
    sample: Callable[[TrainState], str] | None = None
    """A text to show after each evaluation."""
    shown: tuple[str, ...] = ("loss",)
    """Scores that a person sees."""
    figures: Callable[[Mapping[str, float]], Mapping[str, float]] = lambda values: {}
    """Further numbers of a logged step, such as bits per byte."""
    unit: str = "tokens"
    """What the objective's weight counts."""
    flops: float | None = None
    """Of training, for one unit."""
    peak_flops: float | None = None


def better(metric: str, one: float, other: float) -> bool:
    """Whether score `one` of a metric is better than `other`. Raises ValueError for a metric without a declared direction."""
    return one < other if lower_is_better(metric) else one > other


class BestScore:
    """Best score of a run's evaluations so far, and how many evaluations followed it; each is added in constant time."""

    def __init__(self, metric: str, rows: Iterable[Mapping[str, Any]] = ()):
        """`rows` of a record; those of other kinds than `eval` are passed over."""
        self.metric, self.evals_since_best = metric, 0
        self._best: float | None = None
        for row in rows:
            if row["kind"] == "eval":
                self.add(row)

    def add(self, scores: Mapping[str, Any]) -> None:
        """Add one evaluation. A score that is missing or not finite (null in a file of rows) is never the best."""
        score = scores.get(self.metric)
        if score is not None and math.isfinite(score) and (self._best is None or better(self.metric, score, self._best)):
            self._best, self.evals_since_best = score, 0
        else:
            self.evals_since_best += 1


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it SIGINT and SIGTERM ask for a stop after the step at hand; a second SIGINT stops at once. Of several processes
    one that is asked to by SIGTERM has all of them stop after the same step."""
    if jax.process_count() > 1:
        yield _Agreed()
        return
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


class _Agreed:
    """Whether all processes are to stop now: JAX's own handler of SIGTERM passes the wish on, and they agree on a step."""

    def __init__(self) -> None:
        self.calls, self.stop = 0, False

    def __call__(self) -> bool:
        from jax.experimental import multihost_utils

        self.calls += 1  # all processes ask equally often, so that a call is the same moment in all
        self.stop = self.stop or bool(multihost_utils.reached_preemption_sync_point(self.calls))
        return self.stop


class _Log:
    """Turns the metrics of logged steps into rows; speeds are over the steps since the last row."""

    def __init__(self, record: Record, batches: Batches, work: Work):
        self.record, self.batches, self.work = record, batches, work
        self.restart()

    def restart(self) -> None:
        """Begin a new interval, leaving out what passed since the last row (an evaluation, a checkpoint)."""
        self.began, self.waited, self.units, self.steps = time.monotonic(), self.batches.wait_seconds, 0.0, 0

    def add(self, step: int, metrics: Mapping[str, jax.Array], write: bool) -> dict[str, str]:
        """Read one step's metrics; returns the figures to show where a row was written."""
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        self.units += values.pop("weight")
        self.steps += 1
        if values["skipped"]:
            say(f"step {step}: loss or gradient not finite, update skipped")
        if not write:
            return {}
        elapsed, work = max(time.monotonic() - self.began, 1e-9), self.work
        speed = self.units / elapsed
        timing = {
            f"{work.unit}_per_second": speed,
            "step_seconds": elapsed / self.steps,
            "data_wait_seconds": (self.batches.wait_seconds - self.waited) / self.steps,
            **({"model_flops_per_second": speed * work.flops} if work.flops else {}),
            **({"mfu": speed * work.flops / work.peak_flops} if work.flops and work.peak_flops else {}),
        }
        figures = work.figures(values)
        self.record.write("train", step, **values, **figures, **timing)
        self.restart()
        shown = {name.replace("bits_per_byte", "bits/byte"): f"{value:.3f}" for name, value in figures.items()}
        return {"loss": f"{values['loss']:.3f}", **shown, f"{work.unit}/s": count(speed)}


def fit(
    config: TrainConfig,
    steps: int,
    eval_every: int,
    state: TrainState,
    start: int,
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    batches: Batches,
    work: Work,
    *,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    record: Record,
) -> Outcome:
    """Train from step `start` to `steps`, evaluating every `eval_every`."""
    log, best = _Log(record, batches, work), BestScore(work.metric, record.rows)
    pending: tuple[int, Mapping[str, jax.Array]] | None = None
    progress: Any = None
    step, ended = start, "finished"

    with interruptible() as asked, bar("training", steps, "steps", start) as shown:

        def look() -> dict[str, float] | None:
            scores = work.evaluate(state, asked)
            if scores is None:
                return None
            assert work.metric in scores, f"evaluations have no score {work.metric!r}, but {', '.join(scores)}"
            record.write("eval", step, **scores)
            best.add(scores)
            told = ", ".join(f"{name.replace('_', ' ')} {scores[name]:.4f}" for name in work.shown if name in scores)
            say(f"step {step:,}: held-out {told}")
            if work.sample:
                text = work.sample(state)
                record.write("sample", step, text=text)
                say(f"  {' '.join(text.split())[:300]}")
            return scores

        def flush() -> None:
            nonlocal pending
            if pending is not None:
                shown.advance(1, **log.add(*pending, write=pending[0] % config.log_every == 0))
                pending = None

        if start and (start % eval_every == 0 or start == steps) and not record.evaluated(start):
            if scores := look():  # the run was interrupted between this step and the end of its evaluation
                checkpoints.score(start, scores)
            log.restart()
        while step < steps and not asked():
            if best.evals_since_best >= (config.patience or math.inf):
                ended = "stopped"
                break
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
            if step % eval_every == 0 and step < steps and not asked():
                flush()
                if scores := look():
                    checkpoints.save(step, state, progress, scores)
                log.restart()
        flush()
        due = ended == "exhausted" or step == steps
        scores = look() if step > start and due and not asked() else None
        if asked() and not record.evaluated(steps) and ended != "stopped":
            ended = "interrupted"
            say(f"interrupted at step {step:,}: saving")
        if step > start:
            checkpoints.save(step, state, progress, scores)
    batches.close()
    return Outcome(state, step, ended)  # type: ignore[arg-type]
