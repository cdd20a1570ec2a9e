"""Evaluation of models by name, with what was measured kept beside the checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from sst_interp import places
from sst_interp.checkpoint import read_checkpoint
from sst_interp.durable import replace_json
from sst_interp.errors import SSTError
from sst_interp.evaluation.tasks import HELD_OUT, TASKS, check_depths, evaluate, missing, read_evaluation
from sst_interp.guarded import check_place, read_json
from sst_interp.loading import checkpoint_folder, load
from sst_interp.model import StateStreamModel
from sst_interp.training.examples import load_split
from sst_interp.training.log import read_about
from sst_interp.training.recipe import TrainingRecipe

MODEL = "model.json"


def evaluation_folder(name: str, out: Path | None = None) -> Path:
    """Where the measurements of a model are: beside its checkpoint, or in `evaluations/NAME` (those that ship
    for a backbone, as long as there are none in the working folder).
    """
    folder = checkpoint_folder(name)
    if out is not None:
        return out / Path(name).name
    if folder is not None:
        return folder / "evaluation"
    own, shipped = Path("evaluations") / Path(name).name, places.shipped("evaluations") / Path(name).name
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
    trained = None if held_out_of is None else checkpoint_folder(held_out_of)
    if held_out_of is not None and trained is None:
        raise SSTError(f"{held_out_of} is not a checkpoint", "held-out examples are a training's")
    checkpoint = checkpoint_folder(name)
    if checkpoint is None or read_checkpoint(checkpoint)[1].off:
        depths = [1]  # without a blend, every depth does the same
    wanted = [*tasks, *([HELD_OUT] if trained else [])]
    if not missing(folder, wanted, depths, questions):
        return read_evaluation(folder)
    check_place(folder, "give another --out")
    print(f"loading {name}", file=sys.stderr)
    model = load(name, alpha=0.0 if checkpoint is None else None)
    _same_model(folder, model)
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

    return evaluate(model, folder, depths, tasks, held_out, questions, show)


def _same_model(folder: Path, model: StateStreamModel) -> None:
    """Refuse a folder with another model's measurements; note whose they are."""
    now = {"backbone": model.backbone.content_hash, "alpha": model.kind.digest()}
    path = folder / MODEL
    if path.is_file():
        if read_json(path, "delete the folder, or give another --out") != now:
            raise SSTError(f"{folder} holds another model's measurements", "delete it, or give another --out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    replace_json(path, now)
