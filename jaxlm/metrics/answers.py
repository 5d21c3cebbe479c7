"""Exact match and F1 of extracted answers, by the rules of SQuAD's official scripts (1.1 and 2.0).

Rajpurkar et al. 2016, section 6.1; Rajpurkar, Jia & Liang 2018, section 5. Scores are percentages. Words are what spaces part;
for languages written without spaces the rules are those of CMRC 2018's script (Cui et al. 2019, section 3.3): characters stand
for words, and F1 counts the longest run of them that both sides share. B questions · N weightings (resamples).
"""

import collections
import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from jaxlm.config import unknown
from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import Scores, Weighted, check_numbers, check_sizes
from jaxlm.metrics.scripts import kind_of, spaceless

declare(higher=[f"{part}{name}" for name in ("exact", "f1") for part in ("", "answerable_", "unanswerable_", "best_")])

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# What CMRC 2018 leaves out. Of ASCII it keeps the marks that stand in numbers and abbreviations.
_CMRC_PUNCTUATION = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
Words = Literal["auto", "spaces", "characters"]


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles (a, an, the), single spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalise_characters(text: str) -> str:
    """Lower case, without CMRC 2018's punctuation and without white space at the ends."""
    return text.lower().strip().translate(_CMRC_PUNCTUATION)


def characters_of(text: str) -> list[str]:
    """Characters of scripts without spaces and, of others, words, numbers and single marks, of a normalised text."""
    parts: list[str] = []
    run = ""
    for char in text:
        if kind_of(char) == "single":
            parts += [*_RUN.findall(run), char]
            run = ""
        elif kind_of(char) == "mark" and not run and parts:
            parts[-1] += char  # belongs to the letter before it
        else:
            run += char
    return [*parts, *_RUN.findall(run)]


_RUN = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")


def exact_match(prediction: str, answers: Sequence[str], words: Words = "spaces") -> float:
    """1 if the prediction is one of the answers after normalising; a question without answers expects an empty one."""
    clean = normalise_characters if words == "characters" else normalise
    return float(clean(prediction) in _wanted(answers, clean))


def word_f1(prediction: str, answers: Sequence[str], words: Words = "spaces") -> float:
    """The best F1 of the words shared with one of the answers, of "characters" of the longest run of them that is shared; an
    empty side scores 1 with an empty one, else 0."""
    if words == "characters":
        guess = characters_of(normalise_characters(prediction))
        return max(_f1(guess, characters_of(answer), _longest_run) for answer in _wanted(answers, normalise_characters))
    return max(_f1(normalise(prediction).split(), answer.split(), _in_common) for answer in _wanted(answers, normalise))


def _wanted(answers: Sequence[str], clean: Callable[[str], str]) -> list[str]:
    """The answers, normalised; one of which nothing is left counts only where there is no other: it means no answer."""
    return [text for answer in answers if (text := clean(answer))] or [""]


def _f1(guess: list[str], truth: list[str], shared: Callable[[list[str], list[str]], int]) -> float:
    if not guess or not truth:
        return float(guess == truth)
    return 2 * shared(guess, truth) / (len(guess) + len(truth))


def _in_common(guess: list[str], truth: list[str]) -> int:
    return sum((collections.Counter(guess) & collections.Counter(truth)).values())


def _longest_run(guess: list[str], truth: list[str]) -> int:
    """Length of the longest list of neighbours that stands in both."""
    longest, before = 0, [0] * (len(truth) + 1)
    for word in guess:
        here = [0] * (len(truth) + 1)
        for j, other in enumerate(truth):
            if word == other:
                here[j + 1] = before[j] + 1
        longest, before = max(longest, *here), here
    return longest


def choose_words(answers: Iterable[Sequence[str]], words: Words = "auto") -> Words:
    """How answers are cut: "auto" is "characters" where at least half of their words are of a script without spaces."""
    if words not in get_args(Words):
        raise unknown("words", words, get_args(Words))
    if words != "auto":
        return words
    return "characters" if spaceless(text for several in answers for text in several) else "spaces"


def squad(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], no_answer: Sequence[float] | None = None, words: Words = "auto"
) -> dict[str, float]:
    """exact and f1 of answers (B,) to questions with any number of right answers each, in percent; `words` says how they are
    cut (`choose_words`).

    Where some questions have no answer (SQuAD 2.0) also answerable_exact, answerable_f1, unanswerable_exact and
    unanswerable_f1, over the questions of each kind (nan for a kind without any). With `no_answer`, a score a question that
    is higher the more it seems to have no answer, also best_exact, best_f1 and their thresholds best_exact_threshold,
    best_f1_threshold: the scores if all questions with no_answer > threshold were answered with nothing, at the best
    threshold; of equally good ones the lowest. The rules are the official script's (an answer of articles or punctuation
    alone counts as one here), but for questions of one score, which any threshold keeps together and the script parts.
    """
    return weighted_squad(words)(predictions, answers, no_answer)


def weighted_squad(words: Words = "auto") -> Weighted:
    """`squad` for resampling. Which names it gives is seen on the examples themselves, not on each resample."""

    def prepare(
        predictions: Sequence[str], answers: Sequence[Sequence[str]], no_answer: Sequence[float] | None = None
    ) -> Callable[[np.ndarray], Scores]:
        size = check_sizes(predictions, answers, no_answer)
        pairs = list(zip(predictions, answers, strict=True))
        cut = choose_words(answers, words)
        scores_of = {"exact": exact_match, "f1": word_f1}
        values = {name: np.array([score(*pair, cut) for pair in pairs]) for name, score in scores_of.items()}
        answerable_B = np.array([len(each) > 0 for each in answers])
        empty_B = np.array([not text for text in predictions])
        doubt_B = None if no_answer is None else check_numbers("no-answer scores", no_answer, (size,))

        def scores(weights_NB: np.ndarray) -> Scores:
            found = {name: 100 * (weights_NB @ value_B) / weights_NB.sum(1) for name, value_B in values.items()}
            if not answerable_B.all():
                for kind, kind_B in (("answerable", answerable_B), ("unanswerable", ~answerable_B)):
                    total_N = weights_NB @ kind_B
                    for name, value_B in values.items():
                        sum_N = weights_NB @ (value_B * kind_B)
                        found[f"{kind}_{name}"] = np.divide(
                            100 * sum_N, total_N, out=np.full(len(sum_N), np.nan), where=total_N > 0
                        )
            if doubt_B is not None:
                for name, value_B in values.items():
                    # What answering, not refusing, changes: a wrong answer to an unanswerable question loses its point.
                    gain_B = np.where(answerable_B, value_B, np.where(empty_B, 0.0, -1.0))
                    best_N, found[f"best_{name}_threshold"] = _best(weights_NB, gain_B, ~answerable_B, doubt_B)
                    found[f"best_{name}"] = 100 * best_N / weights_NB.sum(1)
            return found

        return scores

    return Weighted(prepare)


def _best(
    weights_NB: np.ndarray, gain_B: np.ndarray, unanswerable_B: np.ndarray, doubt_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The largest sum of scores over all thresholds, and the lowest threshold that reaches it, each (N,)."""
    order = np.argsort(doubt_B, kind="stable")
    levels_G, starts_G = np.unique(doubt_B[order], return_index=True)
    gains_NG = np.cumsum(np.add.reduceat(weights_NB[:, order] * gain_B[order], starts_G, axis=1), axis=1)
    refused_N = weights_NB @ unanswerable_B.astype(float)
    # Below every score all is refused. The script calls that threshold 0, which holds where scores are above it.
    below = min(0.0, float(np.nextafter(levels_G[0], -np.inf)))
    sums_NG = np.hstack([refused_N[:, None], refused_N[:, None] + gains_NG])
    chosen_N = np.round(sums_NG, 9).argmax(1)  # sums that differ by rounding are equal
    return sums_NG[np.arange(len(sums_NG)), chosen_N], np.append(below, levels_G)[chosen_N]
