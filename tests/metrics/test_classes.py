"""Scores of classes are scikit-learn's on anything, and those for resampling are the same."""

import warnings

import numpy as np
import pytest
from sklearn import metrics

from jaxlm.metrics import (
    bootstrap,
    class_scores,
    classification,
    confusion,
    multilabel,
    weighted_classification,
    weighted_multilabel,
)


def example(seed, C, B=60, absent=()):
    """Predictions, truth and tied probabilities; classes in `absent` never occur."""
    rng = np.random.default_rng(seed)
    there = [c for c in range(C) if c not in absent]
    actual, noise = rng.choice(there, size=(2, B))
    predicted = np.where(rng.random(B) < 0.6, actual, noise)
    probabilities = rng.integers(1, 5, size=(B, C)) + 3.0 * (predicted[:, None] == np.arange(C))
    return predicted, actual, probabilities / probabilities.sum(1, keepdims=True)


CASES = [
    example(0, 2),
    example(1, 3),
    example(2, 7, B=20),
    example(3, 4, absent=(1,)),
    example(4, 2, absent=(1,)),
    example(5, 77, B=300),
]


@pytest.mark.parametrize("case", CASES, ids=["two", "three", "few each", "one absent", "one class alone", "77"])
def test_every_score_is_scikit_learns(case):
    predicted, actual, probabilities = case
    C = probabilities.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none reaches the user
        found = classification(predicted, actual, probabilities, labels=range(C))
    expected = {"accuracy": metrics.accuracy_score(actual, predicted)}
    for average in ("micro", "macro", "weighted"):
        for score in (metrics.precision_score, metrics.recall_score, metrics.f1_score):
            expected[f"{score.__name__.removesuffix('_score')}_{average}"] = score(
                actual, predicted, average=average, zero_division=0
            )
    if len({*actual, *predicted}) > 1:
        expected["mcc"] = metrics.matthews_corrcoef(actual, predicted)
    if C == 2:
        for score in (metrics.precision_score, metrics.recall_score, metrics.f1_score):
            expected[score.__name__.removesuffix("_score")] = score(actual, predicted, zero_division=0)
    columns = [1] if C == 2 else range(C)
    split = [c for c in columns if 0 < (actual == c).sum() < len(actual)]
    if split:
        expected["auroc"] = np.mean([metrics.roc_auc_score(actual == c, probabilities[:, c]) for c in split])
        expected["auprc"] = np.mean([metrics.average_precision_score(actual == c, probabilities[:, c]) for c in split])
    assert found == pytest.approx({"mcc": 0, "auroc": np.nan, "auprc": np.nan, **expected}, abs=1e-12, nan_ok=True)


def test_macro_area_is_scikit_learns_one_against_the_rest():
    predicted, actual, probabilities = CASES[1]
    theirs = metrics.roc_auc_score(actual, probabilities, multi_class="ovr", average="macro")
    assert classification(predicted, actual, probabilities)["auroc"] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=["two", "three", "few each", "one absent", "one class alone", "77"])
def test_resampled_scores_are_those_of_each_resample(case):
    """The quick form gives the interval that calling scikit-learn on each resample gives."""
    labels = range(case[2].shape[1])
    quick = bootstrap(weighted_classification(labels), *case, n=12, seed=3)
    slow = bootstrap(lambda *arrays: classification(*arrays, labels=labels), *case, n=12, seed=3)
    assert quick.keys() == slow.keys() == classification(*case, labels=labels).keys()
    for name in slow:
        assert quick[name] == pytest.approx(slow[name], abs=1e-12, nan_ok=True), name


def test_ten_thousand_examples_a_thousand_times_are_quick():
    import time

    rng = np.random.default_rng(0)
    actual, predicted = rng.integers(2, size=(2, 10_000))
    start = time.process_time()
    bootstrap(weighted_classification(range(2)), predicted, actual, n=1000)
    assert time.process_time() - start < 2


def test_labels_may_be_names_and_columns_follow_their_order():
    predicted, actual = ["no", "yes", "yes"], ["no", "no", "yes"]
    assert classification(predicted, actual)["f1"] == pytest.approx(2 / 3), "the second of the sorted labels"
    assert classification(predicted, actual, labels=["yes", "no"])["recall"] == 0.5
    likely = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    assert classification(predicted, actual, likely)["auroc"] == 1
    assert classification(predicted, actual, likely, labels=["yes", "no"])["auroc"] == 0
    np.testing.assert_array_equal(confusion(predicted, actual, ["yes", "no"]), [[1, 0], [1, 1]])
    found = class_scores(predicted, actual, ["yes", "no", "maybe"])
    assert found["yes"] == (0.5, 1, pytest.approx(2 / 3), 1) and found["maybe"] == (0, 0, 0, 0)


def test_per_class_scores_are_scikit_learns():
    predicted, actual, _ = CASES[2]
    theirs = metrics.precision_recall_fscore_support(actual, predicted, labels=range(7), average=None, zero_division=0)
    np.testing.assert_allclose(list(class_scores(predicted, actual, range(7)).values()), np.array(theirs).T)


# --- any number of classes -------------------------------------------------------------------


def tables(seed, C, B=40):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 8, size=(B, C)) / 8, rng.random((B, C)) < np.linspace(0, 0.5, C + 1)[1:]


LABELS = [tables(0, 5), tables(1, 1), tables(2, 28, B=15), (np.full((3, 2), 0.1), np.zeros((3, 2), bool))]


@pytest.mark.parametrize("case", LABELS, ids=["five", "one class", "28 in few", "none anywhere"])
def test_multilabel_is_scikit_learns(case):
    likely, truth = case
    C = truth.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = multilabel(likely, truth, threshold=0.5)
    # For one column scikit-learn would average over the class and its absence: each class as a binary task, then.
    each = [metrics.f1_score(truth[:, c], likely[:, c] >= 0.5, zero_division=0) for c in range(C)]
    assert found["f1_macro"] == pytest.approx(np.mean(each))
    assert found["f1_micro"] == pytest.approx(metrics.f1_score(truth.ravel(), likely.ravel() >= 0.5, zero_division=0))
    assert found["recall_micro"] == pytest.approx(metrics.recall_score(truth.ravel(), likely.ravel() >= 0.5, zero_division=0))
    assert found["subset_accuracy"] == pytest.approx(metrics.accuracy_score(truth, likely >= 0.5))
    split = [c for c in range(C) if 0 < truth[:, c].sum() < len(truth)]
    areas = [metrics.roc_auc_score(truth[:, c], likely[:, c]) for c in split] or [np.nan]
    assert found["auroc"] == pytest.approx(np.mean(areas), nan_ok=True)
    quick, slow = bootstrap(weighted_multilabel(0.5), *case, n=10), bootstrap(multilabel, *case, n=10)
    assert quick.keys() == slow.keys()
    for name in slow:
        assert quick[name] == pytest.approx(slow[name], abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification([], []), "no predictions to score"),
        (lambda: classification(["a"], ["a", "b"]), "predictions and references differ in number: 1 and 2"),
        (lambda: confusion(["yse"], ["yes"], ["yes", "no"]), "unknown predicted class 'yse': did you mean 'yes'? allowed: yes, no"),
        (lambda: classification([0, 1], [0, 1], np.ones((2, 3))), "probabilities have the shape (2, 3): expected (2, 2)"),
        (lambda: multilabel([[np.nan]], [[1]]), "probabilities are not all finite numbers: 1 are infinite or nan"),
        (lambda: confusion([], []), "no predictions to score"),
        (lambda: class_scores([], []), "no predictions to score"),
        (lambda: multilabel(np.ones((0, 3)), np.ones((0, 3))), "no predictions to score"),
        (lambda: multilabel(np.ones((2, 3)), np.ones((2, 2))), "actual classes have the shape (2, 2): expected (2, 3)"),
    ],
)  # fmt: skip
def test_mistakes(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
