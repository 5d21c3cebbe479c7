"""Scores of predicted classes: one class an example, or any number of them.

Values are scikit-learn's. It scores one set of examples a call, which is too slow for a thousand resamples, so
`weighted_classification` and `weighted_multilabel` score many weightings at once, under the same names and with the same
values (`tests/metrics/test_classes.py` holds them equal).
B examples · C classes · N weightings (resamples) · G groups of examples with the same score.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import unknown
from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import Scores, Weighted, check_numbers, check_sizes

AVERAGES = ("micro", "macro", "weighted")
declare(higher=("accuracy", "subset_accuracy", "mcc", "auroc", "auprc"))
declare(higher=[f"{name}{part}" for name in ("precision", "recall", "f1") for part in ("", *(f"_{a}" for a in AVERAGES))])


class PerClass(NamedTuple):
    """Scores of one class; `support` is how often it is the actual one."""

    precision: float
    recall: float
    f1: float
    support: int


# --- one class an example --------------------------------------------------------------------


def classification(
    predicted: Sequence, actual: Sequence, probabilities: Any = None, labels: Sequence | None = None, positive: Any = None
) -> dict[str, float]:
    """Scores of one predicted class an example, as scikit-learn computes them, between 0 and 1 (mcc: −1 and 1).

    `predicted`, `actual` (B,) hold values of `labels` (default: those that occur, sorted). Always: accuracy; precision,
    recall and f1 with the endings _micro, _macro, _weighted; mcc (Gorodkin 2004 for several classes). For two labels also
    precision, recall and f1 of the `positive` one (default: the second). With `probabilities` (B, C), columns in the order of
    `labels`: auroc and auprc (average precision) of the positive one of two labels, or the mean over the classes of several,
    each against the rest.

    Undefined values: precision, recall and f1 are 0 where their denominator is 0; a class that is neither predicted nor
    actual is left out of the macro mean; mcc is 0 where one side knows one class alone; auroc and auprc leave out classes
    that all or no examples have, and are nan where none is left.
    """
    from sklearn import metrics

    labels, predicted_B, actual_B = _ids(predicted, actual, labels)
    yes = _place(labels, positive)
    scores = {"accuracy": float(metrics.accuracy_score(actual_B, predicted_B))}
    for average in (*AVERAGES, *(["binary"] if len(labels) == 2 else [])):
        found = metrics.precision_recall_fscore_support(actual_B, predicted_B, average=average, pos_label=yes, zero_division=0)
        ending = "" if average == "binary" else f"_{average}"
        scores |= {f"{name}{ending}": float(x) for name, x in zip(("precision", "recall", "f1"), found[:3], strict=True)}
    scores["mcc"] = float(metrics.matthews_corrcoef(actual_B, predicted_B)) if len({*predicted_B, *actual_B}) > 1 else 0.0
    if probabilities is not None:
        scores |= _areas(*_columns(probabilities, actual_B, len(labels), yes))
    return scores


def class_scores(predicted: Sequence, actual: Sequence, labels: Sequence | None = None) -> dict[Any, PerClass]:
    """Label → its precision, recall, F1 (0 where undefined) and support, for every label."""
    from sklearn.metrics import precision_recall_fscore_support

    labels, predicted_B, actual_B = _ids(predicted, actual, labels)
    columns = precision_recall_fscore_support(actual_B, predicted_B, labels=range(len(labels)), average=None, zero_division=0)
    return {
        label: PerClass(float(precision), float(recall), float(f1), int(support))
        for label, precision, recall, f1, support in zip(labels, *columns, strict=True)
    }


def averages(each: Mapping[Any, PerClass]) -> dict[str, PerClass]:
    """The mean over classes, and the mean weighted by their support, as scikit-learn's `classification_report` has them."""
    table = np.array([row[:3] for row in each.values()])
    support = np.array([row.support for row in each.values()])
    weights = {"macro avg": np.ones(len(support)), "weighted avg": support if support.sum() else np.ones(len(support))}
    means = {name: np.average(table, axis=0, weights=weight).tolist() for name, weight in weights.items()}
    return {name: PerClass(p, r, f1, int(support.sum())) for name, (p, r, f1) in means.items()}


def multilabel_scores(probabilities_BC: Any, actual_BC: Any, labels: Sequence, threshold: float = 0.5) -> dict[Any, PerClass]:
    """Label → its precision, recall, F1 (0 where undefined) and support, where an example has any number of classes."""
    from sklearn.metrics import precision_recall_fscore_support

    scores_BC, truth_BC = _multilabel(probabilities_BC, actual_BC)
    guess_BC = scores_BC >= threshold
    found = {}
    for i, label in enumerate(labels):
        p, r, f, _ = precision_recall_fscore_support(truth_BC[:, i], guess_BC[:, i], average="binary", pos_label=1, zero_division=0)
        found[label] = PerClass(float(p), float(r), float(f), int(truth_BC[:, i].sum()))
    return found


def confusion(predicted: Sequence, actual: Sequence, labels: Sequence | None = None) -> np.ndarray:
    """counts_CC of examples: row = actual class, column = predicted class, both in the order of `labels`."""
    from sklearn.metrics import confusion_matrix

    labels, predicted_B, actual_B = _ids(predicted, actual, labels)
    return confusion_matrix(actual_B, predicted_B, labels=range(len(labels)))


def weighted_classification(labels: Sequence | None = None, positive: Any = None) -> Weighted:
    """`classification` for resampling: takes predicted, actual and, if wanted, probabilities."""

    def prepare(predicted: Sequence, actual: Sequence, probabilities: Any = None) -> Callable[[np.ndarray], Scores]:
        known, predicted_B, actual_B = _ids(predicted, actual, labels)
        guess_BC, truth_BC = (ids_B[:, None] == np.arange(len(known)) for ids_B in (predicted_B, actual_B))
        rows_BS = np.hstack([guess_BC & truth_BC, guess_BC, truth_BC]).astype(float)
        yes = _place(known, positive)
        columns = None if probabilities is None else _columns(probabilities, actual_B, len(known), yes)

        def scores(weights_NB: np.ndarray) -> Scores:
            hits_NC, guesses_NC, truths_NC = np.split(weights_NB @ rows_BS, 3, axis=1)
            total_N, right_N = truths_NC.sum(1), hits_NC.sum(1)
            there_NC = guesses_NC + truths_NC > 0
            means = {
                "micro": lambda x_NC: over(right_N, total_N),
                "macro": lambda x_NC: (x_NC * there_NC).sum(1) / there_NC.sum(1),
                "weighted": lambda x_NC: (x_NC * truths_NC).sum(1) / total_N,
            }
            each = precision_recall_f1(hits_NC, guesses_NC, truths_NC)
            found = {"accuracy": right_N / total_N}
            found |= {f"{name}_{average}": mean(x_NC) for average, mean in means.items() for name, x_NC in each.items()}
            if len(known) == 2:
                found |= {name: x_NC[:, yes] for name, x_NC in each.items()}
            spread_N = (total_N**2 - (guesses_NC**2).sum(1)) * (total_N**2 - (truths_NC**2).sum(1))
            found["mcc"] = over(right_N * total_N - (guesses_NC * truths_NC).sum(1), np.sqrt(spread_N))
            return found | (_weighted_areas(weights_NB, *columns) if columns else {})

        return scores

    return Weighted(prepare)


def _ids(predicted: Sequence, actual: Sequence, labels: Sequence | None) -> tuple[list, np.ndarray, np.ndarray]:
    """The labels, and both sides as places in them."""
    check_sizes(predicted, actual)
    sides = [_plain(predicted), _plain(actual)]
    labels = sorted({*sides[0], *sides[1]}) if labels is None else _plain(labels)
    place = {label: i for i, label in enumerate(labels)}
    for side, what in zip(sides, ("predicted", "actual"), strict=True):
        for strange in set(side) - place.keys():
            raise unknown(f"{what} class", strange, [str(label) for label in labels])
    predicted_B, actual_B = (np.array([place[value] for value in side]) for side in sides)
    return labels, predicted_B, actual_B


def _plain(values: Sequence) -> list[Hashable]:
    return values.tolist() if isinstance(values, np.ndarray) else [v.item() if isinstance(v, np.generic) else v for v in values]


def _place(labels: Sequence, positive: Any) -> int:
    """The place of the positive one of two labels; of other numbers of labels none is."""
    if positive is None or len(labels) != 2:
        return 1
    if positive not in labels:
        raise unknown("positive class", positive, [str(label) for label in labels])
    return list(labels).index(positive)


def _columns(probabilities: Any, actual_B: np.ndarray, C: int, positive: int) -> tuple[np.ndarray, np.ndarray]:
    """What AUROC and AUPRC are taken of: probability and truth of the positive one of two classes, or of each of several."""
    table_BC = check_numbers("probabilities", probabilities, (len(actual_B), C))
    truth_BC = actual_B[:, None] == np.arange(C)
    return (table_BC[:, [positive]], truth_BC[:, [positive]]) if C == 2 else (table_BC, truth_BC)


# --- any number of classes an example --------------------------------------------------------


def multilabel(probabilities_BC: Any, actual_BC: Any, threshold: float = 0.5) -> dict[str, float]:
    """Scores of any number of classes an example, as scikit-learn computes them: a class is predicted from `threshold` on.

    precision, recall, f1 with _micro and _macro (mean over all classes; 0 where undefined, so a class that is neither
    predicted nor actual lowers it); subset_accuracy (all classes of an example right); auroc and auprc as the mean over
    classes that some but not all examples have, nan without any.
    """
    from sklearn import metrics

    scores_BC, truth_BC = _multilabel(probabilities_BC, actual_BC)
    guess_BC = scores_BC >= threshold
    found = {"subset_accuracy": float(np.mean((guess_BC == truth_BC).all(1)))}
    for average in ("micro", "macro"):
        how = average if truth_BC.shape[1] > 1 else "binary"  # scikit-learn takes one column for a class and its absence
        each = metrics.precision_recall_fscore_support(truth_BC, guess_BC, average=how, pos_label=1, zero_division=0)
        found |= {f"{name}_{average}": float(x) for name, x in zip(("precision", "recall", "f1"), each[:3], strict=True)}
    return found | _areas(scores_BC, truth_BC)


def weighted_multilabel(threshold: float = 0.5) -> Weighted:
    """`multilabel` for resampling."""

    def prepare(probabilities_BC: Any, actual_BC: Any) -> Callable[[np.ndarray], Scores]:
        scores_BC, truth_BC = _multilabel(probabilities_BC, actual_BC)
        guess_BC = scores_BC >= threshold
        rows_BS = np.hstack([guess_BC & truth_BC, guess_BC, truth_BC]).astype(float)
        all_right_B = (guess_BC == truth_BC).all(1)

        def scores(weights_NB: np.ndarray) -> Scores:
            counts = np.split(weights_NB @ rows_BS, 3, axis=1)
            found = {"subset_accuracy": weights_NB @ all_right_B / weights_NB.sum(1)}
            found |= {
                f"{name}_micro": x_N1[:, 0]
                for name, x_N1 in precision_recall_f1(*(x.sum(1, keepdims=True) for x in counts)).items()
            }
            found |= {f"{name}_macro": x_NC.mean(1) for name, x_NC in precision_recall_f1(*counts).items()}
            return found | _weighted_areas(weights_NB, scores_BC, truth_BC)

        return scores

    return Weighted(prepare)


def _multilabel(probabilities_BC: Any, actual_BC: Any) -> tuple[np.ndarray, np.ndarray]:
    check_sizes(probabilities_BC, actual_BC)
    scores_BC = check_numbers("probabilities", probabilities_BC, (None, None))
    return scores_BC, check_numbers("actual classes", actual_BC, scores_BC.shape) > 0


# --- shared ----------------------------------------------------------------------------------


def over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A quotient, 0 where the denominator is 0."""
    return np.divide(above, below, out=np.zeros_like(above, float), where=below > 0)


def precision_recall_f1(hits_NC: np.ndarray, guesses_NC: np.ndarray, truths_NC: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "precision": over(hits_NC, guesses_NC),
        "recall": over(hits_NC, truths_NC),
        "f1": over(2 * hits_NC, guesses_NC + truths_NC),
    }


def _areas(scores_BC: np.ndarray, truth_BC: np.ndarray) -> dict[str, float]:
    """AUROC and average precision, mean over the columns that hold both kinds of example; nan without any."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    both = [c for c in range(truth_BC.shape[1]) if 0 < truth_BC[:, c].sum() < len(truth_BC)]
    ways = {"auroc": roc_auc_score, "auprc": average_precision_score}
    return {
        name: float(np.mean([area(truth_BC[:, c], scores_BC[:, c]) for c in both])) if both else np.nan
        for name, area in ways.items()
    }


def _weighted_areas(weights_NB: np.ndarray, scores_BC: np.ndarray, truth_BC: np.ndarray) -> Scores:
    sums = {name: np.zeros(len(weights_NB)) for name in ("auroc", "auprc")}
    defined_N = np.zeros(len(weights_NB))
    for score_B, truth_B in zip(scores_BC.T, truth_BC.T, strict=True):
        if not truth_B.any():
            continue
        order = np.argsort(-score_B, kind="stable")
        sorted_NB, yes = weights_NB[:, order], np.flatnonzero(truth_B[order])
        # Examples of one score count at once. Only at scores that a yes has does anything change.
        levels_B = np.cumsum(np.diff(score_B[order], prepend=score_B[order[0]]) != 0)
        levels_G, first_G = np.unique(levels_B[yes], return_index=True)
        start_G, stop_G = (np.searchsorted(levels_B, levels_G, side=side) for side in ("left", "right"))
        sums_NB = np.cumsum(sorted_NB, axis=1)
        upto_NG, before_NG = sums_NB[:, stop_G - 1], np.where(start_G > 0, sums_NB[:, start_G - 1], 0)
        yes_NG = np.add.reduceat(sorted_NB[:, yes], first_G, axis=1)
        yes_upto_NG = np.cumsum(yes_NG, axis=1)
        yes_N = yes_upto_NG[:, -1]
        no_N = sums_NB[:, -1] - yes_N
        # AUROC: the chance that a yes stands above a no, ties for half. AUPRC: precision, weighted by the recall gained.
        no_below_NG = no_N[:, None] - (upto_NG - yes_upto_NG)
        no_beside_NG = upto_NG - before_NG - yes_NG
        sums["auroc"] += over((yes_NG * (no_below_NG + no_beside_NG / 2)).sum(1), yes_N * no_N)
        sums["auprc"] += np.where(no_N > 0, over((yes_NG * over(yes_upto_NG, upto_NG)).sum(1), yes_N), 0)
        defined_N += (yes_N > 0) & (no_N > 0)
    return {name: np.where(defined_N > 0, over(sum_N, defined_N), np.nan) for name, sum_N in sums.items()}
