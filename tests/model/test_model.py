"""What a Transformer must be: causal, blind across documents, the same however it is computed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import build
from jaxlm.model import Model, TransformerConfig, empty_cache, linear_cross_entropy
from jaxlm.model.cross_entropy import _chunks

TINY = TransformerConfig(vocab_size=40, positions=16, layers=2, width=16, heads=4)

# Every choice of the config at least once.
FAMILIES = {
    "gpt2": TINY,
    "llama": dataclasses.replace(
        TINY, position="rotary", norm="rmsnorm", activation="swiglu", bias=False, kv_heads=2, tie_embeddings=False, init="normal"
    ),
    "post-norm": dataclasses.replace(TINY, norm_position="post", activation="relu", head_width=6),
    "mqa-qk-norm": dataclasses.replace(TINY, kv_heads=1, qk_norm="heads", activation="geglu", position="rotary", logit_softcap=5.0),
    "no-positions": dataclasses.replace(TINY, position="none", activation="relu2", bias=False),
    "gelu-wide": dataclasses.replace(TINY, activation="gelu", mlp_width=24),
}


def perturbed(model: Model, seed: int = 0):
    """Parameters of which none is zero or one: a norm or bias that is left out would show."""
    params = model.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def tokens(rows: int, length: int, vocab: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


@pytest.fixture(params=FAMILIES)
def model(request) -> Model:
    return Model(FAMILIES[request.param])


def logits_of(model, params, batch):
    return jax.jit(lambda p, b: model.apply(p, b)[0])(params, batch)


def test_causal_by_gradient(model):
    """The logits at place 5 depend on the embeddings of the tokens up to it and on no later one."""
    params = perturbed(model)
    ids = np.arange(10, dtype=np.int32)[None, :]  # each token once, so a row of the table is a place

    def logit_sum(params):
        return jnp.sum(model.apply(params, {"tokens_BL": ids})[0][0, 5] ** 2)

    # Tied tables also receive the head's gradient: a separate head leaves the look-ups alone.
    untied = Model(dataclasses.replace(model.config, tie_embeddings=False))
    if model.config.tie_embeddings:
        params = {**params, "head": jax.tree.map(jnp.copy, params["transformer"]["embed"])}
    model = untied
    grad_VD = jax.jit(jax.grad(logit_sum))(params)["transformer"]["embed"]["table"]
    moved = np.abs(np.asarray(grad_VD)).sum(axis=1)
    assert (moved[:6] > 1e-6).all(), "every token up to the place has a say"
    assert (moved[6:] == 0).all(), "no later token has"


def test_packed_documents_give_the_logits_of_each_alone(model):
    params = perturbed(model)
    first, second = tokens(1, 7, seed=1), tokens(1, 5, seed=2)
    packed = {
        "tokens_BL": np.concatenate([first, second, np.zeros((1, 4), np.int32)], axis=1),
        "segments_BL": np.array([[1] * 7 + [2] * 5 + [0] * 4], np.int32),
        "positions_BL": np.array([[*range(7), *range(5), *range(4)]], np.int32),
    }
    together = logits_of(model, params, packed)
    np.testing.assert_allclose(together[:, :7], logits_of(model, params, {"tokens_BL": first}), atol=1e-5)
    np.testing.assert_allclose(together[:, 7:12], logits_of(model, params, {"tokens_BL": second}), atol=1e-5)


def test_scanned_is_unrolled_and_rematerialised(model):
    params, ids = perturbed(model), tokens(2, 8)
    batch = {"tokens_BL": ids, "targets_BL": np.roll(ids, -1, 1), "weights_BL": np.ones(ids.shape, np.float32)}

    def loss_and_grads(**changes):
        other = Model(dataclasses.replace(model.config, **changes))
        return jax.jit(jax.value_and_grad(lambda p: other.apply(p, batch, method="loss", chunk=8)[0]))(params)

    plain = loss_and_grads()
    for changes in ({"unroll": True}, {"remat": "full"}, {"remat": "attention"}, {"remat": "dots", "unroll": True}):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), plain, loss_and_grads(**changes))


def test_cached_decoding_is_the_full_forward(model):
    params, ids = perturbed(model), tokens(2, 12)
    full = logits_of(model, params, {"tokens_BL": ids})
    cache = empty_cache(model.config, 2)
    apply = jax.jit(model.apply)
    parts = []
    for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:9], ids[:, 9:]):
        logits, cache = apply(params, {"tokens_BL": piece}, cache)
        parts.append(logits)
    assert cache.length == 12
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, atol=1e-5)


def test_a_uniform_model_scores_exactly_log_v(model):
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0)))
    ids = tokens(2, 8)
    batch = {"tokens_BL": ids, "targets_BL": ids, "weights_BL": np.ones(ids.shape, np.float32)}
    loss, _ = model.apply(params, batch, method="loss", chunk=4)
    np.testing.assert_allclose(loss / ids.size, math.log(model.config.V), rtol=1e-6)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(model):
    half = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    params = half.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    batch = {"tokens_BL": tokens(2, 8)}
    full, rounded = logits_of(model, params, batch), logits_of(half, params, batch)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, full, atol=0.05 * float(jnp.abs(full).max()))


def test_dropout_needs_training_and_a_key():
    model = Model(dataclasses.replace(TINY, dropout=0.5))
    params, batch = perturbed(model), {"tokens_BL": tokens(1, 8)}
    still = [model.apply(params, batch)[0] for _ in range(2)]
    np.testing.assert_array_equal(*still)
    one, two = (model.apply(params, batch, train=True, rng=jax.random.key(i))[0] for i in range(2))
    again = model.apply(params, batch, train=True, rng=jax.random.key(0))[0]
    assert not np.allclose(one, two) and not np.allclose(one, still[0])
    np.testing.assert_array_equal(one, again)


# Counts of the models published on Hugging Face: gpt2 … gpt2-xl, Llama 3, BERT and RoBERTa with their masked heads, T5 v1.1.
@pytest.mark.parametrize(
    "preset, count",
    [
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-1b", 1_235_814_400),
        ("llama-3b", 3_212_749_824),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
        ("bert-base", 109_514_298),
        ("bert-large", 335_174_458),
        ("roberta-base", 124_697_433),
        ("xlm-roberta-base", 278_295_186),
        ("t5-v1.1-base", 247_577_856),
    ],
)
def test_published_parameter_counts(preset, count):
    assert Model(build(TransformerConfig, {"preset": preset})).parameters() == count


def test_flops_are_six_per_matrix_weight_and_the_attention():
    """GPT-2 small at 1,024: PaLM's formula by hand, 6·(12 blocks of 12·768² + 768·50257) + 12·12·768·1024."""
    config = build(TransformerConfig, {"preset": "gpt2-small"})
    by_hand = 6 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 12 * 768 * 1024
    assert config.train_flops_per_token(1024) == by_hand


def test_initialisation_follows_gpt2():
    model = Model(TransformerConfig(vocab_size=512, positions=64, layers=8, width=128, heads=4))
    params = model.init(jax.random.key(0))["transformer"]
    layers = params["decoder"]["layers"]
    std = {name: float(jnp.std(value)) for name, value in [
        ("embed", params["embed"]["table"]), ("up", layers["mlp"]["up"]["kernel"]),
        ("down", layers["mlp"]["down"]["kernel"]), ("out", layers["attention"]["out"]["kernel"]),
    ]}  # fmt: skip
    assert std["embed"] == pytest.approx(0.02, rel=0.03) and std["up"] == pytest.approx(0.02, rel=0.03)
    assert std["down"] == pytest.approx(0.02 / 4, rel=0.03) and std["out"] == pytest.approx(0.02 / 4, rel=0.03)
    up = layers["mlp"]["up"]["kernel"]
    assert not np.allclose(up[0], up[1]), "stacked layers must not share their draw"


# --- the chunked loss -------------------------------------------------------------------------


def plain_cross_entropy(hidden, table, targets, weights, z_loss, cap):
    logits = jnp.einsum("BLD,VD->BLV", hidden, table)
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    return jnp.sum(weights * (nll + z_loss * lse**2)), jnp.sum(weights * nll)


@pytest.mark.parametrize("chunk", [1, 5, 12])  # of 12 places; the last of three chunks is padded
@pytest.mark.parametrize("z_loss, cap", [(0.0, None), (1e-2, None), (1e-2, 3.0)])
def test_chunked_loss_is_the_plain_loss(chunk, z_loss, cap):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 12, 8)).astype(np.float32)
    table = rng.normal(size=(11, 8)).astype(np.float32)
    targets, weights = tokens(3, 12, 11), rng.random((3, 12)).astype(np.float32)

    def chunked(hidden, table):
        return linear_cross_entropy(hidden, table, None, targets, weights, chunk, z_loss, cap)

    def plain(hidden, table):
        return plain_cross_entropy(hidden, table, targets, weights, z_loss, cap)

    for ours, theirs in zip(chunked(hidden, table), plain(hidden, table), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    ours = jax.grad(lambda h, t: 3 * chunked(h, t)[0], argnums=(0, 1))(hidden, table)
    theirs = jax.grad(lambda h, t: 3 * plain(h, t)[0], argnums=(0, 1))(hidden, table)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_chunked_loss_never_holds_all_logits():
    """In the compiled gradient no array has as many elements as the logits of the whole batch."""
    B, L, D, V, chunk = 4, 64, 8, 512, 16
    shapes = [
        jax.ShapeDtypeStruct(s, d) for s, d in [((B, L, D), "float32"), ((V, D), "float32"), ((B, L), "int32"), ((B, L), "float32")]
    ]

    def loss(hidden, table, targets, weights):
        return linear_cross_entropy(hidden, table, None, targets, weights, chunk, 1e-4, None)[0]

    text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile().as_text()
    import re

    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert B * chunk * V in sizes, "one chunk's logits are there"
    assert max(sizes) == B * chunk * V, f"an array of {max(sizes)} elements, all logits are {B * L * V}"


def test_any_chunk_gives_the_same_loss():
    model = Model(TINY)
    params, ids = perturbed(model), tokens(2, 13)
    batch = {"tokens_BL": ids, "targets_BL": ids, "weights_BL": np.ones(ids.shape, np.float32)}
    losses = [model.apply(params, batch, method="loss", chunk=chunk)[0] for chunk in (1, 4, 13, 100)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    scores = [model.apply(params, batch, method="scores", chunk=chunk) for chunk in (4, 13)]
    jax.tree.map(lambda some, whole: np.testing.assert_allclose(some, whole, rtol=1e-4, atol=1e-5), *scores)


def test_a_prime_length_is_cut_into_few_chunks():
    """509 positions in chunks of up to 128 are four chunks, the last one padded, not 509 of one position."""
    hidden = jax.ShapeDtypeStruct((2, 509, 8), "float32")
    assert jax.eval_shape(lambda x: _chunks(x, 128), hidden).shape == (4, 2, 128, 8)
