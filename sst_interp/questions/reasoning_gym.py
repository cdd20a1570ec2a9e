"""Questions made by the package `reasoning-gym`: any of its tasks, with its own settings.

    reasoning-gym:chain_sum?min_terms=2&max_terms=3&seed=7&size=1000

The settings are the task's own; `seed` and `size` are settings of every task. Question k of a set is made
from `seed + k`: two sets share none if their seeds are further apart than the size of the first. (Of a task
that has few questions, both may still hold the same one.)
"""

from __future__ import annotations

import hashlib
import json
from typing import Any
from urllib.parse import parse_qsl

from sst_interp.errors import SSTError, unknown_name
from sst_interp.questions.datasets import Records, dataset
from sst_interp.questions.item import Item

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
    items = [
        Item(
            f"{task}-{settings['seed']}-{number}", entry["question"].strip(), (), str(entry["answer"]),
            instruction="",
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
