"""Encode texts, pairs of texts and lists of words as the model's own tokenizer does.

Every entry point of jaxlm turns a text into ids here, exactly as `tokenizer(text)` or `tokenizer(text, pair)` of transformers does
with the files in the model's folder: the tokenizer's post-processor alone decides which special tokens stand around a text.
Conversations go through `jaxlm.data.chat`. Corpora of pretraining are the one exception: `Tokenizer.encode_batch` encodes their
documents without special tokens, and the data pipeline puts the end of text between them.

n: tokens of a row, special ones included.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.post_processor import with_prefix_space
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.text_files import well_formed

BATCH = 512  # texts given to the library at once: it holds far more of each than the rows that we keep
UNLIMITED = 1 << 30


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
    """The ids of a text or a pair, and what each id stands for."""

    ids: np.ndarray
    """(n,) int32."""
    types: np.ndarray
    """(n,) int32: token types, 1 for the second text of a pair where the tokenizer says so."""
    offsets: np.ndarray
    """(n, 2) int32: start and end of the token in characters of its own text (of its word, from `words`); 0, 0 if added."""
    sequence: np.ndarray
    """(n,) int32: 0 in the text, 1 in the second of a pair, -1 for special tokens that the tokenizer adds."""
    words: np.ndarray
    """(n,) int32: index of the token's word in its text, -1 for added tokens."""


class _Tokens(NamedTuple):
    """The tokens of one text without added ones: as many as a row may need, and how many there are."""

    ids: np.ndarray
    offsets: np.ndarray
    words: np.ndarray
    size: int


class _Slot(NamedTuple):
    """One element of a template: a special token, or the tokens of text 0 or 1."""

    id: int
    type: int
    sequence: int


class TextEncoder:
    """Encode texts as `tokenizer(text, truncation=True, max_length=length)` of transformers does.

    Special tokens spelled in a text (`</s>`) are read as such, as transformers reads them; `split_special_tokens` reads them as
    ordinary text, as a corpus is read. A text is truncated at its end, or at its beginning where the tokenizer's files say so
    (`truncation_side`); of a pair the longer one loses tokens first (`longest_first`). A row without any token, which an empty
    text gives where the tokenizer adds nothing, becomes the begin token alone (`Tokenizer.bos_id`), from which transformers
    generates too.
    """

    truncated: int
    """Rows that lost tokens so far: a text, a pair or a list of words each count once. Windows lose none."""
    spelled: int
    """Texts so far that spell a special token."""

    def __init__(self, tokenizer: Tokenizer, length: int | None = None, *, split_special_tokens: bool = False):
        """`length` is the maximum number of tokens of a row; None: no limit. ValueError where it leaves no room for text."""
        self.tokenizer, self.length, self.truncated, self.spelled = tokenizer, length or UNLIMITED, 0, 0
        hf = getattr(tokenizer, "hf", None)
        self.split_special_tokens = split_special_tokens or bool(getattr(hf, "split_special_tokens", False))
        self._left = getattr(hf, "truncation_side", "right") == "left"
        self._narrow = tokenizer.kind in ("bytes", "characters")  # no token is longer than a character, special ones aside
        self._rust = self._open(tokenizer.definition())
        special = [token.content for token in self._rust.get_added_tokens_decoder().values() if token.special]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._never, self._unknown = np.zeros(0, np.int32), -1
        if self.split_special_tokens:
            self._never, self._unknown = _special_pieces(self._rust, tokenizer.definition())
        self._templates = _templates(self._rust)
        if self._room(False, self.length) < 1:
            added = len(self._templates[0]) - 1
            raise ValueError(f"length {length} leaves no room for text: the tokenizer adds {added} special tokens")

    @property
    def prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        return [slot.id for slot in itertools.takewhile(lambda slot: slot.sequence < 0, self._templates[0])]

    def ids(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.encode([text])[0].ids.tolist()

    def bare(self, texts: Sequence[str]) -> list[np.ndarray]:
        """All ids of each text, int32, without added special tokens: of a text that continues another one."""
        return [tokens.ids for tokens in self._tokens(texts, UNLIMITED)]

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, max_length: int | None = None) -> list[Encoding]:
        """A row for each text, or for each text and its pair; at most `max_length` tokens each, by default the encoder's."""
        length = max_length or self.length
        if pairs is None:
            return [self._single(tokens, length) for tokens in self._tokens(texts, length)]
        assert len(texts) == len(pairs), f"{len(texts)} texts cannot have {len(pairs)} pairs"
        both = zip(self._tokens(texts, length), self._tokens(pairs, length), strict=True)
        return [self._pair(*each, length) for each in both]

    def words(self, sentences: Sequence[Sequence[str]]) -> list[Encoding]:
        """A row for each list of words; `Encoding.words` says which word a token is of, and offsets count within it.

        As transformers' `is_split_into_words=True`: words are tokenised one by one. GPT-2's and RoBERTa's kind of tokenizer
        (byte-level and nothing else) puts a space before each word, as transformers wants it (`add_prefix_space=True`); the run's
        tokenizer is saved so. A word may give no token.
        """
        return [self._single(sentence, self.length) for sentence in self._tokens(sentences, self.length, split=True)]

    def windows(self, questions: Sequence[str], contexts: Sequence[str], stride: int) -> list[list[Encoding]]:
        """For each question and its context, the rows that cover the context.

        Each row holds the question and a window of the context, of which it repeats the last `stride` tokens of the window
        before. A question that leaves no more than `stride` tokens of a row is truncated, so that windows advance by at least
        as many tokens as it has. Raises ValueError where `stride` leaves nothing of a row.
        """
        if stride < 0:
            raise ValueError(f"stride {stride} must be 0 or more: the tokens that neighbouring windows share")
        assert len(questions) == len(contexts), f"{len(questions)} questions cannot have {len(contexts)} contexts"
        rows = []
        both = zip(self._tokens(questions, UNLIMITED), self._tokens(contexts, UNLIMITED), strict=True)
        row = self._room(True, self.length)
        most = (row - stride) // 2
        if most < 1:
            raise ValueError(
                f"windows that share {stride} tokens leave none of a row of {self.length} for a question and more of its "
                f"context: the stride may be {max(row - 2, 0)} at most"
            )
        for question, context in both:
            if question.size >= row - stride:
                self.truncated += 1
                question = _part(question, 0, most)
            room = row - question.size
            starts = range(0, max(context.size - stride, 1), room - stride)
            rows.append([self._fill(True, question, _part(context, start, start + room)) for start in starts])
        return rows

    def _single(self, text: _Tokens, length: int) -> Encoding:
        room = self._room(False, length)
        self.truncated += text.size > room
        return self._fill(False, self._kept(text, room))

    def _pair(self, first: _Tokens, second: _Tokens, length: int) -> Encoding:
        room = self._room(True, length)
        if room < 1:
            raise ValueError(f"length {length} leaves no room for pairs: the tokenizer adds {length - room} special tokens")
        if first.size + second.size > room:
            self.truncated += 1
            short = min(first.size, second.size, room // 2)
            lengths = (short, room - short) if first.size <= second.size else (room - short, short)
            first, second = self._kept(first, lengths[0]), self._kept(second, lengths[1])
        return self._fill(True, first, second)

    def _kept(self, text: _Tokens, size: int) -> _Tokens:
        """What is left of a text that is truncated to `size` tokens."""
        start = max(len(text.ids) - size, 0) if self._left else 0
        return _part(text, start, start + size)

    def _room(self, pair: bool, length: int) -> int:
        """Tokens of a row that are left for text."""
        return length - sum(slot.sequence < 0 for slot in self._templates[pair])

    def _fill(self, pair: bool, *texts: _Tokens) -> Encoding:
        """The template with the texts in their places."""
        template = self._templates[pair]
        if not any(len(text.ids) for text in texts) and all(slot.sequence >= 0 for slot in template):
            template = [_Slot(self.tokenizer.bos_id, 0, -1)]
        parts = [texts[slot.sequence] if slot.sequence >= 0 else _added(slot.id) for slot in template]
        sizes = [len(part.ids) for part in parts]
        ids, offsets, words = (np.concatenate([part[i] for part in parts]).astype(np.int32) for i in range(3))
        types, sequence = (np.repeat(np.array([slot[i] for slot in template], np.int32), sizes) for i in (1, 2))
        return Encoding(ids, types, offsets, sequence, words)

    def _tokens(self, texts: Sequence[Any], length: int, split: bool = False) -> Iterator[_Tokens]:
        """The tokens of each text, or list of words where `split`: as many as a row of `length` may need."""
        rust = self._rust_for_words if split else self._rust
        for start in range(0, len(texts), BATCH):
            clean = [self._clean(text, length, split) for text in texts[start : start + BATCH]]
            for encoding in rust.encode_batch(clean, is_pretokenized=split, add_special_tokens=False):
                kept = slice(-length, None) if self._left else slice(length)
                ids = np.array(encoding.ids[kept], np.int32)
                if self._never.size:
                    ids[np.isin(ids, self._never)] = self._unknown
                offsets = np.array(encoding.offsets[kept], np.int32).reshape(-1, 2)
                words = np.array([-1 if word is None else word for word in encoding.word_ids[kept]], np.int32)
                yield _Tokens(ids, offsets, words, len(encoding))

    def _clean(self, text: Any, length: int, split: bool) -> Any:
        """The text without lone surrogates; only its beginning where no more can count, as the library is slow with tokens of
        one character."""
        spells = any(map(self._special.search, text)) if split else self._special.search(text) is not None
        self.spelled += spells
        if split:
            return [well_formed(word) for word in text]
        return well_formed(text if spells or not self._narrow else text[: length + 1])

    @functools.cached_property
    def _rust_for_words(self) -> Any:
        return self._open(with_prefix_space(self.tokenizer.definition()))

    def _open(self, definition: str) -> Any:
        import tokenizers

        rust = tokenizers.Tokenizer.from_str(definition)
        rust.encode_special_tokens = self.split_special_tokens  # not part of the definition
        return rust


def _part(text: _Tokens, start: int, stop: int) -> _Tokens:
    ids, offsets, words = text.ids[start:stop], text.offsets[start:stop], text.words[start:stop]
    return _Tokens(ids, offsets, words, len(ids))


def _added(id: int) -> _Tokens:
    return _Tokens(np.array([id]), np.zeros((1, 2), np.int32), np.array([-1]), 1)


def _special_pieces(rust: Any, definition: str) -> tuple[np.ndarray, int]:
    """The special ids that a text must not spell, and the unknown id to stand for them.

    `encode_special_tokens` keeps the library from looking for special tokens in a text, but a model that has them among its
    pieces finds them all the same: T5's Unigram model reads the text `</s>` as the end of text.
    """
    model = json.loads(definition)["model"]
    unknown = model.get("unk_id") if model.get("unk_token") is None else rust.token_to_id(model["unk_token"])
    if unknown is None:  # BPE over bytes: it merges what it has learned, and nothing in a text is unknown
        return np.zeros(0, np.int32), -1
    special = [i for i, token in rust.get_added_tokens_decoder().items() if token.special and i != unknown]
    return np.array(special, np.int32), unknown


def _templates(rust: Any) -> tuple[list[_Slot], list[_Slot]]:
    """What the tokenizer's post-processor makes of a text and of a pair, read off an example."""
    text = next(text for text in itertools.chain("a", _vocabulary(rust)) if rust.encode(text, add_special_tokens=False).ids)
    templates = []
    for encoding in (rust.encode(text), rust.encode(text, text)):
        slots: list[_Slot] = []
        for id, type, sequence in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
            sequence = -1 if sequence is None else sequence
            if sequence < 0 or not slots or slots[-1].sequence != sequence:
                slots.append(_Slot(id, type, sequence))
        templates.append(slots)
    return templates[0], templates[1]


def _vocabulary(rust: Any) -> Iterator[str]:
    yield from rust.get_vocab()  # in a generator: it may be a quarter of a million entries, and "a" nearly always does
