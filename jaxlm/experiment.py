"""A config → every built part, and the run that they make: the only place that composes."""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlm import config as configs
from jaxlm.data import (
    Corpora,
    DataConfig,
    Tokenizer,
    build_corpora,
    eval_batches,
    prefetch,
    train_batches,
    xz_bits_per_byte,
)
from jaxlm.generate import Generator, SampleConfig
from jaxlm.model import Model, Params, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, peak_flops, place_batch, settle
from jaxlm.report import Page, Record, count, read_rows, say, seconds, write_page
from jaxlm.train import (
    Checkpoints,
    OptimConfig,
    TrainConfig,
    causal,
    fit,
    init_state,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    state_shapes,
    state_shardings,
)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """One run, whole: what `config.yaml` in its folder says."""

    name: str = "run"
    """The run's folder is runs/NAME; by default the name of the config file."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seeds the parameters, the order of the data and dropout."""
    model: TransformerConfig = TransformerConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        if self.data.length > self.model.positions:
            raise ValueError(
                f"data.length {self.data.length} is longer than model.positions {self.model.positions}: "
                f"give data.length up to {self.model.positions}, or more positions"
            )
        if (self.model.architecture, self.model.head.kind) != ("decoder", "language_model"):
            raise ValueError(
                f"the model is of architecture {self.model.architecture} with head {self.model.head.kind}: "
                "the training objective here is the next token, which needs a decoder with head language_model"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name is {self.name!r}: it must be the name of a folder, without a slash or a leading dot")

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.runs) / self.name


# What may change between two starts of one run: how long, how often, on what; not what is learned from what.
RESUMABLE = (
    "train.steps", "train.eval_every", "train.log_every", "train.keep", "train.sample_prompt", "train.sample_tokens",
    "data.cache", "data.prefetch", "parallel.data", "parallel.fsdp", "parallel.tensor",
)  # fmt: skip

SAMPLING = SampleConfig(temperature=0.7, top_p=0.95)


def load_config(file: str | pathlib.Path, flags: Mapping[str, configs.Text]) -> configs.Loaded:
    """The config of a run; its name defaults to the file's."""
    loaded = configs.load(ExperimentConfig, file, flags)
    if loaded.origins["name"] == "default":
        named = dataclasses.replace(loaded.value, name=pathlib.Path(file).stem)
        return configs.Loaded(named, {**loaded.origins, "name": "the file's name"})
    return loaded


def check_fits(config: ExperimentConfig, model: TransformerConfig, mesh: jax.sharding.Mesh) -> None:
    """Refuse sizes that the mesh does not divide, with what would be allowed."""
    sizes = dict(mesh.shape)
    ways = sizes["data"] * sizes["fsdp"]
    rows = ways * config.train.accumulate
    if config.data.batch_size % rows:
        near = max(rows, round(config.data.batch_size / rows) * rows)
        raise ValueError(
            f"data.batch_size {config.data.batch_size} does not divide over {ways} device(s) (data × fsdp) "
            f"in {config.train.accumulate} part(s) (train.accumulate): give a multiple of {rows}, such as {near}"
        )
    for axis, name, size in (
        ("tensor", "model.heads", model.heads),
        ("tensor", "model.mlp_width", model.F),
        ("tensor", "model.vocab_size", model.V),
        ("fsdp", "model.width", model.width),
    ):
        if size % sizes[axis]:
            fits = [n for n in range(1, sizes[axis] + 1) if size % n == 0]
            raise ValueError(
                f"parallel.{axis} {sizes[axis]} does not divide {name} {size}: parallel.{axis} may be {', '.join(map(str, fits))}"
            )


def with_vocabulary(config: TransformerConfig, tokenizer: Tokenizer) -> TransformerConfig:
    """Fill in the vocabulary size from the tokenizer, or check the one given against it."""
    if config.vocab_size is None:
        multiple = config.vocab_multiple
        return dataclasses.replace(config, vocab_size=-(-tokenizer.vocab_size // multiple) * multiple)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size {config.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} entries: "
            "leave it empty to take the tokenizer's"
        )
    return config


class Run:
    """One run in its folder: built once from the config, then trained."""

    def __init__(self, config: ExperimentConfig):
        self.config, self.folder = config, config.folder
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.train.keep)
        self.start = self.checkpoints.latest() or 0
        if self.start:
            self._check_same()

    def _check_same(self) -> None:
        file = self.folder / "config.yaml"
        changed = configs.diff(configs.read_yaml(file)[0], configs.to_dict(self.config)) if file.exists() else {}
        changed = {leaf: pair for leaf, pair in changed.items() if leaf not in RESUMABLE}
        if changed:
            shown = ", ".join(f"{leaf} {old} → {new}" for leaf, (old, new) in changed.items())
            raise ValueError(f"{self.folder} holds a run with another config ({shown}): give --name NEW, or delete the folder")

    @property
    def finished(self) -> bool:
        """All steps are taken, and the last evaluation is recorded."""
        last = [row["step"] for row in read_rows(self.folder / "metrics.jsonl") if row["kind"] == "eval"][-1:]
        return self.start >= self.config.train.steps and last == [self.start]

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return make_mesh(self.config.parallel)

    @functools.cached_property
    def corpora(self) -> Corpora:
        return build_corpora(self.config.data)

    @functools.cached_property
    def model(self) -> Model:
        model = Model(with_vocabulary(self.config.model, self.corpora.tokenizer))
        check_fits(self.config, model.config, self.mesh)
        return model

    def train(self) -> str:
        """Train to the end, or until interrupted; returns how it ended (see `Outcome`)."""
        c, mesh, corpora, model = self.config, self.mesh, self.corpora, self.model
        tokenizer = corpora.tokenizer
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(configs.dump(c), encoding="utf8")
        tokenizer.save(self.folder / "tokenizer")
        self._introduce()

        objective = causal(c.train.loss_chunk, c.train.z_loss)
        schedule = make_schedule(c.optim, c.train.steps)
        optimizer = make_optimizer(c.optim, schedule)
        generator = Generator(model, mesh, tokenizer.vocab_size)
        eval_step = make_eval_step(model, objective, mesh)
        source = train_batches(c.data, corpora, seed=c.seed)
        scored = eval_batches(c.data, corpora, rows=_eval_rows(c.data.batch_size, mesh))
        bits = corpora.heldout_tokens_per_byte / math.log(2)

        def evaluate(params: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
            sums: dict[str, float] = {"nll": 0.0, "weight": 0.0}
            for batch in scored:
                if stop():
                    return None
                part = settle(mesh, eval_step(params, place_batch(batch, mesh)))
                sums = {name: sums[name] + float(jax.device_get(part[name])) for name in sums}
            loss = sums["nll"] / sums["weight"]
            return {"loss": loss, "bits_per_byte": loss * bits}

        def sample(params: Params) -> str:
            prompt = [tokenizer.bos_id, *tokenizer.encode(c.train.sample_prompt).tolist()]
            new = generator.stream(params, prompt, c.train.sample_tokens, SAMPLING, seed=c.seed, stop={tokenizer.eos_id})
            return c.train.sample_prompt + tokenizer.decode(list(new))

        began = time.monotonic()
        with jax.set_mesh(mesh):
            if self.start:
                shapes = state_shapes(model, optimizer)
                shardings = state_shardings(model, optimizer, mesh)
                state, progress = self.checkpoints.restore(self.start, shapes, shardings)
                say(f"resuming {self.folder} at step {self.start:,} of {c.train.steps:,}")
            else:
                state, progress = init_state(model, optimizer, c.seed, mesh), None
            record = Record(self.folder, self.start)
            batches = prefetch(source.iterate(progress), lambda pair: (place_batch(pair[0], mesh), pair[1]), c.data.prefetch)
            outcome = fit(
                c.train, state, self.start,
                make_train_step(model, objective, optimizer, schedule, mesh, seed=c.seed, accumulate=c.train.accumulate),
                batches,
                mesh=mesh, evaluate=evaluate, sample=sample if c.train.sample_tokens else None,
                checkpoints=self.checkpoints, record=record,
                bits_per_nat=corpora.train_tokens_per_byte / math.log(2),
                flops_per_token=model.config.train_flops_per_token(c.data.length), peak_flops=peak_flops(mesh),
            )  # fmt: skip
        self.checkpoints.close()
        record.close()
        self._conclude(outcome.ended, outcome.step, record.rows, time.monotonic() - began)
        return outcome.ended

    def _introduce(self) -> None:
        c, corpora = self.config, self.corpora
        devices = self.mesh.devices
        rows = f"{c.data.batch_size} × {c.data.length} tokens a step"
        say(f"{self.folder}: {count(self.model.parameters())} parameters, {rows}, {c.train.steps:,} steps")
        say(f"data: {corpora.summary()}")
        axes = " × ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        say(f"devices: {devices.size} × {devices.flat[0].device_kind} ({axes})")

    def _conclude(self, ended: str, step: int, rows: list[dict[str, Any]], took: float) -> None:
        """Write the page of the run and say what was reached and what to type next."""
        c = self.config
        evals = [row for row in rows if row["kind"] == "eval"]
        # One who stops a run waits for it to end: what it is compared with can be had when it goes on.
        baselines = {} if ended == "interrupted" else xz_baselines(self.corpora)
        verdict = _verdict(evals[-1]["bits_per_byte"], baselines) if evals else ""
        commands = next_commands(c, step)
        summary = {
            "ended": {"exhausted": "the data is exhausted"}.get(ended, ended) + f" at step {step:,} of {c.train.steps:,}",
            "parameters": f"{self.model.parameters():,}",
            "data": self.corpora.summary(),
            "training time": f"{seconds(took)} (this start)",
            **({"held-out loss": f"{evals[-1]['loss']:.4f} nats per token"} if evals else {}),
            **({"held-out bits per byte": f"{evals[-1]['bits_per_byte']:.4f}"} if evals else {}),
        }
        page = Page(c.name, summary, verdict, baselines, commands, configs.dump(c))
        write_page(self.folder, page, rows)
        say()
        if ended == "exhausted":
            say(f"the data is exhausted after {c.data.epochs:g} epoch(s), at step {step:,}: raise --data.epochs for more")
        for name, value in summary.items():
            say(f"{name + ':':<24}{value}")
        if verdict:
            say(verdict)
        say(f"look at {self.folder}/report.html, curves.png and samples.md; next:")
        for command in commands:
            say(f"  {command}")


def _eval_rows(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """Rows of an evaluation batch: those of a training batch, rounded up to what the mesh divides."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // ways) * ways


# xz reads about 2 MB a second: beyond this size its figure is not worth the wait.
_XZ_BYTES = 32 << 20


def xz_baselines(corpora: Corpora) -> dict[str, float]:
    """Bits per byte that `xz -9` takes for the held-out text, alone and after the training text."""
    texts = corpora.heldout_text(), corpora.train_text() if corpora.train_bytes <= _XZ_BYTES else None
    if corpora.heldout_bytes > _XZ_BYTES or texts[0] is None:
        return {}
    alone = {"xz -9": xz_bits_per_byte(texts[0])}
    return alone if texts[1] is None else {**alone, "xz -9 after the training text": xz_bits_per_byte(texts[0], after=texts[1])}


def _verdict(bits: float, baselines: Mapping[str, float]) -> str:
    if not baselines:
        return ""
    shown = ", ".join(f"{name} takes {value:.3f}" for name, value in baselines.items())
    beaten = [name for name, value in baselines.items() if bits < value]
    end = f"the model beats {' and '.join(beaten)}" if beaten else "not there yet: train longer"
    return f"Held-out text: {bits:.3f} bits per byte; for the same text {shown}: {end}."


def next_commands(config: ExperimentConfig, step: int) -> list[str]:
    """What a person may type after a run."""
    file = config.folder / "config.yaml"
    return [
        f'jaxlm generate {config.folder} --prompt "{config.train.sample_prompt}"',
        f"jaxlm train {file} --train.steps {2 * max(step, config.train.steps)}",
        f"jaxlm train {file} --name {config.name}-2 --optim.learning-rate {config.optim.learning_rate / 2:g}",
        f"tensorboard --logdir {config.runs}",
    ]
