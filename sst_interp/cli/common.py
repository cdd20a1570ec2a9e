"""What commands share: options, opening or capturing a run, being stopped."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sst_interp.errors import SSTError
from sst_interp.tables import say


def given_path(text: str) -> Path:
    """A path as it was typed. Raises SSTError for an empty one."""
    if not text:
        raise SSTError("an empty path was given", "name a file or folder, or leave the option out")
    return Path(text)


RunOption = Annotated[
    str,
    typer.Option("--run", "-r", help="Name of a run or recipe (`sst-interp runs` lists them), or a path."),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        parser=given_path,
        metavar="FILE",
        help="Where the report goes; default: report.html in the run's folder.",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Resamples = Annotated[
    int, typer.Option(min=2, max=100_000, help="Question resamples, shuffles, permutations.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
FreshFlag = Annotated[
    bool, typer.Option("--fresh", help="Erase what the run already has and capture it anew.")
]


def takes_run(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option `--run` that also takes the run's name alone: `sst-interp report gpqa`."""
    signature = inspect.signature(command, eval_str=True)
    option = signature.parameters["run"]
    either = option.replace(default=None, annotation=_or_none(option.annotation))
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


def _or_none(annotation: Any) -> Any:
    """`Annotated[str, ...]` as `Annotated[str | None, ...]`."""
    return Annotated[(str | None, *annotation.__metadata__)]


def captured_run(name: str, fresh: bool) -> Any:
    """The run, captured if need be. A complete run (or a shipped one) is opened as it is."""
    from sst_interp.runs.recipe import find_recipe
    from sst_interp.runs.store import open_run

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
        from sst_interp.runs.capture import capture as capture_run

        return capture_run(recipe, fresh=fresh)


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
    from sst_interp.runs.recipe import find_recipe

    try:
        changed = run.recipe.differences(find_recipe(run.name, captured=False))
    except SSTError:
        return
    for key, then, now in changed:
        say(f"note: {run.name} was captured with {key} = {then!r}; its recipe now says {now!r}", sys.stderr)
    if changed:
        say("  --fresh captures it again", sys.stderr)
