"""Generation: the right context, the same text from the same seed."""

import jax
import numpy as np
import pytest

from jaxlm.generate import Generator, SampleConfig
from jaxlm.generate.sample import knobs
from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh

GREEDY = SampleConfig(temperature=0)


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


def test_prefill_makes_logits_of_the_last_token_alone():
    """A prompt of 512 tokens over a vocabulary of 16,384: all of its logits would take 34 MB."""
    config = TransformerConfig(vocab_size=16384, positions=512, layers=1, width=16, heads=2, position="rotary")
    model, mesh = Model(config), make_mesh(ParallelConfig(), jax.devices()[:1])
    generator = Generator(model, mesh, 16384)
    whole, length = jax.ShapeDtypeStruct((1, 512), np.int32), jax.ShapeDtypeStruct((), np.int32)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(model.apart, model.shapes)
        settings = (jax.random.key(0)[None], knobs([GREEDY]), None)
        compiled = generator.prefill.lower(params, whole, length, *settings, size=512).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 16384 * 4 / 4


def test_the_seed_makes_it_repeatable(setup):
    _, params, generator = setup
    warm = SampleConfig(temperature=1.0)
    one, same, other = (list(generator.stream(params, [5], 12, warm, seed=seed)) for seed in (1, 1, 2))
    assert one == same and one != other


def test_penalties_count_prompt_and_text(setup):
    """A presence penalty of 2 a token on greedy decoding by hand; settings share one program, with and without penalties."""
    model, params, _ = setup
    generator, prompt = Generator(model, make_mesh(ParallelConfig(), jax.devices()[:1]), 33), [3, 1, 4]
    apply = jax.jit(model.apply)
    for settings in ({"presence_penalty": 2.0}, {"frequency_penalty": 0.7}, {"repetition_penalty": 1.5}):
        text = list(prompt)
        for token in generator.stream(params, prompt, 10, SampleConfig(temperature=0, **settings)):
            row = np.zeros((1, 16), np.int32)
            row[0, : len(text)] = text
            logits = np.asarray(apply(params, {"tokens_BL": row})[0])[0, len(text) - 1, :33]
            counts = np.bincount(text[3:], minlength=33)
            seen = (counts > 0) | np.isin(np.arange(33), prompt)
            factor = settings.get("repetition_penalty", 1)
            logits = np.where(seen, np.where(logits < 0, logits * factor, logits / factor), logits)
            logits = logits - settings.get("presence_penalty", 0) * (counts > 0) - settings.get("frequency_penalty", 0) * counts
            assert token == np.argmax(logits)
            text.append(token)
        assert text[3:] != list(generator.stream(params, prompt, 10, GREEDY)), "the penalty changed something"
    assert generator.decode._cache_size() == 2
    assert len({tuple(generator.stream(params, prompt, 10, SampleConfig(t, k))) for t, k in ((0.5, 3), (1.0, 9), (2.0, None))}) == 3
    assert generator.decode._cache_size() == 2


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
    assert generator.prefill._cache_size() == 1 and generator.decode._cache_size() == 1


def test_the_cache_is_as_long_as_the_text_can_become(setup, monkeypatch):
    """A context of thousands costs only who fills it."""
    from jaxlm.generate import decode

    model, params, _ = setup
    sizes, real = [], decode.empty_cache
    monkeypatch.setattr(decode, "empty_cache", lambda config, batch, size: sizes.append(size) or real(config, batch, size))
    for length, tokens in ((1, 3), (3, 4), (4, 100)):
        list(Generator(model, make_mesh(ParallelConfig(), jax.devices()[:1]), 33).stream(params, [1] * length, tokens, GREEDY))
    assert sizes[:3] == [4, 8, 16] and set(sizes[3:]) <= {16}
