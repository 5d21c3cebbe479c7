"""Whether a classifier's probabilities can be believed, and the temperature that makes them so.

B examples · C classes · M bins of confidence · N weightings (resamples).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlm.metrics.classes import over
from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import Scores, Weighted, check_numbers, check_sizes

declare(lower=("ece", "mce", "brier", "nll"))


class Bin(NamedTuple):
    """Examples whose confidence lies in (low, high]: their mean confidence, accuracy (nan for none) and number."""

    low: float
    high: float
    confidence: float
    accuracy: float
    examples: int


def calibration(probabilities_BC: Any, labels_B: Any, bins: int = 15) -> dict[str, float]:
    """ece, mce, brier and nll of class probabilities, given the class ids (0 to C − 1) that are right.

    Confidence is the largest probability. ece, mce: mean (weighted by number) and largest |accuracy − confidence| over
    bins of equal width (Guo et al. 2017, eq. 3 and 5). brier: mean over examples of Σ_c (p_c − [c is right])² (Brier 1950,
    eq. 2; 0 to 2, so for two classes twice the form that counts one class). nll: mean −ln p of the right class, infinite
    where one has the probability 0. Lower is better in all.
    """
    return weighted_calibration(bins)(probabilities_BC, labels_B)


def weighted_calibration(bins: int = 15) -> Weighted:
    """`calibration` for resampling."""

    def prepare(probabilities_BC: Any, labels_B: Any) -> Callable[[np.ndarray], Scores]:
        table_BC, right_B = _checked(probabilities_BC, labels_B)
        confidence_B, hit_B, bin_BM = _binned(table_BC, right_B, bins)
        with np.errstate(divide="ignore"):
            nll_B = -np.log(table_BC[np.arange(len(right_B)), right_B])
        brier_B = ((table_BC - (right_B[:, None] == np.arange(table_BC.shape[1]))) ** 2).sum(1)

        def scores(weights_NB: np.ndarray) -> Scores:
            total_N, count_NM = weights_NB.sum(1), weights_NB @ bin_BM
            gap_NM = np.abs(weights_NB @ ((hit_B - confidence_B)[:, None] * bin_BM))
            infinite_B = np.isinf(nll_B)
            nll_N = weights_NB @ np.where(infinite_B, 0, nll_B) / total_N
            return {
                "ece": gap_NM.sum(1) / total_N,
                "mce": over(gap_NM, count_NM).max(1),
                "brier": weights_NB @ brier_B / total_N,
                "nll": np.where(weights_NB @ infinite_B.astype(int) > 0, np.inf, nll_N),
            }

        return scores

    return Weighted(prepare)


def reliability(probabilities_BC: Any, labels_B: Any, bins: int = 15) -> list[Bin]:
    """The table of a reliability diagram: accuracy against confidence in each bin, from the lowest."""
    table_BC, right_B = _checked(probabilities_BC, labels_B)
    confidence_B, hit_B, bin_BM = _binned(table_BC, right_B, bins)
    edges, count_M = np.linspace(0, 1, bins + 1), bin_BM.sum(0)
    with np.errstate(invalid="ignore"):
        mean_M, accuracy_M = confidence_B @ bin_BM / count_M, hit_B @ bin_BM / count_M
    columns = [column.tolist() for column in (edges[:-1], edges[1:], mean_M, accuracy_M, count_M.astype(int))]
    return [Bin(*row) for row in zip(*columns, strict=True)]


def softmax(logits_BC: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of logits divided by a temperature."""
    scaled_BC = (logits_BC - logits_BC.max(1, keepdims=True)) / temperature
    odds_BC = np.exp(scaled_BC)
    return odds_BC / odds_BC.sum(1, keepdims=True)


def fit_temperature(logits_BC: Any, labels_B: Any, lowest: float = 0.01, highest: float = 100.0) -> float:
    """The temperature T with the smallest NLL of softmax(logits / T) on held-out examples (Guo et al. 2017, section 4.2).

    The NLL is convex in 1 / T, so its slope there, Σ_B (mean of the logits under the model − logit of the right class), has
    one zero. Where none lies between the bounds the better bound is returned: `lowest` if every example is right (the
    surer the better), `highest` if the logits know less than nothing.
    """
    from scipy.optimize import brentq

    check_sizes(logits_BC, labels_B)
    scores_BC = check_numbers("logits", logits_BC, (None, None))
    right_B = _labels(labels_B, scores_BC.shape[1])
    scores_BC = scores_BC - scores_BC[np.arange(len(right_B)), right_B][:, None]

    def slope(log_temperature: float) -> float:
        return float((softmax(scores_BC, np.exp(log_temperature)) * scores_BC).sum())

    low, high = float(np.log(lowest)), float(np.log(highest))
    if slope(low) <= 0:  # still falls as the model grows surer
        return lowest
    if slope(high) >= 0:
        return highest
    return float(np.exp(brentq(slope, low, high, xtol=1e-12)))


class Scaling(NamedTuple):
    """What temperature scaling does for some examples: `helps` if it lowers both ece and nll of examples that it was not
    fitted to."""

    temperature: float
    ece: float
    helps: bool


def scaled(probabilities_BC: Any, labels_B: Any, bins: int = 15) -> Scaling:
    """The temperature that fits these examples best, and the ece that one leaves: each half of them (every second example)
    is scaled by the temperature of the other half, so that none is judged by a fit to itself."""
    table_BC, right_B = _checked(probabilities_BC, labels_B)
    logits_BC = np.log(np.maximum(table_BC, np.finfo(float).tiny))
    halves = [np.arange(len(right_B)) % 2 == part for part in range(2 if len(right_B) > 1 else 1)]
    scaled_BC = np.empty_like(table_BC)
    for half, other in zip(halves, halves[::-1], strict=True):
        scaled_BC[half] = softmax(logits_BC[half], fit_temperature(logits_BC[other], right_B[other]))
    before, after = (calibration(each_BC, right_B, bins) for each_BC in (table_BC, scaled_BC))
    helps = len(halves) > 1 and after["ece"] < before["ece"] and after["nll"] <= before["nll"]
    return Scaling(fit_temperature(logits_BC, right_B), after["ece"], helps)


def _checked(probabilities_BC: Any, labels_B: Any) -> tuple[np.ndarray, np.ndarray]:
    check_sizes(probabilities_BC, labels_B)
    table_BC = check_numbers("probabilities", probabilities_BC, (None, None))
    sums_B = table_BC.sum(1)
    if table_BC.min() < 0 or np.abs(sums_B - 1).max() > 1e-2:
        strange = int(np.argmax(np.where(table_BC.min(1) < 0, np.inf, np.abs(sums_B - 1))))
        raise ValueError(
            f"probabilities of example {strange} are no distribution: from {table_BC[strange].min():.4g}, sum {sums_B[strange]:.4g}"
        )
    return table_BC, _labels(labels_B, table_BC.shape[1])


def _labels(labels_B: Any, C: int) -> np.ndarray:
    right_B = check_numbers("labels", labels_B).astype(int)
    if right_B.min() < 0 or right_B.max() >= C:
        raise ValueError(f"labels from {right_B.min()} to {right_B.max()}: expected 0 to {C - 1}")
    return right_B


def _binned(table_BC: np.ndarray, right_B: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence (B,), whether the surest class is right (B,), and the bin of each example as one of M columns."""
    if bins < 1:
        raise ValueError(f"bins = {bins}: expected at least one")
    confidence_B = table_BC.max(1)
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    bin_BM = np.searchsorted(inner, confidence_B, side="left")[:, None] == np.arange(bins)
    return confidence_B, (table_BC.argmax(1) == right_B).astype(float), bin_BM.astype(float)
