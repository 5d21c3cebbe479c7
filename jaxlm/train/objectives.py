"""What a step minimises: `(apply, params, batch, rng) → (loss sum, weight sum, metrics)`.

Sums and weights, never means, so that gradient accumulation, padding and the number of devices cannot
change the result.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Sums = tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]
Objective = Callable[[Callable[..., Any], Any, Mapping[str, Any], jax.Array | None], Sums]


def causal(chunk: int, z_loss: float = 0.0) -> Objective:
    """Cross-entropy of the vocabulary in nats, plus z-loss, of an encoder-decoder its decoder's; `chunk` positions of
    logits at a time.

    An rng turns dropout on. The metric `nll` is the cross-entropy sum without the z-loss.
    """

    def objective(apply: Callable[..., Any], params: Any, batch: Mapping[str, Any], rng: jax.Array | None) -> Sums:
        loss, nll = apply(params, batch, method="loss", train=rng is not None, rng=rng, chunk=chunk, z_loss=z_loss)
        return loss, jnp.sum(batch.get("decoder", batch)["weights_BL"]), {"nll": nll}

    return objective
