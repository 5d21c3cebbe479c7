"""Every optimiser by name: one contract, Muon against torch's, Adam in 8 bits against Adam."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch, settle
from jaxlm.train import OptimConfig, TuneConfig, Tuning, init_state, make_optimizer, make_schedule, make_train_step, objectives
from jaxlm.train.moments import SIGNED, UNSIGNED, Name, block, decode, encode, matrices
from jaxlm.train.step import state_shapes, state_shardings

MODEL = Model(TransformerConfig(vocab_size=128, positions=32, layers=2, width=64, heads=2, mlp_width=256))
RATES = {"lion": 3e-4, "adafactor": 3e-3}


def text(rows, seed):
    """Something to learn: each token mostly follows from the one before."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((rows, 33), np.int32)
    for i in range(1, 33):
        tokens[:, i] = np.where(rng.random(rows) < 0.9, (tokens[:, i - 1] * 5 + 7) % 128, rng.integers(0, 128, rows))
    return {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": np.ones((rows, 32), np.float32)}


def train(name, steps, parallel=None, devices=8, decay=0.1):
    """Losses of the steps, and the state at the end."""
    mesh = make_mesh(parallel or ParallelConfig(), jax.devices()[:devices])
    config = OptimConfig(name=name, learning_rate=RATES.get(name, 3e-3), schedule="constant", warmup=1, weight_decay=decay)
    tuning, schedule = Tuning(TuneConfig(), MODEL), make_schedule(config, steps)
    optimizer = make_optimizer(config, schedule, tuning)
    seen = []
    with jax.set_mesh(mesh):
        state = init_state(MODEL, optimizer, 0, mesh, tuning)
        step = make_train_step(MODEL, objectives.tokens(32), optimizer, schedule, mesh, seed=0, tuning=tuning)
        for i in range(steps):
            state, metrics = step(state, place_batch(text(8, i), mesh))
            seen.append(settle(mesh, metrics)["loss"])
    return np.asarray(jax.device_get(seen)), state


@pytest.mark.parametrize("name", get_args(Name))
def test_every_optimiser_learns_the_same_on_any_mesh(name):
    alone, one = train(name, 25, devices=1)
    assert alone[-1] < alone[0] - 0.4
    split, many = train(name, 3, ParallelConfig(fsdp=4, tensor=2))
    np.testing.assert_allclose(split, alone[:3], rtol=1e-5)
    # The state lies in parts: nothing of a large leaf is held whole but a factored moment.
    for leaf in jax.tree.leaves(many.opt_state):
        if leaf.size >= 8192:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size or name == "adafactor"
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
def test_after_500_steps_its_loss_is_adams():
    one, other = (np.mean(train(name, 500, devices=1)[0][-50:]) for name in ("adamw", "adam8bit"))
    assert abs(other / one - 1) < 0.01
