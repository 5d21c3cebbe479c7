"""Which key each query may see.

Letters: B batch · L query length · S key length.
"""

import flax.struct
import jax
import jax.numpy as jnp


def distances(length: int, size: int, seen: jax.Array | None) -> jax.Array:
    """Place of each key less that of each query, (1 or B, L, S) int32; the queries stand behind `seen` tokens, () or (B,).
    Within a document that is their distance."""
    query_BL = places(length, seen)
    return jnp.arange(size, dtype=jnp.int32)[None, None, :] - query_BL[:, :, None]


def places(length: int, seen: jax.Array | None) -> jax.Array:
    """Where in their rows `length` tokens behind `seen` others stand, (1 or B, L) int32."""
    place_L = jnp.arange(length, dtype=jnp.int32)[None, :]
    return place_L if seen is None else place_L + jnp.atleast_1d(seen)[:, None]


@flax.struct.dataclass
class Mask:
    """Which key each query may see, as facts that any kernel can use; `dense` spells them out.

    Queries and keys of different segments never see each other (segment 0 is padding); without
    segments a row is one document. Causal is by place in the row. With a cache the queries stand
    behind its `seen` tokens, () of all rows or (B,) of each. With a prefix a causal mask lets a row's
    first `prefix_B` tokens see each other, and every later token sees them, through a window too
    (Raffel et al. 2020, §3.2.1, figure 4: "causal with prefix").
    """

    query_segments_BL: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    seen: jax.Array | None = None
    prefix_B: jax.Array | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    """Causal: a query sees itself and window − 1 keys before it; else: window // 2 on either side."""

    def dense(self, length: int, size: int) -> jax.Array | None:
        """(1 or B, L, S), True where query l may look at key s; None where every query sees every key."""
        mask = None
        if self.causal or self.window is not None:
            behind_BLS = -distances(length, size, self.seen)
            if self.causal:
                mask = behind_BLS >= 0
                if self.window is not None:
                    mask &= behind_BLS < self.window
            else:
                assert self.window is not None
                mask = jnp.abs(behind_BLS) <= self.window // 2
            if self.causal and self.prefix_B is not None:
                mask = mask | (jnp.arange(size, dtype=jnp.int32)[None, None, :] < self.prefix_B[:, None, None])
        if self.key_segments_BS is not None:
            query = jnp.ones((1, length), jnp.int32) if self.query_segments_BL is None else self.query_segments_BL
            same = query[:, :, None] == self.key_segments_BS[:, None, :]
            mask = same if mask is None else mask & same
        return mask
