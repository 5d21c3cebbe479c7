"""Random small models on random meshes of eight devices have one device's loss and gradients."""

import dataclasses
import itertools
import math
import os
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import HeadConfig, Model, MoeConfig, TransformerConfig
from jaxlm.model.config import RotaryConfig
from jaxlm.parallel import ParallelConfig, batch_sharding, make_mesh, place_batch, stored_shardings
from jaxlm.train import objectives

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

B = 8
SEEDS = range(int(os.environ.get("JAXLM_FUZZ_FROM", 0)), int(os.environ.get("JAXLM_FUZZ_TO", 8)))
"""A longer search: JAXLM_FUZZ_FROM=100 JAXLM_FUZZ_TO=200."""


def random_model(draw: random.Random) -> TransformerConfig:
    architecture = draw.choice(["decoder", "decoder", "encoder", "encoder_decoder"])
    heads = draw.choice([3, 4, 6, 8])
    options = {
        "kernel": ["xla", "chunked"], "context": ["auto", "ring", "ulysses", "gather"], "layer_pattern": ["G", "L", "GL", "LLG"],
        "window": [3, 8, 16], "remat": ["none", "full", "dots"], "qk_norm": ["none", "heads", "whole"], "layers": [2, 3, 4],
        "position": ["learned", "rotary", "relative", "alibi", "sinusoidal"], "norm": ["layernorm", "rmsnorm"],
        "activation": ["gelu", "swiglu"], "tie_embeddings": [True, False], "rounds": [1, 1, 2], "microbatches": [None, 2, 4],
        "attention_softcap": [None, 5.0], "logit_softcap": [None, 10.0], "share_layers": [False, False, False, True],
        "kv_heads": [n for n in range(1, heads + 1) if heads % n == 0], "vocab_size": [64, 61],
        "norm_position": ["pre", "post", "both", "output"],
        "rope": [RotaryConfig(), *(RotaryConfig(scaling=way, factor=2.0, original_positions=16) for way in ("dynamic", "yarn"))],
    }  # fmt: skip
    chosen = {name: draw.choice(values) for name, values in options.items()}
    if draw.random() < 0.4:
        # Balance losses are means over a microbatch: no part of what a mesh leaves as it is.
        chosen["moe"] = MoeConfig(experts=4, chosen=draw.choice([1, 2]), shared=draw.choice([0, 1]), balance_loss=0.0)
    if architecture == "encoder":
        chosen["head"] = HeadConfig(kind="masked_lm")
    if architecture == "encoder_decoder":
        chosen["decoder_layers"] = draw.choice([2, 3])
    return TransformerConfig(
        architecture=architecture, positions=64, width=32, heads=heads, head_width=8, mlp_width=64,
        relative_distance=32, **chosen,
    )  # fmt: skip


def random_mesh(draw: random.Random, config: TransformerConfig) -> ParallelConfig:
    """Sizes that multiply to eight; they need not divide heads and vocabulary."""
    while True:
        left, sizes = 8, {}
        for axis in draw.sample(["stage", "data", "fsdp", "expert", "context", "tensor"], 6):
            sizes[axis] = draw.choice([size for size in (1, 1, 2, 4, 8) if left % size == 0])
            left //= sizes[axis]
        sizes["data"] *= left
        experts = config.moe.experts or 1
        if experts % sizes["expert"] == 0 and math.prod(sizes.values()) == 8:
            return ParallelConfig(**sizes)


def random_rows(draw: random.Random, rng: np.random.Generator, config: TransformerConfig, length: int) -> dict:
    """Rows that are whole, padded, of several documents, or with a prefix that is seen from both sides."""
    kinds = ["whole", "padded"]
    kinds += ["packed"] if config.architecture != "encoder_decoder" else []
    kinds += ["prefix"] if config.architecture == "decoder" else []
    kind = draw.choice(kinds)
    segments, place = np.ones((B, length), np.int32), np.broadcast_to(np.arange(length, dtype=np.int32), (B, length)).copy()
    made = {name: rng.integers(0, config.V, (B, length)).astype(np.int32) for name in ("tokens_BL", "targets_BL")}
    if kind == "padded":
        segments = (np.arange(length) < rng.integers(4, length + 1, (B, 1))).astype(np.int32)
        made["segments_BL"] = segments
    elif kind == "packed":
        for row in range(B):
            cuts = [0, *np.sort(rng.choice(np.arange(1, length), 3, replace=False)), length]
            for number, (begin, end) in enumerate(itertools.pairwise(cuts), 1):
                segments[row, begin:end], place[row, begin:end] = number, np.arange(end - begin)
        segments[::2, -3:] = 0
        made |= {"segments_BL": segments, "positions_BL": place}
    elif kind == "prefix":
        made["prefix_B"] = rng.integers(1, length, (B,)).astype(np.int32)
    return made | {"weights_BL": (segments > 0).astype(np.float32)}


def random_batch(draw: random.Random, rng: np.random.Generator, config: TransformerConfig) -> dict:
    length = draw.choice([32, 31, 29, 33])
    if config.architecture != "encoder_decoder":
        return random_rows(draw, rng, config, length)
    read = random_rows(draw, rng, config, length)
    kept = {name: x for name, x in read.items() if name in ("tokens_BL", "segments_BL", "positions_BL")}
    return {"encoder": kept, "decoder": random_rows(draw, rng, config, length // 2)}


def loss_and_gradients(config: TransformerConfig, parallel: ParallelConfig, batch: dict, params):
    model, objective = Model(config), objectives.tokens(8, 1e-3, 0.1)
    mesh = make_mesh(parallel, jax.devices()[: math.prod(parallel.sizes)])

    def mean(params, batch):
        loss, weight, _ = objective(model.apply, params, batch, None)
        return loss / weight

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        shardings = stored_shardings(model.axes, model.shapes, mesh)
        compute = jax.jit(jax.value_and_grad(mean), in_shardings=(shardings, batch_sharding(mesh)))
        return jax.device_get(jax.block_until_ready(compute(jax.device_put(params, shardings), place_batch(batch, mesh))))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_model_on_a_random_mesh_has_one_devices_numbers(seed):
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    config = random_model(draw)
    parallel = random_mesh(draw, config)
    batch = random_batch(draw, rng, config)
    params = jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), Model(config).init(jax.random.key(seed))
    )
    alone, alone_grads = loss_and_gradients(config, ParallelConfig(data=1), batch, params)
    spread, spread_grads = loss_and_gradients(config, parallel, batch, params)
    told = f"{dataclasses.asdict(config)} on {parallel}"
    assert abs(alone - spread) < 2e-4 and jnp.isfinite(alone), told
    for a, b in zip(*map(jax.tree.leaves, (alone_grads, spread_grads)), strict=True):
        assert np.max(np.abs(a - b)) < 5e-3 * (1e-3 + np.max(np.abs(a))), told
