"""A mixture of experts computes the chosen experts' weighed sum, and its losses are the papers'."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import moe
from jaxlm.model.config import MoeConfig, TransformerConfig
from jaxlm.model.layers import activate
from jaxlm.model.moe import Moe, balance_loss, grouped, z_loss
from jaxlm.parallel import ParallelConfig, make_mesh

BASE = TransformerConfig(
    vocab_size=8, positions=16, layers=2, width=16, heads=4, mlp_width=24, activation="swiglu", bias=False,
    moe=MoeConfig(experts=4, chosen=2, balance_loss=0.3, router_z_loss=0.2),
)  # fmt: skip
CONFIGS = {
    "mixtral": BASE,
    "one-of-many": dataclasses.replace(BASE, activation="gelu", moe=dataclasses.replace(BASE.moe, chosen=1, normalize=False)),
    "shared": dataclasses.replace(BASE, moe=dataclasses.replace(BASE.moe, experts=5, chosen=3, shared=2)),
    "all": dataclasses.replace(BASE, activation="relu2", bias=True, moe=dataclasses.replace(BASE.moe, chosen=4, shared=1)),
}


def example(config: TransformerConfig, batch: int = 3, length: int = 7):
    """A module, parameters so large enough that the router has opinions, and an input with padding at the rows' ends."""
    module = Moe(config)
    x_BLD = jax.random.normal(jax.random.key(0), (batch, length, config.width), jnp.float32)
    params = nn.unbox(module.init(jax.random.key(1), x_BLD, None)["params"])
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = tree.unflatten([0.5 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])
    keep_BL = jnp.arange(length)[None, :] < jnp.array([length, length - 3, 2] * batch)[:batch, None]
    return module, params, x_BLD, keep_BL


def dense(config: TransformerConfig, params, x_BLD, keep_BL):
    """Every expert on every token, those not chosen weighed with 0; the losses as sums over the tokens kept."""
    c, routing = config, config.moe

    def mlp(up_DF, gate_DF, down_FD, x, biases=(0.0, 0.0, 0.0)):
        up = x @ up_DF + biases[0]
        inner = activate(c.activation, up) if gate_DF is None else activate(c.activation, x @ gate_DF + biases[1]) * up
        return inner @ down_FD + biases[2]

    logits_BLE = x_BLD @ params["router"]["kernel"]
    p_BLE = jnp.exp(logits_BLE) / jnp.sum(jnp.exp(logits_BLE), axis=-1, keepdims=True)
    rank_BLE = jnp.sum(p_BLE[..., None, :] > p_BLE[..., :, None], axis=-1)  # experts that are more probable
    taken_BLE = (rank_BLE < routing.chosen).astype(jnp.float32)
    weights_BLE = p_BLE * taken_BLE
    if routing.normalize:
        weights_BLE = weights_BLE / jnp.sum(weights_BLE, axis=-1, keepdims=True)
    y_BLD = jnp.zeros_like(x_BLD)
    for e in range(routing.experts):
        gate = params["gate"]["kernel"][e] if c.gated else None
        y_BLD += weights_BLE[..., e, None] * mlp(params["up"]["kernel"][e], gate, params["down"]["kernel"][e], x_BLD)
    if routing.shared:
        s = params["shared"]
        biases = [s[name]["bias"][None, None] if c.bias and name in s else 0.0 for name in ("up", "gate", "down")]
        y_BLD += mlp(s["up"]["kernel"], s["gate"]["kernel"] if c.gated else None, s["down"]["kernel"], x_BLD, biases)

    kept = jnp.ones(x_BLD.shape[:2]) if keep_BL is None else keep_BL.astype(jnp.float32)
    count = jnp.sum(kept)
    balance = 0.0
    for e in range(routing.experts):
        f = jnp.sum(taken_BLE[..., e] * kept) / (count * routing.chosen)
        balance += routing.experts * f * jnp.sum(p_BLE[..., e] * kept) / count
    z = jnp.sum(jnp.log(jnp.sum(jnp.exp(logits_BLE), axis=-1)) ** 2 * kept) / count
    return y_BLD, routing.balance_loss * balance + routing.router_z_loss * z


def scored(run, cotangent_BLD):
    """Values and gradients of y and aux together."""

    def loss(params, x_BLD, keep_BL):
        y_BLD, aux = run(params, x_BLD, keep_BL)
        return jnp.sum(y_BLD * cotangent_BLD) + aux, (y_BLD, aux)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def close(ours, theirs, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=2e-4), ours, theirs)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_is_every_expert_on_every_token_masked(name, padded):
    config = CONFIGS[name]
    module, params, x_BLD, keep_BL = example(config)
    keep_BL = keep_BL if padded else None
    cotangent = jax.random.normal(jax.random.key(3), x_BLD.shape)
    ours = scored(lambda p, x, keep: module.apply({"params": p}, x, keep), cotangent)(params, x_BLD, keep_BL)
    with jax.numpy_rank_promotion("allow"):
        theirs = scored(lambda p, x, keep: dense(config, p, x, keep), cotangent)(params, x_BLD, keep_BL)
    close(ours, theirs)
    assert float(jnp.abs(ours[1][0]["router"]["kernel"]).max()) > 1e-3, "the router learns"


@pytest.mark.parametrize(("batch", "length", "alike"), [(1, 1, False), (8, 61, False), (8, 61, True)])
def test_one_token_many_tokens_and_experts_without_any(batch, length, alike):
    """Blocks of one row, of dozens, and all rows with the same experts: none is dropped."""
    module, params, x_BLD, _ = example(BASE, batch, length)
    x_BLD = jnp.broadcast_to(x_BLD[:1, :1], x_BLD.shape) if alike else x_BLD
    cotangent = jax.random.normal(jax.random.key(3), x_BLD.shape) / (batch * length) ** 0.5
    ours = scored(lambda p, x, keep: module.apply({"params": p}, x, keep), cotangent)(params, x_BLD, None)
    with jax.numpy_rank_promotion("allow"):
        theirs = scored(lambda p, x, keep: dense(BASE, p, x, keep), cotangent)(params, x_BLD, None)
    close(ours, theirs)


def test_no_more_is_computed_than_chosen():
    """2 of 16 experts: the rows' blocks, with what fills them up, hold no more than half as much again as the rows that
    the router chose: all experts on all tokens would be eight times as many."""
    config = dataclasses.replace(BASE, moe=MoeConfig(experts=16, chosen=2))
    module, params, x_BLD, _ = example(config, 8, 64)
    seen = []

    def spy(x_PMI, w_EIO, expert_P, used):
        seen.append((int(used), x_PMI.shape[1]))
        return grouped(x_PMI, w_EIO, expert_P, used)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "grouped", spy)
        module.apply({"params": params}, x_BLD, None)
    rows = 8 * 64 * 2
    assert len(seen) == 3 and all(rows <= used * size <= 1.5 * rows for used, size in seen), seen


def test_parameters_are_named_and_split_by_their_letters():
    module = Moe(CONFIGS["shared"])
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 16)), None)
    axes = {"/".join(k.key for k in path): tuple(p) for path, p in jax.tree_util.tree_leaves_with_path(
        nn.get_partition_spec(boxed)["params"], is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec))}  # fmt: skip
    mlp = {"shared/up/kernel": ("D", "F"), "shared/gate/kernel": ("D", "F"), "shared/down/kernel": ("F", "D")}
    experts = {"up/kernel": ("E", "D", "F"), "gate/kernel": ("E", "D", "F"), "down/kernel": ("E", "F", "D")}
    assert axes == {"router/kernel": ("D", "E"), **experts, **mlp}
    params = nn.unbox(boxed)["params"]
    assert params["up"]["kernel"].shape == (5, 16, 24) and params["shared"]["up"]["kernel"].shape == (16, 48)


def test_a_new_module_divides_the_outputs_into_the_residual_stream():
    config = dataclasses.replace(BASE, width=64, layers=8, init="residual_scaled", init_std=0.02)
    params = nn.unbox(Moe(config).init(jax.random.key(0), jnp.zeros((1, 2, 64)), None)["params"])
    np.testing.assert_allclose(np.std(params["up"]["kernel"]), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(params["down"]["kernel"]), 0.02 / 4, rtol=0.05)


def test_padding_does_not_change_the_losses():
    """Whatever stands where keep is False: the losses, and their gradient at the tokens kept, are those without it."""
    module, params, x_BLD, _ = example(BASE, batch=2, length=8)
    keep_BL = jnp.arange(8)[None, :] < jnp.array([5, 5])[:, None]

    def aux(x, keep):
        return module.apply({"params": params}, x, keep)[1]

    noise = jnp.where(keep_BL[..., None], x_BLD, 9 * jax.random.normal(jax.random.key(5), x_BLD.shape))
    scored = jax.jit(jax.value_and_grad(aux))
    alone, gradient = scored(x_BLD[:, :5], None)
    for x in (x_BLD, noise):
        value, padded = scored(x, keep_BL)
        np.testing.assert_allclose(value, alone, rtol=1e-6)
        np.testing.assert_allclose(padded[:, :5], gradient, atol=1e-6)
        assert (np.asarray(padded[:, 5:]) == 0).all()
    assert np.isfinite(scored(x_BLD, jnp.zeros_like(keep_BL))[0]), "a batch of nothing but padding has a loss too"


def test_balance_loss_at_its_marks():
    """By hand: 1 where the router is indifferent (with no gradient left), E / J where it takes the same J always."""
    chosen = jnp.array([[[0, 1], [0, 2], [0, 3]]])
    flat = jnp.full((1, 3, 4), 0.25)
    assert float(balance_loss(flat, chosen, None)) == pytest.approx(1.0), "indifferent, whatever the ties give"

    same = jnp.tile(jnp.array([0.5, 0.5, 0.0, 0.0]), (1, 3, 1))
    assert float(balance_loss(same, jnp.tile(jnp.array([0, 1]), (1, 3, 1)), None)) == pytest.approx(2.0)

    # f = (3, 1, 1, 1)/6, p = (.4, .3, .2, .1): 4 · (.2 + .05 + .0333 + .0167)
    skewed = jnp.tile(jnp.array([0.4, 0.3, 0.2, 0.1]), (1, 3, 1))
    assert float(balance_loss(skewed, chosen, None)) == pytest.approx(1.2)

    def of_logits(logits):
        return balance_loss(jax.nn.softmax(logits), jnp.array([[[0, 1], [2, 3]]]), None)

    np.testing.assert_allclose(jax.grad(of_logits)(jnp.zeros((1, 2, 4))), 0, atol=1e-7)


def test_balance_loss_pulls_a_lopsided_router_back():
    """Descending on it alone, a router that always took the same expert comes to use all: below 1.1 from 2.5 and more."""
    config = dataclasses.replace(BASE, moe=MoeConfig(experts=4, chosen=1, balance_loss=1.0))
    module, params, x_BLD, _ = example(config, batch=8, length=16)
    x_BLD = x_BLD.at[..., 0].set(3.0)
    params["router"]["kernel"] = (0.3 * params["router"]["kernel"]).at[0, 2].add(1.0)

    @jax.jit
    def descend(router):
        def loss(router):
            return module.apply({"params": {**params, "router": {"kernel": router}}}, x_BLD, None)[1]

        value, grad = jax.value_and_grad(loss)(router)
        return router - 0.5 * grad, value

    router, values = params["router"]["kernel"], []
    for _ in range(60):
        router, value = descend(router)
        values.append(float(value))
    assert values[0] > 2.5 and values[-1] < 1.1, values[:: len(values) - 1]


def test_z_loss_by_hand():
    """Logits 0, 0, 0, 0: log²4; logits ln 1 … ln 4: log²10; the third token is padding."""
    logits = jnp.stack([jnp.zeros(4), jnp.log(jnp.arange(1.0, 5.0)), jnp.full(4, 50.0)])[None]
    expected = (np.log(4) ** 2 + np.log(10) ** 2) / 2
    assert float(z_loss(logits, jnp.array([[True, True, False]]))) == pytest.approx(expected, rel=1e-6)


def test_bfloat16_stays_near_float32():
    module, params, x_BLD, keep_BL = example(CONFIGS["shared"])
    y, aux = jax.jit(lambda p: module.apply({"params": p}, x_BLD, keep_BL))(params)
    half = Moe(dataclasses.replace(module.config, dtype="bfloat16"))

    def loss(p, x):
        y, aux = half.apply({"params": p}, x, keep_BL)
        return jnp.sum(y.astype(jnp.float32)) + aux, (y, aux)

    grads, (y_half, aux_half) = jax.jit(jax.grad(loss, has_aux=True))(params, x_BLD.astype(jnp.bfloat16))
    assert y_half.dtype == jnp.bfloat16 and aux_half.dtype == jnp.float32
    np.testing.assert_allclose(aux_half, aux, rtol=2e-2)
    # A token at the edge between two experts may fall to the other side: nearly all must not.
    error = np.abs(y_half.astype(jnp.float32) - y).max(axis=-1) / np.abs(y).max()
    assert np.mean(error < 0.03) > 0.9
    assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8), (8, 1, 1)], ids=lambda s: "data{}-fsdp{}-tensor{}".format(*s))
def test_every_mesh_gives_one_devices_numbers(sizes):
    """Also where the batch (4 rows on 8 devices) or the experts (5) are held whole by devices that cannot share it."""
    config = CONFIGS["shared"]
    module, params, x_BLD, keep_BL = example(config, batch=4)
    cotangent = jax.random.normal(jax.random.key(3), x_BLD.shape)

    def run(p, x, keep):
        return module.apply({"params": p}, x, keep)

    alone = scored(run, cotangent)(params, x_BLD, keep_BL)
    mesh = make_mesh(ParallelConfig(*sizes))
    with jax.set_mesh(mesh):
        split = jax.block_until_ready(scored(run, cotangent)(params, x_BLD, keep_BL))
    close(split, alone, atol=5e-5)


def test_devices_keep_their_own_rows():
    """Split over the batch only, no token leaves its device: the program gathers nothing."""
    module, params, x_BLD, _ = example(BASE, batch=8)
    mesh = make_mesh(ParallelConfig(data=8))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda p, x: module.apply({"params": p}, x, None)[0], in_shardings=(None, rows), out_shardings=rows)
        text = step.lower(params, x_BLD).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" not in text


def mixtral(params, sizes: TransformerConfig):
    import torch
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    theirs = MixtralSparseMoeBlock(
        transformers.MixtralConfig(
            hidden_size=sizes.width, intermediate_size=sizes.F, num_local_experts=sizes.moe.experts,
            num_experts_per_tok=sizes.moe.chosen, hidden_act="silu",
        )
    )  # fmt: skip

    def turned(name):
        return torch.from_numpy(np.swapaxes(np.array(params[name]["kernel"]), -1, -2).copy())

    with torch.no_grad():
        theirs.gate.weight.copy_(turned("router"))
        theirs.experts.gate_up_proj.copy_(torch.cat([turned("gate"), turned("up")], dim=1))
        theirs.experts.down_proj.copy_(turned("down"))
    return theirs


@pytest.mark.parity
def test_equals_mixtral():
    import torch

    module, params, x_BLD, _ = example(BASE)
    theirs = mixtral(params, BASE)
    x = torch.from_numpy(np.array(x_BLD)).requires_grad_()
    y = theirs(x)
    y.square().sum().backward()

    def loss(p, x):
        y_BLD, _ = module.apply({"params": p}, x, None)
        return jnp.sum(jnp.square(y_BLD)), y_BLD

    (grad, grad_x), ours = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x_BLD)
    np.testing.assert_allclose(ours, y.detach().numpy(), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(grad_x, x.grad.numpy(), atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(grad["router"]["kernel"], theirs.gate.weight.grad.numpy().T, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(
        np.swapaxes(grad["down"]["kernel"], 1, 2), theirs.experts.down_proj.grad.numpy(), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parity
def test_balance_loss_is_mixtrals_over_the_number_chosen():
    """Theirs adds up f over the J choices (uniform routing gives J), ours takes their mean, so that 1 is even for every
    J. Theirs takes f and p over all layers at once, ours of each layer, as the paper has it: here is one layer."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    _, params, x_BLD, keep_BL = example(BASE)
    logits_BLE = x_BLD @ params["router"]["kernel"]
    chosen_BLJ = jax.lax.top_k(logits_BLE, 2)[1]
    for keep in (None, keep_BL):
        ours = balance_loss(jax.nn.softmax(logits_BLE), chosen_BLJ, keep)
        mask = None if keep is None else torch.from_numpy(np.array(keep)).long()
        theirs = load_balancing_loss_func((torch.from_numpy(np.array(logits_BLE)).reshape(-1, 4),), 4, 2, mask)
        np.testing.assert_allclose(2 * ours, theirs.numpy(), rtol=1e-5)
