"""The rows of the claims ledger that causal patching fills: C16 and C16b.

claims(run, more=patching_rows(patching(rows)))
"""

from __future__ import annotations

from sst_interp.analyses.ledger.rules import C16, C16B, EVERYWHERE, Finding, Row, judged, untestable
from sst_interp.experiments.patching.finding import Patching


def patching_rows(result: Patching) -> list[Row]:
    """The rows of C16 for the claims ledger."""
    if not result.recovered:
        nothing = untestable("no patched pair has shifted")
        return [Row(claim, EVERYWHERE, nothing) for claim in (C16, C16B)]
    recovered = list(result.recovered.values())
    beyond = [interval for controls in result.beyond.values() for interval in controls.values()]
    here = "; ".join(f"{way} {i.text(percent=True)} recovered" for way, i in result.recovered.items())
    beside = []
    for way, controls in result.beyond.items():
        named = ", ".join(f"{interval.text(percent=True)} ({what})" for what, interval in controls.items())
        beside.append(f"{way}, {named}")
    control = f"beyond controls of the same size: {'; '.join(beside)}"
    verdict = judged(result.causes, *recovered, *beyond)
    first = Row(C16, EVERYWHERE, Finding(here, verdict, recovered[0], control))
    if result.beyond_size is None or result.size_slope is None:
        return [first, Row(C16B, EVERYWHERE, untestable(str(result.why_not)))]
    extra = result.beyond_size
    words = f"{extra.text()} (log KL, shifted against stable, size held equal)"
    size = f"coefficient of log size {result.size_slope.text()}; {result.shifted:.0%} of the pairs shifted"
    return [first, Row(C16B, EVERYWHERE, Finding(words, judged(extra.low > 0, extra), extra, size))]
