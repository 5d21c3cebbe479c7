"""Attention by the fused kernels of the platforms: cuDNN on NVIDIA GPUs, Pallas splash attention on TPUs.

Letters: B batch · L query length · S key length · N query heads · K key/value heads · H head width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.model.chunked import even, fill, sight
from jaxlm.model.distance_bias import block_bias, grouped
from jaxlm.model.mask import Mask
from jaxlm.parallel.rules import COMPUTED, Rules, constrain, spec


def rest_of(mask: Mask, length: int, size: int, biased: bool) -> Mask | None:
    """What of the mask cuDNN has no word for and must be given densely. It knows causal, and a causal window unless
    there is a bias too (a dense mask is one to it)."""
    square, segmented = mask.seen is None and length == size, mask.key_segments_BS is not None
    if not mask.causal:
        return mask if segmented or mask.window is not None else None
    if not square or mask.prefix_B is not None or (mask.window is not None and (segmented or biased)):
        return mask
    return dataclasses.replace(mask, causal=False) if segmented else None


def cudnn(
    q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, scale: float, bias_NY: jax.Array | None,
    rules: Rules = COMPUTED,
) -> jax.Array:  # fmt: skip
    """cuDNN's fused attention. JAX splits it over rows and heads, and wants queries, keys and values split alike."""
    L, N, S = *q_BLNH.shape[1:3], k_BSKH.shape[1]
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):
        q, kv = (spec(axes, x.shape, mesh, rules) for axes, x in (("BLNH", q_BLNH), ("BLKH", k_BSKH)))
        if q[2] != kv[2]:
            k_BSKH, v_BSKH = per_query_head(q_BLNH, k_BSKH, v_BSKH)
        # The rule of K is that of N, and both are split alike here.
        q_BLNH, k_BSKH, v_BSKH = (constrain(x, "BLNH", rules) for x in (q_BLNH, k_BSKH, v_BSKH))
    bias_BNLS = None
    if bias_NY is not None:
        heads = grouped(bias_NY, N)
        assert heads is not None
        bias_BNLS = block_bias(heads, 0 if mask.seen is None else mask.seen, L, S)[:, :, 0].astype(q_BLNH.dtype)
    rest = rest_of(mask, L, S, bias_BNLS is not None)
    causal = mask.causal and rest is not mask
    shown_BLS = None if rest is None else rest.dense(L, S)
    return jax.nn.dot_product_attention(
        q_BLNH,
        k_BSKH,
        v_BSKH,
        bias=bias_BNLS,
        mask=None if shown_BLS is None else shown_BLS[:, None],
        scale=scale,
        is_causal=causal,
        # Theirs counts the keys before the query, without itself.
        local_window_size=(mask.window - 1, 0) if causal and mask.window is not None else None,
        implementation="cudnn",
    )


def per_query_head(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values repeated for each query head, where devices split query heads that share them."""
    repeats = q_BLNH.shape[2] // k_BSKH.shape[2]
    return jnp.repeat(k_BSKH, repeats, axis=2), jnp.repeat(v_BSKH, repeats, axis=2)


LANES = 128


def splash(
    q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask,
    scale: float, softcap: float | None, rules: Rules = COMPUTED, block: int = 512, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """JAX's Pallas kernel for TPUs, which also skips the blocks that the mask hides. `interpret` runs it on a CPU.

    Lengths are filled up to whole blocks. The compiler cannot split such a kernel, so on a mesh each device runs it on
    its own rows and heads.
    """
    L, S = q_BLNH.shape[1], k_BSKH.shape[1]
    rows, keys = (max(LANES, even(-(-n // LANES) * LANES, block, LANES)) for n in (L, S))
    query, key = mask.query_segments_BL, mask.key_segments_BS
    # What fills up the keys must be hidden; a causal mask does so by itself.
    if key is not None or (S % keys and not mask.causal):
        key = jnp.ones((1, S), jnp.int32) if key is None else key
        query = jnp.ones((1, L), jnp.int32) if query is None else query
        # No true segment is −1, so what is filled in sees itself alone.
        query, key = fill(query + 1, {1: rows}) - 1, fill(key + 1, {1: keys}) - 1
        query, key = (jnp.broadcast_to(x, (q_BLNH.shape[0], x.shape[1])) for x in (query, key))
    else:
        query = key = None
    q_BLNH = fill(q_BLNH * jnp.asarray(scale, q_BLNH.dtype), {1: rows})
    k_BSKH, v_BSKH = fill(k_BSKH, {1: keys}), fill(v_BSKH, {1: keys})

    run = functools.partial(
        _splash, dataclasses.replace(mask, query_segments_BL=None, key_segments_BS=None), softcap, rows, keys, interpret
    )
    mesh = jax.sharding.get_abstract_mesh()
    if not (mesh.empty or mesh.size == 1):
        q, kv = (spec(axes, x.shape, mesh, rules) for axes, x in (("BLNH", q_BLNH), ("BSKH", k_BSKH)))
        if q[2] != kv[2] and k_BSKH.shape[2] > 1:
            # Query heads are split but key/value heads cannot be: each query head brings its own.
            k_BSKH, v_BSKH = per_query_head(q_BLNH, k_BSKH, v_BSKH)
            kv = q
        rows_only = None if query is None else PartitionSpec(q[0], None)
        # Pallas does not say over which devices its results vary, so that cannot be checked.
        run = jax.shard_map(run, in_specs=(q, kv, kv, rows_only, rows_only), out_specs=q, check_vma=False)
    return run(q_BLNH, k_BSKH, v_BSKH, query, key)[:, :L]


def _splash(
    mask: Mask, softcap: float | None, rows: int, keys: int, interpret: bool,
    q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, query_BL: jax.Array | None, key_BS: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """One device's part of `splash`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # Pallas takes half a second to import

    shape = (q_BLNH.shape[1], k_BSKH.shape[1])
    one: Any = pallas.FullMask(shape)
    if mask.window is not None:
        one = pallas.LocalMask(shape, sight(mask), 0)
    elif mask.causal:
        one = pallas.CausalMask(shape)
    sizes = pallas.BlockSizes(
        block_q=rows, block_kv=keys, block_kv_compute=keys, block_q_dkv=rows, block_kv_dkv=keys,
        block_kv_dkv_compute=keys, block_q_dq=rows, block_kv_dq=keys,
    )  # fmt: skip
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([one] * q_BLNH.shape[2]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=softcap, interpret=interpret,
    )  # fmt: skip
    segments = None if query_BL is None or key_BS is None else pallas.SegmentIds(query_BL, key_BS)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BLNH, k_BSKH, v_BSKH))
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, segments), 1, 2)
