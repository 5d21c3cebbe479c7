"""Generation: the right distribution, the right context, the same text from the same seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generate import Generator, SampleConfig, sample
from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh

GREEDY = SampleConfig(temperature=0)


def drawn(config: SampleConfig, count: int = 4000, vocab: int = 6) -> np.ndarray:
    """Shares of each token among many draws from p = (.4, .3, .15, .1, .05, 0, …)."""
    logits = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05, 1e-9, 5.0, 5.0]))
    rows = jnp.broadcast_to(logits[None, :], (count, 8))
    found = np.asarray(sample(rows, jax.random.key(0), config, vocab))
    return np.bincount(found, minlength=8) / count


@pytest.mark.parametrize(
    "config, expected",
    [
        (SampleConfig(temperature=1.0), [0.4, 0.3, 0.15, 0.1, 0.05, 0]),
        (SampleConfig(temperature=1.0, top_k=2), [4 / 7, 3 / 7, 0, 0, 0, 0]),
        (SampleConfig(temperature=1.0, top_p=0.8), [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0, 0]),
        (SampleConfig(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0, 0]),
        (SampleConfig(temperature=1.0, top_k=3, top_p=0.8), [0.4 / 0.7, 0.3 / 0.7, 0, 0, 0, 0]),
        (SampleConfig(temperature=0.5), [0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.01 / 0.285, 0.0025 / 0.285, 0]),
        (GREEDY, [1, 0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(config, expected):
    """The two entries beyond the vocabulary have the largest logits and must never be drawn.

    top_k 3 leaves .47, .35, .18; of those top_p .8 keeps the first two.
    """
    np.testing.assert_allclose(drawn(config), [*expected, 0, 0], atol=0.03)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SampleConfig(**wrong)


@pytest.fixture(scope="module", params=["learned", "rotary"])
def setup(request):
    config = TransformerConfig(vocab_size=40, positions=16, layers=2, width=16, heads=4, position=request.param, init_std=0.5)
    model = Model(config)
    return model, model.init(jax.random.key(0)), Generator(model, make_mesh(ParallelConfig(), jax.devices()[:1]), 33)


def greedy_by_hand(model, params, context: list[int]) -> int:
    logits, _ = jax.jit(model.apply)(params, {"tokens_BL": np.array([context], np.int32)})
    return int(np.argmax(np.asarray(logits)[0, -1, :33]))


def test_each_token_is_what_the_full_forward_says(setup):
    model, params, generator = setup
    text = [3, 1, 4]
    for token in generator.stream(params, [3, 1, 4], 10, GREEDY):
        assert token == greedy_by_hand(model, params, text)
        text.append(token)
    assert len(text) == 13


def test_prompts_and_texts_longer_than_the_context(setup):
    """The first token sees the last 16 of the prompt; then the later half is kept and extended up to 16."""
    model, params, generator = setup
    prompt = [int(x) for x in np.random.default_rng(0).integers(0, 33, 40)]
    text = list(prompt)
    seen = [16, *range(8, 17), *range(8, 17)]
    for token, context in zip(generator.stream(params, prompt, len(seen), GREEDY), seen, strict=True):
        assert token == greedy_by_hand(model, params, text[-context:])
        text.append(token)


def test_the_seed_makes_it_repeatable(setup):
    _, params, generator = setup
    warm = SampleConfig(temperature=1.0)
    one, same, other = (list(generator.stream(params, [5], 12, warm, seed=seed)) for seed in (1, 1, 2))
    assert one == same and one != other


def test_stops_at_the_end_of_text(setup):
    _, params, generator = setup
    full = list(generator.stream(params, [3, 1, 4], 10, GREEDY))
    stop = full[4]
    assert list(generator.stream(params, [3, 1, 4], 10, GREEDY, stop={stop, 39})) == full[: full.index(stop)]


def test_its_mesh_is_not_left_to_who_takes_one_token(setup):
    _, params, generator = setup
    stream = generator.stream(params, [3, 1, 4], 10, GREEDY)
    next(stream)
    assert jax.sharding.get_abstract_mesh().empty
    stream.close()


def test_an_empty_prompt_is_refused(setup):
    _, params, generator = setup
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generator.stream(params, [], 3, GREEDY))


def test_prompt_lengths_share_compilations(setup):
    """Lengths 5 to 8 are padded to 8, and 8 to 16 tokens have a cache of 16 places: one prefill, one decode."""
    model, params, _ = setup
    generator = Generator(model, make_mesh(ParallelConfig(), jax.devices()[:1]), 33)
    for length in (5, 6, 8):
        list(generator.stream(params, [1] * length, 4, GREEDY))
    assert generator._prefill._cache_size() == 1 and generator._decode._cache_size() == 1


def test_the_cache_is_as_long_as_the_text_can_become(setup, monkeypatch):
    """A context of thousands costs only who fills it."""
    from jaxlm.generate import decode

    model, params, _ = setup
    sizes, real = [], decode.empty_cache
    monkeypatch.setattr(decode, "empty_cache", lambda config, batch, size: sizes.append(size) or real(config, batch, size))
    for length, tokens in ((1, 3), (3, 4), (4, 100)):
        list(Generator(model, make_mesh(ParallelConfig(), jax.devices()[:1]), 33).stream(params, [1] * length, tokens, GREEDY))
    assert sizes[:3] == [4, 8, 16] and set(sizes[3:]) <= {16}
