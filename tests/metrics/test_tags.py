"""Spans are conlleval's: its rules spelled out on pairs of tags, and seqeval on anything."""

import random
import warnings

import pytest

from jaxlm.metrics import bootstrap, span_scores, spans, spans_of, weighted_spans


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-B", [("A", 0, 2), ("B", 3, 4)]),
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("O I-A I-A", [("A", 1, 3)]),  # begins without B: IOB1, or a slip
        ("B-A I-B", [("A", 0, 1), ("B", 1, 2)]),  # another type begins another span
        ("I-A B-A I-A", [("A", 0, 1), ("A", 1, 3)]),
        ("B-A O I-A", [("A", 0, 1), ("A", 2, 3)]),
        ("S-A S-A B-A I-A E-A", [("A", 0, 1), ("A", 1, 2), ("A", 2, 5)]),
        ("E-A I-A", [("A", 0, 1), ("A", 1, 2)]),  # what has ended goes on no more
        ("S-A I-A E-A", [("A", 0, 1), ("A", 1, 3)]),
        ("B-A-x I-A-x", [("A-x", 0, 2)]),
        ("U-A U-A B-A I-A L-A I-A", [("A", 0, 1), ("A", 1, 2), ("A", 2, 5), ("A", 5, 6)]),  # BILOU
        ("B I", [("_", 0, 2)]),
        ("O O", []),
        ("", []),
    ],
)
def test_spans_by_hand(tags, expected):
    assert spans_of(tags.split()) == expected


def brute_force(tags):
    """conlleval's two tables, as its documentation gives them: where a chunk ends after one tag, and starts at the next."""
    found, start = set(), None
    for i, (before, here) in enumerate(zip(["O", *tags], [*tags, "O"], strict=True)):
        (p, kind), (q, other) = (tag.partition("-")[::2] for tag in (before, here))
        ends = p in ("E", "S") or (p in ("B", "I") and q in ("B", "S", "O")) or (p != "O" and kind != other)
        starts = q in ("B", "S") or (p in ("E", "S", "O") and q in ("E", "I")) or (q != "O" and kind != other)
        if p != "O" and ends:
            found.add((kind, start, i))
        if starts:
            start = i
    return found


def sentences(seed, n, near=None):
    rng = random.Random(seed)
    tags = ["O", "O", *(f"{p}-{t}" for p in "BIES" for t in ("PER", "LOC"))]
    if near is None:
        return [[rng.choice(tags) for _ in range(rng.randint(0, 9))] for _ in range(n)]
    return [[rng.choice(tags) if rng.random() < 0.2 else tag for tag in row] for row in near]


def test_spans_are_conllevals():
    rows = sentences(0, 2000)
    assert all(set(spans_of(row)) == brute_force(row) for row in rows)
    assert sum(map(len, map(spans_of, rows))) > 2000


@pytest.mark.parity
def test_scores_are_seqevals():
    seqeval = pytest.importorskip("seqeval.metrics")
    actual = sentences(1, 150)
    predicted = sentences(2, 150, actual)
    found = spans(predicted, actual)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("precision", "recall", "f1"):
            assert found[name] == pytest.approx(getattr(seqeval, f"{name}_score")(actual, predicted)) and 0 < found[name] < 1
        assert found["f1_macro"] == pytest.approx(seqeval.f1_score(actual, predicted, average="macro"))
        assert found["accuracy"] == pytest.approx(seqeval.accuracy_score(actual, predicted))
        table = seqeval.classification_report(actual, predicted, output_dict=True)
    for kind, scores in span_scores(predicted, actual).items():
        assert scores == pytest.approx(tuple(table[kind].values()))


def test_scores_by_hand():
    actual = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC"]]
    predicted = [["B-PER", "I-PER", "O", "B-PER"], ["B-LOC", "I-LOC"]]
    expected = {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "f1_macro": (2 / 3 + 0) / 2, "accuracy": 0.5}
    assert spans(predicted, actual) == pytest.approx(expected)
    assert span_scores(predicted, actual) == {"LOC": (0, 0, 0, 2), "PER": (0.5, 1, pytest.approx(2 / 3), 1)}
    assert set(spans([["O"], []], [["O"], []]).values()) == {0, 1}, "nothing to find scores 0, but for the tokens"


def test_resampled_scores_are_those_of_each_resample():
    actual = sentences(3, 30)
    predicted = sentences(4, 30, actual)
    quick, slow = bootstrap(weighted_spans(), predicted, actual, n=20), bootstrap(spans, predicted, actual, n=20)
    assert quick.keys() == slow.keys()
    for name in slow:
        assert quick[name] == pytest.approx(slow[name]), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spans([], []), "no predictions to score"),
        (lambda: spans([["O"]], [["O"], ["O"]]), "predictions and references differ in number: 1 and 2"),
        (lambda: spans([["O"]], [["O", "O"]]), "sentence 0 has 1 predicted tags for 2 tokens"),
        (lambda: spans([["PER"]], [["O"]]), "unknown tag 'PER': expected O, or one of B-, I-, E-, S-, L-, U- with a type"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
