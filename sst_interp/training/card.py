"""The model card of a checkpoint: what it is, how it was made, what it does, and what it is not for.

Everything in it is read from the checkpoint's own files or measured; nothing is typed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import jinja2
import pandas as pd

from sst_interp.durable import replace_bytes
from sst_interp.training.log import read_about, read_log
from sst_interp.training.recipe import TrainingRecipe

IMAGE = "training.png"
"""A picture of the curves, shown if it lies in the folder."""


def write_card(folder: Path, evaluations: Mapping[str, pd.DataFrame] | None = None) -> Path:
    """Write `README.md` into a trained checkpoint's folder.

    Args:
        folder: of a finished training.
        evaluations: model -> measurements (`evaluation.tasks`), this checkpoint's own first; without them the
            card says that nothing was evaluated.

    Raises:
        SSTError: the folder holds no training.
    """
    from sst_interp.analyses import depth_scores, training_curves

    about, log = read_about(folder), read_log(folder)
    curves = training_curves(log, about["recipe"]["name"])
    found, losses, accuracies = None, "", ""
    if evaluations:
        found = depth_scores(evaluations, next((n for n in evaluations if n.endswith("baseline")), None))
        is_loss = found.table["task"].str.endswith("loss")
        losses, accuracies = markdown(found.table[is_loss]), markdown(found.table[~is_loss])
    template = resources.files("sst_interp.training").joinpath("card.md").read_text()
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    text = environment.from_string(template).render(
        about=about,
        recipe=about["recipe"],
        solved=how_well_solved(log, about["recipe"].get("tolerance", TrainingRecipe.tolerance)),
        curves=curves,
        steps=log.dropna(subset=["loss"]),
        looks=markdown(curves.looks.round(4)) if len(curves.looks) else "",
        unfinished=still_falling(curves.looks),
        image=IMAGE if (folder / IMAGE).is_file() else None,
        found=found,
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


def still_falling(looks: pd.DataFrame) -> str:
    """The held-out loss at the last two looks, if it fell by more than 1%; else nothing."""
    losses = looks["held_out_exact"].dropna().tolist() if "held_out_exact" in looks else []
    if len(losses) < 2 or losses[-1] > 0.99 * losses[-2]:
        return ""
    return f"{losses[-2]:.3f} to {losses[-1]:.3f} over the last {looks['step'].diff().iloc[-1]:.0f} steps"


def markdown(table: pd.DataFrame) -> str:
    """A DataFrame as a Markdown table."""

    def cell(value: object) -> str:
        return "" if pd.isna(value) else str(value).replace("|", r"\|")  # type: ignore[arg-type]

    head = [str(name) for name in table.columns]
    rows = [[cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
