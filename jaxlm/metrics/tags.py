"""Scores of tagged spans (named entities, chunks), by the rules of CoNLL's `conlleval`.

A tag is `O` or one of B (begin), I (inside), E or L (end, last), S or U (single, unit) with a type: `B-PER`. IOB1,
IOB2, BIOES and BILOU are read alike, and leniently: a token continues the span before it if it is I or E, the token
before is B or I, and the types agree; any other token but O begins a span. So I-PER after O begins one, and so does
I-PER after I-LOC (Tjong Kim Sang & De Meulder 2003, section 2; `seqeval` calls this its default mode).
A span counts as found if its type, first and last token are right. B sentences · T types.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.metrics.classes import PerClass, over, precision_recall_f1
from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import Scores, Weighted, check_sizes

declare(higher=("precision", "recall", "f1", "f1_macro", "accuracy"))

Tags = Sequence[Sequence[str]]


class Span(NamedTuple):
    """A span of tokens `start` to `stop` − 1."""

    type: str
    start: int
    stop: int


_BILOU = {"L": "E", "U": "S"}


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The spans of one sentence, in order; a tag without a type has the type `_`."""
    found: list[Span] = []
    prefix_before, type_before = "O", ""
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        prefix = _BILOU.get(prefix, prefix)
        if prefix not in ("O", "B", "I", "E", "S") or (prefix == "O" and kind):
            raise ValueError(f"unknown tag {tag!r}: expected O, or one of B-, I-, E-, S-, L-, U- with a type")
        kind = kind or "_"
        if prefix in ("I", "E") and prefix_before in ("B", "I") and kind == type_before:
            found[-1] = found[-1]._replace(stop=i + 1)
        elif prefix != "O":
            found.append(Span(kind, i, i + 1))
        prefix_before, type_before = prefix, kind
    return found


def spans(predicted_tags: Tags, actual_tags: Tags) -> dict[str, float]:
    """precision, recall and f1 over all spans, and f1_macro, the mean over the types that occur on either side.

    A quotient whose denominator is 0 is 0, so a text without any span scores 0, as in `conlleval`. Also accuracy: the share
    of tokens whose tag is the same.
    """
    return weighted_spans()(predicted_tags, actual_tags)


def span_scores(predicted_tags: Tags, actual_tags: Tags) -> dict[str, PerClass]:
    """Type → its precision, recall, F1 (0 where undefined) and how many there are, in alphabetical order."""
    types, counts_B3T, _ = _counted(predicted_tags, actual_tags)
    sums_3T = counts_B3T.sum(0)
    each = precision_recall_f1(*sums_3T)
    columns = (each["precision"], each["recall"], each["f1"], sums_3T[2])
    return {kind: PerClass(float(p), float(r), float(f), int(n)) for kind, p, r, f, n in zip(types, *columns, strict=True)}


def weighted_spans() -> Weighted:
    """`spans` for resampling: the examples are sentences."""

    def prepare(predicted_tags: Tags, actual_tags: Tags) -> Callable[[np.ndarray], Scores]:
        _, counts_B3T, tokens_B2 = _counted(predicted_tags, actual_tags)
        rows_BS = np.hstack([counts_B3T.reshape(len(counts_B3T), -1), tokens_B2]).astype(float)

        def scores(weights_NB: np.ndarray) -> Scores:
            sums_NS = weights_NB @ rows_BS
            hits_NT, guesses_NT, truths_NT = np.split(sums_NS[:, :-2], 3, axis=1)
            all_types = (x_NT.sum(1, keepdims=True) for x_NT in (hits_NT, guesses_NT, truths_NT))
            found = {name: x_N1[:, 0] for name, x_N1 in precision_recall_f1(*all_types).items()}
            f1_NT = precision_recall_f1(hits_NT, guesses_NT, truths_NT)["f1"]
            found["f1_macro"] = over(f1_NT.sum(1), (guesses_NT + truths_NT > 0).sum(1))
            return found | {"accuracy": over(sums_NS[:, -2], sums_NS[:, -1])}

        return scores

    return Weighted(prepare)


def _counted(predicted_tags: Tags, actual_tags: Tags) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Types, counts_B3T (spans of the type that are found, predicted, actual), and of tokens (right, all) as (B, 2)."""
    check_sizes(predicted_tags, actual_tags)
    pairs = []
    for i, (guess, truth) in enumerate(zip(predicted_tags, actual_tags, strict=True)):
        if len(guess) != len(truth):
            raise ValueError(f"sentence {i} has {len(guess)} predicted tags for {len(truth)} tokens")
        pairs.append((set(spans_of(guess)), set(spans_of(truth))))
    types = sorted({span.type for pair in pairs for side in pair for span in side})
    place = {kind: t for t, kind in enumerate(types)}
    counts_B3T = np.zeros((len(pairs), 3, len(types)), int)
    for row_3T, (found, real) in zip(counts_B3T, pairs, strict=True):
        for counts_T, some in zip(row_3T, (found & real, found, real), strict=True):
            for span in some:
                counts_T[place[span.type]] += 1
    tokens = [
        (sum(a == b for a, b in zip(guess, truth, strict=True)), len(truth))
        for guess, truth in zip(predicted_tags, actual_tags, strict=True)
    ]
    return types, counts_B3T, np.array(tokens)
