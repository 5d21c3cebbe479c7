"""Attention over a length that is split over devices: keys and values go round a ring of them.

Letters: B batch · L query length · S key length · N query heads · K key/value heads · G query heads per
key/value head (N / K) · H head width. Inside one device L and S are its own.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.model.chunked import Plan, even, fill, stream_backward, stream_forward
from jaxlm.model.distance_bias import grouped
from jaxlm.model.fused import per_query_head
from jaxlm.model.mask import Mask
from jaxlm.parallel.rules import COMPUTED, spec

AXIS = "context"

BLOCK = 512
"""Maximum number of queries, and of keys, in one block of scores."""


class _Ring(NamedTuple):
    """What is known of the ring when compiling."""

    ways: int
    """Devices that share the length."""
    halves: int
    """Parts of a device's queries and keys: 2 in the balanced order of a causal mask, else 1."""
    length: int
    """Queries of a part, without padding."""
    plan: Plan
    """Blocks of a part; its last block of queries and of keys is padded."""
    mask: Mask
    """Without its arrays."""


class _Facts(NamedTuple):
    """Arrays of the mask."""

    query_BL: jax.Array | None
    key_BS: jax.Array | None
    prefix_B: jax.Array | None


def ring(
    q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, scale: float, softcap: float | None,
    bias_NY: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Ring attention (Liu et al. 2023): each device computes its own queries against the keys and values that come by, and
    joins the parts by the logarithms of their sums; its memory is linear in its own part of the length. The gradient sends
    keys and values round once more, with their gradients.

    Under a causal mask late queries see more keys than early ones. So device i of n takes the i-th and the i-th but last
    of 2n parts of the length ("zigzag"; Zhu 2024, ring-flash-attention), for which both halves move once before and
    once after: every device then computes the same number of blocks at each step.
    """
    mesh = jax.sharding.get_abstract_mesh()
    ways, (L, S) = mesh.shape[AXIS], (q_BLNH.shape[1], k_BSKH.shape[1])
    balanced = mask.causal and mask.prefix_B is None and L == S and L % (2 * ways) == 0
    q_spec, kv_spec = (spec(axes, x.shape, mesh, COMPUTED) for axes, x in (("BLNH", q_BLNH), ("BLKH", k_BSKH)))
    if q_spec[2] != kv_spec[2] and k_BSKH.shape[2] > 1:
        # Query heads are split but key/value heads cannot be: each query head brings its own.
        k_BSKH, v_BSKH = per_query_head(q_BLNH, k_BSKH, v_BSKH)
        kv_spec = q_spec
    segmented = mask.key_segments_BS is not None
    query = jnp.ones((1, L), jnp.int32) if segmented and mask.query_segments_BL is None else mask.query_segments_BL
    facts = _Facts(query if segmented else None, mask.key_segments_BS, mask.prefix_B)
    facts = _Facts(*(None if x is None else jnp.broadcast_to(x, (q_BLNH.shape[0], *x.shape[1:])) for x in facts))
    rows = PartitionSpec(q_spec[0])
    along = PartitionSpec(q_spec[0], AXIS)
    fact_specs: Any = _Facts(*(None if x is None else way for x, way in zip(facts, (along, along, rows), strict=True)))  # type: ignore[arg-type]
    plain = dataclasses.replace(mask, query_segments_BL=None, key_segments_BS=None, prefix_B=None)
    halves = 2 if balanced else 1
    length, size = L // (ways * halves), S // (ways * halves)
    plan = Plan(even(length, BLOCK), even(size, BLOCK), size, softcap)
    run = functools.partial(_device, _Ring(ways, halves, length, plan, plain))
    # What a custom gradient varies over cannot be checked.
    heads = None if bias_NY is None else PartitionSpec(q_spec[2], None)  # all distances of a device's own heads
    split = jax.shard_map(run, in_specs=(q_spec, kv_spec, kv_spec, fact_specs, heads), out_specs=q_spec, check_vma=False)
    return split(q_BLNH * jnp.asarray(scale, q_BLNH.dtype), k_BSKH, v_BSKH, facts, bias_NY)


def why_not_ring(q_BLNH: jax.Array, k_BSKH: jax.Array) -> str | None:
    """Why the length cannot go round the ring; None if it can."""
    ways = jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)
    if ways == 1:
        return "the mesh does not split the length (parallel.context is 1)"
    L, S = q_BLNH.shape[1], k_BSKH.shape[1]
    return f"{ways} devices (parallel.context) do not divide {L} and {S} tokens" if L % ways or S % ways else None


def _device(
    ring: _Ring, q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, facts: _Facts, bias_NY: jax.Array | None
) -> jax.Array:
    """One device's part."""
    B, L, N, H = q_BLNH.shape
    K = k_BSKH.shape[2]
    if ring.halves == 2:
        q_BLNH, k_BSKH, v_BSKH = (_to_zigzag(ring.ways, x) for x in (q_BLNH, k_BSKH, v_BSKH))
        facts = _Facts(*(None if x is None else _to_zigzag(ring.ways, x) for x in facts))
    plan = ring.plan
    q_BLNH, k_BSKH, v_BSKH = (_padded(ring, x, n) for x, n in ((q_BLNH, plan.rows), (k_BSKH, plan.keys), (v_BSKH, plan.keys)))
    query, key = (
        None if x is None else _padded(ring, x, n) for x, n in ((facts.query_BL, plan.rows), (facts.key_BS, plan.keys))
    )  # fmt: skip
    facts = facts._replace(query_BL=query, key_BS=key)
    q_BKGLH = jnp.moveaxis(q_BLNH.reshape(B, -1, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    mixed_BKGLH = _turn(ring, q_BKGLH, k_BKSH, v_BKSH, facts, grouped(bias_NY, K, max(plan.rows, plan.keys)))
    mixed_BLNH = jnp.moveaxis(mixed_BKGLH, 3, 1).reshape(B, -1, N, H)
    if mixed_BLNH.shape[1] > L:
        mixed_BLNH = jnp.concatenate([_part(ring, mixed_BLNH, 1, i)[:, : ring.length] for i in range(ring.halves)], axis=1)
    return _from_zigzag(ring.ways, mixed_BLNH) if ring.halves == 2 else mixed_BLNH


# --- the balanced order ------------------------------------------------------------------------


def _zigzag(ways: int) -> tuple[list[int], list[int]]:
    """Which device takes part 2i, and which part 2i + 1, of device i: part c goes to device min(c, 2·ways − 1 − c)."""
    homes = [min(c, 2 * ways - 1 - c) for c in range(2 * ways)]
    return homes[::2], homes[1::2]


def _to_zigzag(ways: int, x_BL: jax.Array) -> jax.Array:
    """Neighbouring halves (2i, 2i + 1) → an early and a late one (i, 2·ways − 1 − i), along axis 1."""
    even, odd = _zigzag(ways)
    halves = jnp.split(x_BL, 2, axis=1)
    from_even, from_odd = (
        jax.lax.ppermute(half, AXIS, list(enumerate(homes))) for half, homes in zip(halves, (even, odd), strict=True)
    )
    # The early part of an even device is an even one, and its late part is odd.
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.concatenate([jnp.where(is_even, from_even, from_odd), jnp.where(is_even, from_odd, from_even)], axis=1)


def _from_zigzag(ways: int, x_BL: jax.Array) -> jax.Array:
    """The way back."""
    even, odd = _zigzag(ways)
    early, late = jnp.split(x_BL, 2, axis=1)
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    to_even, to_odd = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
    back = [
        jax.lax.ppermute(half, AXIS, [(home, i) for i, home in enumerate(homes)])
        for half, homes in ((to_even, even), (to_odd, odd))
    ]
    return jnp.concatenate(back, axis=1)


# --- once round --------------------------------------------------------------------------------


def _number(ring: _Ring, device: Any, half: int) -> Any:
    """The place, counted in halves, at which a part of a device's tokens begins."""
    if ring.halves == 1:
        return device
    return device if half == 0 else 2 * ring.ways - 1 - device


def _padded(ring: _Ring, x_BL: jax.Array, block: int) -> jax.Array:
    """Pad each part of a device's tokens, along axis 1, with zeros to whole blocks."""
    parts = (fill(_part(ring, x_BL, 1, i), {1: block}) for i in range(ring.halves))
    return x_BL if x_BL.shape[1] // ring.halves % block == 0 else jnp.concatenate(list(parts), axis=1)


def _part(ring: _Ring, x: jax.Array, axis: int, half: int) -> jax.Array:
    return x if ring.halves == 1 else jnp.split(x, 2, axis=axis)[half]


def _met(ring: _Ring, facts: _Facts, me: Any, other: Any, i: int, j: int) -> Mask:
    """The mask of my i-th queries and another device's j-th keys."""
    query = None if facts.query_BL is None else _part(ring, facts.query_BL, 1, i)
    key = None if facts.key_BS is None else _part(ring, facts.key_BS, 1, j)
    begin = _number(ring, other, j) * ring.plan.size
    prefix = None if facts.prefix_B is None else facts.prefix_B - begin
    ahead = _number(ring, me, i) * ring.length - begin
    return dataclasses.replace(ring.mask, query_segments_BL=query, key_segments_BS=key, prefix_B=prefix, seen=ahead)


def _pass(ways: int, x: Any) -> Any:
    """To the next device of the ring."""
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, AXIS, [(i, (i + 1) % ways) for i in range(ways)]), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turn(ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, facts: _Facts, bias: jax.Array | None) -> jax.Array:
    return _turn_forward(ring, q, k, v, facts, bias)[0]


def _turn_forward(
    ring: _Ring, q: jax.Array, k: jax.Array, v: jax.Array, facts: _Facts, bias: jax.Array | None
) -> tuple[jax.Array, Any]:
    plan, me = ring.plan, jax.lax.axis_index(AXIS)

    def step(carry: Any, n: jax.Array) -> tuple[Any, None]:
        (k_, v_, key), parts = carry
        other, met = (me - n) % ring.ways, facts._replace(key_BS=key)
        joined = []
        for i, (mixed, logs) in enumerate(parts):
            for j in range(ring.halves):
                mask = _met(ring, met, me, other, i, j)
                some, log = stream_forward(plan, _part(ring, q, 3, i), _part(ring, k_, 2, j), _part(ring, v_, 2, j), bias, mask)
                higher = jnp.maximum(logs, log)
                old, new = jnp.exp(logs - higher), jnp.exp(log - higher)
                # Each part is a mean over its own keys: weighed by their sums it is the mean over all.
                mixed = (mixed * old[..., None] + some.astype(jnp.float32) * new[..., None]) / (old + new)[..., None]
                logs = higher + jnp.log(old + new)
            joined.append((mixed, logs))
        return (_pass(ring.ways, (k_, v_, key)), joined), None

    low = float(jnp.finfo(jnp.float32).min)
    zeros = [jnp.zeros_like(_part(ring, q, 3, i), dtype=jnp.float32) for i in range(ring.halves)]
    start = (k, v, facts.key_BS), [(x, x[..., 0] + low) for x in zeros]
    (_, parts), _ = jax.lax.scan(step, start, jnp.arange(ring.ways, dtype=jnp.int32))
    mixed = jnp.concatenate([mixed for mixed, _ in parts], axis=3).astype(q.dtype)
    logs = jnp.concatenate([logs for _, logs in parts], axis=3)
    return mixed, (q, k, v, facts, bias, mixed, logs)


def _turn_backward(ring: _Ring, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, facts, bias, mixed, logs = saved
    plan, me = ring.plan, jax.lax.axis_index(AXIS)

    def step(carry: Any, n: jax.Array) -> tuple[Any, None]:
        (k_, v_, key, dk, dv), dq, dbias = carry
        other, met = (me - n) % ring.ways, facts._replace(key_BS=key)
        dqs, dks, dvs = ([0.0] * ring.halves for _ in range(3))
        for i in range(ring.halves):
            mine = [_part(ring, x, 3, i) for x in (q, mixed, logs, grad)]
            for j in range(ring.halves):
                theirs = [_part(ring, x, 2, j) for x in (k_, v_)]
                mask = _met(ring, met, me, other, i, j)
                a, b, c, d = stream_backward(plan, (mine[0], *theirs, bias, mask, mine[1], mine[2]), mine[3])
                dqs[i], dks[j], dvs[j] = dqs[i] + a, dks[j] + b, dvs[j] + c
                dbias = None if bias is None else dbias + d
        dq = dq + jnp.concatenate(dqs, axis=3)
        dk, dv = dk + jnp.concatenate(dks, axis=2), dv + jnp.concatenate(dvs, axis=2)
        return (_pass(ring.ways, (k_, v_, key, dk, dv)), dq, dbias), None

    zeros = [jnp.zeros_like(x, dtype=jnp.float32) for x in (k, v, q)]
    start = (k, v, facts.key_BS, *zeros[:2]), zeros[2], None if bias is None else jnp.zeros_like(bias)
    ((_, _, _, dk, dv), dq, dbias), _ = jax.lax.scan(step, start, jnp.arange(ring.ways, dtype=jnp.int32))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, dbias


_turn.defvjp(_turn_forward, _turn_backward)
