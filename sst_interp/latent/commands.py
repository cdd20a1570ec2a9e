"""`sst-interp latent`: a small LRT trained with every schedule, and how equivalent schedules are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sst_interp.studies import STUDIES, Folder, Seeds, add_reading

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="What are the training schedules of a Latent Recurrent Transformer worth?",
)


@app.command()
def schedules(
    out: Folder = STUDIES,
    seeds: Seeds = 3,
) -> None:
    """Train a small LRT with every schedule to the same number of steps. Goes on where it was stopped.

    Example:
        sst-interp latent schedules --seeds 5
    """
    from sst_interp.analyses.latent_training import latent_training
    from sst_interp.latent.schedules import run_schedules

    found = run_schedules(out, seeds=range(seeds), progress=lambda words: print(words, file=sys.stderr))
    print(latent_training(**found).verdict)


@app.command()
def equivalence(
    model: Annotated[
        str,
        typer.Argument(help="A checkpoint of an LRT, a backbone (given random memories), or `small`."),
    ],
    out: Folder = STUDIES,
    questions: Annotated[int, typer.Option(min=1, help="How many of the shortest questions.")] = 4,
    sizes: Annotated[
        str, typer.Option(help="Of a backbone's random memories: gamma, and entries of W m over those of m.")
    ] = "0.005,0.02",
) -> None:
    """Compare interleaved and multi-refine passes with sequential unrolling. Goes on where it was stopped.

    Example:
        sst-interp latent equivalence smollm2-135m-lrt --questions 4
    """
    from sst_interp.analyses.latent_equivalence import latent_equivalence
    from sst_interp.latent.named import equivalence_by_name

    def show(what: str, done: int, total: int) -> None:
        print(f"{what}: {done} of {total}", file=sys.stderr)

    found = equivalence_by_name(model, out, questions, _numbers(sizes), progress=show)
    print(latent_equivalence(found["states"], found["gradients"]).verdict)


def _numbers(text: str) -> list[float]:
    from sst_interp.errors import SSTError

    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SSTError(f"sizes {text!r} are not numbers", "for example --sizes 0.005,0.02") from None


def _tables(studies: Path) -> dict[str, str]:
    from sst_interp.latent.tables import all_tables

    return all_tables(studies)


add_reading(app, "latent", _tables, ("latent-*",), "docs/lrt.md", others=True)
