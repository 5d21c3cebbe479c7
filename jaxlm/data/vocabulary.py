"""What the entries of a vocabulary are: ordinary or special, where words begin, where sentences end.

Read once from a tokenizer's `tokenizer.json`, which every kind has; a row of tokens is then a matter of look-ups.
V entries of the vocabulary · L tokens of a row.
"""

import functools
import json

import numpy as np

from jaxlm.data.tokenizer import Tokenizer, byte_characters

SPACE, BREAK, LETTER, DIGIT, OTHER = range(5)  # the kinds of characters that GPT-2's rule for words tells apart
SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")


class Vocabulary:
    """The entries of a tokenizer's vocabulary, looked up by id."""

    def __init__(self, tokenizer: Tokenizer):
        definition = json.loads(tokenizer.definition())
        self._model, added = definition["model"], definition["added_tokens"]
        listed = self._model["vocab"]
        entries = listed if isinstance(listed, dict) else {piece: i for i, (piece, _) in enumerate(listed)}
        self._pieces: list[str | None] = [None] * tokenizer.vocab_size  # None: an id that stands for nothing
        for piece, i in (*entries.items(), *((token["content"], token["id"]) for token in added)):
            self._pieces[i] = piece

        unknown = self._model.get("unk_id", entries.get(self._model.get("unk_token")))
        special = {token["id"] for token in added if token["special"]} | {tokenizer.eos_id, tokenizer.bos_id}
        special |= {*tokenizer.special.values(), *tokenizer.sentinels} | ({unknown} if unknown is not None else set())
        self.ordinary_V = np.array([piece is not None and i not in special for i, piece in enumerate(self._pieces)])
        """Whether an entry stands for text: not for an end, a role, a sentinel, the unknown, or nothing."""
        self.ordinary_ids = np.flatnonzero(self.ordinary_V).astype(np.int32)

        self._bytes = '"ByteLevel"' in json.dumps(definition["pre_tokenizer"])
        if self._bytes:
            byte_of = {char: chr(byte) for byte, char in enumerate(byte_characters())}
            self._pieces = [piece and "".join(byte_of.get(char, char) for char in piece) for piece in self._pieces]

    @functools.cached_property
    def sentence_ends(self) -> np.ndarray:
        """(V,) bool, whether an entry ends a sentence: a full stop, a question or an exclamation mark stands last in it."""
        ends = SENTENCE_ENDS[:3] if self._bytes else SENTENCE_ENDS
        return np.array([piece is not None and piece.endswith(ends) for piece in self._pieces]) & self.ordinary_V

    def word_starts(self, tokens_L: np.ndarray) -> np.ndarray:
        """(L,) bool, True where a word begins: at the row's start, at and behind special tokens, and where the text says so.

        WordPiece: at entries without the mark of a continuation (Devlin et al. 2019). SentencePiece: at entries that
        begin with ▁ (Kudo and Richardson 2018). Bytes and characters: before white space and where letters, digits and
        other signs meet, a space belonging to what follows it (Radford et al. 2019: the rule that splits text before
        its bytes are merged; its contractions, 's and the like, are left out).
        """
        starts_L = ~self.ordinary_V[tokens_L]
        starts_L[1:] |= starts_L[:-1]
        starts_L[:1] = True
        if self._begins is not None:
            return starts_L | self._begins[tokens_L]
        first_V, last_V = self._kinds
        first_L, before_L = first_V[tokens_L], last_V[tokens_L[:-1]]
        starts_L |= first_L <= BREAK
        starts_L[1:] |= (first_L[1:] != before_L) & (before_L != SPACE)
        return starts_L

    @functools.cached_property
    def _begins(self) -> np.ndarray | None:
        """(V,) bool, whether an entry begins a word, where its own spelling says so."""
        if self._model["type"] == "WordPiece":
            mark = self._model["continuing_subword_prefix"]
            return np.array([piece is not None and not piece.startswith(mark) for piece in self._pieces])
        begins_V = np.array([piece is not None and piece.startswith("▁") for piece in self._pieces])
        return None if self._bytes or not begins_V.any() else begins_V

    @functools.cached_property
    def _kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """(V,) int8 twice, the kinds of each entry's first and last character."""
        kinds = [(self._kind(piece[0]), self._kind(piece[-1])) if piece else (OTHER, OTHER) for piece in self._pieces]
        first_V, last_V = np.array(kinds, np.int8).T
        return first_V, last_V

    def _kind(self, char: str) -> int:
        if self._bytes and char >= "\x80":  # a part of a character, of a letter most likely
            return LETTER
        if char.isspace():
            return SPACE if char == " " else BREAK
        return LETTER if char.isalpha() else DIGIT if char.isnumeric() else OTHER
