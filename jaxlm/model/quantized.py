"""Frozen matrices in fewer bits: bfloat16, int8, or NF4 in packs of two a byte; `qwix` does the rounding."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.model.lora import MatrixAxes, adapt

Base = Literal["float32", "bfloat16", "int8", "nf4"]

# Numbers of NF4 that share a scale (Dettmers et al. 2023, "QLoRA", §3).
BLOCK = 64


def hold(w: jax.Array, axes: MatrixAxes, base: Base) -> Any:
    """A kernel as it is held: an array, or a dict of `values` and their `scale`.

    int8: a scale for each output, the largest absolute value over its inputs. nf4: the 16 values of Dettmers et al. 2023,
    appendix E, a scale for each run of up to 64 inputs of each output. Axes stand as in the kernel, but for the last of the
    values of nf4, which is half as long.
    """
    if base in ("float32", "bfloat16"):
        return w.astype(base)
    each = tuple(axis for axis in range(w.ndim) if axis not in axes.summed)
    qwix = _qwix()
    if base == "int8":
        found = qwix.quantize(w, jnp.int8, channelwise_axes=each)
        return {"values": found.qvalue, "scale": found.scale}
    # Of inputs with two axes (heads and their width) a run lies along the second, a scale for each of the first.
    *others, along = axes.summed
    block = max(size for size in range(1, BLOCK + 1) if w.shape[along] % size == 0)
    found = qwix.quantize(w, "nf4", channelwise_axes=(*each, *others), tiled_axes={along: block})
    # Arrays of four-bit integers take a byte each on some platforms: two are packed into one here.
    pairs = found.qvalue.astype(jnp.uint8).reshape(*w.shape[:-1], w.shape[-1] // 2, 2)
    return {"values": pairs[..., 0] | (pairs[..., 1] << 4), "scale": found.scale}


def release(held: Any) -> jax.Array:
    """The float32 kernel of what `hold` made; the dtype of its values tells how."""
    if not isinstance(held, Mapping):
        return held.astype(jnp.float32)
    qwix, values = _qwix(), held["values"]
    packed = values.dtype == jnp.uint8
    if packed:
        pairs = jnp.stack([values & 15, values >> 4], axis=-1)
        values = pairs.reshape(*values.shape[:-1], -1).astype(jnp.uint4)
    return qwix.dequantize(qwix.QArray(values, held["scale"], None, "nf4" if packed else jnp.int8))


ADAPTER = ("lora_a", "lora_b", "lora_magnitude")


def compose(parts: Mapping[str, jax.Array], axes: MatrixAxes) -> jax.Array:
    """The float32 kernel of what stands in its place in a step: a frozen matrix as it is held (`values`, `scale`) and the
    adapter beside it, whose `lora_b` is scaled."""
    w = release(parts if "scale" in parts else parts["values"])
    if "lora_a" not in parts:
        return w
    return adapt(w, parts["lora_a"], parts["lora_b"], axes, 1.0, parts.get("lora_magnitude"))


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ValueError("tune.base int8 and nf4 need qwix: pip install 'jaxlm[tune]'") from None
    return qwix
