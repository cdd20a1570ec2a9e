"""Errors of models by name, written to one Parquet file that an interrupted measurement goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from sst_interp.approximation.conditions import Condition, grid
from sst_interp.approximation.errors import CYCLIC, SCHEDULES, Reference, Schedule, measure_errors
from sst_interp.checkpoint import read_checkpoint
from sst_interp.durable import publish, stage
from sst_interp.errors import SSTError
from sst_interp.guarded import check_place
from sst_interp.loading import checkpoint_folder, load
from sst_interp.model import StateStreamModel
from sst_interp.questions.registry import load_items
from sst_interp.study_tables import read_rows
from sst_interp.training.examples import Example, encode

ABOUT = ("model", "layers", "n_layers", "alpha", "alpha_low", "alpha_high", "blend_hash")
"""Columns that say what was measured; the others are those of `measure_errors`."""

Progress = Callable[[str, int, int], Any]


def errors_by_name(
    name: str,
    out: str | Path,
    questions: int = 8,
    dataset: str = "gsm8k",
    conditions: Sequence[Condition] | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure what is missing in `out`, question by question, and return the whole table.

    A backbone is measured without training, for every condition. A trained checkpoint is measured with its
    own blend, and then its blend on the backbone alone: what co-training has done to the error is the
    difference.

    Args:
        name: a backbone or a checkpoint.
        out: a Parquet file; what it has of this model is kept, other models' rows as they are.
        questions: texts, the first of the dataset: questions with their worked answers.
        dataset: a name of `questions.registry.DATASETS` whose records have worked answers.
        conditions: of a backbone; None for `conditions.grid`.
        verify: compare the first text with the sequential solution, too.
        progress: called with (what is measured, done, in all).

    Raises:
        SSTError: an unknown name, or a file that holds another model of that name.
    """
    out = Path(out)
    check_place(out.parent, "give another --out")
    read_rows(out)  # a damaged file is refused before anything is loaded
    model = load(name, dtype="float32")
    items, _ = load_items(dataset)
    examples = [encode(item, model) for item in items[:questions]]
    folder = checkpoint_folder(name)
    label = Path(name).name
    if folder is None:
        for condition in grid(model.backbone.n_layers) if conditions is None else conditions:
            alpha = condition.weights(model.backbone.n_layers)
            changed = StateStreamModel(model.backbone, model.tokenizer, alpha, model.choices, name)
            _measure(changed, label, condition.layers, examples, condition.schedules, out, verify, progress)
            verify = False
    else:
        _measure(model, label, "all", examples, SCHEDULES + CYCLIC, out, verify, progress)
        config, kind, _ = read_checkpoint(folder, "sst")
        bare = load(config["backbone"]["name"], kind.weights()["alpha"], model.choices, "float32")
        _measure(bare, f"{label}, blend only", "all", examples, SCHEDULES, out, False, progress)
    return read_rows(out)


def _measure(
    model: StateStreamModel,
    label: str,
    layers: str,
    examples: Sequence[Example],
    schedules: Sequence[Schedule],
    out: Path,
    verify: bool,
    progress: Progress | None,
) -> None:
    about = describe(model, label, layers)
    words = f"{label}, alpha {about['alpha']:.4g} in {about['n_layers']} layers ({layers})"
    for number, example in enumerate(examples):
        jobs: list[tuple[Reference, Sequence[Schedule]]] = [("layerwise", schedules)]
        if verify and number == 0:
            jobs.append(("sequential", schedules[:1]))
        for reference, wanted in jobs:
            if not _has(out, about, number, reference, wanted):
                rows = measure_errors(model, [example], wanted, reference, number)
                _append(out, rows.assign(**about)[[*ABOUT, *rows.columns]])
        if progress is not None:
            progress(words, number + 1, len(examples))


def describe(model: StateStreamModel, label: str, layers: str) -> dict[str, Any]:
    """What is measured: name, blended layers and their weights (`alpha`: mean, `alpha_low`, `alpha_high`)."""
    on = model.alpha[model.alpha.any(dim=1)]
    if not len(on):
        raise SSTError(f"{label} has no blend", "an error needs an alpha above 0")
    return {
        "model": label,
        "layers": layers,
        "n_layers": len(on),
        "alpha": round(float(on.double().mean()), 6),
        "alpha_low": round(float(on.min()), 6),
        "alpha_high": round(float(on.max()), 6),
        "blend_hash": fingerprint(model),
    }


def fingerprint(model: StateStreamModel) -> str:
    """Which weights and which blend: a checkpoint that has been trained on is another model."""
    import hashlib

    digest = hashlib.sha256(model.backbone.content_hash.encode())
    digest.update(model.alpha.to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _has(
    out: Path, about: dict[str, Any], question: int, reference: Reference, schedules: Sequence[Schedule]
) -> bool:
    table = read_rows(out)
    if not len(table):
        return False
    own = table[(table["model"] == about["model"]) & (table["layers"] == about["layers"])]
    if about["alpha_low"] == about["alpha_high"]:  # one of several blends of one backbone
        own = own[own["alpha"] == about["alpha"]]
    if (own["blend_hash"] != about["blend_hash"]).any():
        raise SSTError(
            f"{out} holds the errors of another {about['model']!r}", "delete it, or write to another file"
        )
    own = own[(own["question"] == question) & (own["reference"] == reference) & (own["method"] == "sweeps")]
    return {(s.groups, s.sweeps) for s in schedules} <= set(zip(own["groups"], own["sweeps"], strict=True))


def _append(out: Path, rows: pd.DataFrame) -> None:
    if out.is_file():
        rows = pd.concat([read_rows(out), rows], ignore_index=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage(out, lambda path: rows.to_parquet(path, compression="zstd"))
    publish(out)
