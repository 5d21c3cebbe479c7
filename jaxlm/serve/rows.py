"""Vectors and labels of texts: what several clients send at a time is computed together, in a thread of its own."""

import concurrent.futures
import dataclasses
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import Example
from jaxlm.data.examples import length_of
from jaxlm.model.heads import pool
from jaxlm.models import Trained
from jaxlm.serve.errors import busy, unavailable
from jaxlm.serve.fields import bad
from jaxlm.tasks import Examples, Prediction, Predictor, Row, Task, TaskConfig
from jaxlm.train import Objective, objectives

LABELS = ("classification", "multilabel", "regression")
_BATCHES = (1, 4, 16, 64)
"""Rows computed at a time: a text alone does not pay for 64."""


class MeanOfStates(Task):
    """A text's vector from a model without a head for it: the mean of its last hidden states, of length 1."""

    def examples(self, rows: Sequence[Row], where: Sequence[str] | None = None) -> Examples:
        return Examples(self.encoded([row["text"] for row in rows]), np.arange(len(rows)))

    def objective(self, chunk: int, z_loss: float = 0.0) -> Objective:
        return objectives.contrast(self.config.temperature)  # of vectors; nothing is learned here

    def outputs(self, apply: Callable[..., Any], params: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        hidden_BLD = apply(params, batch, method="hidden")
        return {"anchor_BD": objectives.unit(pool(hidden_BLD, batch["segments_BL"], "mean"))}

    def read(self, rows: Sequence[Row], examples: Examples, outputs: Any) -> list[Prediction]:
        return [{"anchor": output["anchor_BD"].tolist()} for output in outputs]


def vectors_of(trained: Trained) -> Task | None:
    """The task that gives vectors of texts: the model's own head, or the mean of hidden states; None for an encoder-decoder."""
    config = trained.model.config
    if config.head.kind == "embedding":
        return trained.task()
    if config.architecture == "encoder_decoder":
        return None
    return MeanOfStates(TaskConfig(kind="embedding"), trained.tokenizer, config.positions, architecture=config.architecture)


def labels_of(trained: Trained) -> Task | None:
    """The task whose labels `/classify` tells; None for a model without a head for them."""
    if trained.model.config.head.kind != "sequence":
        return None
    task = trained.task()
    return task if task.config.kind in LABELS else None


class Job(NamedTuple):
    """Texts of one request."""

    rows: list[Row]
    examples: Examples
    answer: "concurrent.futures.Future[list[Prediction]]"

    @property
    def paired(self) -> bool:
        return "pair" in self.rows[0]

    @property
    def tokens(self) -> int:
        """How many the model reads."""
        return sum(map(length_of, self.examples.items))


def _with_ids(example: Example, ids: Sequence[int]) -> Example:
    """An example of a single text with these tokens in the place of its own."""
    made = {name: _with_ids(value, ids) if isinstance(value, dict) else value for name, value in example.items()}
    if "tokens" in made:
        made |= {"tokens": np.array(ids, np.int32), "segments": np.ones(len(ids), np.int32)}
    return made


class Rows:
    """Predictions for texts; those that wait share a batch."""

    def __init__(self, trained: Trained, task: Task, waiting: int):
        """`waiting` is how many requests may wait; beyond it they are told that the server is busy."""
        self.task, self._trained = task, trained
        self._predictors = {size: Predictor(task, trained.model, trained.mesh, size) for size in _BATCHES}
        self._framing = threading.Lock()
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="rows", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, rows: list[Row], param: str) -> Job:
        """Its `answer` comes in time. A row has a text, with `pair` two, or its `ids`, which are read as they are. ApiError for
        one that is longer than the model reads, which training would cut."""
        with self._framing:
            before = self.task.text_encoder.truncated
            job = Job(rows, self._examples(rows), concurrent.futures.Future())
            if self.task.text_encoder.truncated > before or any(len(row.get("ids", ())) > self.task.length for row in rows):
                raise bad(
                    f"This model's maximum context length is {self.task.length} tokens. However, a text of {param} has more than "
                    f"{self.task.length} tokens. Please reduce its length.", param, "context_length_exceeded",
                )  # fmt: skip
        if not self.alive:
            raise unavailable("the thread that computes vectors and labels has ended")
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise busy("the server is busy: its queue is full, try again in a moment") from None
        return job

    def _examples(self, rows: Sequence[Row]) -> Examples:
        """Of texts as the task makes them; of token ids the same with other tokens."""
        made = self.task.examples([row if "ids" not in row else {"text": "a"} for row in rows])
        items = [_with_ids(item, row["ids"]) if "ids" in row else item for item, row in zip(made.items, rows, strict=True)]
        return dataclasses.replace(made, items=items)

    def close(self) -> None:
        """Finish what waits, and end."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            found = [self._jobs.get()]
            while len(found) < _BATCHES[-1] and not self._jobs.empty():
                found.append(self._jobs.get())
            going = None not in found
            jobs = [job for job in found if job is not None and job.answer.set_running_or_notify_cancel()]
            for paired in (False, True):
                if some := [job for job in jobs if job.paired == paired]:
                    self._compute(some)

    def _compute(self, jobs: Sequence[Job]) -> None:
        rows = [row for job in jobs for row in job.rows]
        items = [item for job in jobs for item in job.examples.items]
        predictor = self._predictors[next((size for size in _BATCHES if size >= len(rows)), _BATCHES[-1])]
        try:
            found = predictor.predict(self._trained.params, rows, Examples(items, np.arange(len(rows))))
            assert found is not None, "nothing stops it"
        except Exception as error:  # whatever it is, those who wait must hear of it
            for job in jobs:
                job.answer.set_exception(error)
            return
        for job in jobs:
            job.answer.set_result(found[: len(job.rows)])
            found = found[len(job.rows) :]
