"""Learning from unlabelled text."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from jaxlm.data import (
    Corpora,
    StreamDecoder,
    TextEncoder,
    build_corpora,
    eval_batches,
    framed,
    make_corruption,
    start_of,
    train_batches,
    xz_bits_per_byte,
)
from jaxlm.experiment.config import check_fits
from jaxlm.experiment.job import Batches, Job
from jaxlm.generate import Generator, SampleConfig
from jaxlm.metrics import perplexity
from jaxlm.model import Detection, Model, Params, TransformerConfig
from jaxlm.models import with_vocabulary
from jaxlm.parallel import batch_ways, place_batch, settle
from jaxlm.report import Verdict, command, option
from jaxlm.train import Objective, make_eval_step, objectives

SAMPLING = SampleConfig(temperature=0.7, top_p=0.95)


class Pretraining(Job):
    """The objectives over text: the next token, masked or replaced tokens, spans, noise."""

    @functools.cached_property
    def corpora(self) -> Corpora:
        return build_corpora(self.config.data)

    @functools.cached_property
    def tokenizer(self) -> Any:  # type: ignore[override]
        c = self.config
        if c.data.tokenizer.kind == "huggingface":  # it brings its own frame
            return self.corpora.tokenizer
        return framed(self.corpora.tokenizer, c.data.tokenizer.framing, architecture=c.model.architecture)

    @property
    def start_id(self) -> int | None:  # type: ignore[override]
        return start_of(self.tokenizer, self.kind) if self.config.model.architecture == "encoder_decoder" else None

    @property
    def kind(self) -> str:
        return self.config.task.kind

    @property
    def causal(self) -> bool:
        """Every token is predicted from those before it, so that bits per byte are those of the text."""
        return self.kind == "causal" and not self.config.task.corrupt.fim

    @property
    def shown(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.causal:
            return "loss", "bits_per_byte"
        c = self.config
        if self.kind == "replaced":
            return "loss", "nll", "detection_accuracy"
        if c.task.corrupt.pairs != "none":
            return "loss", "nll", "pair_loss"
        return ("loss", "nll") if c.train.z_loss or c.task.label_smoothing else ("loss",)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.kind == "replaced"

    @functools.cached_property
    def corruption(self) -> Any:
        c = self.config
        if self.causal:
            return None
        made = make_corruption(c.task.kind, c.task.corrupt, self.tokenizer, c.data.length, c.model.architecture)
        pair = getattr(made, "pair", None)  # what lays out the rows of two stacks
        written = 0 if pair is None else pair.target_length
        if written > c.model.positions:
            raise ValueError(
                f"task {self.kind} has up to {written} tokens written for data.length {c.data.length}, more than "
                f"model.positions {c.model.positions}: give --model.positions {written}, or a shorter data.length"
            )
        return made

    @functools.cache  # noqa: B019, which is one job a process
    def model(self) -> Any:
        config = with_vocabulary(self.config.model.plain(), self.tokenizer, self.config.model.init_from)
        check_fits(self.config, config, self.mesh)
        return Detection(config, self.config.task.generator) if self.kind == "replaced" else Model(config)

    def batches(self) -> Batches:
        c = self.config
        made: Any = train_batches(c.data, self.corpora, seed=c.seed, corruption=self.corruption, **self.processes)
        return made

    def objective(self) -> Objective:
        c = self.config
        if self.kind == "replaced":
            return objectives.replaced(c.train.loss_chunk, c.task.detection, c.train.z_loss, c.task.label_smoothing)
        pair = c.task.corrupt.rate * c.data.length if c.task.corrupt.pairs != "none" else 0.0
        return objectives.tokens(c.train.loss_chunk, c.train.z_loss, c.task.label_smoothing, pair)

    @functools.cached_property
    def _scored(self) -> Any:
        ways = batch_ways(self.mesh)
        rows = -(-self.config.data.batch_size // ways) * ways  # of a training batch, up to what the mesh divides
        return eval_batches(
            self.config.data,
            self.corpora,
            rows=rows,
            most=self.config.train.eval_rows,
            corruption=self.corruption,
            **self.processes,
        )

    @functools.cached_property
    def _eval_step(self) -> Any:
        return make_eval_step(self.model(), self.objective(), self.mesh)

    def evaluate(self, params: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
        sums: dict[str, float] = {}
        for batch in self._scored:
            if stop():
                return None
            part = jax.device_get(settle(self.mesh, self._eval_step(params, place_batch(batch, self.mesh))))
            sums = {name: sums.get(name, 0.0) + float(value) for name, value in part.items()}
        weight = sums.pop("weight")
        return self._scores({name: value / weight for name, value in sums.items()})

    def _scores(self, means: dict[str, float]) -> dict[str, float]:
        if self.causal:
            return {"loss": means["nll"], "bits_per_byte": means["nll"] * self.corpora.heldout_tokens_per_byte / math.log(2)}
        return means

    def score_names(self) -> list[str]:
        with jax.set_mesh(self.mesh):
            sums = self._eval_step.eval_shape(self.model().shapes, next(iter(self._scored)))
        return list(self._scores(dict.fromkeys([name for name in sums if name != "weight"], 0.0)))

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.model(), self.mesh, self.tokenizer.vocab_size)

    def sample(self, params: Params) -> str | None:
        c, tokenizer = self.config.train, self.tokenizer
        if self.kind != "causal":
            return None
        prompt = TextEncoder(tokenizer).ids(c.sample_prompt)
        new = self._generator.stream(params, prompt, c.sample_tokens, SAMPLING, seed=self.config.seed, stop={tokenizer.eos_id})
        stream = StreamDecoder(tokenizer, prompt)
        return c.sample_prompt + "".join(map(stream.push, new)) + stream.flush()

    def figures(self, values: Mapping[str, float]) -> dict[str, float]:
        if not self.causal:
            return {}
        return {"bits_per_byte": values["nll"] * self.corpora.train_tokens_per_byte / math.log(2)}

    def flops(self, model: TransformerConfig) -> float | None:
        return model.train_flops_per_token(self.config.data.length) if self.causal else None

    def summary(self) -> str:
        return self.corpora.summary()

    def conclude(
        self, params: Callable[[], Params], rows: list[dict[str, Any]]
    ) -> tuple[dict[str, str], Verdict, dict[str, float]]:
        evals = [row for row in rows if row["kind"] == "eval"]
        if not evals:
            return {}, Verdict(), {}
        most = self.config.train.eval_rows
        of = (
            ""
            if most is None or most >= self._scored.total
            else f", over the first {most:,} of {self._scored.total:,} held-out rows"
        )
        told = {"held-out loss": f"{evals[-1]['loss']:.4f} nats per {'token' if self.causal else 'target'}{of}"}
        if not self.causal:
            return told | {f"held-out {name.replace('_', ' ')}": f"{evals[-1][name]:.4f}" for name in self.shown[1:]}, Verdict(), {}
        baselines = xz_baselines(self.corpora)
        bits = evals[-1]["bits_per_byte"]
        told |= {"held-out bits per byte": f"{bits:.4f}", **self._perplexities(bits, evals[-1]["loss"])}
        return told, _verdict(bits, baselines), baselines

    def _perplexities(self, bits: float, nats_per_token: float) -> dict[str, str]:
        """Of the held-out text, where counting its words takes no while."""
        size = self.corpora.heldout_bytes
        if size > _XZ_BYTES or nats_per_token <= 0:
            return {}
        nats = bits * math.log(2) * size
        found = perplexity(nats, nats / nats_per_token, len(self.corpora.heldout_text().split()), size)
        return {
            "held-out perplexity": ", ".join(f"{found[f'{unit}_perplexity']:.4g} by {unit}" for unit in ("token", "word", "byte"))
        }

    def commands(self) -> list[str]:
        folder, model = self.config.folder, self.config.model
        if self.kind == "causal":
            return [command("jaxlm", "generate", folder, *option("prompt", self.config.train.sample_prompt))]
        # A task that such a model is made for, over rows of the user's own; only Python's documentation has rows beside it.
        file, length = "answer-squad", 128
        rows: tuple[str, ...] = ("--data.train", "FILE")
        if model.architecture != "encoder_decoder":
            embedded = all(source.kind == "embedded" for source in self.config.data.sources)
            file, length, rows = ("finetune-stdlib", 128, ()) if embedded else ("finetune-sst2", 64, rows)
        shorter = ("--data.length", model.positions) if model.positions < length else ()
        words = ("jaxlm", "train", f"configs/{file}.yaml", "--model.init-from", folder, *rows, *shorter)
        return [command(*words), command("jaxlm", "export", folder, "exported")]


# xz reads about 2 MB a second: beyond this size its figure is not worth the wait.
_XZ_BYTES = 32 << 20


def xz_baselines(corpora: Corpora) -> dict[str, float]:
    """Bits per byte that `xz -9` takes for the held-out text, alone and after the training text."""
    texts = corpora.heldout_text(), corpora.train_text() if corpora.train_bytes <= _XZ_BYTES else None
    if corpora.heldout_bytes > _XZ_BYTES or texts[0] is None:
        return {}
    alone = {"xz -9": xz_bits_per_byte(texts[0])}
    return alone if texts[1] is None else {**alone, "xz -9 after the training text": xz_bits_per_byte(texts[0], after=texts[1])}


def _verdict(bits: float, baselines: Mapping[str, float]) -> Verdict:
    if not baselines:
        return Verdict()
    shown = ", ".join(f"{name} takes {value:.3f}" for name, value in baselines.items())
    beaten = [name for name, value in baselines.items() if bits < value]
    end = f"the model beats {' and '.join(beaten)}" if beaten else "not there yet: train longer"
    tone: Literal["better", "worse"] = "better" if beaten else "worse"
    return Verdict(f"Held-out text: {bits:.3f} bits per byte; for the same text {shown}: {end}.", tone)
