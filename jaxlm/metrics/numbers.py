"""Scores of predicted numbers and likelihoods: regression, perplexity."""

import warnings
from typing import Any

import numpy as np

from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import check_numbers, check_sizes

declare(higher=("pearson", "spearman"), lower=("mse", "mae", "bits_per_byte"))
declare(lower=[f"{unit}perplexity" for unit in ("", "token_", "word_", "byte_")])


def regression(predicted: Any, actual: Any) -> dict[str, float]:
    """mse, mae, pearson and spearman of numbers (B,); a correlation is nan for fewer than two examples or a constant side.

    Spearman's is the correlation of mid-ranks (ties share their mean rank).
    """
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    check_sizes(predicted, actual)
    predicted_B, actual_B = check_numbers("predictions", predicted), check_numbers("references", actual)
    return {
        "mse": float(mean_squared_error(actual_B, predicted_B)),
        "mae": float(mean_absolute_error(actual_B, predicted_B)),
        **correlations(predicted_B, actual_B),
    }


def correlations(one_B: np.ndarray, other_B: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation, nan where one side is constant."""
    from scipy.stats import pearsonr, rankdata

    def of(one: np.ndarray, other: np.ndarray) -> float:
        if not (np.ptp(one) > 0 and np.ptp(other) > 0):
            return np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a nearly constant side makes the figure inexact
            return float(pearsonr(one, other).statistic)

    return {"pearson": of(one_B, other_B), "spearman": of(rankdata(one_B), rankdata(other_B))}


def perplexity(nll: Any, tokens: Any, words: Any, bytes: Any) -> dict[str, float]:
    """Perplexity by token, word and byte, and bits per byte, of text with this negative log-likelihood in nats.

    Arguments are sums over the text, or arrays with one entry a document, which are added up. Words and bytes are those of
    the text itself: exp(nll / words) and exp(nll / bytes) are comparable between tokenizers, exp(nll / tokens) is not.
    A unit that the text has none of gives nan; a perplexity too large for a float is infinite.
    """
    given = {"nll": nll, "tokens": tokens, "words": words, "bytes": bytes}
    columns = [check_numbers(name, np.ravel(values)) for name, values in given.items()]
    check_sizes(*columns)
    total, *counts = (float(column.sum()) for column in columns)
    if counts[0] <= 0:
        raise ValueError("no predictions to score")
    nats = [total / count if count > 0 else np.nan for count in counts]
    with np.errstate(over="ignore"):
        by_token, by_word, by_byte = (float(np.exp(each)) for each in nats)
    return {
        "token_perplexity": by_token,
        "word_perplexity": by_word,
        "byte_perplexity": by_byte,
        "bits_per_byte": float(nats[2] / np.log(2)),
    }
