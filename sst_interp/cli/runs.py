"""`sst-interp capture`, `runs` and what a run shows: `basin-shifts`, `claims`, `report`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sst_interp import __version__, paths
from sst_interp.cli.common import (
    JsonFlag,
    RayAddress,
    Resamples,
    RunOption,
    Seed,
    Workers,
    fleet_of,
    given_path,
    place,
    print_json,
    progress,
    stopping,
    takes_placement,
    takes_run,
    whole_numbers,
)
from sst_interp.errors import SSTError
from sst_interp.files import check_output
from sst_interp.models.choices import COMPARISONS
from sst_interp.runs.provenance import kind_words
from sst_interp.tables import print_table, say, write_text

HtmlOption = Annotated[
    Path | None, place("FILE", "Where the report goes; default: report.html in the run's folder.", "--html")
]
FreshFlag = Annotated[bool, typer.Option("--fresh", help="Erase the run and capture it anew.")]


@takes_run
@takes_placement
def capture(
    placed: dict[str, str],
    run: RunOption,
    keep: Annotated[str | None, typer.Option(help="States: none, position0, shifts or all.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key; can be repeated.")
    ] = None,
    fresh: FreshFlag = False,
    workers: Workers = None,
    ray: RayAddress = None,
    verify: Annotated[
        int | None, typer.Option(min=0, help="Hash every shard; capture so many batches again, and compare.")
    ] = None,
    mixed: Annotated[
        bool, typer.Option("--mixed", help="Go on with batches of other hardware or versions.")
    ] = False,
) -> None:
    """Capture a run: every question at every depth, measured while it is generated.

    A capture that was interrupted, or a run with a damaged shard, goes on with what is missing. With workers
    every batch has the same bytes as without (docs/cluster.md).

    Examples:
        sst-interp capture demo

        sst-interp capture demo --workers 2

        sst-interp capture my-recipe.toml --keep all

        sst-interp capture demo --set questions=8 --set depths=1,2 --set name=demo-8
    """
    from sst_interp.runs.capture import capture as capture_run
    from sst_interp.runs.recipe import find_recipe

    recipe = find_recipe(run, captured=not fresh)
    if settings or keep is not None:
        recipe = recipe.with_settings([*(settings or []), *([f"keep={keep}"] if keep is not None else [])])
    recipe = replace(recipe, **placed)  # pyright: ignore[reportArgumentType]
    with stopping():
        fleet = fleet_of(workers, ray)
        captured = capture_run(recipe, fresh=fresh, fleet=fleet, verify=verify, mixed=mixed)
    say(f"captured {len(captured.questions['question'].unique())} questions in {captured.folder}")


def publish(
    run: RunOption,
    out: Annotated[Path, typer.Argument(parser=given_path, metavar="OUT", help="A new folder.")],
    bits: Annotated[int, typer.Option(min=4, max=24, help="Significant bits of the floats in pairs.")] = 10,
    top: Annotated[int | None, typer.Option(min=0, help="Likely tokens per step; default: all.")] = None,
    iterations: Annotated[str, typer.Option(help="Whose states at position 0 are kept; '' for none.")] = "1",
    comparison: Annotated[
        list[str] | None, typer.Option(help="Whose rows of pairs are kept; may be repeated. Default: all.")
    ] = None,
    right_only: Annotated[
        bool, typer.Option("--right-only", help="Keep states only of questions that are right at depth 1.")
    ] = False,
) -> None:
    """Copy a complete run, smaller: measurements that others can read, check and pass round.

    Example:
        sst-interp publish --run gpqa published/gpqa --iterations 1,4
    """
    from sst_interp.runs.store import open_run
    from sst_interp.runs.store import publish as publish_run

    kept = whole_numbers("--iterations", iterations, "1,4") if iterations.strip() else []
    original = open_run(run)
    with progress(f"publishing {original.name}", "batch", 0) as show:
        pairs = tuple(comparison) if comparison else None
        copy = publish_run(original, out, bits, top, tuple(kept), show, pairs, right_only)
    say(f"published: {copy.folder}, {copy.summary()['bytes'] / 1e6:.1f} MB")


def runs(as_json: JsonFlag = False) -> None:
    """List runs and recipes: yours, and those that ship.

    Example:
        sst-interp runs --json
    """
    from sst_interp.runs.store import list_runs

    rows = list_runs()
    if as_json:
        return print_json(rows)
    columns = "name", "state", "kind", "checkpoint", "dataset", "questions", "depths", "size", "where"
    shown = [
        row
        | {key: row[key] or "" for key in ("checkpoint", "dataset")}
        | {"kind": kind_words(row["kind"]), "depths": " ".join(map(str, row["depths"] or []))}
        | {"questions": row["questions"] or ("all" if row["dataset"] else "")}
        | {"size": f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] else ""}
        for row in rows
    ]
    print_table([{column: row[column] for column in columns} for row in shown])


def datasets(as_json: JsonFlag = False) -> None:
    """List the datasets that recipes can name; a .csv or .jsonl path or hf:OWNER/NAME:CONFIG works, too.

    Example:
        sst-interp datasets
    """
    from sst_interp.questions import known_datasets

    columns = "splits", "licence", "restricted", "about"
    rows: list[dict[str, Any]] = [
        {"name": name} | {key: getattr(known, key) for key in columns}
        for name, known in known_datasets().items()
    ]
    if as_json:
        return print_json(rows)
    for row in rows:
        row |= {"splits": " ".join(row["splits"]), "restricted": "yes" if row["restricted"] else ""}
    print_table(rows)


@takes_run
def basin_shifts(
    run: RunOption,
    html: HtmlOption = None,
    json_file: Annotated[
        Path | None, place("FILE", "Also write the results as JSON; `-` prints them instead.", "--json")
    ] = None,
    fresh: FreshFlag = False,
) -> None:
    """Where does extra iteration change the state, and where does nothing happen?

    Captures the run first if it has no data (or not all of it), then classifies every (position, layer) pair
    as stable or shifted under each of the three comparisons, prints a summary and writes an HTML report.

    Examples:
        sst-interp basin-shifts demo

        sst-interp basin-shifts --run demo --json - | jq .teacher_forced.share
    """
    from sst_interp.findings.report.page import write_report

    for file in (html, json_file):
        if file is not None and str(file) != "-":
            check_output(file)
    captured = captured_run(run, fresh)
    page = _report_path(captured, html)
    check_output(page)
    ledger = ledger_with_bar(captured)
    as_json = json.dumps({name: _as_dict(ledger, name) for name in COMPARISONS}, indent=2)
    if str(json_file) == "-":
        print(as_json)
    else:
        _print_basin_shifts(captured, ledger)
        print_table([{"claim": r.claim.id, "in words": r.claim.words, "grade": r.grade} for r in ledger.rows])
        say(f"\n{ledger.verdict}\n`sst-interp claims --run {run}` says more\n")
        if json_file is not None:
            write_text(json_file, as_json + "\n")
    say(f"report: {write_report(captured, page, ledger)}", sys.stderr if str(json_file) == "-" else None)
    _exit_if_failed(ledger, captured)


@takes_run
def claims(
    run: RunOption,
    as_json: JsonFlag = False,
    resamples: Resamples = 2000,
    seed: Seed = 0,
    document: Annotated[Path | None, typer.Option(help="Also fill a Markdown file's places.")] = None,
) -> None:
    """The paper's claims beside a run: its figure, this run's numbers, a grade by a stated rule.

    Captures the run first if it has no data. Companion runs that are there are used: NAME-blend-off (start-up
    control), NAME-reshuffled (content), NAME-baseline (matched baseline), NAME-deep (more depths), NAME-lens.

    Examples:
        sst-interp claims gpqa

        sst-interp claims --run gpqa --json | jq '.table[] | {claim, grade, why}'
    """
    from sst_interp.tables import check_document, fill

    if document is not None:
        check_document(document)
    captured = captured_run(run, fresh=False)
    ledger = ledger_with_bar(captured, resamples, seed)
    if document is not None:
        filled = fill(document, ledger.blocks(), others=True)
        say(f"{document}: {', '.join(filled) or 'no place for this run'}", sys.stderr)
    if as_json:
        print_json(ledger.to_dict())
    else:
        for row in ledger.rows:
            say(f"{row.claim.id}: {row.claim.words}")
            say(f"    paper     {row.claim.paper}\n    this run  {row.finding.here or '-'}")
            say(f"    grade     {row.finding.verdict}\n    rule      supported if {row.claim.rule}")
            for name, words in (
                ("beside", row.finding.control),
                ("checks", row.checked),
                ("errs", row.rates),
            ):
                if words:
                    say(f"    {name:9} {words}")
        say()
        print_table([{"claim": r.claim.id, "in words": r.claim.words, "grade": r.grade} for r in ledger.rows])
        say(f"\n{ledger.verdict}")
    _exit_if_failed(ledger, captured)


@takes_run
def report(
    run: RunOption,
    html: HtmlOption = None,
    beside: Annotated[str | None, typer.Option(help="Another run on the same questions.")] = None,
    notes: Annotated[
        Path | None, place("FILE", "Notes that a report exported: shown to all.", "--notes")
    ] = None,
) -> None:
    """Write the HTML report of a captured run: one file that works offline.

    Examples:
        sst-interp report demo --html demo.html

        sst-interp report --run gpqa --beside gpqa-untrained --notes notes.json
    """
    from sst_interp.findings.report.beside import Beside
    from sst_interp.findings.report.notes import read_notes
    from sst_interp.findings.report.page import capture as capture_of
    from sst_interp.findings.report.page import write_report
    from sst_interp.runs.store import open_run

    captured: Any = open_run(run)
    page = _report_path(captured, html)
    check_output(page)
    more: dict[str, Any] = {}
    if notes is not None:
        more["notes"] = read_notes(notes, capture_of(captured))
    other: Any = open_run(beside) if beside is not None else None
    ledger = ledger_with_bar(captured)
    if other is not None:
        more["beside"] = Beside(other, ledger_with_bar(other))
    say(f"report: {write_report(captured, page, ledger, **more)}")
    _exit_if_failed(ledger, captured)


def captured_run(name: str, fresh: bool) -> Any:
    """The run, captured if need be. A complete run (or a shipped one) is opened as it is."""
    from sst_interp.runs.recipe import find_recipe
    from sst_interp.runs.store import open_run

    if not fresh and not name.endswith(".toml"):
        try:
            opened = open_run(name)
        except SSTError as error:
            if "no data yet" not in error.message:
                raise
        else:
            if opened.complete:
                _note_changed_recipe(opened)
                return opened
    recipe = find_recipe(name, captured=not fresh)
    with stopping():
        from sst_interp.runs.capture import capture as capture_run

        return capture_run(recipe, fresh=fresh)


def _note_changed_recipe(run: Any) -> None:
    """Say so if the recipe of that name is no longer what the run was captured with."""
    from sst_interp.runs.recipe import find_recipe

    try:
        changed = run.recipe.differences(find_recipe(run.name, captured=False))
    except SSTError:
        return
    for key, then, now in changed:
        say(f"note: {run.name} was captured with {key} = {then!r}; its recipe now says {now!r}", sys.stderr)
    if changed:
        say("  --fresh captures it again", sys.stderr)


def ledger_with_bar(run: Any, resamples: int = 2000, seed: int = 0) -> Any:
    """The claims ledger of a run, with a bar over its analyses."""
    from sst_interp.findings.of_run import companions, ledger_of

    run.check()
    beside = companions(run)
    for note in beside.notes:
        say(f"note: {note}", sys.stderr)
    with progress(f"analysing {run.name}", "analysis", 1) as show:
        return ledger_of(run, resamples, seed, progress=show)


def _report_path(run: Any, html: Path | None) -> Path:
    shipped = run.folder.parent.resolve() == paths.shipped("runs").resolve()
    if shipped or not os.access(run.folder, os.W_OK):
        return html or Path(f"{run.name}-report.html")
    return html or run.folder / "report.html"


def _as_dict(ledger: Any, comparison: str) -> dict[str, Any]:
    """The basin shifts of a comparison as JSON, or why there are none."""
    key = f"basin_shifts.{comparison}"
    if key in ledger.results:
        return ledger.results[key].to_dict()
    return {"result": "BasinShifts", "verdict": f"not testable: {ledger.missing[key]}."}


def _print_basin_shifts(run: Any, ledger: Any) -> None:
    n = run.questions["question"].nunique()
    say(f"{run.name}: {kind_words(run.kind)}, {run.recipe.checkpoint}, {n} questions\n")
    rows, columns = [], ("pair", "shifted", "threshold", "below 0.99", "modes")
    for name in COMPARISONS:
        row = {"comparison": name} | dict.fromkeys(columns, "-")
        if (shifts := ledger.results.get(f"basin_shifts.{name}")) is not None:
            row["pair"], row["threshold"] = f"{shifts.a} vs {shifts.b}", f"{shifts.threshold:.4g}"
            row["shifted"] = shifts.share.text(percent=True)
            row["below 0.99"] = shifts.share_at_paper.text(percent=True)
            row["modes"] = shifts.distribution.modes.count
        rows.append(row)
    print_table(rows)
    for name in COMPARISONS:
        say(f"\n{name}: {_as_dict(ledger, name)['verdict']}")
    say()


def _exit_if_failed(ledger: Any, run: Any) -> None:
    """Say which analyses crashed, and leave with exit code 3: what was printed is not the whole ledger."""
    if not ledger.failed:
        return
    for name, error in ledger.failed.items():
        say(f"failed: {name}: {error}", sys.stderr)
    words = f"  a fault of sst-interp {__version__}, not a finding: please report these lines, with "
    say(f"{words}`sst-interp claims --run {run.name}`, to its issues", sys.stderr)
    raise typer.Exit(3)
