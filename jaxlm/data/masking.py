"""Rows of masked language modelling: tokens hidden from an encoder that has to name them, alone or in pairs of texts.

L tokens of a row · V entries of the vocabulary.
"""

import dataclasses
from typing import Literal

import numpy as np

from jaxlm.data.packing import Row
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.vocabulary import Vocabulary

Pairs = Literal["none", "next_sentence", "sentence_order"]


@dataclasses.dataclass(frozen=True)
class Shares:
    """What becomes of the chosen tokens; the rest of them stays as it is."""

    masked: float
    random: float


# Devlin et al. 2019, §3.1. Clark et al. 2020, §3.1, replace all chosen tokens by the mask; their published code
# leaves 15% of them as they are, which the paper does not mention.
BERT, ELECTRA = Shares(0.8, 0.1), Shares(1.0, 0.0)


class Masked:
    """`[CLS] tokens [SEP]`, or a pair `[CLS] A [SEP] B [SEP]`, of which a share is hidden.

    Rows hold `tokens`, `targets` (the tokens as they were), `weights` (1 at the chosen ones), `segments` (0: padding);
    pairs add `types` (1: B and the separator behind it) and the scalar `labels`. A tokenizer without cls or sep makes
    rows without them. Special tokens are never chosen, nor put in at random. A row without ordinary tokens, and `blank`,
    has no weights.

    Of n ordinary tokens max(1, round(rate n)) are chosen. Whole words are chosen in random order until as many tokens
    are reached; the word that would pass that number is taken with the chance that keeps the mean.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, *, rate: float, whole_words: bool, pairs: Pairs, shares: Shares):
        self.length, self.rate, self.whole_words, self.pairs, self.shares = length, rate, whole_words, pairs, shares
        self.vocabulary = Vocabulary(tokenizer)
        self.mask_id = tokenizer.special["mask"]
        self.pad_id = tokenizer.special.get("pad", tokenizer.eos_id)
        self.eos_id = tokenizer.eos_id
        roles = [tokenizer.special.get(role) for role in ("cls", "sep")]
        self.cls, self.sep = (np.array([] if i is None else [i], np.int32) for i in roles)
        self.content = length - len(self.cls) - len(self.sep) * (1 if pairs == "none" else 2)
        """Tokens of the corpus in a row."""
        least = 1 if pairs == "none" else 4
        if self.content < least:
            raise ValueError(f"data length {length} is too short for masked rows: give at least {length - self.content + least}")
        self.raw = 2 * self.content if pairs == "next_sentence" else self.content
        """Tokens of the corpus' stream that make a row: B comes from elsewhere among them, so they are twice as many."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
        tokens = tokens.astype(np.int32)
        if self.pairs == "next_sentence":
            first, second, label = self._next_sentence(tokens, rng)
        elif self.pairs == "sentence_order":
            first, second, label = self._sentence_order(tokens, rng)
        else:
            return self._hide(self._frame(tokens, None, 0), rng)
        return self._hide(self._frame(first, second, label), rng)

    def blank(self) -> Row:
        """A row of padding alone: segments 0 throughout, label 0."""
        return self._frame(None, None, 0)

    def _frame(self, first: np.ndarray | None, second: np.ndarray | None, label: int) -> Row:
        """The row before anything is hidden."""
        head = [] if first is None else [self.cls, first, self.sep]
        tail = [] if second is None else [second, self.sep]
        start = sum(map(len, head))
        stop = start + sum(map(len, tail))
        row: Row = {
            "tokens": np.full(self.length, self.pad_id, np.int32),
            "weights": np.zeros(self.length, np.float32),
            "segments": np.zeros(self.length, np.int32),
        }
        if stop:
            np.concatenate([*head, *tail], out=row["tokens"][:stop])
        row["targets"] = row["tokens"]
        row["segments"][:stop] = 1
        if self.pairs != "none":
            row["types"] = np.zeros(self.length, np.int32)
            row["types"][start:stop] = 1
            row["labels"] = np.array(label, np.int32)
        return row

    def _hide(self, row: Row, rng: np.random.Generator) -> Row:
        """Some tokens of the row chosen, weighted and replaced."""
        chosen = self._choose(row["targets"], rng)
        row["weights"][chosen] = 1
        row["tokens"] = row["targets"].copy()
        fate = rng.random(len(chosen))
        row["tokens"][chosen[fate < self.shares.masked]] = self.mask_id
        other = chosen[(fate >= self.shares.masked) & (fate < self.shares.masked + self.shares.random)]
        ids = self.vocabulary.ordinary_ids
        row["tokens"][other] = ids[rng.integers(len(ids), size=len(other))]
        return row

    def _choose(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The places of the tokens to name."""
        places = np.flatnonzero(self.vocabulary.ordinary_V[tokens])
        if not len(places):
            return places
        if not self.whole_words:
            return rng.choice(places, max(1, round(self.rate * len(places))), replace=False, shuffle=False)
        word = np.cumsum(self.vocabulary.word_starts(tokens)[places]) - 1  # of each place
        sizes = np.bincount(word)
        order = rng.permutation(len(sizes))
        reached = np.cumsum(sizes[order])
        wanted = max(1.0, self.rate * len(places))
        count = int(np.searchsorted(reached, wanted, side="right"))  # words that stay within it
        if count < len(order):
            before = reached[count - 1] if count else 0
            count += int(rng.random() * sizes[order[count]] < wanted - before)
        taken = np.zeros(len(sizes), bool)
        taken[order[:count]] = True
        return places[taken[word]]

    def _next_sentence(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """(A, B, label): B follows A (0), or comes from another place of `tokens` (1), each half of the time.

        Devlin et al. 2019, §3.1 and §A.2. A ends and B begins at the end of a sentence, where there are any.
        """
        n, size = len(tokens), min(self.content, len(tokens) // 2)
        if size < 2:
            return tokens[: self.content], tokens[:0], 0
        first = _between(size, rng)
        second = size - first
        ends = self._sentence_ends(tokens)
        end = _one_of(ends[(ends >= first) & (ends <= n - second)], np.arange(first, n - second + 1), rng)
        label = int(rng.integers(2))
        begin = end
        if label:
            free = np.concatenate([np.arange(end - size + 1), np.arange(end + 1, n - second + 1)])
            begin = _one_of(ends[((ends > end) & (ends <= n - second)) | (ends <= end - size)], free, rng)
        return tokens[end - first : end], tokens[begin : begin + second], label

    def _sentence_order(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """(A, B, label): two pieces that follow each other (0), swapped half of the time (1); Lan et al. 2020, §3.1.

        Pieces of sentences at the outer edges are left out, as far as they lie in the outer quarters: they would
        tell which piece comes first.
        """
        ends = self._sentence_ends(tokens)
        if len(ends):
            start = ends[0] if ends[0] <= len(tokens) // 4 else 0
            stop = ends[-1] if ends[-1] >= len(tokens) - len(tokens) // 4 else len(tokens)
            tokens, ends = tokens[start:stop], ends[(ends > start) & (ends < stop)] - start
        n = len(tokens)
        if n < 2:
            return tokens, tokens[:0], 0
        edge = max(1, n // 4)
        split = _one_of(ends[(ends >= edge) & (ends <= n - edge)], np.arange(edge, n - edge + 1), rng)
        label = int(rng.integers(2))
        pieces = tokens[:split], tokens[split:]
        return pieces[label], pieces[1 - label], label

    def _sentence_ends(self, tokens: np.ndarray) -> np.ndarray:
        """The places behind sentences and documents."""
        return np.flatnonzero(self.vocabulary.sentence_ends[tokens] | (tokens == self.eos_id)) + 1


def _between(size: int, rng: np.random.Generator) -> int:
    """A length for the first of two pieces: neither is shorter than a quarter of the whole."""
    least = max(1, size // 4)
    return int(rng.integers(least, size - least + 1))


def _one_of(wished: np.ndarray, possible: np.ndarray, rng: np.random.Generator) -> int:
    """One of the wished places, of the possible ones where there is none."""
    places = wished if len(wished) else possible
    return int(places[rng.integers(len(places))])
