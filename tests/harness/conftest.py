"""A small random model with a tokenizer of bytes, in a Hugging Face folder."""

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.data import TokenizerConfig, train_tokenizer
from jaxlm.hub import save_folder
from jaxlm.model import Model, TransformerConfig
from jaxlm.models import load_model

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
