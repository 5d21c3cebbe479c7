"""What a run learns from what: the part of it that depends on the task. Two kinds: from text, and from rows."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

import jax

from jaxlm.data import Batch, Tokenizer
from jaxlm.experiment.config import ExperimentConfig
from jaxlm.model import Params, TransformerConfig
from jaxlm.parallel import share
from jaxlm.report import Verdict
from jaxlm.train import Objective


class Batches(Protocol):
    """Training batches: `iterate(state)` goes on where a state says, `total` is their number if they end, `per_epoch` that of
    an epoch where they have epochs."""

    @property
    def per_epoch(self) -> int | None: ...

    @property
    def total(self) -> int | None: ...

    def iterate(self, start: Any = None) -> Iterator[tuple[Batch, Any]]: ...


class Job:
    """From data to objective, evaluation and what is told of it; `model` is set once it is known."""

    metric: str = "loss"
    shown: tuple[str, ...] = ("loss",)
    unit: ClassVar[str] = "tokens"
    stochastic: ClassVar[bool] = False
    """The objective draws random numbers, with dropout or without."""
    writes: bool = True
    """Its samples are texts that the model writes, not predictions."""
    labels: tuple[str, ...] = ()
    start_id: int | None = None
    """What a decoder that reads an encoder begins with."""
    generation: Mapping[str, Any] = {}
    """Settings for writing text that the model brought with it (see `models.start_generation`)."""
    tokenizer: Tokenizer

    @property
    def saved_tokenizer(self) -> Tokenizer:
        """The tokenizer for the run's folder."""
        return self.tokenizer

    def __init__(self, config: ExperimentConfig, mesh: jax.sharding.Mesh, folder: pathlib.Path):
        self.config, self.mesh, self.folder = config, mesh, folder

    @functools.cached_property
    def processes(self) -> dict[str, int]:
        """Which rows of each batch this process makes."""
        index, count = share(self.mesh)
        return {"process_index": index, "process_count": count}

    def model(self) -> Any:
        """The model of the run, its vocabulary and labels filled in."""
        raise NotImplementedError

    def batches(self) -> Batches:
        raise NotImplementedError

    def objective(self) -> Objective:
        raise NotImplementedError

    def prepare(self, start: Callable[[], Params]) -> None:
        """Compute what needs the model as it is at the start, and write down what later starts need."""

    def evaluate(self, params: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
        raise NotImplementedError

    def score_names(self) -> list[str]:
        """Names of the scores that `evaluate` returns, without computing them."""
        raise NotImplementedError

    def sample(self, params: Params) -> str | None:
        """A text that shows what was learned."""
        raise NotImplementedError

    def figures(self, values: Mapping[str, float]) -> dict[str, float]:
        """Further numbers of a training step."""
        return {}

    def flops(self, model: TransformerConfig) -> float | None:
        """Of training, for one unit."""
        raise NotImplementedError

    def summary(self) -> str:
        """The data in a line."""
        raise NotImplementedError

    def conclude(
        self, params: Callable[[], Params], rows: list[dict[str, Any]]
    ) -> tuple[dict[str, str], Verdict, dict[str, float]]:
        """Summary, verdict and baselines (in bits per byte) of a run that is over."""
        raise NotImplementedError

    def commands(self) -> list[str]:
        """What a person may type next with the model."""
        raise NotImplementedError
