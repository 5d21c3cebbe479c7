"""Every task learns from rows, scores itself, and predicts: a small model on rows that can be learned by heart."""

import json
import random

import numpy as np
import pytest

from jaxlm import cli
from jaxlm import config as configs
from jaxlm.experiment import Run, load_config
from jaxlm.report import read_rows
from jaxlm.tasks import TASKS as KNOWN

WORDS = ["red", "green", "blue", "round", "square", "big", "small", "old", "new", "warm"]
ENDS = ["good", "fine", "great", "bad", "poor", "awful", "what"]
GOOD, BAD = ["good", "fine", "great"], ["bad", "poor", "awful"]


def sentence(rng, *more):
    words = [*rng.sample(WORDS, 3), *more]
    rng.shuffle(words)
    return " ".join(words)


def rows_of(kind, n):
    """Rows whose answer follows from a word or two."""
    rng = random.Random(0)
    made = []
    for i in range(n):
        good = i % 2 == 0
        word = rng.choice(GOOD if good else BAD)
        text = sentence(rng, word)
        other = sentence(rng, rng.choice(BAD if good else GOOD))
        colours = [c for c in ("red", "green", "blue") if c in text]
        made.append({
            "classification": {"text": text, "label": "yes" if good else "no"},
            "multilabel": {"text": text, "labels": colours},
            "regression": {"text": text, "label": 1.0 if good else -1.0},
            "tagging": {"tokens": text.split(), "tags": ["B-X" if w in GOOD + BAD else "O" for w in text.split()]},
            "extractive_qa": {"question": "which?", "context": text, "answers": word},
            "multiple_choice": {"question": "which is good?", "choices": [text, other], "label": 0 if good else 1},
            "text_to_text": {"source": text, "target": word},
            "chat": {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": word}]},
            "embedding": {"text": f"{WORDS[i % 10]} {ENDS[i // 10 % 7]}", "pair": f"{ENDS[i // 10 % 7]} {WORDS[i % 10]}"},
            "preference": {"prompt": text, "chosen": " good", "rejected": " bad"},
            "reward": {"prompt": text, "chosen": " good fine", "rejected": " bad poor"},
        }[kind])  # fmt: skip
    return made


def words(folder):
    """A tokenizer whose tokens are the words of the rows."""
    import tokenizers
    import transformers

    known = [*WORDS, *GOOD, *BAD, *["User", "Assistant", "which", "what", "is", ":", "?"]]
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[EOS]"}
    names = {word: i for i, word in enumerate([*special.values(), *known])}
    rust = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="[UNK]"))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=rust, **special).save_pretrained(str(folder))
    return folder


ENCODER = {"architecture": "encoder", "norm_position": "post", "embedding_norm": True, "position": "learned", "token_types": 2}
SEQ2SEQ = {"architecture": "encoder_decoder", "position": "relative", "norm": "rmsnorm", "bias": False}
DECODER = {"architecture": "decoder", "position": "rotary", "norm": "rmsnorm", "bias": False}
# Task → architecture, what is learned within the steps (score, least value), steps
TASKS = {
    "classification": (ENCODER, "accuracy", 0.9, 60),
    "classification by a decoder": (DECODER, "accuracy", 0.9, 60),
    "multilabel": (ENCODER, "f1_micro", 0.85, 150),
    "regression": (ENCODER, "pearson", 0.8, 150),
    "tagging": (ENCODER, "f1", 0.9, 60),
    "extractive_qa": (ENCODER, "f1", 80, 120),
    "multiple_choice": (ENCODER, "accuracy", 0.8, 120),
    "text_to_text": (SEQ2SEQ, "exact", 80, 150),
    "text_to_text by a decoder": (DECODER, "exact", 80, 300),
    "chat": (DECODER, "rouge1", 70, 200),
    "embedding": (ENCODER, "mrr@10", 0.7, 80),
    "preference": (DECODER, "accuracy", 0.9, 30),
    "reward": (ENCODER, "accuracy", 0.9, 40),
}


def rows_in(name):
    """A decoder learns from more rows to find its word in a text."""
    return 256 if name == "text_to_text by a decoder" else 64


def prepare(name, folder):
    """The config of a task's run, in a folder with its rows."""
    kind, (model, _, _, steps) = name.split(" by ")[0], TASKS[name]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind, rows_in(name))), encoding="utf8")
    tree = {
        "task": {"kind": kind},
        "model": {**model, "positions": 96, "layers": 2, "width": 32, "heads": 2, "init_std": 0.1},
        "data": {
            "train": str(folder / "rows.jsonl"), "length": 96, "batch_size": 16, "holdout": {"fraction": 0.2},
            "tokenizer": {"kind": "huggingface", "path": str(words(folder / "words"))},
        },
        "optim": {"learning_rate": 3e-3, "warmup": 5, "schedule": "constant", "weight_decay": 0.0},
        "train": {"steps": steps, "eval_every": steps, "log_every": 10},
        "runs": str(folder / "runs"),
    }  # fmt: skip
    if kind in ("text_to_text", "chat", "preference"):
        tree["train"]["loss_chunk"] = 16
    if kind in ("text_to_text", "chat"):
        tree["task"]["decode"] = {"max_tokens": 4}
    if kind == "embedding":
        tree["task"]["temperature"] = 0.1
    if kind == "text_to_text":
        tree["task"] |= {"target_length": 8, "scores": "answers"}
        tree["data"]["rows"] = {"columns": {"answers": "target"}}
    file = folder / "task.yaml"
    configs_yaml = json.dumps(tree)
    file.write_text(configs_yaml, encoding="utf8")
    return file


@pytest.mark.parametrize(
    "name",
    [name if name in ("classification", "text_to_text") else pytest.param(name, marks=pytest.mark.slow) for name in TASKS],
)
def test_a_task_learns_scores_and_predicts(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kind, (_, score, least, _) = name.split(" by ")[0], TASKS[name]
    file = prepare(name, tmp_path)
    run = Run(load_config(file, {}).value)
    assert run.train() == "finished"
    folder = run.folder
    scores = json.loads((folder / "scores.json").read_text(encoding="utf8"))
    assert scores[score]["value"] >= least, scores
    assert scores[score]["low"] <= scores[score]["value"] <= scores[score]["high"]
    losses = [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert np.mean(losses[-2:]) < losses[0]
    evaluated = next(row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval")
    assert {"kind", "step", *run.job.score_names()} == evaluated.keys(), "known before the first step"
    # The same command again has nothing to do.
    assert Run(load_config(file, {}).value).finished
    # From the folder alone: predictions for a file, and the scores of the rows that were held out.
    capsys.readouterr()
    given = tmp_path / "rows.jsonl"
    if kind == "reward":  # of one text
        given = tmp_path / "texts.jsonl"
        given.write_text("".join(json.dumps({"text": "red good"}) + "\n" for _ in range(rows_in(name))))
    assert cli.main(["predict", str(folder), "--file", str(given), "--out", "out.jsonl"]) == 0
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf8").splitlines()]
    assert len(made) == rows_in(name) and all(row["prediction"] for row in made)
    assert cli.main(["evaluate", str(folder), "--out", "evaluation"]) == 0
    again = json.loads((tmp_path / "evaluation" / "scores.json").read_text(encoding="utf8"))
    assert again[score]["value"] == pytest.approx(scores[score]["value"], abs=1e-3)
    assert (tmp_path / "evaluation" / "scores.html").is_file()
    if kind == "chat":  # over the assistant's turns, as the loss that training recorded for the same rows
        best = min((row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval"), key=lambda row: row["loss"])
        assert again["perplexity"]["value"] == pytest.approx(best["perplexity"], rel=1e-3)
        assert 1 < again["perplexity"]["low"] <= again["perplexity"]["value"] <= again["perplexity"]["high"]
    # Beside itself no test sees a difference.
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--out", "again", "--against", "evaluation/predictions.jsonl"]) == 0
    out = capsys.readouterr().out
    assert f"{score} less the other's: +0.0000 (+0.0000 to +0.0000), p = 1" in out
    custom = {"classification": "McNemar's exact test (accuracy)", "text_to_text": f"approximate randomisation ({score})"}
    assert f"{custom[kind]}: p = 1\n" in out if kind in custom else "exact test" not in out and "randomisation" not in out
    assert ("calibrates these rows" in out) == (kind == "classification")
    if kind == "classification":  # "zip() argument 2 is longer than argument 1"
        (folder / "task.json").unlink()
        assert cli.main(["predict", str(folder), "--text", "red"]) == 1
        assert "task.json must name the 2 labels of the model, and names 0" in capsys.readouterr().err


def test_a_passage_of_several_questions_is_one_candidate():
    """Three questions, two of one passage: each finds its own first, though two have the same."""
    task = KNOWN["embedding"].__new__(KNOWN["embedding"])
    rows = [{"text": text, "pair": pair} for text, pair in (("a", "P"), ("b", "P"), ("c", "Q"))]
    vectors = {"P": [1.0, 0.0], "Q": [0.0, 1.0]}
    found = task.statistic()([{"anchor": vectors[row["pair"]], "positive": vectors[row["pair"]]} for row in rows], rows)
    assert found["recall@1"] == found["mrr@10"] == 1


def test_every_task_is_tried():
    assert {name.split(" by ")[0] for name in TASKS} == set(KNOWN)


def test_text_config_round_trips(tmp_path):
    file = prepare("classification", tmp_path)
    value = load_config(file, {}).value
    assert configs.build(type(value), configs.to_dict(value)) == value
