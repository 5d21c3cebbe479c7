"""Regression, perplexity and rankings: the libraries' scores, brute force over ties, and figures by hand."""

import itertools
import tracemalloc
import warnings

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from jaxlm.metrics import (
    bootstrap,
    perplexity,
    preference,
    regression,
    retrieval,
    weighted_pair_retrieval,
    weighted_retrieval,
)


def test_regression_is_scipys_and_scikit_learns():
    rng = np.random.default_rng(0)
    actual = rng.integers(0, 6, 50) / 1.0  # with ties
    predicted = (actual + rng.normal(0, 1, 50)).round()
    assert regression(predicted, actual) == pytest.approx(
        {
            "mse": metrics.mean_squared_error(actual, predicted),
            "mae": metrics.mean_absolute_error(actual, predicted),
            "pearson": scipy.stats.pearsonr(actual, predicted).statistic,
            "spearman": scipy.stats.spearmanr(actual, predicted).statistic,
        }
    )


def test_a_constant_side_has_no_correlation_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for predicted, actual in (([1.0, 1], [1.0, 2]), ([1.0, 2], [3.0, 3]), ([1.0], [2.0])):
            found = regression(predicted, actual)
            assert np.isnan(found["pearson"]) and np.isnan(found["spearman"]) and found["mae"] > 0
        assert regression([1.0, 1 + 1e-15, 1], [1.0, 2, 1])["spearman"] == pytest.approx(1)
        low = bootstrap(regression, [0.0, 0, 0, 1], [1.0, 2, 3, 4], n=50)["pearson"].low
    assert np.isfinite(low), "resamples without the 1 are left out"


def test_perplexity_by_hand():
    nll = np.log(2) * 12  # twelve bits
    found = perplexity(nll, tokens=4, words=3, bytes=24)
    assert found == pytest.approx({"token_perplexity": 8, "word_perplexity": 16, "byte_perplexity": 2**0.5, "bits_per_byte": 0.5})
    assert perplexity([nll / 3, 2 * nll / 3], [1, 3], [1, 2], [4, 20]) == pytest.approx(found), "documents add up"
    assert perplexity(1e6, 1, 1, 1)["token_perplexity"] == np.inf
    assert np.isnan(perplexity(1.0, 1, 0, 1)["word_perplexity"])
    assert bootstrap(perplexity, [1.0, 2.0], [1, 2], [1, 2], [1, 2], n=10)["bits_per_byte"] == pytest.approx([1 / np.log(2)] * 3)


def test_retrieval_by_hand():
    scores = [[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]]
    relevant = [[0, 1, 0, 1], [1, 0, 0, 0]]
    found = retrieval(scores, relevant, recalls=(1, 2, 4))
    ndcg = ((1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3)) + 1 / np.log2(5)) / 2
    assert found == pytest.approx({"recall@1": 0, "recall@2": 0.25, "recall@4": 1, "mrr@10": (1 / 2 + 1 / 4) / 2, "ndcg@10": ndcg})


def test_ndcg_is_scikit_learns_where_nothing_ties():
    rng = np.random.default_rng(2)
    scores = rng.permuted(np.tile(np.arange(25.0), (12, 1)), axis=1)
    gains = rng.integers(0, 4, size=(12, 25))
    found = retrieval(scores, gains)
    assert found["ndcg@10"] == pytest.approx(metrics.ndcg_score(gains, scores, k=10))
    ranked = np.take_along_axis(gains, np.argsort(-scores, 1), 1) > 0
    assert found["recall@5"] == pytest.approx(np.mean(ranked[:, :5].sum(1) / ranked.sum(1)))


def test_ties_count_against_the_system_whatever_the_order():
    """Of all orders of tied documents, the worst one; moving documents changes nothing."""
    scores, gains = np.array([[0.5, 0.5, 0.5, 0.2]]), np.array([[2, 0, 1, 0]])
    found = retrieval(scores, gains, recalls=(1, 2))
    untied = [
        retrieval(scores + 1e-6 * np.array([[*order, 0]]), gains, recalls=(1, 2)) for order in itertools.permutations(range(3))
    ]
    for name in found:
        assert found[name] == pytest.approx(min(each[name] for each in untied)), name
    for order in itertools.permutations(range(4)):
        assert retrieval(scores[:, order], gains[:, order], recalls=(1, 2)) == found


def test_retrieval_of_more_than_ten_stops_at_ten():
    scores, gains = -np.arange(12.0)[None], np.eye(12)[10][None]
    assert retrieval(scores, gains) == {"recall@1": 0, "recall@5": 0, "recall@10": 0, "mrr@10": 0, "ndcg@10": 0}


def test_resampled_queries():
    rng = np.random.default_rng(3)
    scores, gains = rng.random((20, 9)), rng.integers(0, 2, (20, 9))
    gains[:, 0] = 1
    quick, slow = bootstrap(weighted_retrieval(), scores, gains, n=20), bootstrap(retrieval, scores, gains, n=20)
    for name in slow:
        assert quick[name] == pytest.approx(slow[name]), name


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 20])
def test_retrieval_by_blocks_is_retrieval(block_bytes):
    """Coarse vectors, which give many ties, in blocks of one query, of a few and of all."""
    rng = np.random.default_rng(0)
    queries, documents, own = (
        rng.integers(-2, 3, (60, 3)),
        rng.integers(-2, 3, (25, 3)),
        rng.permutation([*range(25), *range(25), *range(10)]),
    )
    blocks = weighted_pair_retrieval(block_bytes=block_bytes)
    whole = weighted_retrieval(), queries @ documents.T, own[:, None] == np.arange(25)
    documents_of = documents[own]
    assert blocks(queries, documents_of, own) == pytest.approx(retrieval(*whole[1:]))
    quick, slow = bootstrap(blocks, queries, documents_of, own, n=20), bootstrap(*whole, n=20)
    assert {name: pytest.approx(tuple(value)) for name, value in slow.items()} == {k: tuple(v) for k, v in quick.items()}


def test_retrieval_by_blocks_takes_no_table_of_all_scores():
    rng = np.random.default_rng(0)
    n = 4000
    vectors = rng.standard_normal((n, 32))
    tracemalloc.start()
    found = weighted_pair_retrieval(block_bytes=1 << 20)(vectors, vectors, np.arange(n))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n * n / 2, "half a byte for each pair at most, where a table takes eight"
    assert found["recall@10"] > 0.9


def test_preference():
    assert preference([1.0, 2, 3, 0], [0.0, 2, 4, 0]) == {"accuracy": 0.5, "margin": 0}
    assert preference([3.0], [1.0]) == {"accuracy": 1, "margin": 2}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: regression([], []), "no predictions to score"),
        (lambda: regression([1.0], [1.0, 2.0]), "predictions and references differ in number: 1 and 2"),
        (lambda: regression([np.inf], [1.0]), "predictions are not all finite numbers: 1 are infinite or nan"),
        (lambda: perplexity([], [], [], []), "no predictions to score"),
        (lambda: perplexity(0.0, 0, 0, 0), "no predictions to score"),
        (lambda: retrieval(np.ones((0, 2)), np.ones((0, 2))), "no predictions to score"),
        (lambda: retrieval([[1.0, 2]], [[0, 0]]), "query 0 has no relevant document"),
        (lambda: retrieval([[1.0, 2]], [[1, -1]]), "relevant holds -1: expected 0, or a gain above 0"),
        (lambda: preference([], []), "no predictions to score"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
