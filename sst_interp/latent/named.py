"""Equivalence by name, question by question, into two Parquet files that an interrupted measurement goes on
with.

FOLDER/latent-states.parquet      a row per (model, memory, id, method, n, position): sums of errors
FOLDER/latent-gradients.parquet   a row per (model, memory, id, method, n, of, part)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.latent.equivalence import SCHEDULES, Schedule, Text, compare_schedules
from sst_interp.latent.memories import random_memory, sequences, shortest_texts, small_model
from sst_interp.latent.small import ARMS, EXACT, LatentPlan
from sst_interp.loading import checkpoint_folder, load
from sst_interp.model import StateStreamModel
from sst_interp.study_tables import put_rows, read_rows
from sst_interp.training.adapters import add_adapters, trainable

STATES, GRADIENTS = "latent-states.parquet", "latent-gradients.parquet"
ABOUT = ["model", "memory", "fingerprint"]
SIZES = (0.005, 0.02)
SMALL = "small"
"""The name of the small model that is trained on the spot."""
RANK = 16
"""Of the adapters whose gradient is compared: fresh ones, with B = 0, as training starts with them. The
gradient of B is that of the weights seen through a random projection."""

Progress = Callable[[str, int, int], Any]


def equivalence_by_name(
    name: str,
    folder: str | Path,
    questions: int = 4,
    sizes: Sequence[float] = SIZES,
    schedules: Sequence[Schedule] = SCHEDULES,
    data: str = "gsm8k",
    plan: LatentPlan | None = None,
    progress: Progress | None = None,
) -> dict[str, pd.DataFrame]:
    """Measure what is missing, question by question, in float32; returns the tables.

    Args:
        name: a checkpoint of a Latent Recurrent Transformer; a backbone, which is given random memories; or
            `small`, the model of `latent.small`, trained exactly and interleaved (half a minute each).
        folder: where the tables are; what they have is kept.
        questions: texts, the shortest of the data; of `small`, sequences.
        sizes: of a backbone's random memories.
        schedules: what is compared.
        data: questions with worked answers (`training.examples.read_items`).
        plan: of the small model; None for the default.
        progress: called with (what is measured, done, in all).

    Raises:
        SSTError: an unknown name, a checkpoint of the other kind, or a folder that holds another model of
            that name.
    """
    folder = Path(folder)
    for label, memory, model, texts, weights in _models(name, questions, sizes, data, plan):
        about = {"model": label, "memory": memory, "fingerprint": model.kind.digest()[:16]}
        for number, text in enumerate(texts, 1):
            if not _has(read_rows(folder / GRADIENTS), about, text, schedules):
                found = compare_schedules(model, text, weights, schedules)
                keys = ["model", "memory", "id", "method", "n"]
                put_rows(folder / STATES, found.states.assign(**about), keys)
                put_rows(folder / GRADIENTS, found.gradients.assign(**about), keys)  # last: both are there
            if progress is not None:
                progress(f"{label}, {memory}", number, len(texts))
    return read_equivalence(folder)


def read_equivalence(folder: str | Path) -> dict[str, pd.DataFrame]:
    """The tables `states` and `gradients`; an empty one where there is none yet."""
    return {"states": read_rows(Path(folder) / STATES), "gradients": read_rows(Path(folder) / GRADIENTS)}


Measured = tuple[str, str, StateStreamModel, list[Text], Mapping[str, Tensor]]


def _models(
    name: str, questions: int, sizes: Sequence[float], data: str, plan: LatentPlan | None
) -> Iterator[Measured]:
    """(label, memory in words, model, texts, weights whose gradient is compared) of everything by a name."""
    if name == SMALL:
        for arm in (EXACT, ARMS[1]):
            model, its = small_model(arm, plan)
            weights = dict(model.backbone.model.named_parameters())
            yield SMALL, f"trained, {arm.name}", model, sequences(model, its, questions), weights
        return
    if checkpoint_folder(name) is not None:
        model, label = load(name, dtype="float32", kind="lrt"), Path(name).name
        texts, weights = shortest_texts(model, questions, data), _adapters(model)
        yield label, "trained", model, texts, weights
        return
    if not sizes:
        raise SSTError(f"{name} has no memory", "give sizes of random ones, for example 0.005")
    model = load(name, alpha=0.0, dtype="float32")
    texts, weights = shortest_texts(model, questions, data), _adapters(model)
    for size in sizes:
        model.kind = random_memory(model, size)
        yield name, f"random, size {size:g}", model, texts, weights


def _adapters(model: StateStreamModel) -> dict[str, torch.nn.Parameter]:
    return trainable(add_adapters(model.backbone.model, RANK, 2 * RANK, (), 0))


def _has(gradients: pd.DataFrame, about: dict[str, str], text: Text, schedules: Sequence[Schedule]) -> bool:
    if gradients.empty:
        return False
    own = gradients[(gradients["model"] == about["model"]) & (gradients["memory"] == about["memory"])]
    if (own["fingerprint"] != about["fingerprint"]).any():
        raise SSTError(
            f"the folder holds the equivalence of another {about['model']!r} ({about['memory']})",
            "delete its rows, or write to another folder",
        )
    own = own[own["id"] == text.id]
    asked = {tuple(s) for s in schedules if s.method != "interleaved" or s.n <= text.tokens.shape[1]}
    return asked <= set(zip(own["method"], own["n"], strict=True))
