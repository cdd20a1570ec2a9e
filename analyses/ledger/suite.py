"""Every analysis of a run, one after the other, each kept or else the reason why there is none.

A broken or missing table costs the analyses that need it and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from sst_interp.analyses.basin_shifts import PAPER_THRESHOLD, BasinShifts, basin_shifts
from sst_interp.analyses.bf16_noise import bf16_noise
from sst_interp.analyses.bimodality import bimodality
from sst_interp.analyses.content import content
from sst_interp.analyses.divergence import divergence
from sst_interp.analyses.dwell import dwell
from sst_interp.analyses.layer_profile import layer_profile
from sst_interp.analyses.overthinking import overthinking
from sst_interp.analyses.parts.token_classes import TokenClass
from sst_interp.analyses.position_zero import position_zero
from sst_interp.analyses.precedence import precedence
from sst_interp.analyses.result import Result
from sst_interp.analyses.settling import settling
from sst_interp.analyses.shifts_per_question import shifts_per_question
from sst_interp.analyses.state_settling import state_settling
from sst_interp.analyses.statistics.bootstrap import RESAMPLES
from sst_interp.analyses.token_replacement import token_replacement
from sst_interp.choices import COMPARISONS, Choices
from sst_interp.errors import SSTError
from sst_interp.schema import OPTIONAL, TABLES, to_frame

Progress = Callable[[int, int, str], Any]
"""Told how many analyses are done, of how many, and which is next."""
PER_COMPARISON = (
    *("basin_shifts", "bimodality", "token_replacement", "precedence", "bf16_noise"),
    *("position_zero", "content", "layer_profile", "dwell", "shifts_per_question"),
)
PER_RUN = ("divergence", "overthinking", "settling", "state_settling")
R = TypeVar("R", bound=Result)


@dataclass(frozen=True, eq=False)
class Suite:
    """The analyses of one run."""

    choices: Choices
    order: tuple[str, ...]
    """Comparisons, the one the choices lead with first."""
    tables: dict[str, pd.DataFrame]
    results: dict[str, Result] = field(default_factory=dict)
    """`analysis.comparison`, or `analysis` where there is one per run -> its result."""
    missing: dict[str, str] = field(default_factory=dict)
    """The same names -> why there is no result."""

    def get(self, kind: type[R], name: str, comparison: str | None = None) -> R:
        """The result of an analysis.

        Raises:
            SSTError: if there is none or it was not testable; the message says why.
        """
        key = name if comparison is None else f"{name}.{comparison}"
        found = self.results.get(key)
        if not isinstance(found, kind):
            raise SSTError(self.missing.get(key, "it was not analysed"))
        if why := getattr(found, "not_testable", None):
            raise SSTError(why)
        return found

    def of(self, table: str, comparison: str) -> pd.DataFrame:
        """The rows of a table that are of one comparison."""
        rows = self.tables[table]
        return rows[(rows["comparison"] == comparison).to_numpy(dtype=bool)]


def table_of(run: Any, name: str) -> tuple[pd.DataFrame, str | None]:
    """A run's table; if it has none, an empty one with the right columns, and why."""
    why = None
    try:
        table = getattr(run, name, None)
    except SSTError as error:
        table, why = None, error.message
    if table is not None and len(table):
        return table, None
    columns = [c for c in TABLES[name].names if c not in OPTIONAL]
    return to_frame(TABLES[name].empty_table().select(columns)), why


def analyse(
    run: Any,
    blend_off: Any = None,
    reshuffled: Any = None,
    baseline: Any = None,
    beyond: Any = None,
    lens: Any = None,
    token_class: TokenClass | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Suite:
    """Run them all; arguments as in `claims`. No exception of an analysis gets out: it is in `missing`."""
    choices = run.recipe.choices
    kind = choices.overlap
    tables, unread = {}, {}
    for name in ("pairs", "outputs", "steps", "questions", "noise", "nudges"):
        tables[name], why = table_of(run, name)
        if why:
            unread[name] = why
    order = tuple(sorted(COMPARISONS, key=lambda c: c != choices.comparison))
    suite = Suite(choices, order, tables)
    noise, nudges, steps = (tables[t] if len(tables[t]) else None for t in ("noise", "nudges", "steps"))
    other = {
        name: _tables_of(given)
        for name, given in (
            ("control", blend_off),
            ("other", reshuffled),
            ("baseline", baseline),
            ("lens", lens),
        )
    }
    deep_pairs, more = _tables_of(beyond)
    of = len(order) * len(PER_COMPARISON) + len(PER_RUN)
    how: dict[str, Any] = {"resamples": resamples, "seed": seed}

    def attempt(name: str, needs: tuple[str, ...], call: Callable[[], Result]) -> None:
        if progress is not None:
            progress(len(suite.results) + len(suite.missing), of, name)
        broken = [unread[table] for table in needs if table in unread]
        if broken:
            suite.missing[name] = broken[0]
            return
        try:
            with np.errstate(all="ignore"):
                suite.results[name] = call()
        except SSTError as error:
            suite.missing[name] = error.message
        except Exception as error:  # one broken table must not take the other claims with it
            suite.missing[name] = f"the analysis failed ({type(error).__name__}: {error})"

    state = ("pairs",)
    # Up to position 0 every comparison reads the same text: with one threshold equal states are judged alike.
    at_zero = PAPER_THRESHOLD if choices.threshold == "antimode" else float(choices.threshold)
    for c in order:
        pairs, outputs = (suite.of(t, c) for t in ("pairs", "outputs"))
        attempt(f"basin_shifts.{c}", state, partial(basin_shifts, pairs, c, choices, **how))
        attempt(f"bimodality.{c}", state, partial(bimodality, pairs, c, kind, **how))
        shifts = suite.results.get(f"basin_shifts.{c}")
        level = threshold_in(suite, c)
        layers = other["lens"][0]
        call: Callable[[], Result] = partial(
            token_replacement, outputs, pairs, c, steps, level, kind, lens=layers, **how
        )
        attempt(f"token_replacement.{c}", ("pairs", "outputs"), call)
        call = partial(precedence, pairs, outputs, c, level, nudges, kind, **how)
        attempt(f"precedence.{c}", ("pairs", "outputs"), call)
        attempt(f"bf16_noise.{c}", state, partial(bf16_noise, pairs, c, noise, **how))
        own, (control, control_ids) = tables["questions"], other["control"]
        ids = own if len(own) else None
        call = partial(position_zero, pairs, c, choices, at_zero, control, ids, control_ids, **how)
        attempt(f"position_zero.{c}", state, call)
        second, second_ids = other["other"]
        call = partial(content, pairs, c, steps, token_class, second, ids, second_ids, choices, level, **how)
        attempt(f"content.{c}", state, call)
        for name, analysis in (
            ("layer_profile", layer_profile),
            ("dwell", dwell),
            ("shifts_per_question", shifts_per_question),
        ):
            if isinstance(shifts, BasinShifts):
                attempt(f"{name}.{c}", state, partial(analysis, pairs, shifts, **how))
            else:
                suite.missing[f"{name}.{c}"] = suite.missing[f"basin_shifts.{c}"]
    level = threshold_in(suite, "free")
    call = partial(divergence, tables["outputs"], tables["pairs"], steps, level, kind, **how)
    attempt("divergence", ("pairs", "outputs"), call)
    call = partial(overthinking, tables["questions"], more, other["baseline"][1], **how)
    attempt("overthinking", ("questions",), call)
    attempt(
        "settling", ("questions",), partial(settling, tables["questions"] if more is None else more, **how)
    )
    deepest = tables["pairs"] if deep_pairs is None else deep_pairs
    attempt("state_settling", ("pairs",), partial(state_settling, deepest, **how))
    if progress is not None:
        progress(of, of, "done")
    return suite


def threshold_in(suite: Suite, comparison: str) -> float:
    """The threshold of shifts in a comparison; the paper's if there was nothing to find one in."""
    try:
        return suite.get(BasinShifts, "basin_shifts", comparison).threshold
    except SSTError:
        return PAPER_THRESHOLD


def _tables_of(run: Any) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """The pairs and questions of another run; None for what it does not have."""
    if run is None:
        return None, None
    pairs, questions = (table_of(run, name)[0] for name in ("pairs", "questions"))
    return (pairs if len(pairs) else None), (questions if len(questions) else None)
