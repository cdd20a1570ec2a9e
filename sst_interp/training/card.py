"""The files of a training besides its checkpoint: read, summarised in words, and the model card.

NAME/training.json     the recipe, versions, and hashes of data and backbone
NAME/training.jsonl    a line per step; lines with `held_out_...` hold the loss on held-out examples
NAME/README.md         the model card: everything in it is read from these files or measured
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import jinja2
import pandas as pd

from sst_interp.errors import SSTError
from sst_interp.files import replace_bytes
from sst_interp.tables import markdown
from sst_interp.training.recipe import TrainingRecipe

LOG, ABOUT, CURVES = "training.jsonl", "training.json", "training.html"
IMAGE = "training.png"
"""A picture of the curves; the card shows it if it lies in the folder."""
SMOOTHING = 20
"""Steps over which a training loss is averaged."""
FORMAT = 2
"""Of `training.json`. Format 1 called the method `sequential` `exact`."""


class Scores(Protocol):
    """An evaluation, as the card shows it (`sst_interp.experiments.training_results.DepthScores`)."""

    @property
    def table(self) -> pd.DataFrame:
        """A row per `task` and depth, a column per model."""
        ...

    @property
    def verdict(self) -> str:
        """The answer in words."""
        ...


def read_about(folder: Path) -> dict[str, Any]:
    """`training.json` of a checkpoint. Raises SSTError if it cannot be read."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        if about["format"] == 1 and about["recipe"].get("method") == "exact":
            about["recipe"]["method"] = "sequential"
        return about
    except (OSError, ValueError, KeyError) as error:
        raise SSTError(f"{folder / ABOUT} cannot be read: {error}", "--fresh trains anew") from None


def read_log(folder: Path) -> pd.DataFrame:
    """`training.jsonl` of a checkpoint: a row per step. Raises SSTError if it cannot be read."""
    try:
        return pd.DataFrame(json.loads(line) for line in (folder / LOG).read_text().splitlines())
    except (OSError, ValueError) as error:
        raise SSTError(f"{folder / LOG} cannot be read: {error}", "--fresh trains anew") from None


def looks(log: pd.DataFrame) -> pd.DataFrame:
    """The rows of a log in which held-out examples were measured."""
    columns = [c for c in map(str, log) if c in ("step", "alpha_mean", "gamma_mean") or c[:8] == "held_out"]
    rows = log[columns]
    return rows[rows.filter(like="held_out").notna().any(axis=1)].reset_index(drop=True)


def behind(log: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Held-out loss of a training less its matched baseline's, against the tokens seen.

    Args:
        log, baseline: two logs (`read_log`). The baseline has one depth, which every depth is compared with.

    Returns:
        A row per measurement that both have: `step`, `tokens`, `exact` and, where measured, `depth_4` (nats
        per answer token; above 0 the training is behind). No rows if the two did not see the same tokens.
    """
    steps, others = (rows.assign(tokens=rows["tokens"].fillna(0).cumsum()) for rows in (log, baseline))
    both = steps.merge(others[["step", "tokens", "held_out_exact"]], on="step", suffixes=("", "_baseline"))
    both = both.dropna(subset=["held_out_exact", "held_out_exact_baseline"])
    if (both["tokens"] != both["tokens_baseline"]).any():
        both = both.iloc[:0]
    columns = {"exact": "held_out_exact", "depth_4": "held_out_depth_4"}
    less = {new: both[old] - both["held_out_exact_baseline"] for new, old in columns.items() if old in both}
    return both[["step", "tokens"]].assign(**less).reset_index(drop=True)


def log_words(log: pd.DataFrame, name: str) -> str:
    """First and last losses, speed and the stream's weights of a training, in one sentence."""
    steps = log.dropna(subset=["loss"]) if "loss" in log else log.iloc[:0]
    if steps.empty:
        return f"{name}: no step was taken."
    first, last = steps["loss"].head(SMOOTHING).mean(), steps["loss"].tail(SMOOTHING).mean()
    words = (
        f"{name}: training loss {first:.3f} -> {last:.3f} nats per answer token (means of the "
        f"first and last {min(SMOOTHING, len(steps))} of {len(steps)} steps), "
        f"{steps['tokens'].sum():,.0f} tokens at {steps['tokens'].sum() / steps['seconds'].sum():.0f}/s"
    )
    held_out = looks(log)
    if "held_out_exact" in held_out and len(held_out) > 1:
        exact = held_out["held_out_exact"]
        words += f"; held out, exact evaluation: {exact.iloc[0]:.3f} -> {exact.iloc[-1]:.3f}"
    if "alpha_mean" in steps and steps["alpha_mean"].notna().any():
        end = steps.iloc[-1]
        words += (
            f"; alpha {steps['alpha_mean'].iloc[0]:.4f} -> {end['alpha_mean']:.4f} "
            f"(range {end['alpha_min']:.4f} to {end['alpha_max']:.4f})"
        )
    if "gamma_mean" in steps and steps["gamma_mean"].notna().any():
        gamma = steps["gamma_mean"]
        words += f"; gamma (mean over layers) {gamma.iloc[0]:.4f} -> {gamma.iloc[-1]:.4f}"
    return words + "."


def write_card(folder: Path, scores: Scores | None = None, baseline: Path | None = None) -> Path:
    """Write `README.md` into a trained checkpoint's folder.

    Args:
        folder: of a finished training.
        scores: the evaluation; without it the card says that nothing was evaluated.
        baseline: folder of the matched baseline, to say how far behind it the training is.

    Raises:
        SSTError: the folder holds no training.
    """
    about, log = read_about(folder), read_log(folder)
    held_out, losses, accuracies = looks(log), "", ""
    if scores is not None:
        is_loss = scores.table["task"].str.endswith("loss")
        losses, accuracies = _table(scores.table[is_loss]), _table(scores.table[~is_loss])
    template = resources.files("sst_interp.training").joinpath("card.md").read_text()
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    text = environment.from_string(template).render(
        about=about,
        recipe=about["recipe"],
        course=log_words(log, about["recipe"]["name"]),
        solved=how_well_solved(log, about["recipe"].get("tolerance", TrainingRecipe.tolerance)),
        steps=log.dropna(subset=["loss"]),
        looks=_table(held_out.round(4)) if len(held_out) else "",
        behind="" if baseline is None else _table(behind(log, read_log(baseline)).round(4)),
        unfinished=_still_falling(held_out),
        image=IMAGE if (folder / IMAGE).is_file() else None,
        scores=scores,
        losses=losses,
        accuracies=accuracies,
    )
    replace_bytes(folder / "README.md", text.strip().encode() + b"\n")
    return folder / "README.md"


def how_well_solved(log: pd.DataFrame, tolerance: float) -> str:
    """Whether the method `exact` reached its tolerance, in words; empty for another method."""
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


def _still_falling(held_out: pd.DataFrame) -> str:
    """The last two held-out losses, if the loss fell by more than 1%; else empty."""
    losses = held_out["held_out_exact"].dropna().tolist() if "held_out_exact" in held_out else []
    if len(losses) < 2 or losses[-1] > 0.99 * losses[-2]:
        return ""
    return f"{losses[-2]:.3f} to {losses[-1]:.3f} over the last {held_out['step'].diff().iloc[-1]:.0f} steps"


def _table(table: pd.DataFrame) -> str:
    """A DataFrame as a Markdown table with every digit it has; NaN stays empty."""
    rows = table.map(lambda value: "" if pd.isna(value) else str(value)).to_dict("records")
    return markdown(rows) if rows else ""  # type: ignore[arg-type]
