"""Every command of `sst-interp` in the panels of its help, and what an error looks like."""

from __future__ import annotations

import errno
import functools
import os
import sys
from typing import Annotated, NoReturn

import typer

from sst_interp import __version__
from sst_interp.cli import experiments, lenses, runs, studies
from sst_interp.errors import SSTError
from sst_interp.plugins import load_plugins
from sst_interp.tables import plain, say

app = typer.Typer(
    name="sst-interp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Measure language models that think in latent space.\n\nStart with: `sst-interp basin-shifts gpqa`",
)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options that are not of one command."""
    if version:
        say(f"sst-interp {__version__}")
        raise typer.Exit
    load_plugins()


@functools.cache
def whole_app() -> typer.Typer:
    """The app with every command, in the panels of its help."""
    panels = {
        "Run": (
            *(runs.basin_shifts, runs.claims, runs.report, runs.capture),
            *(runs.publish, runs.runs, runs.datasets),
        ),
        "Look": (
            *(experiments.compare, experiments.probe, experiments.patch),
            *(experiments.hooks, experiments.harvest, lenses.lens),
        ),
        "Train": (experiments.train, experiments.evaluate),
    }
    for panel, commands in panels.items():
        for command in commands:
            app.command(rich_help_panel=panel)(command)
    app.add_typer(studies.app, name="study", rich_help_panel="Study")
    return app


def run() -> None:
    """Run the command that was typed."""
    try:
        whole_app()()
    except SSTError as error:
        _fail(error.message, error.hint)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        file = error.filename2 or error.filename
        if error.errno == errno.ENOSPC:
            message = f"the disk is full: {file or ''}".rstrip(": ")
            _fail(message, "free some space; the same command goes on")
        said = str(error.strerror or error) or type(error).__name__
        _fail(f"{file}: {said}" if file else said, "put that right, or name another place")


def _fail(message: str, hint: str | None) -> NoReturn:
    say(f"error: {plain(' '.join(message.split()))}", sys.stderr)
    if hint:
        say(f"  {plain(' '.join(hint.split()))}", sys.stderr)
    sys.exit(2)
