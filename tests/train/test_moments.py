"""Every optimiser by name: one contract, Muon against torch's, schedule-free against Optax's, Adam in 8 bits against Adam."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_up import predictable_rows

from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch, settle
from jaxlm.train import (
    Checkpoints,
    OptimConfig,
    TuneConfig,
    Tuning,
    init_state,
    make_optimizer,
    make_schedule,
    make_train_step,
    objectives,
)
from jaxlm.train.adam8bit import SIGNED, UNSIGNED, block, decode, encode, largest_step, scale_by_adam_8bit
from jaxlm.train.moments import HALVED, Name, matrices
from jaxlm.train.step import TrainState, state_shapes, state_shardings

MODEL = Model(TransformerConfig(vocab_size=128, positions=32, layers=2, width=64, heads=2, mlp_width=256))
RATES = {"lion": 3e-4, "adafactor": 3e-3}
# The first gradient of a matrix leaves directions without an eigenvalue: which basis SOAP finds of those hangs on rounding.
# That its later steps are the same on any mesh is in test_soap.py.
NEAR = {"soap": 1e-3}


def train(name, steps, parallel=None, devices=8, decay=0.1, **optim):
    """Losses of the steps, and the state at the end."""
    mesh = make_mesh(parallel or ParallelConfig(), jax.devices()[:devices])
    rate = RATES.get(name, 3e-3)
    config = OptimConfig(name=name, learning_rate=rate, schedule="constant", warmup=1, weight_decay=decay, **optim)
    tuning, schedule = Tuning(TuneConfig(), MODEL), make_schedule(config, steps)
    optimizer = make_optimizer(config, schedule, tuning)
    seen = []
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optimizer, 0, mesh, tuning)
        step = make_train_step(MODEL, objectives.tokens(32), optimizer, schedule, mesh, seed=0, tuning=tuning)
        for i in range(steps):
            state, metrics = step(state, place_batch(predictable_rows(8, i), mesh))
            seen.append(settle(mesh, metrics)["loss"])
    return np.asarray(jax.device_get(seen)), state


OTHERS = ("lion", "adafactor", "muon", "soap")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in OTHERS)) for name in get_args(Name)])
def test_every_optimiser_learns_the_same_on_any_mesh(name):
    alone, one = train(name, 25, devices=1)
    assert alone[-1] < alone[0] - 0.4
    split, many = train(name, 3, ParallelConfig(fsdp=4, tensor=2))
    np.testing.assert_allclose(split, alone[:3], rtol=NEAR.get(name, 1e-5))
    # The state lies in parts: nothing of a large leaf is held whole but a factored moment. SOAP's squares of what has heads as
    # an axis of its own lie in as many parts as fsdp has.
    for path, leaf in jax.tree.leaves_with_path(many.opt_state):
        if leaf.size >= 8192:
            square = any(str(getattr(key, "name", "")).startswith(("left", "right")) for key in path)
            assert leaf.size // leaf.addressable_shards[0].data.size >= (4 if square else 8) or name == "adafactor"
    assert jax.tree.structure(one.opt_state) == jax.tree.structure(many.opt_state)


@pytest.mark.parametrize("name", get_args(Name))
def test_shapes_and_shardings_have_the_form_of_the_state(name):
    mesh, tuning = make_mesh(ParallelConfig(fsdp=2, tensor=2)), Tuning(TuneConfig(), MODEL)
    optimizer = make_optimizer(OptimConfig(name=name), lambda step: 1e-3, tuning)
    shapes, shardings = state_shapes(MODEL, optimizer, tuning), state_shardings(MODEL, optimizer, mesh, tuning)
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optimizer, 0, mesh, tuning)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)


@pytest.mark.parametrize("name", get_args(Name))
def test_every_optimiser_goes_on_from_a_checkpoint(name, tmp_path):
    """Its state comes back bit by bit; who reads the model gets what is evaluated, laid out as the parameters are."""
    mesh, tuning = make_mesh(ParallelConfig(fsdp=2, tensor=2)), Tuning(TuneConfig(), MODEL)
    optimizer = make_optimizer(OptimConfig(name=name), lambda step: 1e-3, tuning)
    shapes, shardings = state_shapes(MODEL, optimizer, tuning), state_shardings(MODEL, optimizer, mesh, tuning)
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optimizer, 0, mesh, tuning)
        # As after a step: no number is what a fresh state has.
        state = jax.tree.map(lambda x: jax.device_put(x + jnp.ones((), x.dtype), x.sharding), state)
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(3, state, None)
        checkpoints.close()
        checkpoints = Checkpoints(tmp_path)
        again, _ = checkpoints.restore(3, shapes, shardings)
        read = checkpoints.restore_params(3, tuning.shapes, shardings.params)
        checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), (again.params, again.opt_state))
    jax.tree.map(np.testing.assert_array_equal, state.scored, read)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), state.scored, shardings.params)))


@pytest.mark.parametrize("name", HALVED)
def test_the_first_moment_in_16_bits(name):
    losses, state = train(name, 15, devices=1, moments="bfloat16")
    assert losses[-1] < losses[0] - 0.4
    kinds = {"mu": set(), "nu": set()}
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        for kind in kinds:
            if any(getattr(key, "name", None) == kind for key in path):
                kinds[kind].add(str(leaf.dtype))
    assert kinds == {"mu": {"bfloat16"}, "nu": set() if name == "lion" else {"float32"}}


@pytest.mark.parametrize("name", sorted(set(get_args(Name)) - set(HALVED)))
def test_moments_that_cannot_have_16_bits_are_refused(name):
    with pytest.raises(ValueError, match=f"moments is bfloat16, which {name} cannot keep: give float32, or adamw, lion, muon"):
        OptimConfig(name=name, moments="bfloat16")


# --- schedule-free -----------------------------------------------------------------------------


def test_schedule_free_takes_optaxs_steps_and_is_scored_at_the_average():
    """Ours without clipping, all of it decayed, is Optax's `schedule_free_adamw`; x is the average of z by hand."""
    rate, steps = optax.schedules.warmup_constant_schedule(0.0, 1e-2, 3), 8
    config = OptimConfig(name="schedule_free", clip=None, decay=".*", weight_decay=0.1, beta1=0.8, beta2=0.9)
    tuning = Tuning(TuneConfig(), MODEL)
    ours = make_optimizer(config, rate, tuning)
    theirs = optax.contrib.schedule_free_adamw(1e-2, 3, b1=0.8, b2=0.9, weight_decay=0.1)
    start = jax.jit(MODEL.init)(jax.random.key(0))
    grads = [jax.tree.map(lambda p, i=i: jnp.sin(3.0 * i + 100.0 * p), start) for i in range(steps)]

    def run(optimizer):
        @jax.jit
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state, zs = start, optimizer.init(start), []
        with jax.numpy_dtype_promotion("standard"):
            for gradient in grads:
                params, state = step(params, state, gradient)
                zs.append(state.z)
        return params, state, zs

    (params, state, zs), (wanted, _, _) = run(ours), run(theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, wanted)

    weights = np.maximum.accumulate([float(rate(i + 1)) for i in range(steps)]) ** 2
    mean = jax.tree.map(lambda *z: sum(w * np.asarray(x, np.float64) for w, x in zip(weights, z, strict=True)) / weights.sum(), *zs)
    scored = TrainState(jnp.zeros((), jnp.int32), params, state).scored
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scored, mean)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), scored, params))) > 1e-3


def test_schedule_free_refuses_what_it_cannot_have():
    with pytest.raises(ValueError, match=r"average is 0\.9, but schedule_free evaluates an average of its own"):
        OptimConfig(name="schedule_free", average=0.9)
    with pytest.raises(ValueError, match="beta1 is 0, but schedule_free divides by it"):
        OptimConfig(name="schedule_free", beta1=0.0)


# --- Muon --------------------------------------------------------------------------------------


def test_muon_takes_the_maps_of_the_layers():
    found = {jax.tree_util.keystr(path): axes for path, axes in jax.tree.leaves_with_path(
        matrices(Tuning(TuneConfig(), MODEL)), is_leaf=lambda x: x is None or dataclasses.is_dataclass(x)
    )}  # fmt: skip
    taken = {path.split("']['")[-3] + "/" + path.split("']['")[-2] for path, axes in found.items() if axes is not None}
    assert taken == {f"attention/{name}" for name in ("query", "key", "value", "out")} | {"mlp/up", "mlp/down"}
    assert any("embed" in path and axes is None for path, axes in found.items())


@pytest.mark.parity
def test_muon_takes_torchs_steps():
    """The MLP's first matrix of one layer. torch iterates in bfloat16, hence 2% in the first step; later Optax weighs a new
    gradient a little more, for it corrects Nesterov's momentum for its start as Adam's is, and torch does not."""
    import torch

    model = Model(dataclasses.replace(MODEL.config, layers=1))
    tuning = Tuning(TuneConfig(), model)
    optimizer = make_optimizer(OptimConfig(name="muon", beta2=0.95, clip=None, weight_decay=0.1), lambda step: 1e-2, tuning)
    params = model.init(jax.random.key(0))
    state, rng = optimizer.init(params), np.random.default_rng(0)

    def kernel(tree):
        return tree["transformer"]["decoder"]["layers"]["mlp"]["up"]["kernel"]

    weight = torch.nn.Parameter(torch.tensor(np.array(kernel(params)[0])))
    theirs = torch.optim.Muon([weight], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = np.array(kernel(params)[0])
    for allowed in (0.02, 0.06, 0.06):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        weight.grad = torch.tensor(np.array(kernel(grads)[0]))
        theirs.step()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        ours, wanted = np.array(kernel(params)[0]) - start, weight.detach().numpy() - start
        assert np.linalg.norm(ours - wanted) < allowed * np.linalg.norm(wanted)


# --- Adam in 8 bits ----------------------------------------------------------------------------


def test_the_code_by_hand():
    """0 and 1, and seven powers of ten in 1, 2, 4 … 64 steps, the middles of equal parts; signs, or twice as many steps."""
    assert len(SIGNED) == len(UNSIGNED) == 256 and set(SIGNED) >= {0.0, 1.0}
    tenths = SIGNED[(SIGNED > 0.1) & (SIGNED < 1)]
    np.testing.assert_allclose(tenths, 0.1 + 0.9 * (np.arange(64) + 0.5) / 64, rtol=1e-6)
    np.testing.assert_allclose(SIGNED[SIGNED > 0][0], 1e-6 * 0.55, rtol=1e-6)
    np.testing.assert_allclose(np.sort(-SIGNED[SIGNED < 0]), SIGNED[(SIGNED > 0) & (SIGNED < 1)], rtol=1e-6)
    assert (UNSIGNED >= 0).all() and ((UNSIGNED > 0.1) & (UNSIGNED < 1)).sum() == 128


@pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
def test_a_number_becomes_the_nearest_entry(code):
    x = jax.random.normal(jax.random.key(0), (3, 5, 512)) * jnp.exp(jax.random.normal(jax.random.key(1), (3, 5, 1)) * 5)
    x = x if code is SIGNED else jnp.abs(x)
    codes, scale = encode(x, code)
    assert codes.dtype == jnp.uint8 and scale.shape == (3, 5, 2)
    blocks = np.asarray(x).reshape(3, 5, 2, 256)
    np.testing.assert_allclose(scale, np.abs(blocks).max(-1))
    nearest = np.abs(blocks[..., None] / np.asarray(scale)[..., None, None] - code).argmin(-1)
    found = np.asarray(codes).reshape(blocks.shape)
    assert (found == nearest).mean() > 0.999 and np.abs(found.astype(int) - nearest).max() <= 1, "but for ties"
    np.testing.assert_allclose(
        decode(codes, scale, code).reshape(blocks.shape), code[found] * np.asarray(scale)[..., None], rtol=1e-6
    )
    zeros, none = encode(jnp.zeros((2, 64)), code)
    assert (none == 0).all() and (decode(zeros, none, code) == 0).all()


def test_a_positive_second_moment_is_never_coded_as_zero():
    """Twelve powers of ten in one block, and zeros: what is above 0 stays above 0, what is 0 stays 0."""
    x = np.where(np.arange(256) % 3 == 0, 0, 10.0 ** -(np.arange(256) % 13)).astype(np.float32)[None]
    codes, scale = encode(jnp.asarray(x), UNSIGNED, keep_positive=True)
    np.testing.assert_array_equal(np.asarray(decode(codes, scale, UNSIGNED)) > 0, x > 0)
    below = np.asarray(decode(*encode(jnp.asarray(x), UNSIGNED), UNSIGNED))
    assert (below[x > 0] == 0).any(), "the nearest entry would be 0"


@pytest.mark.parametrize("scale", [1e-1, 1e-3, 1e-5])
def test_rows_that_get_one_gradient_move_as_adam_moves_them(scale):
    """A table of which one row is seen once, in its fourth step: every later step is Adam's but for the rounding of codes."""
    ours, adam = scale_by_adam_8bit(0.9, 0.95, 1e-8), optax.scale_by_adam(0.9, 0.95, 1e-8)
    params = {"table": jnp.zeros((8, 1024))}
    seen = jnp.zeros((8, 1024)).at[5].set(scale * jax.random.normal(jax.random.key(0), (1024,)))
    of_ours, of_adam = jax.jit(ours.update), jax.jit(adam.update)
    state, other, worst = ours.init(params), adam.init(params), 0.0
    for i in range(30):
        grads = {"table": seen if i == 3 else jnp.zeros((8, 1024))}
        step, state = of_ours(grads, state)
        with jax.numpy_dtype_promotion("standard"):
            wanted, other = of_adam(grads, other)
        worst = max(worst, float(jnp.abs(step["table"]).max()))
        near = jnp.abs(step["table"] - wanted["table"])
        assert float(jnp.median(near[5])) < 0.05 and float(near.max()) < 0.6, f"step {i}"
        assert not step["table"][np.arange(8) != 5].any(), "rows without a gradient stay"
    assert 0.5 < worst < 1.2


@pytest.mark.parametrize("b1, b2", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.9), (0.0, 0.5), (0.5, 0.25), (0.9, 0.0), (0.0, 0.0)])
def test_no_gradients_give_adam_a_larger_step(b1, b2):
    """The bound is reached by gradients proportional to the ratio of their weights, and by none exceeded (Cauchy-Schwarz)."""
    rng = np.random.default_rng(0)
    for steps in (1, 2, 5, 30):
        age = np.arange(steps)[::-1]
        mean, square = ((1 - b) * np.where(age == 0, 1.0, float(b) ** age) / (1 - b**steps) for b in (b1, b2))
        bound = float(largest_step(b1, b2, jnp.float32(steps)))
        with np.errstate(divide="ignore", invalid="ignore"):
            worst = np.where(square > 0, mean / square, 0.0)
        for grads in (worst, *rng.standard_normal((20, steps))):
            assert abs(mean @ grads) / np.sqrt(square @ grads**2) <= bound * (1 + 1e-3)
        if b2:
            assert mean @ worst / np.sqrt(square @ worst**2) == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("name, decay", [("adamw", "beta1"), ("lion", "beta2"), ("muon", "beta1"), ("muon", "beta2")])
def test_a_moment_in_bfloat16_must_be_able_to_decay(name, decay):
    """0.999 of a number in bfloat16 rounds to the number: such a moment would never fade."""
    assert float(jnp.bfloat16(1.5) * jnp.bfloat16(0.999)) == 1.5
    with pytest.raises(ValueError, match=f"{decay} is 0.999.*float32"):
        OptimConfig(name=name, moments="bfloat16", **{decay: 0.999})
    OptimConfig(name=name, moments="bfloat16", **{decay: 0.99})
    OptimConfig(name=name, **{decay: 0.999})


def test_blocks_divide_the_axis():
    assert [block(n) for n in (1, 64, 256, 384, 768, 11008)] == [1, 64, 256, 192, 256, 256]


def test_its_state_is_less_than_a_third():
    model = Model(TransformerConfig(vocab_size=32000, positions=64, layers=4, width=512, heads=8))

    def size(name):
        tuning = Tuning(TuneConfig(), model)
        optimizer = make_optimizer(OptimConfig(name=name), lambda step: 1e-3, tuning)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state_shapes(model, optimizer, tuning).opt_state))

    assert size("adam8bit") < 0.3 * size("adamw")


@pytest.mark.slow
def test_soap_is_ahead_of_adam_at_the_same_rate():
    one, other = (train(name, 150, devices=1)[0].reshape(-1, 50).mean(axis=1) for name in ("adamw", "soap"))
    assert (other < one).all()


@pytest.mark.slow
def test_after_500_steps_its_loss_is_adams():
    one, other = (np.mean(train(name, 500, devices=1)[0][-50:]) for name in ("adamw", "adam8bit"))
    assert abs(other / one - 1) < 0.01
