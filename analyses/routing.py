"""Routing (claim C13): accuracy against the passes it costs, for every way of choosing a depth per question.

A policy looks at position 0 and picks one depth for the question. What it got right is in the run: each
question's answer at every captured depth. Three things keep the comparison fair:

- a policy with two depths can always be had by tossing a coin. `beyond` is its accuracy less what the same
  depths, dealt to questions at random, would have got: what it *knows* about questions;
- a threshold is chosen on other questions than those it is applied to;
- the oracle, which needs the right answer to choose, stands in the figure and is not a policy.

A pass is one run of the layer stack for one generated token, or one look at position 0. Prompts cost every
policy the same and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.figures import routing as routing_figures
from sst_interp.analyses.parts.answers import Answers, answers_of
from sst_interp.analyses.parts.position_traces import RULES, traces
from sst_interp.analyses.parts.routed_policies import (
    PROBE,
    by_score,
    costs_of,
    curve,
    flat,
    oracle,
    rules,
    scored,
)
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    percent_text,
    points_text,
    questions_words,
)

if TYPE_CHECKING:
    from sst_interp.analyses.halting import Halting
    from sst_interp.run import Run


@dataclass(frozen=True, eq=False)
class Routing(Result):
    """Every policy on the same questions. All intervals resample questions."""

    policies: pd.DataFrame = field(default_factory=pd.DataFrame)
    """A row per policy: name, kind (flat, policy, oracle); accuracy, passes (per question), `beyond`
    (accuracy less that of the same depths dealt at random), saved (share of the passes of the deepest flat
    depth) and broken_share (of the answers right at the shallowest depth), each with `_low` and `_high`;
    mean_depth; broken (right at the shallowest depth, wrong as routed), mended (the reverse) and
    conservative (wrong as routed, right at a deeper depth), in questions."""
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns threshold, accuracy, passes: the probe at every threshold. The best of them, picked afterwards,
    is not a policy."""
    of_question: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Columns question, id, and the depth that each policy gives."""
    label: str = ""
    """What the probe tells."""
    base: int = 1
    deepest: int = 1
    right: int = 0
    """Questions right at the shallowest depth."""
    n_questions: int = 0
    n_excluded: int = 0
    """Questions left out: a depth is missing."""
    no_probe: str | None = None
    """Why there is no probe among the policies."""
    missing: tuple[str, ...] = ()
    """Rules the tables have no numbers for."""
    not_testable: str | None = None
    """Why there is no result; None if there is one."""

    @property
    def title(self) -> str:
        """What was asked."""
        return "Routing: accuracy against passes"

    @property
    def table(self) -> pd.DataFrame:
        """A row per policy."""
        return self.policies

    @property
    def verdict(self) -> str:
        """The probe against both flat depths, what it breaks and saves, and the best rule."""
        return f"not testable: {self.not_testable}." if self.not_testable else _verdict(self)

    def figure(self) -> go.Figure:
        """Accuracy against passes per question."""
        return routing_figures.accuracy_and_passes(self)

    def row(self, name: str) -> pd.Series:
        """One policy."""
        return self.policies[(self.policies["name"] == name).to_numpy(dtype=bool)].iloc[0]


def routing(
    questions: pd.DataFrame,
    steps: pd.DataFrame | None = None,
    outputs: pd.DataFrame | None = None,
    pairs: pd.DataFrame | None = None,
    probe: Halting | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Routing:
    """Route every question by every policy.

    Args:
        questions: the run's `questions` table.
        steps: its `steps` table ...
        outputs: ... `outputs` and ...
        pairs: ... `pairs` (the `within` rows at position 0 are used), for the rules; those without their
            table are left out.
        probe: the halting probe of the same run, for its out-of-fold scores.
        resamples: question resamples.
        seed: of the resampling and of the folds.

    Returns:
        The result. With one depth, or without questions, one whose verdict begins "not testable:".
    """
    if not len(questions):
        return Routing(not_testable="the table questions of this run is empty")
    answers = answers_of(questions)
    if not len(answers.questions):
        return Routing(not_testable="no question has a row at every depth")
    depths = [int(depth) for depth in answers.depths]
    if len(depths) < 2:
        return Routing(not_testable=f"the run has one depth, {depths[0]}: there is nothing to choose")
    costs = costs_of(questions, answers)
    routed = [*flat(costs), *rules(costs, _traces(answers, steps, outputs, pairs), seed)]
    no_probe, line = _no_probe(probe, answers), pd.DataFrame(columns=["threshold", "accuracy", "passes"])
    if probe is not None and no_probe is None:
        own = probe.scores.set_index("question")["score"].loc[answers.questions].to_numpy(dtype=float)
        routed.append(by_score(costs, probe, own))
        line = curve(costs, probe, own)
    routed.append(oracle(costs))
    named = {r.name: costs.depths[r.place] for r in routed if r.kind != "flat"}
    return Routing(
        policies=pd.DataFrame([scored(r, costs, resamples, seed) for r in routed]),
        curve=line,
        of_question=pd.DataFrame({"question": answers.questions, "id": answers.ids} | named),
        label=probe.label if probe is not None else "",
        base=depths[0],
        deepest=depths[-1],
        right=int(answers.correct[:, 0].sum()),
        n_questions=len(answers.questions),
        n_excluded=answers.n_excluded,
        no_probe=no_probe,
        missing=tuple(name for name in RULES if name not in {r.name for r in routed}),
    )


def routing_of(run: Run, probe: Halting | None = None, resamples: int = RESAMPLES) -> Routing:
    """The same of a captured run: reads the parts of its tables that are needed."""
    changes = ["question", "comparison", "position", "a", "b"]
    steps = run.table("steps", ["question", "text", "depth", "position", "iteration", "entropy"])
    outputs = run.table("outputs", [*changes, "kl"], "within")
    pairs = run.table("pairs", [*changes, "layer", "relative_l2"], "within")
    return routing(run.questions, steps, outputs, pairs, probe, resamples)


def _traces(
    answers: Answers,
    steps: pd.DataFrame | None,
    outputs: pd.DataFrame | None,
    pairs: pd.DataFrame | None,
) -> dict[str, np.ndarray]:
    own, change = ["text", "depth", "iteration", "entropy"], ["comparison", "a", "b", "kl", "relative_l2"]
    nothing = pd.DataFrame(columns=["question", "position", *own, *change])
    tables = (nothing if table is None else table for table in (steps, outputs, pairs))
    return traces(answers.questions, int(answers.depths[-1]), *tables)


def _no_probe(probe: Halting | None, answers: Answers) -> str | None:
    if probe is None:
        return "none was given"
    if probe.not_testable:
        return probe.not_testable
    if not np.isin(answers.questions, probe.scores["question"]).all():
        return f"label {probe.label!r} is about some questions only, and which is not known beforehand"
    return None


def _verdict(found: Routing) -> str:
    table = found.policies
    flat, policies = table[table["kind"] == "flat"], table[table["kind"] == "policy"]
    first, last = flat.iloc[0], flat.iloc[-1]
    words = f"{questions_words(found.n_questions)}; flat depth {found.base} has "
    words += f"{percent_text(first['accuracy'])} at {first['passes']:.1f} passes per question, flat depth "
    words += f"{found.deepest} {percent_text(last['accuracy'])} at {last['passes']:.1f}"
    words += f" and breaks {last['broken']} of {found.right} right answers."
    for name in [PROBE] if found.no_probe is None else []:
        words += " " + _policy_words(found, found.row(name), f"the {found.label} probe, out of fold")
    if found.no_probe is not None:
        words += f" The probe is not testable: {found.no_probe}."
    rules = policies[policies["name"] != PROBE]
    if len(rules):
        best = rules.iloc[int(np.argmax(rules["accuracy"].to_numpy()))]
        words += " " + _policy_words(found, best, f"the best rule, {best['name']}")
    oracle = table.iloc[-1]
    return words + f" The oracle, not a policy, has {percent_text(oracle['accuracy'])}."


def _policy_words(found: Routing, row: pd.Series, who: str) -> str:
    def interval(name: str) -> Interval:
        exact, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
        return Interval(exact, low, high, found.n_questions, reason="one question")

    beyond = interval("beyond")
    words = f"Routed by {who}, accuracy is {interval('accuracy').text(percent=True)} at "
    words += f"{row['passes']:.1f} passes "
    words += (
        f"({percent_text(row['saved'])} saved); it breaks {row['broken']} of {found.right} right answers, "
    )
    words += (
        f"mends {row['mended']} and makes {row['conservative']} conservative errors. Over the same depths "
    )
    words += f"dealt at random it has {points_text(beyond)}"
    if beyond.known and not beyond.low > 0:
        words += ": no more than chance is shown"
    return words + "."
