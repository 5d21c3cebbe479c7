"""Batches: pure in their number, the same on any number of hosts, each token once, and a thread that lets go."""

import collections
import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest

from jaxlm.data.corpus import Corpora, DataConfig, in_memory
from jaxlm.data.corrupt import CorruptConfig, make_corruption
from jaxlm.data.pipeline import TrainBatches, eval_batches, prefetch, train_batches
from jaxlm.data.sources import SourceConfig
from jaxlm.data.tokenizer import TokenizerConfig, train_tokenizer

ALONE = {"process_index": 0, "process_count": 1}
TOKENIZER = train_tokenizer(TokenizerConfig("bytes"), [])


def corpora_of(*texts_of_sources):
    train = [in_memory(texts, TOKENIZER) for texts in texts_of_sources]
    return Corpora(TOKENIZER, train, [in_memory(["held out " * 9, "text"], TOKENIZER) for _ in train])


def config(**given):
    return DataConfig(**{"length": 8, "batch_size": 4, "tokenizer": TokenizerConfig("bytes"), **given})


CORPORA = corpora_of([f"document {i} " + "x" * (i % 11) for i in range(40)])


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def scored(batches):
    """How often each token is a scored target."""
    counts = collections.Counter()
    for batch in batches:
        counts.update(batch["targets_BL"][batch["weights_BL"] > 0].tolist())
    return counts


@pytest.fixture(params=["windows", "packed"])
def layout(request):
    return request.param


def test_a_batch_has_its_shape_and_types(layout):
    batch = TrainBatches(config(layout=layout), CORPORA, seed=0, **ALONE).batch(0)
    names = {"tokens_BL", "targets_BL", "weights_BL"} | ({"segments_BL", "positions_BL"} if layout == "packed" else set())
    assert set(batch) == names
    assert all(array.shape == (4, 8) for array in batch.values())
    assert all(array.dtype == (np.float32 if name == "weights_BL" else np.int32) for name, array in batch.items())


def test_the_ith_batch_depends_on_config_seed_and_i_alone(layout):
    """O(1) resume: batch 1,000,007 of a fresh object is what a run that got there would see."""
    asked = config(layout=layout)
    used = TrainBatches(asked, CORPORA, seed=7, **ALONE)
    for i in (0, 1, 5):
        used.batch(i)
    for i in (3, 0, 1_000_007):
        same(used.batch(i), TrainBatches(asked, CORPORA, seed=7, **ALONE).batch(i))
    other = TrainBatches(asked, CORPORA, seed=8, **ALONE)
    assert not np.array_equal(used.batch(0)["tokens_BL"], other.batch(0)["tokens_BL"])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_rows_of_the_same_batch(layout, count):
    asked = config(layout=layout)
    whole = TrainBatches(asked, CORPORA, seed=1, **ALONE)
    parts = [TrainBatches(asked, CORPORA, seed=1, process_index=p, process_count=count) for p in range(count)]
    held = eval_batches(asked, CORPORA, **ALONE)
    held_parts = [eval_batches(asked, CORPORA, process_index=p, process_count=count) for p in range(count)]
    for i in range(3):
        for one, several in ((whole.batch(i), [p.batch(i) for p in parts]), (held[i], [p[i] for p in held_parts])):
            same(one, {name: np.concatenate([part[name] for part in several]) for name in one})


def test_rows_that_cannot_be_shared_are_told():
    with pytest.raises(ValueError, match="batch_size 4 cannot be shared by 3 processes"):
        TrainBatches(config(), CORPORA, seed=0, process_index=0, process_count=3)


def test_without_processes_named_jax_is_asked():
    same(TrainBatches(config(), CORPORA, seed=0).batch(0), TrainBatches(config(), CORPORA, seed=0, **ALONE).batch(0))


def test_one_epoch_has_every_token_once_and_the_next_has_another_order(layout):
    expected = collections.Counter(CORPORA.train[0].tokens.tolist())
    once = TrainBatches(config(layout=layout, epochs=1.0), CORPORA, seed=0, **ALONE)
    assert scored(once.batch(i) for i in range(once.total)) == expected
    thrice = TrainBatches(config(layout=layout, epochs=3.0), CORPORA, seed=0, **ALONE)
    assert scored(thrice.batch(i) for i in range(thrice.total)) == {token: 3 * n for token, n in expected.items()}
    rows = np.concatenate([thrice.batch(i)["tokens_BL"] for i in range(thrice.total)])
    n = thrice.total_rows // 3
    orders = [rows[e * n : (e + 1) * n].tolist() for e in range(3)]
    assert orders[0] != orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


def test_shuffled_seeds_do_not_lend_each_other_their_epochs():
    """grain's epoch 1 under seed 0 is epoch 0 under seed 1: two repeats of an experiment would share their data order."""
    n = TrainBatches(config(batch_size=1, epochs=1.0), CORPORA, seed=0, **ALONE).total
    order = lambda seed, epoch: [  # noqa: E731
        TrainBatches(config(batch_size=1), CORPORA, seed=seed, **ALONE).batch(epoch * n + i)["tokens_BL"].tolist() for i in range(5)
    ]
    assert order(0, 1) != order(1, 0)


def test_the_end_of_the_epochs():
    batches = TrainBatches(config(epochs=0.5), CORPORA, seed=0, **ALONE)
    whole = TrainBatches(config(epochs=1.0), CORPORA, seed=0, **ALONE)
    assert batches.total_rows == round(whole.total_rows / 2)
    assert len(list(batches.iterate())) == batches.total == -(-batches.total_rows // 4)
    endless = TrainBatches(config(), CORPORA, seed=0, **ALONE)
    assert endless.total is None
    assert len(list(itertools.islice(endless.iterate(), 99))) == 99


def test_the_last_batch_is_padded_with_rows_of_no_weight(layout):
    batches = TrainBatches(config(layout=layout, epochs=1.0, batch_size=64), CORPORA, seed=0, **ALONE)
    last = batches.batch(batches.total - 1)
    assert (last["weights_BL"].sum(axis=1) == 0).sum() == batches.total * 64 - batches.total_rows > 0
    assert np.isfinite(last["weights_BL"]).all() and last["tokens_BL"].shape == (64, 8)


def test_iterating_from_a_state_goes_on_where_it_stopped(layout):
    batches = train_batches(config(layout=layout, epochs=1.0), CORPORA, seed=3, **ALONE)
    whole = list(batches.iterate())
    for stop in (1, len(whole) // 2, len(whole)):
        state = json.loads(json.dumps(whole[stop - 1][1]))
        rest = list(train_batches(config(layout=layout, epochs=1.0), CORPORA, seed=3, **ALONE).iterate(state))
        assert len(rest) == len(whole) - stop
        for (batch, state), (other, other_state) in zip(rest, whole[stop:], strict=True):
            same(batch, other)
            assert state == other_state


# --- mixtures ---------------------------------------------------------------------------------


def mixture(*weights, **given):
    sources = tuple(SourceConfig("files", path=f"{i}.txt", weight=w) for i, w in enumerate(weights))
    texts = [[chr(ord("a") + i) * 400 + str(j) for j in range(5 + 20 * i)] for i in range(len(weights))]
    return config(sources=sources, **given), corpora_of(*texts)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.2, 0.3, 0.5)])
def test_a_mixture_keeps_its_proportions(weights):
    asked, corpora = mixture(*weights, batch_size=10)
    batches = TrainBatches(asked, corpora, seed=0, **ALONE)
    firsts = collections.Counter(chr(row[4]) for i in range(100) for row in batches.batch(i)["targets_BL"].tolist())
    drawn = [firsts[chr(ord("a") + i)] / 1000 for i in range(len(weights))]
    np.testing.assert_allclose(drawn, np.array(weights) / sum(weights), atol=0.04)


def test_a_mixture_ends_when_one_source_has_had_its_epochs():
    asked, corpora = mixture(1.0, 1.0, epochs=2.0)
    batches = TrainBatches(asked, corpora, seed=0, **ALONE)
    counts = scored(batches.batch(i) for i in range(batches.total))
    small = collections.Counter(corpora.train[0].tokens.tolist())
    assert counts[ord("a")] == 2 * small[ord("a")]
    assert counts[ord("b")] <= counts[ord("a")] * 1.05


def test_a_mixture_is_pure_too():
    asked, corpora = mixture(1.0, 2.0)
    same(TrainBatches(asked, corpora, seed=0, **ALONE).batch(9), TrainBatches(asked, corpora, seed=0, **ALONE).batch(9))


# --- corrupted rows ---------------------------------------------------------------------------

SPECIAL = train_tokenizer(TokenizerConfig("bytes", special=("pad", "cls", "sep", "mask"), sentinels=20), [])
KINDS = {"masked": "encoder", "span": "encoder_decoder", "prefix": "decoder"}


@pytest.fixture(params=KINDS)
def corruption(request):
    return make_corruption(request.param, CorruptConfig(), SPECIAL, 16, KINDS[request.param])


def leaves(batch):
    return {
        f"{name}.{inner}" if inner else name: value
        for name, part in batch.items()
        for inner, value in (part.items() if isinstance(part, dict) else [("", part)])
    }


def differ(one, two):
    return any(not np.array_equal(value, leaves(two)[name]) for name, value in leaves(one).items())


def corrupted(corruption, seed=0, corpora=CORPORA, **given):
    return train_batches(config(**given), corpora, seed=seed, corruption=corruption, **ALONE)


def test_a_corrupted_batch_depends_on_config_seed_and_number_alone(corruption):
    used = corrupted(corruption)
    for i in (0, 1, 5):
        used.batch(i)
    for i in (3, 0, 1_000_007):
        same(leaves(used.batch(i)), leaves(corrupted(corruption).batch(i)))
    assert differ(used.batch(0), corrupted(corruption, seed=1).batch(0))


def test_processes_share_corrupted_rows(corruption):
    for count in (2, 4):
        shares = [{"process_index": p, "process_count": count} for p in range(count)]
        parts = [TrainBatches(config(), CORPORA, seed=0, corruption=corruption, **share) for share in shares]
        held = [eval_batches(config(), CORPORA, corruption=corruption, **share) for share in shares]
        pairs = [(corrupted(corruption).batch(i), [part.batch(i) for part in parts]) for i in range(3)]
        pairs += [
            (eval_batches(config(), CORPORA, corruption=corruption, **ALONE)[i], [part[i] for part in held]) for i in range(2)
        ]
        for whole, several in pairs:
            joined = {name: np.concatenate([leaves(part)[name] for part in several]) for name in leaves(whole)}
            same(leaves(whole), joined)


def test_an_epoch_reads_every_whole_chunk_once_and_the_next_masks_it_otherwise():
    masked = make_corruption("masked", CorruptConfig(), SPECIAL, 16, "encoder")
    batches = corrupted(masked, batch_size=1, epochs=3.0)
    stream = CORPORA.train[0].tokens
    chunks = len(stream) // 14
    assert batches.total == 3 * chunks and len(stream) % 14  # the rest at the end is dropped
    epochs = []
    for epoch in range(3):
        rows = [batches.batch(epoch * chunks + i) for i in range(chunks)]
        texts = [tuple(row["targets_BL"][0, 1:-1].tolist()) for row in rows]
        assert sorted(texts) == sorted(tuple(stream[i * 14 : i * 14 + 14].tolist()) for i in range(chunks))
        epochs.append({text: row["tokens_BL"].tobytes() for text, row in zip(texts, rows, strict=True)})
    assert list(epochs[0]) != list(epochs[1])  # and in another order
    for one, two in itertools.combinations(epochs, 2):
        assert sum(one[text] != two[text] for text in one) > 0.8 * len(one)


def test_sources_of_the_same_text_are_masked_each_in_its_own_way():
    masked = make_corruption("masked", CorruptConfig(), SPECIAL, 16, "encoder")
    asked, _ = mixture(1.0, 1.0, batch_size=1)
    corpora = corpora_of(["the same text again " * 2], ["the same text again " * 2])
    rows = [train_batches(asked, corpora, seed=0, corruption=masked, **ALONE).batch(i) for i in range(60)]
    texts = collections.defaultdict(set)
    for row in rows:
        texts[row["targets_BL"].tobytes()].add(row["tokens_BL"].tobytes())
    assert len(texts) == 2 and all(len(seen) > 22 for seen in texts.values())


def test_iterating_corrupted_rows_goes_on_where_it_stopped(corruption):
    whole = list(corrupted(corruption, epochs=1.0).iterate())
    for stop in (1, len(whole) - 1):
        rest = list(corrupted(corruption, epochs=1.0).iterate(json.loads(json.dumps(whole[stop - 1][1]))))
        assert len(rest) == len(whole) - stop > 0
        for (batch, _), (other, _) in zip(rest, whole[stop:], strict=True):
            same(leaves(batch), leaves(other))


def test_the_last_corrupted_batch_is_padded_with_rows_of_no_weight(corruption):
    batches = corrupted(corruption, epochs=1.0, batch_size=64)
    last = batches.batch(batches.total - 1)
    weights = last.get("decoder", last)["weights_BL"]
    assert (weights.sum(axis=1) == 0).sum() == batches.total * 64 - batches.total_rows > 0


def test_evaluation_asks_the_same_whatever_the_batches_and_reads_every_token(corruption):
    held = dataclasses.replace(CORPORA, heldout=[in_memory(["one text", "two"], TOKENIZER), in_memory(["abcdefg " * 9], TOKENIZER)])
    one, again, three = (
        [leaves(batch) for batch in eval_batches(config(), held, rows=rows, corruption=corruption, **ALONE)] for rows in (1, 1, 3)
    )
    joined = [{name: np.concatenate([batch[name] for batch in batches]) for name in one[0]} for batches in (one, again, three)]
    expected = sum(-(-len(corpus.tokens) // corruption.raw) for corpus in held.heldout)
    assert len(one) == expected and len(three) == -(-expected // 3)
    same(joined[0], joined[1])
    same(joined[0], {name: value[:expected] for name, value in joined[2].items()})
    if "targets_BL" in one[0] and "segments_BL" in one[0]:  # masked rows hold the whole text
        text = [batch["targets_BL"][batch["segments_BL"] > 0] for batch in one]
        text = np.concatenate([row[1:-1] for row in text])
        np.testing.assert_array_equal(text, np.concatenate([corpus.tokens for corpus in held.heldout]))


def test_what_corrupted_rows_cannot_be_made_of_is_told(corruption):
    with pytest.raises(ValueError, match=r"layout 'packed' is for plain next-token rows.*'windows'") as error:
        corrupted(corruption, layout="packed")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="layout 'packed'"):
        eval_batches(config(layout="packed"), CORPORA, corruption=corruption, **ALONE)
    with pytest.raises(ValueError, match=r"source 'embedded' has 6 tokens to train on, fewer than the \d+ of one row") as error:
        corrupted(corruption, corpora=corpora_of(["short"]))
    assert "\n" not in str(error.value)


# --- evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, 1, 3, 1000])
def test_evaluation_scores_every_held_out_token_once(layout, rows):
    corpora = dataclasses.replace(CORPORA, heldout=[in_memory(["one text", "two"], TOKENIZER), in_memory(["x" * 100], TOKENIZER)])
    batches = eval_batches(config(layout=layout), corpora, rows=rows, **ALONE)
    expected = collections.Counter(token for corpus in corpora.heldout for token in corpus.tokens.tolist())
    assert scored(batches) == expected
    assert all(batch["tokens_BL"].shape == (rows or 4, 8) for batch in batches)
    assert len(list(batches)) == len(batches) and len(batches[:1]) == 1
    same(batches[-1], batches[len(batches) - 1])
    with pytest.raises(IndexError):
        batches[len(batches)]


@pytest.mark.parametrize("most", [1, 5, 1000])
def test_an_evaluation_may_be_of_the_first_rows(layout, most):
    """Whatever the size of its batches: the rest of the last batch is padding."""
    whole = [row for batch in eval_batches(config(layout=layout), CORPORA, rows=1, **ALONE) for row in batch["targets_BL"]]
    batches = eval_batches(config(layout=layout), CORPORA, rows=3, most=most, **ALONE)
    rows = [(t, w) for batch in batches for t, w in zip(batch["targets_BL"], batch["weights_BL"], strict=True)]
    kept = min(most, len(whole))
    assert len(rows) == -(-kept // 3) * 3 and all(w.any() for _, w in rows[:kept]) and not any(w.any() for _, w in rows[kept:])
    np.testing.assert_array_equal([t for t, _ in rows[:kept]], whole[:kept])


def test_windows_stay_in_order_and_carry_the_context_over():
    batches = eval_batches(config(batch_size=1), CORPORA, **ALONE)
    tokens = np.concatenate([batch["tokens_BL"][0] for batch in batches])
    stream = CORPORA.heldout[0].tokens
    assert tokens[0] == TOKENIZER.bos_id
    np.testing.assert_array_equal(tokens[1 : len(stream)], stream[:-1])


# --- config -----------------------------------------------------------------------------------


def test_config_mistakes_are_told():
    stream = SourceConfig("huggingface", path="x/y", streaming=True)
    for wrong, told in [
        ({"sources": ()}, "sources is empty"),
        ({"length": 0}, "length 0 must be at least 1"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"prefetch": 0}, "prefetch 0"),
        ({"epochs": 0.0}, "epochs 0.0 must be a positive number"),
        ({"sources": (stream, SourceConfig())}, "cannot be part of a mixture"),
        ({"sources": (stream,), "layout": "packed"}, "needs data layout 'windows'"),
        ({"sources": (stream,), "epochs": 1.5}, "give a whole number"),
    ]:
        with pytest.raises(ValueError, match=told) as error:
            DataConfig(**wrong)
        assert "\n" not in str(error.value)


# --- running ahead ----------------------------------------------------------------------------


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread.is_alive()]


def test_prefetch_gives_every_item_in_order_and_ends():
    ahead = prefetch(iter(range(20)), lambda x: x * 10, depth=3)
    assert list(ahead) == [x * 10 for x in range(20)]
    assert list(ahead) == [] and not threads()


def test_prefetch_runs_ahead_but_no_further_than_its_depth():
    made = []
    with prefetch(iter(range(100)), made.append, depth=3) as ahead:
        next(ahead)
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(made) == 5  # one taken, three ready, one in the hand of the thread
    assert not threads()


@pytest.mark.parametrize("where", ["source", "place"])
def test_prefetch_raises_the_error_after_the_items_before_it(where):
    def source():
        yield from range(3)
        if where == "source":
            raise KeyError("bad row")
        yield 3

    def place(x):
        if x == 3:
            raise KeyError("bad row")
        return x

    ahead = prefetch(source(), place, depth=2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="bad row"):
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)
    assert not threads()


def test_prefetch_closes_at_once_even_when_full_and_twice():
    ahead = prefetch(itertools.count(), lambda x: x, depth=2)
    next(ahead)
    time.sleep(0.1)
    began = time.monotonic()
    ahead.close()
    ahead.close()
    assert time.monotonic() - began < 1 and not threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_prefetch_tells_how_long_the_consumer_waited():
    def slow():
        for x in range(3):
            time.sleep(0.05)
            yield x

    with prefetch(slow(), lambda x: x, depth=2) as ahead:
        assert list(ahead) == [0, 1, 2]
        assert 0.1 < ahead.wait_seconds < 2
    with prefetch(iter(range(5)), lambda x: x, depth=5) as ahead:
        time.sleep(0.1)
        assert list(ahead) == [0, 1, 2, 3, 4]
        assert ahead.wait_seconds < 0.1
