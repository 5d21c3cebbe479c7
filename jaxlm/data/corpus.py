"""Tokenised documents, what a config asks for of them, and the measures that depend on their bytes."""

import dataclasses
import functools
import hashlib
import itertools
import lzma
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

from jaxlm.data.rows import RowsConfig
from jaxlm.data.sources import SourceConfig
from jaxlm.data.steps import ranges
from jaxlm.data.tokenizer import Tokenizer, TokenizerConfig

SPANS = 1 << 20  # documents whose spans are looked at together: those of a large corpus stay on disk
BATCH_BYTES = 4 * 2**20  # text given to the tokenizer at once: enough to keep its threads busy


@dataclasses.dataclass(frozen=True)
class HoldoutConfig:
    """Which part of the text is never trained on."""

    by: Literal["document", "tail"] = "document"
    """Whole documents chosen by a hash of their text, or the last characters of the whole text."""
    fraction: float = 0.05
    """Share of the documents, or of the characters, that is held out."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"holdout fraction {self.fraction} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on, and in which form."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    """Where documents come from; several make a mixture by their weights."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    length: int = 256
    """Tokens in a row."""
    batch_size: int = 16
    """Rows of one optimiser step, over all devices."""
    layout: Literal["windows", "packed"] = "windows"
    """Windows of one long stream, or whole documents that do not see each other."""
    holdout: HoldoutConfig = HoldoutConfig()
    """What is never trained on."""
    epochs: float | None = None
    """Passes over the data, of a mixture until one source has had that many; empty: without end."""
    cache: str | None = None
    """Folder of tokenised corpora; empty: $JAXLM_CACHE, else ~/.cache/jaxlm."""
    prefetch: int = 4
    """Batches made ahead while the device computes."""
    train: str | None = None
    """Rows of a task: a file, folder or glob (tsv, csv, jsonl, json, parquet, conll), parallel texts `train.{en,de}.txt`, a
    `datasets` folder, hf:ID, tfds:NAME, or embedded:modules."""
    validation: str | None = None
    """Rows to evaluate on; empty: holdout.fraction of those of train."""
    rows: RowsConfig = RowsConfig()
    grouped: bool = True
    """Rows of similar length share a batch, so that little of it is padding."""

    def __post_init__(self) -> None:
        if self.validation and not self.train:
            raise ValueError(f"data validation {self.validation!r} is for rows: give data train too")
        if not self.sources:
            raise ValueError("data sources is empty: give at least one, such as {kind: embedded}")
        if len(self.sources) == 1 and self.sources[0].weight != 1:
            raise ValueError(f"data sources weight {self.sources[0].weight} is a share of a mixture: with one source leave it out")
        for name in ("length", "batch_size", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data {name} {getattr(self, name)} must be at least 1")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"data epochs {self.epochs} must be a positive number, or empty to go on without end")
        if any(source.streaming for source in self.sources):
            if len(self.sources) > 1:
                raise ValueError("a streaming source cannot be part of a mixture: give it alone, or set streaming to false")
            if self.layout != "windows":
                raise ValueError(f"a streaming source needs data layout 'windows', not {self.layout!r}")
            if self.epochs is not None and self.epochs != int(self.epochs):
                raise ValueError(f"data epochs {self.epochs}: a stream has no known length, so give a whole number")


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
    place: pathlib.Path | None = None
    """Where it lies on disk: the beginning of its files' names, also of those that are derived from it."""

    @property
    def n_docs(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of all the texts; end-of-text tokens stand for none."""
        return bytes_of(self.spans)

    def texts(self) -> Iterator[str]:
        """The text of each document, exactly as it was read."""
        return (self.text[start:stop].tobytes().decode() for start, stop in self.spans)


def bytes_of(spans: np.ndarray) -> int:
    """Bytes of text in all spans (n, 2)."""
    parts = (np.asarray(spans[start : start + SPANS]) for start in range(0, len(spans), SPANS))
    return sum(int((part[:, 1] - part[:, 0]).sum()) for part in parts)


def in_memory(texts: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """A corpus of a few texts that is not written anywhere."""
    raw = [text.encode("utf8", "replace") for text in texts]
    ends = np.cumsum([0, *map(len, raw)])
    spans = np.stack([ends[:-1], ends[1:]], axis=1)
    text = np.frombuffer(b"".join(raw), np.uint8)
    tokens, lengths = encode(text, spans, tokenizer, lambda n: None)
    return Corpus(tokens, np.cumsum([0, *lengths]), text, spans)


@dataclasses.dataclass(frozen=True)
class Corpora:
    """One tokenizer and, for each source of a config, what to train on and what was held out."""

    tokenizer: Tokenizer
    train: list[Corpus]
    heldout: list[Corpus]
    name: str = "in memory"
    """Of the cache folder that they come from."""
    duplicates: int = 0
    """Documents that were dropped because the same text had come before."""

    @property
    def train_bytes(self) -> int:
        """UTF-8 bytes of the text to train on."""
        return sum(corpus.bytes for corpus in self.train)

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out text."""
        return sum(corpus.bytes for corpus in self.heldout)

    @property
    def train_tokens_per_byte(self) -> float:
        """Tokens, end-of-text tokens included, for each byte of the text to train on."""
        return sum(len(corpus.tokens) for corpus in self.train) / self.train_bytes

    @property
    def heldout_tokens_per_byte(self) -> float:
        """Tokens, end-of-text tokens included, for each byte of held-out text."""
        return sum(len(corpus.tokens) for corpus in self.heldout) / self.heldout_bytes

    def train_text(self) -> str:
        """The text to train on, documents joined as they are, in one piece."""
        return "".join(itertools.chain.from_iterable(corpus.texts() for corpus in self.train))

    def heldout_text(self) -> str:
        """The held-out text, documents joined as they are, in one piece."""
        return "".join(itertools.chain.from_iterable(corpus.texts() for corpus in self.heldout))

    def summary(self) -> str:
        """One line: how much there is."""
        train, held = (
            f"{sum(len(c.tokens) for c in part):,} tokens in {sum(c.n_docs for c in part):,} documents"
            for part in (self.train, self.heldout)
        )
        dropped = f", {self.duplicates:,} duplicates dropped" if self.duplicates else ""
        return f"{self.name}: {train} to train on, {held} held out{dropped}; vocabulary {self.tokenizer.vocab_size:,}"


def xz_bits_per_byte(text: str | bytes, after: str | bytes = b"") -> float:
    """What `xz -9` makes of a text, in bits per UTF-8 byte: the mark that a model has to beat.

    With `after`, what the text adds to the size of that other text compressed: xz may point back into
    its last 64 MiB, as a model has seen the training text. Takes about half a second for a megabyte.
    """
    plain, before = (x.encode("utf8", "replace") if isinstance(x, str) else x for x in (text, after))
    if not plain:
        raise ValueError("xz_bits_per_byte of an empty text: there is no byte to count")
    whole, known = (len(lzma.compress(x, preset=9)) if x else 0 for x in (before + plain, before))
    return 8 * (whole - known) / len(plain)


def encode(
    text: np.ndarray, spans: np.ndarray, tokenizer: Tokenizer, advance: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of some documents, an end of text after each, and each one's number of tokens, that one included."""
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    end: np.ndarray = np.array([tokenizer.eos_id], token_dtype(tokenizer))
    for first, last in groups(spans, BATCH_BYTES):
        texts = [text[start:stop].tobytes().decode() for start, stop in spans[first:last]]
        for ids in tokenizer.encode_batch(texts):
            pieces += [ids.astype(end.dtype), end]
            lengths.append(len(ids) + 1)
        advance(last - first)
    return np.concatenate(pieces), np.array(lengths, np.int64)


def groups(spans: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents that begin within the same `size` bytes of text."""
    parts = (np.asarray(spans[start : start + SPANS]) for start in range(0, len(spans), SPANS))
    return ranges((part[:, 1] - part[:, 0] for part in parts), size)


def token_dtype(tokenizer: Tokenizer) -> type:
    return np.uint16 if tokenizer.vocab_size < 65536 else np.uint32


def digest(raw: bytes) -> bytes:
    """What two texts have in common only if they are the same; its first bytes also decide what is held out."""
    return hashlib.blake2b(raw, digest_size=16).digest()
