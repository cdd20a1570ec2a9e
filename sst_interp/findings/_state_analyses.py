"""The analyses of the state as they are today, registered. This file goes when they are functions of a
`Contrast` themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd

from sst_interp.analyses.basin_shifts import BasinShifts, basin_shifts
from sst_interp.analyses.bf16_noise import bf16_noise
from sst_interp.analyses.bimodality import bimodality
from sst_interp.analyses.content import content
from sst_interp.analyses.contrast import PAPER_THRESHOLD, Contrast
from sst_interp.analyses.dwell import dwell
from sst_interp.analyses.layer_profile import layer_profile
from sst_interp.analyses.position_zero import position_zero
from sst_interp.analyses.result import Result, analysis
from sst_interp.analyses.shifts_per_question import shifts_per_question
from sst_interp.errors import Untestable

CAPTIONS = {
    "overlap": "Two separate humps would be two basins; one hump with a tail is one spread that a threshold "
    "cuts through.",
    "by_position": "A high rate at position 0 alone is also what a start-up transient looks like.",
    "rates": "Late positions rest on fewer questions, because short answers have ended.",
    "norm_ratio": "Whether a shifted state also changes its size: an overlap sees directions only.",
}


def tested(call: Callable[[], Any]) -> Any:
    result = call()
    if getattr(result, "not_testable", None):
        raise Untestable(result.not_testable)
    return result


def beside(c: Contrast, role: str) -> tuple[pd.DataFrame | None, pd.DataFrame | None, pd.DataFrame | None]:
    """Pairs of a companion, and the questions of both runs."""
    pairs = c.beside[role].get("pairs", c.comparison) if role in c.beside else None
    if pairs is None:
        return None, None, None
    return pairs, c.tables.get("questions"), c.beside[role].get("questions")


def how(c: Contrast) -> dict[str, int]:
    return dict(zip(("resamples", "seed"), c.resampling, strict=True))


def shifts_of(c: Contrast) -> BasinShifts:
    return tested(partial(basin_shifts, c.all_rows, c.comparison, c.choices, **how(c)))


def _basin_shifts(c: Contrast) -> Result:
    return shifts_of(c)


def _bimodality(c: Contrast) -> Result:
    return tested(partial(bimodality, c.all_rows, c.comparison, c.kind, **how(c)))


def _bf16_noise(c: Contrast) -> Result:
    return tested(partial(bf16_noise, c.all_rows, c.comparison, c.tables.get("noise"), **how(c)))


def _position_zero(c: Contrast) -> Result:
    fixed = c.choices.threshold
    level = PAPER_THRESHOLD if fixed == "antimode" else float(fixed)
    control = beside(c, "blend_off")
    call = partial(position_zero, c.all_rows, c.comparison, c.choices, level, *control, *c.resampling)
    return tested(call)


def _content(c: Contrast) -> Result:
    second = beside(c, "reshuffled")
    steps = c.tables.get("steps")
    return tested(
        partial(
            content, c.all_rows, c.comparison, steps, c.token_class, *second, c.choices, c.threshold,
            *c.resampling,
        )
    )  # fmt: skip


def _layer_profile(c: Contrast) -> Result:
    return tested(partial(layer_profile, c.all_rows, shifts_of(c), *c.resampling))


def _dwell(c: Contrast) -> Result:
    return tested(partial(dwell, c.all_rows, shifts_of(c), *c.resampling))


def _shifts_per_question(c: Contrast) -> Result:
    return tested(partial(shifts_per_question, c.all_rows, shifts_of(c), *c.resampling))


for _call, _heading, _asks, _claims, _order in (
    (_basin_shifts, "Basin shifts", "How much of the state is reorganised, and where?", ("C1", "C3"), 10),
    (_bimodality, "Two modes or one", "Are stable and shifted two kinds, or one spread?", ("C2",), 20),
    (_position_zero, "Position 0", "Is a shift at the first position more than a start-up?", ("C8",), 30),
    (_layer_profile, "Layers", "Which layers shift more than the average of all?", (), 40),
    (_shifts_per_question, "Questions", "Is it a few questions that shift, or every one?", (), 50),
    (_dwell, "Stable stretches", "How long does a layer stay stable between shifts?", (), 60),
    (_bf16_noise, "Change and rounding", "Is the change more than arithmetic noise?", ("C7",), 90),
    (_content, "Position or content", "Does what is being said decide what shifts?", ("C9",), 100),
):
    _captions = CAPTIONS if _call is _basin_shifts else {}
    analysis(
        _heading, _asks, name=_call.__name__[1:], claims=_claims, order=_order, captions=_captions
    )(_call)  # fmt: skip
