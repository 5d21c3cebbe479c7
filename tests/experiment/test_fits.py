"""A mesh on which an option would do nothing, or on which devices would stand idle, is refused in one line that names it."""

import dataclasses

import pytest

from jaxlm.data import DataConfig
from jaxlm.experiment.config import ExperimentConfig, ModelConfig, check_fits
from jaxlm.parallel import ParallelConfig, abstract_mesh
from jaxlm.train import TrainConfig

SIZES = {"vocab_size": 64, "positions": 32, "layers": 4, "width": 32, "heads": 4, "mlp_width": 64}


def check(stage=1, data=1, batch_size=8, accumulate=1, **model):
    config = ExperimentConfig(
        model=ModelConfig(**SIZES | model),
        data=DataConfig(length=32, batch_size=batch_size),
        train=TrainConfig(accumulate=accumulate),
    )
    check_fits(config, config.model.plain(), abstract_mesh(ParallelConfig(data=data, stage=stage)))


@pytest.mark.parametrize(
    "options",
    [
        {}, {"stage": 4}, {"stage": 2, "microbatches": 8}, {"stage": 2, "rounds": 2}, {"stage": 2, "layers": 3},
        {"stage": 2, "microbatches": 4, "accumulate": 2}, {"stage": 2, "data": 4}, {"stage": 2, "data": 2, "microbatches": 4},
    ],
)  # fmt: skip
def test_what_fits_is_let_through(options):
    check(**options)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"stage": 2, "share_layers": True}, ["parallel.stage 2", "model.share_layers"]),
        ({"stage": 8}, ["parallel.stage 8", "4 layer(s) of the decoder"]),
        ({"stage": 4, "rounds": 2}, ["model.rounds 2", "4 layer(s)"]),
        ({"stage": 2, "microbatches": 3}, ["model.microbatches 3", "8 row(s)", "1, 2, 4, 8"]),
        ({"stage": 2, "microbatches": 8, "accumulate": 2}, ["model.microbatches 8", "4 row(s)"]),
        ({"stage": 2, "data": 4, "microbatches": 4}, ["model.microbatches 4", "8 row(s)", "on 4 devices", "one of 1, 2"]),
        ({"stage": 4, "batch_size": 6}, ["parallel.stage 4", "6 row(s)", "1, 2, 3, 6"]),
        ({"stage": 2, "microbatches": 1, "rounds": 2}, ["model.microbatches 1", "model.rounds 2", "2, 4, 8"]),
        ({"microbatches": 4}, ["model.microbatches 4", "parallel.stage above 1"]),
        ({"rounds": 2}, ["model.rounds 2", "parallel.stage above 1"]),
    ],
)
def test_what_would_do_nothing_is_refused(options, parts):
    with pytest.raises(ValueError) as caught:
        check(**options)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_the_shallower_stack_of_two_decides():
    config = ExperimentConfig(
        model=ModelConfig(**SIZES, architecture="encoder_decoder", decoder_layers=2), data=DataConfig(length=32),
        task=dataclasses.replace(ExperimentConfig().task, kind="span"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"parallel\.stage 4 .* 2 layer\(s\) of the decoder"):
        check_fits(config, config.model.plain(), abstract_mesh(ParallelConfig(data=1, stage=4)))
