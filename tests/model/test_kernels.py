"""Every attention kernel computes the same: against an oracle that spells out who sees whom, one pair at a time."""

import dataclasses
import functools
import logging
import math
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import kernels
from jaxlm.model.kernels import attend, choose, chunked, cudnn, splash, why_not, xla
from jaxlm.model.mask import Mask
from jaxlm.parallel import ParallelConfig, make_mesh

# Three documents in a row of 50 and padding; one and a half; nothing but one document.
SEGMENTS = np.array([[1] * 7 + [2] * 21 + [3] * 17 + [0] * 5, [1] * 33 + [2] * 17, [1] * 50], np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    L: int = 50
    S: int = 50
    N: int = 4
    K: int = 4
    H: int = 8
    causal: bool = True
    window: int | None = None
    segments: bool = False
    sources: bool = False  # keys have segments of their own, as a decoder's view of an encoder
    seen: int | None = None
    softcap: float | None = None
    bias: bool = False
    scale: float | None = None


CASES = {
    "causal": Case(),
    "full": Case(causal=False),
    "window": Case(window=9),
    "window-of-itself": Case(window=1),
    "window-both-sides": Case(causal=False, window=11),
    "segments": Case(segments=True),
    "segments-full": Case(segments=True, causal=False, K=2),
    "segments-window": Case(segments=True, window=6),
    "softcap": Case(softcap=1.5, scale=0.7),
    "gqa": Case(K=2, segments=True),
    "mqa": Case(K=1, causal=False),
    "bias": Case(bias=True, K=2),
    "bias-both-sides": Case(bias=True, causal=False),
    "everything": Case(bias=True, K=2, softcap=2.0, segments=True, window=13, scale=0.5),
    "cross": Case(L=19, S=50, causal=False, sources=True),
    "cross-longer": Case(L=50, S=7, causal=False),
    "cache": Case(L=5, S=50, seen=30),
    "cache-window": Case(L=20, S=50, seen=17, window=8, K=2),
    "cache-bias": Case(L=20, S=50, seen=17, bias=True, K=2),
    "one-token": Case(L=1, S=50, seen=41),
    "even-blocks": Case(L=64, S=64, K=2, window=20),
}
# What splash cannot do it says (see below); its blocks are of 128, so its lengths lie between.
SPLASH = {
    "causal": Case(L=256, S=256, N=2, K=2),
    "segments-gqa": Case(L=300, S=300, N=2, K=1, segments=True),
    "window-softcap": Case(L=256, S=256, N=1, K=1, window=70, softcap=1.5, segments=True, scale=0.7),
    "full-odd": Case(L=200, S=200, N=1, K=1, causal=False),
    "segments-full-odd": Case(L=200, S=200, N=1, K=1, causal=False, segments=True),
    "window-both-sides-odd": Case(L=300, S=300, N=1, K=1, causal=False, window=90),
    "cross": Case(L=140, S=260, N=2, K=1, causal=False),
}


def tensors(case: Case, rows: int = 3):
    keys = jax.random.split(jax.random.key(0), 5)
    q = jax.random.normal(keys[0], (rows, case.L, case.N, case.H))
    k = jax.random.normal(keys[1], (rows, case.S, case.K, case.H))
    v = jax.random.normal(keys[2], (rows, case.S, case.K, case.H))
    bias = jax.random.normal(keys[3], (case.N, 2 * case.S - 1)) if case.bias else None
    return (q, k, v, bias), jax.random.normal(keys[4], q.shape)


def segments(case: Case, rows: int = 3) -> np.ndarray:
    """The rows of SEGMENTS, stretched to the case's length."""
    return SEGMENTS[:rows, np.arange(case.S) * SEGMENTS.shape[1] // case.S]


def mask_of(case: Case, rows: int = 3) -> Mask:
    query = key = None
    if case.segments:
        query = key = jnp.asarray(segments(case, rows))
    if case.sources:  # the row's first document is its source; queries are of segment 1 unless told otherwise
        key = jnp.asarray((segments(case, rows) == 1).astype(np.int32))
    seen = None if case.seen is None else jnp.int32(case.seen)
    return Mask(query, key, seen, causal=case.causal, window=case.window)


def sees(case: Case, rows: int = 3) -> np.ndarray:
    """(B, L, S) by asking for each pair."""
    shown, of = np.zeros((rows, case.L, case.S), bool), segments(case, rows)
    for b, query, s in np.ndindex(shown.shape):
        place = query + (case.seen or 0)
        if case.causal:
            near = s <= place and (case.window is None or place - s < case.window)
        else:
            near = case.window is None or abs(place - s) <= case.window // 2
        same = (not case.segments or of[b, query] == of[b, s]) and (not case.sources or of[b, s] == 1)
        shown[b, query, s] = near and same
    assert shown.any(axis=-1).all(), "every query of a case sees something: what the others get is nobody's business"
    return shown


def oracle(case: Case, shown_BLS, q_BLNH, k_BSKH, v_BSKH, bias_NY, kept_BNLS=None):
    k_BSNH, v_BSNH = (jnp.repeat(x, case.N // case.K, axis=2) for x in (k_BSKH, v_BSKH))
    scale = case.H**-0.5 if case.scale is None else case.scale
    scores_BNLS = scale * jnp.einsum("BLNH,BSNH->BNLS", q_BLNH, k_BSNH)
    if case.softcap is not None:
        scores_BNLS = case.softcap * jnp.tanh(scores_BNLS / case.softcap)
    if bias_NY is not None:
        distance_LS = np.arange(case.S)[None] - (case.seen or 0) - np.arange(case.L)[:, None]
        scores_BNLS = scores_BNLS + bias_NY[:, distance_LS + case.S - 1]
    weights_BNLS = jnp.where(shown_BLS[:, None], jnp.exp(scores_BNLS), 0)
    weights_BNLS = weights_BNLS / jnp.sum(weights_BNLS, axis=-1, keepdims=True)
    if kept_BNLS is not None:
        weights_BNLS = weights_BNLS * kept_BNLS
    return jnp.einsum("BNLS,BSNH->BLNH", weights_BNLS, v_BSNH)


def scored(run, inputs, cotangent):
    """The values, and the gradients of q, k, v and bias."""

    def loss(*inputs):
        y = run(*inputs)
        return jnp.sum(y * cotangent), y

    which = tuple(i for i, x in enumerate(inputs) if x is not None)
    grads, y = jax.jit(jax.grad(loss, argnums=which, has_aux=True))(*inputs)
    return (y, *grads)


def check(case: Case, run, atol: float = 2e-5, kept_BNLS=None):
    inputs, cotangent = tensors(case)
    with jax.numpy_rank_promotion("allow"):
        theirs = scored(functools.partial(oracle, case, sees(case), kept_BNLS=kept_BNLS), inputs, cotangent)
    ours = scored(run, inputs, cotangent)
    for name, a, b in zip(("values", "q", "k", "v", "bias"), ours, theirs, strict=False):
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4, err_msg=name)


def scale_of(case: Case) -> float:
    return case.H**-0.5 if case.scale is None else case.scale


@pytest.mark.parametrize("name", CASES)
def test_xla(name):
    case = CASES[name]
    check(case, lambda q, k, v, bias: xla(q, k, v, mask_of(case), scale_of(case), case.softcap, bias, None))


def test_xla_in_blocks_of_queries():
    """From 128 queries on, a causal mask is computed in blocks that leave out the keys behind them."""
    case = Case(L=150, S=150, N=2, K=1, bias=True, softcap=2.0, segments=True)
    check(case, lambda q, k, v, bias: xla(q, k, v, mask_of(case), scale_of(case), case.softcap, bias, None))


@pytest.mark.parametrize("length", [50, 150])
def test_dropout_keeps_its_gradient(length):
    """Dropped weights count for nothing, forward and backward, the kept ones are made larger; in blocks too."""
    case, key, rate = Case(L=length, S=length, N=4, K=2, bias=True, softcap=2.0, segments=True), jax.random.key(3), 0.3
    kept = jax.random.bernoulli(key, 1 - rate, (3, 2, 2, length, length)).reshape(3, 4, length, length)
    assert 0.6 < float(kept.mean()) < 0.8
    run = lambda q, k, v, bias: xla(q, k, v, mask_of(case), scale_of(case), case.softcap, bias, (rate, key))  # noqa: E731
    check(case, run, kept_BNLS=kept.astype(np.float32) / (1 - rate))


@pytest.mark.parametrize("name", CASES)
def test_chunked(name):
    """In blocks of 16: lengths they do not divide, blocks that are wholly hidden, queries that begin within a block."""
    case = CASES[name]
    check(case, lambda q, k, v, bias: chunked(q, k, v, mask_of(case), scale_of(case), case.softcap, bias, block=16))


@pytest.mark.parametrize("name", SPLASH)
def test_splash_interpreted(name):
    case = SPLASH[name]
    check(case, lambda q, k, v, _: splash(q, k, v, mask_of(case), scale_of(case), case.softcap, block=128, interpret=True))


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (8, 2)], ids=["split-both", "one-kv-head", "each-its-own-kv-head"])
def test_splash_on_a_mesh(heads):
    """Rows over data and fsdp, heads over tensor; with 4 ways of heads and 2 key/value heads, those are repeated."""
    N, K = heads
    case, sizes = Case(L=128, S=128, N=N, K=K, segments=True), (1, 2, 4) if N == 8 else (2, 2, 2)
    inputs, cotangent = tensors(case, 3)
    inputs = tuple(None if x is None else jnp.concatenate([x, x[:1]]) for x in inputs)
    cotangent, mask = jnp.concatenate([cotangent, cotangent[:1]]), mask_of(case)
    row = jnp.concatenate([mask.key_segments_BS, mask.key_segments_BS[:1]])
    mask = dataclasses.replace(mask, query_segments_BL=row, key_segments_BS=row)
    shown = np.concatenate([sees(case), sees(case)[:1]])
    with jax.numpy_rank_promotion("allow"):
        theirs = scored(functools.partial(oracle, case, shown), inputs, cotangent)
    with jax.set_mesh(make_mesh(ParallelConfig(*sizes))):
        run = functools.partial(splash, mask=mask, scale=scale_of(case), softcap=None, block=128, interpret=True)
        ours = jax.block_until_ready(scored(lambda q, k, v, _: run(q, k, v), inputs, cotangent))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


def test_chunked_on_a_mesh_is_one_devices():
    case = Case(L=40, S=40, K=2, segments=True, softcap=2.0)
    (*inputs, _), cotangent = tensors(case, 2)
    mask = mask_of(case, 2)
    run = lambda q, k, v: chunked(q, k, v, mask, 0.5, case.softcap, None, block=16)  # noqa: E731
    alone = scored(run, inputs, cotangent)
    with jax.set_mesh(make_mesh(ParallelConfig(1, 2, 2), jax.devices()[:4])):
        spread = jax.sharding.PartitionSpec("fsdp", None, "tensor", None)
        split = scored(run, [jax.device_put(x, spread) for x in inputs], jax.device_put(cotangent, spread))
    for a, b in zip(split, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_chunked_in_bfloat16_is_as_near_as_xla():
    case = Case(K=2, segments=True)
    (q, k, v, _), _ = tensors(case)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    with jax.numpy_rank_promotion("allow"):
        exact = oracle(case, sees(case), *(x.astype(jnp.float32) for x in half), None)
    plain = xla(*half, mask_of(case), scale_of(case), None, None, None)
    blocks = chunked(*half, mask_of(case), scale_of(case), None, None, block=16)
    assert blocks.dtype == jnp.bfloat16
    error, usual = (np.abs(np.asarray(y, np.float32) - exact).max() for y in (blocks, plain))
    assert error < 1.5 * usual < 0.05


def test_chunked_rows_that_see_nothing_are_zero_and_move_nothing():
    """A decoder row whose source is all padding: no value and no gradient, and no NaN (0 / 0) either."""
    case = Case(L=20, S=20, causal=False)
    inputs, cotangent = tensors(case, 1)
    mask = Mask(jnp.ones((1, 20), jnp.int32), jnp.zeros((1, 20), jnp.int32), causal=False)
    for x in scored(lambda q, k, v, _: chunked(q, k, v, mask, 1.0, None, None, block=16), inputs, cotangent):
        assert (np.asarray(x) == 0).all()


def test_dropout_keeps_the_mean():
    """A kernel without dropout must not be chosen with it; xla's weights are dropped and those left grow in turn."""
    case = Case(L=8, S=8, causal=False)
    (q, k, v, _), _ = tensors(case, 1)
    plain = attend(q, k, v, mask_of(case, 1))
    draws = jax.jit(jax.vmap(lambda key: attend(q, k, v, mask_of(case, 1), drop=(0.3, key), kernel="chunked")))(
        jax.random.split(jax.random.key(1), 4000)
    )
    assert np.abs(draws[0] - plain).max() > 0.05
    np.testing.assert_allclose(draws.mean(0), plain, atol=0.06)


def memory(run, length: int, heads: int = 2, width: int = 16) -> int:
    shape = jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)
    compiled = jax.jit(jax.grad(lambda q, k, v: jnp.sum(run(q, k, v)), argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mask", [Mask(), Mask(causal=False), Mask(window=100)], ids=["causal", "full", "window"])
def test_memory_of_chunked_is_linear_in_length(mask):
    blocks = [memory(lambda q, k, v: chunked(q, k, v, mask, 1.0, None, None, block=128), length) for length in (2048, 4096, 8192)]
    whole = [memory(lambda q, k, v: xla(q, k, v, mask, 1.0, None, None, None), length) for length in (2048, 4096)]
    assert blocks[2] < 2.1 * blocks[1] < 2.1 * 2.1 * blocks[0], blocks
    assert whole[1] > 3.5 * whole[0] and whole[1] > 20 * blocks[1], (whole, blocks)


def test_memory_of_biases_is_linear_in_length():
    """Made block by block, forward and backward; the gradient of one is a number for each head and distance. 8,192 places would
    take 537 MB as (N, L, S)."""

    def of(length: int) -> int:
        q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        run = lambda q, k, v, bias: jnp.sum(chunked(q, k, v, Mask(), 1.0, None, bias, block=128))  # noqa: E731
        bias = jax.ShapeDtypeStruct((2, 2 * length - 1), jnp.float32)
        compiled = jax.jit(jax.grad(run, argnums=(0, 1, 2, 3))).lower(q, q, q, bias).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert of(8192) < 2.2 * of(4096) < 60e6


def test_chunked_computes_no_block_that_is_hidden():
    """NaN where only hidden blocks lie would reach the output if they were computed: 0 · NaN is NaN."""
    case = Case(L=64, S=64, N=1, K=1, window=16)
    (q, k, v, _), _ = tensors(case, 1)
    run = jax.jit(lambda v: chunked(q, k, v, mask_of(case, 1), 1.0, None, None, block=16))
    clean = run(v)
    np.testing.assert_array_equal(run(v.at[:, 32:].set(jnp.nan))[:, :32], clean[:, :32])  # behind the queries
    np.testing.assert_array_equal(run(v.at[:, :32].set(jnp.nan))[:, 48:], clean[:, 48:])  # before the window
    assert np.isnan(run(v.at[:, 32:].set(jnp.nan))[:, 32:48]).all(), "the probe would show"


@pytest.fixture
def on(monkeypatch):
    """Pretend to be on another platform."""

    def set_platform(name: str) -> None:
        monkeypatch.setattr(kernels, "platform", lambda: name)
        monkeypatch.setattr(kernels, "_nvidia", lambda: name == "gpu")

    kernels._say.cache_clear()
    return set_platform


def shapes(L=256, S=None, N=8, K=8, H=64, B=4, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((B, L, N, H), dtype), jax.ShapeDtypeStruct((B, S or L, K, H), dtype)


DROP = (0.1, None)
ROW = jax.ShapeDtypeStruct((4, 256), jnp.int32)
BIAS = jax.ShapeDtypeStruct((8, 511), jnp.float32)
CHOICES = [
    # platform, what differs from a plain causal bfloat16 call, kernel
    ("cpu", {}, "xla"),
    ("cpu", {"L": 32768}, "chunked"),
    ("cpu", {"L": 32768, "drop": DROP}, "xla"),
    ("cpu", {"L": 1, "S": 32768}, "xla"),
    ("tpu", {}, "splash"),
    ("tpu", {"dtype": jnp.float32, "H": 80, "K": 2, "softcap": 30.0, "mask": Mask(ROW, ROW, window=64)}, "splash"),
    ("tpu", {"L": 300, "mask": Mask(causal=False)}, "splash"),
    ("tpu", {"L": 300, "S": 200, "mask": Mask(causal=False)}, "splash"),
    ("tpu", {"L": 300, "S": 200}, "xla"),
    ("tpu", {"L": 100}, "xla"),
    ("tpu", {"L": 1, "S": 4096, "mask": Mask(seen=0)}, "xla"),
    ("tpu", {"bias_NY": BIAS}, "xla"),
    ("tpu", {"drop": DROP}, "xla"),
    ("tpu", {"L": 32768, "bias_NY": BIAS}, "chunked"),
    ("gpu", {}, "cudnn"),
    ("gpu", {"K": 2, "mask": Mask(ROW, ROW)}, "cudnn"),
    ("gpu", {"mask": Mask(window=64)}, "cudnn"),
    ("gpu", {"L": 255}, "cudnn"),
    ("gpu", {"L": 255, "mask": Mask(ROW, ROW)}, "xla"),
    ("gpu", {"bias_NY": BIAS}, "cudnn"),
    ("gpu", {"bias_NY": BIAS, "L": 8192}, "cudnn"),  # as a matrix (8, L, L) in bfloat16, 1.07 GB
    ("gpu", {"bias_NY": BIAS, "L": 8194}, "chunked"),
    ("gpu", {"bias_NY": BIAS, "L": 4096, "mask": Mask(ROW, ROW)}, "cudnn"),  # each row's own mask makes it (B, 8, L, L)
    ("gpu", {"bias_NY": BIAS, "L": 4098, "mask": Mask(ROW, ROW)}, "chunked"),
    ("gpu", {"dtype": jnp.float32}, "xla"),
    ("gpu", {"dtype": jnp.float32, "L": 32768}, "chunked"),
    ("gpu", {"softcap": 30.0}, "xla"),
    ("gpu", {"H": 256}, "xla"),
    ("gpu", {"H": 60}, "xla"),
    ("gpu", {"drop": DROP}, "xla"),
]


@pytest.mark.parametrize(("name", "call", "kernel"), CHOICES)
def test_auto_chooses(on, caplog, name, call, kernel):
    on(name)
    given = {key: call[key] for key in ("L", "S", "N", "K", "H", "B", "dtype") if key in call}
    rest = {key: call.get(key) for key in ("softcap", "bias_NY", "drop")}
    assert choose("auto", *shapes(**given), call.get("mask", Mask()), **rest) == kernel
    assert not caplog.records, "auto is no one's wish: nothing to say"


def test_large_is_what_one_device_holds(on):
    """2.1 GB of scores are large for one device, not for two."""
    on("cpu")
    call = (*shapes(L=4096, N=4, B=8), Mask(), None, None, None)
    assert choose("auto", *call) == "chunked"
    with jax.set_mesh(make_mesh(ParallelConfig(data=2, tensor=2), jax.devices()[:4])):
        assert choose("auto", *call) == "xla"


def test_a_kernel_that_cannot_says_why_once(on, caplog):
    on("gpu")
    q, k = shapes(dtype=jnp.float32)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert choose("cudnn", q, k, Mask(), None, None, None) == "xla"
            assert choose("splash", q, k, Mask(), None, None, None) == "xla"
        assert choose("chunked", q, k, Mask(), None, None, DROP) == "xla"
    assert [record.getMessage() for record in caplog.records] == [
        "attention kernel cudnn cannot be used here: it computes in bfloat16 or float16, given float32",
        "attention kernel splash cannot be used here: it needs a TPU",
        "attention kernel chunked cannot be used here: it has no dropout",
    ]


def test_a_named_kernel_is_obeyed(on):
    on("tpu")
    q, k = shapes()
    assert choose("xla", q, k, Mask(), None, None, None) == "xla"
    assert choose("chunked", q, k, Mask(), None, None, None) == "chunked"
    assert why_not("xla", q_BLNH=q, k_BSKH=k, mask=Mask(), drop=DROP) is None


CUDNN = {
    "causal": (Mask(), False),
    "full": (Mask(causal=False), False),
    "window": (Mask(window=9), False),
    "window-both-sides": (Mask(causal=False, window=9), False),
    "segments": (Mask(SEGMENTS[:2], SEGMENTS[:2]), False),
    "segments-full": (Mask(SEGMENTS[:2], SEGMENTS[:2], causal=False), False),
    "segments-window": (Mask(SEGMENTS[:2], SEGMENTS[:2], window=5), False),
    "bias-window": (Mask(window=5), True),
    "cache": (Mask(seen=jnp.int32(4)), False),
}


@pytest.mark.parametrize("name", CUDNN)
def test_what_cudnn_is_told_means_our_mask(monkeypatch, name):
    """The same words to JAX's own XLA implementation of that interface give what ours gives. It never stands for a mask
    where a word would do, nor for a window and a bias at once, which cuDNN does not know."""
    mask, biased = CUDNN[name]
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, 50, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=False))
    bias = jax.random.normal(keys[3], (4, 99)) if biased else None
    theirs, told = jax.nn.dot_product_attention, {}

    def spy(*arrays, implementation, **words):
        assert implementation == "cudnn"
        told.update(words)
        return theirs(*arrays, implementation="xla", **words)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        y = cudnn(q, k, v, mask, 0.3, bias)
    np.testing.assert_allclose(y, xla(q, k, v, mask, 0.3, None, bias, None), atol=1e-5)
    assert (told["mask"] is None) == (name in ("causal", "full", "window"))
    assert told["local_window_size"] is None or (told["is_causal"] and told["mask"] is None and told["bias"] is None)


@pytest.mark.parametrize(
    "N, K, context, parallel",
    [
        (8, 8, "auto", {"fsdp": 8}),
        (8, 4, "auto", {"data": 2, "tensor": 4}),
        (8, 4, "auto", {"tensor": 8}),
        (8, 1, "auto", {"data": 4, "tensor": 2}),
        (8, 2, "gather", {"data": 2, "context": 4}),
        (8, 2, "gather", {"context": 2, "tensor": 4}),
        (8, 2, "ulysses", {"data": 2, "context": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_cudnn_is_given_arrays_that_jax_splits(on, monkeypatch, N, K, context, parallel):
    """JAX refuses to split cuDNN's attention unless queries, keys and values are split alike, over rows and heads alone."""
    on("gpu")
    theirs, found = jax.nn.dot_product_attention, {}

    def spy(q, k, v, *, implementation, **words):
        assert implementation == "cudnn"
        for name, x in {"q": q, "k": k, "v": v}.items():
            jax.debug.inspect_array_sharding(x, callback=lambda sharding, name=name, x=x: found.update({name: (sharding, x.shape)}))
        return theirs(q, k, v, implementation="xla", **words)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    q, k = shapes(L=32, N=N, K=K, H=8, B=8)
    run = jax.jit(lambda q, k, v: attend(q, k, v, Mask(), kernel="cudnn", context=context))
    mesh = make_mesh(ParallelConfig(**{"data": 1, **parallel}))
    with jax.set_mesh(mesh), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        run.lower(q, k, k).compile()
    (q_split, shape), (k_split, k_shape), (v_split, _) = (found[name] for name in "qkv")
    parts = [whole // part for whole, part in zip(shape, q_split.shard_shape(shape), strict=True)]
    assert parts[1] == parts[3] == 1 and math.prod(parts) > 1, "rows and heads alone"
    assert parts == [whole // part for whole, part in zip(k_shape, k_split.shard_shape(k_shape), strict=True)]
    assert k_split.is_equivalent_to(v_split, 4) and q_split.is_equivalent_to(k_split, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDNN)
def test_cudnn_on_a_gpu(name):
    mask, biased = CUDNN[name]
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, 50, n, 16), jnp.bfloat16) for key, n in zip(keys, (4, 2, 2), strict=False))
    bias = jax.random.normal(keys[3], (4, 99)) if biased else None
    cotangent = jax.random.normal(keys[4], q.shape)
    inputs = (q, k, v, bias)
    assert choose("cudnn", q, k, mask, None, bias, None) == "cudnn"
    ours = scored(lambda q, k, v, bias: cudnn(q, k, v, mask, 0.3, bias).astype(jnp.float32), inputs, cotangent)
    theirs = scored(lambda q, k, v, bias: xla(q, k, v, mask, 0.3, None, bias, None).astype(jnp.float32), inputs, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.05, rtol=0.05)


AHEAD = """
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxlm.model.kernels import attend
    from jaxlm.model.mask import Mask
    from jaxlm.parallel import ParallelConfig, make_mesh

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = make_mesh(ParallelConfig(2, 2, 2), devices)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def compiled(L, N, K, H, dtype, softcap=None, **facts):
        q, k = (jax.ShapeDtypeStruct((8, L, n, H), dtype, sharding=rows) for n in (N, K))
        segments = jax.ShapeDtypeStruct((8, L), jnp.int32, sharding=rows)

        def loss(q, k, v, segments):
            return jnp.sum(attend(q, k, v, Mask(segments, segments, **facts), softcap=softcap).astype(jnp.float32))

        with jax.set_mesh(mesh):
            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, k, k, segments).compile()

    for sizes in ((1024, 8, 2, 64, jnp.bfloat16), (1000, 4, 1, 80, jnp.float32, 30.0), (2048, 8, 8, 256, jnp.bfloat16)):
        text = compiled(*sizes).as_text()
        assert text.count('"tpu_custom_call"') == 3, "forward, dq, dkv"
        assert " all-to-all" not in text, "each device keeps its rows"
    compiled(1024, 8, 4, 128, jnp.bfloat16, window=300), compiled(1024, 8, 4, 128, jnp.bfloat16, causal=False)
    memory = compiled(32768, 8, 8, 64, jnp.bfloat16).memory_analysis().temp_size_in_bytes
    assert memory < 4 * (2 * 4 * 32768**2) / 20, "of two rows' and four heads' scores in float32"
    print("compiled")
"""


@pytest.mark.slow
def test_splash_compiles_for_tpus_ahead_of_time():
    """On a host without TPUs `auto` finds them in the mesh, and the compiler accepts forward and backward."""
    pytest.importorskip("libtpu", reason="libtpu, which holds the TPU compiler, is not installed: pip install -e '.[plan]'")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "PYTEST"))}
    env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(AHEAD)], env=env, capture_output=True, text=True, timeout=400)
    assert done.stdout.strip().endswith("compiled"), done.stderr[-3000:]
