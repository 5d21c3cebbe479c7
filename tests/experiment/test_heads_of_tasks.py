"""What is trained from a preset can be exported: the head of each task is one that a Hugging Face family has."""

import dataclasses

import pytest

from jaxlm import config as configs
from jaxlm.experiment.config import ExperimentConfig, complete
from jaxlm.hub import family_for

LABELS = ("classification", "multilabel", "regression", "reward", "tagging", "embedding")
OF_ENCODERS = (*LABELS, "extractive_qa", "multiple_choice", "masked")


@pytest.mark.parametrize(
    "preset, kind, family",
    [
        *(("bert-tiny", kind, "bert") for kind in OF_ENCODERS), ("bert-tiny", "replaced", "electra"),
        *(("gpt2-small", kind, "gpt2") for kind in (*LABELS, "causal")),
    ],
)  # fmt: skip
def test_a_model_of_a_preset_has_a_family_with_the_head_of_every_task(preset, kind, family):
    flags = {"task.kind": kind, "model.preset": preset, **({"data.train": "x.csv"} if kind in OF_ENCODERS[:-1] else {})}
    config = configs.load(ExperimentConfig, None, {name: configs.Text(value) for name, value in flags.items()}, complete).value
    model = dataclasses.replace(config.model.plain(), vocab_size=100)
    assert family_for(model)[0].name == family
