"""What a run is of: the kind of its model, what went into it, and whether its tokens may be shown."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sst_interp.assets import ASSET_MODELS
from sst_interp.errors import SSTError
from sst_interp.models.checkpoint import checkpoint_folder, read_checkpoint
from sst_interp.models.kinds import kinds
from sst_interp.models.loading import load_tokenizer
from sst_interp.models.model import StateStreamModel
from sst_interp.questions import Question, QuestionSet, load_questions
from sst_interp.questions.item import LIKELIHOOD, HiddenTokens
from sst_interp.runs.recipe import Recipe

RunKind = str
"""Name of a kind, or `backbone`: a stream that cannot change anything (alpha 0) is none."""
VERSIONS = ("sst-interp", "torch", "transformers", "numpy", "pandas", "pyarrow")
CLASSES = ("special", "space", "digit", "punctuation", "word", "piece")
"""A control token; white space only; with a digit; without letter or digit; the start of a word (a space or
line before it); the inside of one."""


def run_kind(recipe: Recipe, provenance: Mapping[str, Any]) -> RunKind | None:
    """The kind of a run's model by its manifest's `provenance`, or by its recipe if it has no data; None if
    that is not known (a model that is not at hand).
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
    if kind == "backbone":
        return "Backbone without a stream"
    words = kinds()[kind].words if kind in kinds() else kind or ""
    return words[:1].upper() + words[1:]


def _of_checkpoint(name: str) -> RunKind | None:
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
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
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
    about: dict[str, Any] = {"kind": model.kind.name, "stream": str(model.kind)}
    about |= {"off": True} if model.kind.off else {}
    return about if gamma is None else about | {"gamma": gamma.tolist()}


def questions_of(recipe: Recipe, n: int | None = None) -> QuestionSet:
    """The questions that a recipe asks, or its first `n`. Raises SSTError as `load_questions`."""
    return load_questions(
        recipe.dataset, recipe.questions if n is None else n, recipe.seed, recipe.split, recipe.columns,
        recipe.instruction, recipe.scoring,
    )  # fmt: skip


def prompt_tokens(model: StateStreamModel, question: Question, reply_prefix: str | None = None) -> list[int]:
    """The token ids that a question is put to a model as: a chat turn; by likelihood, the text as it is."""
    if question.scoring in LIKELIHOOD:
        return HiddenTokens(model.encode(question.prompt))
    return HiddenTokens(model.chat(question.prompt, reply_prefix=reply_prefix or ""))


def choice_tokens(model: StateStreamModel, question: Question) -> list[list[int]]:
    """The token ids of every choice as it goes on from the prompt; none unless it is scored by likelihood."""
    if question.scoring not in LIKELIHOOD:
        return []
    pairs = (model.encode_pair(question.prompt, f" {choice}") for choice in question.choices)
    return [HiddenTokens(ids) for _, ids in pairs]


def dataset_hash(questions: QuestionSet) -> str:
    """sha256 over what was asked, in order: tells two sets apart and tells nothing of their text."""
    digest = hashlib.sha256()
    for q in questions.questions:
        shown = [] if q.scoring not in LIKELIHOOD else [q.choices]  # else they are in the prompt
        digest.update(json.dumps([q.id, q.prompt, q.gold, q.kind, *shown]).encode())
    return digest.hexdigest()


def _git_revision() -> str | None:
    """Of the source tree the package runs from; None for an installed wheel."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def shows_text(run: Any) -> bool:
    """Whether the run's data may be shown: its provenance says that it is not restricted."""
    return run.manifest.get("provenance", {}).get("restricted") is False


def tokenizer_of(run: Any) -> Any:
    """The tokenizer of a run whose text may be shown; None if it may not, or is not at hand."""
    if not shows_text(run):
        return None
    try:
        return load_tokenizer(run.recipe.checkpoint)
    except SSTError:
        return None


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of every token by itself, spaces included. Bytes that are no character become U+FFFD."""
    return tokenizer.batch_decode([[int(i)] for i in ids], skip_special_tokens=False)


def token_classes(tokenizer: Any) -> Callable[[np.ndarray], list[str]]:
    """A function from an array of token ids to the class (`CLASSES`) of each."""
    special = set(tokenizer.all_special_ids)

    def classes(ids: np.ndarray) -> list[str]:
        named = zip(ids.tolist(), token_texts(tokenizer, ids.tolist()), strict=True)
        return ["special" if i in special else _class(text) for i, text in named]

    return classes


def _class(text: str) -> str:
    if not text.strip():
        return "space"
    if any(c.isdigit() for c in text):
        return "digit"
    if not any(c.isalpha() for c in text):
        return "punctuation"
    return "word" if text[0].isspace() else "piece"
