"""A cache folder: documents → a tokenised corpus on disk, split into train and held-out, built once.

It is built in steps, each finished by a rename, so that a cut-off build goes on where it stopped:
read (`text.bin`), mark duplicates, split, train the tokenizer on the train part alone, tokenise in shards, join, and
last of all `meta.json`. What grows with the number of documents stays on disk: 57 bytes of each besides its text and tokens.
A folder with a `meta.json` is complete and never written again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxlm.config import diff
from jaxlm.data.corpus import SPANS, Corpora, Corpus, DataConfig, HoldoutConfig, bytes_of, encode, groups, token_dtype
from jaxlm.data.sources import SourceConfig, describe, documents
from jaxlm.data.spooling import RECORD, mark_first, split, write_records
from jaxlm.data.steps import alone as _alone
from jaxlm.data.steps import finished as _finished
from jaxlm.data.tokenizer import Tokenizer, expand, load_tokenizer, train_tokenizer
from jaxlm.report import bar

FORMAT = 2  # of the folder: raise it when the files change their meaning
SHARD_BYTES = 64 * 2**20  # text in one shard of tokens: what a cut-off build loses at most
TRAINING_BYTES = 2**30  # text that a tokenizer is trained on at most: documents evenly spread over the train part
STREAM_HEAD = 10_000  # documents read ahead from a stream, to hold some out and to train the tokenizer


def corpus_folder(config: DataConfig) -> pathlib.Path:
    """Where the corpora of a config are kept: a readable name and a hash of what was asked for.

    Weights, length, batch size and layout play no part: they decide how the tokens are read.
    """
    asked = [dataclasses.asdict(source) for source in config.sources]
    for source in asked:
        del source["weight"]
        if source["path"]:  # the same words may mean another folder elsewhere
            source["path"] = expand(source["path"])
            if source["kind"] == "files" or pathlib.Path(source["path"]).exists():
                source["path"] = str(pathlib.Path(source["path"]).absolute())
    size = config.tokenizer.vocab_size if config.tokenizer.kind == "bpe" else ""
    identity: dict[str, Any] = {
        "sources": asked,
        "tokenizer": [config.tokenizer.kind, size, expand(config.tokenizer.path or "")],
        "holdout": dataclasses.asdict(config.holdout),
        "format": FORMAT,
    }
    if config.tokenizer.special or config.tokenizer.sentinels:
        identity["special"] = [sorted(config.tokenizer.special), config.tokenizer.sentinels]
    if any(source.kind == "embedded" for source in config.sources):
        identity["python"] = platform.python_version()
    short = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()
    names = [pathlib.Path(source["path"] or source["kind"]).name.split(".")[0] or source["kind"] for source in asked]
    name = names[0] if len(names) == 1 else f"{names[0]}-and-{len(names) - 1}-more"
    root = expand(config.cache or os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm")
    return pathlib.Path(root) / (re.sub(r"[^\w.-]+", "-", f"{name}-{config.tokenizer.kind}{size}") + f"-{short}")


def build_corpora(config: DataConfig) -> Corpora:
    """The tokenizer, and the train and the held-out corpus of each source; from the cache where it is there.

    One tokenizer is trained on the train parts of all sources. Exact duplicates within a source are
    dropped first, so none of its held-out documents is also trained on; in a mixture the hash holds a
    text out of every source that has it (unless a source has too few documents for the hash to decide).
    Of a streaming source only the first STREAM_HEAD documents are read: the first `fraction` of them is held
    out, the rest trains the tokenizer and is the train corpus.
    Raises ValueError, in one line, where the data is not there or is no longer what the cache was built from.
    """
    folder = corpus_folder(config)
    held = {
        "format": FORMAT,
        "sources": [describe(source) for source in config.sources],
        "holdout": dataclasses.asdict(config.holdout),
    }
    if not (folder / "meta.json").exists():
        with _alone(folder):
            if not (folder / "meta.json").exists():  # another process may have built it while this one waited
                try:
                    _build(folder, config, held)
                except ValueError:  # data that is refused leaves nothing behind
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
    meta = json.loads((folder / "meta.json").read_text(encoding="utf8"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    if config.tokenizer.kind == "huggingface" and pathlib.Path(expand(config.tokenizer.path or "")).is_dir():
        tokenizer = train_tokenizer(config.tokenizer, [])  # a folder may have changed; a hub id is taken from the copy
    changes = diff(meta["fingerprint"], {**held, "tokenizer": tokenizer.fingerprint})
    if changes:
        told = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in itertools.islice(changes.items(), 3))
        raise ValueError(f"the cached corpus no longer fits its data ({told}): delete {str(folder)!r} to build it again")
    parts = [[_open(folder / str(i), part) for i in range(len(config.sources))] for part in ("train", "heldout")]
    duplicates = sum(source["duplicates"] for source in meta["sources"])
    return Corpora(tokenizer, parts[0], parts[1], folder.name, duplicates)


def _open(folder: pathlib.Path, part: str) -> Corpus:
    arrays = [np.load(folder / f"{part}.{name}.npy", mmap_mode="r") for name in ("tokens", "offsets", "spans")]
    return Corpus(arrays[0], arrays[1], np.memmap(folder / "text.bin", np.uint8, "r"), arrays[2], folder / part)


def _build(folder: pathlib.Path, config: DataConfig, held: dict[str, Any]) -> None:
    begun = folder / "building.json"
    if not begun.exists() or json.loads(begun.read_text(encoding="utf8")) != held:
        shutil.rmtree(folder, ignore_errors=True)  # what a cut-off build left fits other data
        folder.mkdir(parents=True)
        with _finished(begun) as unfinished:
            unfinished.write_text(json.dumps(held), encoding="utf8")

    places = [folder / str(i) for i in range(len(config.sources))]
    parts = []  # (folder of the source, train or heldout, its text, its spans)
    duplicates = []
    for place, source in zip(places, config.sources, strict=True):
        text, records = _spool(place, source)
        first = _distinct(place, records)
        duplicates.append(len(records) - int(np.count_nonzero(first)))
        train_spans, held_spans = _split(place, text, records, first, config.holdout, source)
        parts += [(place, "train", text, train_spans), (place, "heldout", text, held_spans)]

    if not (folder / "tokenizer").exists():
        trained = train_tokenizer(config.tokenizer, _sample([(text, spans) for _, part, text, spans in parts if part == "train"]))
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
    with contextlib.suppress(FileNotFoundError):
        begun.unlink()


# --- the steps --------------------------------------------------------------------------------


def _spool(place: pathlib.Path, source: SourceConfig) -> tuple[np.ndarray, np.ndarray]:
    """Read a source once into `text.bin`; returns its bytes and the records of its documents, duplicates included."""
    index = place / "documents.bin"
    if not index.exists():
        place.mkdir(exist_ok=True)
        read = itertools.islice(documents(source), STREAM_HEAD if source.streaming else None)
        with _finished(index) as records, _finished(place / "text.bin") as text:
            if not write_records(read, text, records):
                raise ValueError(f"source {source.path or source.kind!r} gives no text")
    return np.memmap(place / "text.bin", np.uint8, "r"), np.memmap(index, RECORD, "r")


def _distinct(place: pathlib.Path, records: np.ndarray) -> np.ndarray:
    """Which documents are the first with their text, (N,) bool."""
    file = place / "first.npy"
    if not file.exists():
        with _finished(file) as unfinished:
            first = np.lib.format.open_memmap(unfinished, "w+", np.bool_, (len(records),))
            mark_first(records["hash"], first, place / "partitions")
            first.flush()
    return np.load(file, mmap_mode="r")


def _split(
    place: pathlib.Path, text: np.ndarray, records: np.ndarray, first: np.ndarray, holdout: HoldoutConfig, source: SourceConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The spans of text to train on and to hold out, each int64 (n, 2)."""
    files = [place / f"{part}.spans.npy" for part in ("train", "heldout")]
    if not files[1].exists():
        with _finished(files[1]) as held, _finished(files[0]) as train:

            def spans(file: pathlib.Path, n: int) -> np.ndarray:
                return np.lib.format.open_memmap(file, "w+", np.int64, (n, 2))

            name = str(source.path or source.kind)
            split(
                text, records, first, holdout, name, source.streaming, functools.partial(spans, train),
                functools.partial(spans, held),
            )  # fmt: skip
    return np.load(files[0], mmap_mode="r"), np.load(files[1], mmap_mode="r")


def _sample(parts: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[str]:
    """Texts to train a tokenizer on: all, or every k-th document where that would be too much."""
    each = math.ceil(sum(bytes_of(spans) for _, spans in parts) / TRAINING_BYTES)
    for text, spans in parts:
        for first in range(0, len(spans), SPANS * each):
            for start, stop in spans[first : first + SPANS * each : each].tolist():
                yield text[start:stop].tobytes().decode()


def _tokenise(
    place: pathlib.Path, part: str, text: np.ndarray, spans: np.ndarray, tokenizer: Tokenizer, advance: Callable[[int], None]
) -> int:
    """Write `part`'s tokens and offsets, shard by shard; returns how many tokens were made just now."""
    if (place / f"{part}.tokens.npy").exists():
        advance(len(spans))
        return 0
    fresh, shards = 0, []
    for first, last in groups(spans, SHARD_BYTES):
        shard = place / f"{part}-{first}-{last}.npz"
        shards.append(shard)
        if shard.exists():
            advance(last - first)
        else:
            made, counts = encode(text, spans[first:last], tokenizer, advance)
            with _finished(shard) as unfinished, unfinished.open("wb") as out:
                np.savez(out, tokens=made, lengths=counts)
            fresh += len(made)

    with _finished(place / f"{part}.offsets.npy") as unfinished:
        offsets = np.lib.format.open_memmap(unfinished, "w+", np.int64, (len(spans) + 1,))
        offsets[0] = filled = 0
        for shard in shards:
            with np.load(shard) as kept:
                lengths = kept["lengths"]
            offsets[filled + 1 : filled + 1 + len(lengths)] = offsets[filled] + np.cumsum(lengths)
            filled += len(lengths)
        offsets.flush()
    with _finished(place / f"{part}.tokens.npy") as unfinished:
        tokens = np.lib.format.open_memmap(unfinished, "w+", token_dtype(tokenizer), (int(offsets[-1]),))
        filled = 0
        for shard in shards:
            with np.load(shard) as kept:
                tokens[filled : filled + len(kept["tokens"])] = kept["tokens"]
                filled += len(kept["tokens"])
        tokens.flush()
    for shard in shards:
        shard.unlink()
    return fresh
