"""Every axis of the mesh, alone and together: each kind of model has one device's losses and gradients."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch, stored_shardings
from jaxlm.train import objectives

pytestmark = pytest.mark.parallel

B, L, V = 8, 32, 64
DECODER = TransformerConfig(
    vocab_size=V, positions=L, layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, position="rotary", norm="rmsnorm",
    activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
MODELS = {
    "decoder": DECODER,
    "experts": dataclasses.replace(DECODER, moe=dataclasses.replace(DECODER.moe, experts=4, chosen=2)),
    "encoder": TransformerConfig(
        architecture="encoder", vocab_size=V, positions=L, layers=2, width=32, heads=4, norm_position="post", embedding_norm=True,
        head=dataclasses.replace(TransformerConfig().head, kind="masked_lm"),
    ),
    "encoder_decoder": TransformerConfig(
        architecture="encoder_decoder", vocab_size=V, positions=L, layers=2, width=32, heads=4, position="relative", bias=False,
        norm="rmsnorm",
    ),
}  # fmt: skip
MESHES = [
    {"data": 8}, {"fsdp": 8}, {"context": 8}, {"tensor": 4, "data": 2},
    {"data": 2, "fsdp": 4}, {"data": 4, "context": 2}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "context": 4},
    {"context": 4, "tensor": 2}, {"context": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "context": 2},
    {"data": 2, "fsdp": 2, "tensor": 2}, {"stage": 2, "data": 4}, {"stage": 2, "fsdp": 2, "tensor": 2},
    {"stage": 2, "data": 2, "context": 2}, {"stage": 2, "context": 2, "tensor": 2},
    {"data": 2, "context": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2},
]  # fmt: skip


def name_of(mesh):
    return "-".join(f"{axis}{size}" for axis, size in mesh.items())


def rows(seed=0):
    """Ragged packed rows: documents of several lengths, padding at the end of every other row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, L)).astype(np.int32)
    segments = 1 + np.cumsum(rng.random((B, L)) < 0.15, axis=1, dtype=np.int32)
    segments[::2, -5:] = 0
    first = np.concatenate([np.ones((B, 1), bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    place = np.arange(L)[None]
    positions = (place - np.maximum.accumulate(np.where(first, place, 0), axis=1)).astype(np.int32)
    return {
        "tokens_BL": tokens, "targets_BL": np.roll(tokens, -1, 1), "weights_BL": (segments > 0).astype(np.float32),
        "segments_BL": segments, "positions_BL": positions,
    }  # fmt: skip


def batch_for(config):
    if config.architecture != "encoder_decoder":
        return rows()
    read = {name: x for name, x in rows(1).items() if name in ("tokens_BL", "segments_BL")}
    written = {name: x for name, x in rows(2).items() if name != "positions_BL"}
    for part in (read, written):
        part["segments_BL"] = np.minimum(part["segments_BL"], 1)
    return {"encoder": read, "decoder": written}


def three_steps(config, parallel):
    """The losses before, and after one and two steps of gradient descent, and the first gradients."""
    model, objective = Model(config), objectives.tokens(8, 1e-3)
    mesh = make_mesh(parallel, jax.devices()[: 1 if parallel == ParallelConfig(data=1) else 8])
    shardings = stored_shardings(model.axes, model.shapes, mesh)

    def loss(params, batch):
        total, weight, _ = objective(model.apply, params, batch, None)
        return total / weight

    def run(params, batch):
        def step(params, _):
            value, grads = jax.value_and_grad(loss)(params, batch)
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), (value, grads)

        _, (values, grads) = jax.lax.scan(step, params, length=3)
        return values, jax.tree.map(lambda g: g[0], grads)

    with jax.set_mesh(mesh):
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
        batch = jax.tree.map(lambda x: x, place_batch(batch_for(config), mesh))
        return jax.device_get(jax.block_until_ready(jax.jit(run, in_shardings=(shardings, None))(params, batch)))


@pytest.fixture(scope="module")
def alone():
    return {}


def cases():
    """Every kind of model on every mesh; all but the decoder's on every second one, and the last two meshes', count as slow."""
    for kind in MODELS:
        for mesh in MESHES:
            slow = () if (kind == "decoder" and mesh in MESHES[::2]) or mesh in MESHES[-2:] else (pytest.mark.slow,)
            yield pytest.param(kind, mesh, id=f"{kind}-{name_of(mesh)}", marks=slow)


@pytest.mark.parametrize("kind, mesh", cases())
def test_every_mesh_gives_one_devices_numbers(kind, mesh, alone):
    check(MODELS[kind], mesh, alone)


@pytest.mark.parametrize(
    "mesh",
    [
        {"expert": 2, "fsdp": 2, "tensor": 2},
        *(pytest.param(mesh, marks=pytest.mark.slow, id=name_of(mesh)) for mesh in (
            {"expert": 4, "data": 2}, {"expert": 2, "context": 2, "tensor": 2}, {"stage": 2, "expert": 2, "fsdp": 2},
            {"expert": 4, "tensor": 2},
        )),
    ],
    ids=name_of,
)  # fmt: skip
def test_experts_on_devices_of_their_own(mesh, alone):
    check(MODELS["experts"], mesh, alone)


@pytest.mark.parametrize(
    "rounds, parts", [(2, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 8), (2, 2), (4, 2)))]
)
def test_rounds_and_parts_of_a_pipeline(rounds, parts, alone):
    config = dataclasses.replace(DECODER, layers=7 if rounds == 2 else 8)  # seven: the last run has a layer too few
    check(config, {"stage": 2, "data": 1, "fsdp": 4}, alone, rounds=rounds, microbatches=parts)


def check(config, mesh, alone, **pipeline):
    if "stage" in mesh:  # the balance of experts is that of each microbatch, as it is of each part in accumulation
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, balance_loss=0.0, router_z_loss=0.0))
    if config not in alone:
        alone[config] = three_steps(config, ParallelConfig(data=1))
    losses, grads = alone[config]
    ours, theirs = three_steps(dataclasses.replace(config, **pipeline), ParallelConfig(**{"data": 1, **mesh}))
    assert losses[2] < losses[0]
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for (path, one), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(theirs), strict=True):
        scale = max(np.abs(one).max(), 1e-4 * largest)  # a key's bias changes no softmax: its gradient is rounding alone
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))
