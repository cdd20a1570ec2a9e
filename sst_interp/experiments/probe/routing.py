"""Routing (claim C13): accuracy against the passes it costs, for every way of choosing a depth per question.

A policy looks at position 0 and picks one depth for the question; the run has its answer at every captured
depth. `beyond` is a policy's accuracy minus that of the same depths dealt to questions at random. A threshold
is chosen on other questions than those it is applied to. The oracle needs the right answer: it is no policy.

A pass is one run of the layer stack for one generated token, or one look at position 0. Prompts cost every
policy the same and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from sst_interp.analyses.answers import Answers, answers_of, mean_of
from sst_interp.analyses.plots import BLUE, GREY, ORANGE, VERMILLION, canvas
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.along_texts import over_questions
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    cluster_bootstrap,
    points_text,
    questions_words,
    share_of_questions,
)
from sst_interp.analyses.statistics.clusters import mean_t
from sst_interp.errors import Untestable
from sst_interp.experiments.probe import check_depths
from sst_interp.experiments.probe.finding import Halting, crosses
from sst_interp.experiments.probe.validate import random_keys
from sst_interp.models.halting import Convergence, Entropy, OutputChange, Threshold

if TYPE_CHECKING:
    from sst_interp.runs.run import Run

FOLDS = 6
LEVELS = 20
"""Candidate thresholds of a rule: quantiles of its numbers, never and always."""
THRESHOLDS: dict[str, type[Threshold]] = {
    "convergence of the state": Convergence,
    "KL between iterations": OutputChange,
    "entropy": Entropy,
}
"""Halting rules that need no training."""
ORACLE = "oracle over depths (not a policy)"
PROBE = "probe"
SERIES = (
    ("flat", "flat depths", GREY, "circle", "lines+markers+text"),
    ("policy", "policies, out of fold", BLUE, "diamond", "markers+text"),
    ("oracle", ORACLE, VERMILLION, "x", "markers"),
)


@dataclass(frozen=True, eq=False)
class Routing(Result):
    """Every policy on the same questions. All intervals resample questions."""

    policies: pd.DataFrame
    """A row per policy: name, kind (flat, policy, oracle); accuracy, passes (per question), `beyond`
    (accuracy minus that of the same depths dealt at random), spared (share of questions that break, less
    that with the same depths dealt at random, which is `dealt_broken`), saved (share of the passes of the
    deepest flat depth) and broken_share (of the answers right at the shallowest depth), each with `_low`
    and `_high`; mean_depth; broken (right at the shallowest depth, wrong as routed), mended (the reverse)
    and conservative (wrong as routed, right at a deeper depth), in questions.
    """
    curve: pd.DataFrame
    """Columns threshold, accuracy, passes: the probe at every threshold. The best of them is no policy."""
    of_question: pd.DataFrame
    """Columns question, id, and the depth that each policy gives."""
    label: str
    """The probe's."""
    base: int
    deepest: int
    right: int
    """Questions right at the shallowest depth."""
    n_questions: int
    n_excluded: int
    """Questions that lack a depth."""
    no_probe: str | None
    """Why there is no probe among the policies."""
    missing: tuple[str, ...]
    """Rules without numbers in the tables."""

    @property
    def title(self) -> str:
        """The heading."""
        return "Routing: accuracy against passes"

    @property
    def table(self) -> pd.DataFrame:
        """A row per policy."""
        return self.policies

    @property
    def verdict(self) -> str:
        """Whether the probe, or else the best rule, beats the same depths dealt at random."""
        rules = self.policies[(self.policies["kind"] == "policy") & (self.policies["name"] != PROBE)]
        routed = [(f"The {self.label} probe", self.row(PROBE))] if self.no_probe is None else []
        if len(rules):
            best = rules.iloc[int(np.argmax(rules["accuracy"].to_numpy()))]
            routed.append((f"The best rule ({best['name']})", best))
        words = f"{questions_words(self.n_questions)}."
        for place, (who, row) in enumerate(routed):
            over = self.interval(row, "beyond")
            knows = "beats" if over.low > 0 else "is worse than" if over.high < 0 else "does not beat"
            if place == 0:
                accuracy = self.interval(row, "accuracy").text(percent=True)
                words = f"{who} {knows} depths dealt at random. {words} "
                words += f"Accuracy {accuracy}, {points_text(over)} over them."
            else:
                words += f" {who}: {points_text(over)}."
        return words if self.no_probe is None else f"{words} No probe: {self.no_probe}."

    def interval(self, row: pd.Series, name: str) -> Interval:
        """One number of a policy."""
        exact, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
        return Interval(exact, low, high, self.n_questions, reason="one question")

    def figure(self) -> go.Figure:
        """Accuracy against passes per question. A coin reaches the line between two flat depths."""
        figure = canvas(
            "Accuracy against passes",
            f"{questions_words(self.n_questions)}; 95% intervals, questions resampled",
            "passes through the layer stack per question",
            "share of questions right",
        )
        if len(self.curve):
            curve = self.curve.sort_values("passes")
            figure.add_scatter(
                x=curve["passes"], y=curve["accuracy"], mode="lines", hoverinfo="skip",
                name="the probe at every threshold (the best of them is no policy)",
                line={"color": ORANGE, "width": 1, "dash": "dot"},
            )  # fmt: skip
        for kind, name, colour, symbol, mode in SERIES:
            rows = self.policies[self.policies["kind"] == kind]
            crosses(
                figure, rows, "passes", "accuracy", colour,
                mode=mode, name=name, textposition="top center", textfont={"size": 11},
                marker={"color": colour, "size": 10, "symbol": symbol}, line={"color": colour, "dash": "dot"},
                customdata=rows[["broken", "mended", "conservative", "saved"]],
                hovertemplate="%{text}: %{y:.1%} at %{x:.1f} passes<br>%{customdata[0]} broken, "
                "%{customdata[1]} mended, %{customdata[2]} conservative errors, "
                "%{customdata[3]:.0%} of passes saved<extra></extra>",
            )  # fmt: skip
        figure.update_yaxes(tickformat=".0%")
        figure.update_layout(height=480)
        return figure

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
        questions, steps, outputs, pairs: the run's tables; a rule without its table is left out.
        probe: the halting probe of the same run, for its out-of-fold scores.
        resamples: question resamples.
        seed: of the resampling and of the folds.

    Raises:
        Untestable: one depth, or no questions.
    """
    if not len(questions):
        raise Untestable("the table questions of this run is empty", "capture the run first")
    answers = answers_of(questions)
    check_depths(answers, "there is nothing to choose")
    depths, no_probe = [int(depth) for depth in answers.depths], None
    costs = costs_of(questions, answers)
    routed = [*flat(costs), *rules(costs, traces(answers.questions, depths[-1], steps, outputs, pairs), seed)]
    if probe is None:
        no_probe = "none was given"
    elif not np.isin(answers.questions, probe.scores["question"]).all():
        no_probe = f"label {probe.label!r} is about some questions only, and which is not known beforehand"
    curve = []
    if probe is not None and no_probe is None:
        own = probe.scores.set_index("question")["score"].loc[answers.questions].to_numpy(dtype=float)
        routed.append(by_score(costs, probe, own))
        for threshold in [-np.inf, *np.unique(own)]:
            at = by_score(costs, probe, own, threshold)
            curve.append((threshold, costs.right(at.place).mean(), costs.passes(at.place, at.looks).mean()))
    routed.append(oracle(costs))
    named = {r.name: costs.depths[r.place] for r in routed if r.kind != "flat"}
    return Routing(
        policies=pd.DataFrame([scored(r, costs, resamples, seed) for r in routed]),
        curve=pd.DataFrame(curve, columns=["threshold", "accuracy", "passes"]),
        of_question=pd.DataFrame({"question": answers.questions, "id": answers.ids} | named),
        label=probe.label if probe is not None else "",
        base=depths[0],
        deepest=depths[-1],
        right=int(answers.correct[:, 0].sum()),
        n_questions=len(answers.questions),
        n_excluded=answers.n_excluded,
        no_probe=no_probe,
        missing=tuple(name for name in THRESHOLDS if name not in {r.name for r in routed}),
    )


def routing_of(run: Run, probe: Halting | None = None, resamples: int = RESAMPLES) -> Routing:
    """The same of a captured run."""
    changes = ["question", "comparison", "position", "a", "b"]
    steps = run.table("steps", ["question", "text", "depth", "position", "iteration", "entropy"])
    outputs = run.table("outputs", [*changes, "kl"], "within")
    pairs = run.table("pairs", [*changes, "layer", "relative_l2"], "within")
    return routing(run.questions, steps, outputs, pairs, probe, resamples)


def traces(
    questions: np.ndarray,
    deepest: int,
    steps: pd.DataFrame | None = None,
    outputs: pd.DataFrame | None = None,
    pairs: pd.DataFrame | None = None,
) -> dict[str, np.ndarray]:
    """The numbers of every rule that the tables have for every question: name -> [iteration, question]. A
    rule gives the same depth by them as in `model.generate`.

    Args:
        questions: indices in the run.
        deepest: the depth whose pass is read.
        steps: for the entropy (nats).
        outputs: `within` rows, for KL(iteration i || i - 1) (nats).
        pairs: `within` rows, for the median over layers of the state's relative L2 change.
    """
    rows = {}
    if steps is not None:
        own = (steps["position"] == 0) & (steps["depth"] == deepest) & (steps["text"] == "own")
        rows["entropy"] = steps[own.to_numpy(dtype=bool)].set_index(["iteration", "question"])["entropy"]
    columns = {"KL between iterations": (outputs, "kl"), "convergence of the state": (pairs, "relative_l2")}
    for name, (table, column) in columns.items():
        if table is not None:
            here = (table["position"] == 0) & (table["comparison"] == "within")
            here &= table["b"] == table["a"] + 1
            changes = table[here.to_numpy(dtype=bool)].groupby(["b", "question"], observed=True)
            rows[name] = changes[column].median()
    numbers = {}
    for name in (name for name in THRESHOLDS if name in rows):
        every = pd.MultiIndex.from_product([range(THRESHOLDS[name].first, deepest + 1), questions])
        values = rows[name].reindex(every).to_numpy(dtype=float, copy=True).reshape(-1, len(questions))
        if len(values) and np.isfinite(values).all():
            numbers[name] = values
    return numbers


class Routed(NamedTuple):
    """The depths that one policy gives."""

    name: str
    kind: str
    """`flat`, `policy` or `oracle`."""
    place: np.ndarray
    """Index of each question's depth among the captured ones [question]."""
    looks: int = 0
    """Passes spent on looking at position 0."""


class Costs(NamedTuple):
    """What each depth got right and what it cost."""

    answers: Answers
    tokens: np.ndarray
    """Generated tokens [question, depth]."""

    @property
    def depths(self) -> np.ndarray:
        """Captured depths, ascending."""
        return np.asarray(self.answers.depths, dtype=int)

    def right(self, place: np.ndarray) -> np.ndarray:
        """Whether each question is right at its depth: place [..., question] -> the same."""
        return self.answers.correct[np.arange(len(self.tokens)), place]

    def passes(self, place: np.ndarray, looks: int = 0) -> np.ndarray:
        """Passes through the stack that each question takes, likewise."""
        return looks + self.depths[place] * self.tokens[np.arange(len(self.tokens)), place]


def costs_of(questions: pd.DataFrame, answers: Answers) -> Costs:
    """From a run's `questions` table; one token each where it does not say."""
    if "tokens" not in questions.columns:
        return Costs(answers, np.ones(answers.correct.shape))
    table = questions.pivot(index="question", columns="depth", values="tokens")
    return Costs(answers, table.loc[answers.questions, answers.depths].to_numpy(dtype=float))


def flat(costs: Costs) -> list[Routed]:
    """Every question at the same depth, for each depth."""
    depths, n = costs.depths, len(costs.tokens)
    names = {0: " (always-halt)", len(depths) - 1: " (never-halt)"}
    return [
        Routed(f"flat depth {depth}{names.get(k, '')}", "flat", np.full(n, k))
        for k, depth in enumerate(depths.tolist())
    ]


def oracle(costs: Costs) -> Routed:
    """The shallowest depth that is right, or the shallowest."""
    correct = costs.answers.correct
    return Routed(ORACLE, "oracle", np.where(correct.any(axis=1), correct.argmax(axis=1), 0))


def rules(costs: Costs, seen: dict[str, np.ndarray], seed: int = 0) -> list[Routed]:
    """Every rule (its numbers from `traces`), its threshold chosen on the other folds: most right, then
    fewest passes.
    """
    depths, n = costs.depths, len(costs.tokens)
    fold = np.argsort(np.argsort(random_keys(n, seed))) % min(FOLDS, n)
    routed = []
    for name, numbers in seen.items():
        levels = np.unique(np.quantile(numbers, np.linspace(0, 1, LEVELS)))
        tensor, deepest = torch.from_numpy(numbers), int(depths[-1])
        each = [THRESHOLDS[name](float(level), deepest) for level in [-np.inf, *levels, np.inf]]
        chosen = np.stack([rule.first_below(tensor).numpy() for rule in each])
        places = np.searchsorted(depths, chosen)  # a depth that was not captured: the next deeper one
        right, passes = costs.right(places), costs.passes(places)
        own = np.empty(n, dtype=int)
        for k in np.unique(fold):
            others = fold != k
            own[fold == k] = (right[:, others].sum(1) - 1e-9 * passes[:, others].sum(1)).argmax()
        routed.append(Routed(name, "policy", places[own, np.arange(n)], looks=deepest))
    return routed


def by_score(costs: Costs, probe: Halting, scores: np.ndarray, threshold: float = 0.0) -> Routed:
    """The probe: shallowest or deepest, by whether a score [question] is above the threshold."""
    halt = (scores > threshold) == (probe.action == "halt")
    return Routed(PROBE, "policy", np.where(halt, 0, len(costs.depths) - 1), looks=probe.iteration)


def scored(routed: Routed, costs: Costs, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, object]:
    """A policy as a row of `Routing.policies`."""
    correct, place = costs.answers.correct, routed.place
    right, base, depth = costs.right(place), correct[:, 0], costs.depths[place]
    passes, most = costs.passes(place, routed.looks), costs.depths[-1] * costs.tokens[:, -1]
    dealt = np.eye(correct.shape[1])[place]
    deeper = np.arange(correct.shape[1])[None] > place[:, None]

    def beyond(weights: np.ndarray) -> np.ndarray:
        total = weights.sum(axis=-1)
        shares, accuracies = weights @ dealt / total[:, None], weights @ correct / total[:, None]
        return weights @ right / total - (shares * accuracies).sum(axis=-1)

    # Broken by routing less broken by the same depths dealt at random: a covariance of depth and breaking.
    breaks = base[:, None] & ~correct
    gaps = ((dealt - dealt.mean(axis=0)) * (breaks - breaks.mean(axis=0))).sum(axis=1)

    def saved(totals: np.ndarray) -> np.ndarray:
        return 1 - totals[..., 0] / totals[..., 1]

    options = resamples, seed
    columns = as_columns(
        accuracy=mean_of(right, None, *options),
        passes=mean_of(passes, None, *options),
        beyond=over_questions(len(place), beyond, *options),
        saved=cluster_bootstrap(np.stack([passes, most], 1), saved, resamples, seed=seed),
        broken_share=share_of_questions(np.where(base, ~right, np.nan), *options),
        spared=mean_t(gaps),
    )
    return {"name": routed.name, "kind": routed.kind, **columns} | {
        "mean_depth": float(depth.mean()),
        "broken": int((base & ~right).sum()),
        "dealt_broken": float((dealt.mean(axis=0) * breaks.mean(axis=0)).sum()),
        "mended": int((~base & right).sum()),
        "conservative": int((~right & (correct & deeper).any(axis=1)).sum()),
    }
