"""What the commands share: options, bars, opening or capturing a run, being stopped."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sst_interp.errors import SSTError
from sst_interp.tables import bar


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


Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps, cpu; default: the best that is there.")]
DType = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float32 or float64.")]
Quantisation = Annotated[str | None, typer.Option(help="4bit or 8bit weights, through bitsandbytes.")]
Attention = Annotated[str | None, typer.Option(help="eager or sdpa; default: the model's own.")]
RunOption = Annotated[
    str, typer.Option("--run", "-r", help="A run or recipe (`sst-interp runs` lists them), or a path.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Resamples = Annotated[int, typer.Option(min=2, max=100_000, help="Resamples, shuffles, permutations.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes side by side, each with the model loaded; needs Ray.")
]
RayAddress = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Workers of a Ray cluster: auto, or host:port.")
]
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

    parameters = [alone, either.replace(kind=alone.kind), *others]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def fleet_of(workers: int | None, address: str | None) -> Any:
    """The fleet that the options ask for; None: this process alone."""
    from sst_interp.runs.fleet import Fleet

    return None if workers is None and address is None else Fleet(workers, address)


def takes_placement(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose `placed` holds what was given of --device, --dtype, --quantisation and --attention."""
    signature = inspect.signature(command, eval_str=True)
    options = {"device": Device, "dtype": DType, "quantisation": Quantisation, "attention": Attention}

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        named = {name: given.pop(name, None) for name in options}
        command(placed={name: value for name, value in named.items() if value is not None}, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(n, keyword, default=None, annotation=a) for n, a in options.items()]
    others = [p.replace(kind=keyword) for name, p in signature.parameters.items() if name != "placed"]
    wrapped.__signature__ = signature.replace(parameters=[*others, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in (*others, *added)}
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
    except (RuntimeError, MemoryError) as error:
        from sst_interp.models.placement import out_of_memory

        if not out_of_memory(error):
            raise
        words = next(iter(str(error).splitlines()), "no memory left")
        hint = 'a smaller batch_size, or quantisation = "4bit"'
        raise SSTError(f"too little memory: {words}", f"{hint}; {kept}") from None
