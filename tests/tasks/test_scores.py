"""What the scores of a task say about themselves: the positive class, scores of each class, how texts were cut."""

import json
import re

import numpy as np
import pytest
from sklearn.metrics import classification_report, precision_recall_fscore_support, roc_auc_score

from jaxlm.data import TokenizerConfig, train_tokenizer
from jaxlm.tasks import TASKS, Examples, Passed, Predictor, TaskConfig, write_predictions

TOKENIZER = train_tokenizer(TokenizerConfig("bytes", special=("pad", "cls", "sep", "mask")), [])


def task(kind, labels=(), **config):
    return TASKS[kind](TaskConfig(kind=kind, **config), TOKENIZER, 32, labels=labels)


def classified(labels, n=60, seed=0):
    """Rows and predictions of a classifier that is right most of the time."""
    rng = np.random.default_rng(seed)
    rows, predictions = [], []
    for _ in range(n):
        truth = labels[rng.integers(len(labels))]
        scores = rng.dirichlet(np.ones(len(labels))) + 0.7 * np.array([name == truth for name in labels])
        scores /= scores.sum()
        named = dict(zip(labels, scores.tolist(), strict=True))
        best = max(named, key=named.get)
        rows.append({"text": "a text", "label": truth})
        predictions.append({"label": best, "probability": named[best], "probabilities": named})
    return rows, predictions


@pytest.mark.parametrize(
    ("labels", "option", "positive"),
    [
        (("ham", "spam"), None, "spam"),
        (("ham", "spam"), "ham", "ham"),
        (("positive", "negative"), None, "positive"),  # the order of the model that it was trained from
        (("negative", "positive"), None, "positive"),
        (("Yes", "No"), None, "Yes"),
        (("0", "1"), None, "1"),
        (("1", "2"), None, "1"),
        (("1", "true"), None, "true"),  # both are called so: the second
    ],
)
def test_the_positive_class_is_named_and_its_scores_are_scikit_learns(labels, option, positive, tmp_path):
    of = task("classification", labels, positive=option)
    rows, predictions = classified(labels)
    told = write_predictions(tmp_path, "t", of, rows, predictions)
    assert of.positive == positive and told["positive class"].startswith(positive)
    truth, guess = [row["label"] for row in rows], [p["label"] for p in predictions]
    expected = precision_recall_fscore_support(truth, guess, pos_label=positive, average="binary")[:3]
    scores = json.loads((tmp_path / "scores.json").read_text())
    for name, value in zip(("precision", "recall", "f1"), expected, strict=True):
        assert scores[name]["value"] == pytest.approx(value) and f"{name} ({positive})" in told and name not in told
    probabilities = [p["probabilities"][positive] for p in predictions]
    assert scores["auroc"]["value"] == pytest.approx(roc_auc_score([t == positive for t in truth], probabilities))


def test_what_has_no_positive_class():
    assert task("classification", ("a", "b", "c")).positive is None
    with pytest.raises(ValueError, match="unknown positive class 'spa': did you mean 'spam'"):
        _ = task("classification", ("ham", "spam"), positive="spa").positive
    with pytest.raises(ValueError, match="positive 'a' is for classification"):
        TaskConfig(kind="tagging", positive="a")
    with pytest.raises(ValueError, match="tokenize zh is for the BLEU"):
        TaskConfig(kind="chat", tokenize="zh")


def test_no_prediction_is_read_off_outputs_that_are_no_numbers():
    """argmax of NaN is 0: a broken model would be right wherever the first choice or tag is."""
    of = task("multiple_choice")
    predictor = Predictor.__new__(Predictor)
    predictor.task = of
    predictor.run = lambda *args, **options: Passed(0.0, {}, [{"p": np.ones(2)}, {"p": np.array([1, np.nan])}])
    with pytest.raises(ValueError, match=r"the model's outputs for 1 of 2 texts are NaN, the first for row 2: "):
        predictor.predict(None, [{}, {}], Examples([{}, {}], np.arange(2)))


def test_which_scores_depend_on_an_option():
    """What `jaxlm evaluate` refuses of a run that is scored otherwise."""
    read = [(labels, task("classification", labels).scoring_options["positive"]) for labels in (("a", "b"), ("a", "b", "c"))]
    assert [when is None for _, when in read] == [True, False]
    by = {
        scores: task("text_to_text", scores=scores).scoring_options
        for scores in ("auto", "translation", "summarisation", "answers")
    }
    assert [name for name, options in by.items() if options["tokenize"] is None] == ["auto", "translation"]
    assert all(options["positive"] for options in by.values()) and all(task("tagging", ("O", "B-x")).scoring_options.values())


def shown(page):
    """Rows of the table of classes in a page."""
    table = page.partition("Scores of each class")[2].partition("</table>")[0]
    return {row[0]: row[1:] for row in re.findall("<tr>" + "<td>(.*?)</td>" * 5, table)}


def expected_rows(report):
    return {
        name: (f"{row['precision']:.4f}", f"{row['recall']:.4f}", f"{row['f1-score']:.4f}", f"{int(row['support']):,}")
        for name, row in report.items()
        if isinstance(row, dict) and name not in ("micro avg", "samples avg")
    }


@pytest.mark.parametrize("labels", [("ham", "spam"), ("a", "b", "c"), ("a", "b", "c", "never")])
def test_the_page_has_the_classification_report(labels, tmp_path):
    of = task("classification", labels)
    rows, predictions = classified(labels[:3])
    for each in predictions:
        each["probabilities"] = {name: each["probabilities"].get(name, 0.0) for name in labels}
    write_predictions(tmp_path, "t", of, rows, predictions)
    truth, guess = [row["label"] for row in rows], [p["label"] for p in predictions]
    report = classification_report(truth, guess, labels=labels, output_dict=True, zero_division=0)
    assert shown((tmp_path / "scores.html").read_text()) == expected_rows(report)


def test_the_page_has_the_report_of_several_classes_a_row(tmp_path):
    labels, rng = ("x", "y", "z"), np.random.default_rng(1)
    of = task("multilabel", labels)
    truth, scores = rng.random((40, 3)) < 0.4, rng.random((40, 3))
    rows = [{"text": "t", "labels": [name for name, yes in zip(labels, row, strict=True) if yes]} for row in truth]
    predictions = [{"labels": [], "probabilities": {name: float(p) for name, p in zip(labels, row, strict=True)}} for row in scores]
    write_predictions(tmp_path, "t", of, rows, predictions)
    report = classification_report(truth, scores >= 0.5, target_names=labels, output_dict=True, zero_division=0)
    assert shown((tmp_path / "scores.html").read_text()) == expected_rows(report)


@pytest.mark.parity
def test_the_page_has_the_report_of_spans(tmp_path):
    from seqeval.metrics import classification_report as of_spans

    of = task("tagging", ("O", "B-PER", "I-PER", "B-LOC"))
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "B-PER", "O"]]
    guess = [["B-PER", "O", "O", "B-LOC"], ["O", "B-LOC", "B-PER", "B-LOC"]]
    rows = [{"tokens": list("abcd"), "tags": tags} for tags in truth]
    write_predictions(tmp_path, "t", of, rows, [{"tags": tags, "probabilities": [1.0] * 4} for tags in guess])
    report = of_spans(truth, guess, output_dict=True, zero_division=0)
    assert shown((tmp_path / "scores.html").read_text()) == expected_rows(report)


@pytest.mark.parametrize(("tokenize", "expected"), [("auto", "zh"), ("char", "char"), ("13a", "13a")])
def test_bleu_is_cut_as_its_references_are_written_and_that_is_said(tokenize, expected, tmp_path):
    import sacrebleu

    of = task("text_to_text", tokenize=tokenize)
    references = ["昨天天气很好，我们去公园玩了一天。", "他在那家公司工作了三年。"]
    texts = ["昨天天气很好，我们去公园玩。", "他在那家公司工作了五年。"]
    rows = [{"source": "s", "target": target} for target in references]
    told = write_predictions(tmp_path, "t", of, rows, [{"text": text} for text in texts])
    bleu = sacrebleu.metrics.BLEU(tokenize=expected)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["bleu"]["value"] == pytest.approx(bleu.corpus_score(texts, [references]).score)
    assert scores["bleu"]["signature"] == str(bleu.get_signature())
    assert told["BLEU's tokenizer"].startswith(expected)
    assert ("the references are Chinese" in told["BLEU's tokenizer"]) == (tokenize == "auto")


def test_answers_by_characters_are_said_to_be(tmp_path):
    of = task("extractive_qa")
    rows = [{"question": "q", "context": "c", "answers": {"text": ["红楼梦"], "answer_start": [0]}}]
    told = write_predictions(tmp_path, "t", of, rows, [{"answer": "红楼", "score": 1.0, "no_answer": -1.0}])
    assert told["f1"].startswith("80.0") and "CMRC 2018" in told["answers"]
