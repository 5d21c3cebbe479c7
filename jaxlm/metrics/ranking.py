"""Scores of embeddings and of preferences: retrieval, which of two answers is better.

B pairs · Q queries · D documents · K ranks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.metrics.direction import declare
from jaxlm.metrics.intervals import Weighted, averaged, check_numbers, check_sizes

declare(higher=("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10", "accuracy", "margin"))


def retrieval(scores_QD: Any, relevant_QD: Any, recalls: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """recall@k, mrr@10 and ndcg@10 of documents ranked by score, averaged over queries.

    `relevant_QD`: 0 for a document that does not answer the query, else its gain (1, or grades). recall@k: relevant documents
    among the first k, over all relevant ones. mrr@10: 1 / rank of the first relevant one, 0 after rank 10. ndcg@10: Σ gain /
    log2(rank + 1) over that of the best order (Järvelin & Kekäläinen 2002, in the form of trec_eval). Of documents with the
    same score those of lower gain stand first: a tie counts against the system, and the order of documents changes nothing.
    """
    return weighted_retrieval(recalls)(scores_QD, relevant_QD)


def weighted_retrieval(recalls: Sequence[int] = (1, 5, 10)) -> Weighted:
    """`retrieval` for resampling: the examples are queries."""

    def values(scores_QD: Any, relevant_QD: Any) -> dict[str, np.ndarray]:
        check_sizes(scores_QD, relevant_QD)
        table_QD = check_numbers("scores", scores_QD, (None, None))
        gain_QD = check_numbers("relevant", relevant_QD, table_QD.shape)
        if gain_QD.min(initial=0) < 0:
            raise ValueError(f"relevant holds {gain_QD.min():g}: expected 0, or a gain above 0")
        if not (answered_Q := (gain_QD > 0).any(1)).all():
            raise ValueError(f"query {int(np.argmin(answered_Q))} has no relevant document")
        order_QD = np.lexsort((gain_QD, -table_QD), axis=1)
        ranked_QD, best_QD = np.take_along_axis(gain_QD, order_QD, 1), -np.sort(-gain_QD, 1)
        hit_QD = ranked_QD > 0
        found = {f"recall@{k}": hit_QD[:, :k].sum(1) / hit_QD.sum(1) for k in recalls}
        ranks_K = np.arange(1, min(10, hit_QD.shape[1]) + 1)
        found["mrr@10"] = (hit_QD[:, : len(ranks_K)] / ranks_K).max(1)
        dcg_Q, ideal_Q = (each[:, : len(ranks_K)] @ (1 / np.log2(ranks_K + 1)) for each in (ranked_QD, best_QD))
        return found | {"ndcg@10": dcg_Q / ideal_Q}

    return averaged(values)


def weighted_pair_retrieval(recalls: Sequence[int] = (1, 5, 10), block_bytes: int = 64 << 20) -> Weighted:
    """`retrieval` of vectors where every query has one relevant document, for resampling: the examples are queries.

    Takes queries_QX and their documents_QX (vectors, scored by their products), and names_Q, which are equal for queries of
    the same document; each document counts once, with the vector of its first query. The products are computed for as many
    queries at a time as fit into `block_bytes`, and of each only the rank is kept.
    """

    def values(queries_QX: Any, documents_QX: Any, names_Q: Any) -> dict[str, np.ndarray]:
        size = check_sizes(queries_QX, documents_QX, names_Q)
        one_QX, pair_QX = (
            check_numbers(name, x, (None, None)) for name, x in (("queries", queries_QX), ("documents", documents_QX))
        )
        _, first_D, own_Q = np.unique(np.asarray(names_Q), return_index=True, return_inverse=True)
        other_DX = pair_QX[first_D]
        rank_Q = np.empty(size, np.int64)
        step = max(1, block_bytes // (other_DX.itemsize * len(other_DX)))
        for start in range(0, size, step):
            scores_qD = one_QX[start : start + step] @ other_DX.T
            own_q1 = np.take_along_axis(scores_qD, own_Q[start : start + step, None], axis=1)
            rank_Q[start : start + step] = (scores_qD >= own_q1).sum(1)  # a tie counts against the system
        found = {f"recall@{k}": rank_Q <= k for k in recalls}
        found["mrr@10"] = np.where(rank_Q <= 10, 1 / rank_Q, 0.0)
        return found | {"ndcg@10": np.where(rank_Q <= 10, 1 / np.log2(rank_Q + 1), 0.0)}

    return averaged(values)


def preference(chosen_B: Any, rejected_B: Any) -> dict[str, float]:
    """accuracy: how often the chosen answer has the higher score, a tie for half; margin: mean of chosen − rejected."""
    check_sizes(chosen_B, rejected_B)
    margin_B = check_numbers("scores", chosen_B) - check_numbers("scores", rejected_B)
    return {"accuracy": float(np.mean((1 + np.sign(margin_B)) / 2)), "margin": float(margin_B.mean())}
