"""SOAP: algorithm 3 in NumPy, Adam where nothing is rotated, the same steps on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.model.lora import MatrixAxes
from jaxlm.parallel import ParallelConfig, fitting, make_mesh, stored_shardings
from jaxlm.train import soap
from jaxlm.train.soap import scale_by_soap

B1, B2, EPS = 0.9, 0.95, 1e-8


def by_hand(gradients, left, right):
    """Algorithm 3 of one matrix in float64, from bases on: a step for each gradient but the first, of which they are."""
    g = gradients[0]
    p_left, p_right = (1 - B2) * g @ g.T, (1 - B2) * g.T @ g
    m, v, steps = np.zeros_like(g), np.zeros_like(g), []
    for t, g in enumerate(gradients[1:], 1):
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * (left.T @ g @ right) ** 2
        rotated = (left.T @ m @ right) / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)
        steps.append(left @ rotated @ right.T)
        p_left, p_right = B2 * p_left + (1 - B2) * g @ g.T, B2 * p_right + (1 - B2) * g.T @ g
        if t % 10 == 0:
            order = np.argsort(-np.diag(left.T @ p_left @ left))
            left, v = np.linalg.qr(p_left @ left[:, order])[0], v[order]
            order = np.argsort(-np.diag(right.T @ p_right @ right))
            right, v = np.linalg.qr(p_right @ right[:, order])[0], v[:, order]
    return steps


@pytest.mark.parametrize(
    "letters, shape, size",
    [
        (("layers", "D", "N", "H"), (2, 12, 3, 4), (12, 12)),
        (("layers", "N", "H", "D"), (2, 2, 4, 6), (8, 6)),
        (("layers", "E", "D", "F"), (1, 2, 5, 9), (5, 9)),
    ],
    ids=["into heads", "out of heads", "experts"],
)
def test_it_takes_the_steps_of_algorithm_3(letters, shape, size):
    """Twenty-five steps with two refreshes; every matrix of a leaf by itself."""
    rng, axes = np.random.default_rng(0), MatrixAxes.of(letters)
    optimizer = scale_by_soap(B1, B2, EPS, {"kernel": axes})
    common, scales = rng.normal(size=shape), np.exp(rng.normal(size=shape))
    gradients = [scales * (0.3 * common + rng.normal(size=shape)) for _ in range(26)]
    update, steps = jax.jit(optimizer.update), []
    state = optimizer.init({"kernel": jnp.zeros(shape, jnp.float32)})
    for g in gradients:
        step, state = update({"kernel": jnp.asarray(g, jnp.float32)}, state)
        steps.append(np.asarray(step["kernel"]).reshape(-1, *size))
        if len(steps) == 1:
            assert not steps[0].any() and not state.mu["kernel"].any() and not state.nu["kernel"].any()
            bases = [np.asarray(q["kernel"], np.float64) for q in (state.left_basis, state.right_basis)]
            assert all(q.ndim == len(shape) for q in bases)
            lefts, rights = (q.reshape(-1, n, n) for q, n in zip(bases, size, strict=True))
    for i, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        own = [g.reshape(-1, *size)[i] for g in gradients]
        for q, product in ((left, own[0] @ own[0].T), (right, own[0].T @ own[0])):
            np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-5)
            values = q.T @ product @ q / np.trace(product)
            np.testing.assert_allclose(values, np.diag(np.sort(np.diag(values))[::-1]), atol=1e-5)
        for ours, wanted in zip(steps[1:], by_hand(own, left, right), strict=True):
            np.testing.assert_allclose(ours[i], wanted, atol=2e-4)


def test_where_no_side_is_rotated_it_is_adam(monkeypatch):
    """One step later, for the first moves nothing. A side that is too long has no squares, the other one has."""
    axes, shape, rng = {"kernel": MatrixAxes.of(("layers", "D", "F"))}, (2, 4, 6), np.random.default_rng(0)
    params = {"kernel": jnp.zeros(shape, jnp.float32)}
    gradients = [{"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for _ in range(13)]
    for longest in (3, 5):
        monkeypatch.setattr(soap, "LONGEST", longest)
        optimizer, adam = scale_by_soap(B1, B2, EPS, axes), optax.scale_by_adam(B1, B2, EPS)
        state, theirs, far = optimizer.init(params), adam.init(params), []
        assert [x["kernel"].shape for x in (state.left, state.right)] == [(2, 4, 4) if longest > 4 else (1,), (1,)]
        update = jax.jit(optimizer.update)
        for i, g in enumerate(gradients):
            ours, state = update(g, state)
            if i:
                with jax.numpy_dtype_promotion("standard"):
                    wanted, theirs = adam.update(g, theirs)
                far.append(np.abs(ours["kernel"] - wanted["kernel"]).max())
        assert max(far) < 1e-5 if longest == 3 else min(far) > 0.1


def test_it_takes_the_same_steps_on_any_mesh():
    """From a state whose squares have full rank, through a refresh; all of the state lies in parts."""
    letters = {"up": ("layers", "D", "F"), "query": ("layers", "D", "N", "H"), "out": ("layers", "N", "H", "D")}
    sizes = {"layers": 2, "D": 32, "N": 2, "H": 16, "F": 64}
    shapes = {name: jax.ShapeDtypeStruct([sizes[letter] for letter in axes], jnp.float32) for name, axes in letters.items()}
    optimizer = scale_by_soap(B1, B2, EPS, {name: MatrixAxes.of(axes) for name, axes in letters.items()})
    mesh = make_mesh(ParallelConfig(fsdp=4, tensor=2))
    params = stored_shardings({name: jax.P(*axes) for name, axes in letters.items()}, shapes, mesh)
    whole = jax.NamedSharding(mesh, jax.P())
    placed = optax.tree_map_params(
        optimizer, fitting, jax.eval_shape(optimizer.init, shapes), params, transform_non_params=lambda _: whole
    )

    def gradient(i):
        keys = zip(sorted(shapes), jax.random.split(jax.random.key(i), len(shapes)), strict=True)
        return {path: jax.random.normal(key, shapes[path].shape) for path, key in keys}

    def steps(update, state, which):
        seen = []
        for i in which:
            step, state = jax.block_until_ready(update(gradient(i), state))
            seen.append(jax.device_get(step))
        return seen, state

    alone = jax.jit(optimizer.update)
    _, state = steps(alone, optimizer.init(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)), range(19))
    split = jax.jit(optimizer.update, in_shardings=(params, placed), out_shardings=(params, placed))
    one, _ = steps(alone, state, range(19, 22))
    many, after = steps(split, jax.device_put(state, placed), range(19, 22))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, many)
    parts = jax.tree.map(lambda x: x.size // x.addressable_shards[0].data.size, after)
    assert parts.mu == parts.nu == {"up": 8, "query": 8, "out": 8}
    for squares in parts[3:]:
        assert squares == {"up": 8, "query": 4, "out": 8}
