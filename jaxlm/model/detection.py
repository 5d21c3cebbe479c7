"""Two encoders trained together: a generator that fills in masked tokens, a discriminator that finds its replacements."""

import dataclasses
import functools
from typing import Any

import jax

from jaxlm.model.config import TransformerConfig
from jaxlm.model.functions import Model, Params
from jaxlm.model.transformer import Batch

# What the generator takes from the discriminator (Clark et al. 2020, "ELECTRA", §3.2: token and position embeddings).
_SHARED = ("embed", "embed_positions", "embed_types")


@dataclasses.dataclass(frozen=True)
class Detection:
    """A `Model` of two parts: parameters `{"generator": …, "discriminator": …}`, `apply(…, part=…)`.

    The generator is the discriminator at `share` of its width, heads and MLP, with a head over the vocabulary, and
    reads the discriminator's embeddings.
    """

    config: TransformerConfig
    """The discriminator's; its head is of kind detection."""
    share: float = 0.25

    @functools.cached_property
    def discriminator(self) -> Model:
        return Model(self.config)

    @functools.cached_property
    def generator(self) -> Model:
        c = self.config
        heads = max(1, round(c.heads * self.share))
        head = dataclasses.replace(c.head, kind="masked_lm", activation="gelu", norm=True, dense=True)
        sizes: dict[str, Any] = {"heads": heads, "kv_heads": None, "head_width": c.H, "width": heads * c.H, "embedding_width": c.W}
        return Model(dataclasses.replace(c, **sizes, mlp_width=max(1, round(c.F * self.share)), head=head))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of both."""
        one, two = jax.random.split(key)
        return {"generator": self._own(self.generator.init(one)), "discriminator": self.discriminator.init(two)}

    def apply(self, params: Params, batch: Batch, *args: Any, part: str = "discriminator", **options: Any) -> Any:
        """Call a method of one part's module."""
        if part == "discriminator":
            return self.discriminator.apply(params[part], batch, *args, **options)
        return self.generator.apply(self._with_shared(params), batch, *args, **options)

    def _own(self, tree: Any) -> Any:
        """The generator's parameters without those that are not its own."""
        body = tree["transformer"]
        encoder = {name: leaf for name, leaf in body["encoder"].items() if name not in _SHARED}
        return {**tree, "transformer": {"encoder": encoder}}

    def _with_shared(self, params: Params) -> Params:
        own, other = params["generator"], params["discriminator"]["transformer"]
        shared = {name: other["encoder"][name] for name in _SHARED if name in other["encoder"]}
        body = {"embed": other["embed"], "encoder": {**own["transformer"]["encoder"], **shared}}
        return {**own, "transformer": body}

    @property
    def shapes(self) -> Params:
        return {"generator": self._own(self.generator.shapes), "discriminator": self.discriminator.shapes}

    @property
    def axes(self) -> Params:
        return {"generator": self._own(self.generator.axes), "discriminator": self.discriminator.axes}

    def parameters(self) -> int:
        """How many numbers the parameter tree holds."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))
