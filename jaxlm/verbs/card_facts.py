"""What a run's folder tells of its training, for the model card of an export."""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxlm import config as configs

if TYPE_CHECKING:
    from jaxlm.hub.model_card import CardFacts, Result
    from jaxlm.models import Trained

# Settings that a card names whatever they are; others only where they are not the default.
_CENTRAL = (
    "optim.name", "optim.learning_rate", "optim.schedule", "optim.warmup", "optim.weight_decay", "data.batch_size", "data.length",
    "seed", "model.dtype",
)  # fmt: skip
# Sections that say how a model was trained; the rest says where files are and how often something was shown.
_SECTIONS = ("optim.", "task.", "tune.", "data.epochs", "train.steps", "train.accumulate", "train.z_loss", "train.patience")
_PACKAGES = ("jaxlm", "jax", "flax", "optax", "transformers", "tokenizers")
MOST_ROWS = 20


def card_facts(trained: "Trained", language: tuple[str, ...] = (), license: str = "") -> "CardFacts":
    """What is known of a model: of a run its data, settings and scores; licence and language as given, else as the model
    that it was made of states them."""
    from jaxlm.hub.model_card import CardFacts, inherited

    facts = CardFacts() if trained.run is None else _of_run(trained, trained.run)
    source = trained.source if trained.run is None else _foreign_source(trained.run)
    stated = CardFacts() if source is None else inherited(source)
    return dataclasses.replace(facts, language=language or stated.language, license=license or stated.license)


def _foreign_source(run: pathlib.Path) -> pathlib.Path | None:
    """The Hugging Face folder that a run, or the run that it goes on from, started with; None where there is none any more."""
    from jaxlm.models import locate

    folder = run
    while (folder / "config.yaml").is_file():
        start = configs.read_yaml(folder / "config.yaml")[0]["model"].get("init_from")
        if not start:
            return None
        try:
            folder = locate(str(start), weights=False)
        except ValueError:
            return None
    return folder


def _of_run(trained: "Trained", run: pathlib.Path) -> "CardFacts":
    from jaxlm.experiment.config import ExperimentConfig
    from jaxlm.hub.model_card import CardFacts
    from jaxlm.report import read_rows

    tree = configs.read_yaml(run / "config.yaml")[0]
    data, start = tree["data"], tree["model"].get("init_from")
    flat, plain = configs.flatten(tree), configs.flatten(configs.to_dict(ExperimentConfig()))
    named = [name for name in flat if name in _CENTRAL or (name.startswith(_SECTIONS) and flat[name] != plain.get(name))]
    settings = {name: str(flat[name]) for name in named if flat[name] not in (None, "", ()) and not _is_path(flat[name])}
    evals = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "eval"] if (run / "metrics.jsonl").is_file() else []
    if evals:
        settings["steps taken"] = f"{evals[-1]['step']:,}"
    names = _data_names(data)
    validation = data.get("validation")
    split = "validation" if validation else "held-out share of the training data"
    every = max(1, math.ceil(len(evals) / MOST_ROWS))
    return CardFacts(
        base_model=_hub_id_or_name(str(start)) if start else "",
        datasets=tuple(name.removeprefix("hf:") for name in names if name.startswith("hf:")),
        data=f"Task {tree['task'].get('kind', 'causal')}, trained on {', '.join(names)}." if names else "",
        dataset=_name(str(validation)) if validation else ", ".join(names), split=split,
        results=_results(trained, run, evals), settings=settings, labels=trained.labels,
        history=tuple([*evals[::-1][::every]][::-1]), versions=_versions(),
    )  # fmt: skip


def _results(trained: "Trained", run: pathlib.Path, evals: list[dict[str, Any]]) -> tuple["Result", ...]:
    """The scores of the held-out rows, or of pretraining those of the best evaluation."""
    from jaxlm.hub.model_card import Result
    from jaxlm.metrics import lower_is_better
    from jaxlm.models import read_card

    if (run / "scores.json").is_file():
        task = trained.task()
        found = json.loads((run / "scores.json").read_text(encoding="utf8"))
        return tuple(Result(name, task.title(name), each["value"], each["low"], each["high"]) for name, each in found.items())
    metric = read_card(run).metric
    scored = [row for row in evals if isinstance(row.get(metric), int | float)]
    if not scored:
        return ()
    best = (min if lower_is_better(metric) else max)(scored, key=lambda row: row[metric])
    numbers = {name: value for name, value in best.items() if isinstance(value, float) and name not in ("step", "time")}
    return tuple(Result(name, name.replace("_", " "), value) for name, value in numbers.items())


def _data_names(data: Mapping[str, Any]) -> list[str]:
    """Names of the training data; of files on this machine without their folders."""
    if data.get("train"):
        return [_name(str(data["train"]))]
    sources = data.get("sources") or ()
    return [_name(str(each.get("path") or each.get("name") or each.get("kind"))) for each in sources]


def _name(path: str) -> str:
    return path if path.startswith(("hf:", "tfds:", "embedded:")) else pathlib.PurePath(path).name


def _hub_id_or_name(argument: str) -> str:
    here = pathlib.Path(argument)
    return here.name if here.exists() or argument.count("/") > 1 or argument.startswith((".", "~", "$", "/")) else argument


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value and " " not in value


def _versions() -> dict[str, str]:
    from jaxlm import __version__

    found = {"jaxlm": __version__}
    for name in _PACKAGES[1:]:
        found[name] = importlib.metadata.version(name)
    return found
