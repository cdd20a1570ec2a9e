"""`sst-interp approximation`: measure errors of sweeps, run the study of small models, say what was found."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sst_interp.studies import STUDIES, Folder, Seeds, add_reading, print_tables

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="How good is the training's approximation of the states?",
)


@app.command()
def errors(
    model: Annotated[str, typer.Argument(help="A checkpoint (name or folder) or a backbone.")],
    out: Annotated[Path, typer.Option(help="Parquet file; what it has is kept.")] = STUDIES
    / "errors.parquet",
    questions: Annotated[int, typer.Option(min=1, help="GSM8K test questions with worked answers.")] = 8,
    verify: Annotated[bool, typer.Option(help="Also check the exact states token by token, once.")] = False,
) -> None:
    """Compare few sweeps with the exact states on real text, in float32. Goes on where it was stopped.

    Example:
        sst-interp approximation errors smollm2-135m-sst --questions 8
    """
    from sst_interp.analyses.approximation import approximation_error
    from sst_interp.approximation.named import errors_by_name

    def show(what: str, done: int, total: int) -> None:
        print(f"{what}: question {done} of {total}", file=sys.stderr)

    table = errors_by_name(model, out, questions, verify=verify, progress=show)
    print(approximation_error(table).verdict)


@app.command()
def study(
    out: Folder = STUDIES,
    seeds: Seeds = 3,
) -> None:
    """Train small models exactly, with few sweeps and without a stream. Goes on where it was stopped.

    Example:
        sst-interp approximation study --seeds 5
    """
    from sst_interp.approximation.study import run_study

    run_study(out, seeds=range(seeds), progress=lambda words: print(words, file=sys.stderr))
    print_tables(_tables(out))


def _tables(studies: Path) -> dict[str, str]:
    from sst_interp.approximation.tables import all_tables

    return all_tables(studies)


add_reading(app, "approximation", _tables, ("errors.parquet", "small-*"), "docs/approximation.md")
