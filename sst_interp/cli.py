"""The command line: thin over the same functions a notebook calls.

A mistake that a person can put right prints one line that says what is wrong and one that says what to
type, without a traceback, and exits with code 2. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import sst_interp
from sst_interp import places
from sst_interp.approximation.commands import app as approximation_app
from sst_interp.choices import COMPARISONS
from sst_interp.errors import SSTError
from sst_interp.patching.commands import patch
from sst_interp.printing import print_table, write_text
from sst_interp.probe.commands import probe

app = typer.Typer(
    name="sst-interp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Measure language models that think in latent space.\n\n"
    "Start with: `sst-interp basin-shifts --run demo`",
)

RunOption = Annotated[
    str,
    typer.Option("--run", "-r", help="Name of a run or recipe (`sst-interp runs` lists them), or a path."),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", help="Where the report goes; default: report.html in the run's folder."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
FreshFlag = Annotated[
    bool, typer.Option("--fresh", help="Erase what the run already has and capture it anew.")
]


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options that are not of one command."""
    if version:
        print(f"sst-interp {sst_interp.__version__}")
        raise typer.Exit


@app.command("basin-shifts")
def basin_shifts(
    run: RunOption,
    html: HtmlOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results as JSON; `-` prints them instead.")
    ] = None,
    fresh: FreshFlag = False,
) -> None:
    """Where does extra iteration change the state, and where does nothing happen?

    Captures the run first if it has no data (or not all of it), then classifies every (position, layer) pair
    as stable or shifted under each of the three comparisons, prints a summary and writes an HTML report.

    Examples:
        sst-interp basin-shifts --run demo

        sst-interp basin-shifts --run demo --json - | jq .replayed.share
    """
    from sst_interp.analyses.basin_shifts import BasinShifts
    from sst_interp.report import write_report

    captured = _captured(run, fresh)
    ledger = _ledger(captured)
    found = {name: ledger.results.get(f"basin_shifts.{name}") for name in COMPARISONS}
    results = {name: result for name, result in found.items() if isinstance(result, BasinShifts)}
    as_json = json.dumps({name: result.to_dict() for name, result in results.items()}, indent=2)
    if str(json_file) == "-":
        print(as_json)
    else:
        _print_basin_shifts(captured, results)
        print_table(ledger.by_claim)
        print(f"\n{ledger.verdict}\n`sst-interp claims --run {run}` says more\n")
        if json_file is not None:
            write_text(json_file, as_json + "\n")
    written = write_report(captured, _report_path(captured, html), ledger)
    print(f"report: {written}", file=sys.stderr if str(json_file) == "-" else sys.stdout)


@app.command()
def claims(
    run: RunOption,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole ledger as JSON.")] = False,
    resamples: Annotated[int, typer.Option(min=2, help="Question resamples, shuffles, permutations.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of all three.")] = 0,
    document: Annotated[
        Path | None, typer.Option(help="Also fill the places of this run in a Markdown file (docs/found.md).")
    ] = None,
) -> None:
    """The paper's claims beside a run: its figure, this run's with its interval, a verdict by a stated rule.

    Captures the run first if it has no data. Companion runs that are there are used: NAME-blend-off (start-up
    control), NAME-reshuffled (content), NAME-baseline (matched baseline), NAME-deep (more depths), NAME-lens.

    Examples:
        sst-interp claims --run gpqa

        sst-interp claims --run gpqa --json | jq '.table[] | {claim, comparison, verdict}'
    """
    captured = _captured(run, fresh=False)
    ledger = _ledger(captured, resamples, seed)
    if document is not None:
        from sst_interp.documents import fill

        filled = fill(document, ledger.blocks(), others=True)
        print(f"{document}: {', '.join(filled) or 'no place for this run'}", file=sys.stderr)
    if as_json:
        print(json.dumps(ledger.to_dict(), indent=2))
        return
    for row in ledger.rows:
        print(f"{row.claim.id} {row.comparison}: {row.claim.words}")
        print(f"    paper     {row.claim.paper}\n    this run  {row.finding.here or '-'}")
        print(f"    verdict   {row.finding.verdict} (holds if {row.claim.rule})")
        if row.finding.control:
            print(f"    control   {row.finding.control}")
    print()
    print_table(ledger.by_claim)
    print(f"\n{ledger.verdict}")


@app.command()
def report(run: RunOption, html: HtmlOption = None) -> None:
    """Write the HTML report of a captured run: one file that works offline.

    Example:
        sst-interp report --run demo --html demo.html
    """
    from sst_interp.report import write_report
    from sst_interp.runs import open_run

    captured: Any = open_run(run)
    print(f"report: {write_report(captured, _report_path(captured, html), _ledger(captured))}")


@app.command()
def capture(
    run: RunOption,
    keep: Annotated[
        str | None,
        typer.Option(help="Full states to keep: none, position0, shifts or all (overrides the recipe)."),
    ] = None,
    fresh: FreshFlag = False,
) -> None:
    """Capture a run: every question at every depth, measured while it is generated.

    A capture that was interrupted, or a run with a damaged shard, goes on with what is missing.

    Examples:
        sst-interp capture --run demo

        sst-interp capture --run my-recipe.toml --keep all
    """
    from sst_interp.capture import capture as capture_run
    from sst_interp.recipe import find_recipe

    recipe = find_recipe(run, captured=not fresh)
    if keep is not None:
        recipe = replace(recipe, keep=keep)
    with _stopping():
        captured = capture_run(recipe, fresh=fresh)
    print(f"captured {len(captured.questions['question'].unique())} questions in {captured.folder}")


@app.command()
def publish(
    run: RunOption,
    out: Annotated[Path, typer.Argument(help="Folder of the copy; it must not exist yet.")],
    bits: Annotated[int, typer.Option(min=4, max=24, help="Significant bits of the floats in pairs.")] = 10,
    top: Annotated[
        int | None, typer.Option(min=0, help="Likely tokens to keep of each step's 100; default: all.")
    ] = None,
    iterations: Annotated[
        str, typer.Option(help="Iterations whose states at position 0 are kept; empty for none.")
    ] = "1",
) -> None:
    """Copy a complete run, smaller: measurements that others can read, check and pass round.

    Example:
        sst-interp publish --run gpqa published/gpqa --iterations 1,4
    """
    from tqdm import tqdm

    from sst_interp.publishing import publish as publish_run
    from sst_interp.runs import open_run

    try:
        kept = tuple(int(i) for i in iterations.split(",") if i.strip())
    except ValueError:
        raise SSTError(
            f"--iterations {iterations!r} is not a list of whole numbers", "for example 1,4"
        ) from None
    original = open_run(run)
    with tqdm(desc=f"publishing {original.name}", unit="batch", total=0) as bar:

        def show(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        copy = publish_run(original, out, bits, top, kept, show)
    print(f"published: {copy.folder}, {copy.summary()['bytes'] / 1e6:.1f} MB")


@app.command()
def runs(as_json: JsonFlag = False) -> None:
    """List runs and recipes: yours, and those that ship.

    Example:
        sst-interp runs --json
    """
    from sst_interp.runs import list_runs

    rows = list_runs()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    shown = [
        {
            "name": row["name"],
            "state": row["state"],
            "checkpoint": row["checkpoint"] or "",
            "dataset": row["dataset"] or "",
            "questions": row["questions"] or ("all" if row["dataset"] else ""),
            "depths": " ".join(map(str, row["depths"] or [])),
            "size": f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] else "",
            "where": row["where"],
        }
        for row in rows
    ]
    print_table(shown)


@app.command()
def datasets(as_json: JsonFlag = False) -> None:
    """List the datasets that recipes can name; a .csv or .jsonl path works, too.

    Example:
        sst-interp datasets
    """
    from sst_interp.questions import DATASETS

    rows = [
        {
            "name": name,
            "splits": list(known.splits),
            "licence": known.licence,
            "restricted": known.restricted,
            "about": known.about,
        }
        for name, known in DATASETS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(
            [
                row | {"splits": " ".join(row["splits"]), "restricted": "yes" if row["restricted"] else ""}
                for row in rows
            ]
        )


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A training recipe: a shipped name, or a .toml file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The checkpoint's folder; default: checkpoints/NAME.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Erase what is there and train anew.")] = False,
) -> None:
    """Train a checkpoint: adapters and blend weights together, or its matched baseline.

    A training that was interrupted goes on from its last saved state when the same command is given again.

    Examples:
        sst-interp train smollm2-135m-sst

        sst-interp train my-recipe.toml --out checkpoints/mine
    """
    from tqdm import tqdm

    from sst_interp.analyses import training_curves
    from sst_interp.training.log import read_log
    from sst_interp.training.recipe import find_training_recipe
    from sst_interp.training.trainer import Training

    chosen = find_training_recipe(recipe)
    print(f"loading {chosen.backbone} and {chosen.data}", file=sys.stderr)
    training = Training(chosen, out, fresh)
    if training.split.too_long:
        print(
            f"note: {training.split.too_long} examples are longer than max_tokens = {chosen.max_tokens} "
            "and are left out",
            file=sys.stderr,
        )
    bar = tqdm(total=training.steps, initial=training.done, desc=f"training {chosen.name}", unit="step")

    def show(now: Training, line: dict[str, float]) -> None:
        recent = [row for row in now.log[-20:] if "loss" in row]
        speed = sum(row["tokens"] for row in recent) / sum(row["seconds"] for row in recent)
        bar.set_postfix_str(f"loss {sum(r['loss'] for r in recent) / len(recent):.3f}, {speed:.0f} tokens/s")
        bar.update()
        if "held_out_exact" in line:
            tqdm.write(f"step {now.done}: held out {line['held_out_exact']:.3f}", file=sys.stderr)

    with bar, _stopping("the state is saved: the same command goes on from there"):
        folder = training.run(show)
    curves = training_curves(read_log(folder), chosen.name)
    write_text(folder / "training.html", curves.figure().to_html(include_plotlyjs=True))
    print(f"{curves.verdict}\ncheckpoint: {folder}\ncurves: {folder / 'training.html'}")


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints or backbones; the first is the one tested.")
    ],
    depths: Annotated[str, typer.Option(help="Iteration depths.")] = "1,2,3,4",
    tasks: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    questions: Annotated[int | None, typer.Option(help="At most so many per task.")] = None,
    held_out: Annotated[
        bool,
        typer.Option("--held-out", help="Also the held-out training examples (needs the training data)."),
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Write the results into the first one's model card.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where measurements are kept; default: with the checkpoint."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Loss and accuracy by iteration depth, models side by side, with question-level intervals.

    Each (model, task, depth) is kept when it is done: an interrupted evaluation goes on from there. A
    backbone is evaluated as it is, without a blend.

    Examples:
        sst-interp evaluate smollm2-135m-sst smollm2-135m-baseline smollm2-135m

        sst-interp evaluate checkpoints/mine --tasks gsm8k --questions 50 --depths 1,4
    """
    from sst_interp.analyses import depth_scores
    from sst_interp.evaluation import TASKS, evaluate_by_name
    from sst_interp.loading import checkpoint_folder
    from sst_interp.training.card import write_card

    try:
        at = [int(depth) for depth in depths.split(",")]
    except ValueError:
        raise SSTError(f"--depths {depths!r} is not a list of whole numbers", "for example 1,2,3,4") from None
    wanted = [task.strip() for task in tasks.split(",")] if tasks else list(TASKS)
    own = models[0] if held_out else None
    twice = lambda name: [Path(m).name for m in models].count(Path(name).name) > 1  # noqa: E731
    with _stopping("what was measured is kept: the same command goes on from there"):
        found = {
            name if twice(name) else Path(name).name: evaluate_by_name(name, at, wanted, questions, own, out)
            for name in models
        }
    result = depth_scores(found, next((name for name in found if name.endswith("baseline")), None))
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print_table([{str(k): v for k, v in row.items()} for row in result.table.to_dict("records")])
        print(f"\n{result.verdict}")
    if card and (folder := checkpoint_folder(models[0])) is not None:
        print(f"card: {write_card(folder, found)}", file=sys.stderr)


app.add_typer(approximation_app, name="approximation")
app.command()(probe)
app.command("patch")(patch)


def _captured(name: str, fresh: bool) -> Any:
    """The run, captured if need be. A complete run (or a shipped one) is opened as it is."""
    from sst_interp.recipe import find_recipe
    from sst_interp.runs import open_run

    if not fresh and not name.endswith(".toml"):
        try:
            found = open_run(name)
        except SSTError as error:
            if "no data yet" not in error.message:
                raise
        else:
            if found.complete:
                _note_changed_recipe(found)
                return found
    recipe = find_recipe(name, captured=not fresh)
    with _stopping():
        from sst_interp.capture import capture as capture_run

        return capture_run(recipe, fresh=fresh)


def _ledger(run: Any, resamples: int = 2000, seed: int = 0) -> Any:
    """The claims ledger of a run, with a bar over its analyses."""
    from tqdm import tqdm

    from sst_interp.ledger import companions, ledger_of

    beside = companions(run)
    for note in beside.notes:
        print(f"note: {note}", file=sys.stderr)
    with tqdm(desc=f"analysing {run.name}", unit="analysis", total=1) as bar:

        def show(done: int, of: int, name: str) -> None:
            bar.total = of
            bar.set_postfix_str(name)
            bar.update(done - bar.n)

        return ledger_of(run, resamples, seed, progress=show)


@contextmanager
def _stopping(
    kept: str = "what was captured is kept: the same command goes on from there",
) -> Iterator[None]:
    """Ctrl-C in a long job as an error to read. (The command-line library would exit without a word.)"""
    try:
        yield
    except KeyboardInterrupt:
        raise SSTError("stopped", kept) from None


def _note_changed_recipe(run: Any) -> None:
    """Say so if the recipe of that name is no longer what the run was captured with."""
    from sst_interp.recipe import find_recipe

    try:
        changed = run.recipe.differences(find_recipe(run.name, captured=False))
    except SSTError:
        return
    for key, then, now in changed:
        print(
            f"note: {run.name} was captured with {key} = {then!r}; its recipe now says {now!r}",
            file=sys.stderr,
        )
    if changed:
        print("  --fresh captures it again", file=sys.stderr)


def _report_path(run: Any, html: Path | None) -> Path:
    if html is not None:
        return html
    inside = run.folder / "report.html"
    if run.folder.parent.resolve() == places.shipped("runs").resolve() or not os.access(run.folder, os.W_OK):
        return Path(f"{run.name}-report.html")
    return inside


def _print_basin_shifts(run: Any, results: dict[str, Any]) -> None:
    print_table(
        [
            {
                "comparison": name,
                "pair": "-" if result.not_testable else f"{result.a} vs {result.b}",
                "shifted": "-" if result.not_testable else result.share.text(percent=True),
                "threshold": "-" if result.not_testable else f"{result.threshold:.4g}",
                "below 0.99": "-" if result.not_testable else result.share_at_paper.text(percent=True),
                "modes": "-" if result.distribution is None else result.distribution.modes.count,
            }
            for name, result in results.items()
        ]
    )
    for name, result in results.items():
        print(f"\n{name}: {result.verdict}")
    print()


def main() -> None:
    """Entry point of `sst-interp`."""
    try:
        app()
    except SSTError as error:
        _fail(error.message, error.hint)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(
                f"the disk is full: {error.filename or ''}".rstrip(": "),
                "free some space; the same command goes on",
            )
        raise


def _fail(message: str, hint: str | None) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
