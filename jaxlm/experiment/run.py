"""One run in its folder: a config → every built part, trained, saved and told. The only place that composes."""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm.config import unknown
from jaxlm.data import load_tokenizer, prefetch
from jaxlm.experiment.config import CHANGEABLE, ExperimentConfig
from jaxlm.experiment.finetuning import Finetuning
from jaxlm.experiment.job import Batches, Job
from jaxlm.experiment.pretraining import Pretraining
from jaxlm.experiment.unread import check_read
from jaxlm.hub import write_generation
from jaxlm.metrics import lower_is_better
from jaxlm.model import Params
from jaxlm.models import Card, check_base, read_card, source_fingerprint, start_parameters, write_card
from jaxlm.parallel import make_mesh, peak_flops, place_batch, speaks, stored_shardings
from jaxlm.report import Page, Record, Verdict, command, count, read_rows, say, seconds, write_page
from jaxlm.train import (
    BestScore,
    Checkpoints,
    TrainState,
    Tuning,
    Work,
    fit,
    init_frozen,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    state_shapes,
    state_shardings,
)


class Run:
    """One run in its folder: built once from the config, then trained."""

    def __init__(self, config: ExperimentConfig):
        """Raises ValueError for an option that this run would not read, and for a folder that holds a run with another config."""
        check_read(configs.Loaded(config, {}))
        self.config, self.folder = config, config.folder
        self._absent = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.start = Checkpoints(self.folder / "checkpoints").latest() or 0
        with self._nothing_left_if_refused():
            self._check_same()

    @contextlib.contextmanager
    def _nothing_left_if_refused(self) -> Iterator[None]:
        """Delete the folder of a run that is refused before its first step, if this process made it."""
        try:
            yield
        except ValueError:
            if speaks() and self.folder in self._absent and not self.start and not read_rows(self.folder / "metrics.jsonl"):
                shutil.rmtree(self.folder, ignore_errors=True)
                for parent in self._absent[1:]:
                    with contextlib.suppress(OSError):  # what others put there stays
                        parent.rmdir()
            raise

    def _check_same(self) -> None:
        """Raises ValueError where the folder holds a run with another config, also one without a checkpoint yet."""
        file = self.folder / "config.yaml"
        if not file.exists():
            return
        before, after = (configs.flatten(tree) for tree in (configs.read_yaml(file)[0], configs.to_dict(self.config)))
        # An option that is younger than the run's file had its default then.
        young = {leaf: value for leaf, value in configs.flatten(configs.to_dict(ExperimentConfig())).items() if leaf in after}
        changed = configs.diff({**young, **before}, after)
        changed = {leaf: pair for leaf, pair in changed.items() if leaf not in CHANGEABLE}
        if changed:
            shown = ", ".join(f"{leaf} {old} → {new}" for leaf, (old, new) in changed.items())
            raise ValueError(f"{self.folder} holds a run with another config ({shown}): give --name NEW, or delete the folder")

    def _check_started(self, card: Card) -> None:
        """Raises ValueError where what the config names is no longer what the run began with: its tokenizer's vocabulary, or
        the model that its frozen parameters are read from."""
        before = read_card(self.folder).base
        if before != card.base:
            check_base(str(self.folder), self.config.model.init_from, before)
        folder = self.folder / "tokenizer"
        if folder.is_dir():
            old, new = (json.loads(tokenizer.definition())["model"] for tokenizer in (load_tokenizer(folder), self.job.tokenizer))
            if old != new:
                raise ValueError(
                    f"{self.folder} began with another vocabulary than its tokenizer has now: the tokenizer, or the data that it "
                    "is trained on, has changed; restore it, or give --name NEW"
                )

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return make_mesh(self.config.parallel)

    @functools.cached_property
    def job(self) -> Job:
        """What depends on the task."""
        return (Pretraining if self.config.task.pretraining else Finetuning)(self.config, self.mesh, self.folder)

    @property
    def metric(self) -> str:
        return self.config.train.metric or self.job.metric

    def _check_metric(self) -> None:
        """Raises ValueError for a `train.metric` that evaluations of this run do not have."""
        metric, job = self.config.train.metric, self.job
        if metric in (None, "loss", job.metric) or metric in (names := job.score_names()):
            return
        late = "; texts are generated and scored at the end of training" if not job.config.task.pretraining and job.writes else ""
        raise ValueError(f"{unknown(f'train.metric of task {self.config.task.kind}', metric, names)}{late}")

    @property
    def shown(self) -> tuple[str, ...]:
        """Scores that a person sees."""
        return tuple(dict.fromkeys(("loss", *self.job.shown, self.metric) if self.metric != "loss" else ("loss", *self.job.shown)))

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(
            self.folder / "checkpoints", self.config.train.keep, self.metric, higher=not lower_is_better(self.metric)
        )

    @functools.cached_property
    def batches(self) -> Batches:
        return self.job.batches()

    @functools.cached_property
    def steps(self) -> int:
        """Steps of the whole run. Raises ValueError where they are neither given nor to be had from `data.epochs`."""
        train, data = self.config.train, self.config.data
        if train.steps is None and data.epochs is not None and self.batches.total is None:
            raise ValueError(
                f"data.epochs {data.epochs:g} of a long stream, whose length is not known before it is read: give --train.steps "
                "too, and training ends with whichever comes first"
            )
        return train.steps or self.batches.total or 1000

    @property
    def eval_every(self) -> int:
        return self.config.train.eval_every or self.batches.per_epoch or 200

    @property
    def finished(self) -> bool:
        """All steps are taken, or no better score was found for long enough, and the last evaluation is recorded."""
        if not self.start:
            return False
        record = [row for row in read_rows(self.folder / "metrics.jsonl") if row["kind"] == "eval"]
        if self.config.train.patience and BestScore(self.metric, record).evals_since_best >= self.config.train.patience:
            return True
        return self.start >= self.steps and [row["step"] for row in record[-1:]] == [self.start]

    def train(self) -> str:
        """Train to the end, or until interrupted; returns how it ended (see `Outcome`). A run that is refused leaves no folder."""
        with self._nothing_left_if_refused():
            return self._train()

    def _train(self) -> str:
        c, mesh, job = self.config, self.mesh, self.job
        model = job.model()
        tuning, steps = Tuning(c.tune, model), self.steps
        base = source_fingerprint(c.model.init_from) if c.model.init_from and tuning.frozen_shapes else None
        # Every process makes the data: a mistake in it is found by all.
        card = Card(job.labels, self.metric, job.start_id, base)
        self._check_metric()
        if self.start:
            self._check_started(card)
        # Data that ends before: its last step is the schedule's last.
        schedule = make_schedule(c.optim, min(steps, self.batches.total or steps))
        optimizer = make_optimizer(c.optim, schedule, tuning)
        if speaks():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(configs.dump(c), encoding="utf8")
            write_card(self.folder, card)
            if job.generation:
                write_generation(self.folder, job.generation)
            job.saved_tokenizer.save(self.folder / "tokenizer")
        self._introduce(model, tuning)

        @functools.cache
        def begin() -> Params:
            """The parameters that the run starts from."""
            return start_parameters(c.model.init_from, model, mesh, c.seed, job.labels, bool(c.task.labels))

        began = time.monotonic()
        with jax.set_mesh(mesh):
            job.prepare(begin)
            if self.start:
                shapes = state_shapes(model, optimizer, tuning, c.optim)
                shardings = state_shardings(model, optimizer, mesh, tuning, c.optim)
                frozen = init_frozen(model, c.seed, mesh, tuning, begin()) if tuning.frozen_shapes else None
                state, progress = self.checkpoints.restore(self.start, shapes, shardings, frozen)
                say(f"resuming {self.folder} at step {self.start:,} of {steps:,}")
            else:
                params = begin() if c.model.init_from else None
                state, progress = init_state(model, optimizer, c.seed, mesh, tuning, params, c.optim), None
            begin.cache_clear()
            merge = jax.jit(tuning.merge)

            def merged(trained: Params, state: TrainState) -> Params:
                """All parameters of the model."""
                return merge(trained, state.frozen) if tuning.frozen_shapes else trained

            work = Work(
                evaluate=lambda state, stop: job.evaluate(merged(state.scored, state), stop), metric=self.metric,
                sample=(lambda state: job.sample(merged(state.scored, state)) or "") if self._samples else None,
                shown=self.shown, figures=job.figures, unit=job.unit,
                flops=job.flops(model.config), peak_flops=peak_flops(mesh),
            )  # fmt: skip
            record = Record(self.folder, self.start, writes=speaks())
            batches = prefetch(self.batches.iterate(progress), lambda pair: (place_batch(pair[0], mesh), pair[1]), c.data.prefetch)
            outcome = fit(
                c.train, steps, self.eval_every, state, self.start,
                make_train_step(
                    model, job.objective(), optimizer, schedule, mesh, seed=c.seed, accumulate=c.train.accumulate,
                    tuning=tuning, optim=c.optim, stochastic=job.stochastic,
                ),
                batches, work, mesh=mesh, checkpoints=self.checkpoints, record=record,
            )  # fmt: skip
            ended = outcome.state

            def best() -> Params:
                """The parameters of the best checkpoint."""
                step = self.checkpoints.best()
                if step is None or step == outcome.step:
                    return merged(ended.scored, ended)
                shardings = stored_shardings(tuning.axes, tuning.shapes, mesh)
                return merged(self.checkpoints.restore_params(step, tuning.shapes, shardings), ended)

            self._conclude(outcome.ended, outcome.step, record.rows, time.monotonic() - began, best)
        self.checkpoints.close()
        record.close()
        return outcome.ended

    @property
    def _samples(self) -> bool:
        c = self.config
        return c.train.sample_tokens > 0 and (not c.task.pretraining or c.task.kind == "causal")

    def _introduce(self, model: Any, tuning: Tuning) -> None:
        c = self.config
        devices = self.mesh.devices
        rows = f"{c.data.batch_size} × {c.data.length} tokens a step"
        trained = "" if not tuning.frozen_shapes else f" ({count(tuning.trained_parameters)} of them trained)"
        say(f"{self.folder}: {count(model.parameters())} parameters{trained}, {rows}, {self.steps:,} steps")
        say(f"data: {self.job.summary()}")
        axes = " × ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        say(f"devices: {devices.size} × {devices.flat[0].device_kind}{processes}{f' ({axes})' if axes else ''}")

    def _conclude(self, ended: str, step: int, rows: list[dict[str, Any]], took: float, best: Any) -> None:
        """Write the page of the run and say what was reached and what to type next."""
        c = self.config
        # One who stops a run waits for it to end: what it is compared with can be had when it goes on.
        told, verdict, baselines = ({}, Verdict(), {}) if ended == "interrupted" else self.job.conclude(best, rows)
        commands = self.next_commands(step)
        ends = {"exhausted": "the data is exhausted", "stopped": f"no better {self.metric} for {c.train.patience} evaluations"}
        summary = {
            "ended": ends.get(ended, ended) + f" at step {step:,} of {self.steps:,}",
            "parameters": f"{self.job.model().parameters():,}",
            "data": self.job.summary(),
            "training time": f"{seconds(took)} (this start)",
            **told,
        }
        if not speaks():
            return
        page = Page(c.name, summary, verdict, baselines, commands, configs.dump(c), self.shown, self.job.unit, self.job.writes)
        write_page(self.folder, page, rows)
        say()
        if ended == "exhausted" and c.data.epochs:
            say(f"the data is exhausted after {c.data.epochs:g} epoch(s), at step {step:,}: raise --data.epochs for more")
        for name, value in summary.items():
            say(f"{name + ':':<24}{value}")
        if verdict.text:
            say(verdict.text)
        say(f"look at {self.folder}/report.html, curves.png{' and samples.md' if self._samples else ''}; next:")
        for line in commands:
            say(f"  {line}")

    def next_commands(self, step: int) -> list[str]:
        """What a person may type after a run."""
        c, file = self.config, self.folder / "config.yaml"
        longer = ("--data.epochs", f"{2 * c.data.epochs:g}") if c.data.epochs else ("--train.steps", 2 * max(step, self.steps))
        rate = f"{c.optim.learning_rate / 2:g}"
        return [
            *self.job.commands(),
            command("jaxlm", "train", file, *longer),
            command("jaxlm", "train", file, "--name", f"{c.name}-2", "--optim.learning-rate", rate),
            command("tensorboard", "--logdir", c.runs),
        ]
