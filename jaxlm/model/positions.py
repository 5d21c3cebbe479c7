"""How a token knows its place: rotary angles and their stretching, sinusoids, biases of the attention scores.

Letters: B batch · L query length · S key length · D model width · N query heads · H head width · R buckets ·
Y distances of key and query.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.model.config import RotaryConfig, TransformerConfig
from jaxlm.model.layers import Angles, parameter


def rotary_angles(positions_BL: jax.Array, config: TransformerConfig, theta: float) -> Angles:
    """cos and sin of the rotary angles, (B, L, 1, rotary_width/2) each, float32 (Su et al. 2021, "RoFormer", eq. 34).

    Under dynamic scaling (NTK-aware, by bloc97 2023) the base grows with a token's own position beyond the trained context:
    the angles with which `transformers` decodes token by token. A token's angles then hang on its text up to itself alone,
    not on padding, on other rows or on the pieces in which the text is read, and a cache's keys stay valid. `transformers`
    reads a whole prompt beyond the trained context with the base of the batch's longest row instead, so that what it
    computes for a text changes with where the prompt ended.
    """
    rope, width = config.rope, config.rotary_width
    trained = rope.original_positions or config.positions
    if rope.scaling == "dynamic":
        length_BL = jnp.maximum(positions_BL + 1, trained).astype(jnp.float32)
        base_BL = theta * (rope.factor * length_BL / trained - (rope.factor - 1)) ** (width / (width - 2))
        frequencies = base_BL[:, :, None, None] ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)[None, None, None, :]
    else:
        frequencies = jnp.asarray(rotary_frequencies(rope, width, theta, trained), jnp.float32)[None, None, None, :]
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    magnitude = 1.0
    if rope.scaling == "yarn":
        magnitude = rope.magnitude if rope.magnitude is not None else 0.1 * math.log(max(rope.factor, 1.0)) + 1
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotary_frequencies(rope: RotaryConfig, width: int, theta: float, trained: int) -> np.ndarray:
    """Radians a position of each pair, (width/2,), float64; `trained` is the context before stretching."""
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if rope.scaling == "linear":  # Chen et al. 2023, "Extending Context Window … via Positional Interpolation"
        return frequencies / rope.factor
    if rope.scaling == "llama3":  # Dubey et al. 2024; the smoothing of the released code
        turns = trained * frequencies / (2 * np.pi)  # over the trained context
        smooth = np.clip((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0, 1)
        return frequencies * (smooth + (1 - smooth) / rope.factor)
    if rope.scaling == "yarn":  # Peng et al. 2024, "YaRN", §3.2, with the ramp over the pair's index, as released

        def pair(turns: float) -> float:
            """Index of the pair that turns so often over the trained context."""
            return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(rope.beta_fast)), 0), min(math.ceil(pair(rope.beta_slow)), width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
        return frequencies * (1 - ramp) + frequencies / rope.factor * ramp
    return frequencies


def rotate(x_BLNH: jax.Array, angles: Angles) -> jax.Array:
    """Turn each pair (i, i + width/2) of the first `width` numbers of a query or key head by its angle: the
    half-split layout of Llama's published checkpoints in Hugging Face form."""
    cos, sin = angles
    width = 2 * cos.shape[-1]
    first, second = jnp.split(x_BLNH[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = [part.astype(x_BLNH.dtype) for part in turned]
    return jnp.concatenate([*turned, x_BLNH[..., width:]], axis=-1)


def sinusoids(positions_BL: jax.Array, width: int) -> jax.Array:
    """(B, L, D) float32: sines in the first half, cosines in the second (Vaswani et al. 2017, §3.5, in the order of
    tensor2tensor and Marian)."""
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = positions_BL[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class RelativeBias(nn.Module):
    """A learned number a head and bucket of relative positions, added to the scores of every layer
    (Raffel et al. 2020, "T5", §2.1)."""

    config: TransformerConfig
    causal: bool

    @nn.compact
    def __call__(self, distance_Y: jax.Array) -> jax.Array:
        """(N, Y), of distances key − query."""
        c = self.config
        table_RN = parameter(self, "table", "RN", nn.initializers.normal(c.init_std))
        bucket_Y = relative_buckets(distance_Y, self.causal, c.relative_buckets, c.relative_distance)
        return jnp.take(table_RN.astype(jnp.float32), bucket_Y, axis=0).T


def relative_buckets(distances: jax.Array, causal: bool, buckets: int, farthest: int) -> jax.Array:
    """Bucket of each distance: one each for the near half of them, then ever wider ones up to `farthest`.

    Where keys may stand after their query, they have half of the buckets for themselves.
    """
    offset = jnp.zeros_like(distances)
    if causal:
        apart = jnp.maximum(-distances, 0)
    else:
        buckets //= 2
        offset = jnp.where(distances > 0, buckets, 0).astype(jnp.int32)
        apart = jnp.abs(distances)
    near = buckets // 2
    ratio = jnp.log(jnp.maximum(apart, 1).astype(jnp.float32) / near) / math.log(farthest / near)
    far = near + (ratio * (buckets - near)).astype(jnp.int32)
    return offset + jnp.where(apart < near, apart, jnp.minimum(far, buckets - 1))
