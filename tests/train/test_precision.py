"""Training in fewer bits: the losses of float32, on any mesh, the same at every repetition."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from made_up import predictable_rows

from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch, settle
from jaxlm.train import (
    LoraConfig,
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

CONFIG = TransformerConfig(vocab_size=128, positions=32, layers=2, width=64, heads=2, mlp_width=256)
PRECISIONS = {
    "bfloat16": {"dtype": "bfloat16"}, "int8": {"quantize": "int8"}, "fp8": {"quantize": "fp8"},
    "bfloat16 parameters": {"param_dtype": "bfloat16"},
    "all at once": {"dtype": "bfloat16", "quantize": "fp8", "param_dtype": "bfloat16"},
}  # fmt: skip


@functools.cache
def built(parallel, devices, rate, accumulate, average, changes):
    """What training needs, compiled once: the mesh, a fresh state's maker, the step and the evaluation."""
    mesh, model = make_mesh(parallel, jax.devices()[:devices]), Model(dataclasses.replace(CONFIG, **dict(changes)))
    config = OptimConfig(learning_rate=rate, schedule="constant", warmup=1, average=average)
    schedule = make_schedule(config, 1)
    optimizer, objective = make_optimizer(config, schedule), objectives.tokens(32)
    step = make_train_step(model, objective, optimizer, schedule, mesh, seed=0, accumulate=accumulate, optim=config)
    begin = functools.partial(init_state, model, optimizer, 0, mesh, optim=config)
    return mesh, begin, step, make_eval_step(model, objective, mesh)


def train(steps, parallel=None, devices=1, rate=3e-3, accumulate=1, average=None, state=None, evaluate=False, **changes):
    """Losses of the steps, the state at the end, and on request the held-out loss."""
    parts = built(parallel or ParallelConfig(), devices, rate, accumulate, average, tuple(changes.items()))
    (mesh, begin, step, score), seen = parts, []
    with jax.set_mesh(mesh):
        state = begin() if state is None else state
        first = int(state.step)
        for i in range(first, first + steps):
            state, metrics = step(state, place_batch(predictable_rows(8, i), mesh))
            seen.append(settle(mesh, metrics)["loss"])
        sums = score(state.scored, place_batch(predictable_rows(128, 10_000), mesh)) if evaluate else {"loss": np.nan, "weight": 1}
    return np.asarray(jax.device_get(seen)), state, float(sums["loss"] / sums["weight"])


@pytest.fixture(scope="module")
def plain():
    return train(30, evaluate=True)


@pytest.mark.parametrize("name", PRECISIONS)
def test_thirty_steps_are_nearly_those_of_float32(name, plain):
    losses, _, held_out = train(30, evaluate=True, **PRECISIONS[name])
    assert plain[0][-1] < plain[0][0] - 0.3
    assert 0 < np.abs(losses / plain[0] - 1).max() < 0.01 and abs(held_out / plain[2] - 1) < 0.01


@pytest.mark.slow
def test_three_hundred_steps_reach_the_loss_of_float32():
    _, _, wanted = train(300, evaluate=True)
    found = {name: train(300, evaluate=True, **changes)[2] / wanted - 1 for name, changes in PRECISIONS.items()}
    assert wanted < 1 and max(map(abs, found.values())) < 0.005, found


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize(
    "name, mesh",
    [
        *((name, {"fsdp": 4, "tensor": 2}) for name in ("int8", "fp8", "bfloat16 parameters")),
        ("int8", {"stage": 2, "context": 2, "data": 2}),
    ],
)
def test_a_mesh_takes_the_steps_of_one_device(name, mesh):
    """The first loss is the same; later a number that lies between two others may be rounded to either."""
    alone, _, _ = train(3, **PRECISIONS[name])
    split, state, _ = train(3, ParallelConfig(**{"data": 1, **mesh}), 8, **PRECISIONS[name])
    np.testing.assert_allclose(split[0], alone[0], rtol=1e-5)
    np.testing.assert_allclose(split, alone, rtol=1e-3)
    kernel = state.params["transformer"]["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * (8 if "fsdp" in mesh else 2) == kernel.size


def test_a_step_is_drawn_from_the_seed_and_its_number():
    """Four steps are two and two more, to the bit, with everything that is drawn, in parts of a batch, and an average."""
    changes = {"quantize": "int8", "param_dtype": "bfloat16", "dropout": 0.1, "accumulate": 2, "average": 0.9}
    losses, whole, _ = train(4, **changes)
    first, half, _ = train(2, **changes)
    second, resumed, _ = train(2, state=half, **changes)
    np.testing.assert_array_equal(losses, [*first, *second])
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((whole, resumed)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(whole.params)} == {"bfloat16"}
    wide = {leaf.dtype.name for leaf in jax.tree.leaves((whole.average, whole.opt_state))}
    assert wide == {"float32", "int32"}  # of the optimiser's count of steps


@pytest.mark.slow
def test_small_steps_are_lost_to_rounding_but_not_at_random(monkeypatch):
    """At a rate of 5e-6 hardly a parameter moves where each step is rounded to nearest; drawn, they go as far as in float32."""
    steps, rate = 60, 5e-6
    exact = train(steps, rate=rate)
    drawn = train(steps, rate=rate, param_dtype="bfloat16")
    monkeypatch.setattr("jaxlm.model.precision.stochastic", lambda x, dtype, key: x.astype(dtype))
    built.cache_clear()
    nearest = train(steps, rate=rate, param_dtype="bfloat16")
    built.cache_clear()

    def fall(run):
        return run[0][:10].mean() - run[0][-10:].mean()

    assert abs(fall(drawn) / fall(exact) - 1) < 0.05 and fall(nearest) < 0.3 * fall(exact)


def test_adapters_and_held_bases_are_refused_beside_bfloat16_parameters():
    model = Model(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
    for config in (TuneConfig(train=None, lora=LoraConfig(rank=2)), TuneConfig(train="embed", base="int8")):
        with pytest.raises(ValueError, match=r"^tune.lora and tune.base take float32 parameters: give model.param_dtype float32"):
            Tuning(config, model)


def test_parameters_given_in_float32_are_held_in_bfloat16():
    mesh, narrow = make_mesh(ParallelConfig(), jax.devices()[:1]), Model(dataclasses.replace(CONFIG, param_dtype="bfloat16"))
    given = Model(CONFIG).init(jax.random.key(3))
    wanted = jax.tree.map(lambda x: np.asarray(x.astype("bfloat16")), given)
    state = init_state(narrow, make_optimizer(OptimConfig(), lambda step: 1e-3), 0, mesh, params=given)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), wanted)
    fresh = narrow.init(jax.random.key(3))  # drawn as in float32, then rounded
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2**-7), fresh, wanted)
