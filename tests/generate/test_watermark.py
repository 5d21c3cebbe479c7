"""A watermark is found in texts that carry it, and in no others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxlm.generate import Generator, SampleConfig, Watermark, detect, knobs, sample
from jaxlm.generate.watermark import green, marked
from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh

MARK, V = Watermark(key=7), 500


def texts(watermark: Watermark | None, count: int, length: int, config: SampleConfig) -> np.ndarray:
    """(count, length) tokens, each drawn by the sampling step from logits of its own."""

    def step(token_B, key):
        logits_BV = jax.random.normal(key, (count, V)) * 1.5
        bias_BV = None if watermark is None else marked(watermark, token_B, V)
        keys_B = jax.random.split(jax.random.fold_in(key, 1), count)
        token_B = sample(logits_BV, keys_B, knobs([config] * count), V, bias_BV=bias_BV)
        return token_B, token_B

    first_B = jnp.arange(count, dtype=jnp.int32)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, first_B, jax.random.split(jax.random.key(3), length))[1])()).T


@pytest.mark.slow
def test_texts_without_the_mark_have_scores_of_a_normal_distribution():
    """300 texts of 200 tokens: z is N(0, 1) by Kolmogorov and Smirnov, so false alarms are as rare as p says."""
    found = [detect(MARK, text) for text in texts(None, 300, 200, SampleConfig(1.0))]
    z = np.array([one.z for one in found])
    assert scipy.stats.kstest(z, "norm").pvalue > 0.01
    assert abs(z.mean()) < 4 / 300**0.5 and 0.85 < z.std() < 1.15 and z.max() < 4.5
    np.testing.assert_allclose([one.p for one in found], scipy.stats.norm.sf(z), rtol=1e-9)


SLOWLY = [pytest.param(config, marks=pytest.mark.slow) for config in (SampleConfig(0.8, 40, 0.95), SampleConfig(0))]


@pytest.mark.parametrize("config", [SampleConfig(1.0), *SLOWLY], ids=str)
def test_texts_with_the_mark_are_found_with_the_key_alone(config):
    """Every one of 40 texts of 200 tokens is above z = 4; another key sees nothing in them."""
    written = texts(MARK, 40, 200, config)
    z = np.array([detect(MARK, text).z for text in written])
    other = np.array([detect(dataclasses.replace(MARK, key=8), text).z for text in written])
    assert z.min() > 4 and z.mean() > 8
    assert abs(other.mean()) < 4 / 40**0.5 and other.max() < 4


def test_what_is_green_depends_on_the_token_before():
    """A quarter of all tokens behind each; the bias is what `detect` counts; other lists behind other tokens and keys."""
    bias_BV = np.asarray(marked(MARK, jnp.arange(40, dtype=jnp.int32), V))
    assert set(np.unique(bias_BV)) == {0.0, 2.0}
    counts = (bias_BV > 0).sum(1)
    assert scipy.stats.chisquare(np.array([counts.sum(), 40 * V - counts.sum()]), [10 * V, 30 * V]).pvalue > 0.01
    assert np.all(np.abs(counts - V / 4) < 5 * (V * 3 / 16) ** 0.5)
    assert bool(green(MARK, 3, 11)) == (bias_BV[3, 11] > 0)
    agreeing = np.mean((bias_BV[:-1] > 0) == (bias_BV[1:] > 0))
    assert abs(agreeing - (0.25**2 + 0.75**2)) < 0.02
    assert detect(MARK, [3, 11, 3, 11, 3, 11]).pairs == 2, "what comes again does not count again"


def test_a_model_writes_the_mark():
    """Over the host's loop, from the first token behind the prompt, beyond the end of the context."""
    config = TransformerConfig(vocab_size=V, positions=64, layers=1, width=16, heads=2, position="rotary", init_std=0.5)
    model = Model(config)
    params, generator = model.init(jax.random.key(0)), Generator(model, make_mesh(ParallelConfig(), jax.devices()[:1]), V)
    warm = SampleConfig(1.0)
    plain, written = ([5, *generator.stream(params, [4, 5], 150, warm, seed=1, watermark=mark)] for mark in (None, MARK))
    assert detect(MARK, written).z > 5 > 3.5 > detect(MARK, plain).z
    certain = Watermark(key=7, bias=99.0)
    everywhere = detect(certain, [5, *generator.stream(params, [4, 5], 80, warm, seed=2, watermark=certain)])
    assert everywhere.green == everywhere.pairs


@pytest.mark.parametrize("wrong", [{"key": -1}, {"share": 1.0}, {"share": 0.0}, {"bias": 0.0}, {"bias": float("nan")}], ids=str)
def test_mistakes_are_told(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"watermark {name} is {value}: it must be"):
        Watermark(**{"key": 1, **wrong})
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        detect(MARK, [3])
