"""The model card of a checkpoint: what it is, how it was made, what it does, and what it is not for.

Everything in it is read from the checkpoint's own files or measured; nothing is typed in.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Protocol

import jinja2
import pandas as pd

from sst_interp.files import replace_bytes
from sst_interp.training.log import log_words, looks, read_about, read_log
from sst_interp.training.recipe import TrainingRecipe

CURVES = "training.html"
IMAGE = "training.png"
"""A picture of the curves, shown if it lies in the folder."""


class Scores(Protocol):
    """What the card says of an evaluation (`sst_interp.experiments.depth_scores`)."""

    @property
    def table(self) -> pd.DataFrame:
        """A row per `task` and depth, a column per model."""
        ...

    @property
    def verdict(self) -> str:
        """The answer in words."""
        ...


def write_card(folder: Path, scores: Scores | None = None) -> Path:
    """Write `README.md` into a trained checkpoint's folder.

    Args:
        folder: of a finished training.
        scores: of this checkpoint and of what it is compared with; without them the card says that nothing
            was evaluated.

    Raises:
        SSTError: the folder holds no training.
    """
    about, log = read_about(folder), read_log(folder)
    held_out, losses, accuracies = looks(log), "", ""
    if scores is not None:
        is_loss = scores.table["task"].str.endswith("loss")
        losses, accuracies = markdown(scores.table[is_loss]), markdown(scores.table[~is_loss])
    template = resources.files("sst_interp.training").joinpath("card.md").read_text()
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    text = environment.from_string(template).render(
        about=about,
        recipe=about["recipe"],
        course=log_words(log, about["recipe"]["name"]),
        solved=how_well_solved(log, about["recipe"].get("tolerance", TrainingRecipe.tolerance)),
        steps=log.dropna(subset=["loss"]),
        looks=markdown(held_out.round(4)) if len(held_out) else "",
        unfinished=still_falling(held_out),
        image=IMAGE if (folder / IMAGE).is_file() else None,
        scores=scores,
        losses=losses,
        accuracies=accuracies,
    )
    replace_bytes(folder / "README.md", text.strip().encode() + b"\n")
    return folder / "README.md"


def how_well_solved(log: pd.DataFrame, tolerance: float) -> str:
    """What is left of the equations that exact training solves; nothing for another method."""
    if "state_residual" not in log:
        return ""
    worst = log[["state_residual", "adjoint_residual"]].max(axis=1).dropna()
    over = int((worst > tolerance).sum())
    if not over:
        return f"Every step's states and gradients were solved to the tolerance of {tolerance:g}."
    return (
        f"**{over} of {len(worst)} steps were not solved to the tolerance of {tolerance:g}: their gradients "
        f"are approximate. The largest residual is {worst.max():.2g}.**"
    )


def still_falling(held_out: pd.DataFrame) -> str:
    """The held-out loss at the last two looks, if it fell by more than 1%; else nothing."""
    losses = held_out["held_out_exact"].dropna().tolist() if "held_out_exact" in held_out else []
    if len(losses) < 2 or losses[-1] > 0.99 * losses[-2]:
        return ""
    return f"{losses[-2]:.3f} to {losses[-1]:.3f} over the last {held_out['step'].diff().iloc[-1]:.0f} steps"


def markdown(table: pd.DataFrame) -> str:
    """A DataFrame as a Markdown table."""

    def cell(value: object) -> str:
        return "" if pd.isna(value) else str(value).replace("|", r"\|")  # type: ignore[arg-type]

    head = [str(name) for name in table.columns]
    rows = [[cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
