"""The sections of the report: one for each analysis, as it was registered, with its claims."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sst_interp.analyses.result import ANALYSES, Analysis, Result
from sst_interp.choices import COMPARISONS
from sst_interp.findings.claims import EVERYWHERE, Row
from sst_interp.findings.experiments import KEPT
from sst_interp.findings.ledger import Ledger

MEANING = {
    "replayed": "The text that depth 1 wrote is replayed token by token at the deeper depth: only the depth "
    "differs.",
    "within": "Iterations of one and the same pass at the deepest depth, on its own text.",
    "free": "Each depth writes its own text and states are compared by position. Once the texts differ by a "
    "token, the inputs differ too: a low overlap may say no more than that.",
}


STORY = (
    ("basin_shifts", "overlap", "Is there a second mode?"),
    ("basin_shifts", "rates", "Where do states shift?"),
    ("token_replacement", "replaced", "What does it do to the output?"),
)
"""The three figures of the first screen: analysis, figure, what it answers."""


@dataclass(frozen=True)
class Panel:
    """One result in the report: what is shown of it, beside it and behind it."""

    id: str
    comparison: str
    result: Result
    rows: list[Row]
    figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The first sentence of the verdict, without the comparison that the page names already."""
        return split_verdict(self.result.verdict)[0]

    @property
    def rest(self) -> str:
        """What follows it."""
        return split_verdict(self.result.verdict)[1]


@dataclass(frozen=True)
class Section:
    """One analysis, in every comparison it was made for."""

    id: str
    name: str
    about: Analysis
    """What was registered of it."""
    panels: list[Panel]
    missing: dict[str, str]


def split_verdict(verdict: str) -> tuple[str, str]:
    """(first sentence, rest). A full stop ends one where a capital letter or the end follows."""
    found = re.search(r"(?<=[a-z0-9)\]%])\.(?=\s+[A-Z])", verdict)
    if found is None:
        return verdict, ""
    return verdict[: found.end()], verdict[found.end() :].strip()


def sections(ledger: Ledger, lead: str) -> list[Section]:
    """The report's sections; figures are filled in by `render_report`."""
    names = dict.fromkeys(key.split(".")[0] for key in [*ledger.results, *ledger.missing])
    order = sorted((_about(name, ledger) for name in names), key=lambda about: about.order)
    return [_section(ledger, about, i, lead) for i, about in enumerate(order)]


def by_lead(names: Iterable[str], lead: str) -> list[str]:
    """Comparisons in their order, the leading one first, any other name after them."""
    known = {name: i for i, name in enumerate(COMPARISONS)}
    return sorted(names, key=lambda name: (name != lead, known.get(name, len(known))))


def _about(name: str, ledger: Ledger) -> Analysis:
    """What is known of an analysis; of a result that was never registered, its own title."""
    if name in ANALYSES:
        return ANALYSES[name]
    if name in KEPT:
        return KEPT[name]
    titles = (
        result.title.split(":")[0] for key, result in ledger.results.items() if key.split(".")[0] == name
    )
    return Analysis(name, _not_registered, next(titles, name), "", order=math.inf)


def _not_registered(_: Any) -> NoReturn:
    raise NotImplementedError


def _section(ledger: Ledger, about: Analysis, index: int, lead: str) -> Section:
    def of(found: Iterable[str]) -> dict[str, str]:
        """Comparison -> key, of the keys of this analysis."""
        return {k.partition(".")[2] or EVERYWHERE: k for k in found if k.split(".")[0] == about.name}

    results = of(ledger.results)
    panels = [
        Panel(f"a{index}-{i}", place, ledger.results[results[place]], _rows(ledger, about, place))
        for i, place in enumerate(by_lead(results, lead))
    ]
    missing = {place: ledger.missing[key] for place, key in of(ledger.missing).items()}
    return Section(f"a{index}", about.name, about, panels, missing)


def _rows(ledger: Ledger, about: Analysis, comparison: str) -> list[Row]:
    """The ledger's rows that stand beside a result."""
    return [r for r in ledger.rows if r.claim.id in about.claims and r.comparison in (comparison, EVERYWHERE)]
