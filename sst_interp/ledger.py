"""The claims ledger of a run by name: it finds what the claims need besides the run itself.

A run's companions are runs called `NAME-ROLE` beside it, or among the user's and the shipped ones:

- `NAME-blend-off`: the same recipe with `prompt = "blend_off"`, the start-up control of claim C8;
- `NAME-reshuffled`: the same questions with another `seed`, for C9;
- `NAME-baseline`: the matched baseline on the same questions, for C11;
- `NAME-deep`: depths beyond the run's, for overthinking and settling;
- `NAME-lens`: some of its questions with `overlap = "lens_jaccard"`, for token replacement by layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import numpy as np

from sst_interp import places
from sst_interp.analyses.ledger.claims import BlendWeights, Ledger, claims
from sst_interp.analyses.ledger.rules import Row
from sst_interp.analyses.ledger.suite import Progress
from sst_interp.analyses.statistics.bootstrap import RESAMPLES
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.studies.errors import ApproximationError, approximation_error
from sst_interp.guarded import read_table
from sst_interp.kept_findings import kept_findings
from sst_interp.loading import checkpoint_folder
from sst_interp.run_kind import WORDS
from sst_interp.runs import Run, open_run
from sst_interp.token_texts import token_classes, tokenizer_of

ROLES = {
    "blend_off": "blend-off",
    "reshuffled": "reshuffled",
    "baseline": "baseline",
    "beyond": "deep",
    "lens": "lens",
}
"""Argument of `claims` -> the end of the companion's name."""


@dataclass(frozen=True)
class Companions:
    """The runs that stand beside a run, and why one that was found is not used."""

    runs: dict[str, Run] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def companions(run: Run) -> Companions:
    """The companions of a run: complete ones, of the same dataset."""
    found = Companions()
    for role, end in ROLES.items():
        for where in (run.folder.parent / f"{run.name}-{end}", f"{run.name}-{end}"):
            try:
                other = open_run(where)
            except SSTError:
                continue
            if other.recipe.dataset != run.recipe.dataset:
                found.notes.append(f"{other.name} is of {other.recipe.dataset}, not {run.recipe.dataset}")
            elif not other.complete:
                found.notes.append(f"{other.name} is not complete and is left out")
            else:
                found.runs[role] = other
            break
    return found


def ledger_of(
    run: Run,
    resamples: int = RESAMPLES,
    seed: int = 0,
    more: tuple[Row, ...] = (),
    progress: Progress | None = None,
) -> Ledger:
    """The claims ledger of a run with its companions, its blend weights and the measured approximation.

    Args:
        run: a captured run; its companions are looked for.
        resamples: question resamples, shuffles and permutations.
        seed: of all three.
        more: rows of claims that were measured elsewhere; they go before those kept with the run.
        progress: told how many analyses are done, of how many, and which is next.
    """
    tokenizer, kept = tokenizer_of(run), kept_findings(run)
    found = claims(
        run,
        **companions(run).runs,
        alpha=blend_of(run),
        approximation=approximation_of(run),
        no_blend=None if run.kind == "sst" else f"a {WORDS[run.kind or 'backbone']} has no blend",
        token_class=token_classes(tokenizer) if tokenizer is not None else None,
        more=[*{(row.claim.id, row.comparison): row for row in (*kept.rows, *more)}.values()],
        resamples=resamples,
        seed=seed,
        progress=progress,
    )
    return replace(found, results=found.results | kept.results)


def blend_of(run: Run) -> BlendWeights | None:
    """Mean and range of the blend weights a run was captured with, and where their training started."""
    known = run.manifest["provenance"]
    if "alpha_mean" not in known:
        return None
    low, high = known["alpha_range"]
    folder = checkpoint_folder(run.recipe.checkpoint) if run.recipe.alpha is None else None
    start = None
    if folder is not None and (about := folder / "training.json").is_file():
        start = json.loads(about.read_text())["recipe"].get("alpha")
    return BlendWeights(known["alpha_mean"], low, high, start)


def approximation_of(run: Run) -> ApproximationError | None:
    """What few sweeps cost the run's model, if that was measured (`sst-interp study run two-pass MODEL`).

    Measured means: under the same name and with the same blend weights; trained anew it is another model.
    """
    known = run.manifest["provenance"]
    if "alpha_mean" not in known:
        return None
    model = known.get("model", run.recipe.checkpoint)
    blend = (known["alpha_mean"], *known["alpha_range"])
    for file in (places.studies_dir() / "errors.parquet", places.shipped("studies") / "errors.parquet"):
        if file.is_file():
            again = f"delete it; `sst-interp study run two-pass {model}` measures it again"
            table = read_table(file, again, ("model", "layers", "alpha", "alpha_low", "alpha_high"))
            measured = table[["alpha", "alpha_low", "alpha_high"]].to_numpy(dtype=float)
            same = np.isclose(measured, blend, rtol=0, atol=1e-6).all(axis=1)
            named = (table["layers"] == "all") & (table["model"] == model)
            own = table[same & named.to_numpy(dtype=bool)]
            if len(own):
                try:
                    return approximation_error(own)
                except Untestable:  # nothing of it is finite, or no two passes are among it
                    continue
    return None
