"""A model as pure functions over plain parameter trees: what everything above this room uses."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig
from jaxlm.model.heads import Labeller, LanguageModel
from jaxlm.model.layers import TURNED, turned
from jaxlm.model.transformer import Batch, parted

Params = Any


@dataclasses.dataclass(frozen=True)
class Model:
    """`init(key)` gives parameters (in the config's `param_dtype`), `apply(params, batch, …)` computes with them.

    `axes` and `shapes` are trees like the parameters: logical axes (a PartitionSpec of letters) and
    ShapeDtypeStructs. They are known without computing anything.
    """

    config: TransformerConfig

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; a pure function of the key, whatever the sharding it is computed in."""
        return nn.unbox(self._boxed(key))

    def _boxed(self, key: jax.Array) -> Params:
        batch: Batch = {"tokens_BL": jnp.zeros((1, 1), jnp.int32)}
        if self.config.architecture == "encoder_decoder":
            batch = {"encoder": batch, "decoder": batch}
        return self._module().init(key, batch)["params"]

    def _module(self, train: bool = False) -> nn.Module:
        scores_vocabulary = self.config.head.kind in ("language_model", "masked_lm")
        return (LanguageModel if scores_vocabulary else Labeller)(self.config, train=train)

    @functools.cached_property
    def _abstract(self) -> Params:
        return jax.eval_shape(self._boxed, jax.random.key(0))

    def apart(self, params: Params) -> Params:
        """The same parameters with each layer of the decoder for itself and its kernels turned (`layers.TURNED`), for
        decoding: layers that are one array must be cut out of it at each step, which on a CPU takes longer than multiplying
        by them. Pure; parameters that stand apart already stay as they are."""
        config, transformer = self.config, params["transformer"]
        stack = transformer["decoder"]
        if isinstance(stack["layers"], tuple):
            return params
        layers = parted(stack["layers"], config.stacks["decoder"], config.share_layers)
        if config.quantize == "none":
            axes, first = self.axes["transformer"]["decoder"]["layers"], 0 if config.share_layers else 1
            layers = tuple(_turned(layer, axes, first) for layer in layers)
        return {**params, "transformer": {**transformer, "decoder": {**stack, "layers": layers}}}

    @property
    def shapes(self) -> Params:
        return nn.unbox(self._abstract)

    @property
    def axes(self) -> Params:
        return nn.get_partition_spec(self._abstract)

    def apply(
        self, params: Params, batch: Batch | jax.Array, *args: Any,
        train: bool = False, rng: jax.Array | None = None, method: str = "__call__", **options: Any,
    ) -> Any:  # fmt: skip
        """Call a method of the module: `__call__` (logits and cache, or a label head's scores), `hidden` or `loss`;
        `logits` takes hidden states for a batch.

        `train` turns dropout on, which then draws from `rng`, as does the rounding of gradients with `config.quantize`.
        """
        rngs = {"dropout": rng, "quantize": rng} if train and rng is not None else None
        return self._module(train).apply({"params": params}, batch, *args, rngs=rngs, method=method, **options)

    def parameters(self) -> int:
        """How many numbers the parameter tree holds."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))


def _turned(params: Params, axes: Any, first: int) -> Params:
    """The kernels of linear maps as `layers.turned` has them; their logical axes begin with that of the layers, or not."""
    made = {}
    for name, leaf in params.items():
        if isinstance(leaf, dict):
            made[name] = _turned(leaf, axes[name], first)
        elif name == "kernel" and len(letters := "".join(axes[name][first:])) in (2, 3) and "D" in (letters[0], letters[-1]):
            made[TURNED] = jnp.einsum(f"{letters}->{turned(letters)}", leaf)
        else:
            made[name] = leaf
    return made
