"""Every objective is the formula of its paper, computed the long way, and blind to how rows are padded and divided."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.model import Detection, HeadConfig, Model, MoeConfig, TransformerConfig
from jaxlm.model.transformer import Transformer
from jaxlm.train import objectives

RNG = np.random.default_rng(0)
B, L, C = 6, 5, 4


def given(params, batch, **options):
    """A model whose scores are the parameters themselves."""
    return params, None


def value(objective, scores, batch):
    loss, weight, metrics = objective(given, jnp.asarray(scores, jnp.float32), batch, None)
    return float(loss), float(weight), {name: float(x) for name, x in metrics.items()}


def softmax(x):
    return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


def arrays(**made):
    return {name: jnp.asarray(x, jnp.int32 if np.asarray(x).dtype.kind in "iu" else jnp.float32) for name, x in made.items()}


def test_classes_are_cross_entropy_with_label_smoothing_and_class_weights():
    scores, labels, weights = RNG.normal(size=(B, C)), RNG.integers(0, C, B), np.array([1.0, 1, 0, 1, 1, 0])
    logp = np.log(softmax(scores))
    batch = arrays(labels_B=labels, weights_B=weights)
    loss, weight, _ = value(objectives.classes(), scores, batch)
    assert weight == 4 and loss == pytest.approx(-sum(w * logp[i, y] for i, (w, y) in enumerate(zip(weights, labels, strict=True))))
    smooth, _, _ = value(objectives.classes(smoothing=0.2), scores, batch)
    targets = np.full((B, C), 0.2 / C) + 0.8 * np.eye(C)[labels]
    assert smooth == pytest.approx(-(weights[:, None] * targets * logp).sum(), rel=1e-5)
    by_class = [0.5, 2.0, 1.0, 3.0]
    loss, weight, _ = value(objectives.classes(by_class), scores, batch)
    own = weights * np.array(by_class)[labels]
    assert weight == pytest.approx(own.sum()) and loss == pytest.approx(-(own * logp[np.arange(B), labels]).sum(), rel=1e-5)


@pytest.mark.parity
def test_weighted_classes_are_torchs():
    torch = pytest.importorskip("torch")
    scores, labels, by_class = RNG.normal(size=(B, C)).astype(np.float32), RNG.integers(0, C, B), [0.5, 2.0, 1.0, 3.0]
    theirs = torch.nn.CrossEntropyLoss(weight=torch.tensor(by_class), label_smoothing=0.0)
    expected = theirs(torch.tensor(scores), torch.tensor(labels)).item()
    loss, weight, _ = value(objectives.classes(by_class), scores, arrays(labels_B=labels, weights_B=np.ones(B)))
    assert loss / weight == pytest.approx(expected, rel=1e-5)
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(torch.tensor(scores), torch.tensor(labels)).item()
    loss, weight, _ = value(objectives.classes(smoothing=0.1), scores, arrays(labels_B=labels, weights_B=np.ones(B)))
    assert loss / weight == pytest.approx(smooth, rel=1e-5)


def test_tags_count_every_weighted_token_once():
    scores, labels = RNG.normal(size=(B, L, C)), RNG.integers(0, C, (B, L))
    weights = RNG.integers(0, 2, (B, L)).astype(float)
    logp = np.log(softmax(scores))
    loss, weight, _ = value(objectives.classes(), scores, arrays(labels_BL=labels, weights_BL=weights))
    expected = -sum(weights[i, j] * logp[i, j, labels[i, j]] for i in range(B) for j in range(L))
    assert weight == weights.sum() and loss == pytest.approx(expected, rel=1e-5)


def test_several_classes_are_binary_cross_entropies():
    scores, labels, weights = RNG.normal(size=(B, C)), RNG.integers(0, 2, (B, C)).astype(float), np.array([1.0, 0, 1, 1, 1, 1])
    p = 1 / (1 + np.exp(-scores))
    each = -(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    loss, _, _ = value(objectives.several_classes(), scores, arrays(labels_BC=labels, weights_B=weights))
    assert loss == pytest.approx((each.mean(1) * weights).sum(), rel=1e-5)
    loss, _, _ = value(objectives.several_classes([2.0] * C), scores, arrays(labels_BC=labels, weights_B=weights))
    assert loss == pytest.approx(((each * np.where(labels > 0, 2, 1)).mean(1) * weights).sum(), rel=1e-5)


def test_spans_are_two_cross_entropies_over_the_allowed_tokens():
    scores, allowed = RNG.normal(size=(B, L, 2)), np.ones((B, L), int)
    allowed[:, 3] = 0
    begin, end = RNG.integers(0, 3, B), RNG.integers(0, 3, B)
    kept = [0, 1, 2, 4]
    expected = 0.0
    for i in range(B):
        for side, gold in ((0, begin), (1, end)):
            expected -= np.log(softmax(scores[i, kept, side]))[kept.index(gold[i])] / 2
    loss, _, _ = value(objectives.spans(), scores, arrays(allowed_BL=allowed, begin_B=begin, end_B=end, weights_B=np.ones(B)))
    assert loss == pytest.approx(expected, rel=1e-5)


def test_choices_leave_out_options_that_a_row_lacks():
    batch = arrays(tokens_BOL=np.zeros((2, 3, L), int), options_BO=np.array([[1.0, 1, 1], [1, 1, 0]]), labels_B=np.array([2, 0]),
                   weights_B=np.ones(2))  # fmt: skip
    scores = RNG.normal(size=6)
    loss, _, _ = value(objectives.choices(), scores, batch)
    expected = -np.log(softmax(scores[:3]))[2] - np.log(softmax(scores[3:5]))[0]
    assert loss == pytest.approx(expected, rel=1e-5)


def test_contrast_is_infonce_over_the_rows_that_count():
    vectors = {name: RNG.normal(size=(4, 3)) for name in ("anchor", "positive", "negative")}
    weights = np.array([1.0, 1, 1, 0])

    def apply(params, batch, **options):
        return batch["x"], None

    batch = {name: {"x": jnp.asarray(x, jnp.float32)} for name, x in vectors.items()} | arrays(weights_B=weights)
    loss, weight, metrics = objectives.contrast(0.1)(apply, None, batch, None)
    unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in vectors.items()}
    keys = np.concatenate([unit["positive"][:3], unit["negative"][:3]])
    scores = unit["anchor"][:3] @ keys.T / 0.1
    expected = -np.log(softmax(scores))[np.arange(3), np.arange(3)].sum()
    assert float(weight) == 3 and float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["matched"]) == (scores.argmax(1) == np.arange(3)).sum()


def test_preference_is_dpo_and_ipo_with_their_gradients():
    """Loss and gradient against a computation in float64 by finite differences."""
    chosen, rejected, reference = RNG.normal(size=(3, B)) * 3 - 5
    batch = arrays(reference_chosen_B=reference, reference_rejected_B=reference - 0.3, weights_B=np.array([1.0] * 5 + [0]))
    batch |= {"chosen": {"which": 0}, "rejected": {"which": 1}}

    def apply(params, row, **options):
        assert options["method"] == "log_likelihood"
        return params[row["which"]], None

    def by_hand(kind, x):
        h = (x[0] - reference) - (x[1] - (reference - 0.3))
        each = np.log1p(np.exp(-0.2 * h)) if kind == "dpo" else (h - 1 / 0.4) ** 2
        return each[:5].sum()

    x = np.stack([chosen, rejected])
    for kind in ("dpo", "ipo"):
        objective = objectives.preference(kind, 0.2, 8)
        loss, gradient = jax.value_and_grad(lambda p, o=objective: o(apply, p, batch, None)[0])(jnp.asarray(x, jnp.float32))
        assert float(loss) == pytest.approx(by_hand(kind, x), rel=1e-4)
        for i in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[i] = 1e-5
            slope = (by_hand(kind, x + step) - by_hand(kind, x - step)) / 2e-5
            assert float(gradient[i]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_reward_is_bradley_terry():
    chosen, rejected = RNG.normal(size=(2, B))

    def apply(params, row, **options):
        return row["x"][:, None], None

    batch = {"chosen": arrays(x=chosen), "rejected": arrays(x=rejected), **arrays(weights_B=np.ones(B))}
    loss, _, metrics = objectives.reward()(apply, None, batch, None)
    assert float(loss) == pytest.approx(-np.log(1 / (1 + np.exp(rejected - chosen))).sum(), rel=1e-5)
    assert float(metrics["preferred"]) == (chosen > rejected).sum()


TINY = TransformerConfig(vocab_size=16, positions=12, layers=2, width=16, heads=2)


def language_batch(rows=4, length=8):
    tokens, targets = RNG.integers(0, 16, (2, rows, length))
    return arrays(tokens_BL=tokens, targets_BL=targets, weights_BL=RNG.integers(0, 2, (rows, length)).astype(float))


def test_the_log_likelihood_of_rows_is_that_of_their_logits():
    model, batch = Model(TINY), language_batch()
    params = model.init(jax.random.key(0))
    logits = np.asarray(model.apply(params, batch)[0], np.float64)
    logp = np.log(softmax(logits))
    rows = [sum(w * logp[i, j, t] for j, (w, t) in enumerate(zip(batch["weights_BL"][i], batch["targets_BL"][i], strict=True)))
            for i in range(4)]  # fmt: skip
    for chunk in (3, 4, 8):
        np.testing.assert_allclose(model.apply(params, batch, method="log_likelihood", chunk=chunk)[0], rows, rtol=1e-4)


@pytest.mark.parametrize("chunk", [2, 8])
def test_label_smoothing_over_the_vocabulary_and_its_gradient(chunk):
    model, batch = Model(TINY), language_batch()
    params = model.init(jax.random.key(0))

    def plain(params):
        logits = model.apply(params, batch)[0]
        losses = objectives.cross_entropy(logits, batch["targets_BL"], 0.1)
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        return jnp.sum((losses + 0.01 * z) * batch["weights_BL"])

    expected, slope = jax.value_and_grad(plain)(params)
    (loss, nll), gradient = jax.value_and_grad(
        lambda p: (lambda parts: (parts[0], parts[1]))(
            model.apply(p, batch, method="loss", chunk=chunk, z_loss=0.01, smoothing=0.1)
        ),
        has_aux=True,
    )(params)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5) and float(nll) < float(loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, slope)


def test_drawn_tokens_follow_the_models_distribution():
    model = Model(TINY)
    params = jax.tree.map(lambda x: x * 8, model.init(jax.random.key(1)))
    batch = {"tokens_BL": jnp.tile(jnp.arange(4, dtype=jnp.int32)[None, :], (4000, 1))}
    drawn = np.asarray(jax.jit(lambda: model.apply(params, batch, method="draw", chunk=2, key=jax.random.key(3)))())
    expected = softmax(np.asarray(model.apply(params, {"tokens_BL": batch["tokens_BL"][:1]})[0][0], np.float64))
    for place in range(4):
        counts = np.bincount(drawn[:, place], minlength=16)
        keep = expected[place] * 4000 >= 5
        chi = (((counts - expected[place] * 4000) ** 2)[keep] / (expected[place] * 4000)[keep]).sum()
        assert chi < 45  # the 99.99% point of chi-square with 15 degrees is 44.3


ENCODER = TransformerConfig(
    vocab_size=16, positions=12, layers=2, width=16, heads=4, architecture="encoder", norm_position="post", embedding_norm=True,
    head=HeadConfig(kind="detection", activation="gelu"),
)  # fmt: skip


def test_replaced_token_detection_trains_both_models_and_leaves_the_generator_out_of_the_discriminators_loss():
    model = Detection(ENCODER, share=0.5)
    params = model.init(jax.random.key(0))
    assert "embed" not in params["generator"]["transformer"], "the generator reads the discriminator's embeddings"
    batch = language_batch()
    objective = objectives.replaced(chunk=4, share=50.0)

    def parts(params):
        loss, weight, metrics = objective(model.apply, params, batch, jax.random.key(5))
        return loss, (weight, metrics)

    (loss, (weight, metrics)), gradient = jax.value_and_grad(parts, has_aux=True)(params)
    assert float(loss) == pytest.approx(float(metrics["nll"] + 50 * metrics["detection_loss"]), rel=1e-5)
    assert float(weight) == float(batch["weights_BL"].sum())
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["discriminator"]["head"]))
    # It used to be given the sum that has no gradient: the generator never learned.
    alone = jax.grad(lambda p: model.apply(p, batch, part="generator", method="loss", chunk=12)[0])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient["generator"], alone["generator"])
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["generator"]["head"]))
    # By hand: what the discriminator sees is the original where nothing is masked.
    seen = {}

    def spy(params, batch, **options):
        if options.get("part") == "discriminator":
            seen.update(batch)
        return model.apply(params, batch, **options)

    objective(spy, params, batch, jax.random.key(5))
    kept = np.asarray(batch["weights_BL"]) == 0
    np.testing.assert_array_equal(np.asarray(seen["tokens_BL"])[kept], np.asarray(batch["targets_BL"])[kept])


def test_the_pair_head_adds_its_weighted_cross_entropy():
    head = HeadConfig(kind="masked_lm", activation="gelu", norm=True, pair=True)
    model = Model(TransformerConfig(**{**TINY.__dict__, "architecture": "encoder", "token_types": 2, "head": head}))
    params = model.init(jax.random.key(0))
    batch = language_batch() | arrays(labels_B=np.array([0, 1, 1, 0]))
    alone, weight, _ = objectives.tokens(8)(model.apply, params, batch, None)
    both, _, metrics = objectives.tokens(8, pair_weight=2.5)(model.apply, params, batch, None)
    _, scores = model.apply(params, batch, method="loss_and_pair", chunk=8)
    logp = np.log(softmax(np.asarray(scores, np.float64)))
    rows = np.asarray(batch["weights_BL"]).sum(1) > 0
    expected = -2.5 * logp[np.arange(4), [0, 1, 1, 0]][rows].sum()
    assert float(metrics["pair_loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(both) == pytest.approx(float(alone) + expected, rel=1e-4) and float(weight) == batch["weights_BL"].sum()


EXPERTS = MoeConfig(experts=4, chosen=2, balance_loss=0.5, router_z_loss=0.25)


def label_batch(objective):
    """(head, batch, objective) of each loss that is not over the vocabulary of a batch's own targets."""
    texts, again = language_batch(), language_batch()
    rows = arrays(labels_B=np.array([0, 1, 1, 0]), weights_B=np.ones(4))
    pair = {"chosen": texts, "rejected": again, **arrays(weights_B=np.array([1.0, 1, 1, 0]))}
    reference = {f"reference_{name}_B": jnp.zeros(4) for name in ("chosen", "rejected")}
    options = {name.replace("_BL", "_BOL"): x.reshape(2, 2, -1) for name, x in texts.items()}
    return {
        "classes": (HeadConfig(kind="sequence", labels=3), texts | rows, objectives.classes()),
        "weighted classes": (HeadConfig(kind="sequence", labels=3), texts | rows, objectives.classes([1.0, 2.0, 3.0])),
        "tags": (HeadConfig(kind="token", labels=3), texts | {"labels_BL": texts["tokens_BL"] % 3}, objectives.classes()),
        "several": (HeadConfig(kind="sequence", labels=2), texts | rows | {"labels_BC": jnp.eye(4, 2)},
                    objectives.several_classes()),
        "squares": (HeadConfig(kind="sequence", labels=1), texts | rows | {"labels_B": jnp.ones(4)}, objectives.squares()),
        "spans": (
            HeadConfig(kind="span"),
            texts | rows | arrays(begin_B=[0, 1, 2, 3], end_B=[1, 2, 3, 4], allowed_BL=np.ones((4, 8), int)),
            objectives.spans(),
        ),
        "choices": (
            HeadConfig(kind="choice"), options | arrays(options_BO=np.ones((2, 2)), labels_B=[0, 1], weights_B=np.ones(2)),
            objectives.choices(),
        ),
        "contrast": (
            HeadConfig(kind="embedding", pool="mean"), {"anchor": texts, "positive": again, **arrays(weights_B=np.ones(4))},
            objectives.contrast(0.1),
        ),
        "dpo": (HeadConfig(), pair | reference, objectives.preference("dpo", 0.1, 8)),
        "reward": (HeadConfig(kind="sequence", labels=1, pool="last"), pair, objectives.reward()),
    }[objective]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["classes", "weighted classes", "tags", "several", "squares", "spans", "choices", "contrast", "dpo", "reward"]
)
def test_every_objective_adds_the_routers_losses_at_its_weight(name):
    """The difference that the router losses make is the mean over the model's calls of what the Transformer reports."""
    head, batch, objective = label_batch(name)
    config = dataclasses.replace(TINY, head=head, moe=EXPERTS)
    silent = dataclasses.replace(config, moe=dataclasses.replace(EXPERTS, balance_loss=0.0, router_z_loss=0.0))
    params = Model(config).init(jax.random.key(0))
    calls = [batch[part] for part in ("anchor", "positive", "chosen", "rejected") if part in batch] or [batch]
    calls = [
        {key.replace("_BOL", "_BL"): x.reshape(-1, 8) if key.endswith("_BOL") else x for key, x in one.items()} for one in calls
    ]

    @jax.jit
    def compute(params):
        loss, weight, _ = objective(Model(config).apply, params, batch, None)
        own = [Transformer(config).apply({"params": params["transformer"]}, one).auxiliary for one in calls]
        return loss, objective(Model(silent).apply, params, batch, None)[0], weight, sum(own) / len(own)

    loss, without, weight, expected = compute(params)
    assert expected > 0.1
    np.testing.assert_allclose((loss - without) / weight, expected, rtol=1e-4)


def test_replaced_tokens_add_both_models_router_losses_and_the_generators_options():
    """The generator's cross-entropy carries z-loss and smoothing as any other over the vocabulary does."""
    model = Detection(dataclasses.replace(ENCODER, moe=EXPERTS), share=0.5)
    params, batch = model.init(jax.random.key(0)), language_batch()

    @jax.jit
    def compute(params):
        own = model.apply(params, batch, part="generator", method="loss", chunk=4, z_loss=0.1, smoothing=0.2)[0]
        return objectives.replaced(4, 50.0, 0.1, 0.2)(model.apply, params, batch, None), own

    (loss, weight, metrics), own = compute(params)
    assert float(own - metrics["nll"]) > 1  # z-loss alone is 0.1 · log² 16 a target
    rest = float(loss - own - 50 * metrics["detection_loss"]) / float(weight)
    assert rest > 0.1  # the discriminator's routers
