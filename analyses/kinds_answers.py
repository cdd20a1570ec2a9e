"""What depth does to the answers of each kind of model: how many can be read, and how many are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses import plots as intervals
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    questions_words,
    share,
)


@dataclass(frozen=True, eq=False)
class KindsAnswers(Result):
    """Answers by run and depth; intervals resample questions."""

    answers: pd.DataFrame
    """A row per run and depth: run, depth, questions, `read` (share of replies with an answer in them),
    `right` with its ends (share of all questions), and `change` with its ends: right minus right at depth 1,
    of the same questions (NaN at depth 1)."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Answers by kind and depth"

    @property
    def table(self) -> pd.DataFrame:
        """A row per run and depth."""
        return self.answers

    @property
    def shown(self) -> list[dict[str, str]]:
        """The table as commands and documents show it."""
        return [
            {
                "run": row["run"],
                "depth": str(row["depth"]),
                "questions": str(row["questions"]),
                "an answer can be read": f"{row['read']:.0%}",
                "right": _interval(row, "right").text(percent=True),
                "minus depth 1": "" if row["depth"] == 1 else _interval(row, "change").text(percent=True),
            }
            for row in self.answers.to_dict("records")
        ]

    @property
    def verdict(self) -> str:
        """Which runs' accuracy depth changes, and whose replies have no answer any more."""
        if self.answers.empty:
            return "not testable: no answers were given."
        said = []
        for run, rows in self.answers.groupby("run", sort=False):
            last = rows.iloc[-1]
            if last["depth"] == 1:
                continue
            change = _interval(last, "change")
            told = change.low > 0 or change.high < 0
            words = f"{run} from depth 1 to {last['depth']} {change.text(percent=True)} right"
            words += "" if told else ", no change told apart from none"
            if last["read"] < 0.5:
                words += f"; only {last['read']:.0%} of the replies have an answer at all"
            said.append(words)
        n = questions_words(int(self.answers["questions"].max()))
        return f"{n}: " + "; ".join(said) + "." if said else f"not testable: {n} at one depth."

    def figure(self) -> go.Figure:
        """Accuracy by depth, a line per run."""
        series = [
            intervals.Line(str(run), own["depth"], own["right"], own["right_low"], own["right_high"])
            for run, own in self.answers.groupby("run", sort=False)
        ]
        n = questions_words(int(self.answers["questions"].max()) if len(self.answers) else 0)
        return intervals.lines(
            "Right answers by depth", f"{n}; bands: 95%, questions resampled", "iteration depth",
            "share of questions answered rightly", series, percent=True,
        )  # fmt: skip


def kinds_answers(
    questions: Mapping[str, pd.DataFrame], resamples: int = RESAMPLES, seed: int = 0
) -> KindsAnswers:
    """Answers of several runs.

    Args:
        questions: by run, its `questions` table.
        resamples: question resamples.
        seed: of the resampling.
    """
    records = []
    for run, table in questions.items():
        right = table.pivot(index="question", columns="depth", values="correct").astype(float)
        for depth in right.columns:
            own = table[table["depth"] == depth]
            correct = right[depth].to_numpy()
            change = np.stack([correct - right[1].to_numpy(), np.ones(len(correct))], axis=1)
            moved = cluster_bootstrap(change, resamples=resamples, seed=seed)
            nothing = Interval(np.nan, np.nan, np.nan, 0)
            records.append(
                {
                    "run": run,
                    "depth": int(depth),
                    "questions": len(right),
                    "read": float(own["answer"].notna().mean()),
                    **as_columns(
                        right=share(right.index.to_numpy(), correct, resamples, seed),
                        change=nothing if depth == 1 else moved,
                    ),
                }
            )
    return KindsAnswers(pd.DataFrame(records))


def _interval(row: Mapping[Any, Any] | pd.Series, name: str) -> Interval:
    low, high = float(row[f"{name}_low"]), float(row[f"{name}_high"])
    reason = None if np.isfinite(low) else "one question"
    return Interval(float(row[name]), low, high, int(row["questions"]), reason=reason)
