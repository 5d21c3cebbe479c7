"""What encoders, encoder-decoders and every choice of the block must be: who sees whom, and the same however computed."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import plain_cross_entropy, tokens

from jaxlm.model import HeadConfig, Model, MoeConfig, RotaryConfig, TransformerConfig, empty_cache, linear_cross_entropy
from jaxlm.model.attention import Attention
from jaxlm.model.heads import LabelHead, pool
from jaxlm.model.layers import Norm
from jaxlm.model.mask import Mask

DECODER = TransformerConfig(vocab_size=40, positions=16, layers=2, width=16, heads=4, mlp_width=24)
ENCODER = dataclasses.replace(DECODER, architecture="encoder", head=HeadConfig(kind="masked_lm"))
PAIR = dataclasses.replace(DECODER, architecture="encoder_decoder", decoder_layers=3)
ROTARY = RotaryConfig(theta=100.0)


def changed(config: TransformerConfig, **changes) -> Model:
    return Model(dataclasses.replace(config, **changes))


def drawn(model: Model):
    """`drawn_like` of a model's parameters."""
    return drawn_like(model.shapes)


def drawn_like(shapes):
    """Parameters at random, none zero or one; drawn outside JAX, for an initialisation takes long to compile."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return rng.normal(float(path[-1].key == "scale"), 0.2, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, shapes)


def compiled(model: Model, method: str = "hidden"):
    """Jitted `(params, batch) → hidden states` or, for `__call__`, logits."""
    return jax.jit(lambda p, b: model.apply(p, b, method=method) if method == "hidden" else model.apply(p, b)[0])


def says(model: Model, params, batch, place: int, line: int = 0):
    """How much each entry of the vocabulary moves what a place of a row gives, and what all places give: where each token
    stands once, how much each token does. Hidden states, or of an untied encoder-decoder logits, in a direction at
    random, for a norm's output has the same square whatever moves."""

    def towards(params):
        if model.config.architecture == "encoder_decoder":
            assert not model.config.tie_embeddings, "else the table is the head's, too"
            y = model.apply(params, batch)[0]
        else:
            y = model.apply(params, batch, method="hidden")
        return y[line, place] @ jax.random.normal(jax.random.key(7), y.shape[2:]), y

    grad, y = jax.jit(jax.grad(towards, has_aux=True))(params)
    return np.abs(np.asarray(grad["transformer"]["embed"]["table"])).sum(axis=1), y


def row(*segments: int) -> dict[str, np.ndarray]:
    """Segments and positions of one row, e.g. `row(1, 1, 2, 2, 2, 0)`; each segment counts from 0."""
    segments_L = np.array(segments, np.int32)
    positions_L = np.array([np.sum(segments_L[:i] == s) for i, s in enumerate(segments)], np.int32)
    return {"segments_BL": segments_L[None], "positions_BL": positions_L[None]}


def stacked(*rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}


def scored(batch, seed: int = 0):
    """The batch with targets and uneven weights."""
    rng, shape = np.random.default_rng(seed), batch["tokens_BL"].shape
    return {**batch, "targets_BL": rng.integers(0, 40, shape).astype(np.int32), "weights_BL": rng.random(shape).astype(np.float32)}


def value_and_gradient(model: Model, batch, chunk: int = 4):
    return jax.jit(jax.value_and_grad(lambda p: model.apply(p, batch, method="loss", chunk=chunk)[0]))


def assert_same(one, two, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 2e-5, **tolerance}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), one, two)


# --- encoders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["learned", "rotary", "relative", "alibi"])
def encoded(request):
    """Two texts alone, then three rows: the first text padded, one of which each token stands once, both texts packed."""
    model = changed(ENCODER, vocab_size=32, position=request.param, rope=ROTARY, relative_buckets=8, relative_distance=6)
    params, hidden = drawn(model), compiled(model)
    first, second = tokens(1, 6, 15, seed=1), tokens(1, 6, 15, seed=2)
    alone = [hidden(params, {"tokens_BL": text})[0] for text in (first, second)]
    ids = np.stack([np.zeros(15), np.arange(15, 30), np.zeros(15)]).astype(np.int32)
    ids[0, :6], ids[2, :12] = first, np.concatenate([first, second], axis=1)
    batch = stacked(row(*[1] * 6, *[0] * 9), row(*[1] * 6, *[2] * 5, *[0] * 4), row(*[1] * 6, *[2] * 6, *[0] * 3))
    moved, together = says(model, params, {"tokens_BL": ids, **batch}, place=2, line=1)
    return alone, together, moved


def test_an_encoders_text_is_the_same_alone_padded_and_packed(encoded):
    alone, together, _ = encoded
    np.testing.assert_allclose(together[0, :6], alone[0], atol=1e-5, err_msg="padded, beside other rows")
    np.testing.assert_allclose(together[2, :6], alone[0], atol=1e-5, err_msg="first of a packed row")
    np.testing.assert_allclose(together[2, 6:12], alone[1], atol=1e-5, err_msg="second of a packed row")


def test_an_encoder_sees_all_of_its_text_and_nothing_else(encoded):
    """Place 2 of a packed row moves with each token of its text, before and after it, and not at all with another."""
    _, _, moved = encoded
    assert (moved[15:21] > 1e-4).all(), "its own text, later tokens as well"
    assert (moved[21:30] == 0).all(), "neither the other text nor padding"
    assert (moved[:15] == 0).all(), "nor other rows"


# --- encoder-decoders ---------------------------------------------------------------------------


SEVERAL = {
    "as T5": {
        "position": "relative", "relative_buckets": 8, "relative_distance": 6, "norm": "rmsnorm", "bias": False,
        "activation": "geglu", "attention_scale": 1.0,
    },
    "as BART": {
        "norm_position": "post", "embedding_norm": True, "embedding_scale": True, "position_offset": 2, "logit_bias": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=SEVERAL)
def paired(request):
    """Two pairs alone; then both packed, beside a row of which each token stands once. The packed decoder's row holds
    its texts in the other order, so that only their segments say what belongs together."""
    model = changed(PAIR, vocab_size=48, tie_embeddings=False, **SEVERAL[request.param])
    params, logits = drawn(model), compiled(model, "__call__")
    sources, texts = [tokens(1, 6, 20, seed=i) for i in (1, 2)], [tokens(1, 4, 20, seed=i) for i in (3, 4)]
    pairs = zip(sources, texts, strict=True)
    alone = [logits(params, {"encoder": {"tokens_BL": s}, "decoder": {"tokens_BL": t}})[0] for s, t in pairs]
    once = np.arange(20, 44, dtype=np.int32)[None]
    encoder = {"tokens_BL": np.concatenate([*sources, once[:, :2] * 0], axis=1), **row(*[1] * 6, *[2] * 6, 0, 0)}
    encoder = stacked(encoder, {"tokens_BL": once[:, 10:], **row(*[1] * 9, *[0] * 5)})
    decoder = {"tokens_BL": np.concatenate([*texts[::-1], once[:, :2] * 0], axis=1), **row(*[2] * 4, *[1] * 4, 0, 0)}
    decoder = stacked(decoder, {"tokens_BL": once[:, :10], **row(*[1] * 8, 0, 0)})
    moved, together = says(model, params, {"encoder": encoder, "decoder": decoder}, place=4, line=1)
    return alone, together, moved


def test_a_decoder_sees_its_past_and_the_whole_source_but_no_padding(paired):
    """Tokens 20–29 stand in the decoder, two of them padding, 30–43 in the encoder, five of them padding."""
    _, _, moved = paired
    assert (moved[20:25] > 1e-4).all(), "the decoder's past and present"
    assert (moved[25:30] == 0).all(), "not its future"
    assert (moved[30:39] > 1e-4).all(), "every token of the source"
    assert (moved[39:44] == 0).all(), "not the source's padding"
    assert (moved[:20] == 0).all(), "nor other rows"


def test_packed_pairs_give_the_logits_of_each_pair_alone(paired):
    alone, together, _ = paired
    np.testing.assert_allclose(together[0, 4:8], alone[0], atol=2e-5)
    np.testing.assert_allclose(together[0, :4], alone[1], atol=2e-5)


@pytest.fixture(scope="module")
def source() -> dict[str, np.ndarray]:
    return {"tokens_BL": tokens(2, 9, seed=1), **stacked(row(*[1] * 7, 0, 0), row(*[1] * 9))}


def test_the_loss_of_a_pair_is_over_the_decoders_targets(source):
    model = Model(PAIR)
    params, batch = drawn(model), {"encoder": source, "decoder": scored({"tokens_BL": tokens(2, 8, seed=2)})}
    own = batch["decoder"]
    both = jax.jit(lambda p: (model.apply(p, batch, method="loss", chunk=4, z_loss=0.1), model.apply(p, batch)[0]))
    (loss, nll), logits_BLV = both(params)
    logits_BLV = np.asarray(logits_BLV, np.float64)
    log_z_BL = np.log(np.exp(logits_BLV).sum(-1))
    nll_BL = log_z_BL - np.take_along_axis(logits_BLV, own["targets_BL"][:, :, None], -1)[:, :, 0]
    np.testing.assert_allclose(nll, np.sum(own["weights_BL"] * nll_BL), rtol=1e-5)
    np.testing.assert_allclose(loss, np.sum(own["weights_BL"] * (nll_BL + 0.1 * log_z_BL**2)), rtol=1e-5)


def test_an_unrolled_pair_is_a_scanned_and_rematerialised_one(source):
    config = dataclasses.replace(PAIR, position="relative", decoder_layers=2)
    batch = {"encoder": source, "decoder": scored({"tokens_BL": tokens(2, 8, seed=2)})}
    params = drawn(Model(config))
    plain = value_and_gradient(changed(config, unroll=True), batch)(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(plain)), "every parameter takes part"
    assert_same(plain, value_and_gradient(changed(config, remat="full"), batch)(params))


# --- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, window, length, place, seen",
    [
        (DECODER, 1, 12, 7, [7]),
        (DECODER, 9, 140, 100, range(92, 101)),  # long enough to be computed in blocks of queries
        (ENCODER, 4, 12, 7, range(5, 10)),
        (ENCODER, 5, 12, 7, range(5, 10)),
    ],
)
def test_a_layer_with_a_window_sees_it_and_nothing_else(config, window, length, place, seen):
    """A decoder's token itself and window − 1 before it, an encoder's window // 2 on each side."""
    model = changed(config, layers=1, layer_pattern="L", window=window, vocab_size=length, positions=length)
    moved, _ = says(model, drawn(model), {"tokens_BL": np.arange(length, dtype=np.int32)[None]}, place)
    assert np.flatnonzero(moved).tolist() == list(seen)
    assert moved[list(seen)].min() > 1e-5


@pytest.mark.parametrize(
    "pattern, layers, seen", [("L", 2, range(5, 10)), ("LG", 2, range(10)), ("LG", 1, range(7, 10)), ("GL", 1, range(10))]
)
def test_the_pattern_says_which_layers_have_a_window(pattern, layers, seen):
    """Two windows of 3 reach 4 back; one layer that sees all sees all; the first letter is the first layer's."""
    model = changed(DECODER, layers=layers, layer_pattern=pattern, window=3)
    moved, _ = says(model, drawn(model), {"tokens_BL": np.arange(12, dtype=np.int32)[None]}, 9)
    assert np.flatnonzero(moved).tolist() == list(seen)


def test_scanned_layers_of_both_kinds_are_unrolled_ones():
    config = dataclasses.replace(
        DECODER, layer_pattern="LG", window=3, position="rotary", rope=RotaryConfig(theta=100.0, local_theta=10.0)
    )
    params, batch = drawn(Model(config)), scored({"tokens_BL": tokens(2, 12)})
    plain = value_and_gradient(Model(config), batch)(params)
    assert_same(plain, value_and_gradient(changed(config, unroll=True), batch)(params))


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_pattern": "LG", "position": "rotary", "rope": RotaryConfig(theta=100.0, local_theta=10.0)},
        {"layer_pattern": "LG", "position": "relative", "relative_buckets": 8, "relative_distance": 6},
        {"layer_pattern": "L", "position": "alibi", "moe": MoeConfig(experts=4)},
    ],
    ids=["rotary", "relative", "alibi-moe"],
)
def test_cached_decoding_past_the_window_is_the_full_forward(changes):
    model = changed(DECODER, window=3, **changes)
    params, ids = drawn(model), tokens(2, 12)
    full = compiled(model, "__call__")(params, {"tokens_BL": ids})
    cache, apply, parts = empty_cache(model.config, 2), jax.jit(model.apply), []
    for piece in np.split(ids, 6, axis=1):
        logits, cache = apply(params, {"tokens_BL": piece}, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, atol=1e-5)


def test_a_long_row_in_blocks_of_queries_is_the_row_at_once():
    """140 tokens are computed in two blocks, each against the keys up to its end; behind an empty cache in one. Values
    and gradients, through a layer with a window and one without, with a bias and a cap of the scores."""
    model = changed(
        DECODER, positions=140, position="relative", relative_buckets=8, layer_pattern="LG", window=50, attention_softcap=2.0
    )  # fmt: skip
    params, batch = drawn(model), {"tokens_BL": tokens(2, 140)}
    direction_BLV = np.random.default_rng(0).normal(size=(2, 140, 40)).astype(np.float32) / 20

    def total(params, cache):
        return jnp.sum(model.apply(params, batch, cache)[0] * direction_BLV)

    both = jax.jit(jax.value_and_grad(total))
    assert_same(both(params, None), both(params, empty_cache(model.config, 2)), rtol=1e-4, atol=1e-4)


# --- the block ----------------------------------------------------------------------------------


def test_shared_layers_are_copies_of_one():
    """No axis of layers, and the values of a model that holds the same layer twice; its gradient is the sum of theirs."""
    shared, separate = (
        changed(ENCODER, share_layers=True, layer_pattern="LG", window=2),
        changed(ENCODER, layer_pattern="LG", window=2),
    )
    params = drawn(shared)
    one, many = (model.shapes["transformer"]["encoder"]["layers"] for model in (shared, separate))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal((2, *a.shape), b.shape), one, many)

    def inside(params, change):
        encoder = params["transformer"]["encoder"]
        layers = jax.tree.map(change, encoder["layers"])
        return {**params, "transformer": {**params["transformer"], "encoder": {**encoder, "layers": layers}}}

    batch = scored({"tokens_BL": tokens(2, 8), "segments_BL": np.array([[1] * 8, [1] * 6 + [0] * 2], np.int32)})
    ours, grad = value_and_gradient(shared, batch)(params)
    copies, copied_grad = value_and_gradient(separate, batch)(inside(params, lambda x: jnp.stack([x, x])))
    np.testing.assert_allclose(ours, copies, rtol=1e-6)
    assert_same(grad, inside(copied_grad, lambda x: x.sum(axis=0)))


# How each kind of block adds up: x the residual stream, n its norms, `a` and `m` attention and MLP, `first` the first block.
def _pre(x, n, a, m, first):
    x = x + a(n["attention_norm"](x))
    return x + m(n["mlp_norm"](x))


def _post(x, n, a, m, first):
    x = n["attention_norm"](x + a(x))
    return n["mlp_norm"](x + m(x))


def _both(x, n, a, m, first):
    x = x + n["attention_output_norm"](a(n["attention_norm"](x)))
    return x + n["mlp_output_norm"](m(n["mlp_norm"](x)))


def _output(x, n, a, m, first):
    x = x + n["attention_output_norm"](a(x))
    return x + n["mlp_output_norm"](m(x))


def _parallel(x, n, a, m, first):
    return x + a(n["attention_norm"](x)) + m(n["mlp_norm"](x))


def _normed_embeddings(x, n, a, m, first):
    x = x + a(x if first else n["attention_norm"](x))
    return x + m(n["mlp_norm"](x))


BLOCKS = {
    "pre": (_pre, {}),
    "post": (_post, {"norm_position": "post"}),
    "both": (_both, {"norm_position": "both"}),
    "both, offset": (_both, {"norm_position": "both", "norm": "rmsnorm", "norm_offset": True}),
    "output": (_output, {"norm_position": "output", "norm": "rmsnorm"}),
    "parallel": (_parallel, {"parallel": True}),
    "no first norm": (_normed_embeddings, {"first_norm": False}),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_by_hand(case):
    """Two blocks of each kind in numpy, float64, one text."""
    block, changes = BLOCKS[case]
    model = changed(DECODER, position="none", activation="relu", **changes)
    c, params = model.config, drawn(model)
    ids = tokens(1, 6)
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params["transformer"])

    def norm(p):
        def apply(x):
            x = x - x.mean(-1, keepdims=True) if c.norm == "layernorm" else x
            scale = p["scale"] + 1 if c.norm_offset else p["scale"]
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale + p.get("bias", 0)

        return apply

    def attention(p):
        def apply(x_LD):
            q, k, v = (np.einsum("LD,DNH->NLH", x_LD, p[n]["kernel"]) + p[n]["bias"][:, None] for n in ("query", "key", "value"))
            scores_NLS = np.where(np.tri(6, dtype=bool), np.einsum("NLH,NSH->NLS", q, k) / math.sqrt(4), -np.inf)
            weights_NLS = np.exp(scores_NLS) / np.exp(scores_NLS).sum(-1, keepdims=True)
            return np.einsum("NLS,NSH,NHD->LD", weights_NLS, v, p["out"]["kernel"]) + p["out"]["bias"]

        return apply

    def mlp(p):
        return lambda x: np.maximum(x @ p["up"]["kernel"] + p["up"]["bias"], 0) @ p["down"]["kernel"] + p["down"]["bias"]

    x_LD = weights["embed"]["table"][ids[0]]
    for i in range(2):
        layer = jax.tree.map(lambda x, i=i: x[i], weights["decoder"]["layers"])
        norms = {name: norm(p) for name, p in layer.items() if name.endswith("norm")}
        x_LD = block(x_LD, norms, attention(layer["attention"]), mlp(layer["mlp"]), i == 0)
    if case != "post":
        x_LD = norm(weights["decoder"]["final_norm"])(x_LD)
    np.testing.assert_allclose(compiled(model)(params, {"tokens_BL": ids})[0], x_LD, rtol=1e-4, atol=1e-4)


def test_a_scale_stored_less_one_starts_at_zero_and_means_one():
    x_BLD = jax.random.normal(jax.random.key(0), (1, 2, 16))
    offset, plain = (Norm(dataclasses.replace(DECODER, norm_offset=stored), "rmsnorm") for stored in (True, False))
    params, ones = (nn.unbox(norm.init(jax.random.key(0), x_BLD)) for norm in (offset, plain))
    np.testing.assert_array_equal(params["params"]["scale"], np.zeros(16))
    np.testing.assert_array_equal(ones["params"]["scale"], np.ones(16))
    np.testing.assert_array_equal(offset.apply(params, x_BLD), plain.apply(ones, x_BLD))


# --- experts ------------------------------------------------------------------------------------

MOE = MoeConfig(experts=4, chosen=2, balance_loss=0.5, router_z_loss=0.25)


def test_the_routers_losses_of_all_layers_of_both_stacks_reach_the_loss():
    """Indifferent routers by hand: a balance loss of 1 and a z-loss of ln² E a layer, times their weights and the
    weight of the targets."""
    model = changed(PAIR, moe=MOE)
    params = jax.tree.map_with_path(lambda path, x: 0 * x if "router" in str(path) else x, drawn(model))
    own = scored({"tokens_BL": tokens(2, 8)})
    batch = {"encoder": {"tokens_BL": tokens(2, 6)}, "decoder": own}
    loss, nll = jax.jit(lambda p: model.apply(p, batch, method="loss", chunk=8))(params)
    expected = own["weights_BL"].sum() * (2 + 3) * (0.5 + 0.25 * math.log(4) ** 2)
    np.testing.assert_allclose(loss - nll, expected, rtol=1e-4)


def test_padding_does_not_count_for_the_experts():
    """The loss with the routers' losses, and all gradients, are the same with five more places of padding a row."""
    model = changed(DECODER, layers=1, moe=MOE)
    params, batch = (
        drawn(model),
        scored({"tokens_BL": tokens(2, 8), "segments_BL": np.array([[1] * 8, [1] * 6 + [0] * 2], np.int32)}),
    )
    batch["weights_BL"] *= batch["segments_BL"]
    more = {name: np.concatenate([x, tokens(2, 5, seed=5).astype(x.dtype)], axis=1) for name, x in batch.items()}
    more["segments_BL"][:, 8:], more["weights_BL"][:, 8:] = 0, 0
    plain, padded = (value_and_gradient(model, b, chunk=1)(params) for b in (batch, more))
    assert_same(plain, padded)
    routers = plain[1]["transformer"]["decoder"]["layers"]["mlp"]["router"]
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(routers))


def test_a_train_step_moves_routers_and_experts():
    from jaxlm.parallel import ParallelConfig, make_mesh, place_batch
    from jaxlm.train import OptimConfig, init_state, make_optimizer, make_schedule, make_train_step, objectives

    mesh, model = make_mesh(ParallelConfig(), jax.devices()[:1]), changed(DECODER, layers=1, moe=MOE, dropout=0.1)
    settings = OptimConfig(learning_rate=1e-2, warmup=1)
    schedule = make_schedule(settings, 4)
    optimizer = make_optimizer(settings, schedule)
    state = init_state(model, optimizer, 0, mesh)
    step = make_train_step(model, objectives.tokens(8), optimizer, schedule, mesh, seed=0)
    before = jax.device_get(state.params)
    batch = place_batch(scored({"tokens_BL": tokens(4, 8)}), mesh)
    for _ in range(2):
        state, metrics = step(state, batch)
    assert metrics["skipped"] == 0 and metrics["loss"] > metrics["nll"] > 0
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.params))
    assert all(jax.tree.leaves(moved["transformer"]["decoder"]["layers"]["mlp"]))


# --- heads --------------------------------------------------------------------------------------


def test_pooling_by_hand_ignores_padding():
    hidden_BLD = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    segments_BL = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    x, y = hidden_BLD
    for kind, expected in {"first": [x[0], y[0]], "last": [x[2], y[4]], "mean": [x[:3].mean(0), y.mean(0)]}.items():
        np.testing.assert_allclose(pool(jnp.asarray(hidden_BLD), segments_BL, kind), expected, rtol=1e-5, atol=1e-6, err_msg=kind)
    for kind, expected in {"first": [x[0], y[0]], "last": [x[4], y[4]], "mean": [x.mean(0), y.mean(0)]}.items():
        np.testing.assert_allclose(pool(jnp.asarray(hidden_BLD), None, kind), expected, rtol=1e-5, atol=1e-6, err_msg=kind)


@pytest.mark.parametrize("config, kind", [(ENCODER, "mean"), (PAIR, "last")], ids=["encoder", "pair"])
def test_a_texts_scores_do_not_depend_on_padding(config, kind):
    """Of an encoder-decoder the decoder's padding decides; it differs from the encoder's."""
    model = changed(config, head=HeadConfig(kind="sequence", labels=3, pool=kind))
    params, score = drawn(model), jax.jit(model.apply)
    alone = {"tokens_BL": tokens(1, 6)}
    padded = {"tokens_BL": np.concatenate([alone["tokens_BL"], tokens(1, 4, seed=1)], axis=1), **row(*[1] * 6, *[0] * 4)}
    if config is PAIR:
        read = {"tokens_BL": tokens(1, 9, seed=2), **row(*[1] * 8, 0)}
        alone, padded = {"encoder": read, "decoder": alone}, {"encoder": read, "decoder": padded}
    np.testing.assert_allclose(score(params, padded), score(params, alone), atol=1e-5)


SHAPES = {"sequence": (3, 5), "choice": (3,), "token": (3, 7, 5), "span": (3, 7, 2), "detection": (3, 7), "embedding": (3, 16)}


@pytest.mark.parametrize("config, kind", [*((ENCODER, kind) for kind in SHAPES), (PAIR, "span")])
def test_shapes_of_the_heads(config, kind):
    model = changed(config, head=HeadConfig(kind=kind, labels=5, norm=True))
    batch = {"tokens_BL": jax.ShapeDtypeStruct((3, 7), jnp.int32)}
    batch = {"encoder": {"tokens_BL": jax.ShapeDtypeStruct((3, 4), jnp.int32)}, "decoder": batch} if config is PAIR else batch
    found = jax.eval_shape(model.apply, model.shapes, batch)
    assert (found.shape, found.dtype) == (SHAPES[kind], jnp.float32)


def test_an_embedding_is_the_pooled_state_through_its_dense_layer():
    model, bare = (changed(ENCODER, head=HeadConfig(kind="embedding", pool="mean", dense=dense)) for dense in (True, False))
    params, batch = drawn(model), {"tokens_BL": tokens(2, 6)}
    assert "head" not in bare.shapes
    mean_BD, vector_BD = jax.jit(lambda p: (bare.apply({"transformer": p["transformer"]}, batch), model.apply(p, batch)))(params)
    dense = params["head"]["dense"]
    np.testing.assert_allclose(vector_BD, np.tanh(np.asarray(mean_BD) @ dense["kernel"] + dense["bias"]), atol=1e-5)
    np.testing.assert_allclose(mean_BD, np.mean(compiled(bare)({"transformer": params["transformer"]}, batch), axis=1), atol=1e-5)


def test_a_label_head_drops_in_training_only():
    config = dataclasses.replace(ENCODER, dropout=0.5, head=HeadConfig(kind="sequence", dense=False, labels=16, bias=False))
    x_BD, params = jnp.ones((2, 16)), {"out": {"kernel": jnp.eye(16)}}
    np.testing.assert_array_equal(LabelHead(config, train=False).apply({"params": params}, x_BD), x_BD)
    scores = LabelHead(config, train=True).apply({"params": params}, x_BD, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(scores)) == {0.0, 2.0}, "each number is dropped or doubled"


# --- the loss with a bias -----------------------------------------------------------------------


@pytest.mark.parametrize("chunk, z_loss, cap", [(1, 1e-2, 3.0), (4, 1e-2, None), (12, 0.0, 3.0)])
def test_chunked_loss_with_a_bias_is_the_plain_loss(chunk, z_loss, cap):
    """A bias is a column of the table that every token's hidden state has a 1 for."""
    rng = np.random.default_rng(0)
    hidden_BLD, table_VD, bias_V = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 12, 8), (11, 8), (11,)))
    targets_BL, weights_BL = tokens(3, 12, 11), rng.random((3, 12)).astype(np.float32)

    def chunked(hidden_BLD, table_VD, bias_V):
        loss, nll = linear_cross_entropy(hidden_BLD, table_VD, bias_V, targets_BL, weights_BL, chunk, z_loss, cap)
        return 3 * loss, nll

    def plain(hidden_BLD, table_VD, bias_V):
        hidden = jnp.concatenate([hidden_BLD, jnp.ones((3, 12, 1))], axis=-1)
        table = jnp.concatenate([table_VD, bias_V[:, None]], axis=-1)
        loss, nll = plain_cross_entropy(hidden, table, targets_BL, weights_BL, z_loss, cap)
        return 3 * loss, nll

    ours, theirs = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(hidden_BLD, table_VD, bias_V) for f in (chunked, plain)
    )
    assert_same(ours, theirs, rtol=2e-4)
    np.testing.assert_allclose(chunked(hidden_BLD, table_VD, bias_V), plain(hidden_BLD, table_VD, bias_V), rtol=1e-5)


# --- dropout of attention -----------------------------------------------------------------------


def test_dropped_attention_weights_are_right_on_average():
    """The attention layer alone, which is linear in its weights: the mean over 400 draws is the value without dropout."""
    config = dataclasses.replace(DECODER, dropout=0.3, layer_pattern="LG", window=4)
    x_BLD = jax.random.normal(jax.random.key(1), (1, 8, 16))
    rest = (x_BLD, None, jnp.asarray(True), Mask(), None, None, None)
    layer = Attention(config, train=False)
    params = drawn_like(nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), *rest)))

    def draw(key):
        return Attention(config, train=True).apply(params, *rest, rngs={"dropout": key})[0]

    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 400))
    still = layer.apply(params, *rest)[0]
    without = Attention(dataclasses.replace(config, dropout=0.0), train=True).apply(params, *rest)[0]
    np.testing.assert_allclose(still, without, atol=1e-6, err_msg="at evaluation nothing is dropped")
    assert np.std(draws, axis=0).mean() > 0.1, "in training something is, and not the same each time"
    noise = np.std(draws, axis=0) / math.sqrt(400)
    np.testing.assert_array_less(np.abs(np.mean(draws, axis=0) - still), 5 * noise + 1e-5)
