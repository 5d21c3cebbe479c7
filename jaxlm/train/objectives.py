"""What a step minimises: `(apply, params, batch, rng) → (loss sum, weight sum, metrics)`.

Sums and weights, never means, so that gradient accumulation, padding and the number of devices cannot
change the result. An rng turns dropout on; None turns it off. A metric is a sum over the same weight.
Every objective adds the router losses of a mixture of experts (`moe.balance_loss`, `moe.router_z_loss`), times its weight.

An objective whose loss compares the rows of a batch with each other has a method `in_parts(parts)`: the same objective over
the whole batch, with the model run on `parts` groups of rows, one after the other.

Letters: B batch · L length · C classes · O options of a choice · D width · X numbers of a key.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxlm.metrics import declare

Sums = tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]
Apply = Callable[..., Any]
Batch = Mapping[str, Any]
Objective = Callable[[Apply, Any, Batch, jax.Array | None], Sums]

declare(lower=("loss", "nll", "pair_loss", "detection_loss"))
declare(higher=("detection_accuracy", "matched", "preferred", "margin", "chosen_reward"))


@runtime_checkable
class WholeBatch(Protocol):
    """An objective that needs all rows of a batch at once."""

    def in_parts(self, parts: int) -> Objective: ...


def _with_router_losses(loss: jax.Array, weight: jax.Array, *router_losses: jax.Array | None) -> jax.Array:
    """`loss` plus the mean router loss of the model's calls, times the weight; None: the model has no experts."""
    there = [value for value in router_losses if value is not None]
    return loss + weight * sum(there) / len(there) if there else loss


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


def replaced(chunk: int, share: float = 50.0, z_loss: float = 0.0, smoothing: float = 0.0) -> Objective:
    """Replaced-token detection (Clark et al. 2020, "ELECTRA", §2): a small generator fills in the masked tokens, the
    discriminator tells for every token whether it is the original; loss = generator's + `share` · discriminator's,
    each the mean over its own tokens. That of a row counts as much as it has masked tokens, which makes it a sum like the
    generator's.

    The model is a `Detection` of both. `tokens_BL` are masked, `targets_BL` the originals, `weights_BL` 1 where masked.
    The generator's draws come from `rng`; without one (evaluation) from a fixed key. `z_loss` and `smoothing` belong to its
    cross-entropy, as in `tokens`; the metric `nll` leaves them out.
    """

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        key = jax.random.key(0) if rng is None else jax.random.fold_in(rng, 1)
        train = {"train": rng is not None, "rng": rng}
        masked_BL = batch["weights_BL"] > 0
        weight = jnp.sum(batch["weights_BL"])
        # Of the two sums only the first has a gradient.
        options = {"chunk": chunk, "z_loss": z_loss, "smoothing": smoothing}
        loss, nll = apply(params, batch, part="generator", method="loss", **options, **train)
        guessed_BL = apply(params, batch, part="generator", method="draw", chunk=chunk, key=key, **train)
        seen_BL = jnp.where(masked_BL, jax.lax.stop_gradient(guessed_BL), batch["targets_BL"])
        other_BL = (seen_BL != batch["targets_BL"]).astype(jnp.float32)
        scores_BL, router_loss = apply(
            params, {**batch, "tokens_BL": seen_BL}, part="discriminator", method="scores_and_router_loss", **train
        )
        real_BL = jnp.ones_like(other_BL) if "segments_BL" not in batch else (batch["segments_BL"] > 0).astype(jnp.float32)
        share_B = jnp.sum(batch["weights_BL"], axis=1) / jnp.maximum(jnp.sum(real_BL, axis=1), 1)
        detection = jnp.sum(binary_cross_entropy(scores_BL, other_BL) * real_BL * share_B[:, None])
        right = jnp.sum(((scores_BL > 0) == (other_BL > 0)).astype(jnp.float32) * real_BL * share_B[:, None])
        loss = _with_router_losses(loss + share * detection, weight, router_loss)
        return loss, weight, {"nll": nll, "detection_loss": detection, "detection_accuracy": right}

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


def scores_and_router_loss(
    apply: Apply, params: Any, batch: Batch, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Scores of a head over labels and the router loss, None without experts; with dropout where there is an rng."""
    found: tuple[jax.Array, jax.Array | None] = apply(
        params, batch, train=rng is not None, rng=rng, method="scores_and_router_loss"
    )
    return found


def scores_of(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Scores of a head over labels, with dropout where there is an rng."""
    return scores_and_router_loss(apply, params, batch, rng)[0]


def classes(class_weights: Sequence[float] | None = None, smoothing: float = 0.0) -> Objective:
    """Cross-entropy over the classes of a row (`labels_B`, `weights_B`) or of its tokens (`labels_BL`, `weights_BL`).

    With class weights the mean is weighted by them, as `torch.nn.CrossEntropyLoss(weight=…, label_smoothing=…)` does.
    """

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        scores, router_loss = scores_and_router_loss(apply, params, batch, rng)
        suffix = "BL" if "labels_BL" in batch else "B"
        labels, weights = batch[f"labels_{suffix}"], batch[f"weights_{suffix}"]
        loss = jnp.sum(cross_entropy(scores, labels, smoothing, class_weights) * weights)
        if class_weights is not None:
            weights = weights * jnp.asarray(class_weights, jnp.float32)[labels]
        weight = jnp.sum(weights)
        return _with_router_losses(loss, weight, router_loss), weight, {}

    return objective


def several_classes(class_weights: Sequence[float] | None = None) -> Objective:
    """Binary cross-entropy of every class (`labels_BC` of 0 and 1), the mean over the classes of a row."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        scores_BC, router_loss = scores_and_router_loss(apply, params, batch, rng)
        losses_BC = binary_cross_entropy(scores_BC, batch["labels_BC"])
        if class_weights is not None:
            losses_BC = losses_BC * jnp.where(batch["labels_BC"] > 0, jnp.asarray(class_weights, jnp.float32)[None, :], 1.0)
        return _weighed(jnp.mean(losses_BC, axis=1), batch["weights_B"], router_loss)

    return objective


def squares() -> Objective:
    """Squared error of a score (`labels_B`, float)."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        scores_BC, router_loss = scores_and_router_loss(apply, params, batch, rng)
        return _weighed(jnp.square(scores_BC[:, 0] - batch["labels_B"]), batch["weights_B"], router_loss)

    return objective


def _weighed(losses_B: jax.Array, weights_B: jax.Array, router_loss: jax.Array | None) -> Sums:
    """The sums of a loss for each row."""
    weight = jnp.sum(weights_B)
    return _with_router_losses(jnp.sum(losses_B * weights_B), weight, router_loss), weight, {}


def spans() -> Objective:
    """Begin and end of an answer, each a cross-entropy over the row's tokens; the mean of the two (Devlin et al. 2019,
    §4.2). Question and padding are no candidates where `allowed_BL` says so."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        scores_BLC, router_loss = scores_and_router_loss(apply, params, batch, rng)
        begin_BL, end_BL = _span_scores(scores_BLC, batch)
        losses_B = (cross_entropy(begin_BL, batch["begin_B"]) + cross_entropy(end_BL, batch["end_B"])) / 2
        return _weighed(losses_B, batch["weights_B"], router_loss)

    return objective


def span_scores(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Logits (B, L) of begin and end; −1e9 where no answer may begin or end."""
    return _span_scores(scores_of(apply, params, batch, rng), batch)


def _span_scores(scores_BLC: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    hidden_BL = jnp.where(batch["allowed_BL"] > 0, 0.0, -1e9)
    return scores_BLC[:, :, 0] + hidden_BL, scores_BLC[:, :, 1] + hidden_BL


def choices() -> Objective:
    """Cross-entropy over the options of a row: `tokens_BOL` … are scored one by one, `options_BO` is 0 for those that a
    row lacks."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        scores_BO, router_loss = _option_scores(apply, params, batch, rng)
        return _weighed(cross_entropy(scores_BO, batch["labels_B"]), batch["weights_B"], router_loss)

    return objective


def option_scores(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
    """Float32 scores (B, O) of a batch of options; −1e9 for those that a row lacks."""
    return _option_scores(apply, params, batch, rng)[0]


def _option_scores(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    B, O = batch["options_BO"].shape
    flat = {f"{name[:-3]}BL": x.reshape(B * O, -1) for name, x in batch.items() if name.endswith("_BOL")}
    scores, router_loss = scores_and_router_loss(apply, params, flat, rng)
    return jnp.where(batch["options_BO"] > 0, scores.reshape(B, O), -1e9), router_loss


# --- of pairs -------------------------------------------------------------------------------------


def unit(x_BD: jax.Array) -> jax.Array:
    """Vectors of length 1."""
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD.astype(jnp.float32), axis=-1, keepdims=True), 1e-9)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """In-batch negatives: each anchor's positive among the positives (and given negatives) of all rows, by the cosine of
    their embeddings over `temperature` (van den Oord et al. 2018, "InfoNCE", eq. 4). The batch nests `anchor`,
    `positive` and where there are any `negative`; rows of weight 0 are nobody's negative.

    With several `parts` the model runs on that many groups of rows, one after the other, and once more in the backward pass,
    which needs the activations of one group at a time; the loss is over all rows, whatever the number of groups (Gao et al.
    2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", GradCache).
    """

    temperature: float
    parts: int = 1

    def in_parts(self, parts: int) -> "Contrast":
        """The same objective over the whole batch, with the model run on `parts` groups of rows."""
        return dataclasses.replace(self, parts=parts)

    def __call__(self, apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        weights_B = batch["weights_B"]
        names = [name for name in ("anchor", "positive", "negative") if name in batch]

        def embed(params: Any, rows: Batch, rng: jax.Array | None) -> tuple[list[jax.Array], list[jax.Array | None]]:
            keys = [None if rng is None else jax.random.fold_in(rng, i) for i in range(len(names))]
            pairs = [scores_and_router_loss(apply, params, rows[name], key) for name, key in zip(names, keys, strict=True)]
            return [unit(vectors) for vectors, _ in pairs], [loss for _, loss in pairs]

        texts = {name: batch[name] for name in names}
        if self.parts == 1:
            embedded, router_losses = embed(params, texts, rng)
        else:
            embedded, router_losses = _by_part(embed, params, texts, rng, self.parts)
        keys_XD = jnp.concatenate(embedded[1:])
        real_X = jnp.concatenate([weights_B] * (len(names) - 1))
        scores_BX = jnp.einsum("BD,XD->BX", embedded[0], keys_XD) / self.temperature
        scores_BX = jnp.where(real_X[None, :] > 0, scores_BX, -1e9)
        own_B = jnp.arange(scores_BX.shape[0])
        right_B = (jnp.argmax(scores_BX, axis=1) == own_B).astype(jnp.float32)
        weight = jnp.sum(weights_B)
        loss = _with_router_losses(jnp.sum(cross_entropy(scores_BX, own_B) * weights_B), weight, *router_losses)
        return loss, weight, {"matched": jnp.sum(right_B * weights_B)}


contrast = Contrast


def split_rows(batch: Batch, parts: int) -> Any:
    """Leaves (B, …) → (parts, B / parts, …). Part i has each `parts`-th row, so that every device keeps its own rows."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)


def _by_part(embed: Callable[..., Any], params: Any, rows: Batch, rng: jax.Array | None, parts: int) -> tuple[Any, Any]:
    """`embed` on one group of rows after the other: vectors in the order of the rows, router losses averaged over groups.

    The gradient of the parameters is summed over the groups in float32.
    """
    # What is held in integers has no gradient, and would take several times its bytes.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)

    @jax.checkpoint
    def one(wide: Any, part: Any) -> Any:
        number, rows = part
        own = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), wide, params)
        return embed(own, rows, None if rng is None else jax.random.fold_in(rng, number))

    _, (vectors, losses) = jax.lax.scan(
        lambda carry, part: (carry, one(wide, part)), None, (jnp.arange(parts), split_rows(rows, parts))
    )
    vectors = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), vectors)
    return vectors, jax.tree.map(jnp.mean, losses)


def preference(kind: str, beta: float, chunk: int) -> Objective:
    """Direct preference optimisation against a reference whose log-likelihoods the batch holds (`reference_chosen_B`,
    `reference_rejected_B`). With h = log π(y⁺)/π₀(y⁺) − log π(y⁻)/π₀(y⁻):

    dpo: −log σ(β h) (Rafailov et al. 2023, eq. 7); ipo: (h − 1/(2β))² (Azar et al. 2024, eq. 17).
    """

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        def ratio(name: str, i: int) -> tuple[jax.Array, jax.Array | None]:
            key = None if rng is None else jax.random.fold_in(rng, i)
            options = {"train": rng is not None, "rng": key, "method": "log_likelihood", "chunk": chunk}
            likelihood_B, router_loss = apply(params, batch[name], **options)
            return likelihood_B - batch[f"reference_{name}_B"], router_loss

        (chosen_B, *losses), (rejected_B, *others) = ratio("chosen", 0), ratio("rejected", 1)
        margin_B, weights_B = chosen_B - rejected_B, batch["weights_B"]
        losses_B = jax.nn.softplus(-beta * margin_B) if kind == "dpo" else jnp.square(margin_B - 1 / (2 * beta))
        metrics = {"preferred": (margin_B > 0).astype(jnp.float32), "margin": beta * margin_B, "chosen_reward": beta * chosen_B}
        weight = jnp.sum(weights_B)
        loss = _with_router_losses(jnp.sum(losses_B * weights_B), weight, *losses, *others)
        return loss, weight, {k: jnp.sum(v * weights_B) for k, v in metrics.items()}

    return objective


def reward() -> Objective:
    """−log σ(r(y⁺) − r(y⁻)): Bradley and Terry 1952 as in Ouyang et al. 2022, "InstructGPT", eq. 1."""

    def objective(apply: Apply, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
        def score(name: str, i: int) -> tuple[jax.Array, jax.Array | None]:
            key = None if rng is None else jax.random.fold_in(rng, i)
            scores_BC, router_loss = scores_and_router_loss(apply, params, batch[name], key)
            return scores_BC[:, 0], router_loss

        (chosen_B, *losses), (rejected_B, *others) = score("chosen", 0), score("rejected", 1)
        margin_B, weights_B = chosen_B - rejected_B, batch["weights_B"]
        weight = jnp.sum(weights_B)
        loss = _with_router_losses(jnp.sum(jax.nn.softplus(-margin_B) * weights_B), weight, *losses, *others)
        return loss, weight, {"preferred": jnp.sum((margin_B > 0).astype(jnp.float32) * weights_B)}

    return objective
