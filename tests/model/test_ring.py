"""Attention over a length that devices share: by every way the same as on one device, values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import ring
from jaxlm.model.kernels import attend, sharing
from jaxlm.model.mask import Mask
from jaxlm.model.ring import _from_zigzag, _to_zigzag, _zigzag
from jaxlm.parallel import ParallelConfig, make_mesh

pytestmark = pytest.mark.parallel

B, L, N, K, H = 4, 48, 4, 2, 8


def ragged(rows=B, length=L, seed=0):
    """Packed rows: documents of several lengths that begin anywhere, padding at some ends."""
    rng = np.random.default_rng(seed)
    starts = rng.random((rows, length)) < 0.12
    segments = 1 + np.cumsum(starts, axis=1)
    segments[::2, -5:] = 0
    return jnp.asarray(segments, jnp.int32)


SEGMENTS = ragged()
MASKS = {
    "causal": Mask(),
    "causal, packed": Mask(SEGMENTS, SEGMENTS),
    "window": Mask(window=7),
    "window, packed": Mask(SEGMENTS, SEGMENTS, window=11),
    "prefix": Mask(SEGMENTS, SEGMENTS, prefix_B=jnp.array([0, 3, 20, 40], jnp.int32)),
    "both ways": Mask(causal=False),
    "both ways, packed": Mask(SEGMENTS, SEGMENTS, causal=False),
    "both ways, window": Mask(SEGMENTS, SEGMENTS, causal=False, window=9),
}
MESHES = {
    "context 8": ParallelConfig(context=8),
    "data 2, context 4": ParallelConfig(data=2, context=4),
    "context 4, tensor 2": ParallelConfig(context=4, tensor=2),
    "fsdp 2, context 2, tensor 2": ParallelConfig(fsdp=2, context=2, tensor=2),
}


def inputs(heads=N, shared=K, length=L, size=L, seed=1):
    rng = np.random.default_rng(seed)
    shapes = (B, length, heads, H), (B, size, shared, H), (B, size, shared, H), (B, length, heads, H)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def both(mask, mesh=None, softcap=None, arrays=None, bias=None, **options):
    """Values, and gradients of a weighted sum of them, which no query without a key takes part in."""
    q, k, v, weights = arrays or inputs()
    if mask.query_segments_BL is not None:
        weights = jnp.where(mask.query_segments_BL[:, :, None, None] > 0, weights, 0)

    def total(q, k, v, bias, mask):
        mixed = attend(q, k, v, mask, softcap=softcap, bias_NY=bias, **options)
        return jnp.sum(mixed * weights), jnp.where(weights == 0, 0, mixed)

    compute = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2) if bias is None else (0, 1, 2, 3), has_aux=True))
    if mesh is None:
        (_, mixed), grads = compute(q, k, v, bias, mask)
    else:
        with jax.set_mesh(mesh):
            (_, mixed), grads = jax.block_until_ready(compute(q, k, v, bias, mask))
    return [np.asarray(x) for x in (mixed, *grads)]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("way", ["ring", "ulysses", "gather"])
@pytest.mark.parametrize("name", MASKS)
def test_every_way_is_plain_attention(name, way):
    mesh = make_mesh(MESHES["data 2, context 4"])
    assert_same(both(MASKS[name], mesh, context=way), both(MASKS[name], kernel="xla"))


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_is_plain_attention(mesh):
    """Two key/value heads on up to eight devices, with a cap: they are split, shared or repeated as the mesh asks."""
    mask = MASKS["causal, packed"]
    assert_same(both(mask, make_mesh(MESHES[mesh]), softcap=3.0, context="ring"), both(mask, softcap=3.0, kernel="xla"))


@pytest.mark.parametrize("mesh", ["data 2, context 4", "fsdp 2, context 2, tensor 2"])
@pytest.mark.parametrize("name", ["causal, packed", "both ways, window"])
def test_biases_by_distance_go_round(name, mesh):
    """ALiBi's and T5's: the same values and the same gradients, the bias' own among them, which sums over all devices."""
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((N, 2 * L - 1)), jnp.float32)
    ours = both(MASKS[name], make_mesh(MESHES[mesh]), bias=bias, context="ring")
    assert_same(ours, both(MASKS[name], bias=bias, kernel="xla"))


@pytest.mark.parametrize("name", ["causal, packed", "both ways, window"])
def test_parts_of_a_prime_length_are_padded_to_blocks(name, monkeypatch):
    """23 and 46 tokens in blocks of 16: a divisor would make blocks of one token, or one of all."""
    monkeypatch.setattr(ring, "BLOCK", 16)
    segments = ragged(length=92)
    mask = dataclasses.replace(MASKS[name], query_segments_BL=segments, key_segments_BS=segments)
    bias = jnp.asarray(np.random.default_rng(2).standard_normal((N, 2 * 92 - 1)), jnp.float32)
    arrays, mesh = inputs(length=92, size=92), make_mesh(MESHES["fsdp 2, context 2, tensor 2"])
    ours = both(mask, mesh, arrays=arrays, bias=bias, context="ring")
    assert_same(ours, both(mask, arrays=arrays, bias=bias, kernel="xla"))


def test_one_key_value_head_goes_round_for_all():
    arrays, mesh = inputs(shared=1), make_mesh(MESHES["context 4, tensor 2"])
    for way in ("ring", "ulysses"):
        assert_same(both(Mask(), mesh, arrays=arrays, context=way), both(Mask(), arrays=arrays, kernel="xla"))


def test_queries_to_another_text():
    """Cross-attention: 48 queries to 64 keys, some of them padding."""
    arrays = inputs(size=64)
    mask = Mask(None, ragged(length=64, seed=3).clip(0, 1), causal=False)
    assert_same(both(mask, make_mesh(MESHES["data 2, context 4"]), arrays=arrays, context="ring"), both(mask, arrays=arrays))


@pytest.mark.parametrize("ways", [2, 3, 4, 8])
def test_the_balanced_order(ways):
    """Each device gets an early part and the late one that mirrors it, and the way back is the way back."""
    assert sorted(_zigzag(ways)[0]) == sorted(_zigzag(ways)[1]) == list(range(ways))
    mesh = jax.make_mesh((ways,), ("context",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:ways])
    places = jnp.arange(4 * ways, dtype=jnp.int32)[None]
    spec = jax.sharding.PartitionSpec(None, "context")
    with jax.set_mesh(mesh):
        there = jax.jit(jax.shard_map(lambda x: _to_zigzag(ways, x), in_specs=spec, out_specs=spec))(places)
        back = jax.jit(jax.shard_map(lambda x: _from_zigzag(ways, x), in_specs=spec, out_specs=spec))(there)
    parts = np.asarray(there).reshape(ways, 2, 2)
    for device in range(ways):
        assert parts[device].tolist() == [
            [2 * device, 2 * device + 1],
            [2 * (2 * ways - 1 - device), 2 * (2 * ways - 1 - device) + 1],
        ]
    np.testing.assert_array_equal(back, places)


def test_what_cannot_go_round_goes_another_way(caplog):
    q, k, _, _ = inputs()
    drop = (0.1, jax.random.key(0))
    with jax.set_mesh(make_mesh(MESHES["data 2, context 4"])):
        assert sharing("auto", q, k, Mask(), None) == "ring"
        assert sharing("auto", q, k, Mask(), drop) == "ulysses"
        assert sharing("auto", q[:, :, :3], k[:, :, :1], Mask(), drop) == "gather"
        assert sharing("auto", q[:, :46], k[:, :46], Mask(), None) == "ulysses", "46 tokens on 4 devices"
        assert sharing("ring", q, k, Mask(), drop) == "ulysses"
    assert [record.getMessage() for record in caplog.records] == ["attention by ring cannot be used here: it has no dropout"]


def test_the_ring_never_holds_its_queries_against_all_keys():
    """A device's 512 queries and all 4,096 keys would be an eighth of all scores; some blocks of 256 are far less."""
    q, k, v, _ = inputs(length=4096, size=4096)

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, Mask(), context="ring"))

    split = jax.sharding.NamedSharding(make_mesh(MESHES["context 8"]), jax.sharding.PartitionSpec(None, "context"))
    with jax.set_mesh(split.mesh):
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=split, out_shardings=split).lower(q, k, v).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * B * N * 512 * 4096 / 2
