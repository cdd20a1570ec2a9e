"""Caches of a captured run: one question's text, read again with a hook at every point.

A run keeps measurements and, at most, layer outputs. What a cache needs beside them (`resid_mid`, `mlp_out`
...) is computed again: the question is taken from the run's own dataset, and the tokens that the run wrote
are read at their depth, one after the other, as they were generated. Model, blend and questions must be the
run's by their hashes, so that a cache is never of something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sst_interp.bridges import NamesFilter
from sst_interp.capture import provenance
from sst_interp.choices import whole
from sst_interp.errors import SSTError
from sst_interp.loading import load
from sst_interp.model import StateStreamModel
from sst_interp.questions import load_questions
from sst_interp.run import Run

if TYPE_CHECKING:
    from transformer_lens import ActivationCache


def run_caches(
    run: Run,
    question: int,
    depth: int | None = None,
    text: str = "own",
    model: StateStreamModel | None = None,
    names_filter: NamesFilter = None,
) -> list[ActivationCache]:
    """One `ActivationCache` per iteration; positions are the generated ones, [1, position, ...].

    Args:
        question: its index in the run.
        depth: iteration depth; None is the deepest.
        text: whose tokens are read: the depth's `own`, or `depth1`.
        model: the run's model, if it is loaded already; None loads what the recipe names.
        names_filter: which hook points, as for `run_with_cache`.

    Raises:
        SSTError: no such question, depth or text; the run keeps no tokens (its dataset is restricted); a
            model or dataset that is not the run's; a filter that matches nothing.
    """
    recipe = run.recipe
    question = whole("question", question, 0)
    depth = max(recipe.depths) if depth is None else whole("depth", depth, 1)
    tokens = written_tokens(run, question, 1 if text == "depth1" else depth, text)
    asked = load_questions(
        recipe.dataset, recipe.questions, recipe.seed, recipe.split, instruction=recipe.instruction
    )
    if model is None:
        model = load(recipe.checkpoint, recipe.alpha, recipe.choices, recipe.dtype, kind=recipe.kind)
    refuse_another(run, provenance(model, asked))
    bridge = model.bridge()
    prompt = model.chat(asked.questions[question].prompt, reply_prefix=recipe.reply_prefix or "")
    return bridge.read_with_caches(prompt, tokens, depth, names_filter)[1]


def run_cache(run: Run, question: int, iteration: int = 1, **how: object) -> ActivationCache:
    """The cache of one iteration; see `run_caches`."""
    iteration = whole("iteration", iteration, 1)
    caches = run_caches(run, question, **how)  # pyright: ignore[reportArgumentType]
    if iteration > len(caches):
        raise SSTError(f"there is no iteration {iteration}", f"this depth has 1 to {len(caches)}")
    return caches[iteration - 1]


def refuse_another(run: Run, now: dict[str, Any]) -> None:
    """Raise if a model or questions are not what a run was captured with, by the hashes of `provenance`."""
    for key, was in run.manifest["provenance"].items():
        if key.endswith("_hash") and now.get(key, was) != was:
            raise SSTError(
                f"run {run.name} was captured with another {key.removesuffix('_hash')}",
                "give the model and dataset it was captured with",
            )


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
