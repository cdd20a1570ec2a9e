"""Runs of different kinds side by side: they must be of the same questions, depths and budget.

compare_runs(["demo-backbone", "demo", "demo-lrt", "demo-looped"]).verdict
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sst_interp.analyses.kinds import Kinds, kinds
from sst_interp.analyses.kinds_answers import KindsAnswers, kinds_answers
from sst_interp.analyses.kinds_contraction import KindsContraction, kinds_contraction
from sst_interp.analyses.parts.kind_shares import Compared
from sst_interp.analyses.statistics.bootstrap import RESAMPLES
from sst_interp.errors import SSTError
from sst_interp.run_kind import kind_words
from sst_interp.runs import Run, open_run

AGREE = ("dataset", "depths", "max_new_tokens", "reply_prefix", "dtype", "batch_size")
"""What recipes must agree in: else a share may differ for another reason than the kind."""
COLUMNS = ["question", "comparison", "position", "layer", "a", "b", "cosine", "relative_l2"]


def open_together(names: Sequence[str | Path]) -> list[Run]:
    """The runs of these names, complete and comparable.

    Raises:
        SSTError: one run or none, one named twice, an unknown or incomplete one, or runs of different
            questions or recipes that differ in `AGREE`.
    """
    if len(names) < 2:
        raise SSTError("a comparison needs two runs or more", "for example --runs demo-backbone,demo")
    runs = [open_run(name) for name in names]
    for k, run in enumerate(runs):
        if run.name in [other.name for other in runs[:k]]:
            raise SSTError(f"run {run.name} is named twice", "name each run once")
        if not run.complete:
            raise SSTError(
                f"run {run.name} is not complete", f"`sst-interp capture --run {run.name}` finishes it"
            )
        _refuse_other(runs[0], run)
    return runs


def compare_runs(names: Sequence[str | Path], resamples: int = RESAMPLES, seed: int = 0) -> Kinds:
    """Stable and shifted shares by kind; the first run is the one that others are compared with.

    Raises:
        SSTError: as `open_together`.
    """
    runs = open_together(names)
    overlap = runs[0].recipe.choices.overlap
    wanted = list(dict.fromkeys([*COLUMNS, overlap]))
    compared = [
        Compared(run.name, kind_words(run.kind), run.table("pairs", wanted), run.kind == "backbone")
        for run in runs
    ]
    return kinds(compared, overlap, resamples, seed)


def answers_of(names: Sequence[str | Path], resamples: int = RESAMPLES, seed: int = 0) -> KindsAnswers:
    """What depth does to the answers of each run. Raises SSTError as `open_together`."""
    return kinds_answers({run.name: run.questions for run in open_together(names)}, resamples, seed)


def contraction_of(
    names: Sequence[str | Path], texts: int, resamples: int = RESAMPLES, seed: int = 0
) -> KindsContraction:
    """Contraction per sweep of each run's model, in float32, at depth 1 and the deepest.

    Args:
        names: of runs, or of recipes whose model is to be measured on their own questions.
        texts: of the first so many questions, without a chat template (all begin alike with one).

    Raises:
        SSTError: as `open_together` and `load`.
    """
    from sst_interp.contraction import sweep_residuals
    from sst_interp.loading import load
    from sst_interp.questions import load_questions

    if texts < 1:
        raise SSTError(f"{texts} texts are none", "for example --contraction 8")
    found: dict[str, Any] = {}
    for run in open_together(names):
        recipe, depths = run.recipe, sorted({1, max(run.recipe.depths)})
        n = texts if recipe.questions is None else min(texts, recipe.questions)
        asked = load_questions(recipe.dataset, n, recipe.seed, recipe.split, instruction=recipe.instruction)
        model = load(recipe.checkpoint, recipe.alpha, recipe.choices, "float32", kind=recipe.kind)
        read = [model.encode(q.prompt) for q in asked.questions]
        with tqdm(desc=f"sweeps of {run.name}", total=len(read) * len(depths), unit="text") as bar:
            found[run.name] = sweep_residuals(model, read, depths, lambda bar=bar: bar.update(1))
    return kinds_contraction(found, resamples, seed)


def _refuse_other(first: Run, other: Run) -> None:
    """Raise if two runs cannot be compared."""
    for key in AGREE:
        ours, theirs = getattr(first.recipe, key), getattr(other.recipe, key)
        if ours != theirs:
            raise SSTError(
                f"runs {first.name} and {other.name} differ in {key}: {ours!r} and {theirs!r}",
                "compare runs whose recipes differ in the model alone",
            )
    if first.recipe.choices.overlap != other.recipe.choices.overlap:
        raise SSTError(
            f"runs {first.name} and {other.name} measured other overlaps", "set the same `overlap` in both"
        )
    hashes = [run.manifest["provenance"].get("dataset_hash") for run in (first, other)]
    asked = [
        run.questions[["question", "id", "gold"]].drop_duplicates().to_dict("list") for run in (first, other)
    ]
    if asked[0] != asked[1] or (all(hashes) and hashes[0] != hashes[1]):
        raise SSTError(
            f"runs {first.name} and {other.name} are of different questions",
            "capture both with the same questions, split, seed and instruction",
        )
