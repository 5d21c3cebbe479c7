"""A tokenizer with ids that the embedding table has no row for is refused wherever the model is opened; one that is much
smaller is reported."""

import json

import jax
import pytest

from jaxlm import cli
from jaxlm.config import build
from jaxlm.data import TextEncoder, TokenizerConfig, load_tokenizer, train_tokenizer
from jaxlm.hub import save_folder
from jaxlm.model import Model, TransformerConfig
from jaxlm.models import load_model

SMALL = {"positions": 16, "layers": 1, "width": 16, "heads": 4}
HEAD = {"kind": "sequence", "labels": 2, "activation": "tanh", "norm": False}


def write(folder, preset, vocabulary, **more):
    """A model with a table of so many rows and the tokenizer of bytes, which has 261 entries."""
    train_tokenizer(TokenizerConfig("bytes", special=("pad", "cls", "sep", "mask")), []).save(folder / "tokenizer")
    model = Model(build(TransformerConfig, {"preset": preset, **SMALL, "vocab_size": vocabulary, **more}))
    return save_folder(folder / preset, model, model.init(jax.random.key(0)), tokenizer=folder / "tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write(folder, "llama-1m", 260, kv_heads=4, mlp_width=16)
    write(folder, "bert-tiny", 260, mlp_width=16, head=HEAD)
    (folder / "rows.tsv").write_text("text\tlabel\n" + "a b\tx\nb a\ty\n" * 4)
    (folder / "tune.yaml").write_text(
        "task: {kind: classification}\nmodel: {init_from: bert-tiny}\ndata: {train: rows.tsv, length: 16}"
    )
    return folder


COMMANDS = {
    "generate": ["generate", "llama-1m", "--prompt", "a"],
    "predict": ["predict", "bert-tiny", "--text", "a"],
    "evaluate": ["evaluate", "bert-tiny", "--data", "rows.tsv"],
    "serve": ["serve", "llama-1m"],
    "classify": ["serve", "bert-tiny"],
    "diff": ["diff", "llama-1m", "llama-1m"],
    "train": ["train", "tune.yaml"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizer_larger_than_the_table_is_refused(folder, command, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert cli.main(COMMANDS[command]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "261 entries" in error and "table of the model 260" in error


@pytest.mark.parametrize("rows, warns", [(261, False), (264, False), (384, False), (400, True)])
def test_a_table_much_larger_than_the_tokenizer_is_reported(tmp_path, rows, warns, monkeypatch, capsys):
    monkeypatch.setattr("jaxlm.models._WARNED", set())
    trained = load_model(str(write(tmp_path, "llama-1m", rows, kv_heads=4, mlp_width=16)))
    assert trained.tokenizer.vocab_size == trained.tokenizer.vocab_size == 261
    assert capsys.readouterr().err.count(f"261 entries, and the embedding table of the model {rows}") == warns


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    """BART's tokenizer, with `<mask>` as its last entry."""
    import transformers

    folder = tmp_path_factory.mktemp("bart")
    names = ["<s>", "<pad>", "</s>", "<unk>", "a", "b", "<", ">", "m", "s", "k", "Ġ", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.BartTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def test_special_tokens_that_nothing_needs_may_lack_a_row(bart, tmp_path):
    # bart-large-cnn and bart-large-xsum have no row for <mask>, the last entry of their tokenizer.
    whole = load_tokenizer(bart)
    assert whole.vocab_size == 13 and whole.within(13) is whole and whole.within(12).vocab_size == 12
    tokenizer = whole.within(12)
    assert "mask" not in tokenizer.special and tokenizer.special["pad"] == 1 and tokenizer.eos_id == 2
    assert TextEncoder(tokenizer).ids("a b") == TextEncoder(whole).ids("a b") == [0, 4, 11, 5, 2]
    assert TextEncoder(whole).ids("<mask>") == [0, 12, 2] and TextEncoder(tokenizer).ids("<mask>") == [0, 6, 8, 4, 9, 10, 7, 2]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path).within(12)
    assert again.definition() == tokenizer.definition()
    assert json.loads(load_tokenizer(tmp_path).definition())["model"] == json.loads(tokenizer.definition())["model"]


def test_entries_that_texts_need_have_a_row(bart):
    whole = load_tokenizer(bart)
    assert whole.within(11) is whole  # an ordinary entry would be lost
    made = train_tokenizer(TokenizerConfig("bytes", special=("mask",)), [])
    assert made.within(257) is made


def test_a_model_for_summaries_whose_table_lacks_the_mask_opens(bart, tmp_path, capsys):
    sizes = {**SMALL, "mlp_width": 16, "vocab_size": 12}
    kind = {"architecture": "encoder_decoder", "norm": "layernorm", "norm_position": "post", "bias": True, "logit_bias": True}
    own = {"position": "learned", "position_offset": 2, "embedding_norm": True, "activation": "gelu", "norm_eps": 1e-5}
    model = Model(build(TransformerConfig, {**sizes, **kind, **own}))
    folder = save_folder(tmp_path / "summaries", model, model.init(jax.random.key(0)), tokenizer=bart)
    trained = load_model(str(folder))
    assert trained.tokenizer.vocab_size == trained.tokenizer.vocab_size == 12
    assert capsys.readouterr().err.count("12 rows has none for the last 1 special tokens") == 1
