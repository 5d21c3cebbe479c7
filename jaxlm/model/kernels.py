"""The attention core, and which kernel computes it on this platform.

Letters: B batch · L query length · S key length · N query heads · K key/value heads · G query heads per
key/value head (N / K) · H head width.

Every kernel computes softmax(scale · q·kᵀ, soft-capped, + bias, masked) · v. `attend` chooses one. A query that may see
no key at all gets a value that means nothing, and that differs between kernels: give such rows no weight in the loss.
"""

import functools
import logging
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxlm.model.cache import At, KeyValue, read
from jaxlm.model.chunked import chunked, chunked_cache
from jaxlm.model.dense import xla
from jaxlm.model.fused import LANES, cudnn, per_query_head, rest_of, splash
from jaxlm.model.mask import Mask
from jaxlm.model.ring import ring, why_not_ring
from jaxlm.parallel.rules import COMPUTED, Rules, constrain, length_ways, platform, spec

Kernel = Literal["auto", "xla", "chunked", "cudnn", "splash"]
Sharing = Literal["auto", "ring", "ulysses", "gather"]

# Where devices share a length: each with the whole length of some heads, or of all keys.
HEADS: Rules = {**COMPUTED, "L": (), "N": ("tensor", "context"), "K": ("tensor", "context")}
WHOLE: Rules = {**COMPUTED, "L": ()}

CACHE_BLOCK = 128
"""Places of a cache that are read at once: only the blocks up to the longest text are, and small ones follow it closely."""

_log = logging.getLogger(__name__)


def attend(
    q_BLNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias_NY: jax.Array | None = None,
    drop: tuple[float, jax.Array] | None = None,
    kernel: Kernel = "auto",
    context: Sharing = "auto",
) -> jax.Array:
    """softmax(q·kᵀ · scale + bias)·v over the keys that `mask` shows, the softmax in float32 (Vaswani et al. 2017,
    eq. 1) → (B, L, N, H). `scale` is 1/√H by default; `bias_NY` is added by the
    distance of key and query (`distance_bias`), for up to as many places as there are keys; `drop` is the share of the
    weights that is dropped, and the key to draw them with.

    Query heads share key/value heads in groups of N / K (Ainslie et al. 2023, "GQA"). A kernel that is asked for by
    name but cannot compute this gives way to one that can, and the log says why. Where the mesh splits the length,
    `context` says how its devices share it.
    """
    scale = 1 / math.sqrt(q_BLNH.shape[-1]) if scale is None else scale
    how = sharing(context, q_BLNH, k_BSKH, mask, drop) if length_ways() > 1 else None
    if how == "ring":
        return ring(q_BLNH, k_BSKH, v_BSKH, mask, scale, softcap, bias_NY)
    rules = COMPUTED if how is None else HEADS if how == "ulysses" else WHOLE
    if how == "ulysses":
        # All-to-all (Jacobs et al. 2023, "DeepSpeed Ulysses"): each device changes its part of the length for some heads.
        if k_BSKH.shape[2] % _ways(rules["K"]):
            k_BSKH, v_BSKH = per_query_head(q_BLNH, k_BSKH, v_BSKH)
        q_BLNH, k_BSKH, v_BSKH = (constrain(x, axes, rules) for x, axes in ((q_BLNH, "BLNH"), (k_BSKH, "BLKH"), (v_BSKH, "BLKH")))
    elif how == "gather":
        k_BSKH, v_BSKH = (constrain(x, "BLKH", rules) for x in (k_BSKH, v_BSKH))
    mixed_BLNH = _attend(kernel, q_BLNH, k_BSKH, v_BSKH, mask, scale, softcap, bias_NY, drop, rules)
    return mixed_BLNH if how is None else constrain(mixed_BLNH, "BLNH")


def attend_cache(
    q_BLNH: jax.Array,
    held: KeyValue,
    at: At,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias_NY: jax.Array | None = None,
    kernel: Kernel = "auto",
    context: Sharing = "auto",
) -> jax.Array:
    """`attend` of new tokens, `at` whose places theirs are written already, to what a layer's cache holds."""
    size = jax.tree.leaves(held)[0].shape[2]
    if kernel == "chunked" and length_ways() == 1 and not at.ring and at.holder_BGS is None and size % CACHE_BLOCK == 0:
        scale = 1 / math.sqrt(q_BLNH.shape[-1]) if scale is None else scale
        return chunked_cache(q_BLNH, held, at, mask, scale, softcap, bias_NY, CACHE_BLOCK)
    k_BSKH, v_BSKH = (read(x, at, q_BLNH.shape[1], q_BLNH.dtype) for x in held)
    return attend(q_BLNH, k_BSKH, v_BSKH, mask, scale=scale, softcap=softcap, bias_NY=bias_NY, kernel=kernel, context=context)


def _attend(
    kernel: Kernel, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, scale: float,
    softcap: float | None, bias_NY: jax.Array | None, drop: tuple[float, jax.Array] | None, rules: Rules,
) -> jax.Array:  # fmt: skip
    chosen = choose(kernel, q_BLNH, k_BSKH, mask, softcap, bias_NY, drop)
    if chosen == "splash":
        return splash(q_BLNH, k_BSKH, v_BSKH, mask, scale, softcap, rules)
    if chosen == "cudnn":
        return cudnn(q_BLNH, k_BSKH, v_BSKH, mask, scale, bias_NY, rules)
    if chosen == "chunked":
        return chunked(q_BLNH, k_BSKH, v_BSKH, mask, scale, softcap, bias_NY, 512 if mask.seen is None else CACHE_BLOCK)
    return xla(q_BLNH, k_BSKH, v_BSKH, mask, scale, softcap, bias_NY, drop)


# --- how a length is shared --------------------------------------------------------------------


def sharing(context: Sharing, q_BLNH: jax.Array, k_BSKH: jax.Array, mask: Mask, drop: tuple[float, jax.Array] | None) -> Sharing:
    """How the devices that share this length attend: as asked, or by the first way that can. The log says why not."""
    heads = _ways(HEADS["N"])
    reasons: dict[Sharing, str | None] = {
        "ring": why_not_ring(q_BLNH, k_BSKH)
        or next((f"it has no {name}" for name, given in (("dropout", drop), ("cache", mask.seen)) if given is not None), None),
        "ulysses": f"{heads} devices (tensor × context) do not divide {q_BLNH.shape[2]} heads" if q_BLNH.shape[2] % heads else None,
        "gather": None,
    }
    if context != "auto":
        if (why := reasons[context]) is None:
            return context
        _say(f"by {context}", why)
    return next(way for way, why in reasons.items() if why is None)


def _ways(axes: tuple[str, ...]) -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes)


# --- which kernel ------------------------------------------------------------------------------

LARGE = 2**30
"""Bytes on one device above which float32 scores, or a bias of them, are not held as a whole matrix."""


def choose(
    kernel: Kernel, q_BLNH: jax.Array, k_BSKH: jax.Array, mask: Mask,
    softcap: float | None, bias_NY: jax.Array | None, drop: tuple[float, jax.Array] | None,
) -> Kernel:  # fmt: skip
    """The kernel that will compute this: the one named, or the first in the order of this platform that can."""
    asked = functools.partial(why_not, q_BLNH=q_BLNH, k_BSKH=k_BSKH, mask=mask, softcap=softcap, bias_NY=bias_NY, drop=drop)
    if kernel != "auto":
        if (why := asked(kernel)) is None:
            return kernel
        _say(f"kernel {kernel}", why)
    special: Kernel | None = {"tpu": "splash", "gpu": "cudnn"}.get(platform())  # type: ignore[assignment]
    if special and special != kernel and asked(special) is None:
        return special
    large = _score_bytes(q_BLNH, k_BSKH) > LARGE
    return "chunked" if large and asked("chunked") is None else "xla"


@functools.cache
def _say(name: str, why: str) -> None:
    _log.warning("attention %s cannot be used here: %s", name, why)


def why_not(
    kernel: Kernel, *, q_BLNH: jax.Array, k_BSKH: jax.Array, mask: Mask,
    softcap: float | None = None, bias_NY: jax.Array | None = None, drop: tuple[float, jax.Array] | None = None,
) -> str | None:  # fmt: skip
    """Why this kernel cannot compute this here; None if it can."""
    (L, _, H), S, dtype = q_BLNH.shape[1:], k_BSKH.shape[1], q_BLNH.dtype
    reasons: dict[Kernel, dict[str, bool]] = {
        "chunked": {"it has no dropout": drop is not None},
        "cudnn": {
            "it needs an NVIDIA GPU of Ampere or later": not _nvidia(),
            "it has no dropout": drop is not None,
            "it has no soft cap": softcap is not None,
            f"it computes in bfloat16 or float16, given {dtype}": dtype not in (jnp.bfloat16, jnp.float16),
            f"head width {H} is above 128 or no multiple of 8": H > 128 or H % 8 > 0,
            # What it cannot say is given as a bias, and the gradient of one needs even lengths.
            f"segments, prefixes, windows and biases need even lengths, given {L} and {S}": bool(L % 2 or S % 2)
            and (bias_NY is not None or rest_of(mask, L, S, False) is not None),
            f"it takes a bias as a whole matrix, which would hold more than {LARGE / 2**30:g} GiB": bias_NY is not None
            and _dense_bias_bytes(q_BLNH, k_BSKH, mask) > LARGE,
        },
        "splash": {
            "it needs a TPU": platform() != "tpu",
            "it has no dropout": drop is not None,
            "it has no bias": bias_NY is not None,
            "it has no cache": mask.seen is not None,
            "it has no prefix": mask.prefix_B is not None,
            f"{min(L, S)} tokens are fewer than its block of {LANES}": min(L, S) < LANES,
            f"queries and keys differ in number, {L} and {S}, under a causal mask": L != S and mask.causal,
        },
    }
    return next((why for why, holds in reasons.get(kernel, {}).items() if holds), None)


def _nvidia() -> bool:
    """Of Ampere or later, as cuDNN's fused attention asks for."""
    if platform() != "gpu" or jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8


def _score_bytes(q_BLNH: jax.Array, k_BSKH: jax.Array) -> int:
    """Bytes of one device's scores in float32."""
    return 4 * math.prod(_on_device(q_BLNH)[:3]) * k_BSKH.shape[1]


def _dense_bias_bytes(q_BLNH: jax.Array, k_BSKH: jax.Array, mask: Mask) -> int:
    """Bytes of the matrix by which cuDNN is given a bias, on one device: one for all rows, or, with a mask that differs by row
    and that is added to it, one for each."""
    B, L, N, _ = _on_device(q_BLNH)
    by_row = mask.key_segments_BS is not None or mask.prefix_B is not None or (mask.seen is not None and jnp.ndim(mask.seen) > 0)
    return q_BLNH.dtype.itemsize * (B if by_row else 1) * N * L * k_BSKH.shape[1]


def _on_device(q_BLNH: jax.Array) -> tuple[int, ...]:
    """The shape of the queries on one device, whose rows and heads are split as the rules say."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return q_BLNH.shape
    return NamedSharding(mesh, spec("BLNH", q_BLNH.shape, mesh, COMPUTED)).shard_shape(q_BLNH.shape)
