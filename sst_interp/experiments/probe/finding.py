"""The halting probe (claim C12): can it be told from position 0 whether thinking longer helps or breaks?

Every number is out of fold: layer, dimensions and penalty are chosen inside each fold, and every p-value
permutes the labels through all of it. Beside the probe stand always-halt and never-halt, plain probes,
selection outside the fold, and how well the probe memorises random labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from sklearn.metrics import roc_curve

from sst_interp.analyses.answers import Answers, answers_of, mean_of
from sst_interp.analyses.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Dot,
    canvas,
    dots,
    empty_figure,
    error_bars,
)
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.along_texts import p_value
from sst_interp.analyses.statistics.bootstrap import (
    RESAMPLES,
    Interval,
    as_columns,
    percent_text,
    questions_words,
)
from sst_interp.errors import Untestable
from sst_interp.experiments.probe import (
    RULES,
    Features,
    Labels,
    halting_labels,
    position0,
    usable_layers,
)
from sst_interp.experiments.probe.fit import Design, Inputs
from sst_interp.experiments.probe.scores import (
    DimsRead,
    Hits,
    auc,
    auc_difference,
    binomial_readings,
    brier,
    calibration,
    decisions,
    dims_read,
    pairs_in_order,
    probabilities,
)
from sst_interp.experiments.probe.validate import (
    Progress,
    comparison,
    constants,
    in_folds,
    inverted,
    null_scores,
    pair_auc,
    score,
)
from sst_interp.runs.fleet import Fleet

if TYPE_CHECKING:
    from sst_interp.runs.run import Run

LEVEL = 0.05
FEW = 10
"""Questions of the smaller class below which a verdict says so."""
PERMUTATIONS = 1000
REPEATS = 10


@dataclass(frozen=True, eq=False)
class Halting(Result):
    """What the probe tells. Intervals resample questions, with the probes as they are."""

    label: str
    definition: str
    """Which questions are positive, and which negative."""
    action: str
    """For a question called positive: `halt` or `iterate`."""
    kind: str
    """Of probe."""
    iteration: int
    """The iteration of position 0 whose states were read."""
    n_questions: int
    n_positive: int
    n_excluded: int
    """Questions that are neither positive nor negative, or lack a depth."""
    scores: pd.DataFrame
    """A row per question: question, id, positive, score (out of fold; above 0: called positive), probability,
    called, and the layer, dims and penalty that were chosen without it."""
    auc: Interval
    """Leave-one-out, rebalanced: the headline. The next three validate the same probe otherwise."""
    pair_auc: Interval
    """Leave-pair-out."""
    fold_auc: Interval
    """Repeated stratified k-fold, pairs of one fold."""
    tested_auc: Interval
    """The same, with the interval of its permutation test, inverted: C12 rests on it."""
    pooled_auc: Interval
    """Leave-one-out, not rebalanced, scores pooled: biased, for comparison with the literature."""
    sensitivity: Interval
    specificity: Interval
    balanced: Interval
    hits: int
    """Positive questions called positive, of n_positive."""
    called: int
    """Questions called positive, of n_questions."""
    brier: Interval
    base_brier: float
    """Of predicting the base rate for every question."""
    calibration: pd.DataFrame
    permutations: int
    p_auc: float
    """Permutation p-value of the leave-one-out AUC; all four are one-sided."""
    p_fold_auc: float
    """Of the AUC of the first division into folds."""
    p_tested: float
    """Of the AUC of all divisions, against that of one division with permuted labels."""
    p_balanced: float
    p_hits: float
    null: pd.DataFrame
    """A row per permutation: auc, fold_auc, balanced, hits, called, fitted."""
    readings: pd.DataFrame
    """Binomial p-values of the hits at every rate, the paper's too (`binomial_readings`)."""
    fitted: float
    """Balanced accuracy on the questions learnt from, mean over folds."""
    fitted_random: float
    """The same with permuted labels: what the probe can memorise. The difference is its selectivity."""
    leaky_auc: Interval
    """Leave-one-out AUC with the selection made on all questions, the held-out one included."""
    leak: Interval
    """leaky_auc - auc."""
    dims: DimsRead
    """Dimensions that the leave-one-out probes read."""
    fold_dims: DimsRead
    """Those of the folds' probes, which share fewer questions: their agreement means more."""
    comparison: pd.DataFrame
    """A row per probe and policy (`validate.comparison`)."""
    at_chance: str | None = None
    """Why the labels are noise, or None: they are about right and wrong, and the model guesses."""

    @property
    def title(self) -> str:
        """The heading."""
        return f"Halting probe: {self.label}"

    @property
    def table(self) -> pd.DataFrame:
        """A row per probe and policy."""
        return self.comparison

    @property
    def selectivity(self) -> float:
        """How much better it fits real labels than random ones: balanced accuracy in training."""
        return self.fitted - self.fitted_random

    @property
    def checks(self) -> pd.DataFrame:
        """A row per validation: name, value (with `_low` and `_high`), permutation p, and
        `knowing_nothing`, the value without knowledge.
        """
        known = Interval(self.fitted, math.nan, math.nan, self.n_questions)
        rows = [
            ("AUC, leave-one-out, rebalanced", self.auc, self.p_auc, 0.5),
            ("AUC, leave-pair-out", self.pair_auc, math.nan, 0.5),
            ("AUC, stratified folds", self.fold_auc, self.p_fold_auc, 0.5),
            ("AUC, pooled, not rebalanced (biased)", self.pooled_auc, math.nan, 0.5),
            ("AUC, selection outside the fold (wrong)", self.leaky_auc, math.nan, 0.5),
            ("balanced accuracy", self.balanced, self.p_balanced, 0.5),
            ("balanced accuracy where it learns", known, math.nan, self.fitted_random),
            ("Brier score", self.brier, math.nan, self.base_brier),
        ]
        return pd.DataFrame([
            {"name": name} | as_columns(value=of) | {"p": p, "knowing_nothing": nothing}
            for name, of, p, nothing in rows
        ])  # fmt: skip

    @property
    def verdict(self) -> str:
        """Whether the probe tells more than permuted labels do, of how many questions, and how well."""
        tells = f"The probe tells {self.label} questions from the others."
        if not self.permutations:
            tells = "Not tested: no labels were permuted."
        elif not self.p_auc <= LEVEL:
            tells = "The probe tells no more than permuted labels do."
        p = f" (permutation p = {self.p_auc:.2g})" if self.permutations else ""
        words = f"{tells} {self.n_positive} of {questions_words(self.n_questions)} positive. "
        words += f"Out of fold: AUC {self.auc.text()}{p}; sensitivity {self.sensitivity.text(percent=True)}, "
        words += f"specificity {self.specificity.text(percent=True)}."
        if self.at_chance:
            words += f" {self.at_chance[0].upper()}{self.at_chance[1:]}: this label says little."
        few = min(self.n_positive, self.n_questions - self.n_positive)
        care = f" The smaller class has {questions_words(few)}: read with care."
        return words + (care if few < FEW else "")

    def figure(self) -> go.Figure:
        """AUC of the probe and the alternatives."""
        return self.figures()["auc"]

    def figures(self) -> dict[str, go.Figure]:
        """auc, decisions, permutation, calibration and dims; always and never wherever they can be drawn."""
        words = f"{self.label}: {self.n_positive} of {questions_words(self.n_questions)} positive"
        draw = _auc, _decisions, _permutation, _calibration, _dims
        return {each.__name__[1:]: each(self, f"{words}; leave-one-out") for each in draw}


def halting(run: Run, label: str = "must-halt", iteration: int = 1, **options: Any) -> Halting:
    """The halting probe of a captured run.

    Args:
        run: captured with `keep = "position0"` (the default) or more.
        label: a name in `RULES`.
        iteration: after which iteration of position 0 the states are read.
        options: those of `halting_of`.

    Raises:
        Untestable: no questions, equal labels, a class of one question, missing states, constant features.
        SSTError: an unknown label, or a layer that was not captured.
    """
    if not len(run.questions):
        raise Untestable(f"run {run.name} has no questions", f"`sst-interp capture --run {run.name}`")
    answers = answers_of(run.questions)
    labels = halting_labels(answers, label)
    features = position0(run, labels.questions, iteration)
    noise = at_chance(answers, label, options.get("resamples", RESAMPLES))
    return replace(halting_of(features, labels, **options), at_chance=noise)


def halting_of(
    features: Features,
    labels: Labels,
    layer: int | None = None,
    design: Design | None = None,
    permutations: int = PERMUTATIONS,
    repeats: int = REPEATS,
    resamples: int = RESAMPLES,
    progress: Progress | None = None,
    fleet: Fleet | None = None,
) -> Halting:
    """The same from features and labels in memory.

    Args:
        features, labels: of the same questions.
        layer: whose output to read; None chooses one inside each fold.
        design: the kind of probe and its candidates; its `layers` are set by `layer`.
        permutations: B; 0: no test.
        repeats: divisions into folds.
        resamples: question resamples.
        progress: called with (what, done, of).
        fleet: workers among which the permutations are divided; None is this process.
    """
    design = replace(design or Design(), layers=usable_layers(features, layer))
    inputs, positive = Inputs(features.states), labels.positive
    y = torch.from_numpy(positive[None].astype(np.float32))
    options = resamples, design.seed
    every = ("leave_one_out", "plain_leave_one_out", "folds")
    own = score(design, inputs, y, every, keep=True)
    loo, logits = own["leave_one_out"], own["leave_one_out"].logits[0]
    told, in_order = logits > 0, pairs_in_order(logits, positive)
    leaky = score(replace(design, leak=True), inputs, y)["leave_one_out"].logits[0]
    leaky_pairs = pairs_in_order(leaky, positive)
    first, folded = in_folds(own["folds"], design, inputs, y, repeats)
    told_right = decisions(positive, told, *options)
    chance = probabilities(logits, positive)

    null = null_scores(design, inputs, positive, permutations, progress, fleet)
    n = len(positive)
    tested_auc, p_tested = inverted(folded.share, null["fold_auc"].to_numpy(dtype=float), n)
    hits, called = int((positive & told).sum()), int(told.sum())
    seen = {"auc": in_order.share, "fold_auc": first, "balanced": told_right.balanced.estimate, "hits": hits}
    p = {name: p_value(null[name].to_numpy(), value, 1) if len(null) else math.nan
         for name, value in seen.items()}  # fmt: skip
    permuted = {f"labels permuted {permutations:,} times": p["hits"]} if permutations else {}
    width, action = (inputs.d_model, len(design.layers)), "halt" if labels.halts else "iterate"
    scores = pd.DataFrame({
        "question": labels.questions, "id": labels.ids, "positive": positive, "score": logits,
        "probability": chance, "called": told, "layer": loo.layer[0], "dims": loo.dims[0],
        "penalty": loo.penalty[0],
    })  # fmt: skip
    return Halting(
        label=labels.name,
        definition=labels.definition,
        action=action,
        kind=design.kind,
        iteration=features.iteration,
        n_questions=len(positive),
        n_positive=labels.n_positive,
        n_excluded=labels.n_excluded,
        scores=scores,
        auc=auc(in_order, *options),
        pair_auc=pair_auc(design, inputs, y, resamples),
        fold_auc=auc(folded, *options),
        tested_auc=tested_auc,
        pooled_auc=auc(pairs_in_order(own["plain_leave_one_out"].logits[0], positive), *options),
        sensitivity=told_right.sensitivity,
        specificity=told_right.specificity,
        balanced=told_right.balanced,
        hits=hits,
        called=called,
        brier=brier(chance, positive, *options),
        base_brier=labels.n_positive * labels.n_negative / len(positive) ** 2,
        calibration=calibration(chance, positive, resamples=resamples, seed=design.seed),
        permutations=permutations,
        p_auc=p["auc"],
        p_fold_auc=p["fold_auc"],
        p_tested=p_tested,
        p_balanced=p["balanced"],
        p_hits=p["hits"],
        null=null,
        readings=binomial_readings(Hits(hits, labels.n_positive), called, len(positive), permuted, action),
        fitted=float(loo.fitted.mean()),
        fitted_random=float(null["fitted"].mean()) if len(null) else math.nan,
        leaky_auc=auc(leaky_pairs, *options),
        leak=auc_difference(leaky_pairs, in_order, *options),
        dims=dims_read(loo.read, loo.layer[0], *width),
        fold_dims=dims_read(own["folds"].read, own["folds"].layer[0], *width),
        comparison=comparison(features, scores, labels, design, resamples, p["auc"]),
    )


def at_chance(answers: Answers, label: str, resamples: int = RESAMPLES) -> str | None:
    """Why a label about right and wrong is noise, or None: at no depth is the accuracy of lettered answers
    above blind guessing (lower end of its interval).
    """
    if RULES[label].needs_answers or not answers.choices or not len(answers.questions):
        return None
    guess = 1 / answers.choices
    accuracies = [mean_of(right, resamples=resamples) for right in answers.correct.T]
    if any(accuracy.known and accuracy.low > guess for accuracy in accuracies):
        return None
    blind = f"blind guessing ({percent_text(guess)})"
    return f"accuracy is above {blind} at no depth, so right and wrong are noise"


def _auc(probe: Halting, subtitle: str) -> go.Figure:
    rows = []
    for place, row in enumerate(probe.comparison.to_dict("records")):
        constant = row["name"] in constants(probe.action)
        series = "no probe" if constant else "the probe" if place == 0 else "plain alternative"
        rows.append(Dot(row["name"], series, row["auc"], row["auc_low"], row["auc_high"]))
    for row in probe.checks.iloc[1:5].to_dict("records"):
        ends = row["value"], row["value_low"], row["value_high"]
        rows.append(Dot(row["name"][5:], "the same probe, otherwise validated", *ends))
    return dots("Area under the curve", subtitle, "AUC (one half is chance)", rows, reference=0.5)


def crosses(figure: go.Figure, rows: pd.DataFrame, x: str, y: str, colour: str, **scatter: object) -> None:
    """Points with the intervals of both columns as bars."""
    bars = {}
    for axis, column in (("x", x), ("y", y)):
        values, low, high = (rows[f"{column}{end}"].to_numpy() for end in ("", "_low", "_high"))
        bars |= {axis: values, f"error_{axis}": error_bars(values, low, high, colour)}
    figure.add_scatter(text=rows["name"], **bars, **scatter)


def _reference(figure: go.Figure, name: str) -> None:
    """The diagonal."""
    line = {"color": GREY, "dash": "dot"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name=name, line=line, hoverinfo="skip")


def _decisions(probe: Halting, subtitle: str) -> go.Figure:
    """The curve of the probe, and each alternative at its own threshold."""
    figure = canvas(
        "What it finds and what it lets go",
        subtitle,
        "1 - specificity: negative questions called positive (share)",
        "sensitivity: positive questions called positive (share)",
    )
    positive, scores = probe.scores["positive"].to_numpy(dtype=bool), probe.scores["score"].to_numpy()
    along, up, _ = roc_curve(positive, scores, drop_intermediate=False)
    figure.add_scatter(
        x=along, y=up, mode="lines", name="the probe, every threshold",
        line={"color": BLUE, "width": 2, "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    _reference(figure, "chance")
    table = probe.comparison
    ends = {"specificity": "wrong", "specificity_low": "wrong_high", "specificity_high": "wrong_low"}
    table = table.assign(**{wrong: 1 - table[right] for right, wrong in ends.items()})
    for rows, name, colour, symbol in (
        (table.iloc[:1], "the probe's decisions", BLUE, "circle"),
        (table.iloc[1:-2], "plain alternatives", ORANGE, "diamond"),
        (table.iloc[-2:], " and ".join(constants(probe.action)), VERMILLION, "square"),
    ):
        crosses(
            figure, rows, "wrong", "sensitivity", colour,
            mode="markers", name=name, marker={"color": colour, "size": 10, "symbol": symbol},
            hovertemplate="%{text}: sensitivity %{y:.1%}, 1 - specificity %{x:.1%}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_layout(height=480)
    return figure


def _permutation(probe: Halting, subtitle: str) -> go.Figure:
    title = "Permuted labels, put through everything"
    if not probe.permutations:
        return empty_figure(title, "not testable: no permutations were made")
    words = f"{subtitle}; {probe.permutations:,} permutations, p = {probe.p_auc:.2g}"
    figure = canvas(title, words, "AUC, leave-one-out rebalanced", "permutations")
    figure.add_histogram(
        x=probe.null["auc"], xbins={"start": 0, "end": 1, "size": 0.025}, name="permuted labels",
        marker={"color": GREY, "line": {"width": 0}},
        hovertemplate="AUC %{x}: %{y} permutations<extra></extra>",
    )  # fmt: skip
    for value, name, colour in (
        (probe.auc.estimate, "the real labels", BLUE),
        (probe.leaky_auc.estimate, "real labels, selection outside the fold", VERMILLION),
        (0.5, " and ".join(constants(probe.action)), GREEN),
    ):
        line = {"color": colour, "width": 2}
        figure.add_vline(x=value, line=line)
        figure.add_scatter(x=[None], y=[None], mode="lines", name=f"{name} {value:.2f}", line=line)
    figure.update_xaxes(range=[0, 1])
    return figure


def _calibration(probe: Halting, subtitle: str) -> go.Figure:
    axes = "predicted probability of positive", "share positive (observed)"
    figure, t = canvas("Predicted and observed", subtitle, *axes), probe.calibration
    observed = t["observed"].to_numpy()
    figure.add_scatter(
        x=t["predicted"], y=observed, mode="markers+lines", name="the probe", customdata=t["questions"],
        error_y=error_bars(observed, t["observed_low"].to_numpy(), t["observed_high"].to_numpy(), BLUE),
        line={"color": BLUE}, marker={"size": 9},
        hovertemplate="predicted %{x:.2f}: %{y:.1%} of %{customdata} questions<extra></extra>",
    )  # fmt: skip
    _reference(figure, "perfect")
    rate = probe.n_positive / probe.n_questions
    figure.add_scatter(
        x=[1, 0], y=[rate, rate], mode="markers", name=" and ".join(constants(probe.action)),
        text=list(constants(probe.action)),
        marker={"color": VERMILLION, "size": 10, "symbol": "square"},
        hovertemplate="%{text}: %{y:.1%} observed<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.03])
    figure.update_xaxes(range=[-0.03, 1.03])
    return figure


def _dims(probe: Halting, subtitle: str) -> go.Figure:
    title, dims = "Dimensions the probes read", probe.dims
    if dims.table.empty:
        return empty_figure(title, "the probes read no dimension")
    words = f"{subtitle}; {dims.count:.0f} per probe"
    if math.isfinite(dims.stability):
        words += f"; stability {dims.stability:.2f}"
        if math.isfinite(probe.fold_dims.stability):
            words += f", between folds {probe.fold_dims.stability:.2f}"
    figure = canvas(title, words, "dimension (0-based)", "share of probes that read it")
    layers = sorted(dims.table.groupby("layer"), key=lambda group: -len(group[1]))
    for (layer, rows), colour in zip(layers, (BLUE, ORANGE, GREEN), strict=False):
        figure.add_bar(
            x=rows["dim"], y=rows["share"], name=f"layer {layer}", marker={"color": colour},
            width=max(1.0, dims.table["dim"].max() / 400),
            hovertemplate=f"layer {layer}, dimension %{{x}}: %{{y:.0%}}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(tickformat=".0%", range=[0, 1.03])
    figure.update_layout(barmode="overlay")
    return figure
