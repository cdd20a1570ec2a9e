"""How an answer is graded: by what the model writes, or by the choice that it finds likeliest.

| scoring | the answer is |
| --- | --- |
| `letter`, `number`, `text` | read from the reply (`item.grade`); left out: a letter or a number |
| `likelihood` | the choice with the highest log-likelihood after `Question: ... Answer:` |
| `likelihood_per_character` | the same, divided by the characters of the choice |
| a name | what a scorer of that name says, here or in a plugin |

    @scorer("palindrome")
    def palindrome(question: Question, reply: str) -> Graded:
        word = reply.strip().lower()
        return Graded(word, word == word[::-1])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import NamedTuple

from sst_interp.errors import SSTError, unknown_name
from sst_interp.questions.item import LIKELIHOOD, Question, grade

BUILT_IN = ("letter", "number", "text", *LIKELIHOOD)


class Graded(NamedTuple):
    """What was answered, and whether it is right."""

    answer: str | None
    """As answers are compared between depths; None: there is none. It is stored with the run."""
    correct: bool


Scorer = Callable[[Question, str], Graded]
"""(question, the model's reply) -> its grade."""
_SCORERS: dict[str, Scorer] = {}


def scorer(name: str) -> Callable[[Scorer], Scorer]:
    """Register a function as the scorer of that name: `scoring = "NAME"` in a recipe.

    Raises:
        SSTError: the name is taken.
    """

    def register(score: Scorer) -> Scorer:
        known = _SCORERS.get(name)
        if name in BUILT_IN or (known is not None and known.__module__ != score.__module__):
            raise SSTError(f"two scorers are called {name!r}", "give one of them another name")
        _SCORERS[name] = score
        return score

    return register


def check_scoring(name: str | None) -> None:
    """Raise SSTError for the name of a scoring that does not exist."""
    if name is not None and name not in BUILT_IN and name not in _SCORERS:
        raise unknown_name("scoring", name, [*BUILT_IN, *_SCORERS])


def graded(question: Question, reply: str) -> Graded:
    """The grade of a reply.

    Raises:
        SSTError: a scorer of somebody's own fails or returns something else.
    """
    if question.scoring not in _SCORERS:
        answer = grade(question.kind, reply, question.n_choices, question.choices)
        return Graded(answer, answer == question.gold)
    where = f"scorer {question.scoring!r}, question {question.id[:60]}"
    try:
        answer, correct = _SCORERS[question.scoring](question, reply)
    except SSTError:
        raise
    except Exception as error:  # whatever a stranger's function raises; its message may quote the question
        raise SSTError(f"{where}: {type(error).__name__}", "mend the scorer") from None
    if not isinstance(answer, str | None):
        raise SSTError(f"{where}: the answer is a {type(answer).__name__}", "give a text, or None")
    return Graded(answer, bool(correct))


def choice_scores(question: Question, sums: Sequence[float]) -> list[float]:
    """What is compared, choice by choice: log-likelihoods in nats, or in nats per character."""
    per_character = question.scoring == "likelihood_per_character"
    pairs = zip(sums, question.choices, strict=True)
    return [value / (len(choice) if per_character else 1) for value, choice in pairs]


def grade_by_likelihood(question: Question, sums: Sequence[float]) -> tuple[Graded, float]:
    """The likeliest choice, and by how much the right one is likelier than the best wrong one.

    Args:
        sums: log-likelihood of each choice, nats.

    Returns:
        (grade, margin): nats, or nats per character where that is what is compared. Of two equally likely
        choices the first counts.
    """
    values = choice_scores(question, sums)
    right = ascii_uppercase.index(question.gold)
    margin = values[right] - max(value for i, value in enumerate(values) if i != right)
    answer = ascii_uppercase[values.index(max(values))]
    return Graded(answer, answer == question.gold), margin
