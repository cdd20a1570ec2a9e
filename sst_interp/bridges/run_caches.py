"""Caches of a captured run: one question's text, read again with a hook at every point.

A run keeps measurements and, at most, layer outputs. What a cache needs beside them (`resid_mid`, `mlp_out`
...) is computed again: the question is taken from the run's own dataset, and the tokens that the run wrote
are read at their depth, one after the other, as they were generated. Model, blend and questions must be the
run's by their hashes, so that a cache is never of something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sst_interp.bridges.asked import NamesFilter
from sst_interp.errors import SSTError
from sst_interp.experiments.origin import origin_of, written_tokens
from sst_interp.models.choices import whole
from sst_interp.models.model import StateStreamModel
from sst_interp.runs.run import Run

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
    model, asked = origin_of(run, model)
    bridge = model.bridge()
    prompt = model.chat(asked[question].prompt, reply_prefix=recipe.reply_prefix or "")
    return bridge.read_with_caches(prompt, tokens, depth, names_filter)[1]


def run_cache(run: Run, question: int, iteration: int = 1, **how: object) -> ActivationCache:
    """The cache of one iteration; see `run_caches`."""
    iteration = whole("iteration", iteration, 1)
    caches = run_caches(run, question, **how)  # pyright: ignore[reportArgumentType]
    if iteration > len(caches):
        raise SSTError(f"there is no iteration {iteration}", f"this depth has 1 to {len(caches)}")
    return caches[iteration - 1]
