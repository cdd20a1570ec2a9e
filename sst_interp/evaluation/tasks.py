"""The evaluation of a checkpoint: its tasks, run one (task, depth) at a time and kept as they finish.

FOLDER/TASK-dDEPTH.parquet    a row per question: question, value, weight
FOLDER/model.json             whose measurements they are: of no other model's are they ever reported

`value` is the summed loss of an answer (nats) and `weight` its tokens; or whether the answer is right, and 1.
The score of a task is sum(value) / sum(weight); whoever reports one resamples questions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from sst_interp.choices import TRAINED, whole
from sst_interp.durable import publish, replace_json, stage
from sst_interp.errors import SSTError, unknown_name
from sst_interp.evaluation.accuracy import answers, letters
from sst_interp.evaluation.losses import answer_losses
from sst_interp.generation import check_iterations
from sst_interp.guarded import read_json, read_table
from sst_interp.model import StateStreamModel
from sst_interp.questions import load_questions
from sst_interp.questions.registry import load_items
from sst_interp.training.examples import Example, encode


@dataclass(frozen=True)
class Task:
    """One thing that is measured."""

    kind: Literal["loss", "written", "letter"]
    """`loss` of the worked answer (nats per token); `written`: an answer is written greedily and graded;
    `letter`: the letter with the highest logit is the answer."""
    dataset: str
    split: str
    questions: int
    """At most this many, from the first."""
    max_new_tokens: int = 1


TASKS: dict[str, Task] = {
    "gsm8k-loss": Task("loss", "gsm8k", "test", 128),
    "gsm8k": Task("written", "gsm8k", "test", 200, 192),
    "arc-easy": Task("letter", "arc-easy", "validation", 570),
    "arc-challenge": Task("letter", "arc-challenge", "validation", 299),
}
COLUMNS = ("question", "value", "weight")
OTHER = "delete the folder, or give another --out"
AGAIN = "delete it: only that part is measured again"
EVALUATION, MODEL = "evaluation", "model.json"
"""The folder beside a checkpoint, and the file in it that says whose measurements they are."""
HELD_OUT, HELD_OUT_QUESTIONS = "held-out-loss", 128
"""Loss on a training's held-out examples: there only if they are given, for it needs the training data."""


def evaluate(
    model: StateStreamModel,
    folder: str | Path,
    depths: Sequence[int] = (1, 2, 3, 4),
    tasks: Sequence[str] = tuple(TASKS),
    held_out: Sequence[Example] = (),
    questions: int | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
    held_out_id: str | None = None,
) -> pd.DataFrame:
    """Measure `model` at every depth; what the folder already holds is not measured again.

    A model whose blend is zero does the same at every depth: it is measured at depth 1 only.

    Args:
        model: the model.
        folder: where the measurements are kept: one folder per model, which is checked.
        depths: iteration depths.
        tasks: names of `TASKS`.
        held_out: examples for the task `held-out-loss`.
        questions: fewer questions per task than its own number.
        progress: called with (task and depth, questions done, questions in all).
        held_out_id: which examples `held_out` are (`identity`); None takes their ids and tokens.

    Returns:
        A row per (task, depth, question): task, depth, question, value, weight.

    Raises:
        SSTError: an unknown task, depths or a number of questions that are not whole numbers from 1, or a
            folder with another model's measurements.
    """
    if model.kind.off:
        depths = [1]
    wanted = [*tasks, *([HELD_OUT] if held_out else [])]
    if held_out and held_out_id is None:
        tokens = hashlib.sha256(repr([example.tokens for example in held_out]).encode()).hexdigest()
        held_out_id = identity(HELD_OUT, [example.id for example in held_out], tokens)
    todo = missing(Path(folder), wanted, depths, questions, held_out_id)
    refuse_other_model(Path(folder), model)
    for name, at, n in todo:
        label = f"{name} at depth {', '.join(map(str, at))}"
        total = min(n, len(held_out)) if name == HELD_OUT else n
        note = (lambda done, label=label, n=total: progress(label, done, n)) if progress else None
        for depth, rows in _measure(model, name, at, n, held_out, note).items():
            path = Path(folder) / f"{name}-d{depth}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.attrs["asked"] = n  # a dataset may have fewer
            rows.attrs["task"] = held_out_id if name == HELD_OUT else identity(name)
            stage(path, rows.to_parquet)
            publish(path)
    return read_evaluation(folder)


def missing(
    folder: Path,
    tasks: Sequence[str],
    depths: Sequence[int],
    questions: int | None = None,
    held_out_id: str | None = None,
) -> list[tuple[str, list[int], int]]:
    """What is still to be measured: (task, depths together, questions). A loss is measured depth by depth.

    Raises:
        SSTError: an unknown task, or depths or a number of questions that are not whole numbers from 1.
    """
    for name in tasks:
        if name not in TASKS and name != HELD_OUT:
            raise unknown_name("task", name, [*TASKS, HELD_OUT])
    check_depths(depths)
    most = 10**9 if questions is None else whole("questions", questions, 1)
    todo: list[tuple[str, list[int], int]] = []
    for name in tasks:
        n = min(TASKS[name].questions if name in TASKS else HELD_OUT_QUESTIONS, most)
        asks = held_out_id if name == HELD_OUT else identity(name)
        at = [depth for depth in sorted(depths) if not _measured(folder, name, depth, n, asks)]
        if name in TASKS and TASKS[name].kind != "loss":
            todo += [(name, at, n)] if at else []
        else:
            todo += [(name, [depth], n) for depth in at]
    return todo


def check_depths(depths: Sequence[int]) -> None:
    """Raise for anything but whole numbers from 1 to 127."""
    check_iterations(depths, "depths")


def identity(name: str, examples: Sequence[str] = (), data: str = "") -> str:
    """sha256 of what a task asks, but for how many questions.

    Args:
        examples: ids of the held-out examples.
        data: hash of the data they are from.
    """
    asks = {k: v for k, v in asdict(TASKS[name]).items() if k != "questions"} if name in TASKS else None
    return hashlib.sha256(json.dumps([name, asks, list(examples), data]).encode()).hexdigest()


def _measured(folder: Path, name: str, depth: int, n: int, asks: str | None) -> bool:
    """Whether so many questions of just this task are kept. Version 0.1 did not note which task it was: its
    own tasks have not changed, but held-out examples may be any training's.
    """
    path = folder / f"{name}-d{depth}.parquet"
    if not path.is_file():
        return False
    kept = read_table(path, AGAIN, COLUMNS).attrs
    return kept.get("asked", 0) >= n and kept.get("task", "" if name == HELD_OUT else asks) == asks


def kept_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the model whose measurements a folder holds; None if it does not say.

    Raises:
        SSTError: the file that says so is damaged.
    """
    path = folder / MODEL
    return read_json(path, OTHER).get("fingerprint") if path.is_file() else None


def refuse_other_model(folder: Path, model: StateStreamModel, fingerprint: str | None = None) -> None:
    """Refuse a folder with another model's measurements; note whose they are.

    Args:
        fingerprint: by which the model is known the next time, before it is loaded; None keeps what is noted.

    Raises:
        SSTError: they are another model's, or nobody knows whose.
    """
    path = folder / MODEL
    now = {
        "backbone": model.backbone.content_hash,
        "alpha": model.kind.digest(),
        "choices": {name: getattr(model.choices, name) for name in (*TRAINED, "prompt")},
    }
    kept = read_json(path, OTHER) if path.is_file() else None
    if kept is None and any(folder.glob("*-d*.parquet")):
        raise SSTError(f"{folder} does not say whose measurements it holds", OTHER)
    if kept is not None and any(kept.get(key, now[key]) != now[key] for key in now):
        raise SSTError(f"{folder} holds another model's measurements", OTHER)
    noted = now | ({"fingerprint": fingerprint} if fingerprint else {})
    if kept != (kept or {}) | noted:
        with suppress(*([OSError] if kept else [])):  # the same model's; what ships may be read-only
            folder.mkdir(parents=True, exist_ok=True)
            replace_json(path, (kept or {}) | noted)


def remove_evaluation(folder: Path) -> None:
    """Remove what `evaluate` has kept in a folder, and the folder if nothing else is in it."""
    for path in (*folder.glob("*-d*.parquet"), folder / MODEL):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def read_evaluation(folder: str | Path) -> pd.DataFrame:
    """What `evaluate` has measured so far: task, depth, question, value, weight.

    Raises:
        SSTError: nothing was, or a file of it is damaged.
    """
    parts = []
    for path in sorted(Path(folder).glob("*-d*.parquet")):
        task, _, depth = path.stem.rpartition("-d")
        parts.append(read_table(path, AGAIN, COLUMNS).assign(task=task, depth=int(depth)))
    if not parts:
        raise SSTError(f"{folder} holds no evaluation", "`sst-interp evaluate NAME` makes one")
    return pd.concat(parts, ignore_index=True)[["task", "depth", *COLUMNS]]


def _measure(
    model: StateStreamModel,
    name: str,
    depths: Sequence[int],
    n: int,
    held_out: Sequence[Example],
    progress: Callable[[int], Any] | None,
) -> dict[int, pd.DataFrame]:
    """Depth -> a row per question."""
    task = TASKS.get(name)
    if task is not None and task.kind != "loss":
        asked = load_questions(task.dataset, n, split=task.split).questions
        if task.kind == "written":
            found = answers(model, asked, depths, task.max_new_tokens, progress=progress)
        else:
            found = letters(model, asked, depths, progress=progress)
        by_depth = {depth: found[found["depth"] == depth] for depth in depths}
        columns = {
            d: {"question": rows["id"], "value": rows["correct"], "weight": 1.0}
            for d, rows in by_depth.items()
        }
    else:
        items = [] if task is None else load_items(task.dataset, task.split)[0][:n]
        examples = [encode(item, model) for item in items] if items else list(held_out[:n])
        losses = {d: answer_losses(model, examples, iterations=d, progress=progress) for d in depths}
        columns = {
            d: {"question": rows["id"], "value": rows["loss"], "weight": rows["tokens"]}
            for d, rows in losses.items()
        }
    kinds = {"question": str, "value": "float64", "weight": "float64"}
    return {d: pd.DataFrame(c).astype(kinds).reset_index(drop=True) for d, c in columns.items()}
