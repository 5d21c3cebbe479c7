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


# --- languages written without spaces ---------------------------------------------------------


def cmrc(prediction, answers):
    """(EM, F1) by the published definition of CMRC 2018 (Cui et al. 2019, section 3.3), the long way: every run of characters
    of one text is looked for in the other."""
    marks = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"

    def cut(text):
        return [char for char in text.lower().strip() if char not in marks]

    exact, best = 0.0, 0.0
    for answer in answers:
        guess, truth = cut(prediction), cut(answer)
        exact = max(exact, float(guess == truth))
        runs = [guess[i:j] for i in range(len(guess)) for j in range(i + 1, len(guess) + 1)]
        shared = max((len(run) for run in runs if any(truth[k : k + len(run)] == run for k in range(len(truth)))), default=0)
        if shared:
            precision, recall = shared / len(guess), shared / len(truth)
            best = max(best, 2 * precision * recall / (precision + recall))
    return exact, best


def test_chinese_answers_are_scored_as_cmrc_2018_scores_them():
    rng = random.Random(0)
    for _ in range(300):
        answers = ["".join(rng.choices("我你他。，·《》", k=rng.randint(1, 8))) + "人" for _ in range(rng.randint(1, 3))]
        prediction = "".join(rng.choices("我你他人。，·「", k=rng.randint(0, 9)))
        exact, f1 = cmrc(prediction, answers)
        found = squad([prediction], [answers])
        assert found == pytest.approx({"exact": 100 * exact, "f1": 100 * f1}), (prediction, answers)


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("《红楼梦》", "红楼梦。", 1.0),
        ("美国国家橄榄球联盟NFL", "国家橄榄球联盟", 2 * 7 / (10 + 7)),  # NFL is one word
        ("北京的故宫", "故宫北京", 2 * 2 / (5 + 4)),  # a run, and no bag: 北京 or 故宫
        ("2018年3.5万人", "2018年", 2 * 2 / (5 + 2)),  # a number is one word
        ("ラーメンが好き", "ラーメン", 2 * 4 / (7 + 4)),
        ("กรุงเทพ", "กรุง", 2 * 3 / (6 + 3)),  # a vowel sign belongs to its letter
    ],
)
def test_characters_stand_for_words(prediction, answer, f1):
    assert squad([prediction], [[answer]])["f1"] == pytest.approx(100 * f1)


def test_what_decides_between_words_and_characters():
    assert squad(["Denver team"], [["Denver"]])["f1"] == pytest.approx(200 / 3)
    assert squad(["丹佛队"], [["丹佛"]])["f1"] == pytest.approx(80)
    assert squad(["丹佛队"], [["丹佛"]], words="spaces")["f1"] == 0
    # A question is scored as most of the answers are written.
    mixed = squad(["the NFL", "丹佛"], [["NFL"], ["丹佛野马队"]])
    assert mixed["f1"] == pytest.approx(50 * (2 / 3 + 4 / 7))
    with pytest.raises(ValueError, match="unknown words 'letters'"):
        squad(["a"], [["a"]], words="letters")


def test_characters_in_resamples_and_without_answers():
    case = (["我爱猫", "", "狗"] * 9, [["爱猫"], [], ["我的狗"]] * 9, [0.1, 0.9, 0.4] * 9)
    quick, slow = bootstrap(weighted_squad(), *case, n=20), bootstrap(squad, *case, n=20)
    assert quick.keys() == slow.keys()
    for name, interval in quick.items():
        assert interval == pytest.approx(slow[name]), name
    assert squad(*case)["unanswerable_f1"] == 100


@pytest.mark.realdata
def test_answers_of_xquad_in_chinese_score_themselves(data):
    import json

    file = data / "qa-xquad-en-zh" / "xquad.zh.json"
    answers = [
        [answer["text"] for answer in question["answers"]]
        for article in json.loads(file.read_text(encoding="utf8"))["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    whole = [each[0] for each in answers]
    assert squad(whole, answers) == {"exact": 100, "f1": 100}
    cut = [text[:-1] for text in whole]  # one character too few costs little; by spaces it would cost all
    by_characters, by_spaces = squad(cut, answers)["f1"], squad(cut, answers, words="spaces")["f1"]
    assert by_characters > 60 > 40 > by_spaces
    for text, each in zip(cut, answers, strict=True):
        if not any(char.isascii() for char in text + each[0]):
            expected = cmrc(text, each)
            assert squad([text], [each], words="characters") == pytest.approx({"exact": 100 * expected[0], "f1": 100 * expected[1]})
