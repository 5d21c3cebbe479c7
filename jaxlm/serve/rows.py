"""Vectors and labels of texts: what several clients send at a time is computed together, in a thread of its own."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data import Example
from jaxlm.data.examples import bucket, length_of, longest_of
from jaxlm.model.heads import pool
from jaxlm.models import Trained
from jaxlm.serve.errors import busy, unavailable
from jaxlm.serve.fields import bad
from jaxlm.tasks import Examples, Prediction, Predictor, Row, Task, TaskConfig
from jaxlm.train import Objective, objectives

_log = logging.getLogger(__name__)
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


def vectors_of(trained: Trained, split_special_tokens: bool = False) -> Task | None:
    """The task that gives vectors of texts: the model's own head, or the mean of hidden states; None for an encoder-decoder."""
    config = trained.model.config
    if config.head.kind == "embedding":
        return trained.task(split_special_tokens=split_special_tokens or None)
    if config.architecture == "encoder_decoder":
        return None
    task = TaskConfig(kind="embedding", split_special_tokens=split_special_tokens)
    return MeanOfStates(task, trained.tokenizer, config.positions, architecture=config.architecture)


def labels_of(trained: Trained, split_special_tokens: bool = False) -> Task | None:
    """The task whose labels `/classify` tells; None for a model without a head for them."""
    if trained.model.config.head.kind != "sequence":
        return None
    task = trained.task(split_special_tokens=split_special_tokens or None)
    return task if task.config.kind in LABELS else None


class Job(NamedTuple):
    """Texts of one request."""

    rows: Sequence[Row]
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


def _examples(task: Task, rows: Sequence[Row]) -> Examples:
    """Of texts as the task makes them; of token ids the same with other tokens."""
    made = task.examples([row if "ids" not in row else {"text": "a"} for row in rows])
    items = [_with_ids(item, row["ids"]) if "ids" in row else item for item, row in zip(made.items, rows, strict=True)]
    return dataclasses.replace(made, items=items)


def _batches(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in batches of at most the largest size; a job of more rows is alone."""
    made: list[list[Job]] = []
    room = 0
    for job in jobs:
        if len(job.rows) > room:
            made.append([])
            room = _BATCHES[-1]
        made[-1].append(job)
        room -= len(job.rows)
    return made


class Rows:
    """Predictions for texts; those that wait share a batch.

    A shape of batch that is not compiled yet, and a request of several batches, are computed in threads of their own, so that the
    others do not wait for them.
    """

    def __init__(self, trained: Trained, task: Task, waiting: int):
        """`waiting` is how many requests may wait; beyond it they are told that the server is busy."""
        self.task, self._trained = task, trained
        self._predictors = {size: Predictor(task, trained.model, trained.mesh, size) for size in _BATCHES}
        self._compiled: set[tuple[int, int]] = set()
        """Batch sizes and padded lengths."""
        self._compiling: set[tuple[int, int]] = set()
        self._waiting, self._waiting_aside, self._lock = waiting, 0, threading.Lock()
        self._aside = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="rows")
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="rows", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, rows: Sequence[Row], param: str) -> Job:
        """Its `answer` comes in time. A row has a text, with `pair` two, or its `ids`, which are read as they are. ApiError for
        one that is longer than the model reads, which training would cut."""
        task = copy.copy(self.task)  # one that counts this request's texts alone: others are read at the same time
        task.text_encoder = copy.copy(task.text_encoder)
        task.text_encoder.truncated = 0
        job = Job(rows, _examples(task, rows), concurrent.futures.Future())
        if task.text_encoder.truncated or any(len(row.get("ids", ())) > task.length for row in rows):
            raise bad(
                f"This model's maximum context length is {task.length} tokens. However, a text of {param} has more than "
                f"{task.length} tokens. Please reduce its length.", param, "context_length_exceeded",
            )  # fmt: skip
        if not self.alive:
            raise unavailable("the thread that computes vectors and labels has ended")
        try:
            if self._waiting_aside >= self._waiting:
                raise queue.Full
            self._jobs.put_nowait(job)
        except queue.Full:
            raise busy("the server is busy: its queue is full, try again in a moment") from None
        return job

    def close(self) -> None:
        """Finish what waits, and end."""
        self._jobs.put(None)
        self._thread.join()
        self._aside.shutdown()

    def _work(self) -> None:
        going = True
        while going:
            found = [self._jobs.get()]
            while len(found) < _BATCHES[-1] and not self._jobs.empty():
                found.append(self._jobs.get())
            going = None not in found
            jobs = [job for job in found if job is not None and job.answer.set_running_or_notify_cancel()]
            try:
                for paired in (False, True):
                    self._share([job for job in jobs if job.paired == paired])
            except Exception as error:  # whatever it is, nobody may wait for an answer that does not come
                _log.exception("texts could not be shared out")
                for job in jobs:
                    _fail(job, error)

    def _share(self, jobs: Sequence[Job]) -> None:
        """Compute jobs in as few batches as may be, without that one waits while another's shape is compiled."""
        at_once = [job for job in jobs if len(job.rows) <= _BATCHES[-1] and self._shape([job]) in self._compiled]
        later = [job for job in jobs if not any(job is known for known in at_once)]
        for batch in _batches(later):
            self._put_aside(self._compute, batch)
        for batch in _batches(at_once):
            if (shape := self._shape(batch)) in self._compiled:
                self._compute(batch)
                continue
            if shape not in self._compiling:
                self._compiling.add(shape)
                self._put_aside(self._predict, batch)
            for job in batch:
                self._compute([job])

    def _put_aside(self, work: Callable[[Sequence[Job]], Any], jobs: Sequence[Job]) -> None:
        def count(more: int) -> None:
            with self._lock:
                self._waiting_aside += more

        def run() -> None:
            try:
                work(jobs)
            finally:
                count(-len(jobs))

        self._aside.submit(run)
        count(len(jobs))

    def _shape(self, jobs: Sequence[Job]) -> tuple[int, int]:
        """Rows of the batch, and their padded length."""
        rows, longest = sum(len(job.rows) for job in jobs), max(longest_of(item) for job in jobs for item in job.examples.items)
        return next((size for size in _BATCHES if size >= rows), _BATCHES[-1]), bucket(longest)

    def _predict(self, jobs: Sequence[Job]) -> list[Prediction]:
        rows = [row for job in jobs for row in job.rows]
        items = [item for job in jobs for item in job.examples.items]
        shape = self._shape(jobs)
        found = self._predictors[shape[0]].predict(self._trained.params, rows, Examples(items, np.arange(len(rows))))
        assert found is not None, "nothing stops it"
        if len(rows) <= _BATCHES[-1]:
            self._compiled.add(shape)
        return found

    def _compute(self, jobs: Sequence[Job]) -> None:
        try:
            found = self._predict(jobs)
        except BaseException as error:  # whatever it is, those who wait must hear of it, each of what is its own
            if len(jobs) == 1:
                _fail(jobs[0], error)
                return
            for job in jobs:
                self._compute([job])
            return
        for job in jobs:
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was told that it failed
                job.answer.set_result(found[: len(job.rows)])
            found = found[len(job.rows) :]


def _fail(job: Job, error: BaseException) -> None:
    """End a job with an error, unless it is over."""
    with contextlib.suppress(concurrent.futures.InvalidStateError):
        job.answer.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
