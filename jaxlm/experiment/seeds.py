"""The same run with several seeds, and how far its scores spread."""

import dataclasses
import pathlib

from jaxlm.experiment.config import ExperimentConfig
from jaxlm.experiment.run import Run
from jaxlm.metrics import lower_is_better, mean_interval
from jaxlm.report import read_rows, say, table


def train_seeds(config: ExperimentConfig) -> str:
    """Train each seed in its folder, those that are finished not again; returns how the last ended."""
    best: dict[int, dict[str, float]] = {}
    metric = ""
    for seed in range(config.seed, config.seed + config.seeds):
        own = dataclasses.replace(config, seed=seed, seeds=1, name=f"{config.name}-seed{seed}")
        run = Run(own)
        if not run.finished:
            say(f"seed {seed} ({seed - config.seed + 1} of {config.seeds})")
            ended = run.train()
            if ended == "interrupted":
                return ended
        metric = run.metric
        best[seed] = best_scores(run.folder, metric)
    rows = [{"seed": seed, **{name: f"{value:.4f}" for name, value in scores.items()}} for seed, scores in best.items()]
    table(rows, f"best checkpoint of each seed, by {metric}")
    for name in next(iter(best.values())):
        found = mean_interval([scores[name] for scores in best.values()])
        say(f"{name}: {found.value:.4f}, 95% interval {found.low:.4f} to {found.high:.4f} over {len(best)} seeds")
    return "finished"


def best_scores(folder: pathlib.Path, metric: str) -> dict[str, float]:
    """The scores of a run's best evaluation."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval" and row.get(metric) is not None]
    chosen = (min if lower_is_better(metric) else max)(rows, key=lambda row: row[metric])
    return {name: value for name, value in chosen.items() if isinstance(value, float)}
