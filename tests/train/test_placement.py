"""Where the optimiser's state lies: in parts over data (ZeRO-1), and on the host."""

import dataclasses
import re
from typing import get_args

import jax
import numpy as np
import pytest

from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch, settle
from jaxlm.train import (
    OptimConfig,
    TuneConfig,
    Tuning,
    init_state,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    objectives,
)
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.moments import Name
from jaxlm.train.step import state_shapes, state_shardings

MODEL = Model(TransformerConfig(vocab_size=128, positions=32, layers=2, width=64, heads=2, mlp_width=256))
TUNING = Tuning(TuneConfig(), MODEL)
PLAIN = OptimConfig(learning_rate=3e-3, schedule="constant", warmup=1)


def build(optim, parallel, accumulate=1):
    mesh, schedule = make_mesh(parallel, jax.devices()[: parallel.data * parallel.fsdp * parallel.tensor]), make_schedule(optim, 10)
    optimizer = make_optimizer(optim, schedule, TUNING)
    step = make_train_step(
        MODEL, objectives.tokens(32), optimizer, schedule, mesh, seed=0, accumulate=accumulate, tuning=TUNING, optim=optim
    )  # fmt: skip
    return mesh, optimizer, step


def rows(seed):
    tokens = np.random.default_rng(seed).integers(0, 128, (8, 33)).astype(np.int32)
    return {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": np.ones((8, 32), np.float32)}


def train(optim, parallel, steps=3, accumulate=1):
    mesh, optimizer, step = build(optim, parallel, accumulate)
    losses = []
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optimizer, 0, mesh, TUNING, optim=optim)
        for i in range(steps):
            state, metrics = step(state, place_batch(rows(i), mesh))
            losses.append(settle(mesh, metrics)["loss"])
    return np.asarray(jax.device_get(losses)), state


def held(tree):
    """Bytes of the first device's parts."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def total(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parallel
@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param(ParallelConfig(data=8), id="data"),
        pytest.param(ParallelConfig(data=2, fsdp=2, tensor=2), id="three", marks=pytest.mark.slow),
    ],
)
def test_zero1_holds_a_part_of_the_state_and_takes_the_same_steps(parallel):
    zero1 = dataclasses.replace(PLAIN, zero1=True)
    losses, usual = train(PLAIN, parallel)
    same, spread = train(zero1, parallel)
    np.testing.assert_allclose(same, losses, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(usual.params), jax.tree.leaves(spread.params), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim), "parameters lie as before"
    assert held(spread.opt_state) < 1.05 * held(usual.opt_state) / parallel.data
    parts, _ = train(zero1, parallel, accumulate=2 if parallel.fsdp > 1 else 1)
    np.testing.assert_allclose(parts, losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("name", get_args(Name))
def test_every_optimiser_has_its_state_in_parts_and_on_the_host(name):
    losses, usual = train(dataclasses.replace(PLAIN, name=name), ParallelConfig(data=4))
    same, spread = train(dataclasses.replace(PLAIN, name=name, zero1=True, offload=True), ParallelConfig(data=4))
    np.testing.assert_allclose(same, losses, rtol=1e-3 if name == "soap" else 1e-5)  # whose first bases hang on rounding
    mesh = make_mesh(ParallelConfig(data=4), jax.devices()[:4])
    with jax.set_mesh(mesh):
        make_eval_step(MODEL, objectives.tokens(32), mesh)(spread.scored, place_batch(rows(9), mesh))
    assert held(spread.opt_state) < 0.5 * held(usual.opt_state) or name == "adafactor"  # whose state is small, and whole


@pytest.mark.parallel
def test_zero1_gathers_parameters_once_and_sums_gradients():
    """A sum of gradients of which each device keeps its part (whole on XLA:CPU, which scatters nothing), then the new
    parameters: what AdamW without it sends, and the gathering in place of the sum's second half."""
    optim = dataclasses.replace(PLAIN, zero1=True, clip=None)
    mesh, optimizer, step = build(optim, ParallelConfig(data=8))
    with jax.set_mesh(mesh):
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), rows(0))
        hlo = step.lower(state_shapes(MODEL, optimizer, TUNING, optim), batch).compile().as_text()
    kinds = set(re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", hlo))
    assert kinds <= {"all-reduce", "all-gather", "reduce-scatter"} and "all-gather" in kinds
    gathered = re.findall(r"= (.*?) all-gather(?:-start)?\(", hlo)
    count = sum(
        int(np.prod([int(n) for n in dims.split(",")])) for shapes in gathered for dims in re.findall(r"f32\[([\d,]+)\]", shapes)
    )
    assert 0.9 * MODEL.parameters() < count <= MODEL.parameters(), "each parameter once"


@pytest.mark.slow
@pytest.mark.parallel
def test_a_state_on_the_host_takes_the_same_steps_and_comes_back(tmp_path):
    optim = dataclasses.replace(PLAIN, offload=True)
    losses, _ = train(PLAIN, ParallelConfig(data=1, fsdp=4))
    same, away = train(optim, ParallelConfig(data=1, fsdp=4))
    np.testing.assert_array_equal(same, losses)
    large = [leaf for leaf in jax.tree.leaves(away.opt_state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in large} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(away.params)} == {"device"}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, away, None)
    mesh, optimizer, step = build(optim, ParallelConfig(data=1, fsdp=2))
    restored, _ = checkpoints.restore(
        3, state_shapes(MODEL, optimizer, TUNING, optim), state_shardings(MODEL, optimizer, mesh, TUNING, optim)
    )
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored.opt_state) if leaf.ndim} == {"pinned_host"}
    with jax.set_mesh(mesh):
        _, metrics = step(restored, place_batch(rows(3), mesh))
    expected, _ = train(PLAIN, ParallelConfig(data=1, fsdp=4), steps=4)
    np.testing.assert_allclose(float(metrics["loss"]), expected[3], rtol=1e-5)
