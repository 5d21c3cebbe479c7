"""What every metric keeps: order means nothing, weights are repetition, and names are the same for resampling."""

import random

import numpy as np
import pytest

from jaxlm import metrics

rng = np.random.default_rng(0)
B = 24
ids, guesses = rng.integers(4, size=(2, B))
likely = metrics.softmax(rng.integers(0, 3, size=(B, 4)).astype(float))
# Some runs of four words match: without any, BLEU's smoothing depends on the size of the corpus.
texts = [" ".join(random.Random(i).choices(["a", "cat", "sat", "über", "."], k=i % 9)) for i in range(B)]
others = [" ".join([*text.split()[: random.Random(i).randint(3, 9)], "dog"]) for i, text in enumerate(texts)]
tags, more_tags = ([random.Random(i * by).choices(["O", "B-A", "I-A", "B-B"], k=1 + i % 5) for i in range(B)] for by in (1, 7))

# name: what scores, its form for resampling (None: itself), the arrays
METRICS = {
    "classification": (
        lambda *arrays: metrics.classification(*arrays, labels=range(4)),
        metrics.weighted_classification(range(4)),
        (guesses, ids, likely),
    ),
    "multilabel": (metrics.multilabel, metrics.weighted_multilabel(), (likely, likely[::-1] > 0.3)),
    "regression": (metrics.regression, None, (guesses, ids)),
    "spans": (metrics.spans, metrics.weighted_spans(), (tags, more_tags)),
    "squad": (metrics.squad, metrics.weighted_squad(), (texts, [[text][: i % 4] for i, text in enumerate(others)], ids / 4)),
    "translation": (lambda *arrays: metrics.translation(*arrays).values, metrics.weighted_translation(), (texts, others)),
    "summarisation": (lambda *arrays: metrics.summarisation(*arrays).values, metrics.weighted_summarisation(), (texts, others)),
    "perplexity": (metrics.perplexity, None, (rng.random(B), ids + 1, ids + 1, 3 * ids + 2)),
    "calibration": (metrics.calibration, metrics.weighted_calibration(), (likely, ids)),
    "retrieval": (metrics.retrieval, metrics.weighted_retrieval(), (likely, likely[::-1] > 0.2)),
    "preference": (metrics.preference, None, (guesses, ids)),
}


def take(arrays, order):
    return [array[order] if isinstance(array, np.ndarray) else [array[i] for i in order] for array in arrays]


@pytest.fixture(params=METRICS)
def case(request):
    metric, weighted, arrays = METRICS[request.param]
    return metric, weighted or metric, arrays


def test_scores_are_plain_numbers_with_some_life(case):
    metric, weighted, arrays = case
    found = metric(*arrays)
    assert all(type(value) is float for value in found.values()) and len(set(found.values())) > 1
    assert weighted(*arrays) == pytest.approx(found, abs=1e-12)
    assert list(weighted(*arrays)) == list(found)


def test_order_means_nothing(case):
    metric, _, arrays = case
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(B)
        assert metric(*take(arrays, order)) == pytest.approx(metric(*arrays), abs=1e-12)


def test_examples_twice_are_weights_of_two(case):
    """Every score is of proportions: a set and the same set twice over score the same."""
    metric, _, arrays = case
    assert metric(*take(arrays, np.tile(np.arange(B), 2))) == pytest.approx(metric(*arrays), abs=1e-12)


def test_an_interval_for_every_name(case):
    metric, weighted, arrays = case
    found = metrics.bootstrap(weighted, *arrays, n=30)
    assert list(found) == list(metric(*arrays))
    for name, (value, low, high) in found.items():
        assert type(value) is type(low) is type(high) is float and low <= high, name
    assert found == metrics.bootstrap(weighted, *arrays, n=30) != metrics.bootstrap(weighted, *arrays, n=30, seed=1)


def test_nothing_to_score(case):
    metric, weighted, arrays = case
    for call in (lambda: metric(*take(arrays, [])), lambda: metrics.bootstrap(weighted, *take(arrays, []))):
        with pytest.raises(ValueError, match=r"^no predictions to score$"):
            call()
