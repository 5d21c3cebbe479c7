"""The attention layer: projections, query/key norms, rotary positions, cache, and the core between them.

Letters: B batch · L query length · S key length · D model width · N query heads · K key/value heads ·
H head width.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig
from jaxlm.model.kernels import attend
from jaxlm.model.layers import Angles, Linear, Norm
from jaxlm.model.mask import Mask
from jaxlm.model.positions import rotate

LayerCache = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
    """Grouped key/value heads, optional rotary positions, query/key norms and cache."""

    config: TransformerConfig
    train: bool

    def setup(self) -> None:
        c = self.config
        bias = c.bias if c.qkv_bias is None else c.qkv_bias
        self.query = Linear(c, "BLD,DNH->BLNH", bias=bias)
        self.key = Linear(c, "BLD,DKH->BLKH", bias=bias)
        self.value = Linear(c, "BLD,DKH->BLKH", bias=bias)
        self.out = Linear(c, "BLNH,NHD->BLD", residual=True)
        if c.qk_norm != "none":
            # heads: one scale for all heads (Dehghani et al. 2023, §2; the form of Qwen 3).
            self.query_norm = Norm(c, "rmsnorm", "H" if c.qk_norm == "heads" else "NH")
            self.key_norm = Norm(c, "rmsnorm", "H" if c.qk_norm == "heads" else "KH")

    def _project(self, x_BLD: jax.Array, source_BSD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_BLNH, k_BSKH, v_BSKH = self.query(x_BLD), self.key(source_BSD), self.value(source_BSD)
        if self.config.qk_norm != "none":
            q_BLNH, k_BSKH = self.query_norm(q_BLNH), self.key_norm(k_BSKH)
        return q_BLNH, k_BSKH, v_BSKH

    def _core(
        self, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, bias_BNLS: jax.Array | None
    ) -> Callable[[int | None], jax.Array]:
        """What is left to compute once the window is known."""
        c = self.config
        # The key is drawn here: a module may not draw inside `lax.cond`.
        drop = (c.dropout, self.make_rng("dropout")) if c.dropout and self.train else None

        def core(window: int | None) -> jax.Array:
            return attend(
                q_BLNH, k_BSKH, v_BSKH, dataclasses.replace(mask, window=window),
                scale=c.attention_scale, softcap=c.attention_softcap, bias_BNLS=bias_BNLS, drop=drop, kernel=c.kernel,
            )  # fmt: skip

        return core

    def __call__(
        self, x_BLD: jax.Array, cache: LayerCache | None, local: jax.Array, mask: Mask,
        angles: tuple[Angles, Angles] | None, bias_BNLS: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache | None]:  # fmt: skip
        """Attention of each token to its own text. `local` is whether this layer sees a window only, `angles` are
        the rotary angles of layers that see all and of layers that do not."""
        c = self.config
        q_BLNH, k_BSKH, v_BSKH = self._project(x_BLD, x_BLD)
        if angles is not None:
            turn = angles[0] if c.rope.local_theta is None else jax.tree.map(lambda a, b: jnp.where(local, b, a), *angles)
            q_BLNH, k_BSKH = rotate(q_BLNH, turn), rotate(k_BSKH, turn)
        if cache is not None:
            assert mask.seen is not None, "a cache comes with the number of tokens it holds"
            start = (0, mask.seen, 0, 0)
            k_BSKH = jax.lax.dynamic_update_slice(cache[0], k_BSKH, start)
            v_BSKH = jax.lax.dynamic_update_slice(cache[1], v_BSKH, start)
            cache = (k_BSKH, v_BSKH)
        core = self._core(q_BLNH, k_BSKH, v_BSKH, mask, bias_BNLS)

        kinds = set(c.layer_pattern)
        if len(kinds) == 1:
            mixed_BLNH = core(c.window if kinds == {"L"} else None)
        else:  # which of the two a layer is, is known only within the scan over layers
            mixed_BLNH = jax.lax.cond(local, lambda: core(c.window), lambda: core(None))
        return self.out(mixed_BLNH), cache

    def read(self, x_BLD: jax.Array, states_BSD: jax.Array, mask: Mask) -> jax.Array:
        """Attention of each token to another text, the encoder's `states_BSD` (Vaswani et al. 2017, §3.2.3)."""
        return self.out(self._core(*self._project(x_BLD, states_BSD), mask, None)(None))
