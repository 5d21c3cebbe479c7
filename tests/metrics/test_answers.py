"""SQuAD's rules: cases worked out by hand from the published scripts, and every threshold tried."""

import random

import numpy as np
import pytest

from jaxlm.metrics import bootstrap, squad, weighted_squad
from jaxlm.metrics.answers import exact_match, normalise, word_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's\tpyjamas!", "cats pyjamas"),
        ("a an the", ""),
        ("An apple a day", "apple day"),
        ("the-cat", "thecat"),  # punctuation goes first, so this article was never a word
        ("U.S.", "us"),
        ("A.", ""),
        ("Theatre", "theatre"),
        ("«Œuvre» — “quoted”", "«œuvre» — “quoted”"),  # only ASCII punctuation goes
        ("a\u00a0b", "b"),  # a no-break space is a space
        ("$3.50", "350"),
        ("", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Denver Broncos", ["Denver Broncos", "Broncos"], 1, 1),
        ("Denver", ["Denver Broncos"], 0, 2 / 3),
        ("in Denver Denver", ["Denver is Denver"], 0, 2 / 3),  # words count as often as they stand: 2 shared of 3 and 3
        ("cat dog", ["dog", "cat dog bird"], 0, 0.8),  # the better of 2/3 and 4/5
        ("", ["cat"], 0, 0),
        ("cat", [], 0, 0),
        ("", [], 1, 1),
        ("the", [], 1, 1),  # nothing is left of it
        ("the", ["a"], 1, 1),  # nothing is left of the answer, so none is expected
        ("", ["the", "cat"], 0, 0),  # but such an answer counts only where it is alone
        ("ΣΊΣΥΦΟΣ", ["σίσυφος"], 1, 1),
    ],
)
def test_scores_by_hand(prediction, answers, exact, f1):
    assert exact_match(prediction, answers) == exact
    assert word_f1(prediction, answers) == pytest.approx(f1)


def test_the_best_threshold_by_hand():
    """Answered from the surest on: a right +1, an unanswerable -1, a right half +0.5, an unanswerable -1."""
    predictions = ["cat", "dog", "red bird", "fish"]
    answers = [["cat"], [], ["red"], []]
    found = squad(predictions, answers, no_answer=[0.1, 0.4, 0.3, 0.9])
    assert found["exact"] == 25 and found["f1"] == pytest.approx(100 * (1 + 2 / 3) / 4)
    assert found["answerable_exact"] == 50 and found["unanswerable_exact"] == 0
    assert (found["best_exact"], found["best_exact_threshold"]) == (75, 0.1)
    assert (found["best_f1"], found["best_f1_threshold"]) == (pytest.approx(100 * (3 + 2 / 3) / 4), 0.3)


def test_refusing_everything_may_be_best():
    found = squad(["cat"], [[]], no_answer=[0.2])
    assert (found["best_exact"], found["best_exact_threshold"]) == (100, 0.0), "the script's threshold for it"
    found = squad(["cat"], [[]], no_answer=[-3.0])
    assert found["best_exact"] == 100 and found["best_exact_threshold"] < -3, "and one that works where scores are below 0"


def test_questions_of_one_score_stay_together():
    """The script would stop between the two, which no threshold can."""
    for order in ([0, 1], [1, 0]):
        predictions, answers = [["cat", "dog"][i] for i in order], [[["cat"], []][i] for i in order]
        found = squad(predictions, answers, no_answer=[0.5, 0.5])
        assert (found["best_exact"], found["best_exact_threshold"]) == (50, 0.0)


def examples(seed, n):
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choice(["the", "cat", "Dog.", "über", "—", "3.5"]) for _ in range(rng.randint(0, 4)))  # noqa: E731
    answers = [[text() for _ in range(rng.randint(0, 3))] for _ in range(n)]
    predictions = [rng.choice([text(), "", *known]) for known in answers]
    return predictions, answers, [rng.randint(0, 9) / 10 for _ in range(n)]


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_the_best_of_all(seed):
    predictions, answers, doubt = examples(seed, 25)
    # Texts of which normalising leaves nothing are answers to the script's threshold, yet not to its scores.
    predictions = [text if normalise(text) else "" for text in predictions]
    answers = [[text for text in known if normalise(text)] for known in answers]
    found = squad(predictions, answers, doubt)
    for name in ("exact", "f1"):
        at = {
            t: squad(["" if d > t else text for text, d in zip(predictions, doubt, strict=True)], answers)[name]
            for t in [-1.0, *doubt]
        }
        assert found[f"best_{name}"] == pytest.approx(max(at.values()))
        threshold = found[f"best_{name}_threshold"]
        assert max(score for t, score in at.items() if t <= threshold) == pytest.approx(max(at.values()))
        assert not any(score > max(at.values()) - 1e-9 for t, score in at.items() if -1 < t < threshold), "and the lowest"


def test_resampled_scores_are_those_of_each_resample():
    case = examples(9, 40)
    quick, slow = bootstrap(weighted_squad(), *case, n=20), bootstrap(squad, *case, n=20)
    assert quick.keys() == slow.keys() == squad(*case).keys() and len(quick) == 10
    for name in slow:
        assert quick[name] == pytest.approx(slow[name]), name


def test_without_unanswerable_questions_there_are_two_scores():
    assert squad(["cat"], [["cat"]]) == {"exact": 100, "f1": 100}
    assert np.isnan(squad([""], [[]])["answerable_f1"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: squad([], []), "no predictions to score"),
        (lambda: squad(["a"], [["a"], ["b"]]), "predictions and references differ in number: 1 and 2"),
        (lambda: squad(["a"], [["a"]], [0.1, 0.2]), "predictions and references differ in number: 1 and 1 and 2"),
        (lambda: squad(["a"], [["a"]], [np.nan]), "no-answer scores are not all finite numbers: 1 are infinite or nan"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
