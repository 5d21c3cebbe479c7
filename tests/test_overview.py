"""How far two models differ, by hand; and that nothing passes which is not a number."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import TokenizerConfig, framed, train_tokenizer
from jaxlm.model import HeadConfig, Model, TransformerConfig
from jaxlm.models import Trained
from jaxlm.overview import compare, size
from jaxlm.parallel import ParallelConfig, make_mesh

CONFIG = TransformerConfig(vocab_size=257, positions=16, layers=1, width=16, heads=2)


@pytest.fixture
def trained(tmp_path):
    """`trained(seed, **changes)`: a random model with a tokenizer of bytes."""
    framed(train_tokenizer(TokenizerConfig("bytes"), []), "auto", architecture="decoder").save(tmp_path / "tokenizer")
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])

    def make(seed: int, **changes) -> Trained:
        model = Model(dataclasses.replace(CONFIG, **changes))
        return Trained(model, model.init(jax.random.key(seed)), mesh, f"model {seed}", pathlib.Path(tmp_path / "tokenizer"))

    return make


def test_differences_are_those_of_the_logits(trained):
    a, b = trained(0), trained(1)
    found = compare(a, b, "some text that is longer than one row", 32)
    ids = np.array([256, *b"some text that is longer than one row"], np.int32)[:32].reshape(2, 16)
    one, two = (np.asarray(side.model.apply(side.params, {"tokens_BL": ids})[0]) for side in (a, b))
    p, q = (np.asarray(jax.nn.softmax(x, axis=-1), np.float64) for x in (one, two))
    kl = (p * np.log(p / q)).sum(-1)
    assert found.tokens == 32 and found.largest == pytest.approx(np.abs(one - two).max(), rel=1e-5)
    assert found.kl == (pytest.approx(kl.mean(), rel=1e-3), pytest.approx(kl.max(), rel=1e-3))
    assert found.agreement == (one.argmax(-1) == two.argmax(-1)).mean()
    same = compare(a, a, None, 64)
    assert same.largest == 0 and same.kl == (0, 0) and same.agreement == 1


def test_a_model_of_nan_is_not_the_same(trained):
    """The largest of 0 and NaN used to be 0."""
    a, b = trained(0), trained(0)
    broken = dataclasses.replace(b, params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), b.params))
    assert not compare(a, broken, "text", 4).largest <= 1e9


def test_scores_of_labels_and_vectors_are_compared_too(trained):
    encoder = {"architecture": "encoder"}
    for kind in ("sequence", "embedding", "token", "choice"):
        head = HeadConfig(kind=kind, labels=3)
        found = compare(trained(0, head=head, **encoder), trained(1, head=head, **encoder), "text to read", 8)
        assert found.largest > 0 and (found.kl is None) == (kind in ("embedding", "choice"))


def test_what_cannot_be_compared(trained):
    with pytest.raises(ValueError, match="vocabulary, 257 and 300"):
        compare(trained(0), trained(1, vocab_size=300), "text", 4)
    with pytest.raises(ValueError, match="architecture"):
        compare(trained(0), trained(1, architecture="encoder", head=HeadConfig(kind="masked_lm")), "text", 4)


def test_sizes_for_a_person():
    assert [size(x) for x in (512, 1536, 3 << 30)] == ["512 B", "1.5 KiB", "3.0 GiB"]
