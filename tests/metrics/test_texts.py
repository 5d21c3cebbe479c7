"""Translation and summaries: the libraries' scores, their own bootstraps, any script, any number of references."""

import csv
import random
import sys

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from jaxlm.metrics import (
    approximate_randomisation,
    bootstrap,
    choose_tokenizer,
    paired,
    summarisation,
    translation,
    weighted_summarisation,
    weighted_translation,
)
from jaxlm.metrics.scripts import script_of
from jaxlm.metrics.texts import _Unicode

WORDS = ["the", "a", "small", "old", "dog", "house", "sees", "runs", ",", ".", "in", "under", "über", "café", "3.5", "don't"]


def sentences(seed, n, near=None, change=0.3):
    """Random sentences, or ones near to others."""
    rng = random.Random(seed)
    if near is None:
        return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 12))) for _ in range(n)]
    return [" ".join(rng.choice(WORDS) if rng.random() < change else word for word in text.split()) for text in near]


REFERENCES = sentences(0, 60)
A, B = sentences(1, 60, REFERENCES), sentences(2, 60, REFERENCES, change=0.4)


@pytest.mark.parametrize("tokenize", ["13a", "zh", "char", "intl", "none"])
def test_scores_and_signatures_are_sacrebleus(tokenize):
    found = translation(A, REFERENCES, tokenize)
    spaceless = tokenize in ("zh", "char")
    bleu, chrf, ter = BLEU(tokenize=tokenize), CHRF(), TER(normalized=spaceless, asian_support=spaceless)
    expected = {name: metric.corpus_score(A, [REFERENCES]).score for name, metric in (("bleu", bleu), ("chrf", chrf), ("ter", ter))}
    assert found.values == expected and all(expected.values())
    assert found.signatures["bleu"] == f"nrefs:1|case:mixed|eff:no|tok:{tokenize}|smooth:exp|version:{sacrebleu.__version__}"
    assert found.signatures["ter"] == str(ter.get_signature()) and found.signatures["chrf"] == str(chrf.get_signature())
    assert weighted_translation(tokenize)(A, REFERENCES) == pytest.approx(expected)


def test_several_references_of_any_number():
    several = [[one, other] if i % 2 else [one] for i, (one, other) in enumerate(zip(REFERENCES, B, strict=True))]
    second = [other if i % 2 else None for i, other in enumerate(B)]
    found = translation(A, several)
    assert found.values["bleu"] == BLEU().corpus_score(A, [REFERENCES, second]).score > translation(A, REFERENCES).values["bleu"]
    assert "nrefs:var" in found.signatures["chrf"]
    assert weighted_translation()(A, several) == pytest.approx(found.values)


def test_the_bootstrap_is_sacrebleus_own():
    """Its own resampling starts from the seed 12345 and draws as ours does: mean and half width of the same scores."""
    found = bootstrap(weighted_translation(), A, REFERENCES, n=400, seed=12345)
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF()), ("ter", TER())):
        theirs = metric.corpus_score(A, [REFERENCES], n_bootstrap=400)
        assert found[name].value == pytest.approx(theirs.score)
        assert (found[name].high - found[name].low) / 2 == pytest.approx(theirs._ci, rel=0.03), "theirs takes no quantile between"


def test_the_paired_tests_are_sacrebleus_own(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    metrics = {"BLEU": BLEU(), "chrF2": CHRF()}
    _, theirs = PairedTest([("b", B), ("a", A)], metrics, [REFERENCES], test_type="ar", n_samples=500)()
    ours = approximate_randomisation(weighted_translation(), B, A, REFERENCES, n=500, seed=12345)
    assert ours["bleu"] == pytest.approx(theirs["BLEU"][1].p_value) and ours["chrf"] == pytest.approx(theirs["chrF2"][1].p_value)
    _, theirs = PairedTest([("b", B), ("a", A)], metrics, [REFERENCES], test_type="bs", n_samples=500)()
    ours = paired(weighted_translation(), A, B, REFERENCES, n=500, seed=12345)
    assert ours["bleu"].difference == pytest.approx(theirs["BLEU"][1].score - theirs["BLEU"][0].score)
    assert ours["bleu"].low > 0 and ours["bleu"].p < 0.05 and theirs["BLEU"][1].p_value < 0.05


def test_empty_texts_and_other_scripts_have_scores():
    assert translation([""], ["a b"]).values == {"bleu": 0, "chrf": 0, "ter": 100}
    assert translation(["a b"], [""]).values["bleu"] == 0
    assert translation(["", ""], ["", ""]).values["ter"] == 0
    assert translation(["我 爱 你。"], ["我爱你。"], "zh").values == pytest.approx({"bleu": 100, "chrf": 100, "ter": 0})


def test_japanese_is_cut_into_words_by_mecab():
    pytest.importorskip("MeCab")
    pytest.importorskip("ipadic")
    found = translation(["私は猫です。"], ["私は猫だ。"], "ja-mecab")
    assert "tok:ja-mecab" in found.signatures["bleu"] and found.values["ter"] == pytest.approx(20), "one character of five"


def test_a_missing_tokenizer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)
    with pytest.raises(ValueError, match=r"^tokenize 'ja-mecab' needs what is not here: pip install 'sacrebleu\[ja\]'$"):
        translation(["猫"], ["猫"], "ja-mecab")


REFERENCES_BY_SCRIPT = {
    "zh": ["昨天天气很好，我们去公园玩了一天。", "他在 Microsoft 工作了三年。"],
    "13a": ["Yesterday the weather was fine.", "Das Wetter war gestern schön, sagte 王."],
    "ja-mecab": ["昨日は天気が良かったので、公園に行きました。", "コンピュータを買った。"],
    "ko-mecab": ["어제 날씨가 좋아서 공원에 갔습니다.", "그는 3년 동안 일했다."],
    "char": ["เมื่อวานอากาศดีมาก", "ເຂົາເຮັດວຽກ"],
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("expected", REFERENCES_BY_SCRIPT)
def test_the_tokenizer_follows_the_references_script(expected, there, monkeypatch):
    monkeypatch.setattr("jaxlm.metrics.texts._there", lambda name: there or name in ("zh", "char", "13a"))
    instead = {"ja-mecab": "char", "ko-mecab": "13a"}.get(expected, expected)
    chosen = choose_tokenizer([[text, text] for text in REFERENCES_BY_SCRIPT[expected]])
    assert chosen.name == (expected if there else instead)
    assert ("is not installed (pip install" in chosen.reason) == (chosen.name != expected)


@pytest.mark.parametrize("tokenize", ["zh", "13a", "char"])
def test_detected_scores_are_sacrebleus_and_so_are_those_of_resamples(tokenize):
    references = REFERENCES_BY_SCRIPT[tokenize] * 4
    texts = [text[: 2 * len(text) // 3] + text[: len(text) // 4] for text in references]
    found = translation(texts, references)
    bleu = BLEU(tokenize=tokenize)
    assert found.values["bleu"] == bleu.corpus_score(texts, [references]).score > 20
    assert found.signatures["bleu"] == str(bleu.get_signature()) and f"|tok:{tokenize}|" in found.signatures["bleu"]
    quick = bootstrap(weighted_translation(), texts, references, n=20)
    slow = bootstrap(lambda *arrays: translation(*arrays).values, texts, references, n=20)
    for name, interval in quick.items():
        assert interval == pytest.approx(slow[name]), name


def test_a_named_tokenizer_is_taken_whatever_the_script():
    """It is BLEU's alone: TER goes by the references, in which one wrong character of five is one edit of five."""
    assert choose_tokenizer(["天气很好"], "13a") == ("13a", "")
    for tokenize in ("zh", "none", "intl", "13a"):  # flores200 is one of these, but needs a download
        for text, reference in (("我今天很好", "我今天很忙"), ("学校に行きまし", "学校に行った。")):
            theirs = TER(normalized=True, asian_support=True)
            found = translation([text], [reference], tokenize)
            assert found.values["ter"] == theirs.corpus_score([text], [[reference]]).score
            assert found.signatures["ter"] == str(theirs.get_signature())
    assert translation(["我今天很好"], ["我今天很忙"], "none").values["ter"] == pytest.approx(20)
    assert "norm:no" in translation(["ไปตลาด"], ["ไปตลาด"], "none").signatures["ter"], "sacrebleu has no words for Thai"
    assert (
        translation(["天气很好"], ["天气不好"], "13a").values["bleu"]
        == 0
        < translation(["天气很好了"], ["天气很好吗"]).values["bleu"]
    )


# --- summaries -------------------------------------------------------------------------------


def lines(seed, n):
    return ["\n".join(sentences(seed + i, 3)) for i in range(n)]


def test_rouge_is_rouge_scores():
    texts, references, others = lines(0, 8), lines(100, 8), lines(200, 8)
    texts[0] = references[1] = ""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    found = summarisation(texts, references)
    theirs = [scorer.score(truth, text) for truth, text in zip(references, texts, strict=True)]
    assert found.values == pytest.approx({k: 100 * np.mean([each[k].fmeasure for each in theirs]) for k in theirs[0]})
    assert found.values["rougeLsum"] > found.values["rougeL"] > found.values["rouge2"] > 0
    assert found.signatures["rougeL"].startswith("nrefs:1|words:latin|stem:porter|mean:texts|rouge-score:")
    assert weighted_summarisation()(texts, references) == pytest.approx(found.values)
    both = summarisation(texts, list(zip(references, others, strict=True)))
    best = [
        [scorer.score(truth, text)["rouge2"].fmeasure for truth in two]
        for *two, text in zip(references, others, texts, strict=True)
    ]
    assert both.values["rouge2"] == pytest.approx(100 * np.mean(np.max(best, axis=1))) and "nrefs:2" in both.signatures["rouge1"]


def test_every_script_has_words():
    assert _Unicode().tokenize("你好, World2 x_y") == ["你", "好", "world2", "x", "y"]
    assert _Unicode().tokenize("हिन्दी में · Straße · cafe\u0301") == ["हिन्दी", "में", "straße", "café"], "marks belong to letters"
    assert _Unicode().tokenize("ไทย") == ["ไ", "ท", "ย"] and _Unicode().tokenize("カタカナ です") == list("カタカナです")
    assert _Unicode().tokenize("\u0301\u0301 !") == [] == _Unicode().tokenize("")
    found = summarisation(["我爱猫"], ["我爱狗"])
    assert found.values == pytest.approx({"rouge1": 200 / 3, "rouge2": 50, "rougeL": 200 / 3, "rougeLsum": 200 / 3})
    assert "words:unicode|stem:none" in found.signatures["rouge1"]
    assert summarisation(["我爱猫"], ["我爱狗"], words="latin").values["rouge1"] == 0, "what rouge-score makes of it alone"
    mixed = summarisation(["2024 我爱猫"], ["2024 我爱猫和你们大家"])
    assert "words:unicode" in mixed.signatures["rouge1"], "five digits do not make a text Latin"
    assert "words:latin" in summarisation(["naïve"], ["a naïve café"]).signatures["rouge1"]
    assert "words:latin" in summarisation([""], [""]).signatures["rouge1"]


@pytest.mark.realdata
def test_rouge_155_published_scores(data):
    folder = data / "ref-rouge"
    texts, references = (folder.joinpath(f"{name}_large.txt").read_text().splitlines() for name in ("prediction", "target"))
    with (folder / "expected_aggregate_rouge155.csv").open() as file:
        wanted = {(row["unit"], row["metric"]): row for row in csv.DictReader(file) if row["stemming"] == "yes"}
    found = bootstrap(weighted_summarisation(), texts, references)
    for metric in ("rouge1", "rougeL"):
        row = wanted["lines", metric]
        expected = [100 * float(row[f"f_{bound}"]) for bound in ("mid", "low", "high")]
        assert found[metric] == pytest.approx(expected, abs=0.2), "ROUGE-1.5.5 and its bootstrap"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: translation([], []), "no predictions to score"),
        (lambda: summarisation([], []), "no predictions to score"),
        (lambda: translation(["a"], ["a", "b"]), "predictions and references differ in number: 1 and 2"),
        (lambda: translation(["a", "b"], [["a"], []]), "text 1 has no reference"),
        (
            lambda: translation(["a"], ["a"], "13b"),
            "unknown tokenize '13b': did you mean '13a'? allowed: auto, 13a, intl, zh, ja-mecab, ko-mecab, flores101, "
            "flores200, char, none",
        ),
        (lambda: summarisation(["a"], ["a"], words="greek"), "unknown words 'greek': allowed: auto, latin, unicode"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize(
    "text, script",
    [
        ("ꀀꀁ ꆈꌠ", "spaceless"),
        ("ㄅㄆㄇ", "Chinese"),
        ("မြန်မာ", "spaceless"),
        ("ស្រី", "spaceless"),
        ("བོད་སྐད", "spaced"),
        ("हिन्दी", "spaced"),
    ],
)
def test_scripts_without_spaces(text, script):
    assert script_of([text]) == script
