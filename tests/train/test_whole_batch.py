"""Contrastive learning compares all rows of a batch with each other, however many parts the model reads them in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import HeadConfig, Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch
from jaxlm.train import OptimConfig, init_state, make_optimizer, make_schedule, make_train_step, objectives

CONFIG = TransformerConfig(
    vocab_size=64, positions=16, layers=2, width=16, heads=2, architecture="encoder",
    head=HeadConfig(kind="embedding", pool="mean", dense=False),
)  # fmt: skip
OPTIM = OptimConfig(learning_rate=0.1, clip=None)


def rows(rng):
    segments = (np.arange(16) < rng.integers(4, 17, (16, 1))).astype(np.int32)
    return {"tokens_BL": rng.integers(0, 64, (16, 16)).astype(np.int32), "segments_BL": segments}


def batch(negatives=True):
    rng = np.random.default_rng(0)
    names = ("anchor", "positive", "negative") if negatives else ("anchor", "positive")
    return {name: rows(rng) for name in names} | {"weights_B": (np.arange(16) != 13).astype(np.float32)}


def one_step(accumulate, devices=1):
    """The metrics of a step."""
    mesh = make_mesh(ParallelConfig(), jax.devices()[:devices])
    model, schedule = Model(CONFIG), make_schedule(OPTIM, 10)
    optimizer = make_optimizer(OPTIM, schedule)
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, 0, mesh)
        step = make_train_step(model, objectives.contrast(0.05), optimizer, schedule, mesh, seed=0, accumulate=accumulate)
        return jax.device_get(step(state, place_batch(batch(), mesh))[1])


@pytest.fixture(scope="module")
def whole():
    return one_step(1)


@pytest.mark.parametrize("accumulate, devices", [(2, 1), (16, 1), (2, 4)])
def test_the_update_does_not_depend_on_accumulation(whole, accumulate, devices):
    """Each part used to have its own negatives: with 16 parts there were none, and the loss was 0."""
    metrics = one_step(accumulate, devices)
    assert metrics["loss"] > 1
    for name in ("loss", "grad_norm", "matched", "weight"):
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-4, err_msg=name)


def test_gradients_in_parts_are_those_of_the_whole_batch():
    model = Model(CONFIG)
    params, given = model.init(jax.random.key(0)), jax.tree.map(jnp.asarray, batch())
    objective = objectives.contrast(0.05)
    compute = [jax.jit(jax.grad(lambda p, o=o: o(model.apply, p, given, None)[0])) for o in (objective, objective.in_parts(4))]
    one, parts = (f(params) for f in compute)
    for a, b in zip(*map(jax.tree.leaves, (one, parts)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()) + 1e-6)


def test_parts_hold_the_activations_of_one_part():
    """Accumulation saves memory: of 8 parts the temporaries are far from those of the whole batch."""
    config = TransformerConfig(**{**CONFIG.__dict__, "width": 64, "layers": 4})
    model, sizes = Model(config), {}
    for parts in (1, 8):
        objective = objectives.contrast(0.05).in_parts(parts)
        given = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch()))
        compiled = jax.jit(jax.grad(lambda p, b, o=objective: o(model.apply, p, b, None)[0])).lower(model.shapes, given).compile()
        sizes[parts] = compiled.memory_analysis().temp_size_in_bytes
    assert sizes[8] < sizes[1] / 2.5


def test_integers_are_not_widened():
    """Of a base that is held in fewer bits no part becomes float32 before the model makes its matrices."""

    def apply(params, rows, **_):
        return rows["x_BD"] * params["scale"] + params["values"][:2, :4].astype(jnp.float32), None

    params = {"scale": jnp.ones(()), "values": jnp.ones((64, 32), jnp.int8)}
    rows = {"x_BD": jnp.ones((2, 4))}
    batch = {"anchor": rows, "positive": rows, "weights_B": jnp.ones(2)}
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    objective = objectives.contrast(0.05).in_parts(2)
    assert "f32[64,32]" not in str(jax.make_jaxpr(lambda batch: objective(apply, params, batch, None)[0])(batch))
