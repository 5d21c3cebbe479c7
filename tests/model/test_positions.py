"""How a token knows its place: by formula against Hugging Face, and by what a rotation must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import Model, RotaryConfig, TransformerConfig, empty_cache
from jaxlm.model.distance_bias import alibi, block_bias, distance_range
from jaxlm.model.mask import distances
from jaxlm.model.positions import relative_buckets, rotary_angles, rotary_frequencies, rotate, sinusoids

CONFIG = TransformerConfig(vocab_size=8, positions=64, width=64, heads=4, position="rotary")  # heads of 16

SCALINGS = {
    "none": RotaryConfig(),
    "linear": RotaryConfig(scaling="linear", factor=4.0),
    "dynamic": RotaryConfig(scaling="dynamic", factor=2.0, original_positions=32),
    "llama3": RotaryConfig(scaling="llama3", factor=8.0, original_positions=32, theta=500.0),
    "yarn": RotaryConfig(scaling="yarn", factor=4.0, original_positions=64, theta=500.0),
    "half of the head": RotaryConfig(fraction=0.5),
}


def angles_of(positions, rope: RotaryConfig):
    positions_BL = jnp.asarray(positions, jnp.int32)[None, :]
    return rotary_angles(positions_BL, dataclasses.replace(CONFIG, rope=rope), rope.theta)


def heads(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, length, CONFIG.heads, CONFIG.H)).astype(np.float32)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotation_keeps_norms_up_to_its_magnitude(scaling):
    q_BLNH = heads(48, 0)
    cos, sin = angles_of(range(48), SCALINGS[scaling])
    turned_BLNH = rotate(q_BLNH, (cos, sin))
    magnitude = 0.1 * np.log(4.0) + 1 if scaling == "yarn" else 1.0
    np.testing.assert_allclose(np.linalg.norm(turned_BLNH, axis=-1), magnitude * np.linalg.norm(q_BLNH, axis=-1), rtol=1e-5)
    assert not np.allclose(turned_BLNH[:, 1:], magnitude * q_BLNH[:, 1:], atol=0.1), "and yet it turns"


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_product_of_query_and_key_depends_on_their_distance_alone(scaling):
    """One query and one key vector, repeated along the row: their product is the same along each diagonal, and it is
    not the same on all diagonals."""
    q_BLNH, k_BLNH = (np.repeat(heads(1, seed), 24, axis=1) for seed in (1, 2))
    angles = angles_of(range(7, 31), SCALINGS[scaling])
    scores_NLS = np.einsum("BLNH,BSNH->NLS", rotate(q_BLNH, angles), rotate(k_BLNH, angles))
    for shift in range(-23, 24):
        along = np.diagonal(scores_NLS, shift, axis1=1, axis2=2)
        np.testing.assert_allclose(along, along[:, :1] + 0 * along, rtol=1e-4, atol=1e-4)
    assert np.ptp(scores_NLS[:, :, 0], axis=1).min() > 0.5


def test_a_fraction_leaves_the_rest_of_the_head_alone():
    """A quarter of 16 numbers: the first 4 turn as a head of 4 would, the other 12 are passed on bit for bit."""
    q_BLNH = heads(20, 3)
    turned_BLNH = rotate(q_BLNH, angles_of(range(20), RotaryConfig(fraction=0.25)))
    np.testing.assert_array_equal(turned_BLNH[..., 4:], q_BLNH[..., 4:])
    assert not np.allclose(turned_BLNH[:, 1:, :, :4], q_BLNH[:, 1:, :, :4], atol=0.1)
    small = dataclasses.replace(CONFIG, head_width=4)
    by_itself = rotary_angles(jnp.arange(20, dtype=jnp.int32)[None, :], small, 10_000.0)
    np.testing.assert_array_equal(turned_BLNH[..., :4], rotate(q_BLNH[..., :4], by_itself))


def test_rotation_by_complex_numbers():
    """Su et al. 2021, eq. 34: pair i, as the complex number x_i + j·x_(i+8), times exp(j·place·theta^(−2i/16))."""
    q_BLNH = heads(20, 4)
    pairs = q_BLNH[..., :8] + 1j * q_BLNH[..., 8:]
    turn = np.exp(1j * np.arange(20)[:, None] * 10_000.0 ** (-2 * np.arange(8) / 16))
    expected = pairs * turn[None, :, None, :]
    turned_BLNH = rotate(q_BLNH, angles_of(range(20), RotaryConfig()))
    np.testing.assert_allclose(turned_BLNH, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)


def test_dynamic_stretches_only_beyond_the_trained_context():
    dynamic = SCALINGS["dynamic"]
    for ours, plain in zip(angles_of(range(32), dynamic), angles_of(range(32), RotaryConfig()), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert not np.allclose(angles_of(range(33), dynamic)[1], angles_of(range(33), RotaryConfig())[1], atol=1e-3)


def test_dynamic_reads_a_text_the_same_padded_in_pieces_and_whole():
    """A text three times beyond the trained context: its last logits, and of a packed row those of each document."""
    config = TransformerConfig(
        vocab_size=64, positions=128, layers=2, width=32, heads=2, position="rotary",
        rope=RotaryConfig(scaling="dynamic", factor=2.0, original_positions=16),
    )  # fmt: skip
    model = Model(config)
    params = jax.tree.map(lambda leaf: leaf * 3, model.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (1, 50), 0, 64)
    apply = jax.jit(lambda params, batch, cache=None: model.apply(params, batch, cache))
    whole = apply(params, {"tokens_BL": tokens})[0][0]
    padded = apply(params, {"tokens_BL": jnp.pad(tokens, ((0, 0), (0, 14)))}, empty_cache(config, 1, 64))[0][0, :50]
    np.testing.assert_allclose(padded, whole, atol=1e-4)
    cache, parts = empty_cache(config, 1, 64), []
    for start in range(0, 50, 10):
        logits, cache = apply(params, {"tokens_BL": tokens[:, start : start + 10]}, cache)
        parts.append(logits[0])
    np.testing.assert_allclose(jnp.concatenate(parts), whole, atol=1e-4)
    packed = {
        "tokens_BL": jnp.concatenate([tokens[:, :14], tokens], axis=1),
        "positions_BL": jnp.asarray([[*range(14), *range(50)]], jnp.int32),
        "segments_BL": jnp.asarray([[1] * 14 + [2] * 50], jnp.int32),
    }
    np.testing.assert_allclose(apply(params, packed)[0][0, 14:], whole, atol=1e-4)
    np.testing.assert_allclose(apply(params, packed)[0][0, :14], whole[:14], atol=1e-4)


def test_dynamic_angles_take_memory_in_proportion_to_the_row():
    """A packed row of 8,192 tokens: nothing of its square."""
    config = dataclasses.replace(CONFIG, rope=SCALINGS["dynamic"])
    lowered = jax.jit(lambda positions_BL: rotary_angles(positions_BL, config, 10_000.0)).lower(
        jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    )
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 8192 * 8192


@pytest.mark.parametrize("scaling", ["dynamic", "yarn"])
def test_layers_that_see_a_window_with_a_base_of_their_own_are_not_scaled(scaling):
    rope = dataclasses.replace(SCALINGS[scaling], local_theta=5_000.0)
    config = dataclasses.replace(CONFIG, rope=rope, layer_pattern="LG", window=8)
    model, kinds = Model(config), {}
    for pattern, of in (("L", RotaryConfig(theta=5_000.0)), ("G", dataclasses.replace(rope, local_theta=None))):
        one = dataclasses.replace(config, layer_pattern=pattern, layers=1)
        alone = dataclasses.replace(one, rope=of)
        params = Model(one).init(jax.random.key(0))
        batch = {"tokens_BL": jnp.arange(64, dtype=jnp.int32)[None] % 8}
        kinds[pattern] = np.asarray(Model(one).apply(params, batch)[0])
        np.testing.assert_allclose(kinds[pattern], Model(alone).apply(params, batch)[0], atol=1e-5)
    assert not np.allclose(kinds["L"], kinds["G"], atol=1e-2) and model.config.rope.local.scaling == "none"


def test_dynamic_needs_more_than_one_pair():
    with pytest.raises(ValueError, match="dynamic"):
        dataclasses.replace(CONFIG, head_width=2, rope=SCALINGS["dynamic"])


def test_distances_count_on_behind_a_cache():
    np.testing.assert_array_equal(distances(2, 4, None), [[[0, 1, 2, 3], [-1, 0, 1, 2]]])
    np.testing.assert_array_equal(distances(2, 4, jnp.int32(2)), [[[-2, -1, 0, 1], [-3, -2, -1, 0]]])
    each = distances(2, 4, jnp.array([2, 0], jnp.int32))
    np.testing.assert_array_equal(each, [[[-2, -1, 0, 1], [-3, -2, -1, 0]], [[0, 1, 2, 3], [-1, 0, 1, 2]]])


def test_alibi_by_hand():
    """Press et al. 2022, §3: 8 heads have the slopes 1/2, 1/4 … 1/256; the penalty is slope · distance on both sides."""
    bias_BNLS = block_bias(alibi(distance_range(5), 8)[:, None], 0, 5, 5)[:, :, 0]
    assert bias_BNLS.shape == (1, 8, 5, 5)
    for n in range(8):
        np.testing.assert_allclose(bias_BNLS[0, n, 3], -np.array([3, 2, 1, 0, 1]) / 2 ** (n + 1))


# --- against Hugging Face -----------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, farthest", [(32, 128), (16, 64), (64, 256), (8, 20), (12, 100)])
def test_relative_buckets_are_t5s(causal, buckets, farthest):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    apart = np.arange(-300, 301, dtype=np.int32)[None, :]
    theirs = T5Attention._relative_position_bucket(torch.tensor(apart).long(), not causal, buckets, farthest).numpy()
    # Compiled too: a rewritten division would move a distance across the border of a bucket.
    for compute in (relative_buckets, jax.jit(relative_buckets, static_argnums=(1, 2, 3))):
        np.testing.assert_array_equal(compute(jnp.asarray(apart), causal, buckets, farthest), theirs)


@pytest.mark.parity
@pytest.mark.parametrize("heads", [4, 8, 12])
def test_alibi_is_blooms_up_to_a_constant_a_row(heads):
    """Bloom's penalty is by the key's place alone: on the keys up to the query it differs from ours by a constant, which
    the softmax does not see."""
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    L = 24
    ours = np.asarray(block_bias(alibi(distance_range(L), heads)[:, None], 0, L, L))[0, :, 0]
    theirs = build_alibi_tensor(torch.ones(1, L, dtype=torch.long), heads, torch.float32).numpy()
    assert theirs.shape == (heads, 1, L)
    gap_NLS = ours - theirs
    for l in range(L):
        np.testing.assert_allclose(gap_NLS[:, l, : l + 1], gap_NLS[:, l, :1].repeat(l + 1, axis=1), atol=1e-5)
    assert np.ptp(gap_NLS[:, 0, :], axis=-1).min() > 0.01, "later keys are penalised here and rewarded there"


@pytest.mark.parity
@pytest.mark.parametrize("width", [16, 26])
def test_sinusoids_are_marians(width):
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    table = MarianSinusoidalPositionalEmbedding(128, width).create_weight().numpy()
    positions_BL = np.random.default_rng(0).permutation(128).astype(np.int32).reshape(2, 64)
    np.testing.assert_allclose(sinusoids(jnp.asarray(positions_BL), width), table[positions_BL], atol=2e-5)


def huggingface(kind: str, head_width: int, theta: float, positions: int, fraction: float = 1.0, seq_len=None, **scaling):
    """Their frequencies and what they multiply cos and sin with."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": fraction, **scaling}
    config = LlamaConfig(
        hidden_size=4 * head_width, num_attention_heads=4, head_dim=head_width, max_position_embeddings=positions,
        rope_parameters=rope,
    )  # fmt: skip
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=seq_len)
    return frequencies.numpy(), magnitude


# head width, theta, trained context, ours, theirs
STRETCHED = {
    "linear 2": (64, 10_000.0, 2048, {"scaling": "linear", "factor": 2.0}, {"factor": 2.0}),
    "linear 8, half": (128, 1e6, 4096, {"scaling": "linear", "factor": 8.0, "fraction": 0.5}, {"factor": 8.0, "fraction": 0.5}),
    "llama 3.1": (
        128, 500_000.0, 8192, {"scaling": "llama3", "factor": 8.0},
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "llama 3.2": (
        64, 500_000.0, 8192, {"scaling": "llama3", "factor": 32.0},
        {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "llama3, other bounds": (
        64, 10_000.0, 512, {"scaling": "llama3", "factor": 4.0, "low_frequency": 2.0, "high_frequency": 9.0},
        {"factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0},
    ),
    "yarn 4": (64, 10_000.0, 4096, {"scaling": "yarn", "factor": 4.0}, {"factor": 4.0}),
    "yarn 32": (128, 1e6, 32_768, {"scaling": "yarn", "factor": 32.0}, {"factor": 32.0}),
    "yarn, other bounds": (
        32, 10_000.0, 256, {"scaling": "yarn", "factor": 2.5, "beta_fast": 16.0, "beta_slow": 2.0},
        {"factor": 2.5, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "yarn, own magnitude": (
        64, 10_000.0, 1024, {"scaling": "yarn", "factor": 4.0, "magnitude": 1.3}, {"factor": 4.0, "attention_factor": 1.3}
    ),
    "yarn not stretched": (64, 10_000.0, 1024, {"scaling": "yarn", "factor": 1.0}, {"factor": 1.0}),
    "yarn, half": (64, 10_000.0, 4096, {"scaling": "yarn", "factor": 4.0, "fraction": 0.5}, {"factor": 4.0, "fraction": 0.5}),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("case", STRETCHED)
def test_stretched_frequencies_are_transformers(case):
    width, theta, trained, ours, theirs = STRETCHED[case]
    kind = ours["scaling"]
    original = {} if kind == "linear" else {"original_max_position_embeddings": trained}
    frequencies, magnitude = huggingface(kind, width, theta, int(trained * ours["factor"]), **original, **theirs)
    rope = RotaryConfig(theta=theta, original_positions=trained, **ours)
    found = rotary_frequencies(rope, int(width * rope.fraction), theta, trained)
    assert found.shape == frequencies.shape
    np.testing.assert_allclose(found, frequencies, rtol=1e-6)
    config = dataclasses.replace(CONFIG, head_width=width, rope=rope)
    cos, sin = rotary_angles(jnp.zeros((1, 1), jnp.int32), config, theta)
    np.testing.assert_allclose(cos, np.full(cos.shape, magnitude), rtol=1e-6)
    assert not np.any(sin)


@pytest.mark.parity
@pytest.mark.parametrize("position", [15, 63, 64, 199])
def test_dynamic_angles_are_those_with_which_transformers_decodes(position):
    """The frequencies that they compute once this position is read: at a length of one more."""
    frequencies, _ = huggingface("dynamic", CONFIG.H, 10_000.0, 64, factor=2.0, seq_len=position + 1)
    cos, sin = angles_of(range(position + 1), RotaryConfig(scaling="dynamic", factor=2.0))
    np.testing.assert_allclose(cos[0, position, 0], np.cos(position * frequencies), atol=1e-4)
    np.testing.assert_allclose(sin[0, position, 0], np.sin(position * frequencies), atol=1e-4)
