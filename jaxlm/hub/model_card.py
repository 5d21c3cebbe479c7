"""The README of an exported model: what it is, what it was trained on and how, its scores, and the hub's metadata."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

PIPELINE_TAGS = {
    "masked_lm": "fill-mask", "sequence": "text-classification", "token": "token-classification", "span": "question-answering",
    "choice": "multiple-choice", "embedding": "feature-extraction",
}  # fmt: skip


class Result(NamedTuple):
    """A score on held-out data, with the bounds of its 95% interval, nan where it has none."""

    metric: str
    """The score's key, as `f1`."""
    title: str
    """Its name for a reader, as `f1 (spam)`."""
    value: float
    low: float = math.nan
    high: float = math.nan


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What is known of a model beside its tensors; what is empty is left out of its card."""

    base_model: str = ""
    """What it was trained from: a hub id, or the name of a folder."""
    datasets: tuple[str, ...] = ()
    """Hub ids of the training data."""
    data: str = ""
    """The training data in a sentence."""
    dataset: str = ""
    """Name of the data that the results are of, and which part of it."""
    split: str = ""
    language: tuple[str, ...] = ()
    """ISO codes."""
    license: str = ""
    """The hub's name for a licence."""
    results: tuple[Result, ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Option → value, of the training run."""
    history: tuple[Mapping[str, Any], ...] = ()
    """Rows of the evaluations during training: step, loss, scores."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()


def read_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """The metadata at the head of a folder's README; empty where there is none that can be read."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf8", errors="replace") if file.is_file() else ""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def inherited(folder: pathlib.Path) -> CardFacts:
    """Licence and languages from the metadata of a folder's README; derived models inherit them."""
    metadata = read_metadata(folder)
    language, license = (metadata.get(name) or () for name in ("language", "license"))
    codes, licenses = ((found,) if isinstance(found, str) else tuple(map(str, found)) for found in (language, license))
    return CardFacts(language=codes, license=licenses[0] if len(licenses) == 1 else "")


def model_card(title: str, family: str, parameters: int, dtype: str, task: str | None, facts: CardFacts, version: str) -> str:
    """The text of a README for the hub. `task` is the hub's pipeline tag."""
    lines = ["---", yaml.safe_dump(_metadata(title, task, facts), sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {title}", "", f"A {family} model of {parameters:,} parameters in {dtype}, written by jaxlm {version}."]
    if facts.base_model:
        lines.append(f"It was trained from {facts.base_model}.")
    if facts.labels:
        lines += ["", f"Labels: {', '.join(facts.labels[:50])}{' …' if len(facts.labels) > 50 else ''}."]
    if facts.data:
        lines += ["", "## Training data", "", facts.data]
    if facts.results:
        of = f" ({facts.split})" if facts.split else ""
        rows = [(each.title, _number(each.value), _interval(each)) for each in facts.results]
        lines += ["", "## Scores", "", f"On {facts.dataset or 'held-out data'}{of}.", ""]
        lines += _table(("score", "value", "95% interval"), rows)
    if facts.settings:
        lines += ["", "## Training settings", "", *_table(("option", "value"), facts.settings.items())]
    if facts.history:
        names = [name for name in facts.history[0] if name not in ("kind", "time")]
        lines += ["", "## Training results", ""]
        lines += _table(names, [[_number(row.get(name)) for name in names] for row in facts.history])
    if facts.versions:
        lines += ["", "## Versions", "", *_table(("package", "version"), facts.versions.items())]
    return "\n".join(lines) + "\n"


def _metadata(title: str, task: str | None, facts: CardFacts) -> dict[str, Any]:
    metadata: dict[str, Any] = {"library_name": "transformers"}
    if facts.language:
        metadata["language"] = list(facts.language)
    if facts.license:
        metadata["license"] = facts.license
    if facts.base_model.count("/") == 1 and not facts.base_model.startswith("/"):
        metadata["base_model"] = facts.base_model
    if task:
        metadata["pipeline_tag"] = task
    metadata["tags"] = ["jaxlm"]
    if facts.datasets:
        metadata["datasets"] = list(facts.datasets)
    results = [each for each in facts.results if math.isfinite(each.value)]
    if results:
        metadata["metrics"] = list(dict.fromkeys(each.metric for each in results))
        metrics = [{"type": each.metric, "value": round(each.value, 6), "name": each.title} for each in results]
        dataset = {"name": facts.dataset or "held-out data", "type": (facts.datasets or (facts.dataset or "held-out data",))[0]}
        if facts.split:
            dataset["split"] = facts.split
        kind = {"type": task or "other", **({"name": task.replace("-", " ")} if task else {})}
        metadata["model-index"] = [{"name": title, "results": [{"task": kind, "dataset": dataset, "metrics": metrics}]}]
    return metadata


def _table(head: Sequence[str], rows: Any) -> list[str]:
    """A table in Markdown; a bar in a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines]


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "undefined"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _interval(result: Result) -> str:
    return "" if math.isnan(result.low) or math.isnan(result.high) else f"{result.low:.4f} to {result.high:.4f}"
