"""Numbers in fewer bits while training: products in int8 or fp8, which `qwix` quantises, and rounding at random."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

Quantize = Literal["none", "int8", "fp8"]

# Types of the operands forward, and of the gradient backward: of the two fp8 types the one with more range, as gradients
# vary more (Micikevicius et al. 2022, "FP8 formats for deep learning", §3).
_TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}

# The largest number becomes 127, where qwix by itself makes 127.5 of it: halfway between two integers, where the last bit of
# the scale decides, and no place from which to round up and down at random.
_LARGEST = {"int8": f"absmax,{127.5 / 127}", "fp8": "absmax"}

# Types that are the upper bits of another one: that, its bits, and those that go.
_UPPER = {
    "bfloat16": (jnp.float32, jnp.uint32, jnp.uint16, 16),
    "float8_e5m2": (jnp.float16, jnp.uint16, jnp.uint8, 8),
}


def stochastic(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """x as int8, bfloat16 or float8_e5m2: one of its two neighbours there, the nearer the likelier, so that the mean over
    keys is x (Gupta et al. 2015, §3.1); a number that `dtype` holds stays itself.

    int8 takes float32 between −128 and 127. bfloat16 is drawn from float32 by random lower bits and a cut, float8_e5m2
    from x in float16, which has 8 bits more. Infinities and what is no number are rounded as usual.
    """
    name = jnp.dtype(dtype).name
    if name == "int8":
        return jnp.clip(jnp.floor(x + jax.random.uniform(key, x.shape)), -128, 127).astype(jnp.int8)
    wide, bits, upper, cut = _UPPER[name]
    x = x.astype(wide)
    noise = jax.random.bits(key, x.shape, upper).astype(bits)
    raised = (jax.lax.bitcast_convert_type(x, bits) + noise) >> jnp.asarray(cut, bits)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(raised.astype(upper), dtype), x.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def quantized_product(x: jax.Array, w: jax.Array, key: jax.Array | None, summed: int, kind: str) -> jax.Array:
    """The product of x (…, summed axes) and w (summed axes, …) in int8 or fp8, as its three matrix products in training.

    Forward, each row of x and each column of w is divided by its largest absolute value over 127 (int8) or 448 (e4m3)
    and rounded to nearest. Backward, the gradient takes the other operand's scales, which lie along its summed axes, then
    gets scales of its own and is rounded at random by `key`, once for each of its two products (int8, or e5m2 times e4m3);
    without a key to nearest. Sums are int32 or float32, scales float32, the result is in x's dtype.
    """
    return _forward(x, w, key, summed, kind)[0]


def _forward(x: jax.Array, w: jax.Array, key: jax.Array | None, summed: int, kind: str) -> tuple[jax.Array, Any]:
    qwix, lead, dtype = _qwix(kind), x.ndim - summed, _TYPES[kind][0]
    rows, columns = tuple(range(lead)), tuple(range(summed, w.ndim))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # qwix multiplies integers with floats
        held_x = qwix.quantize(x.astype(jnp.float32), dtype, channelwise_axes=rows, calibration_method=_LARGEST[kind])
        held_w = qwix.quantize(w.astype(jnp.float32), dtype, channelwise_axes=columns, calibration_method=_LARGEST[kind])
        y = qwix.dot_general(held_x, held_w, ((tuple(range(lead, x.ndim)), tuple(range(summed))), ((), ())))
    # Of the dtypes an empty array each: what is kept for the backward pass holds arrays alone.
    return y.astype(x.dtype), (held_x, held_w, key, jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))


def _backward(summed: int, kind: str, saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    held_x, held_w, key, like_x, like_w = saved
    qwix, lead = _qwix(kind), held_x.qvalue.ndim - summed
    rows, columns = tuple(range(lead)), tuple(range(lead, grad.ndim))
    scale_x, scale_w = held_x.scale.reshape(*grad.shape[:lead], *[1] * len(columns)), held_w.scale.reshape(grad.shape[lead:])

    def rounded(g: jax.Array, each: tuple[int, ...], draw: int) -> Any:
        held = qwix.quantize(g, _TYPES[kind][1], channelwise_axes=each, calibration_method=_LARGEST[kind])
        if key is None:
            return held
        return dataclasses.replace(held, qvalue=stochastic(g / held.scale, _TYPES[kind][1], jax.random.fold_in(key, draw)))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        grad = grad.astype(jnp.float32)
        for_x, for_w = rounded(grad * scale_w, rows, 0), rounded(grad * scale_x, columns, 1)
        dx = qwix.dot_general(for_x, held_w.qvalue, ((columns, tuple(range(summed, held_w.qvalue.ndim))), ((), ())))
        dw = qwix.dot_general(held_x.qvalue, for_w, ((rows, rows), ((), ())))
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype), None


quantized_product.defvjp(_forward, _backward)


def _qwix(kind: str) -> Any:
    try:
        import qwix
    except ImportError:
        raise ValueError(f"model.quantize {kind} needs qwix: pip install 'jaxlm[tune]'") from None
    return qwix
