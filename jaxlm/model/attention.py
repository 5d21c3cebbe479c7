"""The attention layer: projections, query/key norms, rotary positions, cache, and the core between them.

Letters: B batch · L query length · S key length · D model width · N query heads · K key/value heads ·
H head width.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.cache import At, KeyValue, Read, write
from jaxlm.model.config import TransformerConfig
from jaxlm.model.kernels import attend, attend_cache
from jaxlm.model.layers import Angles, Linear, Norm
from jaxlm.model.mask import Mask
from jaxlm.model.positions import rotate


class Attention(nn.Module):
    """Grouped key/value heads, optional rotary positions, query/key norms and cache."""

    config: TransformerConfig
    train: bool

    def setup(self) -> None:
        c = self.config
        bias = c.bias if c.qkv_bias is None else c.qkv_bias
        self.query = Linear(c, "BLD,DNH->BLNH", bias=bias, inner=True)
        self.key = Linear(c, "BLD,DKH->BLKH", bias=bias, inner=True)
        self.value = Linear(c, "BLD,DKH->BLKH", bias=bias, inner=True)
        self.out = Linear(c, "BLNH,NHD->BLD", residual=True, inner=True)
        if c.qk_norm != "none":
            # heads: one scale for all heads (Dehghani et al. 2023, §2; the form of Qwen 3).
            self.query_norm = Norm(c, "rmsnorm", "H" if c.qk_norm == "heads" else "NH")
            self.key_norm = Norm(c, "rmsnorm", "H" if c.qk_norm == "heads" else "KH")

    def _queries(self, x_BLD: jax.Array) -> jax.Array:
        q_BLNH = self.query(x_BLD)
        return q_BLNH if self.config.qk_norm == "none" else self.query_norm(q_BLNH)

    def _keys(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        k_BSKH, v_BSKH = self.key(x_BSD), self.value(x_BSD)
        return k_BSKH if self.config.qk_norm == "none" else self.key_norm(k_BSKH), v_BSKH

    def _core(
        self, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, bias_NY: jax.Array | None
    ) -> Callable[[int | None], jax.Array]:
        """What is left to compute once the window is known."""
        c = self.config
        # The key is drawn here: a module may not draw inside `lax.cond`.
        drop = (c.dropout, self.make_rng("dropout")) if c.dropout and self.train else None

        def core(window: int | None) -> jax.Array:
            return attend(
                q_BLNH, k_BSKH, v_BSKH, dataclasses.replace(mask, window=window),
                scale=c.attention_scale, softcap=c.attention_softcap, bias_NY=bias_NY, drop=drop, kernel=c.kernel,
                context=c.context,
            )  # fmt: skip

        return core

    def _cached(
        self, q_BLNH: jax.Array, held: KeyValue, at: At, mask: Mask, bias_NY: jax.Array | None
    ) -> Callable[[int | None], jax.Array]:
        """The same of keys and values in a cache."""
        c = self.config

        def core(window: int | None) -> jax.Array:
            return attend_cache(
                q_BLNH, held, at, dataclasses.replace(mask, window=window),
                scale=c.attention_scale, softcap=c.attention_softcap, bias_NY=bias_NY, kernel=c.kernel, context=c.context,
            )  # fmt: skip

        return core

    def __call__(
        self, x_BLD: jax.Array, held: KeyValue | None, local: jax.Array | bool, mask: Mask,
        angles: tuple[Angles, Angles] | None, bias_NY: jax.Array | None, at: At | None,
    ) -> tuple[jax.Array, KeyValue | None]:  # fmt: skip
        """Attention of each token to its own text. `local` is whether this layer sees a window only, `angles` are
        the rotary angles of layers that see all and of layers that do not, `at` is where the new tokens stand in what the
        cache `held`. Returns also what it holds now."""
        c = self.config
        q_BLNH, (k_BSKH, v_BSKH) = self._queries(x_BLD), self._keys(x_BLD)
        if angles is not None:
            turn = angles[0] if c.rope.local_theta is None else jax.tree.map(lambda a, b: jnp.where(local, b, a), *angles)
            q_BLNH, k_BSKH = rotate(q_BLNH, turn), rotate(k_BSKH, turn)
        if held is not None:
            assert mask.seen is not None and at is not None, "a cache comes with the number of tokens it holds"
            held = write(held[0], k_BSKH, at), write(held[1], v_BSKH, at)
            core = self._cached(q_BLNH, held, at, mask, bias_NY)
        else:
            core = self._core(q_BLNH, k_BSKH, v_BSKH, mask, bias_NY)

        kinds = set(c.layer_pattern)
        if len(kinds) == 1 or isinstance(local, bool):
            mixed_BLNH = core(c.window if kinds == {"L"} or local is True else None)
        else:  # which of the two a layer is, is known only within the scan over layers
            mixed_BLNH = jax.lax.cond(local, lambda: core(c.window), lambda: core(None))
        return self.out(mixed_BLNH), held

    def source(self, states_BSD: jax.Array) -> Read:
        """What `read` needs of another text, the encoder's hidden states."""
        k_BSKH, v_BSKH = self._keys(states_BSD)
        return jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)

    def read(self, x_BLD: jax.Array, source: Read, mask: Mask) -> jax.Array:
        """Attention of each token to another text (Vaswani et al. 2017, §3.2.3). Where there are fewer rows of that,
        neighbouring rows share one (`cache.spread`)."""
        q_BLNH, (k_BSKH, v_BSKH) = self._queries(x_BLD), (jnp.swapaxes(x, 1, 2) for x in source)
        # Rows that share a source are more queries to it: its keys are read once.
        together = q_BLNH.reshape(k_BSKH.shape[0], -1, *q_BLNH.shape[2:])
        return self.out(self._core(together, k_BSKH, v_BSKH, mask, None)(None).reshape(q_BLNH.shape))
