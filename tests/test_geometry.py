"""Trajectory geometry on planted trajectories: what settles, slides and turns back is called so."""

import math

import pytest
import torch

from sst_interp.errors import Untestable
from sst_interp.experiments.geometry import orbit, trajectory_geometry


def planted(steps):
    """Ten questions and one layer; `steps` [K, 2] turned by another angle for each question."""
    made = []
    for question in range(10):
        c, s = math.cos(question), math.sin(question)
        turned = torch.tensor(steps, dtype=torch.float64) @ torch.tensor(
            [[c, s], [-s, c]], dtype=torch.float64
        )
        made.append(torch.cat([torch.zeros(1, 2), turned.cumsum(0)]) + 5)
    return torch.stack(made)[:, None]


SPIRAL = [[0.6**k * math.cos(k), 0.6**k * math.sin(k)] for k in range(6)]
CIRCLE = [[math.cos(k * math.pi / 3), math.sin(k * math.pi / 3)] for k in range(6)]
LINE = [[1.0, 0.0]] * 6
GROWING = [[1.5**k, 0.0] for k in range(6)]


@pytest.mark.parametrize(
    ("steps", "shares"),
    [(SPIRAL, (1, 0, 0)), (CIRCLE, (0, 1, 0)), (LINE, (0, 0, 1)), (GROWING, (0, 0, 1))],
)
def test_planted_trajectories_get_their_names(steps, shares):
    result = trajectory_geometry(planted(steps), resamples=50)
    row = result.by_layer.iloc[0]
    assert (row["settle"], row["orbit"], row["slide"]) == shares
    assert result.verdict.startswith("States settle more" if shares[0] else "States do not settle")


def test_the_null_is_every_order_of_the_steps():
    row = trajectory_geometry(planted([[4.0, 0.0], [1.0, 0.0], [0.0, 4.0]]), resamples=50).by_layer.iloc[0]
    assert row["settle"] == 0
    assert row["settle_shuffled"] == pytest.approx(2 / 6)  # 4 then 1, twice of six ordered pairs
    assert row["cosine"] == pytest.approx(1 / 2)
    assert row["cosine_shuffled"] == pytest.approx(1 / 3)


def test_too_short_or_still_trajectories_have_no_answer():
    for states in (torch.randn(3, 2, 2, 4), torch.ones(3, 2, 4, 4)):
        with pytest.raises(Untestable):
            trajectory_geometry(states)


def test_an_orbit_in_a_plane_is_shown_whole():
    where, shown = orbit(planted(CIRCLE)[0, 0])
    assert where.shape == (7, 2)
    assert shown == pytest.approx(1)
