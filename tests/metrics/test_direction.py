"""Every score says whether lower or higher is better, and the run's best checkpoint goes by that."""

import numpy as np
import pytest

from jaxlm import metrics
from jaxlm.metrics import lower_is_better
from jaxlm.train import BestScore
from jaxlm.train.loop import better

ANSWERS, TAGS = ["a b", ""], [["B-X", "O"], ["O", "B-Y"]]


def scores() -> dict[str, dict[str, float]]:
    """Every metric on a few predictions."""
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(2), 6)
    return {
        "classification": metrics.classification([0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 1], chances),
        "multilabel": metrics.multilabel(rng.random((6, 3)), rng.random((6, 3)) > 0.5),
        "calibration": metrics.calibration(chances, [0, 1, 0, 0, 1, 1]),
        "regression": metrics.regression([1.0, 2.0, 4.0], [1.0, 3.0, 3.0]),
        "perplexity": metrics.perplexity(10.0, 5, 3, 20),
        "retrieval": metrics.retrieval(rng.random((3, 12)), np.eye(3, 12)),
        "preference": metrics.preference([1.0, 2.0], [0.0, 3.0]),
        "spans": metrics.spans(TAGS, TAGS[::-1]),
        "squad": metrics.squad(ANSWERS, [["a"], []]),
        "squad with doubt": metrics.squad(ANSWERS, [["a"], []], [0.1, 0.9]),
        "translation": metrics.translation(["a b c d e"], ["a b c d f"]).values,
        "summarisation": metrics.summarisation(["a b c"], ["a b d"]).values,
    }


LOWER = {
    "ece", "mce", "brier", "nll", "mse", "mae", "ter", "token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte",
}  # fmt: skip


def test_every_score_has_a_direction():
    """A name that nothing declares raises; a threshold is no score, so it has none."""
    names = {name for found in scores().values() for name in found if not name.endswith("_threshold")}
    assert len(names) > 40
    assert {name for name in names if lower_is_better(name)} == LOWER


def test_an_undeclared_score_is_an_error():
    with pytest.raises(ValueError, match=r"'acuracy'.*accuracy"):
        better("acuracy", 1.0, 0.0)


@pytest.mark.parametrize("name, best", [("mce", 0.1), ("ece", 0.1), ("accuracy", 0.9)])
def test_the_better_of_two_scores(name, best):
    other = 1 - best
    assert better(name, best, other) and not better(name, other, best)


def test_evaluations_since_the_best():
    """The first of equally good ones is the best; a score that is not there, nan, or null in the file never is."""
    rows = [{"kind": kind, "loss": loss} for kind, loss in [("eval", 3.0), ("train", 0.0), ("eval", 2.0), ("eval", 2.0)]]
    found = BestScore("loss", rows)
    assert found.evals_since_best == 1
    after = []
    for loss in (float("nan"), None, 2.5, 1.0, 1.5):
        found.add({"loss": loss})
        after.append(found.evals_since_best)
    assert after == [2, 3, 4, 0, 1]
    assert BestScore("accuracy", rows).evals_since_best == 3, "none has this score"
