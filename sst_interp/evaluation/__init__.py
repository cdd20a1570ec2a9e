"""What a checkpoint can do, by iteration depth: language-model loss and accuracy, question by question."""

from sst_interp.evaluation.accuracy import answers, letters
from sst_interp.evaluation.losses import answer_losses
from sst_interp.evaluation.named import evaluate_by_name, evaluation_folder
from sst_interp.evaluation.tasks import TASKS, Task, evaluate, read_evaluation

__all__ = [
    "TASKS",
    "Task",
    "answer_losses",
    "answers",
    "evaluate",
    "evaluate_by_name",
    "evaluation_folder",
    "letters",
    "read_evaluation",
]
