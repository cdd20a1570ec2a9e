"""Findings that were measured apart from the claims ledger, kept with their run.

The halting probe (C12, C13) and causal patching (C16) take minutes, so their commands keep what they found,
rows of the ledger and whole results: in the run's own folder under `findings/`, or for a run that ships in
`findings/NAME` of the working folder. Kept findings are of one capture: after another one they are not shown.
A damaged file costs its own rows and nothing else: they say which file it is and what to type. Texts of a
file are data: control and bidi characters in them show and do nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sst_interp import places
from sst_interp.analyses.ledger.rules import C12, C13, C16, C16B, EVERYWHERE, Claim, Finding, Row, untestable
from sst_interp.analyses.result import KeptResult, Result
from sst_interp.analyses.statistics.bootstrap import Interval
from sst_interp.durable import replace_json
from sst_interp.errors import SSTError
from sst_interp.guarded import read_json, unreadable
from sst_interp.manifest import content_hash
from sst_interp.printing import visible_texts
from sst_interp.run import Run

FOLDER = "findings"
MEASURED = {"probe": (C12, C13), "patching": (C16, C16B)}
"""Measurement, which is the command's name too -> the claims it has rows of."""


@dataclass(frozen=True)
class Kept:
    """What was kept of one capture."""

    rows: list[Row] = field(default_factory=list)
    """Rows of the claims ledger."""
    results: dict[str, Result] = field(default_factory=dict)
    """Analysis (`halting`, `routing`, `patching`) -> its result, as far as it can be shown again."""


def keep_findings(
    run: Run,
    name: str,
    rows: Sequence[Row],
    made: dict[str, Any],
    results: Mapping[str, Result] | None = None,
) -> Path:
    """Keep a measurement as `NAME.json`; returns the file.

    Args:
        run: what was measured.
        name: of the measurement, for example `probe`.
        rows: of the ledger.
        made: JSON-ready: what was chosen (seed, permutations ...).
        results: analyses that get a section in the report, by name.
    """
    shipped = run.folder.parent.resolve() == places.shipped("runs").resolve()
    own = not shipped and os.access(run.folder, os.W_OK)
    folder = run.folder / FOLDER if own else Path(FOLDER) / run.name
    if own and folder.is_symlink():
        raise SSTError(f"{folder} is a link to somewhere else: nothing is written there", "remove the link")
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "of": capture_of(run),
        "made": made,
        "rows": [_plain(asdict(row)) for row in rows],
        "results": {key: KeptResult.of(result).to_json() for key, result in (results or {}).items()},
    }
    replace_json(folder / f"{name}.json", contents)
    return folder / f"{name}.json"


def kept_findings(run: Run) -> Kept:
    """What is kept of this capture; the working folder's goes before what came with the run."""
    rows: dict[tuple[str, str], Row] = {}
    results: dict[str, Result] = {}
    for folder in (run.folder / FOLDER, Path(FOLDER) / run.name):
        for file in sorted(folder.glob("*.json")):
            kept = _kept(file, run)
            rows |= {(row.claim.id, row.comparison): row for row in kept.rows}
            results |= kept.results
    return Kept(list(rows.values()), results)


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
            return Kept([_row(values) for values in contents["rows"]], results)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise unreadable(file, error, again) from None
    except SSTError as error:
        lost = untestable(f"{error.message}; delete it, or `sst-interp {file.stem} --run {run.name}` again")
        return Kept([Row(claim, EVERYWHERE, lost) for claim in MEASURED.get(file.stem, ())])


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(values: dict[str, Any]) -> Row:
    claim, finding = dict(values["claim"]), dict(values["finding"])
    figure = finding.pop("figure")
    numbers = {k: math.nan if figure[k] is None else figure[k] for k in ("estimate", "low", "high")}
    claim["value"] = math.nan if claim["value"] is None else claim["value"]
    if not isinstance(finding["verdict"], str):
        raise TypeError("a verdict is no text")
    return Row(
        Claim(**claim), values["comparison"], Finding(figure=Interval(**(figure | numbers)), **finding)
    )


def _result(values: dict[str, Any]) -> KeptResult:
    result = KeptResult.from_json(values)
    if not isinstance(result.verdict, str):
        raise TypeError("a verdict is no text")
    result.figures()  # plotly refuses what it did not draw
    return result
