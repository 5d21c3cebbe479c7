"""Each objective over text: it learns, padding has no say, evaluations ask the same, and what was learned goes on elsewhere."""

import dataclasses
import functools
import json
import math
import pathlib
import random

import jax
import numpy as np
import pytest

from jaxlm import cli
from jaxlm.config import parse_flags, read_yaml
from jaxlm.data import SourceConfig, TextEncoder
from jaxlm.data.packing import stack
from jaxlm.experiment import Run, load_config
from jaxlm.experiment.pretraining import Pretraining
from jaxlm.models import load_model, start_parameters
from jaxlm.overview import compare
from jaxlm.parallel import make_mesh
from jaxlm.report import read_rows
from jaxlm.train import objectives

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
# Name → the config that is cut down, and what else is asked of it.
KINDS = {
    "masked": ("pretrain-masked", []),
    "next sentence": ("pretrain-masked", ["--task.corrupt.pairs", "next_sentence", "--model.head.pair", "true"]),
    "sentence order": ("pretrain-masked", ["--task.corrupt.pairs", "sentence_order", "--model.head.pair", "true"]),
    "replaced": ("pretrain-replaced", ["--model.heads", "4"]),
    "span": ("pretrain-span", ["--data.tokenizer.sentinels", "20"]),
    "mixture": ("pretrain-mixture", ["--data.tokenizer.sentinels", "40"]),
    "prefix": ("pretrain-prefix", []),
    "prefix of two stacks": ("pretrain-span", ["--task.kind", "prefix"]),
    "denoising": ("pretrain-denoising", []),
    "fim": ("pretrain-fim", []),
}
LENGTH, ROWS = 48, 8


def texts(count=150):
    """Documents of a few sentences that a small model learns in a few steps."""
    rng = random.Random(0)
    words = {part: text.split() for part, text in {
        "who": "cat dog owl fox cow hen", "how": "old new red big wet shy", "where": "mat log wall roof path lake",
    }.items()}  # fmt: skip

    def sentence():
        who, how, where = (rng.choice(words[part]) for part in ("who", "how", "where"))
        return f"The {how} {who} sat on the {where} and it was {how}."

    return [" ".join(sentence() for _ in range(rng.randint(2, 7))) for _ in range(count)]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make(kind, *flags)`: the cut-down config of a kind; one device, as most users have."""
    folder = tmp_path_factory.mktemp("pretraining")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()), encoding="utf8")

    def config(kind, *more):
        file, own = KINDS[kind]
        words = [
            "--name", kind.replace(" ", "-"), "--runs", str(folder / "runs"), "--data.sources.kind", "files",
            "--data.sources.path", str(folder / "text.jsonl"), "--data.tokenizer.vocab-size", "300",
            "--data.holdout.fraction", "0.1",
            "--data.length", str(LENGTH), "--data.batch-size", str(ROWS), "--model.layers", "1", "--model.width", "32",
            "--model.heads", "2", "--model.mlp-width", "64", "--optim.learning-rate", "1e-2", "--optim.warmup", "5",
            "--train.steps", "50", "--train.eval-every", "50", "--train.log-every", "1", "--train.sample-tokens", "0",
        ]  # fmt: skip
        if "fim" in kind or kind == "prefix":
            words += ["--model.kv-heads", "2"]
        return load_config(CONFIGS / f"{file}.yaml", parse_flags([*words, *own, *more])).value

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(folder / "cache"))
        patch.setattr("jaxlm.experiment.run.make_mesh", lambda parallel: make_mesh(parallel, jax.devices()[:1]))
        yield config


@pytest.fixture(scope="module")
def trained(make):
    """`trained(kind)`: the folder of its run, trained once."""

    @functools.cache
    def run(kind):
        made = Run(make(kind))
        assert made.train() == "finished"
        return made.folder

    return run


@pytest.fixture
def job(make):
    return lambda kind, *more: Pretraining(make(kind, *more), make_mesh(make(kind).parallel, jax.devices()[:1]), pathlib.Path())


LEARNED = [kind for kind in KINDS if kind not in ("sentence order", "prefix of two stacks")]  # of which others show as much


def some_slow(kinds):
    """Those whose model and loss another kind has too are left to the slow tests."""
    return [pytest.param(kind, marks=pytest.mark.slow if kind in ("mixture", "prefix", "fim") else ()) for kind in kinds]


@pytest.mark.parametrize("kind", some_slow(LEARNED))
def test_the_loss_falls(kind, trained, job):
    """In fifty steps well below what a guess among all tokens costs; the evaluation names what it should."""
    record = read_rows(trained(kind) / "metrics.jsonl")
    nll = [row["nll"] for row in record if row["kind"] == "train"]
    (held,) = [row for row in record if row["kind"] == "eval"]
    assert {"kind", "step", *job(kind).score_names()} == held.keys(), "known before the first step"
    assert len(nll) == 50 and nll[0] == pytest.approx(math.log(384), abs=0.5)
    assert np.mean(nll[-5:]) < 0.75 * nll[0], nll
    assert held["nll"] < 0.75 * nll[0], "and of text that it has not seen"
    if kind == "replaced":
        losses = [row["detection_loss"] for row in record if row["kind"] == "train"]
        assert np.mean(losses[-5:]) < 0.8 * losses[0] and 0.5 < held["detection_accuracy"] <= 1
    if "sentence" in kind:
        assert held["pair_loss"] == pytest.approx(math.log(2), abs=0.35), "a mean over rows, in nats"
    page = (trained(kind) / "report.html").read_text(encoding="utf8")
    assert "held-out loss" in page and ("detection accuracy" in page) == (kind == "replaced")


def test_an_evaluation_in_training_is_of_as_many_rows_as_asked_for(job):
    """`train.eval_rows` used to be read for labelled rows alone."""
    few, most = job("masked", "--train.eval-rows", "3")._scored, job("masked")._scored
    rows = [sum(int(weights.any()) for batch in batches for weights in batch["weights_BL"]) for batches in (few, most)]
    assert rows[0] == 3 < rows[1]


@pytest.mark.parametrize("kind", ["replaced", "span"])
def test_two_evaluations_ask_the_same(kind, job):
    """The corruption of a held-out row hangs on its number, the generator's draws on a fixed key."""
    own = job(kind)
    params = start_parameters(None, own.model(), own.mesh, 0)
    with jax.set_mesh(own.mesh):
        first = own.evaluate(params, lambda: False)
        next(own.batches().iterate())
        assert own.evaluate(params, lambda: False) == first
        assert job(kind, "--seed", "5").evaluate(params, lambda: False) == first, "another start, and another seed, are comparable"


# --- what counts --------------------------------------------------------------------------------


def sums(own, batch):
    """Loss, weight and metrics; drawn from a fixed key."""
    params = start_parameters(None, own.model(), own.mesh, 0)
    return jax.jit(lambda batch: own.objective()(own.model().apply, params, batch, None))(batch)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_say(kind, job):
    """Of two rows, one that the text could not fill, and a blank one: whatever stands where the padding is, and whatever
    the blank row's label says, changes no sum."""
    own = job(kind)
    corruption, stream, rng = own.corruption, own.corpora.train[0].tokens, np.random.default_rng(3)
    pieces = [stream[: corruption.raw], stream[900 : 900 + corruption.raw // 3]]
    batch = stack([*(corruption(piece, rng) for piece in pieces), corruption.blank()])

    def spoiled(part):
        names = [name for name in ("tokens_BL", "targets_BL") if name in part]
        # Without segments the padding is what stands behind the last target.
        real = part["segments_BL"] > 0 if "segments_BL" in part else np.cumsum(part["weights_BL"][:, ::-1], 1)[:, ::-1] > 0
        assert (~real[1]).any() and not real[2].any()
        part = part | {name: np.where(real, part[name], 7) for name in names}
        return part | {"labels_B": part["labels_B"] + np.array([0, 0, 1], np.int32)} if "labels_B" in part else part

    other = {name: spoiled(part) for name, part in batch.items()} if "encoder" in batch else spoiled(batch)
    params = start_parameters(None, own.model(), own.mesh, 0)
    run = jax.jit(lambda batch: own.objective()(own.model().apply, params, batch, None))
    before, after = run(batch), run(other)
    assert float(before[1]) == batch.get("decoder", batch)["weights_BL"][:2].sum() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), before, after)
    counted = batch.get("decoder", batch) | {"weights_BL": np.roll(batch.get("decoder", batch)["weights_BL"], 1, axis=0)}
    moved = run(batch | {"decoder": counted} if "decoder" in batch else counted)
    assert abs(float(moved[0] - before[0])) > 1e-3, "the probe would show: padding that counts is seen"


def test_the_pair_loss_is_a_mean_over_rows_beside_the_mean_over_tokens(job):
    """Devlin et al. 2019, §3.1: the loss is the sum of two means. Rows have as many targets as the rate says."""
    own = job("next sentence", "--task.corrupt.whole-words", "false")
    batch = own.batches().batch(0)
    loss, weight, metrics = sums(own, batch)
    params = start_parameters(None, own.model(), own.mesh, 0)
    (_, nll), scores = own.model().apply(params, batch, method="loss_and_pair", chunk=16)
    pairs = objectives.cross_entropy(scores, batch["labels_B"])
    assert set(batch["labels_B"].tolist()) == {0, 1} and len(pairs) == ROWS
    assert float(metrics["pair_loss"] / weight) == pytest.approx(float(pairs.mean()), rel=0.1)
    assert float(loss / weight) == pytest.approx(float(nll / weight + pairs.mean()), rel=0.02)


def test_replaced_tokens_are_told_from_the_originals(job):
    """The discriminator reads the text as it was but for the generator's guesses at the masks; a guess that hits the
    original counts as the original. Its loss is by hand, over all tokens and no padding."""
    own = job("replaced")
    batch = own._scored[-1]  # whose last row the text could not fill
    originals, masked, real = batch["targets_BL"], batch["weights_BL"] > 0, batch["segments_BL"] > 0
    assert (batch["tokens_BL"][masked] == own.tokenizer.special["mask"]).all() and (~real).any()
    np.testing.assert_array_equal(batch["tokens_BL"][~masked], originals[~masked])
    params, seen = start_parameters(None, own.model(), own.mesh, 0), {}

    def spy(params, batch, *, part, **options):
        out = own.model().apply(params, batch, part=part, **options)
        if part == "discriminator":
            seen.update(tokens=np.asarray(batch["tokens_BL"]), scores=np.asarray(out[0], np.float64))
        return out

    loss, weight, metrics = own.objective()(spy, params, batch, None)
    np.testing.assert_array_equal(seen["tokens"][~masked], originals[~masked])
    assert (seen["tokens"][masked] != own.tokenizer.special["mask"]).mean() > 0.9, "guesses, not masks"
    other = seen["tokens"] != originals
    losses = np.logaddexp(0, np.where(other, -seen["scores"], seen["scores"]))
    rows = [masked[i].sum() * losses[i, real[i]].mean() for i in range(len(losses)) if real[i].any()]
    assert float(metrics["detection_loss"]) == pytest.approx(sum(rows), rel=1e-5)
    assert float(loss) == pytest.approx(float(metrics["nll"] + 50 * metrics["detection_loss"]), rel=1e-5)
    assert float(weight) == masked.sum() and 0.1 < masked.sum() / real.sum() < 0.2


def test_a_prefix_is_seen_and_not_scored(job):
    own = job("prefix", "--model.layers", "2")  # one layer looks at what the prefix was before its tokens saw each other
    batch = own.batches().batch(0)
    first = np.argmax(batch["weights_BL"] > 0, axis=1)
    np.testing.assert_array_equal(first, batch["prefix_B"] - 1)
    assert len(set(batch["prefix_B"].tolist())) > 3
    causal = {name: part for name, part in batch.items() if name != "prefix_B"}
    assert abs(float(sums(own, batch)[0]) - float(sums(own, causal)[0])) > 1e-3, "the model is given the prefix"


def test_a_decoder_has_places_for_what_it_writes(job):
    """The more is cut out, the more is written: beyond the positions there would be another token's vector in its stead."""
    flags = ("--model.positions", str(LENGTH), "--task.corrupt.mean-span", "8", "--task.corrupt.rate")
    assert job("span", *flags, "0.15").corruption.pair.target_length <= LENGTH
    with pytest.raises(ValueError, match=r"^task span has up to (\d+) tokens written .* give --model\.positions \1, ") as told:
        _ = job("span", *flags, "0.6").corruption
    assert "\n" not in str(told.value)


# --- what becomes of it -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["next sentence", "replaced"])
def test_a_pretrained_model_is_fine_tuned(kind, trained, tmp_path):
    """The command that the run names, on rows of its own: the body is the pretrained one's, the head is new."""
    folder = trained(kind)
    rows = [{"text": text, "label": text.split()[2]} for text in texts(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    words = [
        "--model.init-from", str(folder), "--runs", str(tmp_path / "runs"), "--data.train", str(tmp_path / "rows.jsonl"),
        "--data.length", str(LENGTH), "--train.steps", "2", "--train.eval-every", "2",
    ]  # fmt: skip
    run = Run(load_config(CONFIGS / "finetune-stdlib.yaml", parse_flags(words)).value)
    begun = start_parameters(str(folder), run.job.model(), run.mesh, 0)
    jax.tree.map(np.testing.assert_array_equal, begun["transformer"], load_model(str(folder)).params["transformer"])
    assert begun["head"]["out"]["kernel"].shape[-1] == len(run.job.labels) > 2
    assert run.train() == "finished" and (run.folder / "scores.html").is_file()


def test_the_commands_that_a_run_names_fit_it(make):
    """Each is fine-tuned on rows of the user's own, those read from Python's documentation on what every Python carries; an
    encoder-decoder cannot classify."""
    for kind in LEARNED:
        config = make(kind)
        first, *_ = Run(config).job.commands()
        embedded = dataclasses.replace(
            config, name=f"{kind}-embedded", data=dataclasses.replace(config.data, sources=(SourceConfig(),))
        )
        if kind != "fim":
            own = config.model.architecture == "encoder_decoder"
            assert "--data.train FILE" in first and "finetune-stdlib" not in first, "the run learned another text"
            assert own or "finetune-stdlib" in Run(embedded).job.commands()[0]
        name = next((word for word in first.split() if word.startswith("configs/")), None)
        if name is None:
            assert kind == "fim" and "jaxlm generate" in first
            continue
        task = read_yaml(CONFIGS.parent / name)[0]["task"]["kind"]
        assert task == ("text_to_text" if make(kind).model.architecture == "encoder_decoder" else "classification")


EXPORTS = {
    "masked": ("bert", "AutoModelForMaskedLM"),
    "next sentence": ("bert", "AutoModelForMaskedLM"),
    "replaced": ("electra", "AutoModelForPreTraining"),
    "span": ("t5", "AutoModelForSeq2SeqLM"),
    "mixture": ("t5", "AutoModelForSeq2SeqLM"),
    "denoising": ("bart", "AutoModelForSeq2SeqLM"),
    "prefix": ("llama", "AutoModelForCausalLM"),
}


@pytest.mark.parametrize("kind", ["next sentence", "replaced", "denoising"])
def test_an_export_says_what_the_run_says(kind, trained, tmp_path):
    """Of replaced tokens the discriminator is what is kept; a head over pairs has no place there."""
    assert cli.main(["export", str(trained(kind)), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf8"))["model_type"] == EXPORTS[kind][0]
    found = compare(load_model(str(trained(kind))), load_model(str(tmp_path / "out")), " ".join(texts(3)), 96)
    assert found.largest < 1e-5 and found.tokens >= 48


@pytest.mark.parity
@pytest.mark.parametrize("kind", some_slow(EXPORTS))
def test_transformers_opens_an_export(kind, trained, tmp_path):
    """No tensor missing or left over, and torch computes what we compute."""
    import torch
    import transformers

    assert cli.main(["export", str(trained(kind)), str(tmp_path / "out")]) == 0
    opened = getattr(transformers, EXPORTS[kind][1])
    theirs, told = opened.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    assert getattr(theirs.config, "forced_eos_token_id", None) in (None, theirs.config.eos_token_id)
    ours = load_model(str(trained(kind)))
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(texts(1)[0], truncation=True, max_length=32)["input_ids"]
    np.testing.assert_array_equal(ids, TextEncoder(ours.tokenizer, 32).ids(texts(1)[0]))
    batch = {"tokens_BL": np.array([ids], np.int32)}
    given = {"input_ids": torch.tensor([ids])}
    if theirs.config.is_encoder_decoder:
        batch, given = {"encoder": batch, "decoder": batch}, given | {"decoder_input_ids": given["input_ids"]}
    out = ours.model.apply(ours.params, batch)
    with torch.no_grad():
        logits = theirs.eval()(**given).logits.numpy()
    np.testing.assert_allclose(out[0] if isinstance(out, tuple) else out, logits, atol=1e-4, rtol=1e-4)
