"""Tasks over labelled rows: features, objectives, predictions, scores."""

from jaxlm.tasks.baseline import NAME as BASELINE
from jaxlm.tasks.baseline import words_alone
from jaxlm.tasks.comparing import Embedding, Preference, Reward
from jaxlm.tasks.labelling import Classification, Multilabel, Regression, Tagging
from jaxlm.tasks.page import paired_scores, paired_tests, write_predictions
from jaxlm.tasks.predictor import Passed, Predictor
from jaxlm.tasks.reading import ExtractiveQa, MultipleChoice
from jaxlm.tasks.task import PRETRAINING, Examples, Prediction, Row, Task, TaskConfig, label_order, usable
from jaxlm.tasks.writing import ChatTask, TextToText

TASKS: dict[str, type[Task]] = {
    "classification": Classification, "multilabel": Multilabel, "regression": Regression, "tagging": Tagging,
    "extractive_qa": ExtractiveQa, "multiple_choice": MultipleChoice, "text_to_text": TextToText, "chat": ChatTask,
    "embedding": Embedding, "preference": Preference, "reward": Reward,
}  # fmt: skip

__all__ = [
    "BASELINE", "PRETRAINING", "TASKS", "Examples", "Passed", "Prediction", "Predictor", "Row", "Task", "TaskConfig",
    "label_order", "paired_scores", "paired_tests", "usable", "words_alone", "write_predictions",
]  # fmt: skip
