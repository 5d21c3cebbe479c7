"""Logits processors: which tokens may not come next, or must, as Hugging Face's `generate` has them.

A `LogitsRules` is static under jit: what a model does not ask for is not in its program. All of it runs on the device.

Letters: R rows of the model · H places of the history · S tokens of a source · V vocabulary · W forbidden sequences · M tokens of
their beginnings.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.generate.sample import penalise_repetition


@dataclasses.dataclass(frozen=True)
class LogitsRules:
    """Constraints and biases of the next token. The default changes nothing."""

    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice in prompt and text together (for an encoder-decoder: in the text); 0: off."""
    encoder_no_repeat_ngram_size: int = 0
    """No n-gram of this size of the source (an encoder-decoder's input, a decoder's prompt) occurs in the text; 0: off."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that may not occur."""
    min_length: int = 0
    """Least tokens before the text may end, prompt (or the decoder's start token) included."""
    min_new_tokens: int = 0
    """Least new tokens before the text may end."""
    forced_bos_token_id: int | None = None
    """Token forced at the second position of the decoder: the first new token of an encoder-decoder."""
    forced_eos_token_id: tuple[int, ...] = ()
    """Tokens of which one is forced at the last position when a text reaches its maximum length."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that never come."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that are not the first new one."""
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    """(token sequence, what is added to the score of its last token where the others come before it)."""
    encoder_repetition_penalty: float = 1.0
    """Multiplies positive scores of tokens of the source and divides negative ones; 1: off."""
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """(start, factor): n tokens after the first `start` new ones, |score| · (factor^n − 1) is added to the score of each token that
    ends the text."""
    renormalize_logits: bool = False
    """The scores are log-probabilities again after all rules: of effect where beams are compared."""

    def __post_init__(self) -> None:
        for name in ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be negative")
        if not all(self.bad_words_ids):
            raise ValueError("bad_words_ids holds an empty sequence: give at least one token id each")
        if not all(ids for ids, _ in self.sequence_bias):
            raise ValueError("sequence_bias holds an empty sequence: give at least one token id each")
        if self.encoder_repetition_penalty <= 0:
            raise ValueError(f"encoder_repetition_penalty is {self.encoder_repetition_penalty}: it must be positive")

    def __bool__(self) -> bool:
        return self != LogitsRules()

    def named(self) -> tuple[str, ...]:
        """Names of the rules that are set."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)

    @property
    def reads_history(self) -> bool:
        """Whether a rule looks at which tokens came before, not only at how many."""
        words = (*self.bad_words_ids, *(ids for ids, _ in self.sequence_bias))
        return bool(self.no_repeat_ngram_size or self.encoder_no_repeat_ngram_size or any(len(word) > 1 for word in words))

    @property
    def reads_source(self) -> bool:
        """Whether a rule looks at the source."""
        return bool(self.encoder_no_repeat_ngram_size or self.encoder_repetition_penalty != 1)

    def check(self, vocab_size: int) -> None:
        """ValueError for a token id that the model's table does not hold."""
        ids = {*self.forced_eos_token_id, *self.suppress_tokens, *self.begin_suppress_tokens}
        ids |= {token for word in (*self.bad_words_ids, *(ids for ids, _ in self.sequence_bias)) for token in word}
        ids |= set() if self.forced_bos_token_id is None else {self.forced_bos_token_id}
        wrong = sorted(token for token in ids if not 0 <= token < vocab_size)
        if wrong:
            raise ValueError(f"generation settings name token {wrong[0]}: the model's table holds ids from 0 to {vocab_size - 1}")


NO_RULES = LogitsRules()


class History(NamedTuple):
    """The texts so far. Counts are numbers, or (R,) where rows differ."""

    tokens_RH: jax.Array | None
    """Prompt and text, the text at the end, −1 elsewhere; None where no rule reads it."""
    end_R: Any
    """Place in H of the next token."""
    length_R: Any
    """Tokens of prompt and text (for an encoder-decoder of the decoder's, start token included)."""
    new_R: Any
    """Tokens of the text."""
    limit_R: Any
    """Most tokens of the text."""
    source_RS: Any = None
    """The encoder's tokens, or a decoder's prompt, −1 where there is none; None where no rule reads it."""


def process(
    scores_RV: jax.Array, rules: LogitsRules, history: History, stop: Collection[int] | jax.Array, repetition_penalty: float = 1.0
) -> jax.Array:
    """Scores after the rules, −inf for tokens that they forbid, in the order of `transformers`.

    `scores_RV` are logits or log-probabilities; `stop` are the tokens that end a text: ids, or an array (R, E) or (E,) filled up
    with ids that the table does not hold. `repetition_penalty` is for the tokens of the history.
    """
    R, V = scores_RV.shape
    length_R1, new_R1, limit_R1 = (_column(x, R) for x in (history.length_R, history.new_R, history.limit_R))
    stop_RV = _ids(stop if isinstance(stop, jax.Array) else jnp.array(sorted(stop), jnp.int32), R, V)
    if rules.sequence_bias:
        scores_RV = scores_RV + _bias(rules.sequence_bias, history, length_R1, R, V)
    if rules.encoder_repetition_penalty != 1 and history.source_RS is not None:
        scores_RV = penalise_repetition(scores_RV, history.source_RS, 1 / rules.encoder_repetition_penalty)
    if repetition_penalty != 1:
        assert history.tokens_RH is not None, "the penalty reads the history"
        scores_RV = penalise_repetition(scores_RV, history.tokens_RH, repetition_penalty)
    if rules.no_repeat_ngram_size:
        assert history.tokens_RH is not None, "the rule reads the history"
        banned_RV = _completed(history, history.tokens_RH, rules.no_repeat_ngram_size, V)
        scores_RV = jnp.where(banned_RV, -jnp.inf, scores_RV)
    if rules.encoder_no_repeat_ngram_size and history.source_RS is not None:
        banned_RV = _completed(history, history.source_RS, rules.encoder_no_repeat_ngram_size, V)
        scores_RV = jnp.where(banned_RV, -jnp.inf, scores_RV)
    if rules.bad_words_ids:
        scores_RV = jnp.where(_bad(rules.bad_words_ids, history, length_R1, stop_RV, V), -jnp.inf, scores_RV)
    if rules.min_length or rules.min_new_tokens:
        early_R1 = (length_R1 < rules.min_length) | (new_R1 < rules.min_new_tokens)
        scores_RV = jnp.where(early_R1 & stop_RV, -jnp.inf, scores_RV)
    if rules.forced_bos_token_id is not None:
        scores_RV = _forced(scores_RV, length_R1 == 1, [rules.forced_bos_token_id])
    if rules.forced_eos_token_id:
        scores_RV = _forced(scores_RV, new_R1 == limit_R1 - 1, rules.forced_eos_token_id)
    if rules.exponential_decay_length_penalty is not None:
        start, factor = rules.exponential_decay_length_penalty
        late_R1 = jnp.maximum(new_R1 - start, 0).astype(jnp.float32)
        more_RV = jnp.where(stop_RV & jnp.isfinite(scores_RV), jnp.abs(scores_RV) * (factor**late_R1 - 1), 0)
        scores_RV = scores_RV + more_RV
    if rules.suppress_tokens:
        scores_RV = jnp.where(_some(rules.suppress_tokens, V), -jnp.inf, scores_RV)
    if rules.begin_suppress_tokens:
        # A forced first token is no beginning of its own.
        first_R1 = (length_R1 - new_R1 == 1).astype(jnp.int32) if rules.forced_bos_token_id is not None else 0
        scores_RV = jnp.where((new_R1 == first_R1) & _some(rules.begin_suppress_tokens, V), -jnp.inf, scores_RV)
    return jax.nn.log_softmax(scores_RV, axis=-1) if rules.renormalize_logits else scores_RV


def _column(value: Any, R: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32).reshape(-1), (R,))[:, None]


def _some(ids: Sequence[int], V: int) -> np.ndarray:
    return np.isin(np.arange(V), np.array(ids))[None, :]


def _ids(ids_RE: jax.Array, R: int, V: int) -> jax.Array:
    """(R, V): True for the ids of each row; others than the table's are left out."""
    ids_RE = jnp.broadcast_to(ids_RE if ids_RE.ndim == 2 else ids_RE[None, :], (R, ids_RE.shape[-1]))
    ids_RE = jnp.where(ids_RE < 0, V, ids_RE)  # negative indices would count from the end
    return jnp.zeros((R, V), bool).at[jnp.arange(R)[:, None], ids_RE].set(True, mode="drop")


def _forced(scores_RV: jax.Array, here_R1: jax.Array, ids: Sequence[int]) -> jax.Array:
    return jnp.where(here_R1, jnp.where(_some(ids, scores_RV.shape[1]), 0, -jnp.inf).astype(scores_RV.dtype), scores_RV)


def _last(history: History, count: int) -> jax.Array:
    """(R, count): the last tokens of each text, −1 before its first."""
    assert history.tokens_RH is not None, "a rule reads the history"
    place_RM = _column(history.end_R, history.tokens_RH.shape[0]) - jnp.arange(count, 0, -1)[None, :]
    last_RM = jnp.take_along_axis(history.tokens_RH, jnp.maximum(place_RM, 0), axis=1)
    return jnp.where(place_RM >= 0, last_RM, -1)


def _completed(history: History, tokens_RH: jax.Array, size: int, V: int) -> jax.Array:
    """(R, V): tokens that would complete an n-gram of `tokens_RH`."""
    (R, H), M = tokens_RH.shape, size - 1
    if H < size:
        return jnp.zeros((R, V), bool)
    ends_RH = tokens_RH[:, M:]
    if M:
        last_RM = _last(history, M)
        same_RH = jnp.all(last_RM >= 0, axis=1, keepdims=True)
        for j in range(M):
            same_RH = same_RH & (tokens_RH[:, j : H - M + j] == last_RM[:, j : j + 1])
        ends_RH = jnp.where(same_RH, ends_RH, -1)
    return _ids(ends_RH, R, V)


def _bad(words: Sequence[Sequence[int]], history: History, length_R1: jax.Array, stop_RV: jax.Array, V: int) -> jax.Array:
    """(R, V): tokens that would complete one of the sequences. What ends a text is no bad word."""
    alone, longer = [word[0] for word in words if len(word) == 1], [word for word in words if len(word) > 1]
    banned_RV = jnp.asarray(_some(alone, V)) & ~stop_RV
    if not longer:
        return banned_RV
    last_W: Any = np.array([word[-1] for word in longer], np.int32)
    return banned_RV | _ids(jnp.where(_begun(longer, history, length_R1), last_W[None, :], -1), stop_RV.shape[0], V)


def _bias(biases: Sequence[tuple[Sequence[int], float]], history: History, length_R1: jax.Array, R: int, V: int) -> jax.Array:
    """(R, V): sums of the biases of sequences that a token would complete."""
    bias_RV, longer = np.zeros((1, V), np.float32), [(ids, bias) for ids, bias in biases if len(ids) > 1]
    for ids, bias in biases:
        if len(ids) == 1:
            bias_RV[0, ids[0]] = bias
    if not longer:
        return jnp.asarray(bias_RV)
    bias_W: Any = np.array([bias for _, bias in longer], np.float32)
    there_RW = _begun([ids for ids, _ in longer], history, length_R1)
    last_W: Any = np.array([ids[-1] for ids, _ in longer], np.int32)
    return jnp.broadcast_to(bias_RV, (R, V)).at[:, last_W].add(jnp.where(there_RW, bias_W[None, :], 0))


def _begun(words: Sequence[Sequence[int]], history: History, length_R1: jax.Array) -> jax.Array:
    """(R, W): whether all tokens but the last of each sequence of two or more are the last ones of the history."""
    M = max(map(len, words)) - 1
    begin_WM: Any = np.array([[-1] * (M + 1 - len(word)) + list(word[:-1]) for word in words], np.int32)
    same_RWM = (_last(history, M)[:, None, :] == begin_WM[None]) | (begin_WM < 0)[None]
    return jnp.all(same_RWM, axis=-1) & (length_R1 >= np.array([len(word) - 1 for word in words], np.int32)[None, :])
