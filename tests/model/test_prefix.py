"""A causal mask with a prefix: the first tokens of a row see each other, later ones see them and what stands before."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import Model, TransformerConfig, empty_cache
from jaxlm.model import kernels as kernels_module
from jaxlm.model.kernels import attend, choose, chunked, cudnn, xla
from jaxlm.model.mask import Mask

B, H = 4, 8
PREFIX = np.array([0, 1, 7, 1000], np.int32)  # none; one, which is the same; some; all
# Length, window, whether rows hold two documents and padding, key/value heads, tokens seen before (the prefix among them).
CASES = {
    "plain": (12, None, False, 4, 0),
    "window": (12, 3, False, 4, 0),
    "documents": (24, None, True, 2, 0),
    "documents in a window": (24, 5, True, 2, 0),
    "blocks of queries": (150, None, False, 1, 0),
    "cache": (5, None, False, 2, 9),
}


def segments(length):
    return np.array([[1] * (length // 2) + [2] * (length - length // 2 - 3) + [0] * 3] * B, np.int32)


def sees(case):
    """(B, L, S) by asking for each pair."""
    length, window, documents, _, seen = case
    shown, of = np.zeros((B, length, length + seen), bool), segments(length)
    for b, query, key in np.ndindex(shown.shape):
        place = query + seen
        behind = key <= place and (window is None or place - key < window)
        shown[b, query, key] = (behind or key < PREFIX[b]) and (not documents or of[b, query] == of[b, key])
    return shown


def mask_of(case):
    length, window, documents, _, seen = case
    of = jnp.asarray(segments(length)) if documents else None
    return Mask(of, of, jnp.int32(seen) if seen else None, jnp.asarray(PREFIX), window=window)


def tensors(case):
    length, _, _, heads, seen = case
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, length, 4, H), (B, length + seen, heads, H), (B, length + seen, heads, H), (B, length, 4, H))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_hand(case, q_BLNH, k_BSKH, v_BSKH):
    k_BSNH, v_BSNH = (jnp.repeat(x, 4 // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    weights_BNLS = jnp.exp(0.4 * jnp.einsum("BLNH,BSNH->BNLS", q_BLNH, k_BSNH)) * sees(case)[:, None].astype(np.float32)
    return jnp.einsum("BNLS,BSNH->BLNH", weights_BNLS / weights_BNLS.sum(-1, keepdims=True), v_BSNH)


def scored(run, inputs, cotangent):
    """The values, and the gradients of q, k and v."""

    def loss(*inputs):
        y = run(*inputs)
        return jnp.sum(y * cotangent), y

    grads, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return (y, *grads)


@pytest.mark.parametrize("name", CASES)
def test_the_mask_is_what_each_pair_says(name):
    case = CASES[name]
    length, *_, seen = case
    np.testing.assert_array_equal(mask_of(case).dense(length, length + seen), sees(case))


@pytest.mark.parametrize("kernel", ["xla", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_pairs(name, kernel):
    """Blocks of queries used to be given the keys up to their own end alone: the prefix ends behind it."""
    case = CASES[name]
    mask = mask_of(case)
    (*inputs, cotangent), run = tensors(case), lambda q, k, v: xla(q, k, v, mask, 0.4, None, None, None)
    if kernel == "chunked":
        run = lambda q, k, v: chunked(q, k, v, mask, 0.4, None, None, block=16)  # noqa: E731
    with jax.numpy_rank_promotion("allow"):
        theirs = scored(lambda *x: by_hand(case, *x), inputs, cotangent)
    for what, a, b in zip(("values", "q", "k", "v"), scored(run, inputs, cotangent), theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4, err_msg=what)


def test_an_encoders_mask_knows_no_prefix():
    whole = Mask(causal=False, window=4)
    np.testing.assert_array_equal(whole.dense(9, 9), dataclasses.replace(whole, prefix_B=jnp.asarray(PREFIX)).dense(9, 9))


def test_splash_gives_way_and_says_why(monkeypatch, caplog):
    monkeypatch.setattr(kernels_module, "platform", lambda: "tpu")
    kernels_module._say.cache_clear()
    shape = jax.ShapeDtypeStruct((4, 256, 8, 64), jnp.bfloat16)
    call = (shape, shape, Mask(prefix_B=jax.ShapeDtypeStruct((4,), jnp.int32)), None, None, None)
    assert choose("auto", shape, shape, Mask(), None, None, None) == "splash", "the probe would show"
    assert choose("auto", *call) == "xla" and not caplog.records
    with caplog.at_level(logging.WARNING):
        assert choose("splash", *call) == "xla"
    assert [record.getMessage() for record in caplog.records] == ["attention kernel splash cannot be used here: it has no prefix"]


def test_cudnn_is_given_the_prefix_as_a_dense_mask(monkeypatch):
    """The same words to JAX's own XLA implementation of that interface give what ours gives."""
    theirs, told = jax.nn.dot_product_attention, {}

    def spy(*arrays, implementation, **words):
        told.update(words)
        return theirs(*arrays, implementation="xla", **words)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    case = CASES["documents in a window"]
    (*inputs, _), mask = tensors(case), mask_of(case)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        y = cudnn(*inputs, mask, 0.4, None)
    np.testing.assert_allclose(y, attend(*inputs, mask, scale=0.4, kernel="xla"), atol=1e-5)
    assert not told["is_causal"] and told["local_window_size"] is None
    np.testing.assert_array_equal(told["mask"][:, 0], sees(case))


# --- whole decoders ---------------------------------------------------------------------------

TINY = TransformerConfig(vocab_size=40, positions=16, layers=2, width=16, heads=4, tie_embeddings=False)
DECODERS = {
    "gpt2": TINY,
    "llama": dataclasses.replace(TINY, position="rotary", norm="rmsnorm", activation="swiglu", bias=False, kv_heads=2),
    "relative": dataclasses.replace(TINY, position="relative"),
    "alibi": dataclasses.replace(TINY, position="alibi"),
    "window": dataclasses.replace(TINY, window=2, layer_pattern="LG"),
    "rematerialised": dataclasses.replace(TINY, remat="full", unroll=True),
}


def perturbed(model):
    params = model.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize("name", DECODERS)
def test_what_a_place_depends_on_by_gradient(name):
    """Of ten tokens the first six are the prefix: place 2 depends on all of these and on no later one, place 7 on
    itself and those before it."""
    model = Model(DECODERS[name])
    params = perturbed(model)
    batch = {"tokens_BL": np.arange(10, dtype=np.int32)[None], "prefix_B": np.array([6], np.int32)}  # each token once

    def moved(place):
        def logit_sum(params):
            return jnp.sum(model.apply(params, batch)[0][0, place] ** 2)

        return np.abs(jax.grad(logit_sum)(params)["transformer"]["embed"]["table"]).sum(axis=1)

    for place, last in ((2, 6), (5, 6), (7, 8)):
        slope = moved(place)
        assert (slope[:last] > 1e-7).all(), f"place {place} sees all before {last}"
        assert (slope[last:] == 0).all(), f"place {place} sees nothing from {last} on"


def test_no_document_sees_the_prefix_of_another():
    model = Model(TINY)
    batch = {"tokens_BL": np.arange(10, dtype=np.int32)[None], "segments_BL": np.array([[1] * 4 + [2] * 6], np.int32),
             "prefix_B": np.array([6], np.int32)}  # fmt: skip

    def logit_sum(params):
        return jnp.sum(model.apply(params, batch)[0][0, 4] ** 2)

    slope = np.abs(jax.grad(logit_sum)(perturbed(model))["transformer"]["embed"]["table"]).sum(axis=1)
    np.testing.assert_array_equal(slope > 1e-7, [False] * 4 + [True] * 2 + [False] * 34)


def test_a_prefix_is_read_at_once_into_a_cache():
    """What follows is then written token by token, and gives the logits of the whole row."""
    model = Model(DECODERS["llama"])
    params, prefix = perturbed(model), np.array([5, 3], np.int32)
    ids = np.random.default_rng(0).integers(0, 40, (2, 9)).astype(np.int32)
    full, _ = model.apply(params, {"tokens_BL": ids, "prefix_B": prefix})
    logits, cache = model.apply(params, {"tokens_BL": ids[:, :5], "prefix_B": prefix}, empty_cache(model.config, 2))
    parts = [logits]
    for i in range(5, 9):
        logits, cache = model.apply(params, {"tokens_BL": ids[:, i : i + 1]}, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, atol=1e-5)
    plain, _ = model.apply(params, {"tokens_BL": ids})
    assert np.abs(plain - full).max() > 1e-3, "the prefix changes what is computed"
