"""Rows of an encoder-decoder that rebuilds text: from spans cut out, from a mixture of such cuts, from shuffled and
infilled sentences, or from a beginning.

Rows are `{"encoder": {tokens, segments}, "decoder": {tokens, targets, weights, segments}}`, the encoder's arrays
(L,), the decoder's (T,); segment 1 is text, segment 0 padding.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxlm.data.packing import Row
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Pair:
    """What turns two runs of tokens into a row of fixed lengths."""

    length: int
    target_length: int
    start_id: int
    """What the decoder's first target is predicted from."""
    pad_id: int

    def row(self, source: np.ndarray, target: np.ndarray) -> Row:
        n, m = len(source), len(target)
        assert n <= self.length and m <= self.target_length, f"{n} and {m} tokens for {self.length} and {self.target_length}"
        encoder = {"tokens": np.full(self.length, self.pad_id, np.int32), "segments": np.zeros(self.length, np.int32)}
        encoder["tokens"][:n] = source
        encoder["segments"][:n] = 1
        decoder = {name: np.full(self.target_length, self.pad_id, np.int32) for name in ("tokens", "targets")}
        decoder |= {"weights": np.zeros(self.target_length, np.float32), "segments": np.zeros(self.target_length, np.int32)}
        decoder["targets"][:m] = target
        decoder["tokens"][:1] = self.start_id
        decoder["tokens"][1:m] = target[:-1]
        decoder["weights"][:m] = 1
        decoder["segments"][:m] = 1
        return {"encoder": encoder, "decoder": decoder}

    def blank(self) -> Row:
        """A row of padding alone."""
        return self.row(np.zeros(0, np.int32), np.zeros(0, np.int32))


def start_of(tokenizer: Tokenizer, kind: str) -> int:
    """The id that a decoder trained with this kind of corruption starts from: T5's padding, BART's end of text.

    Without a padding token T5's is the beginning of text, the end of text where there is none.
    """
    return tokenizer.eos_id if kind == "denoising" else tokenizer.special.get("pad", tokenizer.bos_id)


# --- spans ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """Which tokens are cut out of n: round(rate n) of them, in spans of `mean` tokens on average."""

    mean: float | None
    """None: one span, at the end."""
    rate: float

    def sizes(self, n: int) -> tuple[int, int]:
        """(tokens cut out, spans): fixed by n, at least one of each, and every span has a token before it."""
        if n < 2:
            return 0, 0
        noise = min(max(round(n * self.rate), 1), n - 1)
        return noise, 1 if self.mean is None else min(max(round(noise / self.mean), 1), noise, n - noise)

    def lengths(self, n: int) -> tuple[int, int]:
        """(tokens that the encoder reads, tokens that the decoder writes), an end of text on either."""
        noise, spans = self.sizes(n)
        return n - noise + spans + 1, noise + max(spans, 1) + 1

    def mask(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """(n,) bool, True where a token is cut out.

        Kept and cut spans alternate, a kept one first; the lengths of either are a random division of their sum into
        so many parts, all divisions alike (Raffel et al. 2020, §3.1.4 and §3.3.4; T5's published
        `random_spans_noise_mask`).
        """
        noise, spans = self.sizes(n)
        if self.mean is None or not spans:
            return np.arange(n) >= n - noise
        parts = np.stack([_division(n - noise, spans, rng), _division(noise, spans, rng)], axis=1)
        return np.repeat(np.tile([False, True], spans), parts.ravel())


UL2 = (
    Denoiser(3, 0.15), Denoiser(8, 0.15),
    Denoiser(3, 0.5), Denoiser(8, 0.5), Denoiser(64, 0.15), Denoiser(64, 0.5),
    Denoiser(None, 0.25),
)  # fmt: skip
"""Tay et al. 2022, table 1: the regular denoisers, the extreme ones, the sequential one."""


class Spans:
    """Spans cut out of a text, a sentinel in the place of each; the decoder writes each sentinel and its span.

    A row draws one of the denoisers, all alike. `raw` is the largest number of tokens that no denoiser makes longer
    than the rows, so that no token is thrown away; for a single denoiser the encoder's row is then full (but for one
    token at times, where spans are as many as kept tokens).
    """

    def __init__(self, tokenizer: Tokenizer, length: int, target_length: int | None, denoisers: Sequence[Denoiser], kind: str):
        def fits(n: int) -> bool:
            sizes = [denoiser.lengths(n) for denoiser in denoisers]
            return all(source <= length and (target_length is None or target <= target_length) for source, target in sizes)

        if not fits(2):
            raise ValueError(
                f"data length {length} (targets {target_length or 'as long as needed'}) is too short for objective {kind}"
            )
        self.raw = 2
        while fits(self.raw + 1):
            self.raw += 1
        needed = max(denoiser.sizes(self.raw)[1] for denoiser in denoisers)
        if needed > len(tokenizer.sentinels):
            raise ValueError(
                f"objective {kind} needs {needed} sentinels for rows of {length} tokens, the tokenizer has "
                f"{len(tokenizer.sentinels)}: add --data.tokenizer.sentinels {needed} (or take a tokenizer that has them)"
            )
        self.denoisers = tuple(denoisers)
        self.sentinels = np.array(tokenizer.sentinels, np.int32)
        self.end = np.array([tokenizer.eos_id], np.int32)
        targets = target_length or max(denoiser.lengths(self.raw)[1] for denoiser in denoisers)
        self.pair = Pair(length, targets, start_of(tokenizer, kind), tokenizer.special.get("pad", tokenizer.eos_id))

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
        tokens = tokens.astype(np.int32)
        denoiser = self.denoisers[rng.integers(len(self.denoisers)) if len(self.denoisers) > 1 else 0]
        cut = denoiser.mask(len(tokens), rng)
        # Span k kept is followed by span k cut out: the sentinel of the latter stands, to the decoder, for the former.
        source, target = (np.concatenate([self._replaced(tokens, spans), self.end]) for spans in (cut, ~cut))
        return self.pair.row(source, target)

    def blank(self) -> Row:
        """A row of padding alone."""
        return self.pair.blank()

    def _replaced(self, tokens: np.ndarray, spans: np.ndarray) -> np.ndarray:
        """The tokens with one sentinel in the place of each run of True."""
        starts = spans.copy()
        starts[1:] &= ~spans[:-1]
        number = np.cumsum(starts) - 1
        return np.where(starts, self.sentinels[number], tokens)[starts | ~spans]


def _division(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`total` as the sum of so many positive numbers, all such sums alike."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False, shuffle=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


# --- BART -------------------------------------------------------------------------------------


class Infilling:
    """Sentences in random order, and spans of them, some of no length, each replaced by one mask; the decoder writes
    the text as it was (Lewis et al. 2020, §2.2 and §5.1).

    round(rate n) of n tokens are replaced, in spans whose lengths are drawn from a Poisson distribution until they
    reach that number; the last is shortened to it. Where a span lies is drawn among all arrangements of the tokens kept
    and the spans, so that two may touch. Sentences keep to their document. A tokenizer with a beginning of text of its
    own puts it before either text, as BART does.
    """

    def __init__(
        self, tokenizer: Tokenizer, length: int, target_length: int | None, *, rate: float, mean_span: float, permute: bool
    ):
        self.rate, self.mean_span, self.permute = rate, mean_span, permute
        self.mask_id, self.eos_id = tokenizer.special["mask"], tokenizer.eos_id
        self.vocabulary = Vocabulary(tokenizer)
        own = tokenizer.bos_id != tokenizer.eos_id
        self.begin = np.array([tokenizer.bos_id] if own else [], np.int32)
        self.end = np.array([tokenizer.eos_id], np.int32)
        targets = target_length or length
        self.raw = min(length, targets) - len(self.begin) - 1
        if self.raw < 1:
            raise ValueError(f"data length {length} (targets {targets}) is too short for objective denoising")
        self.pair = Pair(length, targets, start_of(tokenizer, "denoising"), tokenizer.special.get("pad", tokenizer.eos_id))

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
        tokens = tokens.astype(np.int32)
        shuffled = tokens[self._order(tokens, rng)] if self.permute else tokens
        source = self._infill(shuffled, rng)
        return self.pair.row(*(np.concatenate([self.begin, text, self.end]) for text in (source, tokens)))

    def blank(self) -> Row:
        """A row of padding alone."""
        return self.pair.blank()

    def _order(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The places of the tokens, sentences shuffled within each document, its end of text last."""
        closes = tokens == self.eos_id
        ends = closes | self.vocabulary.sentence_ends[tokens]
        sentence = np.cumsum(ends) - ends  # an end belongs to the sentence before it
        document = np.cumsum(closes) - closes
        place = rng.random(len(tokens))[sentence]
        return np.argsort(document + np.where(closes, 1.0, place), kind="stable")

    def _infill(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n = len(tokens)
        wanted = round(self.rate * n)
        kept = n - wanted
        lengths = self._spans(wanted, rng)
        over = kept + len(lengths) - (self.pair.length - len(self.begin) - 1)
        if over > 0:  # insertions that the row has no place for
            lengths = np.delete(lengths, np.flatnonzero(lengths == 0)[:over])
        units = np.ones(kept + len(lengths), np.int64)  # tokens that each token or mask of the new text stands for
        masks = np.sort(rng.choice(len(units), len(lengths), replace=False, shuffle=False))
        units[masks] = lengths
        starts = np.cumsum(units) - units
        infilled = tokens[np.minimum(starts, n - 1)]
        infilled[masks] = self.mask_id
        return infilled

    def _spans(self, wanted: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths whose sum is `wanted`."""
        lengths = np.zeros(0, np.int64)
        while lengths.sum() < wanted:
            lengths = np.concatenate([lengths, rng.poisson(self.mean_span, int(wanted / self.mean_span) + 8)])
        reached = np.cumsum(lengths)
        count = int(np.searchsorted(reached, wanted)) + 1 if wanted else 0
        lengths = lengths[:count]
        if count:
            lengths[-1] -= reached[count - 1] - wanted
        return lengths


# --- prefix -----------------------------------------------------------------------------------


class PrefixPair:
    """The beginning of a text for the encoder, the rest for the decoder, an end of text on either; where it is cut is
    drawn with equal chances from all places (Raffel et al. 2020, §3.3.1).
    """

    def __init__(self, tokenizer: Tokenizer, length: int, target_length: int | None):
        self.raw = length
        targets = target_length or length
        if length < 2 or targets < 2:
            raise ValueError(f"data length {length} (targets {targets}) is too short for objective prefix")
        self.end = np.array([tokenizer.eos_id], np.int32)
        self.pair = Pair(length, targets, start_of(tokenizer, "prefix"), tokenizer.special.get("pad", tokenizer.eos_id))

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
        tokens, n = tokens.astype(np.int32), len(tokens)
        least = max(1, n + 1 - self.pair.target_length)
        cut = int(rng.integers(least, n)) if least < n else n
        return self.pair.row(*(np.concatenate([part, self.end]) for part in (tokens[:cut], tokens[cut:])))

    def blank(self) -> Row:
        """A row of padding alone."""
        return self.pair.blank()
