"""Our optimiser against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity


def test_adamw_takes_torchs_steps():
    """Three steps of our optimiser (decay mask, clipping, bias correction) against torch.optim.AdamW."""
    import torch

    from jaxlm.train import OptimConfig, make_optimizer

    config = OptimConfig(learning_rate=1e-2, weight_decay=0.1, clip=1.0, beta2=0.95)
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(5, 7)), "scale": rng.normal(size=7)}
    grads = [{name: 3 * rng.normal(size=value.shape) for name, value in start.items()} for _ in range(3)]

    tensors = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in start.items()}
    groups = [{"params": [tensors["kernel"]], "weight_decay": 0.1}, {"params": [tensors["scale"]], "weight_decay": 0.0}]
    torch_adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    optimizer = make_optimizer(config, lambda step: 1e-2)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    state = optimizer.init(params)
    for grad in grads:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grad[name], dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), 1.0)
        torch_adam.step()
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update({n: jnp.asarray(g, jnp.float32) for n, g in grad.items()}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), atol=1e-6)
