"""The model, the questions and the written tokens of a captured run, to read them again.

Hashes make sure that they are the run's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sst_interp.errors import SSTError
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.questions import Question
from sst_interp.runs.provenance import provenance, questions_of
from sst_interp.runs.run import Run


def origin_of(
    run: Run, model: StateStreamModel | None = None, device: str = "auto"
) -> tuple[StateStreamModel, Sequence[Question]]:
    """The model and the questions, in order, that a run was captured with.

    Args:
        model: the run's model, if it is loaded already; None loads what the recipe names.
        device: where it is then put.

    Raises:
        SSTError: a model or questions that are not the run's.
    """
    recipe = run.recipe
    asked = questions_of(recipe)
    if model is None:
        at = replace(recipe.placement, device=device)  # another machine than the capture's, maybe
        how = {"kind": recipe.kind, "loop": recipe.loop, **at.how()}
        model = load(recipe.checkpoint, recipe.alpha, recipe.choices, **how)
    now = provenance(model, asked)
    for key, was in run.manifest["provenance"].items():
        if key.endswith("_hash") and now.get(key, was) != was:
            raise SSTError(
                f"run {run.name} was captured with another {key.removesuffix('_hash')}",
                "give the model and dataset it was captured with",
            )
    return model, asked.questions


def written_tokens(run: Run, question: int, depth: int, text: str = "own") -> list[int]:
    """The tokens that a depth wrote for a question.

    Raises:
        SSTError: no such question, depth or text, or no tokens are kept.
    """
    if text not in ("own", "depth1"):
        raise SSTError(f"text {text!r} is neither 'own' nor 'depth1'", "own: what the depth wrote itself")
    if depth not in run.recipe.depths:
        raise SSTError(f"run {run.name} has no depth {depth}", f"its depths: {list(run.recipe.depths)}")
    steps = run.table("steps", ["question", "text", "depth", "position", "iteration", "token"])
    here = (steps["question"] == question) & (steps["text"] == "own") & (steps["depth"] == depth)
    rows = steps[here & (steps["iteration"] == 1)]
    if rows.empty:
        raise SSTError(f"run {run.name} has no question {question}", "they are counted from 0")
    if rows["token"].isna().any():
        raise SSTError(
            f"run {run.name} keeps no tokens: its dataset's text must not be published",
            "`model.run_with_cache` on a prompt of yours needs no run",
        )
    return rows.sort_values("position")["token"].astype(int).tolist()
