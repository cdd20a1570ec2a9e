"""The command line: thin over the same functions a notebook calls.

A mistake that a person can put right prints one line that says what is wrong and one that says what to
type, without a traceback, and exits with code 2. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, NoReturn

import typer

import sst_interp
from sst_interp.approximation.commands import app as approximation_app
from sst_interp.commands import findings, kinds, runs, training
from sst_interp.errors import SSTError
from sst_interp.latent.commands import app as latent_app
from sst_interp.patching.commands import patch
from sst_interp.plugins import load_plugins
from sst_interp.pretraining.commands import app as pretraining_app
from sst_interp.probe.commands import probe

app = typer.Typer(
    name="sst-interp",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Measure language models that think in latent space.\n\n"
    "Start with: `sst-interp basin-shifts --run gpqa`",
)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options that are not of one command."""
    if version:
        print(f"sst-interp {sst_interp.__version__}")
        raise typer.Exit
    load_plugins()


COMMANDS = (
    *(findings.basin_shifts, findings.claims, findings.report),
    *(runs.capture, runs.publish, runs.runs, runs.datasets),
    kinds.compare,
    *(training.train, training.evaluate),
    *(probe, patch),
)
for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"))(command)
app.add_typer(approximation_app, name="approximation")
app.add_typer(pretraining_app, name="pretraining")
app.add_typer(latent_app, name="latent")


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
        file = error.filename2 or error.filename
        if error.errno == errno.ENOSPC:
            _fail(
                f"the disk is full: {file or ''}".rstrip(": "),
                "free some space; the same command goes on",
            )
        said = " ".join(str(error.strerror or error).split()) or type(error).__name__
        _fail(f"{file}: {said}" if file else said, "put that right, or name another place")


def _fail(message: str, hint: str | None) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"  {hint}", file=sys.stderr)
    sys.exit(2)
