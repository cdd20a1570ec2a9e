"""Questions to ask a model, and the grading of what it says.

    >>> questions = load_questions("arc-challenge", n=24)
    >>> q = questions.questions[0]
    >>> grade(q.kind, "(B) because ...", q.n_choices, q.choices) == q.gold

`datasets` names them and loads them; `olmo`, `gpqa` and `files` read one source each; `prompts`
words the message; `grading` reads the answer.
"""

from sst_interp.questions.datasets import Dataset, dataset, known_datasets, load_questions
from sst_interp.questions.item import Item, Kind, Question, QuestionSet, canonical_number, grade

__all__ = [
    "Dataset",
    "Item",
    "Kind",
    "Question",
    "QuestionSet",
    "canonical_number",
    "dataset",
    "grade",
    "known_datasets",
    "load_questions",
]
