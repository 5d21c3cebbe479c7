"""Linear maps, norms, embeddings, MLPs and positions.

Letters: B batch · L query length · S key length · D model width · W width of the token embeddings · N query
heads · K key/value heads · H head width · F MLP width · V vocabulary · P positions · T token types · R buckets
of relative positions · C classes. A weight's axes, initialiser and sharding all follow from the letters of the
equation that it is declared with.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.model.config import TransformerConfig
from jaxlm.model.lora import MatrixAxes
from jaxlm.model.precision import quantized_product
from jaxlm.model.quantized import compose
from jaxlm.parallel.rules import COMPUTED, RESIDUAL, DeviceSum, constrain, split_over

Angles = tuple[jax.Array, jax.Array]


def parameter(module: Any, name: str, axes: str, init: Any, split: bool = True) -> jax.Array:
    """Declare a parameter: its letters give its shape and, with `split`, its sharding. It is drawn in float32, and held in
    the config's `param_dtype`."""
    sizes = module.config.sizes()
    letters = tuple(axes) if split else (None,) * len(axes)

    def start(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return init(key, shape, jnp.float32).astype(module.config.param_dtype)

    return module.param(name, nn.with_logical_partitioning(start, letters), tuple(sizes[letter] for letter in axes))


def kernel(module: Any, axes: str, init: Any) -> Any:
    """The parameter `kernel` of a module, or in a step that trains an adapter the parts that `quantized.compose` makes it of."""
    if module.has_variable("params", "kernel") and isinstance(parts := module.get_variable("params", "kernel"), Mapping):
        return parts
    return parameter(module, "kernel", axes, init)


def divisor(length: int, chunk: int) -> int:
    """The largest number up to `chunk` that divides `length`."""
    return max(size for size in range(1, min(chunk, length) + 1) if length % size == 0)


def product(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """The einsum of a map whose last axes of x are the first of w, or the last of a w that is `turned`.

    On one device it is written as the product of two matrices, for whose gradients XLA:CPU makes fewer copies (a step of
    MiniLM takes 12% less). On several it is not: an axis merged of two cannot be split as both were.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return jnp.einsum(equation, x, w)
    inputs, output = equation.split("->")
    x_axes, w_axes = inputs.split(",")
    summed = sum(letter not in output for letter in w_axes)
    over, rows = x_axes[-summed:], x.reshape(-1, math.prod(x.shape[-summed:]))
    if w_axes[:summed] == over:
        y, shape = rows @ w.reshape(rows.shape[1], -1), w.shape[summed:]
    else:
        assert w_axes[-summed:] == over, f"{equation}: summed axes come last in x and first or last in w"
        y, shape = (w.reshape(-1, rows.shape[1]) @ rows.T).T, w.shape[:-summed]
    return y.reshape(*x.shape[: x.ndim - summed], *shape)


TURNED = "turned"
"""Name of a kernel whose axes stand as `turned` says: what it sums over lies together, which a CPU multiplies few rows by in
about half of the time."""


def turned(axes: str) -> str:
    """The axes of a kernel with those of its output first: DNH → NHD, NHD → DNH."""
    return axes[1:] + "D" if axes[0] == "D" else "D" + axes[:-1]


class Linear(nn.Module):
    """y = x · W (+ b), written as an equation: `Linear(config, "BLD,DNH->BLNH")`.

    The middle operand names the weight's axes, whose sizes the config knows; a bias has those of them
    that reach the output. `residual` marks an output into the residual stream, whose initial weights
    GPT-2 divides by √(2·layers) (Radford et al. 2019, §2.3), `inner` a map of the layers, which `config.quantize` multiplies
    in fewer bits; its gradients are then rounded at random where there is an rng stream `quantize`.
    """

    config: TransformerConfig
    equation: str
    residual: bool = False
    bias: bool | None = None
    inner: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        inputs, output = self.equation.split("->")
        axes = inputs.split(",")[1]
        scaled = self.residual and c.init == "residual_scaled"
        std = c.init_std / math.sqrt(2 * c.layers) if scaled else c.init_std
        w: Any
        if self.has_variable("params", TURNED):
            w, axes = self.get_variable("params", TURNED), turned(axes)
        else:
            w = kernel(self, axes, nn.initializers.normal(std))
        if self.residual:  # its input is split as the other maps left it, not as its own result will be
            x = constrain(x, inputs.split(",")[0])
        if self.inner and c.quantize != "none":
            key = self.make_rng("quantize") if self.has_rng("quantize") else None

            def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
                return quantized_product(x, w.astype(dtype), key, sum(letter not in output for letter in axes), c.quantize)
        else:

            def multiply(x: jax.Array, w: jax.Array) -> jax.Array:
                return product(f"{inputs.split(',')[0]},{axes}->{output}", x, w.astype(dtype))

        if isinstance(w, Mapping):  # the backward pass composes the kernel again, for kept ones of all layers would be the whole
            y = jax.checkpoint(lambda x, parts: multiply(x, compose(parts, MatrixAxes.of(tuple(axes)))))(x, dict(w))
        else:
            y = multiply(x, w)
        if c.bias if self.bias is None else self.bias:
            axes = "".join(letter for letter in axes if letter in output)
            b = parameter(self, "bias", axes, nn.initializers.zeros)
            y = y + b.astype(dtype).reshape((1,) * (y.ndim - b.ndim) + b.shape)
        return constrain(y, output, RESIDUAL if self.residual else COMPUTED)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axes, in float32.

    `axes` are the letters that are normalised together, in the order of the input's last axes.
    """

    config: TransformerConfig
    kind: str
    axes: str = "D"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, centred = self.config, self.kind == "layernorm"
        flat = x.reshape(*x.shape[: x.ndim - len(self.axes)], -1)
        # Of one axis held whole by every device: splitting a vector of D numbers would save nothing.
        split = len(self.axes) > 1
        start = nn.initializers.zeros if c.norm_offset else nn.initializers.ones
        scale = parameter(self, "scale", self.axes, start, split).astype(jnp.float32)
        scale = (scale + 1 if c.norm_offset else scale).reshape(-1)
        y = normalise(flat.astype(jnp.float32), c.norm_eps, centred) * _as_row(scale, flat)
        if centred and c.bias:
            bias = parameter(self, "bias", self.axes, nn.initializers.zeros, split=False)
            y = y + _as_row(bias.reshape(-1).astype(jnp.float32), flat)
        return y.astype(x.dtype).reshape(x.shape)


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
    """A table of vectors, by token, by position or by token type; the head may read it again."""

    config: TransformerConfig
    axes: str

    def setup(self) -> None:
        # The gradient of a frequent token is a sum of many, and the head's is added to it: too many for bfloat16.
        self.table = parameter(self, "table", self.axes, nn.initializers.normal(self.config.init_std)).astype(jnp.float32)

    def __call__(self, ids_BL: jax.Array) -> jax.Array:
        # Places are split after the sum over parts of the vocabulary: before it the whole table would have to be there.
        found_BLD = constrain(look_up(self.axes, self.table, ids_BL).astype(self.config.dtype), "BLD")
        return constrain(found_BLD, "BLD", RESIDUAL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(axes: str, table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """Rows of a table of these logical axes. Each device adds up the table's gradient over its own tokens, which is summed
    over devices once."""
    # The table's rows are made whole first, as a matrix is before its product: a look-up in parts of rows would have to change
    # every token's place and part at once, for which the compiler copies all of them to every device.
    return jnp.take(constrain(table_VD, axes), ids_BL, axis=0)


def _look_up_forward(axes: str, table_VD: jax.Array, ids_BL: jax.Array) -> tuple[jax.Array, Any]:
    return look_up(axes, table_VD, ids_BL), (table_VD.shape, ids_BL)


def _look_up_backward(axes: str, saved: Any, grad_BLD: jax.Array) -> tuple[jax.Array, None]:
    shape, ids_BL = saved
    rows, length = (split_over(letter, size) for letter, size in zip("BL", ids_BL.shape, strict=True))
    vocabulary, total = split_over(axes[0], shape[0]), DeviceSum.of(axes, shape, rows, length)

    def local(ids_BL: jax.Array, grad_BLD: jax.Array) -> jax.Array:
        """The sum of one device's tokens, in its own part of the vocabulary."""
        size = shape[0] // vocabulary.ways
        place_BL = ids_BL - size * jax.lax.axis_index(vocabulary.axes) if vocabulary.axes else ids_BL
        place_BL = jnp.where((place_BL >= 0) & (place_BL < size), place_BL, size)
        return total(jnp.zeros((size, shape[1]), grad_BLD.dtype).at[place_BL].add(grad_BLD, mode="drop"))

    if not total.over and not vocabulary.axes:
        return local(ids_BL, grad_BLD), None
    tokens = PartitionSpec(rows.axes or None, length.axes or None)
    return jax.shard_map(local, in_specs=(tokens, tokens), out_specs=total.out_specs, check_vma=False)(ids_BL, grad_BLD), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def activate(kind: str, x: jax.Array) -> jax.Array:
    """The non-linearity, by its config name; a gated one is applied to its gate."""
    if kind in ("gelu", "geglu"):
        return jax.nn.gelu(x, approximate=False)  # Hendrycks and Gimpel 2016
    if kind in ("gelu_tanh", "geglu_tanh"):
        return gelu_tanh(x)
    if kind in ("silu", "swiglu"):
        return jax.nn.silu(x)  # Shazeer 2020, "GLU Variants Improve Transformer"
    if kind == "tanh":
        return jnp.tanh(x)
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
        up_BLF = Linear(c, "BLD,DF->BLF", inner=True, name="up")(x_BLD)
        if c.gated:
            gate_BLF = Linear(c, "BLD,DF->BLF", inner=True, name="gate")(x_BLD)
            inner_BLF = activate(c.activation, gate_BLF) * up_BLF
        else:
            inner_BLF = activate(c.activation, up_BLF)
        return Linear(c, "BLF,FD->BLD", residual=True, inner=True, name="down")(inner_BLF)
