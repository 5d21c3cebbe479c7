"""A streaming dataset: every token once, the held-out ones never, and an exact place to resume from."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.data import cache, pipeline
from jaxlm.data.cache import build_corpora
from jaxlm.data.corpus import DataConfig, HoldoutConfig
from jaxlm.data.corrupt import CorruptConfig, make_corruption
from jaxlm.data.pipeline import StreamBatches, train_batches
from jaxlm.data.sources import SourceConfig
from jaxlm.data.tokenizer import TokenizerConfig, train_tokenizer
from jaxlm.experiment import ExperimentConfig, Run

TEXTS = [f"streamed document {i} " + "y" * (i * 7 % 23) for i in range(50)]
ALONE = {"process_index": 0, "process_count": 1}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """50 documents in five files, of which 5 are held out; chunks of 4 documents, to have many edges."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(cache, "STREAM_HEAD", 20)
    monkeypatch.setattr(pipeline, "STREAM_CHUNK", 4)
    folder = tmp_path / "stream"
    folder.mkdir()
    for shard in range(5):
        rows = TEXTS[shard * 10 : shard * 10 + 10]
        (folder / f"train-{shard}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return DataConfig(
        sources=(SourceConfig("huggingface", path=str(folder), streaming=True),),
        tokenizer=TokenizerConfig("bytes"),
        holdout=HoldoutConfig(fraction=0.25),
        length=8,
        batch_size=4,
        epochs=1.0,
        cache=str(tmp_path / "cache"),
    )


def folder_of(config):
    return pathlib.Path(config.sources[0].path)


def other(config, **changes):
    return dataclasses.replace(config, **changes)


def targets(batches):
    return np.concatenate([batch["targets_BL"][batch["weights_BL"] > 0] for batch, _ in batches])


def test_the_first_documents_are_held_out_and_only_the_head_is_read(config):
    corpora = build_corpora(config)
    assert list(corpora.heldout[0].texts()) == TEXTS[:5]
    assert list(corpora.train[0].texts()) == TEXTS[5:20]
    characters = build_corpora(other(config, tokenizer=TokenizerConfig("characters")))
    assert set(characters.tokenizer.characters) == set("".join(TEXTS[5:20]))
    with pytest.raises(ValueError, match="has no end: use 'document'"):
        build_corpora(other(config, holdout=HoldoutConfig("tail", 0.1)))


def test_a_stream_shorter_than_its_head_keeps_most_of_it(config, monkeypatch):
    """The share is of the documents that there are, not of those that a longer stream would have had."""
    monkeypatch.setattr(cache, "STREAM_HEAD", 10_000)
    corpora = build_corpora(config)
    assert list(corpora.heldout[0].texts()) == TEXTS[:13], "a quarter of 50, rounded up"
    assert list(corpora.train[0].texts()) == TEXTS[13:]


def test_a_saved_data_set_with_other_content_is_refused(config, tmp_path):
    import datasets

    def saved(texts):
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
        return other(config, sources=(SourceConfig("huggingface", path=str(tmp_path / "saved"), streaming=True),))

    build_corpora(saved(TEXTS))
    build_corpora(saved(TEXTS))
    with pytest.raises(ValueError, match="no longer fits its data"):
        build_corpora(saved([text.upper() for text in TEXTS]))


def test_a_run_of_epochs_needs_steps_where_the_length_of_the_stream_is_not_known(config, tmp_path):
    """Without `eval_every` evaluations come every 200 steps: a stream has no epoch to go by."""
    tree = {
        "data": {"length": 8, "batch_size": 8, "epochs": 2, "tokenizer": {"kind": "bytes"}, "cache": str(tmp_path / "cache"),
                 "sources": [{"kind": "huggingface", "path": str(folder_of(config)), "streaming": True}]},
        "model": {"layers": 1, "width": 16, "heads": 2, "positions": 8}, "runs": str(tmp_path / "runs"),
    }  # fmt: skip
    run = Run(configs.build(ExperimentConfig, tree))
    with pytest.raises(ValueError, match=r"data.epochs 2 of a long stream.*--train.steps"):
        run.train()
    assert not (tmp_path / "runs/run/config.yaml").exists()
    known = Run(configs.build(ExperimentConfig, {**tree, "train": {"steps": 7}}))
    assert known.steps == 7 and known.eval_every == 200


@pytest.mark.parametrize("epochs", [1.0, 3.0])
@pytest.mark.parametrize("corrupt", [False, True])
def test_the_number_of_batches_is_known_where_the_head_is_the_whole_stream(config, monkeypatch, epochs, corrupt):
    monkeypatch.setattr(cache, "STREAM_HEAD", 50)
    config = other(config, epochs=epochs, tokenizer=TokenizerConfig("bytes", special=("mask",)))
    corpora = build_corpora(config)
    corruption = make_corruption("masked", CorruptConfig(), corpora.tokenizer, 8, "encoder") if corrupt else None
    batches = train_batches(config, corpora, seed=0, corruption=corruption, **ALONE)
    assert batches.total == len(list(batches.iterate()))
    assert train_batches(other(config, epochs=None), corpora, seed=0, **ALONE).total is None
    monkeypatch.setattr(cache, "STREAM_HEAD", 49)
    assert train_batches(config, corpora, seed=0, **ALONE).total is None


def test_a_stream_shorter_than_a_row_is_refused(config, monkeypatch):
    """It gave a run of no steps."""
    monkeypatch.setattr(cache, "STREAM_HEAD", 50)
    config = other(config, tokenizer=TokenizerConfig("bytes", special=("mask",)))
    corpora = build_corpora(config)
    corruption = make_corruption("masked", CorruptConfig(), corpora.tokenizer, 5000, "encoder")
    with pytest.raises(ValueError, match=r"tokens to train on, but a row takes 5000: give a shorter data\.length"):
        _ = train_batches(config, corpora, seed=0, corruption=corruption, **ALONE).total


def test_an_epoch_is_every_token_that_is_not_held_out_once(config):
    corpora = build_corpora(config)
    expected = np.concatenate([[*text.encode(), 256] for text in TEXTS[5:]])
    batches = train_batches(config, corpora, seed=0, **ALONE)
    assert isinstance(batches, StreamBatches) and batches.total is None
    np.testing.assert_array_equal(targets(batches.iterate()), expected)
    twice = train_batches(other(config, epochs=2.0), corpora, seed=0, **ALONE)
    np.testing.assert_array_equal(targets(twice.iterate()), np.concatenate([expected, expected]))
    tokens = np.concatenate([batch["tokens_BL"][batch["weights_BL"] > 0] for batch, _ in batches.iterate()])
    np.testing.assert_array_equal(tokens, [256, *expected[:-1]])


def test_a_held_out_document_that_comes_again_is_left_out(config):
    corpora = build_corpora(config)
    with folder_of(config).joinpath("train-4.jsonl").open("a") as file:
        file.write(json.dumps({"text": TEXTS[2]}) + "\n" + json.dumps({"text": ""}) + "\n")
    seen = targets(train_batches(config, corpora, seed=0, **ALONE).iterate())
    np.testing.assert_array_equal(seen, np.concatenate([[*text.encode(), 256] for text in TEXTS[5:]]))


@pytest.mark.parametrize("hops", [1, 7])
@pytest.mark.parametrize("epochs", [1.0, 3.0])
def test_resuming_is_exact_at_every_batch_also_from_a_resumed_run(config, epochs, hops):
    config = other(config, epochs=epochs)
    corpora = build_corpora(config)
    fresh = lambda: train_batches(config, corpora, seed=0, **ALONE)  # noqa: E731
    whole = list(fresh().iterate())
    for stop in range(1, len(whole) + 1, 3 if epochs == 1 else 13):
        first = json.loads(json.dumps(whole[stop - 1][1]))  # as a checkpoint keeps it
        rest = list(fresh().iterate(first))
        assert len(rest) == len(whole) - stop
        if len(rest) > hops:  # and again, from a state that the resumed run gives
            rest = rest[:hops] + list(fresh().iterate(json.loads(json.dumps(rest[hops - 1][1]))))
        for (batch, _), (expected, _) in zip(rest, whole[stop:], strict=True):
            for name in expected:
                np.testing.assert_array_equal(batch[name], expected[name], err_msg=f"{name} after {stop}")


def test_a_state_is_small_however_long_the_document(config):
    corpora = build_corpora(config)
    with folder_of(config).joinpath("train-0.jsonl").open("a") as file:
        file.write(json.dumps({"text": "long " * 20_000}) + "\n")
    states = [state for _, state in itertools.islice(train_batches(config, corpora, seed=0, **ALONE).iterate(), 1000)]
    assert max(len(json.dumps(state)) for state in states) < 2000


def test_processes_share_the_rows(config):
    corpora = build_corpora(config)
    whole = list(train_batches(config, corpora, seed=0, **ALONE).iterate())
    halves = [list(train_batches(config, corpora, seed=0, process_index=p, process_count=2).iterate()) for p in range(2)]
    for (batch, state), (one, state_one), (two, _) in zip(whole, *halves, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], np.concatenate([one[name], two[name]]))
        assert state == state_one


def test_without_epochs_the_stream_starts_again(config):
    corpora = build_corpora(config)
    once = len(list(train_batches(config, corpora, seed=0, **ALONE).iterate()))
    endless = train_batches(other(config, epochs=None), corpora, seed=0, **ALONE).iterate()
    assert len(list(itertools.islice(endless, 5 * once))) == 5 * once


def test_a_stream_of_held_out_documents_alone_is_told(config):
    corpora = build_corpora(config)
    for shard in range(5):
        (folder_of(config) / f"train-{shard}.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    with pytest.raises(ValueError, match="no text beside the held-out documents"):
        next(train_batches(other(config, epochs=None), corpora, seed=0, **ALONE).iterate())


@pytest.mark.parametrize("epochs", [1.0, 3.0])
def test_corrupted_rows_of_a_stream_resume_exactly_and_are_each_masked_in_their_own_way(config, epochs):
    config = other(config, epochs=epochs)
    corpora = build_corpora(config)
    tokenizer = train_tokenizer(TokenizerConfig("bytes", special=("mask",)), [])
    masked = make_corruption("masked", CorruptConfig(), tokenizer, 12, "encoder")
    fresh = lambda **share: train_batches(config, corpora, seed=5, corruption=masked, **{**ALONE, **share})  # noqa: E731
    whole = list(fresh().iterate())
    stream = np.concatenate([batch["targets_BL"][batch["segments_BL"] > 0] for batch, _ in whole])
    once = np.concatenate([[*text.encode(), 256] for text in TEXTS[5:]])
    expected = np.tile(once, int(epochs))
    np.testing.assert_array_equal(stream, expected[: len(expected) // 12 * 12])
    for stop in range(1, len(whole), 5):
        rest = list(fresh().iterate(json.loads(json.dumps(whole[stop - 1][1]))))
        assert len(rest) == len(whole) - stop
        for (batch, state), (other_batch, other_state) in zip(rest, whole[stop:], strict=True):
            assert state["row"] == other_state["row"]  # a resumed dataset spells its own place otherwise
            for name in batch:
                np.testing.assert_array_equal(batch[name], other_batch[name])
    halves = [list(fresh(process_index=p, process_count=2).iterate()) for p in range(2)]
    for (batch, _), *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(batch["tokens_BL"], np.concatenate([part["tokens_BL"] for part, _ in parts]))
    chosen = np.concatenate([batch["weights_BL"] for batch, _ in whole])
    assert len({row.tobytes() for row in chosen}) > 40  # of the 66 ways to choose two of twelve
    another = next(train_batches(config, corpora, seed=6, corruption=masked, **ALONE).iterate())[0]
    assert not np.array_equal(another["weights_BL"], whole[0][0]["weights_BL"])
