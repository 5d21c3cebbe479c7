"""Evaluation by the suites of lm-evaluation-harness; `adapter` (extra `eval`) lets that library drive our models."""

from jaxlm.harness.files import Read, read_pages, read_questions
from jaxlm.harness.likelihood import Likelihood, Scorer
from jaxlm.harness.scores import Result, answer, read_through, write
from jaxlm.harness.suites import SUITES, Question, Suite, detokenised

__all__ = [
    "SUITES", "Likelihood", "Question", "Read", "Result", "Scorer", "Suite", "answer", "detokenised", "read_pages",
    "read_questions", "read_through", "write",
]  # fmt: skip
