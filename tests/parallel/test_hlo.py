"""Bytes that a compiled program sends, counted in its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxlm.parallel.hlo import Collective, collectives, sent_bytes

pytestmark = pytest.mark.parallel

# In the forms that XLA prints for a TPU: no trip counts, layouts with tiles, asynchronous collectives, sums that are scattered.
TPU = """HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[64,512]) -> f32[64,64] {
  %all-reduce.7 = f32[64,512]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[64,64]{1,0} dynamic-slice(%all-reduce.7)
}

%inner_cond (t: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%inner_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %permute-start.1 = (f32[8]{0:T(128)}, f32[8]{0:T(128)}, u32[]) collective-permute-start(%x)
  ROOT %tuple.1 = (s32[], f32[8]) tuple(%i, %x)
}

%outer_body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.1 = (s32[], f32[8]{0:T(128)}) while(%t), condition=%inner_cond, body=%inner_body
  %gather-start.1 = (bf16[16,2]{1,0:T(8,128)S(1)}, bf16[16,16]{1,0}) all-gather-start(%w), replica_groups=[1,8]<=[8]
  ROOT %tuple.2 = (s32[], f32[8]) tuple(%i, %x)
}

%outer_cond (t: (s32[], f32[8])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[64,512]) -> f32[64,64] {
  %while.2 = (s32[], f32[8]) while(%t), condition=%outer_cond, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %all-reduce.1 = (f32[10]{0}, f32[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %fusion.9 = f32[64,64]{1,0:T(8,128)S(1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_each_form_by_hand():
    assert collectives(TPU, 8) == [
        Collective("collective-permute", ((8,),), 32, 8, 15),
        Collective("all-gather", ((16, 16),), 512, 8, 5),
        Collective("all-reduce", ((10,), ()), 44, 2, 1),
        Collective("reduce-scatter", ((64, 64),), 4 * 64 * 64, 8, 1),
    ]
    assert sent_bytes(collectives(TPU, 8)) == 15 * 32 + 5 * 512 * 7 / 8 + 44 + 4 * 64 * 64 * 7


# One all-gather that is started before a loop of three rounds, advanced within it beside a product, and ended behind it.
CHAINED = """HloModule jit_step, num_partitions=8

%start (p: bf16[64,16]) -> (bf16[64,16], bf16[64,64]) {
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}
}

%async_collective_fusion.1 (p: bf16[64,16], q: bf16[64,64]) -> bf16[64,64] {
  %all-gather.2 = bf16[64,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}
}

%end (p: bf16[64,16], q: bf16[64,64]) -> bf16[64,64] {
  %all-gather.3 = bf16[64,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={1}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.2 = bf16[64,64] fusion(%p, %q), kind=kOutput, calls=%async_collective_fusion.1
  %permute.1 = f32[8]{0} collective-permute(%x), channel_id=8
}

%condition (t: (s32[], f32[8])) -> pred[] {
  ROOT %lt.2 = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: bf16[64,16]) -> bf16[64,64] {
  %fusion.1 = (bf16[64,16], bf16[64,64]) fusion(%p), kind=kCustom, calls=%start
  %while.1 = (s32[], f32[8]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %reduce.1 = f32[4]{0} all-reduce(%a), channel_id=9, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}, to_apply=%add
  ROOT %fusion.3 = bf16[64,64] fusion(%p, %q), kind=kCustom, calls=%end
}
"""


def test_a_collective_in_several_fusions_counts_once():
    """With groups that are named by axes of a mesh, or by a part of one."""
    assert collectives(CHAINED, 8) == [
        Collective("collective-permute", ((8,),), 32, 8, 3),
        Collective("all-reduce", ((4,),), 16, 2, 1),
        Collective("all-gather", ((64, 64),), 2 * 64 * 64, 4, 1),
    ]


def test_a_loop_within_a_loop_as_compiled_here():
    """Six rounds of four sums of 128 numbers over eight devices, and one at the end."""

    def local(x):
        def inner(x, _):
            return jax.lax.psum(x, "data") * 0.1, None

        def outer(x, _):
            return jax.lax.scan(inner, x + 1, length=4)[0], None

        return jax.lax.psum(jnp.sum(jax.lax.scan(outer, x, length=6)[0]), "data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        run = jax.shard_map(local, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False)
        text = jax.jit(run).lower(jax.ShapeDtypeStruct((1024,), jnp.float32)).compile().as_text()
    assert sorted((one.kind, one.bytes, one.group, one.times) for one in collectives(text, 8)) == [
        ("all-reduce", 4, 8, 1),
        ("all-reduce", 512, 8, 24),
    ]
    assert sent_bytes(collectives(text, 8)) == 2 * 7 / 8 * (24 * 512 + 4)
