"""Which kind of model a run is of: what listings, reports and comparisons call it.

It is what the run was captured from (the manifest's provenance), and for a recipe without data what its
checkpoint says. A stream that cannot change anything (alpha 0) is none: the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from sst_interp.kind import NAMES, KindName
from sst_interp.recipe import Recipe

RunKind = KindName | Literal["backbone"]
WORDS: dict[RunKind, str] = {"backbone": "backbone without a stream", **NAMES}


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
    words = "" if kind is None else WORDS.get(kind, str(kind))
    return words[:1].upper() + words[1:]


def _of_checkpoint(name: str) -> RunKind | None:
    from sst_interp.checkpoint import read_checkpoint
    from sst_interp.errors import SSTError
    from sst_interp.loading import ASSET_MODELS, checkpoint_folder

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
