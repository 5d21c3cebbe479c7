"""What a step minimises: `(apply, params, batch, rng) → (loss sum, weight sum, metrics)`.

Sums and weights, never means, so that gradient accumulation, padding and the number of devices cannot
change the result. An rng turns dropout on; None turns it off. A metric is a sum over the same weight.

Letters: B batch · L length · C classes · O options of a choice · D width · X numbers of a key.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Sums = tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]
Apply = Callable[..., Any]
Batch = Mapping[str, Any]
Objective = Callable[[Apply, Any, Batch, jax.Array | None], Sums]

# --- over the vocabulary --------------------------------------------------------------------------


def tokens(chunk: int, z_loss: float = 0.0, smoothing: float = 0.0, pair_weight: float = 0.0) -> Objective:
    """Cross-entropy of the vocabulary at each weighted target, in nats, plus z-loss; of an encoder-decoder its decoder's.

    The next token of a decoder, the masked ones of an encoder: the batch says which. Logits exist for `chunk`
    positions of a row at a time. The metric `nll` is the cross-entropy sum without z-loss and label smoothing.
    With `pair_weight` the head over pairs (does the second text follow?, `labels_B`) is trained too: each row's
    cross-entropy counts that much. The targets that a row has on average make it Devlin et al.'s (2019, §3.1) sum of
    two means.
    """

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        weight = jnp.sum(batch.get("decoder", batch)["weights_BL"])
        options = {"train": rng is not None, "rng": rng, "chunk": chunk, "z_loss": z_loss, "smoothing": smoothing}
        if not pair_weight:
            loss, nll = apply(params, batch, method="loss", **options)
            return loss, weight, {"nll": nll}
        (loss, nll), scores_BC = apply(params, batch, method="loss_and_pair", **options)
        rows_B = (jnp.sum(batch["weights_BL"], axis=1) > 0).astype(jnp.float32)
        pair = pair_weight * jnp.sum(cross_entropy(scores_BC, batch["labels_B"]) * rows_B)
        return loss + pair, weight, {"nll": nll, "pair_loss": pair}

    return objective


def replaced(chunk: int, share: float = 50.0) -> Objective:
    """Replaced-token detection (Clark et al. 2020, "ELECTRA", §2): a small generator fills in the masked tokens, the
    discriminator tells for every token whether it is the original; loss = generator's + `share` · discriminator's,
    each the mean over its own tokens. That of a row counts as much as it has masked tokens, which makes it a sum like the
    generator's.

    The model is a `Detection` of both. `tokens_BL` are masked, `targets_BL` the originals, `weights_BL` 1 where masked.
    The generator's draws come from `rng`; without one (evaluation) from a fixed key.
    """

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        key = jax.random.key(0) if rng is None else jax.random.fold_in(rng, 1)
        train = {"train": rng is not None, "rng": rng}
        masked_BL = batch["weights_BL"] > 0
        weight = jnp.sum(batch["weights_BL"])
        # Of the two sums only the first has a gradient.
        loss, nll = apply(params, batch, part="generator", method="loss", chunk=chunk, **train)
        guessed_BL = apply(params, batch, part="generator", method="draw", chunk=chunk, key=key, **train)
        seen_BL = jnp.where(masked_BL, jax.lax.stop_gradient(guessed_BL), batch["targets_BL"])
        other_BL = (seen_BL != batch["targets_BL"]).astype(jnp.float32)
        scores_BL = apply(params, {**batch, "tokens_BL": seen_BL}, part="discriminator", **train)
        real_BL = jnp.ones_like(other_BL) if "segments_BL" not in batch else (batch["segments_BL"] > 0).astype(jnp.float32)
        share_B = jnp.sum(batch["weights_BL"], axis=1) / jnp.maximum(jnp.sum(real_BL, axis=1), 1)
        detection = jnp.sum(binary_cross_entropy(scores_BL, other_BL) * real_BL * share_B[:, None])
        right = jnp.sum(((scores_BL > 0) == (other_BL > 0)).astype(jnp.float32) * real_BL * share_B[:, None])
        return loss + share * detection, weight, {"nll": nll, "detection_loss": detection, "detection_accuracy": right}

    return objective


# --- over labels ----------------------------------------------------------------------------------


def cross_entropy(
    scores: jax.Array, labels: jax.Array, smoothing: float = 0.0, class_weights: Sequence[float] | None = None
) -> jax.Array:
    """−log p of each label, in nats, float32: scores (…, C), labels (…,). With label smoothing ε (Szegedy et al. 2016,
    §7) the target is (1 − ε) on the label and ε spread evenly over all classes. Each class's −log p counts its weight."""
    losses = -jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
    if class_weights is not None:
        losses = losses * jnp.asarray(class_weights, jnp.float32).reshape((1,) * (losses.ndim - 1) + (-1,))
    picked = jnp.take_along_axis(losses, labels[..., None], axis=-1)[..., 0]
    return picked if not smoothing else (1 - smoothing) * picked + smoothing * jnp.mean(losses, axis=-1)


def binary_cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """−log p of each yes (1) or no (0), in nats, of the logit of yes."""
    return jax.nn.softplus(scores) - scores * targets


def scores_of(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """What a head over labels gives, with dropout where there is an rng."""
    return apply(params, batch, train=rng is not None, rng=rng)


def classes(class_weights: Sequence[float] | None = None, smoothing: float = 0.0) -> Objective:
    """Cross-entropy over the classes of a row (`labels_B`, `weights_B`) or of its tokens (`labels_BL`, `weights_BL`).

    With class weights the mean is weighted by them, as `torch.nn.CrossEntropyLoss(weight=…, label_smoothing=…)` does.
    """

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        scores = scores_of(apply, params, batch, rng)
        suffix = "BL" if "labels_BL" in batch else "B"
        labels, weights = batch[f"labels_{suffix}"], batch[f"weights_{suffix}"]
        loss = jnp.sum(cross_entropy(scores, labels, smoothing, class_weights) * weights)
        if class_weights is not None:
            weights = weights * jnp.asarray(class_weights, jnp.float32)[labels]
        return loss, jnp.sum(weights), {}

    return objective


def several_classes(class_weights: Sequence[float] | None = None) -> Objective:
    """Binary cross-entropy of every class (`labels_BC` of 0 and 1), the mean over the classes of a row."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        losses_BC = binary_cross_entropy(scores_of(apply, params, batch, rng), batch["labels_BC"])
        if class_weights is not None:
            losses_BC = losses_BC * jnp.where(batch["labels_BC"] > 0, jnp.asarray(class_weights, jnp.float32)[None, :], 1.0)
        weights_B = batch["weights_B"]
        return jnp.sum(jnp.mean(losses_BC, axis=1) * weights_B), jnp.sum(weights_B), {}

    return objective


def squares() -> Objective:
    """Squared error of a score (`labels_B`, float)."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        scores_BC = scores_of(apply, params, batch, rng)
        weights_B = batch["weights_B"]
        return jnp.sum(jnp.square(scores_BC[:, 0] - batch["labels_B"]) * weights_B), jnp.sum(weights_B), {}

    return objective


def spans() -> Objective:
    """Begin and end of an answer, each a cross-entropy over the row's tokens; the mean of the two (Devlin et al. 2019,
    §4.2). Question and padding are no candidates where `allowed_BL` says so."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        begin_BL, end_BL = span_scores(apply, params, batch, rng)
        losses_B = (cross_entropy(begin_BL, batch["begin_B"]) + cross_entropy(end_BL, batch["end_B"])) / 2
        return jnp.sum(losses_B * batch["weights_B"]), jnp.sum(batch["weights_B"]), {}

    return objective


def span_scores(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Logits (B, L) of begin and end; −1e9 where no answer may begin or end."""
    scores_BLC = scores_of(apply, params, batch, rng)
    hidden_BL = jnp.where(batch["allowed_BL"] > 0, 0.0, -1e9)
    return scores_BLC[:, :, 0] + hidden_BL, scores_BLC[:, :, 1] + hidden_BL


def choices() -> Objective:
    """Cross-entropy over the options of a row: `tokens_BOL` … are scored one by one, `options_BO` is 0 for those that a
    row lacks."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        scores_BO = option_scores(apply, params, batch, rng)
        losses_B = cross_entropy(scores_BO, batch["labels_B"])
        return jnp.sum(losses_B * batch["weights_B"]), jnp.sum(batch["weights_B"]), {}

    return objective


def option_scores(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Float32 scores (B, O) of a batch of options; −1e9 for those that a row lacks."""
    B, O = batch["options_BO"].shape
    flat = {f"{name[:-3]}BL": x.reshape(B * O, -1) for name, x in batch.items() if name.endswith("_BOL")}
    scores_BO = scores_of(apply, params, flat, rng).reshape(B, O)
    return jnp.where(batch["options_BO"] > 0, scores_BO, -1e9)


# --- of pairs -------------------------------------------------------------------------------------


def unit(x_BD: jax.Array) -> jax.Array:
    """Vectors of length 1."""
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD.astype(jnp.float32), axis=-1, keepdims=True), 1e-9)


def contrast(temperature: float) -> Objective:
    """In-batch negatives: each anchor's positive among the positives (and given negatives) of all rows, by the cosine of
    their embeddings over `temperature` (van den Oord et al. 2018, "InfoNCE", eq. 4). The batch nests `anchor`,
    `positive` and where there are any `negative`; rows of weight 0 are nobody's negative."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        def embed(name: str, i: int) -> jax.Array:
            key = None if rng is None else jax.random.fold_in(rng, i)
            return unit(scores_of(apply, params, batch[name], key))

        weights_B = batch["weights_B"]
        others = [name for name in ("positive", "negative") if name in batch]
        keys_XD = jnp.concatenate([embed(name, i) for i, name in enumerate(others, 1)])
        real_X = jnp.concatenate([weights_B] * len(others))
        scores_BX = jnp.einsum("BD,XD->BX", embed("anchor", 0), keys_XD) / temperature
        scores_BX = jnp.where(real_X[None, :] > 0, scores_BX, -1e9)
        own_B = jnp.arange(scores_BX.shape[0])
        right_B = (jnp.argmax(scores_BX, axis=1) == own_B).astype(jnp.float32)
        loss = jnp.sum(cross_entropy(scores_BX, own_B) * weights_B)
        return loss, jnp.sum(weights_B), {"matched": jnp.sum(right_B * weights_B)}

    return objective


def preference(kind: str, beta: float, chunk: int) -> Objective:
    """Direct preference optimisation against a reference whose log-likelihoods the batch holds (`reference_chosen_B`,
    `reference_rejected_B`). With h = log π(y⁺)/π₀(y⁺) − log π(y⁻)/π₀(y⁻):

    dpo: −log σ(β h) (Rafailov et al. 2023, eq. 7); ipo: (h − 1/(2β))² (Azar et al. 2024, eq. 17).
    """

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        def ratio(name: str, i: int) -> jax.Array:
            key = None if rng is None else jax.random.fold_in(rng, i)
            options = {"train": rng is not None, "rng": key, "method": "log_likelihood", "chunk": chunk}
            return apply(params, batch[name], **options) - batch[f"reference_{name}_B"]

        chosen_B, rejected_B = ratio("chosen", 0), ratio("rejected", 1)
        margin_B, weights_B = chosen_B - rejected_B, batch["weights_B"]
        losses_B = jax.nn.softplus(-beta * margin_B) if kind == "dpo" else jnp.square(margin_B - 1 / (2 * beta))
        metrics = {"preferred": (margin_B > 0).astype(jnp.float32), "margin": beta * margin_B, "chosen_reward": beta * chosen_B}
        return jnp.sum(losses_B * weights_B), jnp.sum(weights_B), {k: jnp.sum(v * weights_B) for k, v in metrics.items()}

    return objective


def reward() -> Objective:
    """−log σ(r(y⁺) − r(y⁻)): Bradley and Terry 1952 as in Ouyang et al. 2022, "InstructGPT", eq. 1."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        def score(name: str, i: int) -> jax.Array:
            return scores_of(apply, params, batch[name], None if rng is None else jax.random.fold_in(rng, i))[:, 0]

        margin_B, weights_B = score("chosen", 0) - score("rejected", 1), batch["weights_B"]
        loss = jnp.sum(jax.nn.softplus(-margin_B) * weights_B)
        return loss, jnp.sum(weights_B), {"preferred": jnp.sum((margin_B > 0).astype(jnp.float32) * weights_B)}

    return objective
