"""A model that has learned nothing, on the real sets: at chance, but for what the lengths of the choices give away."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.harness import SUITES, Scorer, answer, read_questions
from jaxlm.model import Model, TransformerConfig

FILES = {
    "copa": "mc-openbookqa-copa-winogrande/copa.jsonl", "openbookqa": "mc-openbookqa-copa-winogrande/openbook_qa.jsonl",
    "winogrande": "mc-openbookqa-copa-winogrande/winogrande.jsonl", "hellaswag": "mc-hellaswag-val/hellaswag_val_1000.txt",
}  # fmt: skip


def by_length(read, sign: int) -> float:
    """The accuracy of taking the choice with the fewest (sign 1) or the most (-1) tokens, here bytes; a tie counts in part."""
    found = []
    for question in read.questions:
        sizes = sign * np.array([len(continuation.encode()) for _, continuation in question.pairs])
        taken = sizes == sizes.min()
        found.append(taken[question.gold] / taken.sum())
    return float(np.mean(found))


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("name", FILES)
def test_a_random_model_lies_at_chance(name, tiny, data):
    """Fresh parameters give each byte nearly the same probability. So the sum of n + 1 logarithms (a space stands before the
    choice) is largest for the shortest choice, and divided by n for the longest. In OpenBookQA right answers are the longer
    ones: there a random model is not at chance, but below it by the sum and above it by the mean, just as lengths say."""
    options = {**dataclasses.asdict(tiny.model.config), "positions": 512, "init_std": 0.02}
    model = Model(configs.build(TransformerConfig, {**options, "preset": None}))
    fresh = dataclasses.replace(tiny, model=model, params=model.init(jax.random.key(0)))
    read = read_questions(SUITES[name], str(data / FILES[name]), 300 if name == "hellaswag" else None)
    result = answer(SUITES[name], read, Scorer(fresh, batch_size=64))
    for score, sign in (("acc", 1), ("acc_norm", -1)):
        if score not in result.scores:
            continue
        found, expected = result.scores[score], by_length(read, sign) if name == "openbookqa" else result.chance
        assert found.low <= expected <= found.high, (score, found, expected)
        if name == "openbookqa":
            assert not found.low <= result.chance <= found.high, "or else lengths give nothing away"
