"""A run that starts from a model with a head over labels: the head's outputs keep their meaning, or start anew."""

import json

import jax
import numpy as np
import pytest

from jaxlm import cli, config
from jaxlm.data import TokenizerConfig, train_tokenizer
from jaxlm.experiment import Run, load_config
from jaxlm.hub import save_folder
from jaxlm.model import Model, TransformerConfig
from jaxlm.models import load_model, start_parameters
from jaxlm.tasks import label_order

ORDERS = [
    (("positive", "negative"), ("negative", "positive"), False, [1, 0]),
    (("POSITIVE", "NEGATIVE"), ("negative", "positive"), False, [1, 0]),
    (("a", "A"), ("A", "a"), False, [1, 0]),  # letter case tells them apart
    (("a", "A"), ("a", "b"), False, None),
    (("good", "bad"), ("negative", "positive"), True, None),
    (("good", "bad"), ("0", "1"), False, [0, 1]),
    (("1", "2"), ("0", "1"), False, None),  # its names are numbers: 0 is none of them
    (("LABEL_0", "LABEL_1"), ("bad", "good"), False, None),
    (("LABEL_0", "LABEL_1"), ("good", "bad"), True, [0, 1]),
    (("a", "b", "c"), ("a", "b"), False, None),
    ((), ("a", "b"), False, None),
]


@pytest.mark.parametrize("source, labels, ordered, expected", ORDERS)
def test_labels_are_matched_with_those_of_the_source(source, labels, ordered, expected):
    assert label_order(source, labels, ordered) == expected


SIZES = """architecture: encoder, positions: 32, layers: 1, width: 16, heads: 2, norm_position: post, embedding_norm: true,
 token_types: 2"""
CONFIG = """
task: {{kind: {kind}}}
model: {{{model}}}
data: {{train: rows.jsonl, validation: rows.jsonl, length: 32, batch_size: 8{tokenizer}}}
train: {{steps: 1, sample_tokens: 0}}
"""
NAMES = ("c", "a", "b")
COLUMNS = {"classification": "label", "multilabel": "labels", "tagging": "tags"}


def write_rows(file, kind, names):
    rows = []
    for name in names * 4:
        text = {"tokens": ["one", "two"]} if kind == "tagging" else {"text": f"one {name}"}
        rows.append({**text, COLUMNS[kind]: {"classification": name, "multilabel": [name], "tagging": [name, name]}[kind]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", params=COLUMNS)
def source(request, tmp_path_factory):
    """A Hugging Face folder whose labels are not in the alphabet's order, with rows and configs."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(TokenizerConfig("bytes", special=("pad", "cls", "sep", "mask")), [])
    tokenizer.save(folder / "tokenizer")
    head = {"kind": "token" if kind == "tagging" else "sequence", "labels": 3, "dense": kind != "tagging", "activation": "tanh"}
    sizes = config.read(config.Text(f"{{{SIZES}}}"))
    model = Model(config.build(TransformerConfig, {**sizes, "vocab_size": tokenizer.vocab_size, "head": head}))
    params = model.init(jax.random.key(7))
    like = {"id2label": {str(i): name for i, name in enumerate(NAMES)}, "label2id": {name: i for i, name in enumerate(NAMES)}}
    save_folder(folder / "source", model, params, tokenizer=folder / "tokenizer", like=like)
    write_rows(folder / "rows.jsonl", kind, ("b", "a", "c"))
    write_rows(folder / "others.jsonl", kind, ("x", "y", "z"))
    write_rows(folder / "fewer.jsonl", kind, ("b", "a"))
    (folder / "next.yaml").write_text(CONFIG.format(kind=kind, model="init_from: source", tokenizer=""))
    return folder, np.asarray(params["head"]["out"]["kernel"])


def start_of(*flags):
    """Labels of a run that starts from the folder, its model and the outputs that its head starts with."""
    run = Run(load_config("next.yaml", config.parse_flags(flags)).value)
    model, given = run.job.model(), run.config.model.init_from
    params = start_parameters(given, model, run.mesh, 0, run.job.labels, bool(run.config.task.labels))
    return run.job.labels, model, np.asarray(params["head"]["out"]["kernel"])


def test_the_same_labels_keep_their_outputs(source, monkeypatch, capsys):
    folder, outputs = source
    monkeypatch.chdir(folder)
    labels, _, started = start_of()
    assert labels == NAMES
    np.testing.assert_array_equal(started, outputs)
    # Named in another order, they take their outputs along.
    labels, _, started = start_of("--task.labels", "[a, b, c]")
    assert labels == ("a", "b", "c")
    np.testing.assert_array_equal(started, outputs[:, [1, 2, 0]])
    assert "start anew" not in capsys.readouterr().out


@pytest.mark.parametrize("rows", ["others", "fewer"])
def test_other_labels_start_anew_and_that_is_said(source, rows, monkeypatch, capsys):
    folder, _ = source
    monkeypatch.chdir(folder)
    labels, model, started = start_of("--data.train", f"{rows}.jsonl", "--data.validation", f"{rows}.jsonl")
    assert labels == (("x", "y", "z") if rows == "others" else ("a", "b"))
    np.testing.assert_allclose(started, model.init(jax.random.key(0))["head"]["out"]["kernel"], rtol=1e-5)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "start anew" in line]
    assert "c, a, b" in line and ("""--task.labels '["c", "a", "b"]'""" in line) == (rows == "fewer")


def test_a_run_goes_on_from_a_runs_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", "classification", ("b", "a", "c"))
    tokenizer = ", tokenizer: {kind: bytes, special: [pad, cls, sep, mask]}"
    (tmp_path / "first.yaml").write_text(CONFIG.format(kind="classification", model=SIZES, tokenizer=tokenizer))
    (tmp_path / "next.yaml").write_text(CONFIG.format(kind="classification", model="init_from: runs/first", tokenizer=""))
    assert cli.main(["train", "first.yaml", "--task.labels", "[c, a, b]"]) == 0
    first = load_model("runs/first").params["head"]["out"]["kernel"]
    labels, _, started = start_of()
    assert labels == NAMES
    np.testing.assert_array_equal(started, first)
