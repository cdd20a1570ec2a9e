"""`sst-interp probe`: can it be told from position 0 whether thinking longer will help or break it?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sst_interp.experiments.probe.data import RULES

if TYPE_CHECKING:
    import pandas as pd

    from sst_interp.experiments.probe.saved import Probed

LABELS = "; ".join(f"{name}: {rule.definition}" for name, rule in RULES.items())
PROBE_COLUMNS = ("auc", "sensitivity", "specificity", "balanced", "brier", "probe_minus")
"""Of the table of probes: each with `_low` and `_high`."""
POLICY_COLUMNS = ("accuracy", "passes", "beyond")
COUNTS = ("broken", "mended", "conservative")


def probe(
    run: Annotated[
        str,
        typer.Option("--run", "-r", help="Name of a captured run (`sst-interp runs` lists them), or a path."),
    ],
    layer: Annotated[
        str, typer.Option(help="Layer to read, 0-based; `auto` chooses one inside each fold.")
    ] = "auto",
    label: Annotated[str, typer.Option(help=f"What is to be told. {LABELS}.")] = "must-halt",
    permutations: Annotated[
        int, typer.Option(min=0, help="Labellings permuted through everything; 0 tests nothing.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, initial weights and permutations.")] = 0,
    save: Annotated[
        str | None, typer.Option(help="Folder to keep the probe in (probe.json, probe.safetensors).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON instead of tables and verdicts.")
    ] = False,
) -> None:
    """Train a probe of the state at position 0, validate it, and route by it.

    The probe reads the state of each question after the first iteration of position 0, before anything is
    written or iterated, and tells which questions are to halt there. Layer, dimensions and penalty are
    chosen inside each fold; the p-value permutes the labels through all of that. Beside the probe stand
    plain probes, always-halt and never-halt; beside its routing, flat depths and the oracle.

    The run must have kept its states at position 0 (`keep = "position0"`, the default). Where the model is
    no better than guessing, right and wrong are noise: ask for `--label answer-changed`. What `must-halt`
    shows is kept for the claims ledger (C12, C13).

    Examples:
        sst-interp probe --run gpqa

        sst-interp probe --run gpqa --label answer-changed --layer 15 --permutations 200

        sst-interp probe --run arc-challenge --save probes/arc --json > probe.json
    """
    from tqdm import tqdm

    from sst_interp.experiments.probe import saved
    from sst_interp.experiments.probe.fit import Design
    from sst_interp.findings.experiments import PAPER_LABEL, probe_rows
    from sst_interp.findings.of_run import keep_findings
    from sst_interp.runs import open_run

    opened: Any = open_run(run)
    if save is not None:
        saved.check_save(save)
    if not opened.complete:
        captured = opened.questions["question"].nunique()
        print(f"note: {opened.name} is not complete: {captured} questions so far", file=sys.stderr)
    with tqdm(total=permutations, desc=f"probing {opened.name}", unit="permutation", file=sys.stderr) as bar:

        def show(what: str, done: int, of: int) -> None:
            bar.update(done - bar.n)

        probed = saved.probe_run(opened, label, layer, permutations, Design(seed=seed), progress=show)
    print(json.dumps(as_dict(probed), indent=2) if as_json else as_text(probed))
    if label == PAPER_LABEL:
        made = {"label": label, "layer": layer, "permutations": permutations, "seed": seed}
        rows = probe_rows(probed.halting, probed.routing)
        results = {"halting": probed.halting, "routing": probed.routing}
        kept = keep_findings(opened, "probe", rows, made, results)
        print(f"claims C12 and C13: {kept}", file=sys.stderr)
    if save is not None:
        print(f"probe: {probed.probe.save(save)}", file=sys.stderr)


def as_dict(probed: Probed) -> dict[str, Any]:
    """JSON-ready: both results, the rows of the claims ledger, and what was trained on every question."""
    from sst_interp.findings.experiments import probe_rows

    rows = [
        {
            "claim": row.claim.id,
            "in words": row.claim.words,
            "paper": row.claim.paper,
            "this run": row.finding.here,
            "holds if": row.claim.rule,
            "verdict": row.finding.verdict,
            "control": row.finding.control,
        }
        for row in probe_rows(probed.halting, probed.routing)
    ]
    trained = {"layer": probed.probe.layer, "dims": probed.probe.dims.tolist()}
    return {
        "halting": probed.halting.to_dict(),
        "routing": probed.routing.to_dict(),
        "claims": rows,
        "probe": trained,
    }


def as_text(probed: Probed) -> str:
    """Tables, verdicts and the rows of the claims ledger."""
    from sst_interp.findings.experiments import probe_rows

    parts = [
        _table(probed.halting.table, ("name",), PROBE_COLUMNS),
        _table(probed.halting.checks, ("name",), ("value",), ("p", "knowing_nothing")),
        _table(probed.halting.readings, ("whose", "found", "of", "against"), (), ("rate", "p")),
        probed.halting.verdict,
        _table(probed.routing.table, ("name",), POLICY_COLUMNS, COUNTS),
        probed.routing.verdict,
    ]
    for row in probe_rows(probed.halting, probed.routing):
        parts.append(f"{row.claim.id} ({row.claim.words}): {row.finding.verdict}. {row.finding.here}")
    return "\n\n".join(parts)


def _table(
    table: pd.DataFrame, names: tuple[str, ...], intervals: tuple[str, ...], plain: tuple[str, ...] = ()
) -> str:
    """A row per probe or policy, every number with its interval."""
    import pandas as pd

    def words(value: float, low: float, high: float) -> str:
        if value != value:
            return ""
        return f"{value:.3g}" if low == high or low != low else f"{value:.3g} [{low:.3g}, {high:.3g}]"

    shown: dict[str, Any] = {name: table[name] for name in names}
    for name in intervals:
        ends = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
        shown[name.replace("_", " ")] = [words(*row) for row in ends]
    shown |= {name.replace("_", " "): table[name] for name in plain}
    return pd.DataFrame(shown).to_string(index=False, na_rep="", float_format="{:.3g}".format)
