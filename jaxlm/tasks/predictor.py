"""A task's losses and predictions on the devices, for whole sets of rows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.data import Example, in_order
from jaxlm.generate import BatchGenerator, DecodeConfig
from jaxlm.parallel import batch_ways, place_batch, settle
from jaxlm.tasks.task import Examples, Outputs, Prediction, Row, Task


@dataclasses.dataclass(frozen=True)
class Passed:
    """What one pass over some examples gave."""

    loss: float
    """Mean of the objective; its other metrics' means beside it."""
    means: Mapping[str, float]
    outputs: Outputs
    """Of each example, without the padding of its batch's length taken off."""

    @property
    def undefined(self) -> list[int]:
        """Indices of the examples whose outputs contain NaN, for which no prediction is defined."""
        return [i for i, output in enumerate(self.outputs) if any(np.isnan(array).any() for array in output.values())]


def once(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` that computes the same call once: within one traced step the loss and the outputs ask for the same scores."""
    known: dict[Any, Any] = {}

    def call(params: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        key = (tuple(map(id, jax.tree.leaves(batch))), tuple(sorted((name, str(value)) for name, value in options.items())))
        if key not in known:
            known[key] = batch, apply(params, batch, **options)  # the batch is kept, so that its ids stay its own
        return known[key][1]

    return call


class Predictor:
    """One task and one model, compiled once for each shape of batch."""

    def __init__(self, task: Task, model: Any, mesh: jax.sharding.Mesh, batch_size: int, chunk: int = 128):
        self.task, self.model, self.mesh = task, model, mesh
        ways = batch_ways(mesh)
        self.batch_size = -(-batch_size // ways) * ways
        objective = task.objective(chunk)

        def step(params: Any, batch: Mapping[str, Any], wanted: tuple[bool, bool]) -> tuple[Any, Any]:
            apply = once(model.apply)
            loss, weight, metrics = objective(apply, params, batch, None) if wanted[0] else (0.0, 0.0, {})
            return {"loss": loss, "weight": weight, **metrics}, task.outputs(apply, params, batch) if wanted[1] else {}

        # Parameters come as they lie: those of a server that writes text too have their layers apart.
        self._step = jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()), static_argnums=2)

    def run(
        self, params: Any, examples: Sequence[Example], *, loss: bool = True, outputs: bool = True,
        stop: Callable[[], bool] = lambda: False, advance: Callable[[int], None] = lambda n: None,
    ) -> Passed | None:  # fmt: skip
        """One pass, or None once `stop()` is true."""
        sums: dict[str, float] = {}
        kept: Outputs = [{} for _ in examples]
        with jax.set_mesh(self.mesh):
            for numbers, batch in in_order(examples, self.batch_size, self.task.pad_id, self._longest):
                if stop():
                    return None
                part, given = jax.device_get(
                    settle(self.mesh, self._step(params, place_batch(batch, self.mesh, whole=True), (loss, outputs)))
                )
                sums = {name: sums.get(name, 0.0) + float(value) for name, value in part.items()}
                for place, number in enumerate(numbers):
                    kept[number] = {name: np.asarray(array[place]) for name, array in given.items()}
                advance(len(numbers))
        weight = max(sums.pop("weight", 0.0), 1e-9)
        means = {name: value / weight for name, value in sums.items()}
        return Passed(means.pop("loss", 0.0), means, kept)

    def dry_run(self, examples: Sequence[Example], *, outputs: bool = True) -> Passed:
        """What `run` returns, from shapes alone: metrics are 0 and outputs uniform. It tells which scores there will be."""
        known: dict[Any, Any] = {}
        kept: Outputs = [{} for _ in examples]
        with jax.set_mesh(self.mesh):
            for numbers, batch in in_order(examples, self.batch_size, self.task.pad_id, self._longest):
                key = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
                if key not in known:
                    known[key] = self._step.eval_shape(self.model.shapes, batch, (True, outputs))
                for number in numbers:
                    kept[number] = {
                        name: np.full(x.shape[1:], 1 / (x.shape[1:] or (1,))[-1], np.float32) for name, x in known[key][1].items()
                    }
        names = {name for metrics, _ in known.values() for name in metrics} - {"loss", "weight"}
        return Passed(0.0, dict.fromkeys(sorted(names), 0.0), kept)

    def predict(
        self, params: Any, rows: Sequence[Row], examples: Examples | None = None, *,
        stop: Callable[[], bool] = lambda: False, advance: Callable[[int], None] = lambda n: None, likelihood: bool = False,
    ) -> list[Prediction] | None:  # fmt: skip
        """A prediction for each row, or None once `stop()` is true. With `likelihood` those of a chat task also hold the
        likelihood of the assistant's turns: `nll` in nats, of so many `tokens`. Raises ValueError if outputs are NaN."""
        if self.task.generates:
            written = self._write(params, rows, advance)
            answered = getattr(self.task, "answered", None) if likelihood else None
            alone = None if answered is None else answered(rows)
            if alone is None:
                return written
            passed = self.run(params, alone.items, loss=False)
            assert passed is not None, "nothing stops it"
            return [
                {**p, "nll": -float(output["logprob_B"]), "tokens": int(output["tokens_B"])}
                for p, output in zip(written, passed.outputs, strict=True)
            ]
        examples = self.task.examples(rows) if examples is None else examples
        passed = self.run(params, examples.items, loss=False, stop=stop, advance=advance)
        if passed is None:
            return None
        if wrong := passed.undefined:
            raise ValueError(
                f"the model's outputs for {len(wrong):,} of {len(examples):,} texts are NaN, the first for row "
                f"{examples.row[wrong[0]] + 1:,}: its parameters are not finite, or its precision is too low (--dtype float32)"
            )
        return self.task.read(rows, examples, passed.outputs)

    def _write(self, params: Any, rows: Sequence[Row], advance: Callable[[int], None]) -> list[Prediction]:
        task: Any = self.task
        tokenizer = task.tokenizer
        generator = BatchGenerator(
            self.model, self.mesh, tokenizer.vocab_size, pad_id=task.pad_id, start_id=task.start_id if self._seq2seq else None
        )
        prompts, decode = self._fitting(task.prompts(rows), task.config.decode)
        stop = task.stop_ids | task.ends
        written = generator(params, prompts, decode, stop, batch_size=self.batch_size, advance=advance, rules=task.rules)
        return [task.written(tokens) for tokens in written]

    def _fitting(self, prompts: list[list[int]], decode: DecodeConfig) -> tuple[list[list[int]], DecodeConfig]:
        """Where positions are learned what is written has at most half of them, and a prompt loses its beginning for it; an
        encoder reads its text at positions of their own."""
        if self._longest is None:
            return prompts, decode
        most = self._longest if self._seq2seq else max(1, self._longest // 2)
        decode = dataclasses.replace(decode, max_tokens=min(decode.max_tokens, most))
        if self._seq2seq:
            return prompts, decode
        return [prompt[-(self._longest + 1 - decode.max_tokens) :] for prompt in prompts], decode

    @property
    def _longest(self) -> int | None:
        """Tokens that a row may have: the model's positions, where they are learned."""
        return self.model.config.positions if self.model.config.position == "learned" else None

    @property
    def _seq2seq(self) -> bool:
        return self.model.config.architecture == "encoder_decoder"
