"""One run: its config, what it learns from what, and the folder that it leaves."""

from jaxlm.experiment.config import ExperimentConfig, Unresolved, known_leaves, load_config
from jaxlm.experiment.run import Run
from jaxlm.experiment.seeds import train_seeds
from jaxlm.experiment.unread import check_row_flags

__all__ = ["ExperimentConfig", "Run", "Unresolved", "check_row_flags", "known_leaves", "load_config", "train_seeds"]
