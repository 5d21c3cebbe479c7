"""Each kind of parallelism compiles for TPUs that are not here, of one host and of a pod, with the collectives it should.

This file is started as a script: libtpu must find its environment before JAX is imported.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.model import Model, MoeConfig, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh
from jaxlm.parallel.hlo import KINDS, collectives, sent_bytes
from jaxlm.train import OptimConfig, make_optimizer, make_schedule, make_train_step, objectives, state_shapes

LAYERS, WIDTH, LENGTH = 4, 512, 1024
DECODER = TransformerConfig(
    vocab_size=4096, positions=LENGTH, layers=LAYERS, width=WIDTH, heads=8, mlp_width=1024, position="rotary", norm="rmsnorm",
    activation="swiglu", bias=False, tie_embeddings=False, dtype="bfloat16",
)  # fmt: skip
EXPERTS = dataclasses.replace(DECODER, moe=MoeConfig(experts=8, chosen=2))
# Topology, model, mesh, kinds of collective that must be there.
CASES: dict[str, tuple[str, TransformerConfig, dict[str, int], set[str]]] = {
    "fsdp": ("v5e:2x4", DECODER, {"fsdp": 8}, {"all-gather"}),
    "fsdp, one chunk": ("v5e:2x4", DECODER, {"fsdp": 8}, {"all-gather"}),
    "tensor": ("v5e:2x4", dataclasses.replace(DECODER, unroll=True), {"data": 2, "tensor": 4}, {"all-reduce"}),
    "ring": ("v5e:2x4", DECODER, {"context": 4, "tensor": 2}, {"collective-permute"}),
    "ulysses": ("v5e:2x4", dataclasses.replace(DECODER, context="ulysses"), {"data": 2, "context": 4}, {"all-to-all"}),
    "stages": ("v5e:2x4", DECODER, {"stage": 2, "data": 2, "tensor": 2}, {"collective-permute"}),
    "rounds": ("v5e:2x4", dataclasses.replace(DECODER, rounds=2), {"stage": 2, "fsdp": 4}, {"collective-permute"}),
    "experts": ("v5e:2x4", EXPERTS, {"expert": 4, "data": 2}, {"ragged-all-to-all"}),
    "zero1": ("v5e:2x4", DECODER, {"data": 8}, {"all-gather"}),
    "on the host": ("v5e:2x4", DECODER, {"fsdp": 8}, {"all-gather"}),
    "offload": ("v5e:2x4", dataclasses.replace(DECODER, remat="offload"), {"data": 8}, {"all-reduce"}),
    "128 chips": ("v5p:4x4x8", DECODER, {"stage": 2, "data": 4, "fsdp": 4, "context": 2, "tensor": 2}, {"collective-permute"}),
    "128 chips, experts": ("v5p:4x4x8", EXPERTS, {"data": 4, "expert": 8, "context": 2, "tensor": 2}, {"ragged-all-to-all"}),
    "256 chips": ("v6e:16x16", DECODER, {"data": 8, "fsdp": 16, "tensor": 2}, {"all-gather"}),
    "256 chips, long": ("v6e:16x16", DECODER, {"data": 2, "fsdp": 8, "context": 8, "tensor": 2}, {"collective-permute"}),
}  # fmt: skip
CHUNKS = {"fsdp, one chunk": LENGTH}  # positions of a chunk of the loss, else an eighth of the length
OPTIM = {"zero1": OptimConfig(zero1=True), "on the host": OptimConfig(offload=True)}


def compile_step(name: str) -> dict[str, Any]:
    """Compile forward, backward and AdamW; what it sends, or what went wrong."""
    from jax.experimental import topologies

    topology, config, sizes, _ = CASES[name]
    mesh = make_mesh(
        ParallelConfig(**{"data": 1, **sizes}), topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    )
    began, rows = time.monotonic(), 4 * sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1)
    whole = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    batch = dict.fromkeys(("tokens_BL", "segments_BL", "positions_BL", "targets_BL"), whole)
    batch["weights_BL"] = jax.ShapeDtypeStruct((rows, LENGTH), jnp.float32)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            model, optim = Model(config), OPTIM.get(name, OptimConfig())
            schedule = make_schedule(optim, 1000)
            optimizer = make_optimizer(optim, schedule)
            step = make_train_step(
                model, objectives.tokens(CHUNKS.get(name, LENGTH // 8)), optimizer, schedule, mesh, seed=0, optim=optim
            )
            compiled = step.lower(state_shapes(model, optimizer), batch).compile()
    except Exception as error:
        return {"name": name, "error": f"{type(error).__name__}: {error}"[:1500]}
    memory = compiled.memory_analysis()
    try:
        hlo = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # XLA cannot print what it made asynchronous of several arrays at once
        hlo = None
    found = collectives(hlo, mesh.size) if hlo else []
    sent = re.findall(rf" ({'|'.join(KINDS)})(?:-start)?\(", hlo or "")
    scattered = re.findall(r"= (\S+) fusion\([^)]*\), kind=kCustom, calls=%all-reduce-scatter", hlo or "")
    return {
        "name": name, "error": None, "seconds": round(time.monotonic() - began, 1),
        "sent": {kind: sent.count(kind) for kind in sorted(set(sent))}, "printed": hlo is not None,
        "sent_bytes": sent_bytes(found) if hlo else None,
        "gathered_in_loops": [shape for one in found for shape in one.shapes if one.kind == "all-gather" and one.times > 1],
        "temp_bytes": memory.temp_size_in_bytes, "state_bytes": memory.argument_size_in_bytes,
        "host_bytes": memory.host_argument_size_in_bytes, "host_temp_bytes": memory.host_temp_size_in_bytes,
        "scattered": [re.match(r"\w+\[[\d,]*\]", shape)[0] for shape in scattered],
    }  # fmt: skip


def main() -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for name in sys.argv[1:] or CASES:
        print(json.dumps(compile_step(name)), flush=True)


@pytest.mark.slow
@pytest.mark.parallel
def test_every_kind_of_parallelism_compiles_for_tpus(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        (pytest.fail if os.environ.get("JAXLM_REQUIRE_PARITY") else pytest.skip)(
            "libtpu is not installed: pip install -e '.[plan]'"
        )
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    noise = tmp_path / "stderr"
    with noise.open("w") as stderr:
        done = subprocess.run(
            [sys.executable, __file__], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=1200
        )
    rows = {row["name"]: row for row in map(json.loads, (line for line in done.stdout.splitlines() if line.startswith("{")))}
    assert done.returncode == 0, noise.read_text(errors="replace")[-3000:]
    assert not {name: row["error"] for name, row in rows.items() if row["error"]}
    assert set(rows) == set(CASES)
    for name, (_, _, _, expected) in CASES.items():
        assert expected <= set(rows[name]["sent"]) or (not rows[name]["printed"] and "chips" in name), rows[name]
    # Megatron's four sums of activations a layer, each scattered over the four devices' parts of the length; and the look-up's.
    parts = f"[4,{LENGTH // 4},{WIDTH}]"
    assert sorted(rows["tensor"]["scattered"]) == 4 * LAYERS * [f"bf16{parts}"] + [f"f32{parts}"], rows["tensor"]
    # Eight chunks of the loss gather the table once and sum its gradient once, as one chunk does.
    assert rows["fsdp"]["sent_bytes"] <= rows["fsdp, one chunk"]["sent_bytes"]
    # A tick gathers what tensor splits of one microbatch's two rows on a device, never the rows of other devices.
    assert rows["stages"]["gathered_in_loops"]
    assert max(map(math.prod, rows["stages"]["gathered_in_loops"])) <= 2 * LENGTH * WIDTH
    whole = 3 * 4 * Model(DECODER).parameters()  # parameters and two moments; tiles of small arrays are padded
    assert rows["zero1"]["state_bytes"] < 1.1 * whole * (1 + 2 / 8) / 3, "whole parameters, an eighth of the moments"
    moments = rows["on the host"]["host_bytes"]
    assert moments > 0.95 * whole * 2 / 3 / 8 and moments == rows["fsdp"]["state_bytes"] - rows["on the host"]["state_bytes"]
    assert rows["offload"]["host_temp_bytes"] == LAYERS * 4 * LENGTH * WIDTH * 2, "attention's results, bfloat16"


if __name__ == "__main__":
    main()
