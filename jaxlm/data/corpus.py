"""Documents → a tokenised corpus on disk, split into train and held-out, built once and memory-mapped.

A cache folder is built in steps, each finished by a rename, so that a cut-off build goes on where it
stopped: read (`text.bin`), split, train the tokenizer on the train part alone, tokenise in shards,
join, and last of all `meta.json`. A folder with a `meta.json` is complete and never written again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import lzma
import math
import os
import pathlib
import platform
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jaxlm.config import diff
from jaxlm.data.sources import SourceConfig, describe, documents, expand
from jaxlm.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from jaxlm.report import bar, say

FORMAT = 1  # of the folder: raise it when the files change their meaning
SHARD_BYTES = 64 * 2**20  # text in one shard of tokens: what a cut-off build loses at most
BATCH_BYTES = 4 * 2**20  # text given to the tokenizer at once: enough to keep its threads busy
TRAINING_BYTES = 2**30  # text that a tokenizer is trained on at most: documents evenly spread over the train part
STREAM_HEAD = 10_000  # documents read ahead from a stream, to hold some out and to train the tokenizer


@dataclasses.dataclass(frozen=True)
class HoldoutConfig:
    """Which part of the text is never trained on."""

    by: Literal["document", "tail"] = "document"
    """Whole documents chosen by a hash of their text, or the last characters of the whole text."""
    fraction: float = 0.05
    """Share of the documents, or of the characters, that is held out."""

    def __post_init__(self):
        if not 0 < self.fraction < 1:
            raise ValueError(f"holdout fraction {self.fraction} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenised documents, each followed by the end-of-text token; memory-mapped where it comes from disk."""

    tokens: np.ndarray
    """All tokens, one after the other: uint16, or uint32 for vocabularies from 65,536."""
    offsets: np.ndarray
    """Document d is `tokens[offsets[d]:offsets[d + 1]]`, its end-of-text token included; int64, n_docs + 1."""
    text: np.ndarray
    """UTF-8 bytes that the documents' texts lie in, uint8."""
    spans: np.ndarray
    """Document d's text is `text[spans[d, 0]:spans[d, 1]]`; int64, (n_docs, 2)."""

    @property
    def n_docs(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of all the texts; end-of-text tokens stand for none."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def texts(self) -> Iterator[str]:
        """The text of each document, exactly as it was read."""
        return (self.text[start:stop].tobytes().decode() for start, stop in self.spans)


def in_memory(texts: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """A corpus of a few texts that is not written anywhere."""
    raw = [text.encode("utf8", "replace") for text in texts]
    ends = np.cumsum([0, *map(len, raw)])
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    text = np.frombuffer(b"".join(raw), np.uint8)
    tokens, lengths = _encode(text, spans, tokenizer, lambda n: None)
    return Corpus(tokens, np.cumsum([0, *lengths]), text, spans)


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """What `xz -9` makes of the texts joined, in bits per UTF-8 byte: the mark that a model has to beat."""
    press = lzma.LZMACompressor(format=lzma.FORMAT_XZ, preset=9)
    plain = packed = 0
    for text in texts:
        raw = text.encode("utf8", "replace")
        plain += len(raw)
        packed += len(press.compress(raw))
    return 8 * (packed + len(press.flush())) / plain


def bits_per_byte(nats_per_token: float, corpora: Iterable[Corpus]) -> float:
    """A loss in nats per token as bits per byte of text: nats/token × tokens/bytes ÷ ln 2.

    Unlike the loss it compares across tokenizers. It is exact for the mean loss over every token of
    these corpora (end-of-text tokens included, as `eval_batches` scores them) and an estimate for part of them.
    """
    corpora = list(corpora)
    tokens, size = sum(len(c.tokens) for c in corpora), sum(c.bytes for c in corpora)
    return nats_per_token * tokens / size / math.log(2)


# --- the cache folder -------------------------------------------------------------------------


def corpus_folder(
    sources: Sequence[SourceConfig], tokenizer: TokenizerConfig, holdout: HoldoutConfig, cache: str | None = None
) -> pathlib.Path:
    """Where these corpora are kept: a readable name and a hash of what was asked for (weights play no part)."""
    asked = [dataclasses.asdict(source) for source in sources]
    for source in asked:
        del source["weight"]
        if source["path"]:  # the same words may mean another folder elsewhere
            source["path"] = expand(source["path"])
            if source["kind"] == "files" or os.path.exists(source["path"]):
                source["path"] = os.path.abspath(source["path"])
    kept = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size if tokenizer.kind == "bpe" else None}
    identity: dict[str, Any] = {"sources": asked, "tokenizer": {**kept, "path": tokenizer.path}}
    identity |= {"holdout": dataclasses.asdict(holdout), "format": FORMAT}
    if any(source.kind == "embedded" for source in sources):
        identity["python"] = platform.python_version()
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()
    names = [pathlib.Path(source["path"] or source["kind"]).name.split(".")[0] or source["kind"] for source in asked]
    name = names[0] if len(names) == 1 else f"{names[0]}-and-{len(names) - 1}-more"
    root = expand(cache or os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm")
    spelled = re.sub(r"[^\w.-]+", "-", f"{name}-{tokenizer.kind}{kept['vocab_size'] or ''}")
    return pathlib.Path(root) / f"{spelled}-{digest}"


def build_corpora(
    sources: Sequence[SourceConfig], tokenizer: TokenizerConfig, holdout: HoldoutConfig, cache: str | None = None
) -> tuple[Tokenizer, list[Corpus], list[Corpus]]:
    """The tokenizer, and the train and the held-out corpus of each source; from the cache where it is there.

    One tokenizer is trained on the train parts of all sources. Exact duplicates within a source are
    dropped first, so none of its held-out documents is also trained on. Of a streaming source only the
    first documents are read: the first `fraction` of STREAM_HEAD is held out, the rest trains the tokenizer.
    Raises ValueError, in one line, where the data is not there or is no longer what the cache was built from.
    """
    folder = corpus_folder(sources, tokenizer, holdout, cache)
    held = {"format": FORMAT, "sources": [describe(source) for source in sources], "holdout": dataclasses.asdict(holdout)}
    if not (folder / "meta.json").exists():
        with _alone(folder):
            if not (folder / "meta.json").exists():  # another process may have built it while this one waited
                _build(folder, sources, tokenizer, holdout, held)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf8"))
    ready = load_tokenizer(folder / "tokenizer")
    if tokenizer.kind == "huggingface" and os.path.isdir(expand(tokenizer.path or "")):
        ready = train_tokenizer(tokenizer, [])  # a folder may have changed since; a hub id is taken from the copy
    changes = diff(meta["fingerprint"], {**held, "tokenizer": ready.fingerprint})
    if changes:
        told = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in itertools.islice(changes.items(), 3))
        raise ValueError(f"the cached corpus no longer fits its data ({told}): delete {str(folder)!r} to build it again")
    both = [[_open(folder / str(i), part) for i in range(len(sources))] for part in ("train", "heldout")]
    return ready, both[0], both[1]


def _open(folder: pathlib.Path, part: str) -> Corpus:
    arrays = [np.load(folder / f"{part}.{name}.npy", mmap_mode="r") for name in ("tokens", "offsets", "spans")]
    return Corpus(arrays[0], arrays[1], np.memmap(folder / "text.bin", np.uint8, "r"), arrays[2])


def _build(
    folder: pathlib.Path,
    sources: Sequence[SourceConfig],
    config: TokenizerConfig,
    holdout: HoldoutConfig,
    held: dict[str, Any],
) -> None:
    begun = folder / "building.json"
    if not begun.exists() or json.loads(begun.read_text(encoding="utf8")) != held:
        shutil.rmtree(folder, ignore_errors=True)  # what a cut-off build left fits other data
        folder.mkdir(parents=True)
        with _finished(begun) as part:
            part.write_text(json.dumps(held), encoding="utf8")

    places = [folder / str(i) for i in range(len(sources))]
    parts = []  # (folder of the source, train or heldout, its text, its spans)
    duplicates = []
    for place, source in zip(places, sources, strict=True):
        text, found = _spool(place, source)
        duplicates.append(int(found["duplicates"]))
        train_spans, held_spans = _split(text, found, holdout, source)
        parts += [(place, "train", text, train_spans), (place, "heldout", text, held_spans)]

    if not (folder / "tokenizer").exists():
        trained = train_tokenizer(config, _sample([(text, spans) for _, part, text, spans in parts if part == "train"]))
        with _finished(folder / "tokenizer") as unfinished:
            trained.save(unfinished)
    tokenizer = load_tokenizer(folder / "tokenizer")

    began, fresh = time.perf_counter(), 0
    with bar("Tokenising", total=sum(len(spans) for *_, spans in parts), unit="docs") as progress:
        for place, part, text, spans in parts:
            fresh += _tokenise(place, part, text, spans, tokenizer, progress.advance)
    spent = time.perf_counter() - began

    counts = []
    for place, dropped in zip(places, duplicates, strict=True):
        both = {part: _open(place, part) for part in ("train", "heldout")}
        sizes = {part: {"n_docs": c.n_docs, "tokens": len(c.tokens), "bytes": c.bytes} for part, c in both.items()}
        counts.append({**sizes, "duplicates": dropped})
    meta = {
        "fingerprint": {**held, "tokenizer": tokenizer.fingerprint},
        "sources": counts,
        "tokens_per_second": round(fresh / spent) if fresh else None,
    }
    with _finished(folder / "meta.json") as unfinished:
        unfinished.write_text(json.dumps(meta, indent=2), encoding="utf8")
    begun.unlink()


# --- the steps --------------------------------------------------------------------------------


def _spool(place: pathlib.Path, source: SourceConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Read a source once into `text.bin`, duplicates dropped; and what the split needs to know of each document."""
    index = place / "documents.npz"
    if not index.exists():
        place.mkdir(exist_ok=True)
        read = itertools.islice(documents(source), STREAM_HEAD if source.streaming else None)
        seen: set[bytes] = set()
        ends, characters, scores, duplicates = [0], [], [], 0
        with _finished(place / "text.bin") as unfinished, unfinished.open("wb") as out:
            for text in filter(None, read):
                raw = text.encode("utf8", "replace")
                digest = hashlib.blake2b(raw, digest_size=16).digest()
                if digest in seen:
                    duplicates += 1
                    continue
                seen.add(digest)
                out.write(raw)
                ends.append(ends[-1] + len(raw))
                characters.append(len(text))
                scores.append(int.from_bytes(digest[:8]))
        if not scores:
            raise ValueError(f"source {source.path or source.kind!r} gives no text")
        arrays = {
            "ends": np.array(ends, np.int64),
            "characters": np.array(characters, np.int64),
            "scores": np.array(scores, np.uint64),
            "duplicates": np.array(duplicates),
        }
        with _finished(index) as unfinished, unfinished.open("wb") as out:
            np.savez(out, **arrays)
    with np.load(index) as found:
        return np.memmap(place / "text.bin", np.uint8, "r"), dict(found)


def _split(
    text: np.ndarray, found: dict[str, np.ndarray], holdout: HoldoutConfig, source: SourceConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The spans of text to train on and to hold out, each int64 (n, 2)."""
    ends, scores = found["ends"], found["scores"]
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    name = source.path or source.kind
    if holdout.by == "tail":
        if source.streaming:
            raise ValueError(f"holdout by 'tail' cannot work with streaming source {name!r}, which has no end: use 'document'")
        past = np.cumsum(found["characters"])
        cut = int(past[-1] * (1 - holdout.fraction))
        d = int(np.searchsorted(past, cut, side="right"))  # the document that holds the cut
        start, stop = spans[d]
        inside = cut - int(past[d] - found["characters"][d])
        middle = start + len(text[start:stop].tobytes().decode()[:inside].encode())
        train = np.concatenate([spans[:d], [[start, middle]] if inside else spans[:0]])
        held = np.concatenate([[[middle, stop]], spans[d + 1 :]])
    else:
        if len(spans) < 2:
            raise ValueError(f"source {name!r} has one document, none to hold out: use holdout by 'tail'")
        if source.streaming:  # the first ones: what comes later in a stream is not known yet
            chosen = np.arange(len(spans)) < min(math.ceil(holdout.fraction * STREAM_HEAD), len(spans) - 1)
        else:
            chosen = scores < np.uint64(int(holdout.fraction * 2**64))
            chosen[scores.argmin()], chosen[scores.argmax()] = True, False  # at least one each, whatever the order
        train, held = spans[~chosen], spans[chosen]
    if not len(train):
        raise ValueError(f"source {name!r} has too little text to hold out {holdout.fraction} of it")
    return train, held


def _sample(parts: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[str]:
    """Texts to train a tokenizer on: all, or every k-th document where that would be too much."""
    size = sum(int((spans[:, 1] - spans[:, 0]).sum()) for _, spans in parts)
    for text, spans in parts:
        for start, stop in spans[:: math.ceil(size / TRAINING_BYTES)]:
            yield text[start:stop].tobytes().decode()


def _tokenise(
    place: pathlib.Path, part: str, text: np.ndarray, spans: np.ndarray, tokenizer: Tokenizer, advance: Any
) -> int:
    """Write `part`'s tokens, offsets and spans, shard by shard; returns how many tokens were made just now."""
    if (place / f"{part}.tokens.npy").exists():
        advance(len(spans))
        return 0
    fresh, shards, lengths = 0, [], []
    for first, last in _groups(spans, SHARD_BYTES):
        shard = place / f"{part}-{first}-{last}.npz"
        shards.append(shard)
        if shard.exists():
            advance(last - first)
        else:
            made, counts = _encode(text, spans[first:last], tokenizer, advance)
            with _finished(shard) as unfinished, unfinished.open("wb") as out:
                np.savez(out, tokens=made, lengths=counts)
            fresh += len(made)
        with np.load(shard) as kept:
            lengths.append(kept["lengths"])

    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)])
    for name, array in (("offsets", offsets), ("spans", spans)):
        with _finished(place / f"{part}.{name}.npy") as unfinished, unfinished.open("wb") as out:
            np.save(out, array)
    with _finished(place / f"{part}.tokens.npy") as unfinished:
        tokens = np.lib.format.open_memmap(unfinished, "w+", _dtype(tokenizer), (int(offsets[-1]),))
        filled = 0
        for shard in shards:
            with np.load(shard) as kept:
                tokens[filled : filled + len(kept["tokens"])] = kept["tokens"]
                filled += int(kept["lengths"].sum())
        tokens.flush()
    for shard in shards:
        shard.unlink()
    return fresh


def _encode(text: np.ndarray, spans: np.ndarray, tokenizer: Tokenizer, advance: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of some documents, an end of text after each, and each one's number of tokens, that one included."""
    pieces, lengths = [], []
    end = np.array([tokenizer.eos_id], _dtype(tokenizer))
    for first, last in _groups(spans, BATCH_BYTES):
        texts = [text[start:stop].tobytes().decode() for start, stop in spans[first:last]]
        for ids in tokenizer.encode_batch(texts):
            pieces += [ids.astype(end.dtype), end]
            lengths.append(len(ids) + 1)
        advance(last - first)
    return np.concatenate(pieces), np.array(lengths, np.int64)


def _groups(spans: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents that begin within the same `size` bytes of text."""
    lengths = spans[:, 1] - spans[:, 0]
    bins = (np.cumsum(lengths) - lengths) // size
    edges = [0, *(np.flatnonzero(np.diff(bins)) + 1).tolist(), len(spans)]
    return itertools.pairwise(edges)


def _dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size < 65536 else np.uint32


@contextlib.contextmanager
def _finished(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path to write to; it becomes `file` (or folder) in one rename, and only when nothing went wrong."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    yield unfinished
    if unfinished.is_file():
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
    os.replace(unfinished, file)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a folder: two processes that start at once build it once."""
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Waiting for the process that is building {folder}")
        lock.acquire()
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        yield
