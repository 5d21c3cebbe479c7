"""The README of an export: valid for the hub, and only what is known."""

import json
import math

import pytest
from huggingface_hub import ModelCard, metadata_load

from jaxlm import cli
from jaxlm.hub.model_card import CardFacts, Result, inherited, model_card

ROWS = "".join(
    json.dumps({"text": f"{word} film {i}", "label": label}) + "\n"
    for i in range(12)
    for word, label in (("good", "pos"), ("bad", "neg"))
)
CONFIG = """
task: {kind: classification}
model:
  {architecture: encoder, positions: 32, layers: 1, width: 16, heads: 2, norm_position: post, embedding_norm: true, token_types: 2}
data: {train: rows.jsonl, tokenizer: {kind: bytes, special: [pad, cls, sep, mask]}, length: 32, batch_size: 8, epochs: 1}
optim: {learning_rate: 3e-3, schedule: linear}
train: {sample_tokens: 0, eval_every: 2}
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run and its exported folder."""
    folder = tmp_path_factory.mktemp("card")
    (folder / "rows.jsonl").write_text(ROWS)
    (folder / "reviews.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "reviews.yaml"]) == 0
        assert cli.main(["export", "runs/reviews", "exported", "--license", "apache-2.0", "--language", "[en, de]"]) == 0
    return folder


def test_the_hub_reads_the_scores_of_a_run(exported):
    card = ModelCard.load(exported / "exported" / "README.md")
    scores = json.loads((exported / "runs/reviews/scores.json").read_text())
    results = {each.metric_type: each for each in card.data.eval_results}
    known = {name for name, each in scores.items() if math.isfinite(each["value"])}
    assert results.keys() == known and "accuracy" in known
    for name in known:
        assert results[name].metric_value == pytest.approx(scores[name]["value"], abs=1e-6)
        assert results[name].task_type == "text-classification" and results[name].dataset_name == "rows.jsonl"
    assert results["f1"].metric_name == "f1 (pos)"
    assert card.data.license == "apache-2.0" and card.data.language == ["en", "de"] and card.data.model_name == "reviews"
    accuracy = scores["accuracy"]
    assert f"| accuracy | {accuracy['value']:.4f} | {accuracy['low']:.4f} to {accuracy['high']:.4f} |" in card.text


def test_a_card_says_what_was_trained_on_with_what_settings(exported):
    text = ModelCard.load(exported / "exported" / "README.md").text
    assert "trained on rows.jsonl" in text and "Labels: neg, pos." in text
    for setting in ("| optim.learning_rate | 0.003 |", "| optim.schedule | linear |", "| data.batch_size | 8 |", "| seed | 0 |"):
        assert setting in text
    assert "## Training results" in text and "| jax | " in text
    assert str(exported) not in text, "no paths of this machine"


@pytest.mark.slow
def test_licence_and_language_are_those_of_the_model_that_it_was_trained_from(exported, monkeypatch):
    monkeypatch.chdir(exported)
    model = CONFIG.partition("model:")[2].partition("data:")[0]
    text = CONFIG.replace(model, " {init_from: exported}\n").replace(
        ", tokenizer: {kind: bytes, special: [pad, cls, sep, mask]}", ""
    )
    (exported / "next.yaml").write_text(text)
    assert cli.main(["train", "next.yaml"]) == 0 and cli.main(["export", "runs/next", "again"]) == 0
    metadata = metadata_load(exported / "again" / "README.md")
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["en", "de"]
    assert "It was trained from exported." in (exported / "again" / "README.md").read_text()
    assert "base_model" not in metadata, "a folder is no hub id"


def test_what_is_not_known_is_not_written(tmp_path):
    text = model_card("m", "gpt2", 1234, "float32", "text-generation", CardFacts(), "1.0")
    (tmp_path / "README.md").write_text(text)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["jaxlm"]}
    assert text.count("#") == 1 and "1,234 parameters" in text
    assert inherited(tmp_path) == inherited(tmp_path / "nothing") == CardFacts()


def test_names_of_any_kind_make_a_valid_card(tmp_path):
    results = (Result("f1", 'f1 (a: "b" | #c)', 0.5, 0.4, 0.6), Result("auroc", "auroc", math.nan))
    facts = CardFacts(
        base_model="org/base", datasets=("org/data",), dataset='my: "data"', split="test", results=results,
        settings={"task.template": "a: {b}\n| c"}, labels=("x: y", "- z"), language=("no",),
    )  # fmt: skip
    (tmp_path / "README.md").write_text(model_card("a: 'b' #1", "bert", 1, "float32", None, facts, "1"))
    card = ModelCard.load(tmp_path / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_name == results[0].title and result.dataset_name == facts.dataset and result.dataset_type == "org/data"
    assert card.data.base_model == "org/base" and card.data.language == ["no"] and card.data.model_name == "a: 'b' #1"
    assert "| a: {b} \\| c |" in card.text


def test_licences_and_languages_may_be_lists(tmp_path):
    for stated, licence in (("mit", "mit"), ("[mit]", "mit"), ("[mit, gpl-3.0]", "")):
        (tmp_path / "README.md").write_text(f"---\nlicense: {stated}\nlanguage: [en, de]\n---\n")
        assert inherited(tmp_path) == CardFacts(license=licence, language=("en", "de"))
