"""What a training leaves in its folder besides the checkpoint, and how it is read back and said in words.

NAME/training.json     the recipe, and what the training was done with
NAME/training.jsonl    a line per step; lines with `held_out_...` hold the loss on held-out examples
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from sst_interp.errors import SSTError

LOG, ABOUT = "training.jsonl", "training.json"
SMOOTHING = 20
"""Steps over which a training loss is averaged."""


def read_about(folder: Path) -> dict[str, Any]:
    """`training.json` of a checkpoint.

    Raises:
        SSTError: it cannot be read.
    """
    try:
        return json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise SSTError(f"{folder / ABOUT} cannot be read: {error}", "--fresh trains anew") from None


def read_log(folder: Path) -> pd.DataFrame:
    """`training.jsonl` of a checkpoint: a row per step.

    Raises:
        SSTError: it cannot be read.
    """
    try:
        return pd.DataFrame(json.loads(line) for line in (folder / LOG).read_text().splitlines())
    except (OSError, ValueError) as error:
        raise SSTError(f"{folder / LOG} cannot be read: {error}", "--fresh trains anew") from None


def looks(log: pd.DataFrame) -> pd.DataFrame:
    """The rows of a log in which held-out examples were measured."""
    columns = [c for c in map(str, log) if c in ("step", "alpha_mean", "gamma_mean") or c[:8] == "held_out"]
    rows = log[columns]
    return rows[rows.filter(like="held_out").notna().any(axis=1)].reset_index(drop=True)


def log_words(log: pd.DataFrame, name: str) -> str:
    """First and last losses of a training, how fast it went, and its stream's weights, in one sentence."""
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
