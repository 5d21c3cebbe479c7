"""What predictions are worth, and how sure that is.

A metric takes predictions and references and gives a flat dict of numbers; ValueError where there is nothing to score. Its
interval is `bootstrap(metric, …)`. Metrics that would be slow to call a thousand times have a `weighted_` form for that,
with the same names and values.
"""

from jaxlm.metrics.answers import choose_words, squad, weighted_squad
from jaxlm.metrics.classes import (
    PerClass,
    averages,
    class_scores,
    classification,
    confusion,
    multilabel,
    multilabel_scores,
    weighted_classification,
    weighted_multilabel,
)
from jaxlm.metrics.confidence import Bin, Scaling, calibration, fit_temperature, reliability, scaled, softmax, weighted_calibration
from jaxlm.metrics.direction import declare, lower_is_better
from jaxlm.metrics.intervals import (
    Interval,
    Paired,
    Weighted,
    approximate_randomisation,
    averaged,
    bootstrap,
    mcnemar,
    mean_interval,
    paired,
)
from jaxlm.metrics.numbers import perplexity, regression
from jaxlm.metrics.ranking import preference, retrieval, weighted_pair_retrieval, weighted_retrieval
from jaxlm.metrics.tags import Span, span_scores, spans, spans_of, weighted_spans
from jaxlm.metrics.texts import (
    Scored,
    choose_tokenizer,
    summarisation,
    translation,
    weighted_summarisation,
    weighted_translation,
)

__all__ = [
    "Bin", "Interval", "Paired", "PerClass", "Scaling", "Scored", "Span", "Weighted", "approximate_randomisation",
    "averaged", "averages", "bootstrap", "calibration", "choose_tokenizer", "choose_words", "class_scores", "classification",
    "confusion", "declare", "fit_temperature", "lower_is_better", "mcnemar", "mean_interval", "multilabel",
    "multilabel_scores", "paired", "perplexity", "preference", "regression", "reliability", "retrieval", "scaled", "softmax",
    "span_scores", "spans", "spans_of", "squad", "summarisation", "translation", "weighted_calibration",
    "weighted_classification", "weighted_multilabel", "weighted_pair_retrieval", "weighted_retrieval", "weighted_spans",
    "weighted_squad", "weighted_summarisation", "weighted_translation",
]  # fmt: skip
