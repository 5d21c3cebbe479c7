"""What each policy of recomputation keeps: less memory from one to the next, and always the same gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import Model, TransformerConfig

CONFIG = TransformerConfig(vocab_size=64, positions=256, layers=8, width=64, heads=4)
BATCH = {
    "tokens_BL": jnp.arange(8 * 256, dtype=jnp.int32).reshape(8, 256) % 64, "targets_BL": jnp.ones((8, 256), jnp.int32),
    "weights_BL": jnp.ones((8, 256), jnp.float32),
}  # fmt: skip


def gradient(remat):
    model = Model(dataclasses.replace(CONFIG, remat=remat))
    return jax.jit(jax.grad(lambda params: model.apply(params, BATCH, chunk=32, method="loss")[0]))


@pytest.fixture(scope="module")
def params():
    return Model(CONFIG).init(jax.random.key(0))


def test_each_policy_keeps_less(params):
    used = {}
    for remat in ("none", "dots", "attention", "full"):
        used[remat] = gradient(remat).lower(params).compile().memory_analysis().temp_size_in_bytes
    assert used["none"] > 1.5 * used["dots"] and used["dots"] > 1.2 * used["attention"] and used["attention"] > used["full"], used


@pytest.mark.parametrize("remat", ["dots", "attention", "offload", "full"])
def test_gradients_are_the_same(remat, params):
    wanted, found = (jax.device_get(gradient(name)(params)) for name in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), wanted, found)
