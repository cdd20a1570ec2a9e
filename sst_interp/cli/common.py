"""What the commands share: the app that they join, options, bars, and what an error looks like."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from sst_interp import __version__
from sst_interp.errors import SSTError
from sst_interp.plugins import load_plugins
from sst_interp.tables import bar, plain, say

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
            message = f"the disk is full: {file or ''}".rstrip(": ")
            _fail(message, "free some space; the same command goes on")
        said = str(error.strerror or error) or type(error).__name__
        _fail(f"{file}: {said}" if file else said, "put that right, or name another place")


def _fail(message: str, hint: str | None) -> NoReturn:
    say(f"error: {plain(' '.join(message.split()))}", sys.stderr)
    if hint:
        say(f"  {plain(' '.join(hint.split()))}", sys.stderr)
    sys.exit(2)


def given_path(text: str) -> Path:
    """A path as it was typed. Raises SSTError for an empty one."""
    if not text:
        raise SSTError("an empty path was given", "name a file or folder, or leave the option out")
    return Path(text)


def place(metavar: str, help: str, *names: str) -> Any:
    """An option that names a file or folder."""
    return typer.Option(*names, parser=given_path, metavar=metavar, help=help)


def whole_numbers(option: str, text: str, example: str) -> list[int]:
    """Numbers between commas. Raises SSTError if there is anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SSTError(
            f"{option} {text!r} is not a list of whole numbers", f"for example {example}"
        ) from None


RunOption = Annotated[
    str, typer.Option("--run", "-r", help="A run or recipe (`sst-interp runs` lists them), or a path.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Resamples = Annotated[int, typer.Option(min=2, max=100_000, help="Resamples, shuffles, permutations.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


def takes_run(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option `--run` that also takes the run's name alone: `sst-interp report gpqa`."""
    signature = inspect.signature(command, eval_str=True)
    option = signature.parameters["run"]
    kind, *metadata = option.annotation.__origin__, *option.annotation.__metadata__
    either = option.replace(default=None, annotation=Annotated[(kind | None, *metadata)])
    alone = inspect.Parameter(
        "name",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[str | None, typer.Argument(metavar="RUN", help="The run; or --run RUN.")],
    )
    others = [p for name, p in signature.parameters.items() if name != "run"]
    typed = command.__name__.replace("_", "-")

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        name, run = given.pop("name"), given.pop("run")
        if name is None and run is None:
            raise SSTError("no run is named", f"for example sst-interp {typed} demo")
        if name is not None and run is not None and name != run:
            raise SSTError(f"two runs are named: {name} and {run}", f"for example sst-interp {typed} {run}")
        command(run=name if run is None else run, **given)

    parameters = [alone, either, *others]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def print_json(value: Any) -> None:
    """A result on stdout, for other programs."""
    print(json.dumps(value, indent=2))


@contextmanager
def progress(words: str, unit: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr, and the function that moves it: `show(done, of, what="")`."""
    with bar(words, unit=unit, total=total) as shown:

        def show(done: int, of: int, what: str = "") -> None:
            shown.total = of
            if what:
                shown.set_postfix_str(what)
            shown.update(done - shown.n)

        yield show


@contextmanager
def stopping(
    kept: str = "what was captured is kept: the same command goes on from there",
) -> Iterator[None]:
    """Ctrl-C in a long job as an error to read. (The command-line library would exit without a word.)"""
    try:
        yield
    except KeyboardInterrupt:
        raise SSTError("stopped", kept) from None
