"""Suites scored: accuracies of questions and perplexities of texts with intervals, and the files that keep them.

B questions or texts.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.harness.files import Read
from jaxlm.harness.likelihood import Likelihood, Scorer
from jaxlm.harness.suites import Question, Suite, detokenised
from jaxlm.metrics import Interval, averaged, bootstrap, perplexity
from jaxlm.text_files import write_json_lines


class Result(NamedTuple):
    """Scores with their intervals over the rows, and a line for each row."""

    scores: Mapping[str, Interval]
    chance: float | None
    """The accuracy of choosing blindly."""
    samples: list[dict[str, Any]]


def answer(suite: Suite, read: Read, scorer: Scorer) -> Result:
    """The questions of a suite."""
    given = [pair for question in read.questions for pair in question.pairs]
    found = iter(scorer.continuations(given))
    likelihoods = [list(itertools.islice(found, len(question.pairs))) for question in read.questions]
    chosen = [choices(question, each) for question, each in zip(read.questions, likelihoods, strict=True)]
    golds = [question.gold for question in read.questions]

    def right(chosen: Sequence[Mapping[str, int]], golds: Sequence[int]) -> dict[str, np.ndarray]:
        return {name: np.array([one[name] == gold for one, gold in zip(chosen, golds, strict=True)]) for name in suite.scores}

    samples = [
        {"place": place, "pairs": question.pairs, "gold": question.gold, "logprobs": [one.logprob for one in each],
         "greedy": [one.greedy for one in each], "chosen": {name: one[name] for name in suite.scores}}
        for place, question, each, one in zip(read.places, read.questions, likelihoods, chosen, strict=True)
    ]  # fmt: skip
    chance = float(np.mean([1 / len(question.pairs) for question in read.questions]))
    return Result(bootstrap(averaged(right), chosen, golds), chance, samples)


def choices(question: Question, likelihoods: Sequence[Likelihood]) -> dict[str, int]:
    """The likeliest choice: by log-probability, by that for each character of the choice, and for each byte.

    The harness divides `acc_norm` by characters and `acc_bytes` by bytes of UTF-8, both without the space before the choice.
    """
    logprobs = np.array([one.logprob for one in likelihoods])
    characters, size = ([len(text) for text in texts] for texts in (question.choices, [c.encode() for c in question.choices]))
    named = {"acc": logprobs, "acc_norm": logprobs / characters, "acc_bytes": logprobs / size}
    return {name: int(np.argmax(scores)) for name, scores in named.items()}


def read_through(suite: Suite, pages: Sequence[str], scorer: Scorer) -> Result:
    """Whole texts. Words and bytes are those of the page as it was given."""
    found = scorer.texts([detokenised(page) for page in pages])
    samples = [
        {"page": page[:80], "logprob": logprob, "tokens": tokens, "words": len(re.split(r"\s+", page)), "bytes": len(page.encode())}
        for page, (logprob, tokens) in zip(pages, found, strict=True)
    ]
    columns = [np.array([sample[name] for sample in samples], float) for name in ("logprob", "tokens", "words", "bytes")]

    def statistic(logprob_B: np.ndarray, *counts: np.ndarray) -> dict[str, float]:
        found = perplexity(-logprob_B, *counts)
        return {name: found[name] for name in suite.scores}

    return Result(bootstrap(statistic, *columns), None, samples)


def write(folder: pathlib.Path, result: Result, about: Mapping[str, Any]) -> None:
    """`scores.json` and `samples.jsonl` in a folder; `about` says what was scored and how."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {name: interval._asdict() for name, interval in result.scores.items()}
    whole = {**about, "chance": result.chance, "scores": scores}
    (folder / "scores.json").write_text(json.dumps(whole, indent=2, ensure_ascii=False), encoding="utf8")
    write_json_lines(folder / "samples.jsonl", result.samples)
