"""The rows of the claims ledger that the halting probe fills: what it tells (C12), what it breaks (C13).

probed = probe_run("gpqa")
claims(run, more=probe_rows(probed.halting, probed.routing))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sst_interp.analyses.ledger import rules
from sst_interp.analyses.ledger.rules import EVERYWHERE, LEAST, Finding, Row, judged, untestable
from sst_interp.analyses.statistics.bootstrap import Interval, percent_text, points_text, questions_words
from sst_interp.errors import Untestable
from sst_interp.experiments.probe.plain import constants
from sst_interp.experiments.probe.routing import PROBE

if TYPE_CHECKING:
    from collections.abc import Callable

    from sst_interp.experiments.probe.finding import Halting
    from sst_interp.experiments.probe.routing import Routing

PAPER_LABEL, LEVEL = "must-halt", 0.05


def probe_rows(halting: Halting | Untestable, routing: Routing | Untestable) -> list[Row]:
    """C12 and C13, for `claims(run, more=...)`.

    Args:
        halting: the probe of a run, or what was raised. The claims are about `must-halt`; a probe of another
            label says what was measured, and is not testable.
        routing: of the same run, by that probe, or what was raised.
    """
    tells, breaks = _judged(probe_tells, halting), _judged(routed_breaks, halting, routing)
    return [Row(rules.C12, EVERYWHERE, tells), Row(rules.C13, EVERYWHERE, breaks)]


def _judged(judge: Callable[..., Finding], *results: Halting | Routing | Untestable) -> Finding:
    """What a rule says of results, or why one of them does not exist."""
    why = next((result.message for result in results if isinstance(result, Untestable)), None)
    return judge(*results) if why is None else untestable(why)


def probe_tells(found: Halting) -> Finding:
    """C12: hits, AUC and permutation p-value; beside them specificity, a binomial reading and the rest."""
    dims = found.dims
    here = f"{found.hits} of {found.n_positive} {found.label} questions, AUC {found.auc.text()}"
    here += f", p = {found.p_auc:.2g}" if found.permutations else ", not tested"
    here += f"; {dims.count:.0f} dimensions ({percent_text(dims.share)} of a layer)"
    return Finding(here, judged(_tells(found), found.auc, why=_why(found)), found.sensitivity, _beside(found))


def routed_breaks(probe: Halting, found: Routing) -> Finding:
    """C13: what routing breaks and the errors it makes by halting; beside it flat depths and dealt depths."""
    if found.no_probe:
        return untestable(found.no_probe)
    row, flat = found.row(PROBE), found.policies[found.policies["kind"] == "flat"]
    interval = Interval(row["broken_share"], row["broken_share_low"], row["broken_share_high"], found.right)
    beyond = found.interval(row, "beyond")
    here = f"{row['broken']} of {found.right} right answers broken, {row['conservative']} conservative errors"
    control = f"{row['mended']} mended; accuracy {percent_text(row['accuracy'])}, over the same depths dealt "
    control += f"at random {points_text(beyond)}"
    for name, place in zip(constants("halt"), (0, -1), strict=True):
        one = flat.iloc[place]
        control += f"; {name} breaks {one['broken']}, accuracy {percent_text(one['accuracy'])}"
    if found.right < LEAST:
        right = questions_words(found.right)
        return Finding(here, judged(False, why=f"{right} right at depth {found.base}"), interval, control)
    holds = row["broken"] == 0 and beyond.low > 0
    return Finding(here, judged(holds, beyond, why=_why(probe, tested=False)), interval, control)


def _tells(found: Halting) -> bool:
    return bool(found.p_auc < LEVEL and found.auc.low > 0.5)


def _why(found: Halting, tested: bool = True) -> str | None:
    """Why neither claim is testable by this probe, or None."""
    if found.label != PAPER_LABEL:
        return f"the claim is about {PAPER_LABEL}, this probe tells {found.label}"
    if found.at_chance:
        return found.at_chance
    few = min(found.n_positive, found.n_questions - found.n_positive)
    if few < LEAST:
        return f"the smaller class has {questions_words(few)} ({LEAST} are needed)"
    least = int(np.ceil(1 / LEVEL))
    if tested and found.permutations < least:
        return f"{found.permutations} permutations cannot reach p < {LEVEL} ({least} are needed)"
    return None


def _beside(found: Halting) -> str:
    negative = found.n_questions - found.n_positive
    let_go = negative - (found.called - found.hits)
    always = constants(found.action)[0]
    words = f"{let_go} of {negative} others let go ({always} 0); leave-pair-out {found.pair_auc.estimate:.2f}"
    own = found.readings[found.readings["whose"] == "this run"].set_index("against")["p"]
    words += f"; hits as a binomial figure p = {own.iloc[0]:.2g} at the rate the paper's p implies, "
    words += f"{own.loc['one half']:.2g} at one half"
    if found.permutations:
        words += f", {found.p_hits:.2g} by permutation"
    plain = found.comparison.iloc[1:-2]
    if len(plain):
        best = plain.iloc[int(np.argmax(plain["auc"].to_numpy()))]
        words += f"; best plain alternative {best['name']} {best['auc']:.2f}"
    return words + f"; with selection outside the fold {found.leaky_auc.estimate:.2f}"
