"""What can be seen of a run without training it: its batches, its compiled programs, and what its loop does and writes.

Each view gives a text or a digest. Two configs that differ in an option that is honoured differ in at least one view.
"""

import contextlib
import hashlib
import io
import json
import pathlib
import re
import shutil
from unittest import mock

import jax
import numpy as np

from jaxlm import config as configs
from jaxlm.data import in_order
from jaxlm.experiment import Run, finetuning, load_config, pretraining, train_seeds
from jaxlm.experiment import run as running
from jaxlm.model import empty_cache
from jaxlm.parallel import make_mesh
from jaxlm.tasks import Passed, predictor
from jaxlm.train import TrainState, Tuning, init_state, make_optimizer, make_schedule, make_train_step, state_shapes
from jaxlm.train.step import state_shardings

DEVICES = 2


def digest(*values) -> str:
    """One of arrays, texts and trees of them."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(values):
        found.update(leaf.tobytes() + str(leaf.shape).encode() if isinstance(leaf, np.ndarray) else str(leaf).encode())
    return found.hexdigest()


def program(traced) -> str:
    """A digest of a jaxpr and of the arrays in it, which its text leaves out."""
    constants: list = []

    def walk(jaxpr) -> None:
        if isinstance(jaxpr, jax.extend.core.ClosedJaxpr):
            constants.extend(map(np.asarray, jaxpr.consts))
            jaxpr = jaxpr.jaxpr
        for eqn in jaxpr.eqns:
            constants.extend(np.asarray(v.val) for v in eqn.invars if isinstance(v, jax.extend.core.Literal) and np.ndim(v.val))
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(value):
                    walk(value)

    walk(traced)
    return digest(hide_addresses(str(traced)), constants)


def is_jaxpr(value) -> bool:
    return isinstance(value, jax.extend.core.ClosedJaxpr | jax.extend.core.Jaxpr)


def hide_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "", text)


class Observed:
    """One config and what is seen of it; `like` lends the data of another run that reads the same."""

    def __init__(self, file: pathlib.Path, flags, like: "Observed | None" = None):
        self.file, self.flags = file, flags
        self.config = load_config(file, configs.parse_flags(flags)).value
        self.mesh = make_mesh(self.config.parallel, jax.devices()[:DEVICES])
        kind = pretraining.Pretraining if self.config.task.pretraining else finetuning.Finetuning
        self.job = kind(self.config, self.mesh, self.config.folder)
        for name in ("corpora", "tables", "tokenizer") if like is not None else ():
            if name in vars(like.job):
                vars(self.job)[name] = vars(like.job)[name]
        self.batch = None if like is None else like.batch
        self.model = self.job.model()

    # --- the views

    def data(self) -> str:
        """What is learned from and evaluated on, and how long."""
        if getattr(getattr(self.job, "task", None), "refers", False):
            for examples in self.job.examples:
                self.job.task.refer(examples, [{"chosen_B": np.float32(-5), "rejected_B": np.float32(-6)}] * len(examples))
        self.batches = self.job.batches()
        taken = [batch for (batch, _), _ in zip(self.batches.iterate(), range(3), strict=False)]
        self.batch = taken[0]
        if self.config.task.pretraining:
            held = [str(getattr(self.job.corpora.train[0].tokens, "filename", "")), *self.job._scored]
        else:
            held = [self.job.examples[1].items, self.job.tables[1].rows, self.job._scored[0], self.job.labels]
        limits = (
            self.job.tokenizer.definition(),
            self.batches.total,
            self.batches.per_epoch,
            self.job.model().config.V,
            self.job.metric,
            self.job.shown,
        )
        return digest(taken, json.dumps(held, default=digest), [str(limit) for limit in limits])

    def step(self) -> str:
        """The program of a training step and of the initial state, where each array lies, and the schedule."""
        c, model = self.config, self.model
        if self.batch is None:
            self.data()
        tuning = Tuning(c.tune, model)
        schedule = make_schedule(c.optim, 20)
        optimizer = make_optimizer(c.optim, schedule, tuning)
        step = make_train_step(
            model, self.job.objective(), optimizer, schedule, self.mesh, seed=c.seed, accumulate=c.train.accumulate, tuning=tuning,
            optim=c.optim, stochastic=self.job.stochastic,
        )  # fmt: skip
        with jax.set_mesh(self.mesh), jax.numpy_dtype_promotion("standard"):
            batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.batch)
            traced = step.trace(state_shapes(model, optimizer, tuning, c.optim), batch).jaxpr
            begin = jax.make_jaxpr(lambda: init_state(model, optimizer, c.seed, self.mesh, tuning, optim=c.optim))()
        places = state_shardings(model, optimizer, self.mesh, tuning, c.optim)
        return digest(program(traced), program(begin), [str(place) for place in jax.tree.leaves(places)])

    def decoding(self) -> str:
        """The program by which a model of text is used."""
        c = self.model.config
        if c.architecture != "decoder" or c.head.kind != "language_model":
            return ""
        tokens = {"tokens_BL": jax.ShapeDtypeStruct((1, 4), np.int32)}
        return program(jax.make_jaxpr(lambda p, b: self.model.apply(p, b, empty_cache(c, 1, 16)))(self.model.shapes, tokens))

    def loop(self) -> str:
        """What the run does and writes, with steps and scores that are made up."""
        events: list = []
        shutil.rmtree(self.config.runs, ignore_errors=True)
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):
            for place, name, value in self._stand_ins(events):
                stack.enter_context(mock.patch.object(place, name, value))
            if self.config.seeds > 1:
                train_seeds(self.config)
            else:
                own = Run(self.config)
                vars(own).update(mesh=self.mesh, job=self.job)
                own.train()
        return hide_addresses(json.dumps(events, default=str))

    def _stand_ins(self, events: list):
        """What stands in the place of everything that computes or takes long."""
        observed, scores = self, iter([3.0, 1.0, *[2.0] * 100])

        class Checkpoints:
            def __init__(self, folder, keep=2, metric="loss", higher=False):
                events.append(("checkpoints", folder, keep, metric, higher))

            def latest(self):
                return None

            best = latest

            def save(self, step, state, progress, metrics=None):
                events.append(("save", step, metrics))

            def close(self):
                pass

        class Record:
            def __init__(self, folder, step=0, writes=True):
                self.rows = []

            def write(self, kind, step, **values):
                values = {name: value for name, value in values.items() if "second" not in name}
                events.append((kind, step, values))
                self.rows.append({"kind": kind, "step": step, **values})

            def evaluated(self, step):
                return any(row["step"] == step and row["kind"] == "eval" for row in self.rows)

            def close(self):
                pass

        class Batches:
            wait_seconds = 0.0

            def __init__(self, iterator, place, depth):
                events.append(("prefetch", depth))
                self.iterator = iterator

            def __next__(self):
                return next(self.iterator)

            def close(self):
                pass

        class Generator:
            def __init__(self, *args, **options):
                pass

            def stream(self, params, *args, **options):
                events.append(("stream", args, options))
                return [observed.job.tokenizer.eos_id]

            def __call__(self, params, prompts, decode, *args, **options):
                events.append(("decode", prompts, decode))
                return [[observed.job.tokenizer.eos_id]] * len(prompts)

        def passed(predictor, params, examples, *, loss=True, outputs=True, stop=None, advance=lambda n: None):
            """Outputs of the right shapes, drawn from the number of the example."""
            kept = [{} for _ in examples]
            with jax.set_mesh(observed.mesh):
                for numbers, batch in in_order(examples if outputs else [], predictor.batch_size, predictor.task.pad_id):
                    shapes = jax.eval_shape(
                        lambda p, b: predictor.task.outputs(observed.model.apply, p, b), observed.model.shapes, batch
                    )
                    for number in numbers:
                        rng = np.random.default_rng(int(number))
                        kept[number] = {
                            name: rng.dirichlet(np.ones(x.shape[-1]), x.shape[1:-1]).astype(np.float32) if x.ndim > 1
                            else np.float32(rng.random()) for name, x in shapes.items()
                        }  # fmt: skip
            return Passed(next(scores), {"nll": 1.0}, kept)

        def evaluate(params, stop):
            value = next(scores)
            return dict.fromkeys(("loss", "nll", "bits_per_byte", "detection_accuracy", "pair_loss"), value)

        def conclude(params, rows):
            return {}, running.Verdict(), {}

        def page(folder, page, rows):
            events.append(("page", folder, page.summary.get("data"), page.commands))

        def written(folder, name, task, rows, predictions):
            events.append(("predictions", folder, name, predictions, task.scores(rows, predictions), task.signatures(rows)))
            return {}

        metrics = {"loss": np.float32(1), "weight": np.float32(1), "nll": np.float32(1), "skipped": np.int32(0)}
        fit = running.fit

        def fitted(*args, **options):
            events.append(("fit", args[1:3]))
            return fit(*args, **options)

        places = [
            (running, "Checkpoints", Checkpoints), (running, "Record", Record), (running, "prefetch", Batches),
            (running, "init_state", lambda *args, **options: TrainState(0, {}, ())), (running, "write_page", page),
            (running, "fit", fitted), (running, "make_mesh", lambda parallel: observed.mesh),
            (running, "make_train_step", lambda *args, **options: lambda state, batch: (state, metrics)),
            (running, "write_card", lambda folder, card: events.append(("card", folder, card))),
            (pretraining, "Generator", Generator), (predictor, "BatchGenerator", Generator), (predictor.Predictor, "run", passed),
            (finetuning, "write_predictions", written), (finetuning, "words_alone", lambda *args: None),
        ]  # fmt: skip
        if self.config.task.pretraining:
            places += [(type(self.job), "evaluate", lambda job, params, stop: evaluate(params, stop))]
            places += [(type(self.job), "conclude", lambda job, params, rows: conclude(params, rows))]
        places.append((finetuning.Finetuning, "prepare", lambda job, start: None))
        if self.config.seeds > 1:
            from jaxlm.experiment import seeds

            places.append((seeds, "best_scores", lambda folder, metric: {metric: 1.0}))
        return places
