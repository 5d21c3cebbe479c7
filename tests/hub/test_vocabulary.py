"""A tokenizer with ids that the embedding table has no row for is refused wherever the model is opened; one that is much
smaller is reported."""

import jax
import pytest

from jaxlm import cli
from jaxlm.config import build
from jaxlm.data import TokenizerConfig, train_tokenizer
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
    assert capsys.readouterr().out.count(f"261 entries, and the embedding table of the model {rows}") == warns
