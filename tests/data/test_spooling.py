"""Documents on disk: duplicates and the held-out part are those of a plain computation, however small the chunks."""

import functools
import math
import random
import tracemalloc

import numpy as np
import pytest

from jaxlm.data import corpus, packing, spooling
from jaxlm.data.corpus import HoldoutConfig, digest
from jaxlm.data.spooling import RECORD, mark_first, split, write_records

RNG = random.Random(0)
TEXTS = [f"text {RNG.randrange(120)} é" * (1 + RNG.randrange(3)) for _ in range(300)] + ["", "last"]


@pytest.fixture
def small(monkeypatch):
    """Chunks of 7 records, partitions of 20: many edges."""
    monkeypatch.setattr(spooling, "CHUNK", 7)
    monkeypatch.setattr(spooling, "PARTITION", 20)
    monkeypatch.setattr(corpus, "SPANS", 7)


def spooled(folder):
    assert write_records(TEXTS, folder / "text", folder / "records") == len(TEXTS) - 1
    return np.memmap(folder / "text", np.uint8, "r"), np.memmap(folder / "records", RECORD, "r")


def distinct(folder, records) -> np.ndarray:
    first = np.zeros(len(records), bool)
    mark_first(records["hash"], first, folder / "partitions")
    return first


def test_duplicates_are_those_of_a_set(tmp_path, small):
    _, records = spooled(tmp_path)
    seen: set[str] = set()
    expected = [not (text in seen or seen.add(text)) for text in filter(None, TEXTS)]
    assert distinct(tmp_path, records).tolist() == expected
    assert 0 < sum(expected) < len(expected) and not (tmp_path / "partitions").exists()


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("by, streaming", [("document", False), ("document", True), ("tail", False)])
def test_the_split_is_that_of_lists(tmp_path, small, by, streaming, fraction):
    raw, records = spooled(tmp_path)
    first = distinct(tmp_path, records)
    made = {}

    def spans(name, n):
        return made.setdefault(name, np.full((n, 2), -1))

    split(
        raw, records, first, HoldoutConfig(by, fraction), "x", streaming, functools.partial(spans, "train"),
        functools.partial(spans, "heldout"),
    )  # fmt: skip
    train, held = ([raw[a:b].tobytes().decode() for a, b in made[name]] for name in ("train", "heldout"))
    texts = list(dict.fromkeys(filter(None, TEXTS)))
    if by == "tail":
        cut = int(sum(map(len, texts)) * (1 - fraction))
        assert "".join(train) == "".join(texts)[:cut] and "".join(held) == "".join(texts)[cut:]
        return
    if streaming:
        n = min(math.ceil(fraction * len(texts)), len(texts) - 1)
        expected = texts[:n]
    else:
        scores = {text: int.from_bytes(digest(text.encode())[:8]) for text in texts}
        chosen = {text for text in texts if scores[text] < fraction * 2**64} | {min(texts, key=scores.get)}
        expected = [text for text in texts if text in chosen - {max(texts, key=scores.get)}]
    assert held == expected and train == [text for text in texts if text not in expected]


def test_groups_are_those_of_a_plain_loop(small):
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 30, 100))
    spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    bins: dict[int, list[int]] = {}
    for i, (start, _) in enumerate(spans):
        bins.setdefault(int(start) // 50, []).append(i)
    assert list(corpus.groups(spans, 50)) == [(group[0], group[-1] + 1) for group in bins.values()]
    assert corpus.bytes_of(spans) == ends[-1]


def test_packing_by_groups_holds_every_token_once_and_is_kept_on_disk(tmp_path, monkeypatch):
    """Groups of about 20 pieces, cut off after two of them: the rest is packed behind them, and then all is opened."""
    monkeypatch.setattr(packing, "PIECES", 20)
    offsets = np.cumsum([0, *np.random.default_rng(0).integers(1, 40, 200)])
    stream = np.arange(offsets[-1], dtype=np.uint16)
    make = functools.partial(packing.Packed, stream, offsets, 16, 60000, 60001)
    in_memory, real, calls = make(), packing._pack, []

    def counted(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(packing, "_pack", counted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "plan")
    monkeypatch.setattr(packing, "_pack", lambda *args: calls.append(args) or real(*args))
    on_disk = make(tmp_path / "plan")
    groups = list(packing._groups(offsets, 16))
    assert len(calls) == len(groups) > 10, "the first two were kept"
    again = make(tmp_path / "plan")
    assert len(calls) == len(groups)
    assert sorted(file.name for file in (tmp_path / "plan").iterdir()) == ["bounds.npy", "pieces.npy"]
    whole = packing.stack([in_memory[i] for i in range(len(in_memory))])
    for rows in (on_disk, again):
        for name, value in packing.stack([rows[i] for i in range(len(rows))]).items():
            np.testing.assert_array_equal(value, whole[name])
    assert sorted(whole["targets_BL"][whole["weights_BL"] > 0].tolist()) == stream.tolist()
    assert len(in_memory) < 1.2 * len(stream) / 16, "little of it is padding"


def prepare(folder, count: int) -> int:
    """Spool, split and pack so many documents; the most memory that this took, in bytes."""
    folder.mkdir()
    tracemalloc.start()
    write_records((f"document {i % (count - 500)}" for i in range(count)), folder / "text", folder / "records")
    records = np.memmap(folder / "records", RECORD, "r")
    first = np.lib.format.open_memmap(folder / "first.npy", "w+", np.bool_, (count,))
    mark_first(records["hash"], first, folder / "partitions")
    assert np.count_nonzero(first) == count - 500

    def spans(name, n):
        return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.int64, (n, 2))

    raw = np.memmap(folder / "text", np.uint8, "r")
    split(raw, records, first, HoldoutConfig(), "x", False, functools.partial(spans, "a"), functools.partial(spans, "b"))
    offsets = np.lib.format.open_memmap(folder / "offsets.npy", "w+", np.int64, (count + 1,))
    offsets[:] = np.arange(count + 1) * 7
    packing.Packed(np.zeros(1, np.uint16), offsets, 16, 0, 0, folder / "plan")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch):
    """Four times the documents, with chunks and partitions of 1,000."""
    for module, name in ((spooling, "CHUNK"), (spooling, "PARTITION"), (packing, "PIECES")):
        monkeypatch.setattr(module, name, 1_000)
    few, many = (prepare(tmp_path / str(count), count) for count in (4_000, 16_000))
    assert many < 1.2 * few


def test_memory_does_not_grow_where_most_documents_are_the_same(tmp_path, monkeypatch):
    """Copies of one text share a hash, and so a partition."""
    for name, value in (("CHUNK", 1_000), ("PARTITION", 1_000), ("MOST", 4)):  # each partition has a file with a buffer
        monkeypatch.setattr(spooling, name, value)
    peaks = []
    for count in (4_000, 16_000):
        hashes = np.random.default_rng(0).integers(0, 1 << 63, (count, 2), np.uint64)
        hashes[np.arange(count) % 10 > 0] = hashes[1]
        first = np.zeros(count, bool)
        tracemalloc.start()
        mark_first(hashes, first, tmp_path / "partitions")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert np.flatnonzero(first).tolist() == sorted({0, 1, *range(0, count, 10)})
    assert peaks[1] < 1.5 * peaks[0]
