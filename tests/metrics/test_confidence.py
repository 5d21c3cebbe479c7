"""Calibration: by hand, by brute force, against torch, and on a model known to be overconfident by a factor."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn import metrics

from jaxlm.metrics import bootstrap, calibration, fit_temperature, reliability, scaled, softmax, weighted_calibration


def logits_and_labels(seed, temperature=1.0, B=4000, C=5):
    """Labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, size=(B, C))
    chances = softmax(logits, temperature).cumsum(1)
    return logits, np.minimum((rng.random((B, 1)) > chances).sum(1), C - 1)


def brute_force(table, labels, bins):
    gaps, total = [], 0.0
    for m in range(bins):
        inside = [i for i, row in enumerate(table) if m / bins < max(row) <= (m + 1) / bins]
        if inside:
            gap = abs(np.mean([np.argmax(table[i]) == labels[i] for i in inside]) - np.mean([max(table[i]) for i in inside]))
            gaps.append(gap)
            total += len(inside) / len(table) * gap
    return {"ece": total, "mce": max(gaps)}


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_the_papers(bins):
    logits, labels = logits_and_labels(0, B=300)
    table = softmax(logits, 0.7)
    table[:3] = [0.2] * 5  # on an edge of the bins
    found = calibration(table, labels, bins)
    expected = brute_force(table, labels, bins) | {"nll": metrics.log_loss(labels, table, labels=range(5))}
    expected["brier"] = np.sum((table - np.eye(5)[labels]) ** 2) / len(table)
    assert found == pytest.approx(expected)


def test_by_hand():
    found = calibration([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7]], [0, 1, 1], bins=10)
    assert found == pytest.approx(
        {"ece": (2 * 0.4 + 0.3) / 3, "mce": 0.4, "brier": (0.02 + 1.62 + 0.18) / 3, "nll": -np.log(0.9 * 0.1 * 0.7) / 3}
    )
    assert calibration([[1.0, 0.0]], [0]) == {"ece": 0, "mce": 0, "brier": 0, "nll": 0}
    assert calibration([[1.0, 0.0], [0.5, 0.5]], [1, 1])["nll"] == np.inf


def test_two_classes_have_twice_the_brier_score_of_one():
    logits, labels = logits_and_labels(1, B=100, C=2)
    table = softmax(logits)
    assert calibration(table, labels)["brier"] == pytest.approx(2 * metrics.brier_score_loss(labels, table[:, 1]))


def test_the_table_adds_up_to_the_error():
    logits, labels = logits_and_labels(2, B=500)
    table = softmax(logits, 0.5)
    rows = reliability(table, labels)
    assert len(rows) == 15 and sum(row.examples for row in rows) == 500
    assert np.isnan(rows[0].accuracy) and rows[0].examples == 0, "five classes are never that unsure"
    ece = sum(row.examples / 500 * abs(row.accuracy - row.confidence) for row in rows if row.examples)
    assert ece == pytest.approx(calibration(table, labels)["ece"]) and ece > 0.05
    assert all(row.low < row.confidence <= row.high for row in rows if row.examples)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    logits, labels = logits_and_labels(3, temperature)
    found = fit_temperature(logits, labels)
    loss = lambda t: calibration(softmax(logits, t), labels)["nll"]  # noqa: E731
    best = minimize_scalar(lambda log_t: loss(np.exp(log_t)), bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(np.exp(best.x), rel=1e-5)
    assert found == pytest.approx(temperature, rel=0.1)
    assert calibration(softmax(logits, found), labels)["ece"] < 0.03
    assert fit_temperature(logits + 100 * labels[:, None], labels) == pytest.approx(found), "what all classes share is nothing"


def test_a_set_without_a_best_temperature():
    assert fit_temperature([[5.0, 0.0], [0.0, 900.0]], [0, 1]) == 0.01, "all right: the surer the better"
    assert fit_temperature([[5.0, 0.0], [0.0, 900.0]], [1, 0]) == 100.0, "all wrong: the less sure the better"


def test_each_half_is_scaled_by_the_others_temperature():
    logits, labels = logits_and_labels(5, 3.0)
    sure = softmax(logits)
    found, ece, helps = scaled(sure, labels)
    assert helps
    assert found == pytest.approx(fit_temperature(logits, labels), rel=1e-6)
    even, odd = np.arange(len(labels)) % 2 == 0, np.arange(len(labels)) % 2 == 1
    by_hand = softmax(logits, 1.0)
    by_hand[even] = softmax(logits[even], fit_temperature(logits[odd], labels[odd]))
    by_hand[odd] = softmax(logits[odd], fit_temperature(logits[even], labels[even]))
    assert ece == pytest.approx(calibration(by_hand, labels)["ece"], rel=1e-6)
    assert ece < calibration(sure, labels)["ece"] / 3
    assert scaled([[1.0, 0.0], [0.5, 0.5]], [1, 0])[0] == 100.0, "a class of probability 0 was right"
    assert scaled([[0.75, 0.25]], [0]) == (0.01, 0.0, False), "one row is its own other half, and proves nothing"


@pytest.mark.parametrize("seed", range(6))
def test_a_temperature_helps_only_where_the_other_half_gets_better(seed):
    """Of few rows of a calibrated model a fit to one half tells little about the other; where that one gets worse, by ece or
    nll, it is not said to help."""
    rng = np.random.default_rng(seed)
    table = softmax(rng.normal(size=(30, 2)))
    labels = (rng.random(30) < table[:, 1]).astype(int)
    halves = np.arange(30) % 2 == 0, np.arange(30) % 2 == 1
    logits, by_hand = np.log(table), table.copy()
    for half, other in (halves, halves[::-1]):
        by_hand[half] = softmax(logits[half], fit_temperature(logits[other], labels[other]))
    before, after = calibration(table, labels), calibration(by_hand, labels)
    assert scaled(table, labels).helps == (after["ece"] < before["ece"] and after["nll"] <= before["nll"])
    if seed == 0:
        assert not all(_helps_by_seed()), "some of such halves get worse"


def _helps_by_seed():
    for seed in range(6):
        rng = np.random.default_rng(seed)
        table = softmax(rng.normal(size=(30, 2)))
        yield scaled(table, (rng.random(30) < table[:, 1]).astype(int)).helps


@pytest.mark.parity
def test_the_temperature_is_what_torch_finds():
    import torch

    logits, labels = logits_and_labels(4, 2.0, B=500)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(torch.tensor(logits) / log_t.exp(), torch.tensor(labels))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert fit_temperature(logits, labels) == pytest.approx(log_t.exp().item(), rel=1e-6)


def test_resampled_scores_are_those_of_each_resample():
    logits, labels = logits_and_labels(5, B=80)
    table = softmax(logits)
    quick, slow = bootstrap(weighted_calibration(), table, labels, n=20), bootstrap(calibration, table, labels, n=20)
    assert quick.keys() == slow.keys()
    for name in slow:
        assert quick[name] == pytest.approx(slow[name]), name
    table[0] = 1 - np.eye(5)[labels[0]]
    table[0] /= 4
    value, low, high = bootstrap(weighted_calibration(), table, labels, n=100)["nll"]
    assert value == high == np.inf and np.isfinite(low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: calibration(np.ones((0, 2)), []), "no predictions to score"),
        (lambda: fit_temperature(np.ones((0, 2)), []), "no predictions to score"),
        (lambda: calibration([[0.5, 0.5]], [2]), "labels from 2 to 2: expected 0 to 1"),
        (lambda: calibration([[0.5, 0.5], [3, -1]], [0, 0]), "probabilities of example 1 are no distribution: from -1, sum 2"),
        (lambda: reliability([[0.5, 0.5]], [0], bins=0), "bins = 0: expected at least one"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
