"""Exact match and F1 of extracted answers, by the rules of SQuAD's official scripts (1.1 and 2.0).

Rajpurkar et al. 2016, section 6.1; Rajpurkar, Jia & Liang 2018, section 5. Scores are percentages. Words are what spaces part,
so for languages written without spaces F1 is close to exact match. B questions · N weightings (resamples).
"""

import collections
import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import Scores, Weighted, check_numbers, check_sizes

declare(higher=[f"{part}{name}" for name in ("exact", "f1") for part in ("", "answerable_", "unanswerable_", "best_")])

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles (a, an, the), single spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after normalising; a question without answers expects an empty one."""
    return float(normalise(prediction) in _wanted(answers))


def word_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the words shared with one of the answers; an empty side scores 1 with an empty one, else 0."""
    return max(_f1(normalise(prediction).split(), answer.split()) for answer in _wanted(answers))


def _wanted(answers: Sequence[str]) -> list[str]:
    """The answers, normalised; one of which nothing is left counts only where there is no other: it means no answer."""
    return [text for answer in answers if (text := normalise(answer))] or [""]


def _f1(guess: list[str], truth: list[str]) -> float:
    if not guess or not truth:
        return float(guess == truth)
    shared = sum((collections.Counter(guess) & collections.Counter(truth)).values())
    return 2 * shared / (len(guess) + len(truth))


def squad(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], no_answer: Sequence[float] | None = None
) -> dict[str, float]:
    """exact and f1 of answers (B,) to questions with any number of right answers each, in percent.

    Where some questions have no answer (SQuAD 2.0) also answerable_exact, answerable_f1, unanswerable_exact and
    unanswerable_f1, over the questions of each kind (nan for a kind without any). With `no_answer`, a score a question that
    is higher the more it seems to have no answer, also best_exact, best_f1 and their thresholds best_exact_threshold,
    best_f1_threshold: the scores if all questions with no_answer > threshold were answered with nothing, at the best
    threshold; of equally good ones the lowest. The rules are the official script's (an answer of articles or punctuation
    alone counts as one here), but for questions of one score, which any threshold keeps together and the script parts.
    """
    return weighted_squad()(predictions, answers, no_answer)


def weighted_squad() -> Weighted:
    """`squad` for resampling. Which names it gives is seen on the examples themselves, not on each resample."""

    def prepare(
        predictions: Sequence[str], answers: Sequence[Sequence[str]], no_answer: Sequence[float] | None = None
    ) -> Callable[[np.ndarray], Scores]:
        size = check_sizes(predictions, answers, no_answer)
        pairs = list(zip(predictions, answers, strict=True))
        values = {"exact": np.array([exact_match(*pair) for pair in pairs]), "f1": np.array([word_f1(*pair) for pair in pairs])}
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
