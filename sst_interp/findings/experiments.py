"""Claims that take an experiment of their own: the halting probe (C12, C13) and causal patching (C16, C16b).

Their commands take minutes and keep what they measured with the run (`of_run.keep_findings`); the ledger
shows the rows. `claims(run, more=probe_rows(halting, routing))` does the same by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sst_interp.analyses.result import Analysis, Result
from sst_interp.analyses.statistics.bootstrap import Interval, percent_text, points_text, questions_words
from sst_interp.errors import Untestable
from sst_interp.findings.claims import LEAST, Finding, Row, claim, judged, row_of, untestable

PAPER_LABEL, LEVEL = "must-halt", 0.05


def _measured_by(command: str) -> Callable[[Any], Result]:
    def elsewhere(_: Any) -> Result:
        raise Untestable(f"`sst-interp {command}` measures it")

    return elsewhere


KEPT = {
    about.name: about
    for about in (
        Analysis(
            "halting", _measured_by("probe"), "The halting probe",
            "Does position 0 say which questions must halt?", ("C12",), per="run", order=150,
        ),
        Analysis(
            "routing", _measured_by("probe"), "Routing",
            "What would a depth chosen per question do?", ("C13",), per="run", order=160,
        ),
        Analysis(
            "patching", _measured_by("patch"), "Causal patching",
            "Does a shift cause the changed output?", ("C16", "C16b"), per="run", order=170,
        ),
    )
}  # fmt: skip
"""Results that are kept with a run -> what the report says of them."""


@claim(
    "C12", "a probe of the state at position 0 tells which questions must halt",
    "29 of 48 in leave-one-out, p = 0.0009; 107 of 5,376 dimensions of layer 15 of 62",
    "must-halt questions, everything chosen inside the fold: p < 0.05 with the labels permuted through all "
    "of it (rebalanced leave-one-out AUC), and the interval of the AUC is above one half. Labels of answers "
    "no better than blind guessing are noise: not testable",
    29 / 48,
    per="run",
    measured="probe",
)  # fmt: skip
def probe_tells(probe: Any) -> Finding:
    """Hits, AUC and permutation p-value of a `Halting`; beside them specificity and the alternatives."""
    dims = probe.dims
    here = f"{probe.hits} of {probe.n_positive} {probe.label} questions, AUC {probe.auc.text()}"
    here += f", p = {probe.p_auc:.2g}" if probe.permutations else ", not tested"
    here += f"; {dims.count:.0f} dimensions ({percent_text(dims.share)} of a layer)" if dims else ""
    tells = bool(probe.p_auc < LEVEL and probe.auc.low > 0.5)
    verdict = judged(tells, probe.auc, why=_not_by_this_probe(probe))
    return Finding(here, verdict, probe.sensitivity, _beside(probe))


@claim(
    "C13", "the depth that the probe picks breaks no right answer", "0 broken, 4 conservative errors",
    "routed out of fold by the must-halt probe, no answer that is right at the shallowest depth is broken, "
    "and more are right than if the same depths were dealt at random (interval above 0): halting always "
    "breaks none, either. Accuracy no better than blind guessing cannot be broken: not testable",
    per="run",
    measured="probe",
)  # fmt: skip
def routed_breaks(probe: Any, routing: Any) -> Finding:
    """What a `Routing` breaks, and its errors by halting; beside it flat depths and dealt depths."""
    if routing.no_probe:
        return untestable(routing.no_probe)
    row, flat = routing.row("probe"), routing.policies[routing.policies["kind"] == "flat"]
    interval = Interval(row["broken_share"], row["broken_share_low"], row["broken_share_high"], routing.right)
    beyond = Interval(row["beyond"], row["beyond_low"], row["beyond_high"], routing.n_questions)
    here = f"{row['broken']} of {routing.right} right answers broken, "
    here += f"{row['conservative']} conservative errors"
    control = f"{row['mended']} mended; accuracy {percent_text(row['accuracy'])}, over the same depths dealt "
    control += f"at random {points_text(beyond)}"
    for name, place in (("always-halt", 0), ("never-halt", -1)):
        one = flat.iloc[place]
        control += f"; {name} breaks {one['broken']}, accuracy {percent_text(one['accuracy'])}"
    if routing.right < LEAST:
        few = f"{questions_words(routing.right)} right at depth {routing.base}"
        return Finding(here, judged(False, why=few), interval, control)
    holds = row["broken"] == 0 and beyond.low > 0
    verdict = judged(holds, beyond, why=_not_by_this_probe(probe, tested=False))
    return Finding(here, verdict, interval, control)


@claim(
    "C16", "a shift causes the changed output (our own)", "not in the paper",
    "at shifted pairs below the last layer the other depth's state moves the logit difference its way, put "
    "in either direction (intervals of the recovered share above 0), and further than a random change and "
    "another question's change of the same size (intervals of the differences above 0)",
    per="run",
    measured="patching",
)  # fmt: skip
def shift_causes(patching: Any) -> Finding:
    """What the other depth's state recovers (a `Patching`); beside it controls of the same size."""
    recovered = list(patching.recovered.values())
    beyond = [interval for controls in patching.beyond.values() for interval in controls.values()]
    both = len(recovered) == 2
    holds = both and all(interval.low > 0 for interval in (*recovered, *beyond))
    here = "; ".join(f"{way} {i.text(percent=True)} recovered" for way, i in patching.recovered.items())
    parts = []
    for way, controls in patching.beyond.items():
        named = ", ".join(f"{interval.text(percent=True)} ({what})" for what, interval in controls.items())
        parts.append(f"{way}, {named}")
    control = f"beyond controls of the same size: {'; '.join(parts)}"
    return Finding(here, judged(holds, *recovered, *beyond), recovered[0], control)


@claim(
    "C16b", "a shift matters more than its size (our own)", "not in the paper",
    "in a regression of the log effect of a patch below the last layer on the log of its size, shifted pairs "
    "have a larger effect than stable ones (interval of the coefficient above 0)",
    per="run",
    measured="patching",
)  # fmt: skip
def beyond_its_size(patching: Any) -> Finding:
    """The effect of shifting, size held equal (a `Patching`); beside it the coefficient of the size."""
    if patching.beyond_size is None or patching.size_slope is None:
        return untestable(str(patching.why_not))
    extra = patching.beyond_size
    words = f"{extra.text()} (log KL, shifted against stable, size held equal)"
    size = (
        f"coefficient of log size {patching.size_slope.text()}; {patching.shifted:.0%} of the pairs shifted"
    )
    return Finding(words, judged(extra.low > 0, extra), extra, size)


def probe_rows(halting: Any, routing: Any) -> list[Row]:
    """C12 and C13, for `claims(run, more=...)`.

    Args:
        halting: the probe of a run, a `Halting`, or the `Untestable` that was raised. The claims are about
            `must-halt`; a probe of another label says what was measured, and is not testable.
        routing: a `Routing` of the same run, by that probe, or the `Untestable`.
    """
    tells = _judged(probe_tells, halting)
    return [row_of("C12", tells), row_of("C13", _judged(routed_breaks, halting, routing))]


def patching_rows(patching: Any) -> list[Row]:
    """C16 and C16b of a `Patching` (or of the `Untestable`), for `claims(run, more=...)`."""
    if not isinstance(patching, Untestable) and not patching.recovered:
        patching = Untestable("no patched pair has shifted")
    causes, beyond = _judged(shift_causes, patching), _judged(beyond_its_size, patching)
    return [row_of("C16", causes), row_of("C16b", beyond)]


def _judged(judge: Callable[..., Finding], *results: Any) -> Finding:
    """What a rule says of results, or why one of them does not exist."""
    why = next((result.message for result in results if isinstance(result, Untestable)), None)
    return judge(*results) if why is None else untestable(why)


def _not_by_this_probe(probe: Any, tested: bool = True) -> str | None:
    """Why neither claim is testable by this probe, or None."""
    if probe.label != PAPER_LABEL:
        return f"the claim is about {PAPER_LABEL}, this probe tells {probe.label}"
    if probe.at_chance:
        return probe.at_chance
    few = min(probe.n_positive, probe.n_questions - probe.n_positive)
    if few < LEAST:
        return f"the smaller class has {questions_words(few)} ({LEAST} are needed)"
    least = int(np.ceil(1 / LEVEL))
    if tested and probe.permutations < least:
        return f"{probe.permutations} permutations cannot reach p < {LEVEL} ({least} are needed)"
    return None


def _beside(probe: Any) -> str:
    negative = probe.n_questions - probe.n_positive
    let_go = negative - (probe.called - probe.hits)
    words = f"{let_go} of {negative} others let go (always-{probe.action} 0); leave-pair-out "
    words += f"{probe.pair_auc.estimate:.2f}"
    own = probe.readings[probe.readings["whose"] == "this run"].set_index("against")["p"]
    words += f"; hits as a binomial figure p = {own.iloc[0]:.2g} at the rate the paper's p implies, "
    words += f"{own.loc['one half']:.2g} at one half"
    if probe.permutations:
        words += f", {probe.p_hits:.2g} by permutation"
    plain = probe.comparison.iloc[1:-2]
    if len(plain):
        best = plain.iloc[int(np.argmax(plain["auc"].to_numpy()))]
        words += f"; best plain alternative {best['name']} {best['auc']:.2f}"
    return words + f"; with selection outside the fold {probe.leaky_auc.estimate:.2f}"
