"""How sure a score is: bootstrap intervals, paired comparisons, intervals over seeds.

A statistic is a function of arrays whose first axis runs over examples; it gives a number, or a dict of numbers. Drawing
examples again is the same as giving each a whole weight, so everything here speaks of weights:
`Weighted` statistics score many weightings of the same examples at once; any other function is called on each resample.
Both see the same resamples for the same seed.
N resamples · B examples.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

Scores = dict[str, np.ndarray]
"""Name → the score of each weighting (N,)."""
T = TypeVar("T")


class Interval(NamedTuple):
    """A number and the bounds of its confidence interval."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """Score of A minus score of B, the bounds of its confidence interval, and the two-sided p value of no difference."""

    difference: float
    low: float
    high: float
    p: float


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A statistic that scores many weightings of its examples at once.

    `prepare(*arrays)` looks at the examples once and gives a function: weights_NB (whole numbers as floats, which multiply
    much faster) → name → scores (N,).
    Called on the arrays themselves, the statistic gives the scores with every example once.
    """

    prepare: Callable[..., Callable[[np.ndarray], Scores]]

    def __call__(self, *arrays: Any) -> dict[str, float]:
        once_1B = np.ones((1, check_sizes(*arrays)))
        return {name: float(score_1[0]) for name, score_1 in self.prepare(*arrays)(once_1B).items()}


def averaged(values: Callable[..., Mapping[str, np.ndarray]]) -> Weighted:
    """The statistic that is the mean over examples of each of `values(*arrays)`: name → (B,)."""

    def prepare(*arrays: Any) -> Callable[[np.ndarray], Scores]:
        named = {name: np.asarray(value_B, float) for name, value_B in values(*arrays).items()}
        return lambda weights_NB: {k: weights_NB @ value_B / weights_NB.sum(1) for k, value_B in named.items()}

    return Weighted(prepare)


def check_sizes(*arrays: Any) -> int:
    """The number of examples, the same in every array; ValueError where there are none or the numbers differ."""
    sizes = [len(array) for array in arrays if array is not None]
    if len(set(sizes)) > 1:
        raise ValueError(f"predictions and references differ in number: {' and '.join(str(size) for size in sizes)}")
    if not sizes or not sizes[0]:
        raise ValueError("no predictions to score")
    return sizes[0]


def check_numbers(what: str, values: Any, shape: tuple[int | None, ...] = (None,)) -> np.ndarray:
    """`values` as float64 of this shape (None: any size); ValueError for another shape, infinities and nan."""
    array = np.asarray(values, float)
    if array.ndim != len(shape) or any(size not in (None, given) for size, given in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} have the shape {array.shape}: expected ({wanted})")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} are not all finite numbers: {int((~np.isfinite(array)).sum())} are infinite or nan")
    return array


# --- resampling ------------------------------------------------------------------------------


@overload
def bootstrap(statistic: Callable[..., float], *arrays: Any, n: int = ..., level: float = ..., seed: int = ...) -> Interval: ...
@overload
def bootstrap(
    statistic: Callable[..., Mapping[str, float]], *arrays: Any, n: int = ..., level: float = ..., seed: int = ...
) -> dict[str, Interval]: ...
def bootstrap(statistic: Any, *arrays: Any, n: int = 1000, level: float = 0.95, seed: int = 0) -> Any:
    """The statistic with its percentile bootstrap interval over examples (Efron & Tibshirani 1993, section 13.3).

    Bounds are quantiles of the statistic on `n` resamples; resamples on which it is undefined (nan) are left out. A
    statistic that is undefined on the examples themselves has the interval nan. Arrays may be lists; None is passed on.
    Resamples repeat examples, so a statistic that feeds on repetition (calibration error, AUPRC near chance) may lie below
    its own interval.
    """
    _check(n, level)
    size = check_sizes(*arrays)
    scores = _scorer(statistic, arrays)
    values, samples = scores(np.ones((1, size), int)), _over(scores, _resamples(size, n, seed))
    return _same_form({name: Interval(float(v[0]), *_bounds(samples[name], v[0], level)) for name, v in values.items()})


@overload
def paired(
    statistic: Callable[..., float], a: Any, b: Any, *references: Any, n: int = ..., level: float = ..., seed: int = ...
) -> Paired: ...
@overload
def paired(
    statistic: Callable[..., Mapping[str, float]],
    a: Any,
    b: Any,
    *references: Any,
    n: int = ...,
    level: float = ...,
    seed: int = ...,
) -> dict[str, Paired]: ...
def paired(statistic: Any, a: Any, b: Any, *references: Any, n: int = 1000, level: float = 0.95, seed: int = 0) -> Any:
    """Score of predictions `a` minus score of predictions `b` on the same references: paired bootstrap (Koehn 2004).

    `statistic(predictions, *references)`. Both are scored on the same resamples, so what makes an example easy for both
    cancels. p is two-sided: twice the smaller share of resamples on either side of no difference, each count with one
    added, so it is never below 2 / (n + 1); Koehn's statement "better with 95%" is one-sided.
    """
    _check(n, level)
    size = check_sizes(a, b, *references)
    of_a, of_b = _scorer(statistic, (a, *references)), _scorer(statistic, (b, *references))

    def differences(weights_NB: np.ndarray) -> dict[str, np.ndarray]:
        scores_a, scores_b = of_a(weights_NB), of_b(weights_NB)
        return {name: scores_a[name] - scores_b[name] for name in scores_a}

    values, samples = differences(np.ones((1, size), int)), _over(differences, _resamples(size, n, seed))
    return _same_form({name: _paired(float(value[0]), samples[name], level) for name, value in values.items()})


def _paired(value: float, sample_N: np.ndarray, level: float) -> Paired:
    defined = sample_N[~np.isnan(sample_N)]
    if np.isnan(value) or not len(defined):
        return Paired(value, np.nan, np.nan, np.nan)
    fewer = min(np.sum(defined <= 0), np.sum(defined >= 0))
    return Paired(value, *_bounds(sample_N, value, level), min(1.0, 2 * float(fewer + 1) / (len(defined) + 1)))


@overload
def approximate_randomisation(
    statistic: Callable[..., float], a: Any, b: Any, *references: Any, n: int = ..., seed: int = ...
) -> float: ...
@overload
def approximate_randomisation(
    statistic: Callable[..., Mapping[str, float]], a: Any, b: Any, *references: Any, n: int = ..., seed: int = ...
) -> dict[str, float]: ...
def approximate_randomisation(statistic: Any, a: Any, b: Any, *references: Any, n: int = 10_000, seed: int = 0) -> Any:
    """The two-sided p value of approximate randomisation (Noreen 1989, section 2.2).

    If `a` and `b` came from the same system, exchanging their predictions on any of the examples would change nothing:
    p = (1 + the number of `n` random exchanges with a difference at least as large as the one seen) / (1 + n).
    """
    _check(n)
    size = check_sizes(a, b, *references)
    scores = _scorer(statistic, [_joined(array, again) for array, again in zip((a, *references), (b, *references), strict=True)])

    def differences(keep_NB: np.ndarray) -> dict[str, np.ndarray]:
        one, other = scores(np.hstack([keep_NB, 1 - keep_NB])), scores(np.hstack([1 - keep_NB, keep_NB]))
        return {name: np.abs(one[name] - other[name]) for name in one}

    rng = np.random.default_rng(seed)
    exchanges = (rng.integers(2, size=(block, size), dtype=bool).astype(int) for block in _blocks(size, n))
    seen, samples = differences(np.ones((1, size), int)), _over(differences, exchanges)
    shares = {}
    for name, value in seen.items():
        defined = samples[name][~np.isnan(samples[name])]
        # Equal differences may differ by rounding: sums are taken in another order.
        as_large = np.sum(defined >= value[0] - 1e-12 * max(1.0, value[0]))
        shares[name] = float(as_large + 1) / (len(defined) + 1) if not np.isnan(value[0]) else np.nan
    return _same_form(shares)


def _scorer(statistic: Any, arrays: Sequence[Any]) -> Callable[[np.ndarray], Scores]:
    """The statistic of these arrays as a function weights_NB → name → (N,); a bare number goes under the name ""."""
    if isinstance(statistic, Weighted):
        prepared = statistic.prepare(*arrays)
        return lambda weights_NB: prepared(weights_NB.astype(float))

    def each(weights_NB: np.ndarray) -> Scores:
        results = []
        for weights_B in weights_NB:
            drawn = np.repeat(np.arange(len(weights_B)), weights_B)
            result = statistic(*(_pick(array, drawn) for array in arrays))
            results.append(result if isinstance(result, Mapping) else {"": result})
        return {name: np.array([result[name] for result in results], float) for name in results[0]}

    return each


def _pick(array: Any, drawn: np.ndarray) -> Any:
    if array is None or isinstance(array, np.ndarray):
        return array if array is None else array[drawn]
    return [array[i] for i in drawn]


def _joined(one: Any, other: Any) -> Any:
    if one is None:
        return None
    return np.concatenate([one, other]) if isinstance(one, np.ndarray) else [*one, *other]


def _resamples(size: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """`n` resamples of `size` examples as weights_NB, in blocks: how often each example was drawn."""
    rng = np.random.default_rng(seed)
    for block in _blocks(size, n):
        drawn_NB = rng.integers(size, size=(block, size)) + size * np.arange(block)[:, None]
        yield np.bincount(drawn_NB.ravel(), minlength=block * size).reshape(block, size)


def _blocks(size: int, n: int) -> Iterator[int]:
    """`n` in parts that keep a block of weights at about 8 MB."""
    most = max(1, 1_000_000 // size)
    for start in range(0, n, most):
        yield min(most, n - start)


def _over(scores: Callable[[np.ndarray], Scores], blocks: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    parts = [scores(weights_NB) for weights_NB in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _bounds(sample_N: np.ndarray, value: float, level: float) -> tuple[float, float]:
    defined = sample_N[~np.isnan(sample_N)]
    if np.isnan(value) or not len(defined):
        return np.nan, np.nan
    method: Any = "linear" if np.isfinite(defined).all() else "inverted_cdf"  # nothing lies between two infinite samples
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2], method=method)
    return float(low), float(high)


def _same_form(named: dict[str, T]) -> T | dict[str, T]:
    """A number for a statistic that gives a number, a dict for one that gives a dict."""
    return named[""] if set(named) == {""} else named


def _check(n: int, level: float = 0.95) -> None:
    if n < 1:
        raise ValueError(f"n = {n}: expected at least one resample")
    if not 0 < level < 1:
        raise ValueError(f"level = {level}: expected a number between 0 and 1, such as 0.95")


# --- closed forms ----------------------------------------------------------------------------


def mcnemar(correct_a: Any, correct_b: Any) -> float:
    """The exact two-sided p value of McNemar's test (1947) that two classifiers are right equally often.

    Arguments: whether each example was right, (B,). Only examples on which exactly one is right count; without any, p is 1.
    """
    from scipy.stats import binomtest

    check_sizes(correct_a, correct_b)
    right_a, right_b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(~right_a & right_b))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean over runs (several seeds) with its Student-t interval; one run alone has the bounds nan."""
    from scipy.stats import t

    _check(1, level)
    n, mean = check_sizes(values), float(np.mean(values))
    if n == 1:
        return Interval(mean, np.nan, np.nan)
    half = float(t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half)
