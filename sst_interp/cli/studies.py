"""`sst-interp study`: list, show and measure the studies, and fill the tables of a document."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sst_interp import paths
from sst_interp.cli.common import JsonFlag, stopping
from sst_interp.errors import SSTError
from sst_interp.tables import say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Questions about training and its approximation, with the tables that answer them.",
)
Name = Annotated[str, typer.Argument(help="A study (`sst-interp study list`).")]
Studies = Annotated[
    Path | None, typer.Option(help="Folder of the measured tables; default: `studies`, else the shipped one.")
]


@app.command("list")
def list_studies(as_json: JsonFlag = False) -> None:
    """List the studies, the question that each answers, and its options.

    Example:
        sst-interp study list
    """
    from sst_interp.experiments.studies.study import studies
    from sst_interp.tables import print_table

    rows = [
        {"study": name, "question": study.question, "page": study.page, "options": list(study.options)}
        for name, study in studies().items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table([{key: row[key] for key in ("study", "question", "page")} for row in rows])


@app.command()
def show(name: Name, studies: Studies = None, as_json: JsonFlag = False) -> None:
    """Print every table and verdict of a study that its measurements allow.

    Example:
        sst-interp study show two-pass
    """
    from sst_interp.errors import Untestable
    from sst_interp.experiments.studies.study import find_study

    study = find_study(name)
    folder = study.folder(studies)
    if not as_json:
        return print_shown(study.show(folder))
    findings = {
        name: {"not_testable": result.message} if isinstance(result, Untestable) else result.to_dict()
        for name, result in study.results(folder).items()
    }
    about = {"study": study.name, "question": study.question, "measured": study.measured(folder)}
    print(json.dumps(about | {"findings": findings}, indent=2))


@app.command()
def run(
    name: Name,
    model: Annotated[
        str | None,
        typer.Argument(help="What two-pass, exact-training and lrt-equivalence measure: a name or folder."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the tables; what it has is kept.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many starts; default 3.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the shortest training.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A file, documents separated by lines with <|endoftext|>; default: Wikipedia."),
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="GSM8K questions with worked answers.")] = None,
    verify: Annotated[bool, typer.Option(help="Also check the exact states token by token, once.")] = False,
    sizes: Annotated[
        str | None,
        typer.Option(help="Of a backbone's random memories: gamma, and entries of W m over those of m."),
    ] = None,
) -> None:
    """Measure what a study lacks. Goes on where it was stopped.

    `sst-interp study list --json` says which options a study takes.

    Examples:
        sst-interp study run two-pass smollm2-135m-sst --questions 8

        sst-interp study run exact-training --seeds 5
    """
    from sst_interp.experiments.studies.study import find_study

    study = find_study(name)
    given: dict[str, Any] = {
        "model": model, "questions": questions, "verify": verify or None, "steps": steps, "text": text,
        "seeds": None if seeds is None else range(seeds), "sizes": None if sizes is None else _numbers(sizes),
    }  # fmt: skip
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if option not in study.options:
            takes = ", ".join(study.options)
            raise SSTError(f"the study {name} takes no {option}", f"it takes {takes}")
    folder = paths.studies_dir() if out is None else out
    with stopping("what was measured is kept: the same command goes on"), _bar(name) as progress:
        study.run(folder, progress=progress, **given)
    print_shown(study.show(folder))


@app.command()
def document(
    path: Annotated[Path, typer.Argument(help="A document with places for tables.")],
    studies: Studies = None,
) -> None:
    """Fill the tables of a document, for example docs/lrt.md, from all studies.

    Example:
        sst-interp study document docs/lrt.md --studies data/studies
    """
    from sst_interp.experiments.studies.study import find_study
    from sst_interp.experiments.studies.study import studies as known
    from sst_interp.tables import fill
    from sst_interp.tables import places as asked

    shown, names = {}, set(asked(path))
    for study in map(find_study, known()):
        if names & set(study.names()):
            shown |= study.show(study.folder(studies))
    if not shown:
        raise SSTError(f"{path} has no place for a table of a study", "for example <!-- two-pass --> ...")
    say(f"{path}: {', '.join(fill(path, shown, others=True))}")


def print_shown(shown: dict[str, str]) -> None:
    """Tables and verdicts under headings of their names."""
    for name, text in shown.items():
        say(f"\n## {name}\n\n{text}")


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise SSTError(f"sizes {text!r} are not numbers", "for example --sizes 0.005,0.02") from None
    return numbers


@contextmanager
def _bar(name: str) -> Iterator[Callable[[str, int, int], None]]:
    from sst_interp.tables import bar as progress_bar

    with progress_bar(name, mininterval=1) as bar:

        def progress(words: str, done: int, total: int) -> None:
            bar.set_description(f"{name}: {words}", refresh=False)
            bar.total, new = total, done - bar.n
            bar.update(new)

        yield progress
