"""Every family's whole train step compiles for TPUs that are not here.

libtpu compiles ahead of time on a machine without a TPU. The test starts this file as a script, once for all families:
libtpu must find its environment before JAX is imported, and its complaints are kept from the output.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlm.hub import FAMILIES, Family
from jaxlm.model import Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh
from jaxlm.train import OptimConfig, make_optimizer, make_schedule, make_train_step, objectives, state_shapes

TOPOLOGY, MESH = "v5e:2x4", ParallelConfig(data=2, fsdp=2, tensor=2)
ROWS, LENGTH, CHUNK = 8, 256, 128

# Field of ours → value, written into a family's config.json under the family's own keys.
SIZES: dict[str, Any] = {
    "vocab_size": 1024, "positions": LENGTH, "token_types": 2, "layers": 2, "decoder_layers": 2, "width": 256,
    "embedding_width": 128, "heads": 4, "head_width": 64, "mlp_width": 1024, "norm_eps": 1e-6, "window": 64,
    "attention_softcap": 50.0, "logit_softcap": 30.0, "moe.experts": 4, "moe.chosen": 2, "moe.balance_loss": 0.01,
    "parallel": True,
}  # fmt: skip
# Keys that families translate by code; most know only some of them.
KEYS: dict[str, Any] = {
    "max_position_embeddings": LENGTH + 2,  # RoBERTa counts from 2
    "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 1024, "scale_embedding": True,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "modernbert": {"layer_types": ["full_attention", "sliding_attention"], "mlp_dropout": 0.0},
    "gpt2": {"activation_function": "gelu_new"},
    "gpt_neox": {"rotary_pct": 0.25},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh"},
    "t5": {"feed_forward_proj": "relu"},
    "mt5": {"feed_forward_proj": "gated-gelu"},
    "marian": {"dropout": 0.0},
}


def config_of(family: Family) -> TransformerConfig:
    """A small model of the family, with what sets it apart: its windows, caps, experts, grouped heads and dropout."""
    drops = family.fixed["architecture"] != "decoder"
    sizes = {**SIZES, "dropout": 0.1 if drops else 0.0}
    theirs = {"model_type": family.name, **KEYS, **{key: sizes[field] for field, key in family.keys.items() if field in sizes}}
    if family.activation:
        theirs[family.activation] = "silu" if family.fixed.get("activation") == "swiglu" else "gelu"
    head = "masked_lm" if family.fixed["architecture"] == "encoder" else "language_model"
    config = family.config({**theirs, **MORE.get(family.name, {})}, head=head)
    return dataclasses.replace(config, dtype="bfloat16")


def batch_of(config: TransformerConfig) -> dict[str, Any]:
    """Shapes of a batch: packed rows, types where the family has them, and one batch for each of two stacks."""
    whole = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = dict.fromkeys(("tokens_BL", "segments_BL", "positions_BL"), whole)
    scored = {"targets_BL": whole, "weights_BL": jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)}
    if config.architecture == "encoder_decoder":
        return {"encoder": batch, "decoder": {**batch, **scored}}
    return {**batch, **scored, **({"types_BL": whole} if config.token_types else {})}


def products(stablehlo: str) -> dict[str, int]:
    """Matrix products by the type of their operands."""
    operands = re.findall(r"stablehlo\.dot_general .*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)", stablehlo)
    return dict(collections.Counter(" × ".join(sorted(pair)) for pair in operands))


def compile_step(family: Family, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compile forward, backward and AdamW; what it costs, or what went wrong."""
    began = time.monotonic()
    try:
        model = Model(config_of(family))
        optim = OptimConfig()
        schedule = make_schedule(optim, 1000)
        optimizer = make_optimizer(optim, schedule)
        step = make_train_step(model, objectives.tokens(CHUNK), optimizer, schedule, mesh, seed=0)
        shapes = state_shapes(model, optimizer)
        lowered = step.lower(shapes, batch_of(model.config))
        stablehlo, compiled = lowered.as_text(), lowered.compile()
    except Exception as error:
        return {"family": family.name, "error": f"{type(error).__name__}: {error}"[:2000], "seconds": time.monotonic() - began}
    memory = compiled.memory_analysis()
    return {
        "family": family.name, "error": None, "seconds": round(time.monotonic() - began, 1),
        "parameters": model.parameters(), "experts": model.config.moe.experts > 0, "dropout": model.config.dropout > 0,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)),
        "argument_bytes": memory.argument_size_in_bytes, "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes, "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "biased": model.config.position == "relative",
        "products": products(stablehlo), "pallas": stablehlo.count("custom_call @tpu_custom_call"),
        "collectives": sum(compiled.as_text().count(f" {kind}(") for kind in ("all-reduce", "all-gather", "reduce-scatter")),
    }  # fmt: skip


def main() -> None:
    from jax.experimental import topologies

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    mesh = make_mesh(MESH, topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices)
    # Not jax.set_mesh: under it every eager computation, a random key say, would go to TPUs that are not here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for name in sys.argv[1:] or FAMILIES:
            print(json.dumps(compile_step(FAMILIES[name], mesh)), flush=True)


@pytest.mark.slow
def test_every_familys_train_step_compiles_for_tpus(tmp_path):
    """On a mesh of 2 × 2 × 2 v5e chips in bfloat16, with no float32 matrix product but those known; the state is
    donated and lies in parts."""
    if importlib.util.find_spec("libtpu") is None:
        (pytest.fail if os.environ.get("JAXLM_REQUIRE_PARITY") else pytest.skip)(
            "libtpu is not installed: pip install -e '.[plan]'"
        )
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    # The last one: several processes may compile at once, without a TPU that they could fight for.
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled"}
    noise = tmp_path / "stderr"
    with noise.open("w") as stderr:
        done = subprocess.run(
            [sys.executable, __file__], env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=900
        )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, noise.read_text(errors="replace")[-3000:]
    assert {row["family"] for row in rows} == set(FAMILIES)
    assert not {row["family"]: row["error"] for row in rows if row["error"]}
    for row in rows:
        shares = MESH.fsdp * MESH.tensor
        # Norms, biases of the model's width and T5's buckets are held whole; positions and types are split by fsdp alone.
        assert row["argument_bytes"] < 1.2 * row["state_bytes"] / shares, row
        assert row["alias_bytes"] > 0.95 * row["state_bytes"] / shares, row
        # Splash attention, which knows neither dropout nor bias: forward, and backward for queries and for keys.
        attentions, rest = divmod(row["pallas"], 3)
        assert rest == 0 and (attentions == 0) == (row["dropout"] or row["biased"]), row
        # The router computes in float32, and so does Pallas where it sums output · gradient.
        known = {"f32 × f32": 3 * row["experts"] + attentions}
        assert row["products"].pop("bf16 × bf16") > 10, row
        assert row["products"] == {kind: number for kind, number in known.items() if number}, row
        assert row["collectives"] > 0 and row["temp_bytes"] > 0, row


if __name__ == "__main__":
    main()
