"""Learning a task from rows."""

import functools
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config as configs
from jaxlm.data import HELD_OUT, ExampleBatches, Table, Tokenizer, framed, read_rows, split_rows, train_tokenizer
from jaxlm.experiment.config import check_fits
from jaxlm.experiment.job import Batches, Job
from jaxlm.generate import GenerationSettings
from jaxlm.metrics import lower_is_better
from jaxlm.model import Model, Params, TransformerConfig
from jaxlm.models import (
    fitted,
    locate,
    read_card,
    source_fingerprint,
    source_labels,
    start_generation,
    start_id,
    with_labels,
    with_vocabulary,
)
from jaxlm.parallel import speaks
from jaxlm.report import Verdict, bar, command, option, say
from jaxlm.tasks import (
    BASELINE,
    TASKS,
    Examples,
    Passed,
    Prediction,
    Predictor,
    Row,
    Task,
    label_order,
    paired_scores,
    usable,
    words_alone,
    write_predictions,
)
from jaxlm.train import Objective

SHOWN_ROWS = 3


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


class Finetuning(Job):
    """A task over rows of a table, from a pretrained model or from nothing."""

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        texts = (text for row in self._tables[0].rows for text in _texts(row))
        c = self.config
        tokenizer = train_tokenizer(c.data.tokenizer, texts)
        if c.data.tokenizer.kind == "huggingface":  # it brings its own frame
            return fitted(tokenizer, c.model.vocab_size, c.model.init_from or "")
        return framed(tokenizer, c.data.tokenizer.framing, architecture=c.model.architecture)

    @property
    def saved_tokenizer(self) -> Tokenizer:
        return self.task.saved_tokenizer

    @functools.cached_property
    def _roles(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Required and optional columns; those of text_to_text hang on its template."""
        kind = TASKS[self.config.task.kind]
        return kind.roles(self.config.task, self.config.model.architecture)

    @functools.cached_property
    def _tables(self) -> tuple[Table, Table]:
        """Rows to train on, rows held out, as they are read."""
        data = self.config.data
        assert data.train is not None, "the config was checked"
        table = read_rows(data.train, data.rows, *self._roles)
        if data.validation:
            held = read_rows(data.validation, data.rows, *self._roles, splits=HELD_OUT)
            if data.validation == data.train and held.rows == table.rows:
                held.notes.append("the rows of data.train: scores say nothing of other rows")
            return table, held
        return split_rows(table, data.holdout.fraction)

    @functools.cached_property
    def tables(self) -> tuple[Table, Table]:
        """Rows to train on, rows held out, without those that the task can make nothing of."""
        return usable(self.task, self._tables[0]), usable(self.task, self._tables[1])

    @functools.cached_property
    def task(self) -> Task:
        c = self.config
        labels = read_card(self.folder).labels
        numeric = "labels" in TASKS[c.task.kind].head  # one output, which has no name
        source = () if labels or numeric else source_labels(c.model.init_from, c.model.head.kind)
        task = TASKS[c.task.kind](
            c.task, self.tokenizer, c.data.length, labels=labels or source, architecture=c.model.architecture,
            start_id=self.start_id,
        )  # fmt: skip
        task.rules = GenerationSettings.read(self.generation).alone().rules()
        task.learn(self._tables[0].rows)
        if labels and tuple(labels) != task.labels:
            raise ValueError(f"{self.folder} was trained with other labels ({', '.join(labels[:10])}): give --name NEW")
        if source:
            self._compare_labels(source, task.labels)
        return task

    def _compare_labels(self, source: Sequence[str], labels: Sequence[str]) -> None:
        """Say in one line where the labels are not, letter for letter, those of the model that the run starts from."""
        c, order = self.config, label_order(source, labels, bool(self.config.task.labels))
        if order is None:
            keep = (
                f"; to keep it, name its labels in their order: --task.labels {shlex.quote(json.dumps(source, ensure_ascii=False))}"
            )
            if list(source) == [f"LABEL_{i}" for i in range(len(labels))]:
                keep = "; to keep it, give --task.labels with the names of these in their order"
            elif not set(labels) < set(source):
                keep = ""
            say(
                f"labels {_some(labels)} are not those of {c.model.init_from} ({_some(source)}): "
                f"the outputs of its head start anew{keep}"
            )
        elif any(source[i] != label for i, label in zip(order, labels, strict=True)):
            say(f"labels {_some(labels)} are taken for {_some([source[i] for i in order])} of {c.model.init_from}")

    @functools.cached_property
    def start_id(self) -> int | None:  # type: ignore[override]
        source = self.config.model.init_from
        return start_id(None if source is None else locate(source, weights=False), self.tokenizer)

    @functools.cached_property
    def generation(self) -> dict[str, Any]:  # type: ignore[override]
        return start_generation(self.config.model.init_from) if TASKS[self.config.task.kind].generates else {}

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.task.labels

    @property
    def metric(self) -> str:  # type: ignore[override]
        return self.task.metric

    @property
    def unit(self) -> str:  # type: ignore[override]
        return self.task.unit

    @property
    def writes(self) -> bool:  # type: ignore[override]
        return self.task.generates

    @property
    def shown(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("loss", "perplexity") if self.task.generates else ("loss", self.metric)

    @functools.cache  # noqa: B019, which is one job a process
    def model(self) -> Model:
        config = with_vocabulary(self.config.model.plain(), self.tokenizer, self.config.model.init_from)
        if self.task.labels and "labels" not in self.task.head:
            config = with_labels(config, len(self.task.labels))
        check_fits(self.config, config, self.mesh)
        return Model(config)

    @functools.cached_property
    def examples(self) -> tuple[Examples, Examples]:
        """Those to train on, those held out; long texts that were cut are told."""
        made = tuple(self.task.examples(table.rows, table.where) for table in self.tables)
        for name, why in self.task.idle_options().items():
            raise ValueError(f"task.{name} would do nothing here: {why}; leave it out")
        if truncated := self.task.text_encoder.truncated:
            say(f"{truncated:,} texts are longer than data.length {self.config.data.length} tokens and were cut")
        if self.task.spelled:
            how = "ordinary text" if self.config.task.split_special_tokens else "that token"
            say(
                f"{self.task.spelled:,} texts spell a special token, which is read as {how} "
                f"(--task.split-special-tokens {str(not self.config.task.split_special_tokens).lower()} changes that)"
            )
        for remark in self.task.remarks:
            say(remark)
        return made[0], made[1]

    def batches(self) -> Batches:
        c = self.config
        epochs = c.data.epochs if c.data.epochs is not None or c.train.steps is not None else 3.0
        return ExampleBatches(
            self.examples[0].items, c.data.batch_size, seed=c.seed, epochs=epochs, pad_id=self.task.pad_id, grouped=c.data.grouped,
            **self.processes,
        )  # fmt: skip

    def objective(self) -> Objective:
        return self.task.objective(self.config.train.loss_chunk, self.config.train.z_loss)

    def prepare(self, start: Callable[[], Params]) -> None:
        if self.task.refers:
            self._refer(start)

    def _refer(self, start: Callable[[], Params]) -> None:
        """Compute the reference model's log-likelihoods of all examples once, and cache them in the run's folder together with
        a fingerprint of what they were computed from."""
        file = self.folder / "reference.npz"
        names = ("chosen_B", "rejected_B")
        fingerprint = self._reference_fingerprint()
        held: Mapping[str, np.ndarray] = dict(np.load(file)) if file.is_file() else {}
        if str(held.get("fingerprint")) != fingerprint:
            kept: dict[str, np.ndarray] = {}
            params = start()
            for part, examples in zip(("train", "validation"), self.examples, strict=True):
                with bar(f"reference ({part})", len(examples), "rows") as shown:
                    passed = self.predictor.run(params, examples.items, loss=False, advance=shown.advance)
                assert passed is not None, "nothing stops it"
                kept |= {f"{part}_{name}": np.array([output[name] for output in passed.outputs]) for name in names}
            if speaks():
                partial = self.folder / "reference.partial.npz"
                np.savez(partial, fingerprint=np.array(fingerprint), **kept)  # type: ignore[arg-type]
                partial.rename(file)
            held = kept
        for part, examples in zip(("train", "validation"), self.examples, strict=True):
            columns = [held[f"{part}_{name}"] for name in names]
            self.task.refer(examples, [dict(zip(names, pair, strict=True)) for pair in zip(*columns, strict=True)])

    def _reference_fingerprint(self) -> str:
        """Hash of everything that the reference log-likelihoods depend on: the model, what its parameters start from, and the
        tokens of every example."""
        c = self.config
        source = None if c.model.init_from is None else source_fingerprint(c.model.init_from)
        model = {k: v for k, v in configs.to_dict(c.model).items() if k != "init_from"}
        known = [model, self.model().config.vocab_size, c.seed, source]
        whole = hashlib.blake2b(json.dumps(known, default=str).encode(), digest_size=16)
        for examples in self.examples:
            for item in examples.items:
                for answer in ("chosen", "rejected"):
                    for name, array in sorted(item[answer].items()):
                        whole.update(f"{answer} {name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()

    @functools.cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.task, self.model(), self.mesh, self.config.data.batch_size, self.config.train.loss_chunk)

    @functools.cached_property
    def _scored(self) -> tuple[list[Any], Examples]:
        """Rows and examples of an evaluation in training."""
        rows, most = self.tables[1].rows, self.config.train.eval_rows
        if most is None or most >= len(rows):
            return rows, self.examples[1]
        # Of conversations that share a row only the loss is taken, over all.
        return rows[:most], self.examples[1].first(most)

    def evaluate(self, params: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
        _, examples = self._scored
        passed = self.predictor.run(params, examples.items, outputs=not self.task.generates, stop=stop)
        return None if passed is None else self._scores(passed)

    def _scores(self, passed: Passed) -> dict[str, float]:
        rows, examples = self._scored
        scores = {"loss": passed.loss, **passed.means}
        if self.task.generates:
            return {**scores, "perplexity": math.exp(min(passed.means["nll"], 50.0))}
        if wrong := passed.undefined:  # the run goes on: a score that is no number is never the best
            say(f"the model's outputs for {len(wrong):,} of {len(examples):,} held-out texts are NaN: they are not scored")
            return dict.fromkeys((self.config.train.metric or self.metric, *scores), math.nan)
        return {**scores, **self.task.scores(rows, self.task.read(rows, examples, passed.outputs))}

    def score_names(self) -> list[str]:
        _, examples = self._scored
        if self.task.refers:  # `prepare` puts the true ones in their place
            self.task.refer(examples, [dict.fromkeys(("chosen_B", "rejected_B"), np.zeros((), np.float32))] * len(examples))
        return list(self._scores(self.predictor.dry_run(examples.items, outputs=not self.task.generates)))

    def sample(self, params: Params) -> str | None:
        rows = self.tables[1].rows[:SHOWN_ROWS]
        examples = None if self.task.generates else self.examples[1].first(SHOWN_ROWS)
        try:
            predictions = self.predictor.predict(params, rows, examples)
        except ValueError as error:
            return str(error)
        assert predictions is not None, "nothing stops it"
        given = [" | ".join(str(row.get(role, ""))[:200] for role in self.task.given) for row in rows]
        return "\n".join(f"{text} → {self.task.show(row, p)}" for text, row, p in zip(given, rows, predictions, strict=True))

    def flops(self, model: TransformerConfig) -> float | None:
        return None

    def summary(self) -> str:
        train, held = self.tables
        labels = (
            f"; labels: {', '.join(self.task.labels[:8])}{' …' if len(self.task.labels) > 8 else ''}" if self.task.labels else ""
        )
        return f"{train.summary()} to train on; {held.summary()} held out{labels}"

    def conclude(
        self, params: Callable[[], Params], rows: list[dict[str, Any]]
    ) -> tuple[dict[str, str], Verdict, dict[str, float]]:
        held = self.tables[1].rows
        with bar("predicting the held-out rows", len(held), "rows") as shown:
            examples = None if self.task.generates else self.examples[1]
            predictions = self.predictor.predict(params(), held, examples, advance=shown.advance, likelihood=True)
        assert predictions is not None, "nothing stops it"
        if not speaks():
            return {}, Verdict(), {}
        found = write_predictions(self.folder, self.config.name, self.task, held, predictions)
        verdict, baselines = self._verdict(held, predictions)
        return found, verdict, baselines

    def _verdict(self, held: Sequence[Row], predictions: Sequence[Prediction]) -> tuple[Verdict, dict[str, float]]:
        """How the model compares with what words alone can do on the same rows."""
        words = words_alone(self.task, self.tables[0].rows, held)
        if words is None:
            return Verdict(), {}
        ours, theirs = self.task.scores(held, predictions), self.task.scores(held, words)
        name = self.config.train.metric if self.config.train.metric in ours else self.metric
        compared = paired_scores(self.task, held, predictions, words)[name]
        by = f"{compared.difference:+.4f} ({compared.low:+.4f} to {compared.high:+.4f})"
        above, below = compared.low > 0, compared.high < 0
        better, worse = (below, above) if lower_is_better(name) else (above, below)
        sure = "beats it" if better else "is beaten by it" if worse else "cannot be told from it"
        text = (
            f"Held-out rows: {self.task.title(name)} {ours[name]:.4f}; {BASELINE} on the same rows {theirs[name]:.4f}: the model "
            f"{sure}, {by}."
        )
        return Verdict(text, "better" if better else "worse" if worse else "unclear"), {BASELINE: theirs[name]}

    def commands(self) -> list[str]:
        folder, role = self.config.folder, self.task.given[0]
        text = self.tables[1].rows[0].get(role)
        alone = len(self.task.given) == 1 and isinstance(text, str)
        given = option("text", str(text)[:60]) if alone else ("--file", "FILE")
        return [
            command("jaxlm", "predict", folder, *given),
            command("jaxlm", "evaluate", folder, "--data", "FILE"),
            command("jaxlm", "export", folder, "exported"),
        ]
