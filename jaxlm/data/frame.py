"""Texts, pairs of texts and sentences of words → framed rows of tokens, as models over labels read them.

Letters of shapes: n tokens of a row, special ones included.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.tokenizer import HuggingFace, Tokenizer
from jaxlm.text_files import well_formed

BATCH = 512  # texts given to the library at once: it holds far more of each than the rows that we keep


@dataclasses.dataclass(frozen=True, eq=False)
class Framed:
    """A row of tokens and what each stands for."""

    ids: np.ndarray
    """(n,) int32."""
    types: np.ndarray
    """(n,) int32: the token types of BERT, 0 and in pairs 1."""
    offsets: np.ndarray
    """(n, 2) int32: start and end of the token in characters of its own text (of its word, from `words`); 0, 0 if special."""
    sequence: np.ndarray
    """(n,) int32: 0 in the text, 1 in the second of a pair, -1 special."""
    words: np.ndarray
    """(n,) int32: the number of the token's word in its text, -1 special."""


class _Encoded(NamedTuple):
    """The tokens of one text, bare: the first ones that a row may need, and how many there are."""

    ids: np.ndarray
    offsets: np.ndarray
    words: np.ndarray
    size: int


class _Place(NamedTuple):
    """One step of a template: a special token, or the tokens of text 0 or 1."""

    id: int
    type: int
    sequence: int


class Framer:
    """Frames texts with a tokenizer's special tokens, cut to `length` tokens.

    The tokenizer's own template is used where it puts anything around a single text ([CLS] a [SEP] b [SEP], <s> a, …);
    otherwise it is `cls a sep`, `b sep` where there are such tokens, and `a eos`, `b eos` where not. What is cut is the end
    of a text; of a pair the longer loses first, as transformers' "longest_first". A text never spells a special token.
    """

    truncated: int
    """Rows that lost tokens so far: a text, a pair or a sentence each count once. Windows lose none."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.length, self.truncated = length, 0
        self._definition = tokenizer.definition()
        self._narrow = tokenizer.kind in ("bytes", "characters")  # no token is longer than a character
        self._rust = _open(self._definition)
        self._special, self._unknown = _special_ids(self._rust, self._definition)
        single, pair = _own_templates(self._rust)
        if len(single) < 2:  # nothing around a text
            single, pair = _usual_templates(tokenizer)
        self._templates = (single, pair)
        if self._room(False) < 1:
            raise ValueError(f"length {length} leaves no room for text: the tokenizer adds {len(single) - 1} special tokens")

    def frame(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Framed]:
        """A row for each text, or for each text and its pair; at most `length` tokens each."""
        if pairs is None:
            return [self._single(text) for text in self._encode(texts)]
        assert len(texts) == len(pairs), f"{len(texts)} texts cannot have {len(pairs)} pairs"
        return [self._pair(*both) for both in zip(self._encode(texts), self._encode(pairs), strict=True)]

    def words(self, sentences: Sequence[Sequence[str]]) -> list[Framed]:
        """A row for each sentence of words; `Framed.words` says which word a token is of, and offsets count within it.

        As transformers' `is_split_into_words`: words are tokenised one by one. Where the tokenizer is byte-level and by
        itself (GPT-2, RoBERTa, our own), each word stands after a space, as with transformers' `add_prefix_space=True`,
        which it asks for with these; others are taken as they are. A word that gives no token has none.
        """
        return [self._single(sentence) for sentence in self._encode(sentences, split=True)]

    def windows(self, questions: Sequence[str], contexts: Sequence[str], stride: int) -> list[list[Framed]]:
        """For each question and its context, the rows that cover the context: the question in each, the context cut into
        windows of which each repeats the last `stride` tokens of the one before. A question that leaves no more
        than that of a row is cut, so that windows move on by at least as many tokens as it has.

        Raises ValueError where `stride` leaves nothing of a row.
        """
        if stride < 0:
            raise ValueError(f"stride {stride} must be 0 or more: the tokens that neighbouring windows share")
        assert len(questions) == len(contexts), f"{len(questions)} questions cannot have {len(contexts)} contexts"
        rows = []
        both = zip(self._encode(questions, whole=True), self._encode(contexts, whole=True), strict=True)
        most = (self._room(True) - stride) // 2
        if most < 1:
            raise ValueError(
                f"windows that share {stride} tokens leave none of a row of {self.length} for a question and more of its "
                f"context: the stride may be {max(self._room(True) - 2, 0)} at most"
            )
        for question, context in both:
            if question.size >= self._room(True) - stride:
                self.truncated += 1
                question = _part(question, 0, most)
            room = self._room(True) - question.size
            starts = range(0, max(context.size - stride, 1), room - stride)
            rows.append([self._fill(True, question, _part(context, start, start + room)) for start in starts])
        return rows

    def _single(self, text: _Encoded) -> Framed:
        room = self._room(False)
        self.truncated += text.size > room
        return self._fill(False, _part(text, 0, room))

    def _pair(self, first: _Encoded, second: _Encoded) -> Framed:
        room = self._room(True)
        if room < 1:
            special = self.length - room
            raise ValueError(f"length {self.length} leaves no room for pairs: the tokenizer adds {special} special tokens")
        if first.size + second.size > room:
            self.truncated += 1
            short = min(first.size, second.size, room // 2)
            lengths = (short, room - short) if first.size <= second.size else (room - short, short)
            first, second = _part(first, 0, lengths[0]), _part(second, 0, lengths[1])
        return self._fill(True, first, second)

    def _room(self, pair: bool) -> int:
        """Tokens that text may take of a row."""
        return self.length - sum(place.sequence < 0 for place in self._templates[pair])

    def _fill(self, pair: bool, *texts: _Encoded) -> Framed:
        """The template with the texts in their places."""
        pieces = []
        for place in self._templates[pair]:
            if place.sequence < 0:
                pieces.append(_Encoded(np.array([place.id]), np.zeros((1, 2), np.int32), np.array([-1]), 1))
            else:
                pieces.append(texts[place.sequence])
        sizes = [len(piece.ids) for piece in pieces]

        def each(values: Sequence[int]) -> np.ndarray:
            return np.repeat(np.array(values, np.int32), sizes)

        ids, offsets, words = (np.concatenate([piece[i] for piece in pieces]).astype(np.int32) for i in range(3))
        types, sequence = (each([place[i] for place in self._templates[pair]]) for i in (1, 2))
        return Framed(ids, types, offsets, sequence, words)

    def _encode(self, texts: Sequence[Any], split: bool = False, whole: bool = False) -> Iterator[_Encoded]:
        """Each text, or sentence that is split into words, without special tokens: as much as a row may need, or the whole."""
        rust, most = self._rust_for_words if split else self._rust, None if whole else self.length
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            if self._narrow and not split and not whole:
                some = [text[: self.length + 1] for text in some]  # all that can count: the library is slow with these
            clean = [[well_formed(word) for word in text] if split else well_formed(text) for text in some]
            for encoding in rust.encode_batch(clean, is_pretokenized=split, add_special_tokens=False):
                ids = np.array(encoding.ids[:most], np.int32)
                if self._special.size:
                    ids[np.isin(ids, self._special)] = self._unknown
                offsets = np.array(encoding.offsets[:most], np.int32).reshape(-1, 2)
                words = np.array([-1 if word is None else word for word in encoding.word_ids[:most]], np.int32)
                yield _Encoded(ids, offsets, words, len(encoding))

    @functools.cached_property
    def _rust_for_words(self) -> Any:
        """The tokenizer; a byte-level one with a space before each text that has none."""
        definition = json.loads(self._definition)
        if (definition["pre_tokenizer"] or {}).get("type") != "ByteLevel":
            return self._rust
        definition["pre_tokenizer"]["add_prefix_space"] = True
        post = definition["post_processor"] or {}
        for part in (post, *post.get("processors", [])):
            if "add_prefix_space" in part:  # the space is ours: offsets do not count it
                part["add_prefix_space"] = True
        return _open(json.dumps(definition))


def _part(text: _Encoded, start: int, stop: int) -> _Encoded:
    ids, offsets, words = text.ids[start:stop], text.offsets[start:stop], text.words[start:stop]
    return _Encoded(ids, offsets, words, len(ids))


def _open(definition: str) -> Any:
    import tokenizers

    rust = tokenizers.Tokenizer.from_str(definition)
    rust.encode_special_tokens = True  # not part of the definition
    return rust


def _special_ids(rust: Any, definition: str) -> tuple[np.ndarray, int]:
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


def _own_templates(rust: Any) -> tuple[list[_Place], list[_Place]]:
    """What the tokenizer's post-processor makes of a text and of a pair, read off an example."""
    text = next(text for text in itertools.chain("a", _vocabulary(rust)) if rust.encode(text, add_special_tokens=False).ids)
    templates = []
    for encoding in (rust.encode(text), rust.encode(text, text)):
        places: list[_Place] = []
        for id, type, sequence in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
            sequence = -1 if sequence is None else sequence
            if sequence < 0 or not places or places[-1].sequence != sequence:
                places.append(_Place(id, type, sequence))
        templates.append(places)
    return templates[0], templates[1]


def _vocabulary(rust: Any) -> Iterator[str]:
    yield from rust.get_vocab()  # in a generator: it may be a quarter of a million entries, and "a" nearly always does


def _usual_templates(tokenizer: Tokenizer) -> tuple[list[_Place], list[_Place]]:
    start, end = [], tokenizer.eos_id
    if isinstance(tokenizer, HuggingFace) and None not in (tokenizer.hf.cls_token_id, tokenizer.hf.sep_token_id):
        start, end = [_Place(tokenizer.hf.cls_token_id, 0, -1)], tokenizer.hf.sep_token_id
    single = [*start, _Place(-1, 0, 0), _Place(end, 0, -1)]
    return single, [*single, _Place(-1, 1, 1), _Place(end, 1, -1)]
