"""Comparing: vectors of similar texts, preferred answers, a reward for answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxlm import metrics
from jaxlm.data import Example
from jaxlm.tasks.task import ONE, Examples, Outputs, Prediction, Row, Task, of_columns
from jaxlm.train import Objective, objectives


class Embedding(Task):
    """Vectors that are near for texts that belong together; the other rows of a batch are what they are told from."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "embedding"}
    required = ("text", "pair")
    optional = ("rejected",)
    metric = "mrr@10"

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        roles = {"anchor": "text", "positive": "pair", "negative": "rejected"}
        there = {name: role for name, role in roles.items() if all(role in row for row in rows)}
        columns = {name: self.framed([row[role] for row in rows]) for name, role in there.items()}
        items = [{**{name: column[i] for name, column in columns.items()}, "weights": ONE} for i in range(len(rows))]
        return Examples(items, np.arange(len(items)))

    def objective(self, chunk: int) -> Objective:
        return objectives.contrast(self.config.temperature)

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        names = [name for name in ("anchor", "positive") if name in batch]
        return {f"{name}_BD": objectives.unit(objectives.scores_of(apply, params, batch[name])) for name in names}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        """The text's vector, and its pair's where there is one."""
        return [{name.removesuffix("_BD"): x.tolist() for name, x in output.items()} for output in outputs]

    def statistic(self) -> Callable[..., dict[str, float]]:
        """How well each text finds its own pair among the pairs of all rows."""

        def columns(predictions: Sequence[Prediction], rows: Sequence[Row]) -> Sequence[Any]:
            anchors, positives = (np.array([p[name] for p in predictions]) for name in ("anchor", "positive"))
            return anchors @ positives.T, np.eye(len(predictions))

        return of_columns(metrics.weighted_retrieval(), columns)

    def show(self, row: Row, prediction: Prediction) -> str:
        return " ".join(f"{x:.4f}" for x in prediction["anchor"])


def answers(row: Row) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of a row; without a prompt it is what both texts begin with, up to a whole word."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        return row["prompt"], chosen, rejected
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    while same and not chosen[same - 1].isspace():
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


class Preference(Task):
    """The preferred of two answers made likelier, the other less likely, compared with the model at the start."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "language_model"}
    required = ("chosen", "rejected")
    optional = ("prompt",)
    given = ("prompt", "chosen", "rejected")
    reference = ("reference_chosen", "reference_rejected")
    """What `refer` computes once with the model at the start."""

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        items = []
        for row in rows:
            prompt, *both = answers(row)
            before = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt).tolist()]
            pair = {name: self._row(before, text) for name, text in zip(("chosen", "rejected"), both, strict=True)}
            items.append({**pair, "weights": ONE})
        return Examples(items, np.arange(len(items)))

    def _row(self, prompt: list[int], text: str) -> Example:
        """The answer learned behind its prompt; a prompt that leaves it no room is cut at its beginning."""
        target = [*self.tokenizer.encode(text).tolist(), self.tokenizer.eos_id][: self.length // 2]
        prompt = prompt[-(self.length + 1 - len(target)) :]
        whole = np.array([*prompt, *target], np.int32)
        weights = (np.arange(1, len(whole)) >= len(prompt)).astype(np.float32)
        return {"tokens": whole[:-1], "targets": whole[1:], "weights": weights, "segments": np.ones(len(whole) - 1, np.int32)}

    def objective(self, chunk: int) -> Objective:
        return objectives.preference(self.config.preference, self.config.beta, chunk)

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The log-likelihood of both answers, in nats."""

        def total(name: str) -> Any:
            return apply(params, batch[name], method="log_likelihood", chunk=self.length)

        return {"chosen_B": total("chosen"), "rejected_B": total("rejected")}

    def refer(self, examples: Examples, outputs: Outputs) -> None:
        """Keep what the model at the start gave with each example."""
        for item, output in zip(examples.items, outputs, strict=True):
            item |= {f"reference_{name}": np.float32(output[f"{name}_B"]) for name in ("chosen", "rejected")}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        """The reward of both answers: how much likelier they are than at the start, in nats, times beta."""
        made = []
        for item, output in zip(examples.items, outputs, strict=True):
            gains = {n: float(output[f"{n}_B"] - item.get(f"reference_{n}", np.float32(0))) for n in ("chosen", "rejected")}
            made.append({name: self.config.beta * gain for name, gain in gains.items()})
        return made

    def statistic(self) -> Callable[..., dict[str, float]]:
        return lambda predictions, rows: metrics.preference(*([p[name] for p in predictions] for name in ("chosen", "rejected")))


class Reward(Task):
    """A number for an answer, higher for the preferred one."""

    head: ClassVar[Mapping[str, Any]] = {"kind": "sequence", "labels": 1}
    required = ("chosen", "rejected")
    optional = ("prompt",)
    given = ("text",)

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        if "text" in rows[0]:
            return Examples(
                [{**example, "weights": ONE} for example in self.framed([row["text"] for row in rows])], np.arange(len(rows))
            )
        found = [answers(row) for row in rows]
        both = [self.framed([prompt + pair[i] for prompt, *pair in found]) for i in range(2)]
        items = [{"chosen": a, "rejected": b, "weights": ONE} for a, b in zip(*both, strict=True)]
        return Examples(items, np.arange(len(items)))

    def objective(self, chunk: int) -> Objective:
        return objectives.reward()

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        if "chosen" not in batch:
            return {"reward_B": objectives.scores_of(apply, params, batch)[:, 0]}
        return {f"{name}_B": objectives.scores_of(apply, params, batch[name])[:, 0] for name in ("chosen", "rejected")}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Outputs) -> list[Prediction]:
        return [{name.removesuffix("_B"): float(x) for name, x in output.items()} for output in outputs]

    def statistic(self) -> Callable[..., dict[str, float]]:
        return lambda predictions, rows: metrics.preference(*([p[name] for p in predictions] for name in ("chosen", "rejected")))
