"""The cache: a text read piece by piece, beside texts of other lengths, or in several rows, is the text read at once."""

import dataclasses

import jax
import numpy as np
import pytest
from test_model import tokens
from test_stacks import DECODER, PAIR, SEVERAL, drawn

from jaxlm.model import Model, RotaryConfig, empty_cache
from jaxlm.model.cache import grow, level, only, reorder, repeat, spread

LLAMA = {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "kv_heads": 2, "qk_norm": "heads"}
TWO_BASES = RotaryConfig(theta=100.0, local_theta=10.0)
MODELS = {
    "gpt2": DECODER,
    "llama": dataclasses.replace(DECODER, **LLAMA),
    "windows": dataclasses.replace(DECODER, **LLAMA, layer_pattern="LG", window=3, rope=TWO_BASES),
    "windows-relative": dataclasses.replace(DECODER, layer_pattern="L", window=3, **SEVERAL["as T5"]),
    "alibi": dataclasses.replace(DECODER, position="alibi"),
    "t5": dataclasses.replace(PAIR, **SEVERAL["as T5"]),
    "bart": dataclasses.replace(PAIR, **SEVERAL["as BART"]),
    "marian": dataclasses.replace(PAIR, position="sinusoidal", norm_position="post", activation="silu", logit_bias=True),
    "pair-rotary": dataclasses.replace(PAIR, **LLAMA),
}
SOURCE = {"tokens_BL": tokens(2, 7, seed=5), "segments_BL": np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)}


QUICK = {"gpt2", "windows", "t5"}


@pytest.fixture(scope="module", params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def case(request):
    """A model, its parameters, what comes before its decoder's tokens, and the jitted calls without and with a cache."""
    model = Model(MODELS[request.param])
    reads = model.config.architecture == "encoder_decoder"
    return model, drawn(model), reads, jax.jit(lambda p, batch: model.apply(p, batch)[0]), jax.jit(model.apply)


def batch_of(reads: bool, ids, source=SOURCE, **more):
    own = {"tokens_BL": np.asarray(ids), **more}
    return {"encoder": source, "decoder": own} if reads else own


def test_cached_decoding_is_the_full_forward(case):
    """At every position, in pieces of several sizes and through a cache that grows; the encoder's text is read once."""
    model, params, reads, full, cached = case
    ids = tokens(2, 12, seed=1)
    expected, parts, cache = full(params, batch_of(reads, ids)), [], empty_cache(model.config, 2, 6)
    for i, piece in enumerate(np.split(ids, [4, 5, 6, 9, 10], axis=1)):
        cache = grow(cache, 12) if i == 3 else cache
        logits, cache = cached(params, batch_of(reads and i == 0, piece), cache)
        parts.append(logits)
    assert cache.length == 12 and (cache.source is not None) == reads
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-5)


def test_texts_of_different_length_end_together_and_do_not_touch_each_other(case):
    """Rows of 7 and 3 tokens and an empty one, aligned to the right, then 4 more tokens one by one: the logits of the same
    texts each from place 0, whatever the padding holds."""
    model, params, reads, full, cached = case
    source = {name: np.concatenate([x, x[:1]]) for name, x in SOURCE.items()}
    texts, start_B = tokens(3, 11, seed=4), np.array([0, 4, 7], np.int32)
    segments = (np.arange(11) < 11 - start_B[:, None]).astype(np.int32)
    expected = full(params, batch_of(reads, texts, source, segments_BL=segments))
    rows = np.stack([np.roll(text, start) for text, start in zip(texts, start_B, strict=True)])
    cache = dataclasses.replace(empty_cache(model.config, 3, 12), start_B=start_B)
    parts = []
    for i, piece in enumerate(np.split(rows, [7, 8, 9, 10], axis=1)):
        logits, cache = cached(params, batch_of(reads and i == 0, piece, source), cache)
        parts.append(logits)
    found = np.concatenate(parts, axis=1)
    assert np.isfinite(found).all(), "padding is computed too, and must not poison what sees it not"
    for row, start in enumerate(start_B):
        np.testing.assert_allclose(found[row, start:], expected[row, : 11 - start], atol=1e-5)


@pytest.mark.slow
def test_rows_that_one_of_them_levels_are_its_text(case):
    """Two texts become three rows each; after each token all rows of a text go on from one of them, without a note of who
    holds what."""
    model, params, reads, full, cached = case
    ids, rng = tokens(2, 3, seed=3), np.random.default_rng(0)
    _, cache = cached(params, batch_of(reads, ids), empty_cache(model.config, 2, 8))
    cache, history = repeat(cache, 3), np.repeat(ids, 3, axis=0)
    assert cache.holder_BGS is None
    source = {name: np.repeat(x, 3, axis=0) for name, x in SOURCE.items()}
    for row in ([0, 1], [2, 0], [1, 2]):
        new = rng.integers(0, 40, (6, 1)).astype(np.int32)
        logits, cache = cached(params, {"tokens_BL": new}, cache)
        history = np.concatenate([history, new], axis=1)
        np.testing.assert_allclose(logits[:, 0], full(params, batch_of(reads, history, source))[:, -1], atol=1e-5)
        cache = level(cache, np.array(row, np.int32))
        history = np.repeat(history.reshape(2, 3, -1)[np.arange(2), row], 3, axis=0)


def test_rows_that_take_each_others_place_are_the_texts_they_then_are(case):
    """Two texts become three rows each; after each token rows go on from others of the same text. Each row's next logits are
    those of its own history, its source still the text's."""
    model, params, reads, full, cached = case
    ids, rng = tokens(2, 3, seed=3), np.random.default_rng(0)
    _, cache = cached(params, batch_of(reads, ids), empty_cache(model.config, 2, 8))
    cache = spread(cache, 3)
    history = np.repeat(ids, 3, axis=0)
    for parents in ([[0, 1, 2], [0, 1, 2]], [[2, 0, 0], [1, 1, 2]], [[1, 2, 2], [2, 0, 1]]):
        history = history.reshape(2, 3, -1)[np.arange(2)[:, None], np.array(parents)].reshape(6, -1)
        new = rng.integers(0, 40, (6, 1)).astype(np.int32)
        logits, cache = cached(params, {"tokens_BL": new}, reorder(cache, np.array(parents, np.int32)))
        history = np.concatenate([history, new], axis=1)
    assert len({tuple(row) for row in history[:3].tolist()}) == 3
    source = {name: np.repeat(x, 3, axis=0) for name, x in SOURCE.items()}
    np.testing.assert_allclose(logits[:, 0], full(params, batch_of(reads, history, source))[:, -1], atol=1e-5)


def test_rows_of_different_length_go_on_from_their_own_ends(case):
    """Layers and caches apart; rows that hold 5 and 2 tokens read 3 more, then 1: the logits of each text read at once,
    by the plain or by the blockwise kernel."""
    model, params, reads, full, _ = case
    ids = tokens(2, 12, seed=6)
    expected = full(params, batch_of(reads, ids))
    for kernel in ("xla", "chunked"):
        own = Model(dataclasses.replace(model.config, kernel=kernel))
        apply, layers = jax.jit(own.apply), jax.jit(model.apart)(params)
        cache = empty_cache(model.config, 2, 12)
        _, cache = apply(layers, batch_of(reads, ids[:, :5]), cache)
        seen_B = np.array([5, 2], np.int32)
        cache = dataclasses.replace(cache, length=seen_B)
        for size in (3, 1):
            piece = np.stack([text[seen : seen + size] for text, seen in zip(ids, seen_B, strict=True)])
            logits, cache = apply(layers, {"tokens_BL": piece}, cache)
            for row, seen in enumerate(seen_B):
                np.testing.assert_allclose(logits[row], expected[row, seen : seen + size], atol=1e-5)
            seen_B = seen_B + size
        np.testing.assert_array_equal(cache.length, [9, 6])


@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "windows", "alibi"))])
def test_some_rows_go_on_where_they_lie(name, cache):
    """Of five texts of 70 to 200 tokens three read more, in an order of their own: the logits of the texts read at once, by
    the kernel that reads the cache block by block and by the plain one. The two others hold what they held."""
    config = dataclasses.replace(MODELS[name], positions=256, cache=cache)
    params, ids = drawn(Model(config)), tokens(5, 210, seed=8)
    expected = jax.jit(lambda p: Model(config).apply(p, {"tokens_BL": ids})[0])(params)
    length_B, rows_B = np.array([130, 127, 200, 70, 129], np.int32), np.array([3, 0, 2], np.int32)
    said = []
    for kernel in ("chunked", "xla"):
        apply = jax.jit(Model(dataclasses.replace(config, kernel=kernel)).apply)
        _, whole = apply(params, {"tokens_BL": ids[:, :200]}, empty_cache(config, 5, 256))
        some, parts = only(dataclasses.replace(whole, length=length_B), rows_B), []
        for at, size in ((0, 3), (3, 1), (4, 1)):
            piece = np.stack([ids[row, length_B[row] + at : length_B[row] + at + size] for row in rows_B])
            logits, some = apply(params, {"tokens_BL": piece}, some)
            parts.append(logits)
        said.append(np.concatenate(parts, axis=1))
        np.testing.assert_array_equal(some.length, length_B[rows_B] + 5)
        for new, old in zip(jax.tree.leaves(some.layers), jax.tree.leaves(whole.layers), strict=True):
            np.testing.assert_array_equal(new[np.array([1, 4])], old[np.array([1, 4])])
    # A number that lies between two of int8 may be rounded to either.
    np.testing.assert_allclose(*said, atol=1e-5 if cache == "same" else 1e-3)
    if cache == "same":
        right = np.stack([expected[row, length_B[row] : length_B[row] + 5] for row in rows_B])
        np.testing.assert_allclose(said[0], right, atol=1e-5)


WINDOWED = [name for name, config in MODELS.items() if "L" in config.layer_pattern]


@pytest.mark.parametrize("name", ["windows", *(pytest.param(name, marks=pytest.mark.slow) for name in [*WINDOWED[1:], "alibi"])])
@pytest.mark.parametrize("kernel", ["xla", pytest.param("chunked", marks=pytest.mark.slow)])
def test_layers_that_see_a_window_hold_no_more_than_they_see(name, kernel):
    """A window of 3 and pieces of up to 4 tokens: rings of 7 places, turned five times by 36 tokens, in pieces of several
    sizes of which some are set back. Then rows of different lengths, rows that begin late, and rows that take each other's
    place: the logits of the texts read at once."""
    config = dataclasses.replace(MODELS[name], kernel=kernel, positions=48)
    if name == "alibi":
        config = dataclasses.replace(config, layer_pattern="GL", window=3)
    model, ids = Model(config), tokens(2, 36, seed=6)
    params = drawn(model)
    expected = jax.jit(lambda p: model.apply(p, {"tokens_BL": ids})[0])(params)
    layers, apply = jax.jit(model.apart)(params), jax.jit(model.apply)
    cache = empty_cache(config, 2, 6, piece=4)
    ringed, seen = config.local(config.layers), 0
    for size, kept in ((4, 4), (1, 1), (1, 1), (4, 2), (4, 4), (1, 0), (4, 1), (4, 4), (4, 4), (4, 3), (1, 1), (4, 4)):
        cache = grow(cache, 40) if seen == 6 else cache
        piece = np.concatenate([ids[:, seen : seen + kept], np.full((2, size - kept), 7, np.int32)], axis=1)
        logits, cache = apply(layers, {"tokens_BL": piece}, cache)
        np.testing.assert_allclose(logits[:, :kept], expected[:, seen : seen + kept], atol=1e-5)
        seen += kept
        cache = dataclasses.replace(cache, length=jax.numpy.int32(seen))
    assert [keys.shape[2] for keys, _ in cache.layers] == [7 if local else 40 for local in ringed]
    per_place = 2 * 2 * config.K * config.H * 4
    assert sum(x.nbytes for x in jax.tree.leaves(cache.layers)) == per_place * sum(7 if x else 40 for x in ringed)

    spreads, history = spread(cache, 2), np.repeat(ids[:, :seen], 2, axis=0)
    for parents in ([[0, 1], [0, 1]], [[1, 0], [1, 1]], [[0, 0], [1, 0]]):
        history = history.reshape(2, 2, -1)[np.arange(2)[:, None], np.array(parents)].reshape(4, -1)
        new = np.arange(4, dtype=np.int32)[:, None]
        logits, spreads = apply(layers, {"tokens_BL": new}, reorder(spreads, np.array(parents, np.int32)))
        history = np.concatenate([history, new], axis=1)
    full = jax.jit(lambda p, tokens_BL: model.apply(p, {"tokens_BL": tokens_BL})[0][:, -1])
    np.testing.assert_allclose(logits[:, 0], full(params, history), atol=1e-5)

    # Row 1 goes back by one token of the last piece.
    seen_B = np.array([seen, seen - 1], np.int32)
    cache = dataclasses.replace(cache, length=seen_B)
    for size in (3, 1):
        piece = np.stack([text[at : at + size] for text, at in zip(ids, seen_B, strict=True)])
        logits, cache = apply(layers, {"tokens_BL": piece}, cache)
        for row, at in enumerate(seen_B):
            np.testing.assert_allclose(logits[row], expected[row, at : at + size], atol=1e-5)
        seen_B = seen_B + size

    late = dataclasses.replace(empty_cache(config, 2, 40, piece=4), start_B=np.array([0, 3], np.int32))
    rows = np.stack([ids[0], np.roll(ids[1], 3)])
    for at in range(0, 32, 4):
        logits, late = apply(layers, {"tokens_BL": rows[:, at : at + 4]}, late)
        np.testing.assert_allclose(logits[0], expected[0, at : at + 4], atol=1e-5)
        begin = max(0, 3 - at)
        np.testing.assert_allclose(logits[1, begin:], expected[1, at + begin - 3 : at + 1], atol=1e-5)


@pytest.mark.slow
def test_a_ring_in_int8_says_what_a_whole_cache_in_int8_says():
    config = dataclasses.replace(MODELS["windows"], cache="int8")
    model, ids = Model(config), tokens(2, 20, seed=6)
    layers, apply, said = model.apart(drawn(model)), jax.jit(model.apply), []
    for piece in (4, None):
        cache, parts = empty_cache(config, 2, 20, piece=piece), []
        for part in np.split(ids, 5, axis=1):
            logits, cache = apply(layers, {"tokens_BL": part}, cache)
            parts.append(logits)
        said.append(np.concatenate(parts, axis=1))
    np.testing.assert_allclose(*said, atol=1e-5)


def test_a_cache_in_int8_is_near_and_small():
    """Logits within 1% of their spread; numbers and scales take (16 + 4) / 64 of float32's bytes at heads of 16; rows that
    others take the place of keep their own scales."""
    config = dataclasses.replace(DECODER, **LLAMA, width=64, cache="int8")
    model, ids = Model(config), tokens(2, 9, seed=2)
    params = drawn(model)
    expected = jax.jit(lambda p: model.apply(p, {"tokens_BL": ids})[0])(params)
    layers, apply, cache = model.apart(params), jax.jit(model.apply), empty_cache(config, 2, 9)
    full = empty_cache(dataclasses.replace(config, cache="same"), 2, 9)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(one.layers)) for one in (cache, full)]
    assert sizes[0] / sizes[1] == (config.H + 4) / (4 * config.H)
    parts = []
    for piece in np.split(ids, [5, 6], axis=1):
        logits, cache = apply(layers, {"tokens_BL": piece}, cache)
        parts.append(logits)
    off = np.abs(np.concatenate(parts, axis=1) - expected)
    assert 0 < off.max() < 0.05 * np.std(expected) and off.mean() < 0.01 * np.std(expected)
    grown = reorder(spread(grow(cache, 12), 2), np.array([[1, 0], [0, 1]], np.int32))
    logits, _ = apply(layers, {"tokens_BL": np.zeros((4, 1), np.int32)}, grown)
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_the_last_place_alone_has_the_logits_of_all():
    model, batch = Model(PAIR), batch_of(True, tokens(2, 5))
    last, full = jax.jit(lambda p: (model.apply(p, batch, last=True)[0], model.apply(p, batch)[0]))(drawn(model))
    assert last.shape == (2, 1, 40)
    np.testing.assert_allclose(last[:, 0], full[:, -1], atol=1e-5)


def test_an_encoder_decoder_begins_with_its_encoders_text():
    model = Model(PAIR)
    with pytest.raises(AssertionError, match="encoder's text"):
        jax.eval_shape(lambda p: model.apply(p, {"tokens_BL": tokens(2, 3)}, empty_cache(PAIR, 2)), model.shapes)
