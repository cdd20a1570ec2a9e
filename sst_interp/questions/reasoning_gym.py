"""Questions made by the package `reasoning-gym`: any of its tasks, with its own settings.

    reasoning-gym:chain_sum?min_terms=2&max_terms=3&seed=7&size=1000

The settings are the task's own; `seed` and `size` are settings of every task. Question k of a set is made
from `seed + k`: two sets share none if their seeds are further apart than the size of the first. (Of a task
that has few questions, both may still hold the same one.)

Where every answer is a number, replies are graded by number. Else the task's own scorer grades them, which is
right where it gives the full score; `scoring = "reasoning-gym"` has it grade numbers, too.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import parse_qsl

from sst_interp.errors import SSTError, unknown_name
from sst_interp.questions.datasets import Records, dataset
from sst_interp.questions.item import Item, Question, canonical_number, final_lines
from sst_interp.questions.scoring import Graded, scorer

NAME = "reasoning-gym"
SIZE = 1000
"""Questions of a set that does not say."""
EXAMPLE = f"{NAME}:chain_sum?min_terms=2&max_terms=3&seed=7"


@dataset(
    NAME, "questions made by rule, with a seed and a difficulty", "Apache-2.0", ("generated",),
    takes_path=True,
)  # fmt: skip
def read(split: str, path: str | None) -> Records:
    """The questions of a task; `path` is `TASK?SETTING=VALUE&...`.

    Raises:
        SSTError: the package is not installed, or there is no such task or setting.
    """
    del split
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise SSTError(f"{NAME} is not installed", 'pip install "sst-interp[reasoning]"') from None
    task, _, query = (path or "").partition("?")
    if task not in DATASETS:
        raise unknown_name(f"task of {NAME}", task, DATASETS)
    pairs = parse_qsl(query, keep_blank_values=True)
    settings: dict[str, Any] = {"size": SIZE, "seed": 0} | {key: _value(text) for key, text in pairs}
    try:
        entries = list(reasoning_gym.create_dataset(task, **settings))
    except Exception as error:  # whatever a task's own checks raise
        said = f"{NAME} cannot make {path!r:.200}: {type(error).__name__}: {error}"
        raise SSTError(said, f"for example {EXAMPLE}") from None
    numbers = all(canonical_number(str(entry["answer"])) is not None for entry in entries)
    items = [
        Item(
            f"{task}-{settings['seed']}-{number}", entry["question"].strip(), (), str(entry["answer"]),
            instruction="", scoring=None if numbers else NAME, entry=entry,
        )
        for number, entry in enumerate(entries)
    ]  # fmt: skip
    digest = hashlib.sha256("\x1e".join(f"{i.id}\x1f{i.text}\x1f{i.answer}" for i in items).encode())
    asked = " ".join([task, *(f"{key}={value}" for key, value in sorted(settings.items()))])
    return Records(items, digest.hexdigest(), f"{NAME}=={reasoning_gym.__version__} {asked}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@scorer(NAME)
def score(question: Question, reply: str) -> Graded:
    """By the task's own scorer: right is the full score. It is given the lines in which the reply answers.

    Raises:
        SSTError: the question is not of reasoning-gym.
    """
    if not isinstance(question.entry, dict) or "source_dataset" not in question.entry.get("metadata", {}):
        raise SSTError(f"question {question.id[:60]} is not of {NAME}", "leave scoring out")
    from reasoning_gym import get_score_answer_fn

    answer = final_lines(reply, 1 + question.gold.count("\n"))
    full: Any = get_score_answer_fn(question.entry["metadata"]["source_dataset"])
    return Graded(answer or None, bool(answer) and full(answer, question.entry) >= 1)
