"""What encoders, encoder-decoders and every choice of the block must be: who sees whom, and the same however computed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import plain_cross_entropy, tokens

from jaxlm.model import HeadConfig, Model, MoeConfig, RotaryConfig, TransformerConfig, empty_cache, linear_cross_entropy
from jaxlm.model.attention import Attention
from jaxlm.model.heads import LabelHead, pool
from jaxlm.model.kernels import Mask
from jaxlm.model.moe import balance_loss, z_loss

DECODER = TransformerConfig(vocab_size=40, positions=16, layers=2, width=16, heads=4, mlp_width=24)
ENCODER = dataclasses.replace(DECODER, architecture="encoder", head=HeadConfig(kind="masked_lm"))
PAIR = dataclasses.replace(DECODER, architecture="encoder_decoder", decoder_layers=3)
ROTARY = RotaryConfig(theta=100.0)


def changed(config: TransformerConfig, **changes) -> Model:
    return Model(dataclasses.replace(config, **changes))


def drawn(model: Model):
    """Parameters at random, none zero or one; drawn outside JAX, for an initialisation takes long to compile."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return rng.normal(float(path[-1].key == "scale"), 0.2, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, model.shapes)


def compiled(model: Model, method: str = "hidden"):
    """Jitted `(params, batch) → hidden states` or, for `__call__`, logits."""
    return jax.jit(lambda p, b: model.apply(p, b, method=method) if method == "hidden" else model.apply(p, b)[0])


def says(model: Model, params, batch, place: int) -> np.ndarray:
    """How much each entry of the vocabulary moves the hidden state at a place of the first row: where each token stands
    once, how much each token does. A direction at random, for a norm's output has the same square whatever moves."""
    direction_D = jax.random.normal(jax.random.key(7), (model.config.width,))
    grad = jax.jit(jax.grad(lambda p: model.apply(p, batch, method="hidden")[0, place] @ direction_D))(params)
    return np.abs(np.asarray(grad["transformer"]["embed"]["table"])).sum(axis=1)


def row(*segments: int) -> dict[str, np.ndarray]:
    """Segments and positions of one row, e.g. `row(1, 1, 2, 2, 2, 0)`; each segment counts from 0."""
    segments_L = np.array(segments, np.int32)
    positions_L = np.array([np.sum(segments_L[:i] == s) for i, s in enumerate(segments)], np.int32)
    return {"segments_BL": segments_L[None], "positions_BL": positions_L[None]}


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


@pytest.fixture(params=["learned", "rotary", "relative", "alibi"])
def encoder(request) -> Model:
    return changed(ENCODER, position=request.param, rope=ROTARY, relative_buckets=8, relative_distance=6)


def test_an_encoders_text_is_the_same_alone_padded_and_packed(encoder):
    params, hidden = drawn(encoder), compiled(encoder)
    first, second, filler = tokens(1, 6, seed=1), tokens(1, 6, seed=2), tokens(3, 15, seed=3)
    alone = [hidden(params, {"tokens_BL": text})[0] for text in (first, second)]
    rows = [row(*[1] * 6, *[0] * 9), row(*[1] * 15), row(*[1] * 6, *[2] * 6, *[0] * 3)]
    batch = {"tokens_BL": filler, **{name: np.concatenate([r[name] for r in rows]) for name in rows[0]}}
    batch["tokens_BL"][0, :6], batch["tokens_BL"][2, :12] = first, np.concatenate([first, second], axis=1)
    together = hidden(params, batch)
    np.testing.assert_allclose(together[0, :6], alone[0], atol=1e-5, err_msg="padded, beside other rows")
    np.testing.assert_allclose(together[2, :6], alone[0], atol=1e-5, err_msg="first of a packed row")
    np.testing.assert_allclose(together[2, 6:12], alone[1], atol=1e-5, err_msg="second of a packed row")
    assert not np.allclose(together[1, :6], alone[0], atol=0.1)


def test_an_encoder_sees_all_of_its_text_and_nothing_else(encoder):
    """Segments 1, 2 and padding in one row, each token once: place 2 moves with each token of segment 1, before and
    after it, and not at all with another."""
    batch = {"tokens_BL": np.arange(12, dtype=np.int32)[None], **row(*[1] * 5, *[2] * 4, *[0] * 3)}
    moved = says(encoder, drawn(encoder), batch, 2)
    assert (moved[:5] > 1e-4).all(), "its own text, later tokens as well"
    assert (moved[5:] == 0).all(), "neither the other text nor padding"


# --- encoder-decoders ---------------------------------------------------------------------------


@pytest.fixture(params=["as T5", "as BART"])
def pair(request) -> Model:
    if request.param == "as T5":
        return changed(
            PAIR, position="relative", relative_buckets=8, relative_distance=6, norm="rmsnorm", bias=False, activation="geglu",
            attention_scale=1.0, tie_embeddings=False,
        )  # fmt: skip
    return changed(PAIR, norm_position="post", embedding_norm=True, embedding_scale=True, position_offset=2, logit_bias=True)


def test_a_decoder_sees_its_past_and_the_whole_source_but_no_padding(pair):
    """Each token once: 0–9 in the decoder, two of them padding, 20–29 in the encoder, three of them padding."""
    decoder = {"tokens_BL": np.arange(10, dtype=np.int32)[None], **row(*[1] * 8, 0, 0)}
    encoder = {"tokens_BL": np.arange(20, 30, dtype=np.int32)[None], **row(*[1] * 7, 0, 0, 0)}
    moved = says(pair, drawn(pair), {"encoder": encoder, "decoder": decoder}, 4)
    assert (moved[:5] > 1e-4).all(), "the decoder's past and present"
    assert (moved[5:20] == 0).all(), "not its future"
    assert (moved[20:27] > 1e-4).all(), "every token of the source"
    assert (moved[27:] == 0).all(), "not the source's padding"


def test_packed_pairs_give_the_logits_of_each_pair_alone(pair):
    """The decoder's row holds the texts in the other order, so that only their segments say what belongs together."""
    params, logits = drawn(pair), compiled(pair, "__call__")
    sources, texts = [tokens(1, 6, seed=i) for i in (1, 2)], [tokens(1, 4, seed=i) for i in (3, 4)]
    filler = tokens(1, 2, seed=5)
    packed = {
        "encoder": {"tokens_BL": np.concatenate([*sources, filler], axis=1), **row(*[1] * 6, *[2] * 6, 0, 0)},
        "decoder": {"tokens_BL": np.concatenate([*texts[::-1], filler], axis=1), **row(*[2] * 4, *[1] * 4, 0, 0)},
    }
    together = logits(params, packed)[0]
    for places, source, text in zip((slice(4, 8), slice(0, 4)), sources, texts, strict=True):
        alone = logits(params, {"encoder": {"tokens_BL": source}, "decoder": {"tokens_BL": text}})[0]
        np.testing.assert_allclose(together[places], alone, atol=2e-5)


@pytest.fixture(scope="module")
def source() -> dict[str, np.ndarray]:
    rows = [row(*[1] * 7, 0, 0), row(*[1] * 9)]
    return {"tokens_BL": tokens(2, 9, seed=1), **{name: np.concatenate([r[name] for r in rows]) for name in rows[0]}}


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


def test_a_scanned_pair_is_an_unrolled_and_rematerialised_one(source):
    config = dataclasses.replace(PAIR, position="relative", decoder_layers=2)
    batch = {"encoder": source, "decoder": scored({"tokens_BL": tokens(2, 8, seed=2)})}
    params = drawn(Model(config))
    plain = value_and_gradient(Model(config), batch)(params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(plain)), "every parameter takes part"
    for changes in ({"unroll": True}, {"remat": "full"}):
        assert_same(plain, value_and_gradient(changed(config, **changes), batch)(params))


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
    moved = says(model, drawn(model), {"tokens_BL": np.arange(length, dtype=np.int32)[None]}, place)
    assert np.flatnonzero(moved).tolist() == list(seen)
    assert moved[list(seen)].min() > 1e-5


@pytest.mark.parametrize(
    "pattern, layers, seen", [("L", 2, range(5, 10)), ("LG", 2, range(10)), ("LG", 1, range(7, 10)), ("GL", 1, range(10))]
)
def test_the_pattern_says_which_layers_have_a_window(pattern, layers, seen):
    """Two windows of 3 reach 4 back; one layer that sees all sees all; the first letter is the first layer's."""
    model = changed(DECODER, layers=layers, layer_pattern=pattern, window=3)
    moved = says(model, drawn(model), {"tokens_BL": np.arange(12, dtype=np.int32)[None]}, 9)
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
        {"layer_pattern": "L", "position": "alibi"},
        {"layer_pattern": "GL", "position": "sinusoidal", "moe": MoeConfig(experts=4)},
    ],
    ids=["rotary", "relative", "alibi", "sinusoidal-moe"],
)
def test_cached_decoding_past_the_window_is_the_full_forward(changes):
    model = changed(DECODER, window=3, **changes)
    params, ids = drawn(model), tokens(2, 12)
    full = compiled(model, "__call__")(params, {"tokens_BL": ids})
    cache, apply, parts = empty_cache(model.config, 2), jax.jit(model.apply), []
    for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:]):
        logits, cache = apply(params, {"tokens_BL": piece}, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, atol=1e-5)


@pytest.mark.parametrize("pattern", ["G", "L"])
def test_a_long_row_in_blocks_of_queries_is_the_row_at_once(pattern):
    """140 tokens are computed in two blocks, each against the keys up to its end; behind an empty cache in one. Values
    and gradients, with a bias of the scores and packed texts."""
    model = changed(
        DECODER, layers=1, positions=140, position="relative", relative_buckets=8, layer_pattern=pattern, window=50,
        attention_softcap=2.0,
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
    shared, stacked = (
        changed(ENCODER, share_layers=True, layer_pattern="LG", window=2),
        changed(ENCODER, layer_pattern="LG", window=2),
    )
    params = drawn(shared)
    one, many = (model.shapes["transformer"]["encoder"]["layers"] for model in (shared, stacked))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal((2, *a.shape), b.shape), one, many)

    def inside(params, change):
        encoder = params["transformer"]["encoder"]
        layers = jax.tree.map(change, encoder["layers"])
        return {**params, "transformer": {**params["transformer"], "encoder": {**encoder, "layers": layers}}}

    batch = scored({"tokens_BL": tokens(2, 8), "segments_BL": np.array([[1] * 8, [1] * 6 + [0] * 2], np.int32)})
    ours, grad = value_and_gradient(shared, batch)(params)
    copies, copied_grad = value_and_gradient(stacked, batch)(inside(params, lambda x: jnp.stack([x, x])))
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
    offset, plain = changed(DECODER, norm_offset=True, layers=1), changed(DECODER, layers=1)
    params, batch = offset.init(jax.random.key(0)), {"tokens_BL": tokens(1, 8)}
    flat = jax.tree.leaves_with_path(params)
    scales = [leaf for path, leaf in flat if path[-1].key == "scale"]
    assert len(scales) == 3 and not any(np.any(scale) for scale in scales)
    raised = jax.tree.map_with_path(lambda path, x: x + 1 if path[-1].key == "scale" else x, params)
    np.testing.assert_array_equal(compiled(offset)(params, batch), compiled(plain)(raised, batch))


# --- experts ------------------------------------------------------------------------------------

MOE = MoeConfig(experts=4, chosen=2, balance_loss=0.5, router_z_loss=0.25)


@pytest.mark.parametrize("config, layers", [(DECODER, 2), (PAIR, 5)], ids=["decoder", "pair"])
def test_the_routers_losses_of_all_layers_reach_the_loss(config, layers):
    """Indifferent routers by hand: a balance loss of 1 and a z-loss of ln² E a layer, times their weights and the
    weight of the targets."""
    model = changed(config, moe=MOE)
    params = jax.tree.map_with_path(lambda path, x: 0 * x if "router" in str(path) else x, drawn(model))
    batch = scored({"tokens_BL": tokens(2, 8)})
    weight = batch["weights_BL"].sum()
    batch = {"encoder": {"tokens_BL": tokens(2, 6)}, "decoder": batch} if config is PAIR else batch
    loss, nll = jax.jit(lambda p: model.apply(p, batch, method="loss", chunk=8))(params)
    np.testing.assert_allclose(loss - nll, weight * layers * (0.5 + 0.25 * math.log(4) ** 2), rtol=1e-4)


def test_the_routers_losses_by_hand():
    """Two tokens kept, one left out: f = (1/2, 1/2, 0), p the mean of the first two."""
    probabilities_BLE = jnp.array([[[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.0, 0.0, 1.0]]])
    keep_BL = jnp.array([[True, True, False]])
    found = balance_loss(probabilities_BLE, jnp.array([[[0], [1], [2]]]), keep_BL)
    np.testing.assert_allclose(found, 3 * (0.5 * 0.35 + 0.5 * 0.45), rtol=1e-6)
    logits_BLE = jnp.log(jnp.array([[[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [9.0, 9.0, 9.0]]]))
    np.testing.assert_allclose(z_loss(logits_BLE, keep_BL), (math.log(3) ** 2 + math.log(6) ** 2) / 2, rtol=1e-6)


def test_padding_does_not_count_for_the_experts():
    """The loss with the routers' losses, and all gradients, are the same with five more places of padding a row."""
    model = changed(DECODER, moe=MOE)
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
    from jaxlm.train import OptimConfig, causal, init_state, make_optimizer, make_schedule, make_train_step

    mesh, model = make_mesh(ParallelConfig(), jax.devices()[:1]), changed(DECODER, moe=MOE, dropout=0.1)
    settings = OptimConfig(learning_rate=1e-2, warmup=1)
    schedule = make_schedule(settings, 4)
    optimizer = make_optimizer(settings, schedule)
    state = init_state(model, optimizer, 0, mesh)
    step = make_train_step(model, causal(8), optimizer, schedule, mesh, seed=0)
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


@pytest.mark.parametrize(
    "kind, shape",
    [
        ("sequence", (3, 5)),
        ("choice", (3,)),
        ("token", (3, 7, 5)),
        ("span", (3, 7, 2)),
        ("detection", (3, 7)),
        ("embedding", (3, 16)),
    ],
)
@pytest.mark.parametrize("config", [ENCODER, DECODER, PAIR], ids=["encoder", "decoder", "pair"])
def test_shapes_of_the_heads(kind, shape, config):
    for dense in (True, False):
        model = changed(config, head=HeadConfig(kind=kind, labels=5, dense=dense, norm=True))
        batch = {"tokens_BL": jax.ShapeDtypeStruct((3, 7), jnp.int32)}
        batch = {"encoder": {"tokens_BL": jax.ShapeDtypeStruct((3, 4), jnp.int32)}, "decoder": batch} if config is PAIR else batch
        found = jax.eval_shape(model.apply, model.shapes, batch)
        assert (found.shape, found.dtype) == (shape, jnp.float32)


def test_an_embedding_is_the_pooled_state_through_its_dense_layer():
    model = changed(ENCODER, head=HeadConfig(kind="embedding", pool="mean"))
    bare = changed(ENCODER, head=HeadConfig(kind="embedding", pool="mean", dense=False))
    params, batch = drawn(model), {"tokens_BL": tokens(2, 6)}
    mean_BD = np.asarray(compiled(model)(params, batch)).mean(axis=1)
    dense = params["head"]["dense"]
    expected = np.tanh(mean_BD @ dense["kernel"] + dense["bias"])
    np.testing.assert_allclose(jax.jit(model.apply)(params, batch), expected, atol=1e-5)
    assert "head" not in bare.shapes
    np.testing.assert_allclose(jax.jit(bare.apply)({"transformer": params["transformer"]}, batch), mean_BD, atol=1e-5)


def test_a_label_head_drops_in_training_only():
    config = dataclasses.replace(ENCODER, dropout=0.5, head=HeadConfig(kind="sequence", dense=False, labels=16, bias=False))
    x_BD, params = jnp.ones((2, 16)), {"out": {"kernel": jnp.eye(16)}}
    np.testing.assert_array_equal(LabelHead(config, train=False).apply({"params": params}, x_BD), x_BD)
    scores = LabelHead(config, train=True).apply({"params": params}, x_BD, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(scores)) == {0.0, 2.0}, "each number is dropped or doubled"


# --- the loss with a bias -----------------------------------------------------------------------


@pytest.mark.parametrize("chunk, z_loss, cap", [(1, 1e-2, 3.0), (4, 0.0, None), (4, 1e-2, 3.0), (12, 1e-2, None)])
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


@pytest.mark.parametrize("pattern", ["G", "LG"])
def test_dropped_attention_weights_are_right_on_average(pattern):
    """The attention layer alone, which is linear in its weights: the mean over 400 draws is the value without dropout."""
    config = dataclasses.replace(DECODER, dropout=0.3, layer_pattern=pattern, window=4)
    x_BLD = jax.random.normal(jax.random.key(1), (1, 8, 16))
    rest = (x_BLD, None, jnp.asarray(True), Mask(), None, None)
    params = Attention(dataclasses.replace(config, init_std=0.5), train=False).init(jax.random.key(0), *rest)

    def draw(key):
        return Attention(config, train=True).apply(params, *rest, rngs={"dropout": key})[0]

    draws = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(2), 400))
    still = Attention(config, train=False).apply(params, *rest)[0]
    without = Attention(dataclasses.replace(config, dropout=0.0), train=True).apply(params, *rest)[0]
    np.testing.assert_allclose(still, without, atol=1e-6, err_msg="at evaluation nothing is dropped")
    assert np.std(draws, axis=0).mean() > 0.1, "in training something is, and not the same each time"
    noise = np.std(draws, axis=0) / math.sqrt(400)
    np.testing.assert_array_less(np.abs(np.mean(draws, axis=0) - still), 5 * noise + 1e-5)
