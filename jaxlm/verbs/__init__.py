"""The verbs: each is a function of its words, with a config dataclass for its flags."""

from collections.abc import Callable, Sequence

from jaxlm.serve.options import ServeOptions
from jaxlm.verbs.chatting import ChatOptions, chat
from jaxlm.verbs.folders import DiffOptions, ExportOptions, ShowOptions, diff, export, show
from jaxlm.verbs.labels import EvaluateOptions, PredictOptions, evaluate, predict
from jaxlm.verbs.serving import serve
from jaxlm.verbs.training import config, train
from jaxlm.verbs.writing import GenerateOptions, generate

VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train, "config": config, "predict": predict, "evaluate": evaluate, "generate": generate, "chat": chat,
    "serve": serve, "export": export,
    "show": show, "diff": diff,
}  # fmt: skip
OPTIONS = {
    "predict": PredictOptions, "evaluate": EvaluateOptions, "generate": GenerateOptions,
    "chat": ChatOptions, "serve": ServeOptions, "export": ExportOptions,
    "show": ShowOptions, "diff": DiffOptions,
}  # fmt: skip

__all__ = ["OPTIONS", "VERBS", "GenerateOptions"]
