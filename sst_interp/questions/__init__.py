"""Questions to ask a model, and the grading of what it says.

    >>> questions = load_questions("arc-challenge", n=24)
    >>> q = questions.questions[0]
    >>> grade(q.kind, "(B) because ...", q.n_choices, q.choices) == q.gold

`datasets` names them and loads them; `olmo`, `gpqa` and `reasoning_gym` read one source each; `item` words
the message and reads the answer; `scoring` says how an answer is graded.
"""

from sst_interp.questions.datasets import Dataset, dataset, known_datasets, load_questions
from sst_interp.questions.item import Item, Kind, Question, QuestionSet, canonical_number, grade
from sst_interp.questions.scoring import Graded, graded, scorer

__all__ = [
    "Dataset",
    "Graded",
    "Item",
    "Kind",
    "Question",
    "QuestionSet",
    "canonical_number",
    "dataset",
    "grade",
    "graded",
    "known_datasets",
    "load_questions",
    "scorer",
]
