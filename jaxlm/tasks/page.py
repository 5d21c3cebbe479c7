"""What predictions look like to a person: a file of them, and a page with scores, confusion and the worst errors."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxlm.metrics import Paired, approximate_randomisation, bootstrap, mcnemar, paired, reliability, scaled
from jaxlm.report import write_scores
from jaxlm.tasks.task import Prediction, Row, Task, label_ids
from jaxlm.text_files import write_json_lines

WORST = 30


def write_predictions(
    folder: pathlib.Path, title: str, task: Task, rows: Sequence[Row], predictions: Sequence[Prediction]
) -> dict[str, str]:
    """Write `predictions.jsonl`, `scores.json` and `scores.html` into a folder; returns the scores as a person reads them."""
    found = bootstrap(task.statistic(), predictions, rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_lines(folder / "predictions.jsonl", ({**row, "prediction": p} for row, p in zip(rows, predictions, strict=True)))
    signatures = task.signatures(rows)
    numbers = {
        name: {**x._asdict(), **({"signature": signatures[name]} if name in signatures else {})} for name, x in found.items()
    }
    (folder / "scores.json").write_text(json.dumps(numbers, indent=2), encoding="utf8")
    wrong = [(task.wrong(row, p), row) for row, p in zip(rows, predictions, strict=True)]
    worst = sorted(((how, row) for how, row in wrong if how is not None), key=lambda pair: -pair[0][0])[:WORST]
    errors = [
        {"text": text_of(task, row), "expected": expected, "predicted": predicted, "confidence": f"{score:.3f}"}
        for (score, expected, predicted), row in worst
    ]
    confident = _confident(task, rows, predictions)
    temperature = {} if confident is None else _temperature(*confident, found["ece"].value)
    notes = task.notes(rows)
    per_class = [
        (name, *(f"{x:.4f}" for x in each[:3]), f"{each.support:,}") for name, each in task.report(rows, predictions).items()
    ]
    write_scores(
        folder, title,
        {
            "rows": f"{len(rows):,}", "task": task.config.kind, **notes,
            **{f"{k} signature": v for k, v in signatures.items()}, **temperature,
        },
        {task.title(name): (x.value, x.low, x.high) for name, x in found.items()},
        task.confusion(rows, predictions), errors, None if confident is None else reliability(*confident), per_class=per_class,
    )  # fmt: skip
    return {task.title(name): f"{x.value:.4f} ({x.low:.4f} to {x.high:.4f})" for name, x in found.items()} | notes | temperature


def text_of(task: Task, row: Row) -> str:
    """What a row gives the model, in a line."""
    return " | ".join(str(row[role]) for role in task.given if role in row)


def paired_scores(
    task: Task, rows: Sequence[Row], predictions: Sequence[Prediction], others: Sequence[Prediction]
) -> dict[str, Paired]:
    """Name → how much better the predictions are than the others, with interval and p value (paired bootstrap)."""
    return paired(task.statistic(), predictions, others, rows)


def paired_tests(
    task: Task, rows: Sequence[Row], predictions: Sequence[Prediction], others: Sequence[Prediction]
) -> dict[str, float]:
    """Name → p value of the further tests that are the custom for such a task: McNemar's of two classifiers, approximate
    randomisation of two systems that write."""
    kind = task.config.kind
    if kind == "classification":
        right = [[p["label"] == str(row["label"]) for p, row in zip(each, rows, strict=True)] for each in (predictions, others)]
        return {"McNemar's exact test (accuracy)": mcnemar(*right)}
    if kind != "text_to_text":
        return {}
    found: dict[str, float] = approximate_randomisation(task.statistic(), predictions, others, rows)
    return {f"approximate randomisation ({name})": p for name, p in found.items()}


def _confident(task: Task, rows: Sequence[Row], predictions: Sequence[Prediction]) -> tuple[Any, Any] | None:
    """Probabilities and the right classes, of a classifier."""
    if task.config.kind != "classification":
        return None
    probabilities = [[p["probabilities"][name] for name in task.labels] for p in predictions]
    return probabilities, label_ids([str(row["label"]) for row in rows], task.labels, None)


def _temperature(probabilities: Any, labels: Any, ece: float) -> dict[str, str]:
    fitted = scaled(probabilities, labels)
    if not fitted.helps:
        return {"temperature": f"none helps: each half scaled by the other's temperature, ece {ece:.4f} becomes {fitted.ece:.4f}"}
    return {
        "temperature": f"{fitted.temperature:.3g} calibrates these rows: ece {ece:.4f} becomes {fitted.ece:.4f}, each half "
        "scaled by the other's"
    }
