"""Training: objectives, ways to tune, the optimiser, the pure step, checkpoints and the loop."""

from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.loop import BestScore, Outcome, TrainConfig, Work, fit
from jaxlm.train.objectives import Objective
from jaxlm.train.optim import GroupConfig, OptimConfig, make_optimizer, make_schedule
from jaxlm.train.step import (
    TrainState,
    init_frozen,
    init_state,
    make_eval_step,
    make_train_step,
    state_shapes,
    state_shardings,
)
from jaxlm.train.tune import LoraConfig, TuneConfig, Tuning

__all__ = [
    "BestScore", "Checkpoints", "GroupConfig", "LoraConfig", "Objective", "OptimConfig", "Outcome", "TrainConfig", "TrainState",
    "TuneConfig", "Tuning", "Work", "fit", "init_frozen", "init_state", "make_eval_step", "make_optimizer", "make_schedule",
    "make_train_step", "state_shapes", "state_shardings",
]  # fmt: skip
