"""What is done to a run of tokens so that a model can learn from it, by the name of the objective.

A corruption turns `raw` tokens of the corpus into a row. It draws from the generator that it is given and keeps no
state, so a row is a function of its tokens and of how the generator was seeded: another masking in every epoch.
"""

import dataclasses
from typing import Literal, Protocol

import numpy as np

from jaxlm.config import unknown
from jaxlm.data.causal import FillIn, PrefixRow
from jaxlm.data.denoising import UL2, Denoiser, Infilling, PrefixPair, Spans
from jaxlm.data.masking import BERT, ELECTRA, Masked
from jaxlm.data.packing import Row
from jaxlm.data.tokenizer import Tokenizer

ARCHITECTURES = {
    "causal": ("decoder",),
    "masked": ("encoder",),
    "replaced": ("encoder",),
    "span": ("encoder_decoder",),
    "mixture": ("encoder_decoder",),
    "prefix": ("decoder", "encoder_decoder"),
    "denoising": ("encoder_decoder",),
}
"""Kind of corruption → the architectures that can learn from it."""
KINDS = tuple(ARCHITECTURES)


@dataclasses.dataclass(frozen=True)
class CorruptConfig:
    """What is hidden or moved in the text that an objective learns from."""

    rate: float = 0.15
    """Share of the tokens that is masked or cut out. The papers: masked, replaced and span 0.15, denoising 0.3."""
    mean_span: float = 3.0
    """Tokens of a span on average, of objectives span and denoising."""
    whole_words: bool = False
    """Objectives masked and replaced: hide all tokens of a word together."""
    pairs: Literal["none", "next_sentence", "sentence_order"] = "none"
    """Objective masked: rows of two pieces of text, and whether the second follows the first, or the two are swapped."""
    fim: float = 0.0
    """Objective causal: share of the documents that are rearranged to fill in the middle."""
    spm: float = 0.5
    """Of those, the share in suffix-prefix-middle order."""
    permute_sentences: bool = True
    """Objective denoising: sentences in random order."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"corrupt rate {self.rate} must lie between 0 and 1")
        if not self.mean_span >= 1:
            raise ValueError(f"corrupt mean_span {self.mean_span} must be at least 1")
        for name in ("fim", "spm"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"corrupt {name} {getattr(self, name)} must lie between 0 and 1")


class Corruption(Protocol):
    """Tokens → a row, all rows of the same names and shapes (padding: segments 0 where there are segments, weights 0)."""

    raw: int
    """Tokens of the corpus' stream that make one row."""

    def __call__(self, tokens: np.ndarray, rng: np.random.Generator) -> Row:
        """The row of 1 to `raw` tokens; fewer than `raw` make a padded one."""

    def blank(self) -> Row:
        """A row of padding alone."""


def make_corruption(
    kind: str, config: CorruptConfig, tokenizer: Tokenizer, length: int, architecture: str, target_length: int | None = None
) -> Corruption:
    """The corruption of an objective, for rows of `length` tokens (an encoder's; its decoder's have `target_length`, by
    default what spans need, else `length`).

    Raises ValueError where the architecture cannot learn from it, the tokenizer lacks a token for it, the config asks for
    what this kind does not read, or the rows are too short.
    """
    if kind not in ARCHITECTURES:
        raise unknown("objective", kind, KINDS)
    if architecture not in ARCHITECTURES[kind]:
        raise ValueError(f"objective {kind} is for architecture {' or '.join(ARCHITECTURES[kind])}, not for {architecture}")
    _check_read(kind, config, architecture, target_length)
    if kind in ("masked", "replaced"):
        roles = ("mask", "cls", "sep") if config.pairs != "none" else ("mask",)
        _check_tokens(kind, tokenizer, roles, ("mask", "cls", "sep"))
        return Masked(
            tokenizer, length, rate=config.rate, whole_words=config.whole_words, pairs=config.pairs,
            shares=ELECTRA if kind == "replaced" else BERT,
        )  # fmt: skip
    if kind == "span":
        return Spans(tokenizer, length, target_length, [Denoiser(config.mean_span, config.rate)], kind)
    if kind == "mixture":
        return Spans(tokenizer, length, target_length, UL2, kind)
    if kind == "denoising":
        _check_tokens(kind, tokenizer, ("mask",), ("mask", "pad"))
        return Infilling(
            tokenizer, length, target_length, rate=config.rate, mean_span=config.mean_span, permute=config.permute_sentences
        )
    if kind == "prefix":
        return PrefixRow(tokenizer, length) if architecture == "decoder" else PrefixPair(tokenizer, length, target_length)
    if config.fim:
        _check_tokens("causal with corrupt.fim", tokenizer, ("prefix", "middle", "suffix"), ("prefix", "middle", "suffix"))
    return FillIn(tokenizer, length, rate=config.fim, spm=config.spm)


def _check_read(kind: str, config: CorruptConfig, architecture: str, target_length: int | None) -> None:
    """Refuse options that this kind would not read."""
    for name, given, kinds in (
        ("pairs", config.pairs != "none", ("masked",)),
        ("whole_words", config.whole_words, ("masked", "replaced")),
        ("fim", config.fim > 0, ("causal",)),
    ):
        if given and kind not in kinds:
            raise ValueError(
                f"corrupt {name} {getattr(config, name)} is only read by objective {' or '.join(kinds)}, not by {kind}"
            )
    if target_length is not None and architecture != "encoder_decoder":
        raise ValueError(f"target length {target_length} is only read by architecture encoder_decoder, not by {architecture}")


def _check_tokens(kind: str, tokenizer: Tokenizer, needed: tuple[str, ...], advised: tuple[str, ...]) -> None:
    missing = [role for role in needed if role not in tokenizer.special]
    if missing:
        a, tokens = ("a ", "token") if len(missing) == 1 else ("", "tokens")
        raise ValueError(
            f"objective {kind} needs {a}{' and '.join(missing)} {tokens}: add --data.tokenizer.special {','.join(advised)} "
            "(or take a tokenizer that has one)"
        )


# --- rows of a stream -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A stream cut into runs of `size` tokens; the rest at the end is a shorter one, or dropped where all are `whole`."""

    stream: np.ndarray
    size: int
    whole: bool

    def __len__(self) -> int:
        return len(self.stream) // self.size if self.whole else -(-len(self.stream) // self.size)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.stream[i * self.size : (i + 1) * self.size]


@dataclasses.dataclass(frozen=True)
class CorruptedRows:
    """Row i is what the corruption makes of chunk i; it is number `first` + i of those that `seed` stands for."""

    chunks: Chunks
    corruption: Corruption
    seed: tuple[int, ...]
    first: int

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> Row:
        return corrupted(self.corruption, self.seed, self.first + i, self.chunks[i])

    def blank(self) -> Row:
        return self.corruption.blank()


def corrupted(corruption: Corruption, seed: tuple[int, ...], number: int, tokens: np.ndarray) -> Row:
    """Row number `number` of those that `seed` stands for."""
    return corruption(tokens, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,))))
