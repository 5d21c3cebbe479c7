"""Sampling: the filters of Hugging Face, the right distribution, each row by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxlm.generate import SampleConfig, knobs, sample, seen_of
from jaxlm.generate.sample import adjust, keep

V = 40
ALL = SampleConfig(0.7, 30, 0.9, 0.05, 0.8, 1.3, 0.6, 0.4)
KEEP, ADJUST, SAMPLE = jax.jit(keep), jax.jit(adjust), jax.jit(sample, static_argnums=3)
TAKE = jax.jit(lambda seen, token_B: seen.take(token_B))


def random_logits(rows: int, ties: bool = False, seed: int = 0, width: int = V) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 2, (rows, width)).astype(np.float32)
    return np.round(logits * 2) / 2 if ties else logits


def keys_of(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32))


# --- transformers is right ----------------------------------------------------------------------

FILTERS = [
    *(("TemperatureLogitsWarper", SampleConfig(temperature=t)) for t in (0.3, 1.0, 2.5)),
    *(("TopKLogitsWarper", SampleConfig(1.0, top_k=k)) for k in (1, 7, V, 10**6)),
    *(("TopPLogitsWarper", SampleConfig(1.0, top_p=p)) for p in (1e-6, 0.3, 0.95)),
    *(("MinPLogitsWarper", SampleConfig(1.0, min_p=p)) for p in (0.0, 0.1, 1.0)),
    *(("TypicalLogitsWarper", SampleConfig(1.0, typical_p=p)) for p in (1e-6, 0.3, 0.95)),
]


def filtered_by_torch(name: str, config: SampleConfig, logits: np.ndarray) -> np.ndarray:
    import torch
    from transformers.generation import logits_process

    value = {
        "TemperatureLogitsWarper": config.temperature,
        "TopKLogitsWarper": config.top_k,
        "TopPLogitsWarper": config.top_p,
        "MinPLogitsWarper": config.min_p,
        "TypicalLogitsWarper": config.typical_p,
    }[name]
    return getattr(logits_process, name)(value)(None, torch.tensor(logits)).numpy()


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Logits may differ by a constant."""
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(jax.nn.softmax(ours, axis=-1), jax.nn.softmax(theirs, axis=-1), atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("name, config", FILTERS, ids=str)
def test_each_filter_is_that_of_transformers(name, config, ties):
    """Among equals top_p of transformers keeps whichever its sort put last; ours keeps them all."""
    logits = random_logits(64, ties)
    ours, theirs = np.asarray(KEEP(logits, knobs([config] * 64))), filtered_by_torch(name, config, logits)
    if ties and name == "TopPLogitsWarper":
        least = np.min(theirs, axis=-1, keepdims=True, where=np.isfinite(theirs), initial=np.inf)
        theirs = np.where(logits >= least, logits, -np.inf)
    same_distribution(ours, theirs)


@pytest.mark.parity
def test_all_of_them_in_the_order_of_transformers():
    """Built by `generate`'s own list, with a repetition penalty in front; a batch of three settings in one program."""
    import torch
    import transformers

    configs = [
        dataclasses.replace(ALL, presence_penalty=0.0, frequency_penalty=0.0),
        SampleConfig(1.7, 12, 0.8, typical_p=0.7, repetition_penalty=0.8),
        SampleConfig(0.9, min_p=0.02, top_p=0.97),
    ]
    small = transformers.GPT2Config(vocab_size=V, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(small)
    rng, logits = np.random.default_rng(1), random_logits(60, seed=2)
    prompts = rng.integers(0, V, (60, 9))
    rows = knobs([configs[i % 3] for i in range(60)])
    ours = np.asarray(KEEP(ADJUST(logits, rows, seen_of(prompts.tolist(), V)), rows))
    for i, config in enumerate(configs):
        of_torch = transformers.GenerationConfig(
            do_sample=True, temperature=config.temperature, top_k=config.top_k or 0, top_p=config.top_p or 1.0, min_p=config.min_p,
            typical_p=config.typical_p or 1.0, repetition_penalty=config.repetition_penalty,
        )  # fmt: skip
        steps = model._get_logits_processor(of_torch, input_ids_seq_length=9, device="cpu")
        assert len(steps) == (1 if config.repetition_penalty != 1 else 0) + len(
            [x for x in (config.temperature, config.top_k, config.top_p, config.min_p, config.typical_p) if x]
        )
        theirs = steps(torch.tensor(prompts[i::3]), torch.tensor(logits[i::3])).numpy()
        same_distribution(ours[i::3], theirs)


@pytest.mark.parity
def test_the_repetition_penalty_is_that_of_transformers():
    """Prompt and text count alike; a token that was seen twice is penalised once."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, rng = random_logits(16), np.random.default_rng(3)
    prompts, texts = rng.integers(0, V, (16, 6)), rng.integers(0, V, (16, 5))
    seen = seen_of(prompts.tolist(), V)
    for token_B in texts.T:
        seen = TAKE(seen, token_B)
    ours = ADJUST(logits, knobs([SampleConfig(repetition_penalty=1.4)] * 16), seen)
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor(np.concatenate([prompts, texts], 1)), torch.tensor(logits))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_presence_and_frequency_count_the_text_alone():
    """μ[j] − c[j]·frequency − (c[j] > 0)·presence, the formula of OpenAI's documentation; the prompt does not count."""
    logits = random_logits(2, width=5)
    seen = seen_of([[0, 1], [0, 1]], 5)
    for token_B in ([1, 2], [1, 3], [4, 3]):
        seen = TAKE(seen, np.array(token_B))
    found = ADJUST(logits, knobs([SampleConfig(presence_penalty=0.5, frequency_penalty=0.25), SampleConfig()]), seen)
    np.testing.assert_allclose(found[0], logits[0] - np.array([0, 2 * 0.25 + 0.5, 0, 0, 0.25 + 0.5], np.float32), rtol=1e-6)
    np.testing.assert_array_equal(found[1], logits[1])


# --- draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(1.0),
        SampleConfig(0.5, top_k=8),
        SampleConfig(1.3, top_p=0.9),
        SampleConfig(1.0, min_p=0.1),
        SampleConfig(1.0, typical_p=0.6),
        SampleConfig(2.0, 18, 0.97, 0.02, 0.95, 1.3, 0.6, 0.4),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(config):
    """Chi-square over 20,000 draws; the two entries beyond the vocabulary have the largest logits and are never drawn."""
    logits = np.concatenate([random_logits(1, seed=4, width=20)[0], [9.0, 9.0]]).astype(np.float32)
    row, seen = knobs([config]), seen_of([[1, 2, 3]], 22)
    seen = seen.replace(counts_BV=np.arange(22, dtype=np.int32)[None, :] % 3)
    kept = KEEP(ADJUST(jnp.where(jnp.arange(22) < 20, logits, -jnp.inf)[None, :], row, seen), row)
    expected = np.asarray(jax.nn.softmax(kept[0].astype(jnp.float32)), np.float64)
    many = jax.tree.map(lambda x: np.broadcast_to(x, (20_000, *x.shape[1:])), (logits[None, :], row, seen))
    found = SAMPLE(many[0], jax.random.split(jax.random.key(5), 20_000), many[1], 20, many[2])
    counts = np.bincount(np.asarray(found), minlength=22)
    assert not counts[expected == 0].any()
    drawn = expected > 0
    assert drawn.sum() > 2
    assert scipy.stats.chisquare(counts[drawn], 20_000 * expected[drawn] / expected.sum()).pvalue > 0.01


def test_a_row_does_not_depend_on_its_neighbours():
    """Alone or beside rows with any other settings, in any place."""
    configs = [SampleConfig(0), SampleConfig(1.0), SampleConfig(1.0, top_k=9), SampleConfig(2.0, top_p=0.8), ALL]
    configs += [SampleConfig(0, repetition_penalty=5.0), SampleConfig(3.0, min_p=0.01), SampleConfig(1.5, typical_p=0.9)]
    logits, B = random_logits(len(configs), seed=6), len(configs)
    prompts = [[int(logits[i].argmax()), i] for i in range(B)]
    for seed in range(5):
        keys = keys_of(*range(seed * B, seed * B + B))
        together = SAMPLE(logits, keys, knobs(configs), V, seen_of(prompts, V))
        backwards = SAMPLE(logits[::-1], keys[::-1], knobs(configs[::-1]), V, seen_of(prompts[::-1], V))
        np.testing.assert_array_equal(backwards[::-1], together)
        for i, config in enumerate(configs):
            alone = SAMPLE(logits[i : i + 1], keys[i : i + 1], knobs([config]), V, seen_of(prompts[i : i + 1], V))
            assert int(alone[0]) == int(together[i])
        assert together[0] == logits[0].argmax() and together[5] != logits[5].argmax()


def test_what_is_not_allowed_does_not_come():
    logits, allowed = random_logits(6), np.random.default_rng(7).random((6, V)) < 0.2
    configs = [SampleConfig(0), SampleConfig(2.0), ALL] * 2
    for seed in range(20):
        found = SAMPLE(logits, jax.random.split(jax.random.key(seed), 6), knobs(configs), V, seen_of([[1]] * 6, V), allowed)
        assert allowed[np.arange(6), found].all()
    greedy = np.where(allowed[0], logits[0], -np.inf).argmax()
    assert found[0] == greedy


def test_extreme_settings_leave_the_likeliest():
    """Settings that float32 rounds to 0, and logits that a low temperature would make infinite."""
    logits = random_logits(4) * np.float32(1e30)
    configs = [SampleConfig(1e-30), SampleConfig(1e-45), SampleConfig(1.0, top_p=1e-60), SampleConfig(1e-3, typical_p=0.999999999)]
    found = SAMPLE(logits, keys_of(1, 2, 3, 4), knobs(configs), V)
    np.testing.assert_array_equal(found, logits.argmax(-1))


def branches(jaxpr, name: str) -> list[set[str]]:
    """The primitives of each branch of the first conditional that holds `name` somewhere, the cheapest first."""

    def inside(jaxpr) -> set[str]:
        found = set()
        for equation in jaxpr.eqns:
            found.add(equation.primitive.name)
            for value in equation.params.values():
                for part in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(part, "jaxpr", part)
                    found |= inside(inner) if hasattr(inner, "eqns") else set()
        return found

    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            sets = sorted((inside(branch.jaxpr) for branch in equation.params["branches"]), key=len)
            if name in sets[-1]:
                return sets
    return []


def test_greedy_rows_sort_nothing_and_draw_nothing():
    """In the program itself: sorting and drawing stand in one branch, and the other has neither."""
    jaxpr = jax.make_jaxpr(lambda *args: sample(*args, V, seen_of([[1]], V)))(
        random_logits(1), keys_of(0), knobs([SampleConfig(0)])
    ).jaxpr  # fmt: skip
    outside = {equation.primitive.name for equation in jaxpr.eqns}
    cheap, dear = branches(jaxpr, "sort")
    assert "random_bits" in dear and "sort" in dear
    assert not {"sort", "random_bits", "random_gamma", "exp"} & (cheap | outside)
    drawing = jax.make_jaxpr(keep)(random_logits(1), knobs([SampleConfig(0)])).jaxpr
    assert not {"sort"} & {equation.primitive.name for equation in drawing.eqns}, "sorts are in branches of their own"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": float("nan")},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} is {value}: it must be "):
        SampleConfig(**wrong)
