"""Batches of examples: every example once an epoch, the same ones after a resume, padding that counts nothing."""

import itertools
import pathlib

import jax
import numpy as np
import pytest

from jaxlm.data import ExampleBatches, TokenizerConfig, collate, examples, in_order, train_tokenizer
from jaxlm.data.examples import RUN, bucket, length_of, longest_of
from jaxlm.model import HeadConfig, Model, TransformerConfig
from jaxlm.parallel import ParallelConfig, make_mesh, stored_shardings
from jaxlm.tasks import TASKS, Predictor, TaskConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAD = 99


def made(n, seed=0, most=40):
    """Examples of random length, each with its number, counted from 1: rows of padding have 0."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 90, rng.integers(1, most)).astype(np.int32) for _ in range(n)]
    return [{"tokens": row, "number": np.int32(i), "weights": np.float32(1)} for i, row in enumerate(rows, 1)]


def batches(items, size, **options):
    return ExampleBatches(items, size, **{"seed": 3, "epochs": None, "pad_id": PAD, **options})


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# --- which examples --------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("n", "size"), [(1, 4), (8, 4), (10, 4), (5, 1), (2 * RUN * 2 + 7, 2)])
def test_an_epoch_holds_each_example_once(n, size, grouped):
    items = made(n)
    source = batches(items, size, grouped=grouped, epochs=2)
    assert source.per_epoch == -(-n // size) and source.total == 2 * source.per_epoch
    found = [batch for batch, _ in source.iterate()]
    orders = []
    for epoch in (found[: source.per_epoch], found[source.per_epoch :]):
        for batch in epoch:
            assert all(len(x) == size for x in batch.values())
            np.testing.assert_array_equal(batch["weights_B"], batch["number_B"] > 0)
            for number, row in zip(batch["number_B"], batch["tokens_BL"], strict=True):
                tokens = items[number - 1]["tokens"] if number else []
                np.testing.assert_array_equal(row[: len(tokens)], tokens)
                assert (row[len(tokens) :] == PAD).all()
        orders.append(np.concatenate([batch["number_B"][batch["number_B"] > 0] for batch in epoch]))
        assert sorted(orders[-1]) == list(range(1, n + 1))
    assert n < 5 or not np.array_equal(*orders), "epochs are shuffled anew"
    if n == 10:
        lengths = sorted(([len(items[i - 1]["tokens"]) for i in batch["number_B"] if i] for batch in found[:3]), key=max)
        assert grouped == all(max(a) <= min(b) for a, b in itertools.pairwise(lengths))


@pytest.mark.parity
@pytest.mark.parametrize(("n", "size"), [(10, 4), (3, 4), (RUN * 2 * 3, 2), (RUN * 2 * 3 + 5, 2), (RUN * 4 + 1, 4)])
def test_the_order_is_that_of_the_torch_script(n, size, monkeypatch):
    """Runs of 50 batches, each sorted by length and cut, and the batches shuffled, from the same random numbers."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torch_finetune

    items = made(n, most=8)  # many of one length: how ties are kept counts
    source = batches(items, size)
    theirs = [{"input_ids": item["tokens"].tolist()} for item in items]
    for epoch in range(2):
        expected = torch_finetune.epoch_batches(theirs, size, 3, epoch)
        assert len(expected) == source.per_epoch
        for i, numbers in enumerate(expected):
            found = source.batch(epoch * source.per_epoch + i)["number_B"]
            assert found[found > 0].tolist() == (numbers + 1).tolist()


def test_batches_go_on_from_any_state():
    source = batches(made(11), 4, epochs=2)
    whole = list(source.iterate())
    assert len(whole) == 6 and len(list(batches(made(11), 4, epochs=0.5).iterate())) == 2
    for n, (_, state) in enumerate(whole, 1):
        rest = list(batches(made(11), 4, epochs=2).iterate(state))
        assert len(rest) == 6 - n
        for (a, state_a), (b, state_b) in zip(rest, whole[n:], strict=True):
            same(a, b)
            assert state_a == state_b
    assert any(not np.array_equal(source.batch(0)["number_B"], batches(made(11), 4, seed=s).batch(0)["number_B"]) for s in (4, 5))


def nested(n):
    items = made(n)
    return [{"encoder": {"tokens": item["tokens"]}, **item, "tokens": item["tokens"][:2]} for item in items]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batch(count):
    items = nested(10)
    for i in range(6):
        whole = batches(items, 4).batch(i)
        parts = [batches(items, 4, process_index=p, process_count=count).batch(i) for p in range(count)]
        assert all(len(part["number_B"]) == 4 // count for part in parts)
        same(jax.tree.map(lambda *xs: np.concatenate(xs), *parts), whole)


def test_in_order_covers_each_example_once_near_in_length():
    items = made(11)
    found = list(in_order(items, 4, PAD))
    assert sorted(np.concatenate([numbers for numbers, _ in found])) == list(range(11))
    for numbers, batch in found:
        assert batch["number_B"].tolist() == [*(numbers + 1), *[0] * (4 - len(numbers))]
    lengths = [[len(items[n]["tokens"]) for n in numbers] for numbers, _ in found]
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(lengths))


# --- padding ---------------------------------------------------------------------------------


def test_padded_lengths_are_few_and_grow_with_what_they_hold():
    sizes = [bucket(n) for n in range(1, 4097)]
    for n, size in enumerate(sizes, 1):
        assert size >= n and size % 16 == 0 and bucket(size) == size
        assert n <= 48 or (size - n) / size < 0.25
    assert sizes == sorted(sizes) and len(set(sizes)) < 40


def test_all_that_varies_is_padded_and_nothing_else():
    examples = [
        {
            "tokens": np.arange(1, n + 1, dtype=np.int32),
            "labels_C": np.array([1, 0, 1], np.float32),
            "weights": np.float32(1),
            "choices": {"tokens": np.ones((2, k), np.int32), "segments": np.ones((2, k), np.int32), "options_O": np.ones(2)},
        }
        for n, k in ((3, 18), (20, 5))
    ]
    batch = collate(examples, 3, PAD)
    assert {name: x.shape for name, x in batch.items() if name != "choices"} == {
        "tokens_BL": (3, 32), "labels_BC": (3, 3), "weights_B": (3,),
    }  # fmt: skip
    assert {name: x.shape for name, x in batch["choices"].items()} == {
        "tokens_BOL": (3, 2, 32), "segments_BOL": (3, 2, 32), "options_BO": (3, 2),
    }  # fmt: skip
    np.testing.assert_array_equal(batch["tokens_BL"][0], [1, 2, 3] + [PAD] * 29)
    np.testing.assert_array_equal(batch["choices"]["tokens_BOL"][1, 1], [1] * 5 + [PAD] * 27)
    np.testing.assert_array_equal(batch["choices"]["segments_BOL"].sum(-1), [[18, 18], [5, 5], [0, 0]])
    np.testing.assert_array_equal(batch["labels_BC"], [[1, 0, 1], [1, 0, 1], [0, 0, 0]])
    assert (batch["tokens_BL"][2] == PAD).all() and batch["weights_B"].tolist() == [1, 1, 0]
    assert batch["choices"]["options_BO"].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert [length_of(example) for example in examples] == [21, 25] and [longest_of(example) for example in examples] == [18, 20]
    for example, item in zip(examples, batch["tokens_BL"], strict=False):  # the examples themselves stay as they are
        assert len(example["tokens"]) < len(item)


def test_no_row_is_padded_beyond_the_longest():
    items = [{**item, "labels_C": np.zeros(70)} for item in made(12, most=37)]
    longest = max(len(item["tokens"]) for item in items)
    assert longest % 16, "the bucket is longer"
    source = batches(items, 4)
    widths = {source.batch(i)["tokens_BL"].shape[1] for i in range(6)}
    assert max(widths) == longest and widths - {longest} <= {16, 32, 48}
    assert {batch["tokens_BL"].shape[1] for _, batch in in_order(items, 4, PAD, 40)} <= {16, 32, 40}
    assert {batch["tokens_BL"].shape[1] for _, batch in in_order(items, 4, PAD)} <= {16, 32, 48}


# --- what a task makes of them ---------------------------------------------------------------

ENCODER = {"architecture": "encoder", "norm_position": "post", "embedding_norm": True, "token_types": 2, "positions": 40}
DECODER = {"architecture": "decoder", "position": "rotary", "norm": "rmsnorm", "positions": 40}
HEADS = {
    "classification": HeadConfig(kind="sequence", labels=3), "tagging": HeadConfig(kind="token", labels=2),
    "extractive_qa": HeadConfig(kind="span", labels=2), "multiple_choice": HeadConfig(kind="choice", labels=1),
    "preference": HeadConfig(),
}  # fmt: skip


def rows_of(kind, n=11):
    rng = np.random.default_rng(1)
    words = [[str(w) for w in rng.choice(["a", "bc", "def", "ghij"], rng.integers(1, 7))] for _ in range(3 * n)]
    words = [[chr(ord("A") + i), *each] for i, each in enumerate(words)]  # no two are the same: equal scores have no order
    texts = [" ".join(each) for each in words]
    return [
        {
            "classification": {"text": texts[i], "label": "xyz"[i % 3]},
            "tagging": {"tokens": words[i], "tags": ["O" if len(w) > 1 else "B-X" for w in words[i]]},
            "extractive_qa": {
                "question": words[i][0], "context": texts[n + i], "answers": {"text": [words[n + i][-1]], "answer_start": [
                    len(texts[n + i]) - len(words[n + i][-1])]},
            },
            "multiple_choice": {"question": words[i][0], "choices": texts[n + i : n + i + 2 + i % 2], "label": i % 2},
            "preference": {"prompt": words[i][0], "chosen": texts[n + i], "rejected": texts[2 * n + i]},
        }[kind]
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_losses_and_predictions_do_not_hang_on_batches_padding_or_devices(kind, monkeypatch):
    rows = rows_of(kind)
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes", special=("pad", "cls", "sep")), [])
    architecture = DECODER if kind == "preference" else ENCODER
    options = {"vocab_size": 264, "layers": 1, "width": 16, "heads": 2, "init_std": 0.3, "head": HEADS[kind]}
    model = Model(TransformerConfig(**architecture, **options))
    params = model.init(jax.random.key(0))
    task = TASKS[kind](TaskConfig(kind=kind, stride=8), tokenizer, 40, architecture=architecture["architecture"])
    task.learn(rows)
    made = task.examples(rows)
    if kind == "preference":
        task.refer(made, [{"chosen_B": np.float32(-i), "rejected_B": np.float32(-2 * i)} for i in range(len(rows))])

    def passed(size, parallel=None, order=None):
        devices = jax.devices() if parallel else jax.devices()[:1]
        mesh = make_mesh(parallel or ParallelConfig(), devices)
        placed = jax.device_put(params, stored_shardings(model.axes, model.shapes, mesh))
        order = np.arange(len(made)) if order is None else order
        got = Predictor(task, model, mesh, size).run(placed, [made.items[i] for i in order])
        return got.loss, got.means, [got.outputs[place] for place in np.argsort(order)]

    # The mean of the losses of each example alone.
    objective, sums = task.objective(8), np.zeros(2)
    alone = jax.jit(lambda batch: objective(model.apply, params, batch, None)[:2])
    for item in made.items:
        sums += np.array(alone(collate([item], 1, task.pad_id, 40)))
    loss, means, outputs = passed(4)
    assert loss == pytest.approx(sums[0] / sums[1], rel=1e-5) and np.isfinite(loss)
    scores = task.scores(rows, task.read(rows, made, outputs))
    assert len({float(np.ravel(x)[0]) for output in outputs for x in output.values()}) > len(made) / 2

    def check(size, parallel=None, order=None):
        found, more, others = passed(size, parallel, order)
        assert found == pytest.approx(loss, rel=1e-5) and more == pytest.approx(means, rel=1e-5, abs=1e-6)
        for item, one, other in zip(made.items, outputs, others, strict=True):
            for name in one:
                kept = slice(len(item["tokens"])) if "_BL" in name else ...
                np.testing.assert_allclose(one[name][kept], other[name][kept], rtol=1e-4, atol=1e-5)
        again = task.scores(rows, task.read(rows, made, others))
        assert again == pytest.approx(scores, rel=1e-4, abs=1e-5, nan_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(examples, "bucket", lambda n: -(-n // 40) * 40)
        check(len(made) + 2, order=np.random.default_rng(2).permutation(len(made)))
        check(3, ParallelConfig(data=8))
        check(4, ParallelConfig(data=2, fsdp=2, tensor=2))


def test_rows_that_fill_the_learned_positions_are_finite():
    """The next bucket would be longer than the table of positions."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="bytes", special=("pad", "cls", "sep")), [])
    options = {**ENCODER, "positions": 20, "vocab_size": 264, "layers": 1, "width": 16, "heads": 2}
    model = Model(TransformerConfig(**options, head=HEADS["classification"]))
    params = model.init(jax.random.key(0))
    rows = [{"text": "a" * n, "label": "xyz"[n % 3]} for n in (17, 30, 18)]
    task = TASKS["classification"](TaskConfig(kind="classification"), tokenizer, 20)
    task.learn(rows)
    items = task.examples(rows).items
    passed = Predictor(task, model, make_mesh(ParallelConfig(), jax.devices()[:1]), 4).run(params, items)
    source = batches(items, 4, pad_id=task.pad_id)
    loss, weight, _ = jax.jit(lambda batch: task.objective(8)(model.apply, params, batch, None))(source.batch(0))
    assert float(loss / weight) == pytest.approx(passed.loss, rel=1e-5) and np.isfinite(passed.loss)
    alone = [jax.jit(model.apply)(params, {"tokens_BL": item["tokens"][None]})[0] for item in items]
    np.testing.assert_allclose([out["probabilities_BC"] for out in passed.outputs], jax.nn.softmax(np.array(alone)), rtol=1e-4)
