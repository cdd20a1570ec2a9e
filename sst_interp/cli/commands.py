"""Every command of `sst-interp` under its name, and what an error looks like."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, NoReturn

import typer

import sst_interp
from sst_interp.cli import experiments as kinds
from sst_interp.cli import runs, training
from sst_interp.cli import runs as findings
from sst_interp.cli.common import takes_run
from sst_interp.cli.experiments import patch, probe
from sst_interp.cli.studies import app as study_app
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
        say(f"sst-interp {sst_interp.__version__}")
        raise typer.Exit
    load_plugins()


COMMANDS = (
    *(takes_run(findings.basin_shifts), takes_run(findings.claims), takes_run(findings.report)),
    *(takes_run(runs.capture), runs.publish, runs.runs, runs.datasets),
    kinds.compare,
    *(training.train, training.evaluate),
    *(takes_run(probe), takes_run(patch)),
)
for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"))(command)
app.add_typer(study_app, name="study")


def run() -> None:
    """Run the command that was typed."""
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
        said = str(error.strerror or error) or type(error).__name__
        _fail(f"{file}: {said}" if file else said, "put that right, or name another place")


def _fail(message: str, hint: str | None) -> NoReturn:
    say(f"error: {plain(' '.join(message.split()))}", sys.stderr)
    if hint:
        say(f"  {plain(' '.join(hint.split()))}", sys.stderr)
    sys.exit(2)
