"""A small random model with a tokenizer of bytes, and torch models, in Hugging Face folders."""

import pathlib
import sys
from pydoc_data.topics import topics

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.data import TokenizerConfig, train_tokenizer
from jaxlm.hub import save_folder
from jaxlm.model import Model, TransformerConfig
from jaxlm.models import load_model

sys.path.append(str(pathlib.Path(__file__).parent.parent / "hub"))
from torch_models import CASES, make

SIZES = {"vocab_size": 260, "positions": 64, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 32}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, rng = Model(configs.build(TransformerConfig, {"preset": "llama-1m", **SIZES})), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), model.shapes)
    train_tokenizer(TokenizerConfig("bytes"), []).save(folder / "tokenizer")
    like = {"eos_token_id": 256, "bos_token_id": 256}
    save_folder(folder / "model", model, params, tokenizer=folder / "tokenizer", like=like)
    return folder / "model"


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return load_model(str(tiny_folder))


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def both(request, tmp_path_factory):
    """A torch model and its folder with a tokenizer, of which Llama's puts <|endoftext|> before a text."""
    import tokenizers

    folder = tmp_path_factory.mktemp(request.param)
    architecture, options = CASES[request.param]
    theirs = make(architecture, {**options, "vocab_size": 300})
    theirs.save_pretrained(folder)
    train_tokenizer(TokenizerConfig(vocab_size=300), list(topics.values())[:20]).save(folder)
    (folder / "jaxlm_tokenizer.json").unlink()  # a folder of others
    if request.param == "llama":
        rust = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        rust.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", rust.token_to_id("<|endoftext|>"))]
        )
        rust.save(str(folder / "tokenizer.json"))
    return request.param, theirs, folder
