"""Trajectory geometry: does a state settle, turn back or slide as it is iterated?

    trajectory_geometry(read_states(model, texts, iterations=4)).verdict
    geometry_of_run(open_run("demo")).verdict

The steps of a cell are u_k = y_(k+1) - y_k, K = depth - 1 of them. A state

- *settles* if its last step is less than half as long as its first: steps of one size never settle;
- else *slides* if |sum of the steps| / sum of their lengths exceeds 1 / sqrt(K), what orthogonal steps have;
- else *orbits*: its steps turn back on one another.

**The null** is the same steps in shuffled order. All orders are as likely and none is drawn: the share that
settles by chance is that of the ordered pairs of steps of which the second is less than half as long, and the
cosine by chance is the mean over all pairs. The intervals resample questions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.analyses.plots import Line, lines
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    as_columns,
    mean_over_questions,
    questions_words,
)
from sst_interp.errors import Untestable
from sst_interp.models.measures import wide
from sst_interp.runs.run import Run

HALF = 0.5
"""A last step below this share of the first has settled."""


@dataclass(frozen=True, eq=False)
class Geometry(Result):
    """The shape of the trajectories at position 0."""

    by_layer: pd.DataFrame
    """A row per layer that moves: shares `settle` (with `settle_low`, `settle_high`), `settle_shuffled`,
    `orbit`, `slide`; `cosine` of successive steps, `cosine_shuffled`; `last_over_first` (median ratio of step
    lengths), `displacement` (median of |y_D - y_1| / |y_1|)."""
    excess: Interval
    """Share that settles minus the share that shuffled steps would, mean over layers."""
    settle: float
    """Share of all cells that settles."""
    slide: float
    """Share that slides."""
    steps: int
    """K."""

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Trajectory geometry"

    @property
    def table(self) -> pd.DataFrame:
        """A row per layer."""
        return self.by_layer

    @property
    def verdict(self) -> str:
        """Whether states settle more often than shuffled steps would."""
        more = "States settle more often than shuffled steps would"
        if not self.excess.low > 0:
            more = "States do not settle more often than shuffled steps would"
        orbit = 1 - self.settle - self.slide
        words = f"{more}. Of the (question, layer) pairs at position 0, {self.settle:.1%} settle, "
        words += f"{self.slide:.1%} slide and {orbit:.1%} turn back; {self.steps} steps, "
        return words + f"{questions_words(self.excess.n_questions)}."

    def figure(self) -> go.Figure:
        """Share that settles by layer, seen and by chance."""
        rows, none = self.by_layer, np.full(len(self.by_layer), np.nan)
        series = [
            Line("seen", rows["layer"], rows["settle"], rows["settle_low"], rows["settle_high"]),
            Line("steps shuffled", rows["layer"], rows["settle_shuffled"], none, none),
        ]
        sub = f"position 0, {self.steps} steps, {questions_words(self.excess.n_questions)}"
        return lines("Share of states that settle", sub, "layer (0-based)", "share", series, percent=True)


def geometry_of_run(run: Run) -> Geometry:
    """The geometry of a run's kept states.

    Raises:
        SSTError: the run keeps no states of position 0.
        Untestable: fewer than three iterations, or nothing moves.
    """
    known = sorted(int(q) for q in run.questions["question"].unique())
    return trajectory_geometry(torch.stack([run.states(q) for q in known]))


def trajectory_geometry(
    states: Float[Tensor, "question layer iteration d_model"], resamples: int = 2000, seed: int = 0
) -> Geometry:
    """The geometry of one token's states per question. Costs nothing beside reading them.

    Raises:
        Untestable: fewer than three iterations, or no state moves.
    """
    if states.shape[2] < 3:
        raise Untestable("a trajectory needs three iterations, for its second step")
    y = wide(states)
    u = y[:, :, 1:] - y[:, :, :-1]
    size, k = u.norm(dim=-1), u.shape[2]
    moves = (size > 0).all(-1)
    if not bool(moves.any()):
        raise Untestable("no state moves from one iteration to the next")
    unit = u / size.clamp_min(torch.finfo(u.dtype).tiny)[..., None]
    cosines = unit @ unit.transpose(-1, -2)
    settle = size[..., -1] < HALF * size[..., 0]
    by_chance = (size[..., None, :] < HALF * size[..., None]).double().sum((-1, -2)) / (k * (k - 1))
    straight = u.sum(2).norm(dim=-1) / size.sum(-1).clamp_min(torch.finfo(u.dtype).tiny)
    slide = ~settle & (straight > k**-0.5)
    off = ~torch.eye(k, dtype=torch.bool)
    columns = {
        "settle_shuffled": by_chance,
        "orbit": ~settle & ~slide,
        "slide": slide,
        "cosine": cosines.diagonal(1, -2, -1).mean(-1),
        "cosine_shuffled": cosines[..., off].mean(-1),
    }
    rows = []
    for layer in range(y.shape[1]):
        here = moves[:, layer]
        if not bool(here.any()):
            continue
        share = mean_over_questions(settle[here, layer].double().numpy(), resamples, seed)
        row = {"layer": layer, **as_columns(settle=share)}
        row |= {name: float(value[here, layer].double().mean()) for name, value in columns.items()}
        row["last_over_first"] = float((size[here, layer, -1] / size[here, layer, 0]).median())
        moved = (y[here, layer, -1] - y[here, layer, 0]).norm(dim=-1)
        row["displacement"] = float((moved / y[here, layer, 0].norm(dim=-1)).median())
        rows.append(row)
    own = torch.where(moves, settle.double() - by_chance, torch.nan).nanmean(1).numpy()
    excess = mean_over_questions(own, resamples, seed)
    shares = [float(flag[moves].double().mean()) for flag in (settle, slide)]
    return Geometry(pd.DataFrame(rows), excess, shares[0], shares[1], k)


def orbit(states: Float[Tensor, "iteration d_model"]) -> tuple[Float[Tensor, "iteration 2"], float]:
    """One token's states on their two principal axes, and the share of the variance that these show."""
    centred = wide(states) - wide(states).mean(0)
    left, size, _ = torch.linalg.svd(centred, full_matrices=False)
    shown = size[:2].square().sum() / size.square().sum().clamp_min(torch.finfo(size.dtype).tiny)
    return left[:, :2] * size[:2], float(shown)
