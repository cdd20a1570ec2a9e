"""The ledger of a run with its companions and with the findings that were kept with it.

Companions are runs called `NAME-ROLE`, beside the run or among the user's and the shipped ones:

- `NAME-blend-off`: the same recipe with `prompt = "blend_off"`, the start-up control of claim C8;
- `NAME-reshuffled`: the same questions with another `seed`, for C9;
- `NAME-baseline`: the matched baseline on the same questions, for C11;
- `NAME-deep`: depths beyond the run's, for overthinking and settling;
- `NAME-redraws`: the same questions, answers sampled at depth 1 as often as there are depths, for C11;
- `NAME-lens`: some of its questions with `overlap = "lens_jaccard"`, for token replacement by layer.

The commands `probe` and `patch` keep their rows and results in `findings/` of the run's folder (for a
shipped run, in `findings/NAME` of the working folder). Findings of another capture are not shown. A damaged
file costs its own rows, which name the file and what to type.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sst_interp import paths
from sst_interp.analyses.result import KeptResult, Result, json_ready
from sst_interp.analyses.statistics.bootstrap import RESAMPLES, Interval
from sst_interp.errors import SSTError
from sst_interp.files import read_json, read_table, replace_json, unreadable
from sst_interp.findings.answers import BlendWeights
from sst_interp.findings.claims import CLAIMS, EVERYWHERE, GRADES, Finding, Part, Row, graded, not_comparable
from sst_interp.findings.ledger import Ledger, Progress, claims
from sst_interp.models.checkpoint import checkpoint_folder
from sst_interp.runs.manifest import content_hash
from sst_interp.runs.provenance import kind_words, token_classes, tokenizer_of
from sst_interp.runs.run import Run
from sst_interp.runs.store import open_run
from sst_interp.tables import visible_texts

FOLDER = "findings"
ROLES = {
    "blend_off": "blend-off",
    "reshuffled": "reshuffled",
    "baseline": "baseline",
    "beyond": "deep",
    "lens": "lens",
    "redraws": "redraws",
}
"""Role (`contrast.BESIDE`) -> the end of the companion's name."""


@dataclass(frozen=True)
class Companions:
    """The runs beside a run, and notes on those that are not used."""

    runs: dict[str, Run] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def companions(run: Run) -> Companions:
    """The companions of a run: complete, of the same dataset."""
    beside = Companions()
    for role, end in ROLES.items():
        for where in (run.folder.parent / f"{run.name}-{end}", f"{run.name}-{end}"):
            try:
                other = open_run(where)
            except SSTError:
                continue
            if other.recipe.dataset != run.recipe.dataset:
                beside.notes.append(f"{other.name} is of {other.recipe.dataset}, not {run.recipe.dataset}")
            elif not other.complete:
                beside.notes.append(f"{other.name} is not complete and is left out")
            else:
                beside.runs[role] = other
            break
    return beside


def ledger_of(
    run: Run,
    resamples: int = RESAMPLES,
    seed: int = 0,
    more: tuple[Row, ...] = (),
    progress: Progress | None = None,
) -> Ledger:
    """The claims ledger of a run with its companions, its blend weights and the measured approximation.

    Args:
        run: a captured run.
        resamples: question resamples, shuffles and permutations.
        seed: of all three.
        more: rows of claims that were measured elsewhere; they replace those kept with the run.
        progress: called with (analyses done, of how many, the next one).
    """
    tokenizer, kept = tokenizer_of(run), kept_findings(run)
    ledger = claims(
        run,
        **companions(run).runs,
        alpha=blend_of(run),
        approximation=approximation_of(run),
        no_blend=None if run.kind == "sst" else f"a {_said(run.kind)} has no blend",
        token_class=token_classes(tokenizer) if tokenizer is not None else None,
        more=[*{(row.claim.id, row.comparison): row for row in (*kept.rows, *more)}.values()],
        resamples=resamples,
        seed=seed,
        progress=progress,
    )
    return replace(ledger, results=ledger.results | kept.results)


def _said(kind: str | None) -> str:
    """A kind inside a sentence; names keep their capitals."""
    words = kind_words(kind or "backbone")
    return (
        words
        if words.istitle() or words[:2].isupper() or " Transformer" in words
        else words[:1].lower() + words[1:]
    )


def blend_of(run: Run) -> BlendWeights | None:
    """Mean and range of the blend weights of a capture, and where their training started."""
    known = run.manifest["provenance"]
    if "alpha_mean" not in known:
        return None
    low, high = known.get("alpha_quantiles", known["alpha_range"])
    folder = checkpoint_folder(run.recipe.checkpoint) if run.recipe.alpha is None else None
    start = bounds = None
    if folder is not None and (about := folder / "training.json").is_file():
        recipe = json.loads(about.read_text())["recipe"]
        start, bounds = recipe.get("alpha"), recipe.get("alpha_bounds")
    return BlendWeights(known["alpha_mean"], low, high, start, tuple(bounds) if bounds else None)


def approximation_of(run: Run) -> pd.DataFrame | None:
    """Two-pass errors of the run's backbone at several alphas (`sst-interp study run two-pass BACKBONE`), or
    None.

    A trained checkpoint has one blend; the order of the error is told where alpha varies.
    """
    folder = checkpoint_folder(run.recipe.checkpoint)
    backbone = run.recipe.checkpoint
    if folder is not None and (about := folder / "training.json").is_file():
        backbone = json.loads(about.read_text()).get("backbone", {}).get("name", backbone)
    for file in (paths.studies_dir() / "errors.parquet", paths.shipped("studies") / "errors.parquet"):
        if file.is_file():
            again = f"delete it; `sst-interp study run two-pass {backbone}` measures it again"
            table = read_table(file, again, ("model", "layers", "alpha", "alpha_low", "alpha_high"))
            own = table[table["model"].isin({backbone, run.recipe.checkpoint}).to_numpy(dtype=bool)]
            if own["alpha"].nunique() > 1:
                return own
    return None


@dataclass(frozen=True)
class Kept:
    """Findings kept with one capture."""

    rows: list[Row] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)
    """Analysis (`halting`, `routing`, `patching`) -> its result."""
    scores: dict[int, float] = field(default_factory=dict)
    """Question -> score of the probe, from folds that it was not trained on."""


def keep_findings(
    run: Run,
    name: str,
    rows: Sequence[Row],
    made: dict[str, Any],
    results: Mapping[str, Result] | None = None,
    scores: Mapping[int, float] | None = None,
) -> Path:
    """Keep a measurement as `NAME.json`; returns the file.

    Args:
        run: what was measured.
        name: of the measurement, for example `probe`.
        rows: of the ledger.
        made: JSON-ready: what was chosen (seed, permutations ...).
        results: analyses that get a section in the report, by name.
        scores: of a probe, by question, for the report's list of questions.
    """
    shipped = run.folder.parent.resolve() == paths.shipped("runs").resolve()
    own = not shipped and os.access(run.folder, os.W_OK)
    folder = run.folder / FOLDER if own else Path(FOLDER) / run.name
    if own and folder.is_symlink():
        raise SSTError(f"{folder} is a link to somewhere else: nothing is written there", "remove the link")
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "of": capture_of(run),
        "made": made,
        "rows": json_ready(rows),
        "results": {key: KeptResult.of(result).to_json() for key, result in (results or {}).items()},
        **({"scores": {str(q): float(x) for q, x in scores.items()}} if scores else {}),
    }
    replace_json(folder / f"{name}.json", contents)
    return folder / f"{name}.json"


def kept_findings(run: Run) -> Kept:
    """What is kept of this capture; the working folder's goes before what came with the run."""
    rows: dict[tuple[str, str], Row] = {}
    results: dict[str, Result] = {}
    scores: dict[int, float] = {}
    for folder in (run.folder / FOLDER, Path(FOLDER) / run.name):
        for file in sorted(folder.glob("*.json")):
            kept = _kept(file, run)
            rows |= {(row.claim.id, row.comparison): row for row in kept.rows}
            results |= kept.results
            scores |= kept.scores
    return Kept(list(rows.values()), results, scores)


def capture_of(run: Run) -> str:
    """Which capture a run is: `manifest.content_hash`."""
    return content_hash(run.manifest)


def _kept(file: Path, run: Run) -> Kept:
    """What one file has of this capture; of a damaged one, rows that say so."""
    again = "delete it, or measure again"
    try:
        contents = visible_texts(read_json(file, again))
        try:
            if contents["of"] != capture_of(run):
                return Kept()
            results: dict[str, Result] = {
                name: _result(values) for name, values in contents.get("results", {}).items()
            }
            scores = {int(q): float(x) for q, x in contents.get("scores", {}).items()}
            return Kept([_row(values, file.stem, run.name) for values in contents["rows"]], results, scores)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unreadable(file, error, again) from None
    except SSTError as error:
        lost = not_comparable(
            f"{error.message}; delete it, or `sst-interp {file.stem} --run {run.name}` again"
        )
        measured = [entry.claim for entry in CLAIMS.values() if entry.measured == file.stem]
        return Kept([Row(claim, EVERYWHERE, lost) for claim in measured])


RENAMED = {"C16": "C16b", "C16b": "C16"}
"""Claims of version 0.1 -> as they are called now."""


def _row(values: dict[str, Any], command: str, name: str) -> Row:
    """A kept row, with the claim as it is worded now. One of version 0.1 has a verdict and no grade."""
    finding, id = dict(values["finding"]), str(values["claim"]["id"])
    figure = finding.pop("figure")
    numbers = {k: math.nan if figure[k] is None else figure[k] for k in ("estimate", "low", "high")}
    interval = Interval(**(figure | numbers))
    if "grade" in finding:
        finding["p"] = math.nan if finding["p"] is None else finding["p"]
        if finding["grade"] not in GRADES or not isinstance(finding["here"], str):
            raise TypeError("a finding has no grade")
        return Row(CLAIMS[id].claim, values["comparison"], Finding(figure=interval, **finding))
    id = RENAMED.get(id, id)
    verdict, _, reason = finding["verdict"].partition(": ")
    here, control = finding["here"], finding["control"]
    if id == "C16" and interval.known:
        found = graded(
            Part("log KL, shifted less stable at equal norm", interval, low=0), least=40, note=control
        )
    else:
        again = f"kept by version 0.1 without what the rule asks: `sst-interp {command} --run {name}` again"
        found = not_comparable(reason if verdict == "not testable" else again, here, control)
    return Row(CLAIMS[id].claim, values["comparison"], found)


def _result(values: dict[str, Any]) -> KeptResult:
    result = KeptResult.from_json(values)
    if not isinstance(result.verdict, str):
        raise TypeError("a verdict is no text")
    result.figures()  # plotly refuses what it did not draw
    return result
