"""`sst-interp compare`, `probe` and `patch`: what needs a model again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sst_interp.cli.common import JsonFlag, Resamples, Seed, given_path, stopping
from sst_interp.errors import Untestable
from sst_interp.experiments.probe.data import RULES
from sst_interp.files import check_output
from sst_interp.tables import print_table, say, write_text

if TYPE_CHECKING:
    import pandas as pd

    from sst_interp.experiments.contraction import KindsContraction
    from sst_interp.experiments.kinds import Kinds, KindsAnswers
    from sst_interp.experiments.probe.saved import Probed


def compare(
    runs: Annotated[
        str,
        typer.Option("--runs", "-r", help="Captured runs by name, with commas; the first is the reference."),
    ],
    contraction: Annotated[
        int,
        typer.Option(min=0, help="Also load the models and measure sweeps on so many questions' text."),
    ] = 0,
    as_json: JsonFlag = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", parser=given_path, metavar="FILE", help="Also write a page with the figures."),
    ] = None,
    document: Annotated[
        Path | None, typer.Option(help="Also fill the tables in a Markdown file (docs/kinds.md).")
    ] = None,
    resamples: Resamples = 2000,
    seed: Seed = 0,
) -> None:
    """Kinds of models beside one another: how much does depth change the state of each?

    The runs must be of the same questions, depths and budget. Every comparison is on its own.

    Examples:
        sst-interp compare --runs kinds-backbone,kinds-sst,kinds-looped

        sst-interp compare --runs kinds-backbone,kinds-sst --contraction 8 --json
    """
    from sst_interp.experiments.contraction import check_texts, contraction_of
    from sst_interp.experiments.kinds import answers_of, compare_runs
    from sst_interp.findings.report.page import result_page
    from sst_interp.tables import check_document, fill, markdown

    names = [name.strip() for name in runs.split(",") if name.strip()]
    if html is not None:
        check_output(html)
    if document is not None:
        check_document(document)
    if contraction:
        check_texts(names, contraction)
    asked: dict[str, Callable[[], Kinds | KindsAnswers | KindsContraction]] = {
        "shares": lambda: compare_runs(names, resamples, seed),
        "answers": lambda: answers_of(names, resamples, seed),
    }
    if contraction:
        asked["contraction"] = lambda: contraction_of(names, contraction, resamples, seed)
    results, missing = {}, {}
    for name, measure in asked.items():
        try:
            results[name] = measure()
        except Untestable as error:
            missing[name] = f"not testable: {error.message}."
    if html is not None:
        write_text(html, result_page(f"{', '.join(names)}: kinds", list(results.values())))
    if document is not None:
        tables = {name: markdown(result.shown) for name, result in results.items()}
        verdicts = {name: result.verdict for name, result in results.items()} | missing
        fill(document, tables | {f"{name} verdict": words for name, words in verdicts.items()}, others=True)
    if as_json:
        shown = {name: result.to_dict() for name, result in results.items()}
        print(json.dumps(shown | {name: {"verdict": words} for name, words in missing.items()}, indent=2))
        return
    for result in results.values():
        print_table(result.shown)
        say(f"\n{result.verdict}\n")
    for name, words in missing.items():
        say(f"{name}: {words}")
    if html is not None:
        say(f"page: {html}")


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
    from sst_interp.experiments.probe import saved
    from sst_interp.experiments.probe.fit import Design
    from sst_interp.findings.answers import PAPER_LABEL, probe_rows
    from sst_interp.findings.of_run import keep_findings
    from sst_interp.runs.store import open_run
    from sst_interp.tables import bar as progress_bar

    opened: Any = open_run(run)
    if save is not None:
        saved.check_save(save)
    if not opened.complete:
        captured = opened.questions["question"].nunique()
        say(f"note: {opened.name} is not complete: {captured} questions so far", sys.stderr)
    with progress_bar(f"probing {opened.name}", total=permutations, unit="permutation") as bar:

        def show(what: str, done: int, of: int) -> None:
            bar.update(done - bar.n)

        probed = saved.probe_run(opened, label, layer, permutations, Design(seed=seed), progress=show)
    print(json.dumps(as_dict(probed), indent=2) if as_json else as_text(probed))
    if label == PAPER_LABEL:
        made = {"label": label, "layer": layer, "permutations": permutations, "seed": seed}
        rows = probe_rows(probed.halting, probed.routing)
        results = {"halting": probed.halting, "routing": probed.routing}
        kept = keep_findings(opened, "probe", rows, made, results)
        say(f"claims C12 and C13: {kept}", sys.stderr)
    if save is not None:
        say(f"probe: {probed.probe.save(save)}", sys.stderr)


def as_dict(probed: Probed) -> dict[str, Any]:
    """JSON-ready: both results, the rows of the claims ledger, and what was trained on every question."""
    from sst_interp.findings.answers import probe_rows

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
    from sst_interp.findings.answers import probe_rows

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


def patch(
    run: Annotated[str, typer.Option("--run", "-r", help="Name of a captured run, or a path.")],
    questions: Annotated[int, typer.Option(min=1, help="How many; more go on from fewer.")] = 40,
    out: Annotated[
        Path | None, typer.Option(parser=given_path, help="Folder of the rows; default: patching/RUN.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers patched alone, spread evenly.")] = 6,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written after the patched position.")] = 6,
    as_json: JsonFlag = False,
) -> None:
    """Put one depth's state in the place of the other's and see whether the output follows.

    Each question is kept as it is finished: the same command goes on from there.

    Example:
        sst-interp patch --run arc-challenge --questions 40
    """
    from sst_interp.experiments.patching.finding import patching
    from sst_interp.experiments.patching.run import Plan, patch_run
    from sst_interp.findings.answers import patching_rows
    from sst_interp.findings.of_run import keep_findings
    from sst_interp.runs.store import open_run
    from sst_interp.tables import bar as progress_bar

    opened = open_run(run)
    folder = out or Path("patching") / opened.name
    bar = progress_bar(f"patching {opened.name}", total=questions, unit="question")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar, stopping("what was patched is kept: the same command goes on from there"):
        rows = patch_run(opened, folder, questions, Plan(layers=layers, new_tokens=tokens), progress=show)
    result = patching(rows)
    made = {"questions": questions, "layers": layers, "tokens": tokens}
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        say(result.table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
        say(f"\n{result.verdict}\n\nrows: {folder}")
    kept = keep_findings(opened, "patching", patching_rows(result), made, {"patching": result})
    say(f"claim C16: {kept}", sys.stderr)
