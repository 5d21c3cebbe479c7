"""Corpora → batches: for training without end and resumable at once, for evaluation each token once.

The i-th global batch is a pure function of (config, seed, i). A run resumes from a number, and each of
several processes takes its own rows of the same batch, so their count changes nothing. With a corruption, rows
are made of chunks of the stream, each from randomness that its number seeds: another in every epoch.
B global rows · L tokens of a row.
"""

import contextlib
import dataclasses
import functools
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar

import numpy as np

import jaxlm.data.cache as cache
from jaxlm.data.corpus import Corpora, Corpus, DataConfig, digest
from jaxlm.data.corrupt import Chunks, CorruptedRows, Corruption, corrupted
from jaxlm.data.packing import Batch, Packed, Row, Rows, Windows, stack
from jaxlm.data.sources import stream, text_of
from jaxlm.data.tokenizer import Tokenizer

T = TypeVar("T")
U = TypeVar("U")
State = dict[str, Any]  # small and plain JSON: it goes into checkpoints
STREAM_CHUNK = 64  # documents of a stream that are tokenised together, and read again on resuming


def train_batches(
    config: DataConfig,
    corpora: Corpora,
    *,
    seed: int,
    corruption: Corruption | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "TrainBatches | StreamBatches":
    """The training batches that a config asks for, from corpora or from a stream; both have `iterate` and `total`.

    With a corruption rows are what it makes of each `raw` tokens of the stream; the shorter rest of a corpus, at its
    end, is dropped. Each process gets its rows of every batch; None asks JAX which process this is. Raises ValueError
    where the processes cannot share the rows evenly, or the layout or the size of a corpus does not allow the corruption.
    """
    processes = {"process_index": process_index, "process_count": process_count}
    if config.sources[0].streaming:
        return StreamBatches(config, corpora, seed=seed, corruption=corruption, **processes)
    return TrainBatches(config, corpora, seed=seed, corruption=corruption, **processes)


class TrainBatches:
    """Shuffled batches of cached corpora, addressed by number."""

    def __init__(
        self,
        config: DataConfig,
        corpora: Corpora,
        *,
        seed: int,
        corruption: Corruption | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        import grain

        self.batch_size = config.batch_size
        self.mine = rows_of(config.batch_size, process_index, process_count)
        sources: list[Any]
        if corruption is None:
            sources = [_rows(config, corpora.tokenizer, corpus) for corpus in corpora.train]
            self._blank = sources[0].blank()
        else:
            sources = [Chunks(corpus.tokens, corruption.raw, whole=True) for corpus in corpora.train]
            self._blank = corruption.blank()
            _check_chunks(config, corpora, corruption)
        shuffled = []
        for number, rows in enumerate(sources):
            # One seed per source, hashed: grain's epoch e of seed s is epoch 0 of seed s + e.
            own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            dataset = grain.MapDataset.source(rows).shuffle(seed=own).repeat(None)
            if corruption is not None:
                dataset = dataset.map_with_index(functools.partial(corrupted, corruption, (seed, number)))
            shuffled.append(dataset)
        weights = [source.weight for source in config.sources]
        assert len(weights) == len(sources), f"{len(sources)} corpora for {len(weights)} sources"
        self._dataset = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights=weights)
        self.per_epoch: int | None = None  # of a mixture each source has its own
        self.total_rows: int | None = None
        """Rows in all the epochs; None: without end."""
        if config.epochs is not None:
            shares = [len(rows) * sum(weights) / weight for rows, weight in zip(sources, weights, strict=True)]
            self.total_rows = max(1, round(config.epochs * min(shares)))

    @property
    def total(self) -> int | None:
        """Global batches before the data is exhausted; None: without end. The last may be padded with empty rows."""
        return None if self.total_rows is None else -(-self.total_rows // self.batch_size)

    def batch(self, i: int) -> Batch:
        """This process's rows of the i-th global batch: tokens_BL, targets_BL, weights_BL (+ segments_BL, positions_BL),
        or what the corruption's rows hold."""
        last = self.total_rows
        numbers = range(i * self.batch_size + self.mine.start, i * self.batch_size + self.mine.stop)
        return stack([self._dataset[n] if last is None or n < last else self._blank for n in numbers])

    def iterate(self, start: State | None = None) -> Iterator[tuple[Batch, State]]:
        """(batch, state of what comes after it) from a state on, the first batch if None; ends with the epochs."""
        for i in itertools.count(start["batch"] if start else 0):
            if self.total is not None and i >= self.total:
                return
            yield self.batch(i), {"batch": i + 1}


class StreamBatches:
    """Batches of one streaming Hugging Face dataset, tokenised as it arrives, in the order of the stream.

    Every process reads the whole stream and keeps its rows. Held-out documents are left out wherever they
    turn up. Nothing is shuffled, because a shuffle buffer cannot be resumed exactly: shuffle the stored
    data. A state holds the place of the current chunk of documents in the stream and the tokens used of it; with a
    corruption also the number of the next row, which seeds it.
    """

    per_epoch: int | None = None

    def __init__(
        self,
        config: DataConfig,
        corpora: Corpora,
        *,
        seed: int = 0,
        corruption: Corruption | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        self.config, self.tokenizer, self.source = config, corpora.tokenizer, config.sources[0]
        self.seed, self.corruption = seed, corruption
        self.mine = rows_of(config.batch_size, process_index, process_count)
        self._heldout = {digest(text.encode()) for corpus in corpora.heldout for text in corpus.texts()}

    @functools.cached_property
    def total(self) -> int | None:
        """Global batches of all epochs; None: without end, or a stream of more than STREAM_HEAD documents, whose length is
        not known before it has been read."""
        if self.config.epochs is None:
            return None
        read = list(itertools.islice(stream(self.source), cache.STREAM_HEAD + 1))
        if len(read) > cache.STREAM_HEAD:
            return None
        kept = self._kept(text_of(row, self.source) for row in read)
        tokens = int(self.config.epochs) * sum(len(ids) + 1 for ids in self.tokenizer.encode_batch(kept))
        rows = tokens // self.corruption.raw if self.corruption is not None else -(-tokens // self.config.length)
        if self.corruption is not None and not rows:
            raise ValueError(
                f"streaming source {self.source.path!r} has {tokens:,} tokens to train on, but a row takes {self.corruption.raw}: "
                "give a shorter data.length, or more text"
            )
        return -(-rows // self.config.batch_size)

    def _kept(self, texts: Iterable[str]) -> list[str]:
        """Those that are not empty and not held out."""
        return [text for text in texts if text and digest(text.encode("utf8", "replace")) not in self._heldout]

    def iterate(self, start: State | None = None) -> Iterator[tuple[Batch, State]]:
        """As `TrainBatches.iterate`; a batch that the last epoch cannot fill is padded, with weights 0."""
        length = self.config.length if self.corruption is None else self.corruption.raw
        size = self.config.batch_size * length
        state = start or {"epoch": 0, "place": None, "used": 0, "previous": self.tokenizer.bos_id}
        previous, row = state["previous"], state.get("row", 0)
        buffer = np.zeros(0, np.int32)
        pieces: list[tuple[int, State, int]] = []  # (tokens unused, where its chunk begins, tokens of it in all)
        for tokens, place in self._chunks(state["epoch"], state["place"]):
            pieces.append((len(tokens), place, len(tokens)))
            buffer = np.concatenate([buffer, tokens])
            if start and state["used"]:  # resuming in the midst of this chunk
                pieces[0] = (len(tokens) - state["used"], place, len(tokens))
                buffer, start = buffer[state["used"] :], None
            while len(buffer) > size:  # not at equality: a state must lie inside a chunk that is known
                taken, buffer = buffer[:size], buffer[size:]
                left = size
                while pieces[0][0] <= left:
                    left -= pieces.pop(0)[0]
                unused, place, whole = pieces[0]
                pieces[0] = (unused - left, place, whole)
                batch = self._batch(taken, previous, row)
                previous, row = int(taken[-1]), row + self.config.batch_size
                yield batch, {**place, "used": whole - unused + left, "previous": previous, **self._counted(row)}
        if self.corruption is not None:
            buffer = buffer[: len(buffer) // length * length]
        if len(buffer):
            assert self.config.epochs is not None, "a stream without end has no last batch"
            end = {"epoch": int(self.config.epochs), "place": None, "used": 0, "previous": int(buffer[-1])}
            yield self._batch(buffer, previous, row), {**end, **self._counted(row + self.config.batch_size)}

    def _counted(self, row: int) -> State:
        return {} if self.corruption is None else {"row": row}

    def _chunks(self, epoch: int, place: State | None) -> Iterator[tuple[np.ndarray, State]]:
        """(tokens of a few documents, where in the stream they begin), epoch after epoch."""
        while self.config.epochs is None or epoch < self.config.epochs:
            dataset = stream(self.source)
            if place is not None:
                dataset.load_state_dict(place)
            texts = iter(dataset)
            found = place is not None
            here = place  # None: the beginning
            while chunk := [text_of(row, self.source) for row in itertools.islice(texts, STREAM_CHUNK)]:
                if kept := self._kept(chunk):
                    found = True
                    ends = [np.array([self.tokenizer.eos_id], np.int32)] * len(kept)
                    both = itertools.chain.from_iterable(zip(self.tokenizer.encode_batch(kept), ends, strict=True))
                    yield np.concatenate(list(both)), {"epoch": epoch, "place": here}
                here = dataset.state_dict()
            if not found:
                raise ValueError(f"streaming source {self.source.path!r} gives no text beside the held-out documents")
            epoch, place = epoch + 1, None

    def _batch(self, taken: np.ndarray, previous: int, first: int) -> Batch:
        if self.corruption is None:
            windows: Rows = Windows(taken, self.config.length, previous, self.tokenizer.eos_id)
        else:
            windows = CorruptedRows(Chunks(taken, self.corruption.raw, whole=True), self.corruption, (self.seed, 0), first)
        return stack([windows[i] if i < len(windows) else windows.blank() for i in self.mine])


@dataclasses.dataclass(frozen=True)
class EvalBatches(Sequence[Batch]):
    """Batches that cover every token of some corpora exactly once, in order, or the first `most` rows of them; the last batch is
    padded with empty rows."""

    sources: tuple[Rows, ...]
    batch_size: int
    mine: range
    """The rows of each global batch that this process takes."""
    most: int | None = None
    """Number of rows; None: all."""

    @property
    def total(self) -> int:
        """Rows of the corpora."""
        return sum(map(len, self.sources))

    @property
    def rows(self) -> int:
        """Rows that the batches hold, padding aside."""
        return self.total if self.most is None else min(self.most, self.total)

    def __len__(self) -> int:
        return -(-self.rows // self.batch_size)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        return stack([self._row(i % len(self) * self.batch_size + j) for j in self.mine])

    def _row(self, number: int) -> Row:
        if number >= self.rows:
            return self.sources[0].blank()
        for rows in self.sources:
            if number < len(rows):
                return rows[number]
            number -= len(rows)
        raise AssertionError(f"row {number} of {self.rows}")


def eval_batches(
    config: DataConfig,
    corpora: Corpora,
    *,
    rows: int | None = None,
    most: int | None = None,
    corruption: Corruption | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> EvalBatches:
    """The held-out text in batches of `rows` (None: `config.batch_size`): every token is a target exactly once, or the first
    `most` rows of it.

    With a corruption every token is read once; the rest of a corpus, shorter than a row, makes a padded one. What is
    drawn for a row depends on its number alone, so that any two evaluations ask the same.
    """
    if corruption is None:
        sources = tuple(_rows(config, corpora.tokenizer, corpus) for corpus in corpora.heldout)
    else:
        _check_layout(config)
        chunks = [Chunks(corpus.tokens, corruption.raw, whole=False) for corpus in corpora.heldout]
        firsts = itertools.accumulate(map(len, chunks), initial=0)
        sources = tuple(CorruptedRows(own, corruption, (), first) for own, first in zip(chunks, firsts, strict=False))
    rows = rows or config.batch_size
    return EvalBatches(sources, rows, rows_of(rows, process_index, process_count), most)


def _rows(config: DataConfig, tokenizer: Tokenizer, corpus: Corpus) -> Rows:
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    if config.layout == "packed":
        place = corpus.place and corpus.place.with_name(f"{corpus.place.name}.packed-{config.length}")
        return Packed(corpus.tokens, corpus.offsets, config.length, **ids, place=place)
    return Windows(corpus.tokens, config.length, **ids)


def _check_layout(config: DataConfig) -> None:
    if config.layout != "windows":
        raise ValueError(f"data layout {config.layout!r} is for plain next-token rows: this objective needs data layout 'windows'")


def _check_chunks(config: DataConfig, corpora: Corpora, corruption: Corruption) -> None:
    _check_layout(config)
    for source, corpus in zip(config.sources, corpora.train, strict=True):
        if len(corpus.tokens) < corruption.raw:
            raise ValueError(
                f"source {source.path or source.kind!r} has {len(corpus.tokens)} tokens to train on, fewer than the "
                f"{corruption.raw} of one row: give a shorter data length"
            )


def rows_of(batch_size: int, process_index: int | None, process_count: int | None) -> range:
    """The rows of each global batch that a process takes: one run of them, equally many for each."""
    if process_index is None or process_count is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    assert 0 <= process_index < process_count, f"process {process_index} of {process_count}"
    if batch_size % process_count:
        raise ValueError(f"data batch_size {batch_size} cannot be shared by {process_count} processes: give a multiple")
    each = batch_size // process_count
    return range(process_index * each, (process_index + 1) * each)


# --- running ahead ----------------------------------------------------------------------------


def prefetch(iterator: Iterator[T], place: Callable[[T], U], depth: int) -> "Prefetch[U]":
    """`place(item)` for each item of the iterator, made up to `depth` ahead of the consumer on a thread.

    `place` puts a batch on the devices, so that the copy too is done while the device computes.
    """
    return Prefetch(iterator, place, depth)


class Prefetch(Iterator[U]):
    """An iterator fed by a thread. Call `close`, or use it in a `with`, to stop before its end.

    An error of the source or of `place` is raised where the consumer asks for the item that it stands for.
    """

    def __init__(self, iterator: Iterator[Any], place: Callable[[Any], U], depth: int):
        self.wait_seconds = 0.0
        """Time that the consumer has spent waiting, in all: near 0 where the data keeps up."""
        self._ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(iterator, place), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, iterator: Iterator[Any], place: Callable[[Any], U]) -> None:
        try:
            for item in iterator:
                if not self._put(("item", place(item))):
                    return
            self._put(("end", None))
        except BaseException as error:  # raised again in the consumer
            self._put(("error", error))

    def _put(self, item: tuple[str, Any]) -> bool:
        """False once the consumer is gone: a plain `put` would wait for it for ever."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> U:
        if self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        kind, value = self._ready.get()
        self.wait_seconds += time.perf_counter() - began
        if kind == "item":
            return value
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop what it made ahead; may be called again.

        A thread in the midst of an item is given ten seconds: it is a daemon, and ends with the process.
        """
        self._closed.set()
        self._thread.join(timeout=10)
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
