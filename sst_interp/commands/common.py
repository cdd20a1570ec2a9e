"""What commands share: options, opening or capturing a run, being stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sst_interp.errors import SSTError

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


def captured_run(name: str, fresh: bool) -> Any:
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
    with stopping():
        from sst_interp.capture import capture as capture_run

        return capture_run(recipe, fresh=fresh)


def named_folder(name: str) -> Path:
    """The folder of an option; an empty name is no folder (it would be the working folder)."""
    if not name:
        raise typer.BadParameter("the name of a folder is empty")
    return Path(name)


@contextmanager
def stopping(
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
