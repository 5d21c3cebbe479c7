"""Documents of a source on disk: one record each, exact duplicates found and a part held out, in memory that does not grow.

Everything goes through the records in chunks. To find duplicates, records are distributed over partitions by their hash and
each partition is sorted by itself: for 10⁹ documents 256 partitions of 100 MB, of which one is in memory at a time.
Letters: N documents.
"""

import math
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxlm.data.corpus import HoldoutConfig, digest

CHUNK = 1 << 20
"""Records that are looked at together."""
PARTITION = 1 << 22
"""Records that are sorted in memory at most, as long as that takes no more than MOST partitions."""
MOST = 256
"""Partitions, each with an open file."""

RECORD = np.dtype([("end", "<i8"), ("characters", "<i8"), ("hash", "<u8", 2)])
"""End of a document's text in bytes, its characters, and the hash of its bytes."""
_HASH = np.dtype([("hash", "<u8", 2), ("number", "<i8")])

Spans = Callable[[int], np.ndarray]
"""Allocates an (n, 2) array for spans."""


def write_records(texts: Iterable[str], text_file: pathlib.Path, record_file: pathlib.Path) -> int:
    """Write all texts that are not empty one behind the other as UTF-8, and a RECORD of each; returns how many."""
    buffer, filled, end, count = np.zeros(1 << 16, RECORD), 0, 0, 0
    with text_file.open("wb") as out, record_file.open("wb") as index:
        for text in filter(None, texts):
            raw = text.encode("utf8", "replace")
            mark, end, count = digest(raw), end + len(raw), count + 1
            out.write(raw)
            buffer[filled] = (end, len(text), (int.from_bytes(mark[:8]), int.from_bytes(mark[8:])))
            filled += 1
            if filled == len(buffer):
                index.write(buffer.view(np.uint8))
                filled = 0
        index.write(buffer[:filled].view(np.uint8))
    return count


def mark_first(hash_N2: np.ndarray, first_N: np.ndarray, folder: pathlib.Path) -> None:
    """Set `first_N` where no document before has the same hash. Partitions are kept in `folder`, which is removed again.

    Duplicates within a chunk go into no partition: a text that makes up most of a corpus would fill one of them.
    """
    count = len(hash_N2)
    parts = min(MOST, 1 << max(0, math.ceil(math.log2(count / PARTITION)))) if count > PARTITION else 1

    def firsts(records: np.ndarray) -> np.ndarray:
        """Records in the order of their hashes, of equal ones the first document's."""
        order = np.lexsort((records["number"], records["hash"][:, 1], records["hash"][:, 0]))
        hashes = records["hash"][order]
        new = np.ones(len(order), bool)
        new[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
        return records[order[new]]

    def records_of(start: int) -> np.ndarray:
        part = np.asarray(hash_N2[start : start + CHUNK])
        records = np.empty(len(part), _HASH)
        records["hash"], records["number"] = part, np.arange(start, start + len(part))
        return firsts(records)

    def mark(records: np.ndarray) -> None:
        first_N[firsts(records)["number"]] = True

    if parts == 1:
        mark(np.concatenate([records_of(start) for start in range(0, count, CHUNK)]))
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = [(folder / str(part)).open("wb") for part in range(parts)]
    shift = np.uint64(64 - int(math.log2(parts)))
    for start in range(0, count, CHUNK):
        records = records_of(start)
        edges = np.searchsorted(records["hash"][:, 0] >> shift, np.arange(parts + 1))
        for file, left, right in zip(files, edges[:-1], edges[1:], strict=True):
            file.write(records[left:right].tobytes())
    for file in files:
        file.close()
        mark(np.fromfile(file.name, _HASH))
        pathlib.Path(file.name).unlink()
    folder.rmdir()


def kept(record_N: np.ndarray, first_N: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of (spans in the text, (n, 2); their records), duplicates left out."""
    before = 0
    for start in range(0, len(record_N), CHUNK):
        records = np.asarray(record_N[start : start + CHUNK])
        chosen = np.asarray(first_N[start : start + CHUNK])
        spans = np.stack([np.concatenate([[before], records["end"][:-1]]), records["end"]], axis=1)
        before = int(records["end"][-1])
        yield spans[chosen], records[chosen]


def split(
    text: np.ndarray, record_N: np.ndarray, first_N: np.ndarray, holdout: HoldoutConfig, name: str, streaming: bool,
    train: Spans, heldout: Spans,
) -> None:  # fmt: skip
    """Write the spans of text to train on and to hold out, each int64 (n, 2), where `train(n)` and `heldout(n)` say.

    Raises ValueError, in one line, where there is too little text for both.
    """
    if holdout.by == "tail":
        if streaming:
            raise ValueError(f"holdout by 'tail' cannot work with streaming source {name!r}, which has no end: use 'document'")
        _tail(text, record_N, first_N, holdout.fraction, name, train, heldout)
        return
    count = sum(len(spans) for spans, _ in kept(record_N, first_N))
    if count < 2:
        raise ValueError(f"source {name!r} has one document, none to hold out: use holdout by 'tail'")
    if streaming:  # the first ones: what comes later in a stream is not known yet
        most = min(math.ceil(holdout.fraction * count), count - 1)
        _fill(record_N, first_N, lambda start, records: np.arange(start, start + len(records)) < most, most, count, train, heldout)
        return
    # Those with the lowest hashes; at least one each, whatever the order.
    bound = np.uint64(int(holdout.fraction * 2**64))
    lows, highs, below, start = [], [], 0, 0
    for _, records in kept(record_N, first_N):
        score = records["hash"][:, 0]
        if len(score):
            lows.append((int(score.min()), start + int(score.argmin())))
            highs.append((-int(score.max()), start + int(score.argmax())))
        below, start = below + int((score < bound).sum()), start + len(score)
    (lowest, first), (highest, last) = min(lows), min(highs)
    held = below + (lowest >= int(bound)) - (-highest < int(bound))

    def chosen(start: int, records: np.ndarray) -> np.ndarray:
        number = np.arange(start, start + len(records))
        return ((records["hash"][:, 0] < bound) | (number == first)) & (number != last)

    _fill(record_N, first_N, chosen, held, count, train, heldout)


def _fill(
    record_N: np.ndarray, first_N: np.ndarray, chosen: Callable[[int, np.ndarray], np.ndarray], held: int, count: int,
    train: Spans, heldout: Spans,
) -> None:  # fmt: skip
    """Write the spans of `count` documents: `held` ones for which `chosen(number of the first, records)` is true apart."""
    parts, at, start = (train(count - held), heldout(held)), [0, 0], 0
    for spans, records in kept(record_N, first_N):
        mask = chosen(start, records)
        for i, some in enumerate((spans[~mask], spans[mask])):
            parts[i][at[i] : at[i] + len(some)] = some
            at[i] += len(some)
        start += len(spans)


def _tail(
    text: np.ndarray, record_N: np.ndarray, first_N: np.ndarray, fraction: float, name: str, train: Spans, heldout: Spans
) -> None:
    """The last characters of the whole text, from the midst of a document on."""
    chunks = [(int(records["characters"].sum()), len(records)) for _, records in kept(record_N, first_N)]
    cut = int(sum(characters for characters, _ in chunks) * (1 - fraction))
    count, past, start = sum(n for _, n in chunks), 0, 0
    begin = middle = inside = whole = 0
    for spans, records in kept(record_N, first_N):
        ends = past + np.cumsum(records["characters"])
        if len(ends) and ends[-1] > cut:  # the document that holds the cut is in this chunk
            d = int(np.searchsorted(ends, cut, side="right"))
            begin, stop = (int(x) for x in spans[d])
            inside, whole = cut - int(ends[d] - records["characters"][d]), start + d
            middle = begin + len(text[begin:stop].tobytes().decode()[:inside].encode())
            break
        past, start = int(ends[-1]) if len(ends) else past, start + len(ends)
    if not whole and not inside:
        raise ValueError(f"source {name!r} has too little text to hold out {fraction} of it")
    trained, held, number = train(whole + bool(inside)), heldout(count - whole), 0
    for spans, _ in kept(record_N, first_N):
        own = spans.copy()
        if 0 <= whole - number < len(own):
            own[whole - number, 0] = middle
        before = max(0, min(len(own), whole - number))
        trained[number : number + before] = own[:before]
        after = number + before - whole
        held[after : after + len(own) - before] = own[before:]
        number += len(own)
    if inside:
        trained[whole] = begin, middle
