"""What the commands of every study share: where its measured tables lie, showing them, filling a document.

A study (`approximation`, `latent`, `pretraining`) keeps its tables in one folder, beside those of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from sst_interp import places

STUDIES = places.studies_dir()
Folder = Annotated[Path, typer.Option(help="Folder of the measured tables; what it has is kept.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many starts.")]
Measured = Annotated[
    Path | None, typer.Option(help="Folder of the measured tables; default: `studies`, else the shipped one.")
]
Tables = Callable[[Path], dict[str, str]]
"""Folder of a study -> every table and verdict as Markdown, by name."""


def measured(studies: Path | None, files: Sequence[str]) -> Path:
    """The folder asked for; else the working folder's, if it has any of a study's `files` (globs); else the
    shipped one.
    """
    if studies is not None:
        return studies
    here = any(next(STUDIES.glob(pattern), None) is not None for pattern in files)
    return STUDIES if here else places.shipped("studies")


def print_tables(tables: dict[str, str]) -> None:
    """Tables and verdicts under headings of their names."""
    for name, text in tables.items():
        print(f"\n## {name}\n\n{text}")


def add_reading(
    app: typer.Typer, name: str, tables: Tables, files: Sequence[str], page: str, others: bool = False
) -> None:
    """Add `show` and `document` to a study's commands.

    Args:
        app: the study's commands.
        name: what the study is called on the command line.
        tables: of its folder.
        files: what it keeps there (globs).
        page: the document that shows it.
        others: whether the page has places for tables of other makers, too.
    """

    def show(studies: Measured = None) -> None:
        print_tables(tables(measured(studies, files)))

    def document(
        path: Annotated[Path, typer.Argument(help="A document with places for tables.")],
        studies: Measured = None,
    ) -> None:
        from sst_interp.documents import fill

        print(f"{path}: {', '.join(fill(path, tables(measured(studies, files)), others=others))}")

    example = f"Example:\n    sst-interp {name} show"
    app.command(help=f"Print every table and verdict that the measurements allow.\n\n{example}")(show)
    app.command(help=f"Fill the tables of a document ({page}).")(document)
