"""Products in int8 and fp8 against NumPy, what they are compiled to, and rounding at random."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.generate import Generator, SampleConfig
from jaxlm.model import HeadConfig, Model, MoeConfig, TransformerConfig
from jaxlm.model.precision import quantized_product, stochastic
from jaxlm.parallel import ParallelConfig, make_mesh

KINDS = {"int8": (127.0, None), "fp8": (448.0, ml_dtypes.float8_e4m3fn)}
CONFIG = TransformerConfig(vocab_size=64, positions=32, layers=2, width=32, heads=4)


def operands():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 5, 24)).astype(np.float32) * rng.lognormal(size=(3, 5, 1)).astype(np.float32)
    return x, rng.normal(size=(24, 4, 6)).astype(np.float32) * rng.lognormal(size=(1, 4, 6)).astype(np.float32)


def rounded(x, axes, kind):
    """x at the precision of its kind, with a scale for each place along the other axes."""
    largest, dtype = KINDS[kind]
    scale = np.abs(x).max(axes, keepdims=True) / np.float32(largest)
    parts = np.clip(np.round(x / scale), -128, 127) if dtype is None else (x / scale).astype(dtype)
    return parts.astype(np.float64) * scale


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_that_of_the_rounded_operands(kind):
    x, w = operands()
    found = np.asarray(quantized_product(x, w, None, 1, kind))
    wanted = np.einsum("bld,dnh->blnh", rounded(x, (2,), kind), rounded(w, (0,), kind))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    exact = np.einsum("bld,dnh->blnh", x, w)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < {"int8": 0.015, "fp8": 0.05}[kind]
    x, w = np.asarray(found), w.transpose(1, 2, 0).copy()  # two summed axes, as of the map from the heads back
    wanted = np.einsum("blnh,nhd->bld", rounded(x, (2, 3), kind), rounded(w, (0, 1), kind))
    np.testing.assert_allclose(quantized_product(x, w, None, 2, kind), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right_in_the_mean(kind):
    """Over keys the gradients come ever nearer to those of the rounded operands: what is drawn is unbiased."""
    x, w = operands()
    g = np.random.default_rng(1).normal(size=(3, 5, 4, 6)).astype(np.float32)

    def gradients(key):
        return jax.vjp(lambda x, w: quantized_product(x, w, key, 1, kind), x, w)[1](g)

    drawn = jax.jit(jax.vmap(gradients))(jax.random.split(jax.random.key(0), 1024))
    wanted = (
        np.einsum("blnh,dnh->bld", g, rounded(w, (0,), kind)), np.einsum("blnh,bld->dnh", g, rounded(x, (2,), kind))
    )  # fmt: skip
    for found, exact in zip(drawn, wanted, strict=True):
        found = np.asarray(found, np.float64)
        z = (found.mean(0) - exact) / (found.std(0) / 32)
        assert np.abs(z).max() < 5 and 0.8 < np.sqrt(np.mean(z**2)) < 1.2
    again = gradients(jax.random.key(7)), gradients(jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, *again)


def gradient(config, rng=None):
    rows = jnp.arange(2 * 32, dtype=jnp.int32).reshape(2, 32) % 64
    batch = {"tokens_BL": rows, "targets_BL": jnp.roll(rows, -1, 1), "weights_BL": jnp.ones((2, 32), jnp.float32)}
    return lambda params: jax.value_and_grad(
        lambda params: Model(config).apply(params, batch, chunk=32, method="loss", train=rng is not None, rng=rng)[0]
    )(params)


@pytest.mark.parametrize("kind, types", [("int8", ("i8", "i8")), ("fp8", ("f8E4M3FN", "f8E5M2"))])
def test_all_maps_of_the_layers_and_nothing_else_multiply_in_few_bits(kind, types):
    """Seven products a layer forward and fourteen backward, in the scan's two bodies; others are float32."""
    config = dataclasses.replace(CONFIG, quantize=kind, activation="swiglu")
    lowered = jax.jit(gradient(config, jax.random.key(1))).lower(Model(config).shapes)
    found = re.findall(r"stablehlo.dot_general.*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", lowered.as_text())
    forward, backward = types
    pairs = [pair for pair in found if pair != ("f32", "f32")]
    mixed = [pair for pair in pairs if set(pair) == {forward, backward}]
    assert len(pairs) == 21 and pairs.count((forward, forward)) == (21 if kind == "int8" else 7)
    assert len(mixed) == (21 if kind == "int8" else 14)
    # Those of attention's scores and values, and of the tied head with its gradients.
    assert 0 < len(found) - len(pairs) <= 12
    if kind == "int8":  # which CPUs multiply; fp8 they widen first
        compiled = lowered.compile().as_text()
        assert re.search(r"= s32\[[\d,]*\]\S* dot\(", compiled), "no product has been compiled to integers"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_scanned_is_unrolled_and_rematerialised(kind):
    key = jax.random.key(3)
    params = Model(CONFIG).init(jax.random.key(0))
    plain = jax.jit(gradient(dataclasses.replace(CONFIG, quantize=kind), key))(params)
    largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(plain[1]))
    for changes in ({"remat": "full"}, {"remat": "dots"}, {"unroll": True, "remat": "attention"}):
        found = jax.jit(gradient(dataclasses.replace(CONFIG, quantize=kind, **changes), key))(params)
        np.testing.assert_allclose(found[0], plain[0], rtol=1e-4)
        if "unroll" not in changes:  # which draws other numbers for each layer
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * largest), found, plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_written_token_by_token_as_it_is_read_at_once(kind):
    """A row of activations has a scale of its own, so that a cache changes nothing; other scores than float32's."""
    config = dataclasses.replace(CONFIG, quantize=kind, init_std=0.3)
    model, text = Model(config), [3, 1, 4]
    params = model.init(jax.random.key(0))
    generator = Generator(model, make_mesh(ParallelConfig(), jax.devices()[:1]), config.vocab_size)
    for token in generator.stream(params, text[:], 6, SampleConfig(temperature=0)):
        logits = np.asarray(model.apply(params, {"tokens_BL": np.array([text], np.int32)})[0])[0, -1]
        assert token == np.argmax(logits)
        text.append(token)
    plain = np.asarray(
        Model(dataclasses.replace(config, quantize="none")).apply(params, {"tokens_BL": np.array([text[:-1]], np.int32)})[0]
    )
    assert 1e-3 < np.abs(plain[0, -1] - logits).max() / np.abs(plain[0, -1]).max() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_attention_to_an_encoder_multiplies_in_few_bits_too(kind):
    config = dataclasses.replace(CONFIG, architecture="encoder_decoder", quantize=kind, init_std=0.1)
    tokens = np.arange(16, dtype=np.int32)[None] % CONFIG.vocab_size
    batch = {
        "encoder": {"tokens_BL": tokens},
        "decoder": {"tokens_BL": tokens, "targets_BL": tokens, "weights_BL": np.ones((1, 16), np.float32)},
    }
    params = Model(config).init(jax.random.key(0))

    def gradient(quantize):
        model = Model(dataclasses.replace(config, quantize=quantize))
        return jax.jit(jax.grad(lambda params: model.apply(params, batch, method="loss", chunk=16)[0]))(params)

    cross = [tree["transformer"]["decoder"]["layers"]["cross_attention"] for tree in (gradient(kind), gradient("none"))]
    for found, plain in zip(*map(jax.tree.leaves, cross), strict=True):
        gap = np.linalg.norm(found - plain) / max(np.linalg.norm(plain), 1e-9)
        assert gap < 0.3 or np.abs(plain).max() < 1e-4
    assert any(np.abs(a - b).max() > 0 for a, b in zip(*map(jax.tree.leaves, cross), strict=True))


def test_experts_and_a_missing_package_are_refused_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"^quantize int8 multiplies attention and plain MLPs: with moe.experts 4 give none$"):
        TransformerConfig(quantize="int8", moe=MoeConfig(experts=4))
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"^model.quantize fp8 needs qwix: pip install 'jaxlm\[tune\]'"):
        _ = Model(dataclasses.replace(CONFIG, quantize="fp8")).shapes


# --- parameters in bfloat16 ----------------------------------------------------------------------

MODELS = {
    "relative": {"position": "relative", "norm": "rmsnorm", "norm_offset": True, "tie_embeddings": False, "logit_bias": True},
    "masked": {"architecture": "encoder", "head": HeadConfig(kind="masked_lm", norm=True), "token_types": 2},
    "experts": {"moe": MoeConfig(experts=4), "activation": "swiglu", "position": "rotary", "qk_norm": "heads"},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_the_same_from_parameters_in_bfloat16(name):
    """As from the same numbers in float32, under strict promotion: each is widened before anything is computed with it."""
    config = dataclasses.replace(CONFIG, **MODELS[name])
    held = dataclasses.replace(config, param_dtype="bfloat16")
    narrow = Model(held).init(jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow)} == {"bfloat16"}
    loss, grads = jax.jit(gradient(held))(narrow)
    wanted, wide = jax.jit(gradient(config))(jax.tree.map(lambda x: x.astype(jnp.float32), narrow))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(wide))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-5 * largest), grads, wide)


# --- rounding at random -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "bfloat16", "float8_e5m2"])
def test_only_the_two_neighbours_occur_as_often_as_they_should(name):
    """1,000 numbers of all sizes, each drawn 1,024 times: never anything but the neighbours, and their shares are within
    the bounds of a binomial (Hoeffding 1963: a share is off by more than 0.11 with probability below 2·e^(−24))."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000).astype(np.float32) * np.float32(2.0) ** rng.integers(-12, 7, 1000)
    x = np.clip(x, -120, 120) if name == "int8" else x.astype(np.float16).astype(np.float32)
    draw = jax.jit(jax.vmap(lambda key: stochastic(jnp.asarray(x), jnp.dtype(name), key).astype(jnp.float32)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 1024)), np.float64)
    held = np.arange(-128.0, 128) if name == "int8" else np.unique(_all_values(name))
    below = held[np.searchsorted(held, x, side="right") - 1]
    above = held[np.searchsorted(held, x, side="left")]
    assert np.all((drawn == below) | (drawn == above))
    share = np.where(above > below, (x - below) / np.where(above > below, above - below, 1), 0)
    assert np.abs((drawn == above).mean(0) - np.where(above > below, share, 1)).max() < 0.11
    assert np.abs(((drawn == above).mean(0) - np.where(above > below, share, 1)).mean()) < 0.002
    infinite = stochastic(jnp.asarray([jnp.inf, -jnp.inf, jnp.nan]), jnp.bfloat16, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(infinite, np.float32), [np.inf, -np.inf, np.nan])


def _all_values(name):
    bits = np.arange(2**16, dtype=np.uint16) if name == "bfloat16" else np.arange(2**8, dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        values = bits.view(jnp.dtype(name)).astype(np.float64)
    return values[np.isfinite(values)]
