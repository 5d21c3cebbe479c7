"""The step: golden first numbers, no second compilation, schedules, and updates that are skipped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, place_batch
from jaxlm.train import OptimConfig, init_state, make_eval_step, make_optimizer, make_schedule, make_train_step, objectives

CONFIG = TransformerConfig(vocab_size=64, positions=16, layers=2, width=32, heads=4)


def build(config: TransformerConfig = CONFIG, **optim):
    mesh, model = make_mesh(ParallelConfig(), jax.devices()[:1]), Model(config)
    settings = OptimConfig(**{"learning_rate": 1e-2, "warmup": 1, **optim})
    schedule = make_schedule(settings, 20)
    optimizer = make_optimizer(settings, schedule)
    state = init_state(model, optimizer, 0, mesh)
    step = make_train_step(model, objectives.tokens(8), optimizer, schedule, mesh, seed=0)
    return mesh, model, state, step


def batches(mesh, count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        ids = rng.integers(0, 64, (4, 17)).astype(np.int32)
        yield place_batch({"tokens_BL": ids[:, :-1], "targets_BL": ids[:, 1:], "weights_BL": np.ones((4, 16), np.float32)}, mesh)


# Loss and gradient norm of the first two steps, from a run whose logits agreed with torch's GPT-2 (tests/hub/test_families.py).
GOLDEN = [(4.166355, 1.490717), (4.193588, 1.193014)]


def test_golden_first_steps():
    mesh, _, state, step = build()
    seen = []
    for batch in batches(mesh, 2):
        state, metrics = step(state, batch)
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    np.testing.assert_allclose(
        seen, GOLDEN, rtol=1e-4,
        err_msg="the first steps of training changed. If you meant to change initialisation, the model, the loss or the "
        f"optimiser, check parity with torch and put {seen} into GOLDEN; if not, something is broken",
    )  # fmt: skip


def test_no_second_compilation_and_no_hidden_transfer():
    """Twenty steps with evaluations in between compile once each and move nothing to or from the host unasked."""
    mesh, model, state, step = build()
    evaluate = make_eval_step(model, objectives.tokens(8), mesh)
    ready = list(batches(mesh, 20))
    for i, batch in enumerate(ready):
        with jax.transfer_guard("disallow" if i else "allow"):
            state, _ = step(state, batch)
            if i % 5 == 0:
                evaluate(state.params, batch)
    assert step._cache_size() == 1 and evaluate._cache_size() == 1


def test_training_learns_what_it_is_shown():
    mesh, _, state, step = build(warmup=5)
    (batch,) = batches(mesh, 1)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(64), rel=0.02) and losses[-1] < 0.7 * losses[0]


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    mesh, _, state, step = build()
    (batch,) = batches(mesh, 1)
    before = jax.device_get((state.params, state.opt_state))
    poisoned = {**batch, "weights_BL": batch["weights_BL"].at[0, 0].set(np.inf)}
    state, metrics = step(state, poisoned)
    assert metrics["skipped"] == 1 and state.step == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))
    state, metrics = step(state, batch)
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before[0], jax.device_get(state.params))
    assert all(jax.tree.leaves(moved))


def test_clipping_bounds_the_update_and_reports_the_norm_before_it():
    """With plain moments (beta 0) the first AdamW update does not see the scale: compare the second moments."""
    mesh, _, state, step = build(clip=1e-3, weight_decay=0.0)
    (batch,) = batches(mesh, 1)
    state, metrics = step(state, batch)
    moments = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu")]
    assert metrics["grad_norm"] > 0.1
    np.testing.assert_allclose(optax.global_norm(moments[0].mu) / (1 - 0.9), 1e-3, rtol=1e-3)


def test_decay_goes_by_name():
    """With a zero gradient only decay moves a parameter: matrices by default, never norms and biases."""
    optimizer = make_optimizer(OptimConfig(weight_decay=0.5, clip=None), lambda step: 0.1)
    params = Model(CONFIG).init(jax.random.key(0))
    zeros = jax.tree.map(np.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    layers, own = updates["transformer"]["decoder"]["layers"], params["transformer"]["decoder"]["layers"]
    np.testing.assert_allclose(layers["mlp"]["up"]["kernel"], -0.05 * own["mlp"]["up"]["kernel"], rtol=1e-5)
    assert not np.any(layers["mlp"]["up"]["bias"]) and not np.any(layers["mlp_norm"]["scale"])
    assert np.any(updates["transformer"]["embed"]["table"])


def fraction(kind: str, done: float, final: float) -> float:
    """The rate, in peaks, after a share `done` of the decay."""
    return {"constant": 1.0, "cosine": final + (1 - final) * (1 + math.cos(math.pi * done)) / 2}.get(kind, 1 - (1 - final) * done)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 100])
@pytest.mark.parametrize(
    "kind, share", [("constant", 0.2), ("cosine", 0.2), ("linear", 0.2)] + [("wsd", x) for x in (0, 0.2, 0.8, 1)]
)
def test_schedules_step_by_step(kind, share, steps):
    """Every rate of a run by hand: warm-up from peak / (warmup + 1), the peak once it is over, `final` at the last step."""
    final = 0.1
    for warmup in (0, 1, 2, 0.5, 50, 200):
        optim = OptimConfig(learning_rate=2.0, schedule=kind, warmup=warmup, final=final, decay_share=share)
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer step with floats
            rates = np.asarray(jax.vmap(make_schedule(optim, steps))(jnp.arange(steps))) / 2 + np.zeros(steps)
        rising = min(round(warmup * steps if warmup < 1 else warmup), steps - 1)
        after = steps - 1 - rising
        decay = min(max(1, round(share * steps)), after) if kind == "wsd" else after
        expected = [(i + 1) / (rising + 1) for i in range(rising)]
        expected += [fraction(kind, max(0, i - (after - decay)) / decay if decay else 1.0, final) for i in range(after + 1)]
        np.testing.assert_allclose(rates, expected, rtol=1e-5, err_msg=f"warmup {warmup}")
        assert rates[-1] == pytest.approx(1.0 if kind == "constant" else final, rel=1e-6)
        assert rising == steps - 1 or rates.max() == pytest.approx(1.0), "a run that has room for it reaches the peak"


@pytest.mark.parametrize("name", ["lion", "schedule_free"])
def test_the_logged_rate_is_the_one_that_was_used(name):
    """Each number of lion's step is the rate itself: the logged one, also after skipped steps. The average of schedule_free
    is weighed by the rates of the same steps."""
    mesh, _, state, step = build(name=name, weight_decay=0.0, warmup=0, schedule="linear", final=0.0, clip=None)
    (batch,) = batches(mesh, 1)
    poisoned = {**batch, "weights_BL": batch["weights_BL"].at[0, 0].set(np.inf)}
    for i in range(20):
        before, bad = jax.device_get(state.params), i in (3, 4, 11)
        state, metrics = step(state, poisoned if bad else batch)
        rate = 1e-2 * (1 - i / 19)
        assert bool(metrics["skipped"]) == bad and metrics["learning_rate"] == pytest.approx(rate, rel=1e-5, abs=1e-9)
        if name == "lion":
            moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.params))
            assert max(jax.tree.leaves(moved)) == pytest.approx(0 if bad else rate, rel=1e-3, abs=2e-7)
        elif not bad:
            assert state.opt_state.step_count == i + 2


def test_an_encoder_decoder_takes_the_same_steps_in_parts():
    """The nested batch through the step, whole and in two parts: the same losses, and it learns."""
    config = TransformerConfig(
        architecture="encoder_decoder", vocab_size=64, positions=16, layers=1, width=32, heads=4, position="relative",
        relative_buckets=8, norm="rmsnorm", bias=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    side = {"tokens_BL": rng.integers(0, 64, (4, 8)).astype(np.int32), "segments_BL": np.ones((4, 8), np.int32)}
    target = rng.integers(0, 64, (4, 8)).astype(np.int32)
    weights = np.triu(np.ones((4, 8), np.float32))  # rows of unequal weight
    batch = {"encoder": side, "decoder": {**side, "targets_BL": target, "weights_BL": weights}}
    mesh, model = make_mesh(ParallelConfig(), jax.devices()[:1]), Model(config)
    settings = OptimConfig(learning_rate=1e-2, warmup=1)
    schedule = make_schedule(settings, 20)
    optimizer = make_optimizer(settings, schedule)
    losses = []
    for accumulate in (1, 2):
        state = init_state(model, optimizer, 0, mesh)
        step = make_train_step(model, objectives.tokens(8), optimizer, schedule, mesh, seed=0, accumulate=accumulate)
        losses.append([])
        for _ in range(5):
            state, metrics = step(state, batch)
            losses[-1].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1
