"""Resampling: the published methods on the same draws, coverage, and figures from the literature."""

import numpy as np
import pytest
import scipy.stats

from jaxlm.metrics import approximate_randomisation, averaged, bootstrap, mcnemar, mean_interval, paired

mean = averaged(lambda values_B: {"mean": values_B})


def ratio(x, y):
    return float(np.sum(x) / np.sum(y))


@pytest.mark.parametrize("statistic", [np.mean, np.median, np.std])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_bootstrap_is_scipys(statistic, level):
    values = np.random.default_rng(1).gamma(2.0, size=57)
    theirs = scipy.stats.bootstrap(
        (values,), statistic, n_resamples=300, confidence_level=level, method="percentile", rng=np.random.default_rng(7)
    )
    ours = bootstrap(statistic, values, n=300, level=level, seed=7)
    assert ours.value == pytest.approx(statistic(values), abs=1e-12)
    np.testing.assert_allclose(ours[1:], theirs.confidence_interval, rtol=1e-12)


def test_several_arrays_are_resampled_together():
    x = np.random.default_rng(0).normal(5, 1, 40)
    assert bootstrap(ratio, 3 * x, x, n=50) == pytest.approx((3, 3, 3))
    lists = bootstrap(
        lambda texts, numbers: float(np.mean([len(t) == n for t, n in zip(texts, numbers, strict=True)])), ["a", "bb"], [1, 2]
    )
    assert lists == (1, 1, 1)


def test_resamples_come_in_blocks_without_a_seam():
    """Several blocks of weights give what one would: the stream of draws goes on."""
    values = np.random.default_rng(2).normal(size=9000)  # about 111 resamples a block
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=250, method="percentile", rng=np.random.default_rng(0))
    found = bootstrap(mean, values, n=250)["mean"]
    np.testing.assert_allclose(found[1:], theirs.confidence_interval, rtol=1e-9)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, truth, covered, trials = np.random.default_rng(3), 1.0, 0, 300
    for trial in range(trials):
        _, low, high = bootstrap(mean, rng.exponential(truth, size=80), n=300, level=0.9, seed=trial)["mean"]
        covered += low <= truth <= high
    # 0.9 with a standard error of 0.017; the percentile bootstrap of a skewed mean covers a little less.
    assert 0.83 < covered / trials < 0.94


def test_undefined_scores():
    def fragile(x):
        return float("nan") if x.max() < 9 else float(np.mean(x))

    value, low, high = bootstrap(fragile, np.array([1.0, 2, 3, 9]), n=200)
    assert value == 3.75 and low > 2 and high <= 9, "resamples without the 9 are left out"
    assert np.isnan(bootstrap(fragile, np.array([1.0, 2]), n=20)).all()
    assert np.isnan(paired(fragile, np.array([1.0, 2]), np.array([1.0, 2]), n=20)).all()
    assert np.isnan(approximate_randomisation(fragile, np.array([1.0, 2]), np.array([1.0, 2]), n=20))


def test_infinite_scores_have_infinite_bounds():
    value, low, high = bootstrap(lambda x: float(np.sum(x)), np.array([1.0, np.inf]), n=100)
    assert value == high == np.inf and low == 2


def test_the_paired_bootstrap_sees_what_two_intervals_hide():
    rng = np.random.default_rng(4)
    references = rng.normal(size=300)
    error = rng.normal(size=300)
    a, b = references + error, references + 1.1 * error
    loss = averaged(lambda predicted, actual: {"loss": (predicted - actual) ** 2})
    found = paired(loss, a, b, references)["loss"]
    assert found.difference == pytest.approx(np.mean(error**2) * (1 - 1.21)) and found.high < 0
    assert found.p == 2 / 1001, "no resample of 1000 lies on the other side"
    alone_a, alone_b = (bootstrap(loss, x, references)["loss"] for x in (a, b))
    assert alone_a.high > alone_b.low, "the two intervals overlap"
    back = paired(loss, b, a, references)["loss"]
    assert back.difference == -found.difference and (back.low, back.high) == pytest.approx((-found.high, -found.low))
    again = paired(lambda p, r: float(np.mean((p - r) ** 2)), a, b, references)
    assert again == pytest.approx(found), "a plain function sees the same resamples"


@pytest.mark.parametrize("test", [lambda *args: paired(*args).p, approximate_randomisation])
def test_no_difference_is_no_evidence(test):
    x, y = np.random.default_rng(5).normal(size=(2, 60))
    assert test(ratio, x, x, np.abs(y) + 1) == 1
    p_values = [test(lambda a: float(a.mean()), *np.random.default_rng(i).normal(size=(2, 30))) for i in range(8)]
    assert min(p_values) > 0.01 and max(p_values) > 0.3


def test_randomisation_agrees_with_the_exact_test_of_all_exchanges():
    rng = np.random.default_rng(6)
    a, b = rng.normal(0.5, 1, 10), rng.normal(0, 1, 10)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    exact = np.mean(np.abs(signs.T @ (a - b)) >= abs(np.sum(a - b)) - 1e-9)
    assert approximate_randomisation(mean, a, b, n=20_000)["mean"] == pytest.approx(exact, abs=0.01)
    assert approximate_randomisation(lambda x: float(np.mean(x)), a, b, n=2_000) == pytest.approx(exact, abs=0.03)


def test_mcnemar_is_the_exact_binomial_test():
    right = lambda *cells: np.repeat(cells, [30, 9, 2, 5])  # noqa: E731  both right, only a, only b, none
    p = mcnemar(right(True, True, False, False), right(True, False, True, False))
    assert p == pytest.approx(2 * sum(scipy.stats.binom.pmf(k, 11, 0.5) for k in (0, 1, 2)))
    assert mcnemar([True, False], [True, False]) == 1
    assert mcnemar([True, False], [False, True]) == 1


def test_mean_over_seeds():
    found = mean_interval([0.80, 0.82, 0.87])
    theirs = scipy.stats.ttest_1samp([0.80, 0.82, 0.87], 0).confidence_interval(0.95)
    assert found == pytest.approx((0.83, *theirs))
    alone = mean_interval([0.5])
    assert alone.value == 0.5 and np.isnan(alone.low) and np.isnan(alone.high)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(np.mean, np.array([])), "no predictions to score"),
        (lambda: bootstrap(ratio, [1.0], [1.0, 2.0]), "predictions and references differ in number: 1 and 2"),
        (lambda: bootstrap(np.mean, np.ones(3), n=0), "n = 0: expected at least one resample"),
        (lambda: bootstrap(np.mean, np.ones(3), level=95), "level = 95: expected a number between 0 and 1, such as 0.95"),
        (lambda: mcnemar([], []), "no predictions to score"),
        (lambda: mean_interval([]), "no predictions to score"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
