"""What the outputs of a sequence head mean (softmax, sigmoid or a bare number), read from a config and written to it."""

import json

import jax
import numpy as np
import pytest

from jaxlm.config import build
from jaxlm.data import TokenizerConfig, train_tokenizer
from jaxlm.hub import save_folder
from jaxlm.model import Model, TransformerConfig
from jaxlm.models import Card, Trained, load_model, one_device, write_card
from jaxlm.tasks import Predictor

pytestmark = pytest.mark.parity
MEANINGS = {
    "single_label_classification": ("classification", 3, lambda x: np.exp(x) / np.exp(x).sum()),
    "multi_label_classification": ("multilabel", 3, lambda x: 1 / (1 + np.exp(-x))),
    "regression": ("regression", 1, lambda x: x),
}
PLAIN = {"activation": "tanh", "norm": False}
ROW = {"text": "a good film"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TokenizerConfig("bytes", special=("pad", "cls", "sep", "mask")), []).save(folder)
    return folder


def outputs_of(trained):
    """What is predicted for the row, as an array."""
    task = trained.task()
    prediction = Predictor(task, trained.model, trained.mesh, 1).predict(trained.params, [ROW])[0]
    return task, np.array([prediction["value"]] if "value" in prediction else list(prediction["probabilities"].values()))


def scores_of(folder):
    """What transformers' own pipeline gives for the row, in the order of the labels."""
    from transformers import pipeline

    found = pipeline("text-classification", model=str(folder), top_k=None)([ROW["text"]])[0]
    config = json.loads((folder / "config.json").read_text())
    return np.array([next(each["score"] for each in found if each["label"] == config["id2label"][i]) for i in config["id2label"]])


@pytest.mark.parametrize("problem", MEANINGS)
def test_a_folders_problem_type_decides_what_its_outputs_mean(problem, tokenizer, tmp_path):
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    kind, labels, meaning = MEANINGS[problem]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    theirs = BertForSequenceClassification(
        BertConfig(vocab_size=261, **sizes, initializer_range=0.5, num_labels=labels, problem_type=problem, pad_token_id=257)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    for file in tokenizer.iterdir():
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    trained = load_model(str(tmp_path / "theirs"))
    task, outputs = outputs_of(trained)
    assert task.config.kind == kind
    ids = torch.tensor(task.examples([ROW]).items[0]["tokens"][None], dtype=torch.long)
    with torch.no_grad():
        np.testing.assert_allclose(outputs, meaning(theirs(ids).logits[0].numpy()), atol=1e-4)
    save_folder(tmp_path / "ours", trained.model, trained.params, tokenizer=tokenizer, like=trained.json())
    assert json.loads((tmp_path / "ours/config.json").read_text())["problem_type"] == problem
    np.testing.assert_allclose(scores_of(tmp_path / "ours"), scores_of(tmp_path / "theirs"), atol=1e-4)


@pytest.mark.parametrize("problem", MEANINGS)
def test_a_run_is_exported_with_what_its_outputs_mean(problem, tokenizer, tmp_path):
    kind, labels, meaning = MEANINGS[problem]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(f"task: {{kind: {kind}}}\ndata: {{length: 32}}")
    write_card(tmp_path / "run", Card(() if kind == "regression" else ("x", "y", "z")))
    sizes = {"preset": "bert-tiny", "vocab_size": 261, "positions": 32, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16}
    model = Model(build(TransformerConfig, {**sizes, "head": {"kind": "sequence", "labels": labels, **PLAIN}}))
    params = jax.tree.map(lambda leaf: leaf * 9, model.init(jax.random.key(1)))
    trained = Trained(model, params, one_device(), "run", tokenizer, run=tmp_path / "run")
    save_folder(tmp_path / "ours", model, params, tokenizer=tokenizer, like=trained.json())
    assert json.loads((tmp_path / "ours/config.json").read_text())["problem_type"] == problem
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tmp_path / "ours")(ROW["text"], return_tensors="pt").input_ids
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_allclose(scores_of(tmp_path / "ours"), meaning(theirs(ids).logits[0].detach().numpy()), atol=1e-4)


def test_a_meaning_that_no_task_has_is_refused(tokenizer, tmp_path):
    sizes = {"preset": "bert-tiny", "vocab_size": 261, "positions": 32, "width": 16, "layers": 1, "heads": 2, "mlp_width": 16}
    model = Model(build(TransformerConfig, {**sizes, "head": {"kind": "sequence", "labels": 2, **PLAIN}}))
    folder = save_folder(tmp_path / "m", model, model.init(jax.random.key(1)), tokenizer=tokenizer)
    file = folder / "config.json"
    for problem, said in (("regression", "has 2 outputs"), ("ranking", "problem_type")):
        file.write_text(json.dumps({**json.loads(file.read_text()), "problem_type": problem}))
        with pytest.raises(ValueError, match=said):
            load_model(str(folder)).task()
    file.write_text(json.dumps({**json.loads(file.read_text()), "problem_type": None}))
    with pytest.raises(ValueError, match="head span"):
        load_model(str(folder)).task("extractive_qa")
