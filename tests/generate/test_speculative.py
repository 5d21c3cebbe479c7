"""Speculative decoding: the same text, the same distribution, fewer rounds."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxlm.generate import Generator, SampleConfig, Speculator, Stats, knobs, seen_of
from jaxlm.generate.speculative import check, look_up, probabilities
from jaxlm.model import Model, TransformerConfig, empty_cache
from jaxlm.parallel import ParallelConfig, make_mesh

ONE = make_mesh(ParallelConfig(), jax.devices()[:1])
CONFIG = TransformerConfig(vocab_size=40, positions=32, layers=2, width=16, heads=4, position="rotary", init_std=1.0)
BIG = Model(CONFIG)
SMALL = Model(dataclasses.replace(CONFIG, vocab_size=48, layers=1, width=8, heads=2))  # another padding of the same 33 tokens
GREEDY, PENALISED = SampleConfig(0), SampleConfig(0, presence_penalty=0.7, repetition_penalty=1.3)
PROMPT = [3, 1, 4, 1, 5]


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def params():
    return BIG.init(jax.random.key(0)), SMALL.init(jax.random.key(1))


# --- the rule of acceptance ---------------------------------------------------------------------


@pytest.mark.parametrize("certain", [False, True], ids=["drawn drafts", "certain drafts"])
def test_whatever_the_drafts_each_token_is_distributed_as_the_model_says(certain):
    """Chi-square over 20,000 rounds of two drafts: the first token as p₀; the second, where there is one, as p₁."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet([0.7] * 6, 3).astype(np.float32), rng.dirichlet([0.7] * 6, 2).astype(np.float32)
    p[0, 2] = 0
    p[0] /= p[0].sum()
    if certain:
        q = np.eye(6, dtype=np.float32)[[1, 4]]

    def round_(key):
        draft_key, key = jax.random.split(key)
        drafts_K = jax.random.categorical(draft_key, jnp.log(q), axis=-1).astype(jnp.int32)
        count, token = check(jnp.asarray(p), jnp.asarray(q), drafts_K, key)
        return jnp.append(drafts_K, 0).at[count].set(token), count

    tokens, counts = jax.jit(jax.vmap(round_))(jax.random.split(jax.random.key(2), 20_000))
    for place in range(3):
        there = np.bincount(np.asarray(tokens)[np.asarray(counts) >= place, place], minlength=6)
        expected = p[place].astype(np.float64) / p[place].sum(dtype=np.float64)
        possible = expected > 0
        assert there.sum() > 100 and not there[~possible].any()
        assert scipy.stats.chisquare(there[possible], there.sum() * expected[possible]).pvalue > 0.01
    assert np.mean(counts) < 2
    taken = np.minimum(p[0], q[0]).sum()  # theorem 3.5 of Leviathan et al.
    np.testing.assert_allclose(np.mean(np.asarray(counts) >= 1), taken, atol=0.015)


# --- whole texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", [slow("itself"), "one like it", slow("another"), "look-up"])
@pytest.mark.parametrize("config", [GREEDY, slow(PENALISED)], ids=["plain", "penalised"])
def test_greedy_is_the_same_text(params, drafter, config):
    """Token for token, beyond the end of the context too, which is then read again from its middle."""
    expected = list(Generator(BIG, ONE, 33).stream(params[0], PROMPT, 60, config))
    like = jax.tree.map(lambda x: x + np.random.default_rng(2).normal(0, 0.1, x.shape).astype(np.float32), params[0])
    draft, draft_params = {
        "itself": (BIG, params[0]),
        "one like it": (BIG, like),
        "another": (SMALL, params[1]),
        "look-up": (None, None),
    }[drafter]
    speculator, stats = Speculator(BIG, ONE, 33, drafts=3, draft=draft), Stats()
    stream = speculator.stream(params[0], PROMPT, 60, config, draft_params=draft_params, stats=stats)
    assert list(stream) == expected
    assert stats.drafted == 3 * stats.rounds
    if drafter == "itself":
        assert stats.accepted == stats.drafted > 30
    elif drafter == "one like it" or (drafter, config) == ("look-up", GREEDY):
        assert 0 < stats.accepted < stats.drafted
    stop = expected[17]
    stream = speculator.stream(params[0], PROMPT, 60, config, draft_params=draft_params, stop={stop})
    assert list(stream) == expected[: expected.index(stop)]
    assert speculator._round._cache_size() + speculator._check._cache_size() == 1


def joint(params, config: SampleConfig, prompt: list[int], vocab: int, length: int) -> np.ndarray:
    """The probability of every text of `length` tokens, each one read whole, without a cache."""
    texts = np.array(list(itertools.product(range(vocab), repeat=length)), np.int32)
    rows = np.concatenate([np.tile(np.array([prompt], np.int32), (len(texts), 1)), texts], axis=1)
    logits = np.asarray(jax.jit(BIG.apply)(params, {"tokens_BL": rows})[0])
    total, many = np.ones(len(texts)), [config] * len(texts)
    for i in range(length):
        seen = seen_of([prompt] * len(texts), vocab)
        for before in range(i):
            seen.counts_BV[np.arange(len(texts)), texts[:, before]] += 1
        p = probabilities(logits[:, len(prompt) - 1 + i, :vocab], knobs(many), jax.tree.map(jnp.asarray, seen))
        total *= np.asarray(p, np.float64)[np.arange(len(texts)), texts[:, i]]
    return total / total.sum()


SETTINGS = [SampleConfig(2.0), SampleConfig(2.5, 3, 0.95, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=-0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("drafter", ["model", "certain"])
def test_texts_are_distributed_as_drawn_one_by_one(params, drafter, config):
    """Chi-square over 20,000 texts of the first three tokens of a vocabulary of four, over up to three rounds of two drafts."""
    prompt, K, (big, small) = [3, 1, 2], 2, params
    speculator = Speculator(BIG, ONE, 4, K, SMALL if drafter == "model" else None)
    row, tokens_BL = knobs([config]), np.array([prompt], np.int32)
    cache = BIG.apply(big, {"tokens_BL": tokens_BL[:, :-1]}, empty_cache(CONFIG, 1, 16))[1]
    little = SMALL.apply(small, {"tokens_BL": tokens_BL[:, :-1]}, empty_cache(SMALL.config, 1, 16))[1]
    start = jax.tree.map(jnp.asarray, seen_of([prompt], 4))

    def text(key):
        out, n, own, drafts, seen = jnp.zeros(2 + 9, jnp.int32).at[:2].set(jnp.array(prompt[-2:])), 2, cache, little, start
        for step in range(3):
            key, now = jax.random.split(key)
            pair = jax.lax.dynamic_slice(out, (n - 2,), (2,))[None]
            if drafter == "model":
                found, count, own, drafts, seen = speculator._round_pure(big, own, pair, small, drafts, now, row, seen)
            else:
                guess = (pair[0, 1] + jnp.arange(1, 1 + K) * (step + 1)) % 4
                found, count, own, seen = speculator._check_pure(big, own, pair[:, 1:], guess, now, row, seen)
            out, n = jax.lax.dynamic_update_slice(out, found, (n,)), n + count
        return out[2:5]

    drawn = np.asarray(jax.jit(jax.vmap(text))(jax.random.split(jax.random.key(3), 20_000)))
    counts = np.bincount(drawn @ [16, 4, 1], minlength=64)
    expected = joint(big, config, prompt, 4, 3)
    assert not counts[expected == 0].any()
    often = expected * 20_000 > 5
    pooled = [np.append(x[often], x[~often].sum()) for x in (counts, expected * 20_000)]
    filled = pooled[1] > 0
    assert often.sum() > 10
    assert scipy.stats.chisquare(pooled[0][filled], pooled[1][filled]).pvalue > 0.01


@pytest.mark.parametrize("drafter", [slow("model"), slow("look-up")])
def test_streams_are_distributed_as_drawn_one_by_one(params, drafter):
    """The same over the host's loop: the third and fourth token of 400 streams."""
    prompt, config = [3, 1, 2, 3, 1], SETTINGS[1]
    speculator = Speculator(BIG, ONE, 4, 2, SMALL if drafter == "model" else None)
    small, stats = params[1] if drafter == "model" else None, Stats()
    texts = [list(speculator.stream(params[0], prompt, 4, config, draft_params=small, seed=s, stats=stats)) for s in range(400)]
    counts = np.bincount(np.array(texts)[:, 2:] @ [4, 1], minlength=16)
    expected = joint(params[0], config, prompt, 4, 4).reshape(16, 16).sum(0) * 400
    often = expected > 4
    assert often.sum() > 5 and 0 < stats.accepted < stats.drafted
    pooled = [np.append(x[often], x[~often].sum()) for x in (counts, expected)]
    assert scipy.stats.chisquare(*(x[pooled[1] > 0] for x in pooled)).pvalue > 0.01


def test_what_came_after_the_same_tokens_before():
    assert look_up([1, 2, 3, 9, 1, 2, 4, 1, 2, 3], 2) == [9, 1], "the longest match, not the latest"
    assert look_up([5, 7, 6, 5, 8, 6, 5], 3) == [8, 6, 5], "the latest of equal ones"
    assert look_up([4, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1], "what repeats itself goes on"
    assert look_up([1, 2, 3], 2) is None and look_up([1], 2) is None


def test_mistakes_are_told(params):
    with pytest.raises(ValueError, match="drafted tokens are 0"):
        Speculator(BIG, ONE, 33, 0)
    with pytest.raises(ValueError, match="prompt is empty"):
        next(Speculator(BIG, ONE, 33).stream(params[0], [], 3, GREEDY))
    encoder = dataclasses.replace(CONFIG, architecture="encoder", head=dataclasses.replace(CONFIG.head, kind="masked_lm"))
    with pytest.raises(ValueError, match="not by encoder with masked_lm"):
        Speculator(BIG, ONE, 33, draft=Model(encoder))
