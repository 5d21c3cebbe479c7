"""Linear maps, norms, embeddings, MLPs and rotary positions.

Letters: B batch · L query length · D model width · N query heads · K key/value heads · H head width ·
F MLP width · V vocabulary · P positions. A weight's axes, initialiser and sharding all follow from the
letters of the equation that it is declared with.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.model.config import TransformerConfig
from jaxlm.parallel.rules import constrain


def parameter(module: Any, name: str, axes: str, init: Any, split: bool = True) -> jax.Array:
    """Declare a float32 parameter: its letters give its shape and, with `split`, its sharding."""
    sizes = module.config.sizes()
    letters = tuple(axes) if split else (None,) * len(axes)
    return module.param(name, nn.with_logical_partitioning(init, letters), tuple(sizes[letter] for letter in axes))


class Linear(nn.Module):
    """y = x · W (+ b), written as an equation: `Linear(config, "BLD,DNH->BLNH")`.

    The middle operand names the weight's axes, whose sizes the config knows; a bias has those of them
    that reach the output. `residual` marks an output into the residual stream, whose initial weights
    GPT-2 divides by √(2·layers) (Radford et al. 2019, §2.3).
    """

    config: TransformerConfig
    equation: str
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        inputs, output = self.equation.split("->")
        axes = inputs.split(",")[1]
        scaled = self.residual and c.init == "residual_scaled"
        std = c.init_std / math.sqrt(2 * c.layers) if scaled else c.init_std
        w = parameter(self, "kernel", axes, nn.initializers.normal(std))
        y = jnp.einsum(self.equation, x, w.astype(dtype))
        if c.bias:
            axes = "".join(letter for letter in axes if letter in output)
            b = parameter(self, "bias", axes, nn.initializers.zeros)
            y = y + b.astype(dtype).reshape((1,) * (y.ndim - b.ndim) + b.shape)
        return constrain(y, output)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, in float32."""

    config: TransformerConfig
    kind: str
    axis: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, centred = self.config, self.kind == "layernorm"
        # Held whole by every device: splitting a vector of D numbers would save nothing.
        scale = parameter(self, "scale", self.axis, nn.initializers.ones, split=False)
        y = normalise(x.astype(jnp.float32), c.norm_eps, centred) * _as_row(scale, x)
        if centred and c.bias:
            y = y + _as_row(parameter(self, "bias", self.axis, nn.initializers.zeros, split=False), x)
        return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalise(x: jax.Array, eps: float, centred: bool) -> jax.Array:
    """x, less its mean if `centred`, over its root mean square; all over the last axis.

    The gradient is the closed form: autodiff's passes over the data about twice as often.
    """
    return _normalise_forward(x, eps, centred)[0]


def _normalise_forward(x: jax.Array, eps: float, centred: bool) -> tuple[jax.Array, Any]:
    mean = jnp.mean(x, axis=-1, keepdims=True) if centred else jnp.zeros_like(x[..., :1])
    y = x - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y * inverse, (x, mean, inverse)


def _normalise_backward(eps: float, centred: bool, saved: Any, grad: jax.Array) -> tuple[jax.Array]:
    x, mean, inverse = saved
    y = (x - mean) * inverse
    along = jnp.mean(grad * y, axis=-1, keepdims=True)
    if centred:
        grad = grad - jnp.mean(grad, axis=-1, keepdims=True)
    return (inverse * (grad - y * along),)


normalise.defvjp(_normalise_forward, _normalise_backward)


def _as_row(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Embed(nn.Module):
    """A table of vectors, by token or by position; the head may read it again."""

    config: TransformerConfig
    axes: str

    def setup(self) -> None:
        self.table = parameter(self, "table", self.axes, nn.initializers.normal(self.config.init_std))

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        return constrain(jnp.take(self.table, ids_BL, axis=0).astype(self.config.dtype), "BLD")


def activate(kind: str, x: jax.Array) -> jax.Array:
    """The non-linearity, by its config name; a gated one is applied to its gate."""
    if kind in ("gelu", "geglu"):
        return jax.nn.gelu(x, approximate=False)  # Hendrycks and Gimpel 2016
    if kind == "gelu_tanh":
        return gelu_tanh(x)
    if kind == "swiglu":
        return jax.nn.silu(x)  # Shazeer 2020, "GLU Variants Improve Transformer"
    x = jax.nn.relu(x)
    return jnp.square(x) if kind == "relu2" else x  # So et al. 2021, "Primer"


_ROOT = math.sqrt(2 / math.pi)


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation (Hendrycks and Gimpel 2016, §2); the backward pass keeps x alone."""
    return _gelu_tanh_forward(x)[0]


def _gelu_tanh_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return 0.5 * x * (1 + jnp.tanh(_ROOT * (x + 0.044715 * x * x * x))), x


def _gelu_tanh_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    t = jnp.tanh(_ROOT * (x + 0.044715 * x * x * x))
    return (grad * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (_ROOT * (1 + 3 * 0.044715 * x * x))),)


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_tanh_backward)


class Mlp(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c = self.config
        up_BLF = Linear(c, "BLD,DF->BLF", name="up")(x_BLD)
        if c.gated:
            gate_BLF = Linear(c, "BLD,DF->BLF", name="gate")(x_BLD)
            inner_BLF = activate(c.activation, gate_BLF) * up_BLF
        else:
            inner_BLF = activate(c.activation, up_BLF)
        return Linear(c, "BLF,FD->BLD", residual=True, name="down")(inner_BLF)


def rotary_angles(positions_BL: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, (B, L, 1, H/2) each, float32 (Su et al. 2021, "RoFormer", eq. 34)."""
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn each pair (i, i + H/2) of a query or key head by its angle: the half-split layout of Llama's
    published checkpoints in Hugging Face form."""
    cos, sin = angles
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLNH.dtype)
