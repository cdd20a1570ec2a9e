"""Which kind of model a run is of: what listings, reports and comparisons call it.

It is what the run was captured from (the manifest's provenance), and for a recipe without data what its
checkpoint says. A stream that cannot change anything (alpha 0) is none: the backbone.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sst_interp.errors import SSTError
from sst_interp.models.kinds import kinds
from sst_interp.models.model import StateStreamModel
from sst_interp.questions import QuestionSet
from sst_interp.runs.recipe import Recipe

RunKind = str
"""Name of a kind, or `backbone`."""
BACKBONE = "backbone without a stream"


def run_kind(recipe: Recipe, provenance: Mapping[str, Any]) -> RunKind | None:
    """The kind of a run's model; None where neither says it (no data, and a model that is not at hand).

    Args:
        recipe: the run's.
        provenance: of its manifest; empty if it has no data.
    """
    if provenance:  # runs of before there were kinds are of an SST
        off = provenance.get("off", provenance.get("alpha_range") == [0, 0])
        return "backbone" if off else provenance.get("kind", "sst")
    if recipe.kind not in (None, "sst"):
        return recipe.kind
    if recipe.alpha is not None:
        return "sst" if recipe.alpha else "backbone"
    return _of_checkpoint(recipe.checkpoint)


def kind_words(kind: RunKind | None) -> str:
    """In words, with a capital letter: `State Stream Transformer`, `Depth-looped model`; empty for None."""
    named = kinds()
    words = "" if kind is None else named[kind].words if kind in named else kind
    words = BACKBONE if kind == "backbone" else words
    return words[:1].upper() + words[1:]


def _of_checkpoint(name: str) -> RunKind | None:
    from sst_interp.assets import ASSET_MODELS
    from sst_interp.models.checkpoint import checkpoint_folder, read_checkpoint

    if name in ASSET_MODELS:
        return "backbone"  # a blend is asked for by `alpha`
    folder = checkpoint_folder(name)
    if folder is None:
        return None
    try:
        stream = read_checkpoint(folder)[1]
    except SSTError:
        return None
    return "backbone" if stream.off else stream.name


VERSIONS = ("sst-interp", "torch", "transformers", "numpy", "pandas", "pyarrow")


def provenance(model: StateStreamModel, questions: QuestionSet) -> dict[str, Any]:
    """What went into a run, and what it was made with. Keys ending in `_hash` must agree on resuming."""
    return {
        "model": model.name,
        "family": model.backbone.family,
        "n_layers": model.backbone.n_layers,
        "d_model": model.backbone.d_model,
        "model_hash": model.backbone.content_hash,
        "alpha_hash": model.kind.digest(),
        "dataset_hash": dataset_hash(questions),
        "choices": model.choices.to_dict(),
        **_of_the_stream(model),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "device": model.backbone.device.type,
        "dataset": questions.provenance,
        "restricted": questions.restricted,
        "versions": {name: _version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "git_revision": _git_revision(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _of_the_stream(model: StateStreamModel) -> dict[str, Any]:
    """The kind of stream, and its weights in a few numbers."""
    if model.kind.name == "sst":
        alpha = model.alpha
        return {"alpha_mean": float(alpha.mean()), "alpha_range": [float(alpha.min()), float(alpha.max())]}
    gamma = model.kind.weights().get("gamma")
    found: dict[str, Any] = {"kind": model.kind.name, "stream": str(model.kind)}
    if model.kind.off:
        found["off"] = True
    return found if gamma is None else found | {"gamma": gamma.tolist()}


def dataset_hash(questions: QuestionSet) -> str:
    """sha256 over what was asked, in order: tells two sets apart and tells nothing of their text."""
    digest = hashlib.sha256()
    for q in questions.questions:
        digest.update(json.dumps([q.id, q.prompt, q.gold, q.kind]).encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    return version(package)


def _git_revision() -> str | None:
    """Of the source tree the package runs from; None for an installed wheel."""
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
