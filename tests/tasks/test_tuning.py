"""Runs that train a part of a pretrained model: what stays as it was, what comes back after a stop, what leaves as an adapter."""

import json

import jax
import numpy as np
import pytest

from jaxlm import cli
from jaxlm.experiment import Run, load_config
from jaxlm.models import load_model, model_config
from jaxlm.report import read_rows

ROWS = [f"{word} film number {i}\t{label}" for i in range(40) for word, label in (("good", "pos"), ("bad", "neg"))]
PRETRAIN = """
task: {kind: masked}
model:
  {architecture: encoder, positions: 32, layers: 2, width: 16, heads: 2, norm_position: post, embedding_norm: true, token_types: 2}
data: {sources: {kind: files, path: text.txt}, holdout: {by: tail}, tokenizer: {kind: bytes, special: [pad, cls, sep, mask]},
       length: 32, batch_size: 8}
train: {steps: 2}
"""
TUNE = """
task: {kind: classification}
model: {init_from: base}
data: {train: rows.tsv, rows: {header: [text, label]}, length: 32, batch_size: 16, epochs: 2}
optim: {learning_rate: 1e-2, warmup: 0.1, schedule: linear}
train: {log_every: 1, sample_tokens: 0}
"""
WAYS = {
    "adapters": ("--tune.train", "^head/", "--tune.lora.rank", "2"),
    "dora": ("--tune.train", "^head/", "--tune.lora.rank", "2", "--tune.lora.dora", "true"),
    "int8": ("--tune.train", "^head/", "--tune.lora.rank", "2", "--tune.base", "int8"),
    "head alone": ("--tune.train", "^head/"),
    "biases": ("--tune.train", "bias$|^head/"),
    "last layer": ("--tune.train", r"layers\.1/|^head/"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a pretrained encoder, as a run and as a Hugging Face folder, and rows."""
    folder = tmp_path_factory.mktemp("tuning")
    (folder / "text.txt").write_text("the film was good and the film was bad. " * 60)
    (folder / "rows.tsv").write_text("\n".join(ROWS))
    (folder / "pre.yaml").write_text(PRETRAIN)
    (folder / "tune.yaml").write_text(TUNE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("JAXLM_CACHE", str(folder / "cache"))
        assert cli.main(["train", "pre.yaml"]) == 0
        assert cli.main(["export", "runs/pre", "base"]) == 0
    return folder


def run(*flags):
    return Run(load_config("tune.yaml", cli.configs.parse_flags(flags)).value)


@pytest.mark.parametrize("way", [name if name in ("adapters",) else pytest.param(name, marks=pytest.mark.slow) for name in WAYS])
def test_what_is_frozen_stays_and_the_folder_gives_the_merged_model(base, way, monkeypatch):
    monkeypatch.chdir(base)
    name = way.replace(" ", "-")
    tuned = run("--name", name, *WAYS[way])
    assert tuned.train() == "finished"
    found = load_model(f"runs/{name}")
    start = load_model("base").params["transformer"]
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), found.params["transformer"], start)
    flat = {"/".join(k.key for k in path): value for path, value in jax.tree.leaves_with_path(changed)}
    assert not flat["embed/table"] and not flat["encoder/embed_norm/scale"]
    assert flat["encoder/layers/attention/query/kernel"] == (way in ("adapters", "dora", "int8", "last layer"))
    assert flat["encoder/layers/attention/query/bias"] == (way in ("biases", "last layer"))
    # What was scored in training is what the folder gives.
    scores = [row for row in read_rows(tuned.folder / "metrics.jsonl") if row["kind"] == "eval"]
    best = max(row["accuracy"] for row in scores)
    assert cli.main(["evaluate", f"runs/{name}", "--out", f"out-{name}"]) == 0
    again = json.loads((base / f"out-{name}" / "scores.json").read_text())
    told = json.loads((tuned.folder / "scores.json").read_text())  # at the end of training, of the best checkpoint
    assert again["accuracy"]["value"] == told["accuracy"]["value"] == pytest.approx(best)


@pytest.mark.slow
def test_a_run_with_adapters_and_an_average_goes_on_where_it_ended(base, monkeypatch):
    monkeypatch.chdir(base)
    flags = (*WAYS["adapters"], "--optim.average", "0.9")
    run("--name", "whole", *flags).train()
    run("--name", "parts", *flags, "--train.steps", "4").train()
    assert run("--name", "parts", *flags).train() == "finished"
    one, two = (load_model(f"runs/{name}").params for name in ("whole", "parts"))
    losses = [
        {row["step"]: row["loss"] for row in read_rows(base / "runs" / name / "metrics.jsonl") if row["kind"] == "train"}
        for name in ("whole", "parts")
    ]
    # Not equal numbers: the schedule of the first part was shorter. Equality after a stop is in tests/train/test_tune.py.
    assert losses[0].keys() == losses[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), one, two)


def test_adapters_leave_as_a_peft_folder_and_come_back(base, monkeypatch, tmp_path):
    monkeypatch.chdir(base)
    run("--name", "leaving", *WAYS["adapters"]).train()
    folder = tmp_path / "adapter"
    assert cli.main(["export", "runs/leaving", str(folder), "--adapter", "true"]) == 0
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "base" and said["task_type"] == "SEQ_CLS" and said["r"] == 2
    one, two = load_model("runs/leaving"), load_model(str(folder))
    assert one.tokenizer.definition() == two.tokenizer.definition() and two.tokenizer_folder == folder
    assert one.model.config.head == two.model.config.head
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one.params, two.params)
    assert model_config(str(folder)) == two.model.config
    with pytest.raises(ValueError, match="is an adapter: write the whole model first with: jaxlm export"):
        run("--model.init_from", str(folder))
    with pytest.raises(ValueError, match="no run"):
        from jaxlm.verbs.folders import export

        export(["base", str(tmp_path / "x"), "--adapter", "true"])


def test_seeds_are_runs_of_their_own_with_an_interval(base, monkeypatch, capsys):
    monkeypatch.chdir(base)
    assert cli.main(["train", "tune.yaml", "--name", "many", "--seeds", "2", "--train.steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "95% interval" in said and "over 2 seeds" in said
    assert (base / "runs/many-seed0/task.json").is_file() and (base / "runs/many-seed1/scores.html").is_file()


def test_training_stops_when_the_score_no_longer_rises(base, monkeypatch):
    monkeypatch.chdir(base)
    stopping = ("--name", "stopping", "--train.patience", "2", "--train.eval-every", "1", "--train.steps", "50")
    flags = (*stopping, "--optim.learning-rate", "1e-9")
    first = run(*flags)
    assert first.train() == "stopped"
    steps = [row["step"] for row in read_rows(first.folder / "metrics.jsonl") if row["kind"] == "eval"]
    assert steps == [1, 2, 3]
    assert run(*flags).finished


@pytest.mark.parity
def test_an_exported_classifier_keeps_its_labels_in_transformers(base, monkeypatch, tmp_path):
    import torch
    import transformers

    monkeypatch.chdir(base)
    run("--name", "labelled").train()
    assert cli.main(["export", "runs/labelled", str(tmp_path / "out")]) == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert theirs.config.id2label == {0: "neg", 1: "pos"}
    ours = load_model("runs/labelled")
    task = ours.task()
    (example,) = task.encoded(["a good film"])
    scores = ours.model.apply(ours.params, {"tokens_BL": example["tokens"][None], "segments_BL": example["segments"][None]})
    with torch.no_grad():
        logits = theirs(torch.tensor(example["tokens"][None].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(scores, logits, atol=1e-4)
