"""Adam with both moments in 8 bits, block by block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any

BLOCK = 256
"""Most neighbouring numbers, along the last axis, that share a scale."""
LEAST = 4096
"""Smaller leaves keep their moments in float32."""


def _code(signed: bool) -> np.ndarray:
    """The 256 numbers of the dynamic tree code (Dettmers 2016; Dettmers et al. 2022, §1.3): seven powers of ten, each larger
    one in twice as many steps, 0 and 1; half of them negative, or for numbers that never are twice as many."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = np.linspace(0.1, 1, (1 << (power if signed else power + 1)) + 1)
        steps = 10.0 ** (power - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*steps, *(-steps if signed else ())]
    return np.sort(np.array(values, np.float32))


SIGNED, UNSIGNED = _code(True), _code(False)


class Adam8bitState(NamedTuple):
    """Moments as codes with their scales: bytes like the parameter, and for each block its largest magnitude. A leaf that is
    too small for it has the moment itself in place of the codes, and one 0 for scales: no checkpoint holds an empty array."""

    step: jax.Array
    mu: Tree
    mu_scale: Tree
    nu: Tree
    nu_scale: Tree


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with both moments in 8 bits, block by block (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

    Blocks lie along the last axis, so that codes and scales are split over devices as their parameter is. Each step decodes
    the moments, updates them in float32 and rounds them to the nearest code again. Two rules keep rounding from making a
    step that Adam could not make: a second moment above 0 is never coded as 0, where only `eps` would be left below the
    first one, and a step is clipped to `largest_step`.
    """

    def init(params: Tree) -> Adam8bitState:
        def codes(code: np.ndarray) -> Callable[[Any], Any]:
            zero = int(np.searchsorted(code, 0.0))
            return lambda p: jnp.full(p.shape, zero, jnp.uint8) if _coded(p) else jnp.zeros(p.shape, jnp.float32)

        def scales(p: Any) -> Any:
            return jnp.zeros((*p.shape[:-1], p.shape[-1] // block(p.shape[-1])) if _coded(p) else (1,), jnp.float32)

        return Adam8bitState(
            jnp.zeros((), jnp.int32), jax.tree.map(codes(SIGNED), params), jax.tree.map(scales, params),
            jax.tree.map(codes(UNSIGNED), params), jax.tree.map(scales, params),
        )  # fmt: skip

    def update(updates: Tree, state: Adam8bitState, params: Tree | None = None) -> tuple[Tree, Adam8bitState]:
        taken = state.step + 1
        steps = taken.astype(jnp.float32)
        most = largest_step(b1, b2, steps)

        def one(g: jax.Array, mu: Any, mu_scale: Any, nu: Any, nu_scale: Any) -> tuple[Any, ...]:
            g32 = g.astype(jnp.float32)
            coded = mu.dtype == jnp.uint8
            m = b1 * (decode(mu, mu_scale, SIGNED) if coded else mu) + (1 - b1) * g32
            v = b2 * (decode(nu, nu_scale, UNSIGNED) if coded else nu) + (1 - b2) * jnp.square(g32)
            step = (m / (1 - b1**steps)) / (jnp.sqrt(v / (1 - b2**steps)) + eps)
            step = jnp.clip(step, -most, most) if coded else step
            kept = (*encode(m, SIGNED), *encode(v, UNSIGNED, keep_positive=True)) if coded else (m, mu_scale, v, nu_scale)
            return (step.astype(g.dtype), *kept)

        moved = jax.tree.map(one, updates, state.mu, state.mu_scale, state.nu, state.nu_scale)
        parts = jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0,) * 5), moved)
        return parts[0], Adam8bitState(taken, *parts[1:])

    return optax.GradientTransformation(init, update)


def _coded(p: Any) -> bool:
    return p.ndim >= 2 and p.size >= LEAST and block(p.shape[-1]) >= 16


def block(width: int) -> int:
    """The largest divisor of an axis up to BLOCK."""
    return next(n for n in range(min(width, BLOCK), 0, -1) if width % n == 0)


def largest_step(b1: float, b2: float, steps: jax.Array) -> jax.Array:
    """The largest |m̂| / √v̂ that any gradients can give Adam in this many steps: by Cauchy-Schwarz √Σ wᵢ² / uᵢ, with wᵢ and uᵢ
    the weights of gradient i in the two moments. 1 at the first step, 1.16 later on for b1 = 0.9 and b2 = 0.95."""
    if b2 == 0:
        return jnp.asarray(1.0 if b1 == 0 else jnp.inf, jnp.float32)
    ratio = b1 * b1 / b2
    total = steps if ratio == 1 else (1 - ratio**steps) / (1 - ratio)
    weights = (1 - b1) ** 2 * (1 - b2**steps) / ((1 - b2) * (1 - b1**steps) ** 2)
    return jnp.sqrt(weights * total)


def encode(x: jax.Array, code: np.ndarray, keep_positive: bool = False) -> tuple[jax.Array, jax.Array]:
    """Numbers as bytes and the scale of each block: the nearest entries of the code to x / scale. With `keep_positive` a
    number above 0 gets the least entry above 0 where 0 would be nearer."""
    blocks = x.reshape(*x.shape[:-1], -1, block(x.shape[-1]))
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    ratio = blocks / jnp.where(scale > 0, scale, 1)[..., None]
    middles = jnp.asarray((code[1:] + code[:-1]) / 2)
    codes = jnp.searchsorted(middles, ratio)
    if keep_positive:
        codes = jnp.where(blocks > 0, jnp.maximum(codes, int(np.searchsorted(code, 0.0)) + 1), codes)
    return codes.astype(jnp.uint8).reshape(x.shape), scale


def decode(codes: jax.Array, scale: jax.Array, code: np.ndarray) -> jax.Array:
    """The numbers that bytes stand for, float32."""
    values = jnp.asarray(code)[codes].reshape(*scale.shape, -1)
    return (values * scale[..., None]).reshape(codes.shape)
