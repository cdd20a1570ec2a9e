"""`sst-interp pretraining`: train small decoders with and without a latent memory, and say what was found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sst_interp.studies import STUDIES, Folder, Seeds, add_reading, print_tables

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Does a latent memory help a small decoder that is trained from scratch?",
)


@app.command()
def run(
    out: Folder = STUDIES,
    seeds: Seeds = 3,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text file, documents separated by lines with <|endoftext|>; default: Wikipedia."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the shortest training.")] = None,
) -> None:
    """Train a small decoder on text. Goes on where it was stopped.

    Example:
        sst-interp pretraining run --seeds 3
    """
    from dataclasses import replace

    from sst_interp.pretraining.text import articles, read_text
    from sst_interp.pretraining.text_study import TextPlan, passes_left, run_text

    plan = TextPlan() if steps is None else replace(TextPlan(), steps=steps)
    source = articles() if text is None else read_text(text)
    with _bar(passes_left(out, plan, range(seeds)), "pretraining") as progress:
        run_text(out, source, plan, range(seeds), progress=progress)
    print_tables(_tables(out))


@app.command()
def recall(
    out: Folder = STUDIES,
    seeds: Seeds = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the shortest training.")] = None,
) -> None:
    """Train small decoders on in-context recall. Goes on where it was stopped.

    Example:
        sst-interp pretraining recall --seeds 3
    """
    from dataclasses import replace

    from sst_interp.pretraining.recall_study import ARMS, RecallPlan, passes_left, run_recall

    plan = RecallPlan() if steps is None else replace(RecallPlan(), steps=steps)
    with _bar(passes_left(out, plan, range(seeds), ARMS), "recall") as progress:
        run_recall(out, plan, range(seeds), progress=progress)
    print_tables(_tables(out))


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[str, int], Any]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="pass", file=sys.stderr, mininterval=1) as bar:

        def progress(words: str, passes: int) -> None:
            bar.set_description(f"{what}: {words}", refresh=False)
            bar.update(passes)

        yield progress


def _tables(studies: Path) -> dict[str, str]:
    from sst_interp.pretraining.tables import all_tables

    return all_tables(studies)


add_reading(app, "pretraining", _tables, ("pretraining-*", "recall-*"), "docs/pretraining.md")
