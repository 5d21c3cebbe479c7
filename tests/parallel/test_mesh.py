"""The mesh and its rules: sizes that fit, sizes refused, and the same numbers on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch, settle, stored_shardings
from jaxlm.parallel.rules import STORED, spec
from jaxlm.train import OptimConfig, init_state, make_eval_step, make_optimizer, make_schedule, make_train_step, objectives

MODEL = TransformerConfig(vocab_size=64, positions=16, layers=2, width=32, heads=4)
LLAMA = dataclasses.replace(
    MODEL, position="rotary", norm="rmsnorm", activation="swiglu", mlp_width=64, bias=False, kv_heads=1, tie_embeddings=False
)


def test_sizes():
    def sizes(**given):
        return tuple(make_mesh(ParallelConfig(**given)).shape.values())

    assert tuple(make_mesh(ParallelConfig()).shape) == ("stage", "data", "fsdp", "expert", "context", "tensor")
    assert sizes() == (1, 8, 1, 1, 1, 1)
    assert sizes(fsdp=2, tensor=2) == (1, 2, 2, 1, 1, 2)
    assert sizes(data=1, fsdp=-1, tensor=2) == (1, 1, 4, 1, 1, 2)
    assert sizes(data=1, context=-1) == (1, 1, 1, 1, 8, 1)
    assert sizes(stage=2, context=2, tensor=2) == (2, 1, 1, 1, 2, 2)


@pytest.mark.parametrize(
    "config, given, legal",
    [
        (ParallelConfig(tensor=3), "data -1 × tensor 3", "data 4 × tensor 2"),
        (ParallelConfig(data=2, fsdp=2), "data 2 × fsdp 2", "data 4 × fsdp 2"),
        (ParallelConfig(fsdp=16), "data -1 × fsdp 16", "fsdp 8"),
        (ParallelConfig(data=4, context=4, tensor=2), "data 4 × context 4 × tensor 2", "context 4 × tensor 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_do_not_fit_are_refused_with_some_that_do(config, given, legal):
    with pytest.raises(ValueError) as error:
        make_mesh(config)
    assert str(error.value) == (
        f"parallel: {given} does not fit 8 cpu device(s): the sizes must multiply to 8, as {legal} do "
        "(--parallel.data -1 takes what the others leave)"
    )


def test_rules_split_what_divides():
    mesh = make_mesh(ParallelConfig(data=2, fsdp=2, tensor=2))
    assert spec("VD", (64, 32), mesh, STORED) == P(("tensor",), ("fsdp",))
    assert spec("DKH", (32, 1, 8), mesh, STORED) == P(("fsdp",), None, None), "one key/value head is held whole"
    assert spec(("layers", None), (2, 32), mesh, STORED) == P(None, None)


def test_parameters_are_stored_in_parts():
    """On fsdp 4 × tensor 2 each device holds an eighth of every large matrix."""
    mesh, model = make_mesh(ParallelConfig(fsdp=4, tensor=2)), Model(MODEL)
    optimizer = make_optimizer(OptimConfig(), lambda step: 1e-3)
    state = init_state(model, optimizer, 0, mesh)
    matrices = [leaf for leaf in jax.tree.leaves((state.params, state.opt_state)) if leaf.ndim >= 3 and leaf.size > 1000]
    assert len(matrices) == 3 * 6, "query, key, value, out, up, down; the moments lie as their parameters do"
    for leaf in matrices:
        assert leaf.addressable_shards[0].data.size * 8 == leaf.size


def batch_of(rows: int = 8, length: int = 16) -> dict[str, np.ndarray]:
    """Ragged packed rows: documents of several lengths, padding at the end of some rows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (rows, length)).astype(np.int32)
    cuts = rng.integers(3, 9, (rows,))
    place = np.broadcast_to(np.arange(length), (rows, length))
    segments = np.where(place < cuts[:, None], 1, 2).astype(np.int32)
    segments[::2, 13:] = 0
    positions = np.where(segments == 1, place, place - cuts[:, None]).astype(np.int32)
    weights = (segments > 0).astype(np.float32)
    return {
        "tokens_BL": tokens, "targets_BL": np.roll(tokens, -1, 1), "weights_BL": weights,
        "segments_BL": segments, "positions_BL": positions,
    }  # fmt: skip


def three_steps(config: TransformerConfig, parallel: ParallelConfig, devices: int, accumulate: int = 1):
    """Loss after each of three steps, the first gradient norm, and the parameters at the end."""
    mesh, model = make_mesh(parallel, jax.devices()[:devices]), Model(config)
    optim = OptimConfig(learning_rate=1e-2, warmup=2)
    schedule = make_schedule(optim, 10)
    optimizer, objective = make_optimizer(optim, schedule), objectives.tokens(8, 1e-3)
    with jax.set_mesh(mesh):
        state = init_state(model, optimizer, 0, mesh)
        step = make_train_step(model, objective, optimizer, schedule, mesh, seed=0, accumulate=accumulate)
        batch, seen = place_batch(batch_of(), mesh), []
        for _ in range(3):
            state, metrics = step(state, batch)
            seen.append(jax.device_get(settle(mesh, metrics)))
        scores = jax.device_get(settle(mesh, make_eval_step(model, objective, mesh)(state.params, batch)))
    return [m["loss"] for m in seen], seen[0]["grad_norm"], scores["nll"], jax.device_get(state.params)


def assert_equal_runs(one, many):
    np.testing.assert_allclose(one[0], many[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], many[1], rtol=1e-5)
    np.testing.assert_allclose(one[2], many[2], rtol=1e-5)
    # Adam divides by the root of tiny second moments: rounding shows there first.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one[3], many[3])


@pytest.fixture(scope="module")
def alone():
    return {config: three_steps(config, ParallelConfig(), 1) for config in (MODEL, LLAMA)}


@pytest.mark.parametrize("config", [MODEL, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(data=8),
        ParallelConfig(fsdp=8),
        ParallelConfig(data=2, tensor=4),
        ParallelConfig(data=2, fsdp=2, tensor=2),
        ParallelConfig(fsdp=4, tensor=2),
    ],
    ids=lambda p: f"data{p.data}fsdp{p.fsdp}tensor{p.tensor}",
)
def test_every_mesh_gives_one_devices_numbers(config, parallel, alone):
    assert_equal_runs(alone[config], three_steps(config, parallel, 8))


@pytest.mark.parametrize("parallel, devices", [(ParallelConfig(), 1), (ParallelConfig(data=2), 2)])
def test_accumulation_is_weighted_by_tokens(parallel, devices, alone):
    """Four ragged parts, or two on two devices each, give the update of the batch in one part."""
    assert_equal_runs(alone[MODEL], three_steps(MODEL, parallel, devices, accumulate=4))


def test_fresh_parameters_do_not_depend_on_the_mesh():
    model = Model(MODEL)
    whole = model.init(jax.random.key(3))
    mesh = make_mesh(ParallelConfig(fsdp=4, tensor=2))
    split = jax.jit(model.init, out_shardings=stored_shardings(model.axes, model.shapes, mesh))(jax.random.key(3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, split)
