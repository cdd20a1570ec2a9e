"""Rows of the claims ledger that were measured apart from it, kept with their run.

The halting probe (C12, C13) and causal patching (C16) take minutes, so their commands keep what they found:
in the run's own folder under `findings/`, or for a run that ships in `findings/NAME` of the working folder.
Kept rows are of one capture: after another one they are not shown.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sst_interp import places
from sst_interp.analyses.ledger.rules import Claim, Finding, Row
from sst_interp.analyses.statistics.resampling import Interval
from sst_interp.durable import replace_json
from sst_interp.run import Run

FOLDER = "findings"


def keep_rows(run: Run, name: str, rows: Sequence[Row], made: dict[str, Any]) -> Path:
    """Keep rows as `NAME.json`; returns the file.

    Args:
        run: what they were measured on.
        name: of the measurement, for example `probe`.
        rows: of the ledger.
        made: JSON-ready: what was chosen (seed, permutations ...).
    """
    shipped = run.folder.parent.resolve() == places.shipped("runs").resolve()
    own = not shipped and os.access(run.folder, os.W_OK)
    folder = run.folder / FOLDER if own else Path(FOLDER) / run.name
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"of": capture_of(run), "made": made, "rows": [_plain(asdict(row)) for row in rows]}
    replace_json(folder / f"{name}.json", contents)
    return folder / f"{name}.json"


def kept_rows(run: Run) -> list[Row]:
    """The rows kept of this capture; the working folder's go before those that came with the run."""
    found: dict[tuple[str, str], Row] = {}
    for folder in (run.folder / FOLDER, Path(FOLDER) / run.name):
        for file in sorted(folder.glob("*.json")):
            contents = json.loads(file.read_text())
            if contents["of"] == capture_of(run):
                for row in map(_row, contents["rows"]):
                    found[row.claim.id, row.comparison] = row
    return list(found.values())


def capture_of(run: Run) -> str:
    """sha256 over the checksums of a run's shards: which capture it is."""
    files = {
        name: entry["sha256"] for shards in run.manifest["shards"].values() for name, entry in shards.items()
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


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
    return Row(
        Claim(**claim), values["comparison"], Finding(figure=Interval(**(figure | numbers)), **finding)
    )
