"""The verbs: each is a function of its words, with a config dataclass for its flags."""

from collections.abc import Callable, Sequence

from jaxlm.verbs.folders import DiffOptions, ExportOptions, ShowOptions, diff, export, show
from jaxlm.verbs.labels import EvaluateOptions, PredictOptions, evaluate, predict
from jaxlm.verbs.training import config, train
from jaxlm.verbs.writing import GenerateOptions, generate

VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train, "config": config, "predict": predict, "evaluate": evaluate, "generate": generate, "export": export,
    "show": show, "diff": diff,
}  # fmt: skip
OPTIONS = {
    "predict": PredictOptions, "evaluate": EvaluateOptions, "generate": GenerateOptions, "export": ExportOptions,
    "show": ShowOptions, "diff": DiffOptions,
}  # fmt: skip

__all__ = ["OPTIONS", "VERBS", "GenerateOptions"]
