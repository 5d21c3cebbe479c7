"""Rows of a decoder other than plain windows: text to fill in the middle of, text with a beginning that is given.

L tokens of a row.
"""

import numpy as np

from jaxlm.data.packing import Row
from jaxlm.data.tokenizer import Tokenizer


class FillIn:
    """Documents of which some are rearranged, so that a decoder learns to write what belongs between two texts.

    A document (or the piece of one that the row has) is cut at two places drawn alike into prefix, middle and suffix,
    and becomes `<prefix> prefix <suffix> suffix <middle> middle` or, in suffix-prefix-middle order,
    `<prefix> <suffix> suffix <middle> prefix middle` (Bavarian et al. 2022, §3: their second way to write it), its end
    of text last. Every token is scored. A row grows by three tokens for each document, and what no longer fits is
    left out at its end.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, *, rate: float, spm: float):
        self.length, self.rate, self.spm = length, rate, spm
        self.raw = length + 1
        self.eos_id = tokenizer.eos_id
        self.marks = [np.array([tokenizer.special[role]], np.int32) for role in ("prefix", "suffix", "middle")] if rate else []

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
        tokens = tokens.astype(np.int32)
        documents = np.split(tokens, np.flatnonzero(tokens == self.eos_id) + 1)
        parts = [self._rearranged(part, rng) if rng.random() < self.rate else part for part in documents]
        return _shifted(np.concatenate(parts)[: self.raw], self.length, self.eos_id)

    def blank(self) -> Row:
        """A row of padding alone."""
        return _shifted(np.zeros(0, np.int32), self.length, self.eos_id)

    def _rearranged(self, document: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n = len(document) - int((document[-1:] == self.eos_id).sum())
        if not n:
            return document
        start, stop = np.sort(rng.integers(0, n + 1, 2))
        prefix, middle, suffix, end = document[:start], document[start:stop], document[stop:n], document[n:]
        before, behind, between = self.marks
        if rng.random() < self.spm:
            return np.concatenate([before, behind, suffix, between, prefix, middle, end])
        return np.concatenate([before, prefix, behind, suffix, between, middle, end])


class PrefixRow:
    """A text whose first `prefix` tokens are given: they are not scored, and a model may let them see each other.

    `prefix` is drawn from 1 to all but one of the tokens, alike (Raffel et al. 2020, §3.2.1). Its last token predicts the
    first one behind it, so the weights are 0 at the `prefix` − 1 tokens before that one.
    """

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.length, self.raw, self.eos_id = length, length + 1, tokenizer.eos_id

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
        row = _shifted(tokens.astype(np.int32), self.length, self.eos_id)
        prefix = int(rng.integers(1, max(2, len(tokens))))
        row["weights"][: prefix - 1] = 0
        return row | {"prefix": np.array(prefix, np.int32)}

    def blank(self) -> Row:
        """A row of padding alone."""
        return _shifted(np.zeros(0, np.int32), self.length, self.eos_id) | {"prefix": np.array(0, np.int32)}


def _shifted(text: np.ndarray, length: int, pad_id: int) -> Row:
    """Each token of the text predicted from those before it, all but the first."""
    n = max(0, len(text) - 1)
    row = {name: np.full(length, pad_id, np.int32) for name in ("tokens", "targets")}
    row["tokens"][:n] = text[:-1]
    row["targets"][:n] = text[1:]
    return row | {"weights": (np.arange(length) < n).astype(np.float32)}
