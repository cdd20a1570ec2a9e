"""What the report says about each analysis: its question, its captions, which claims stand by it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sst_interp.analyses import Ledger, Result
from sst_interp.analyses.ledger.rules import EVERYWHERE, Row
from sst_interp.choices import COMPARISONS

MEANING = {
    "replayed": "The text that depth 1 wrote is replayed token by token at the deeper depth: only the depth "
    "differs.",
    "within": "Iterations of one and the same pass at the deepest depth, on its own text.",
    "free": "Each depth writes its own text and states are compared by position. Once the texts differ by a "
    "token, the inputs differ too: a low overlap may say no more than that.",
}


@dataclass(frozen=True)
class About:
    """What the report knows of an analysis beside its result."""

    heading: str
    asks: str
    claims: tuple[str, ...] = ()


ABOUT = {
    "basin_shifts": About("Basin shifts", "How much of the state is reorganised, and where?", ("C1", "C3")),
    "bimodality": About("Two modes or one", "Are stable and shifted two kinds, or one spread?", ("C2",)),
    "position_zero": About("Position 0", "Is a shift at the first position more than a start-up?", ("C8",)),
    "layer_profile": About("Layers", "Which layers shift more than the average of all?"),
    "shifts_per_question": About("Questions", "Is it a few questions that shift, or every one?"),
    "dwell": About("Stable stretches", "How long does a layer stay stable between shifts?"),
    "token_replacement": About("Tokens replaced", "What does a shift do to the output?", ("C4", "C5")),
    "precedence": About("State and argmax", "Does the state move before the argmax does?", ("C6",)),
    "bf16_noise": About("Change and rounding", "Is the change more than arithmetic noise?", ("C7",)),
    "content": About("Position or content", "Does what is being said decide what shifts?", ("C9",)),
    "divergence": About("When texts part", "How much of `free` is only another text?"),
    "overthinking": About("Thinking longer", "What do more iterations do to the answers?", ("C10", "C11")),
    "settling": About("Settling", "Do answers settle with more depth?"),
    "state_settling": About("Settling of the state", "Does the state settle, cycle or drift?"),
    "halting": About("The halting probe", "Does position 0 say which questions must halt?", ("C12",)),
    "routing": About("Routing", "What would a depth chosen per question do?", ("C13",)),
    "patching": About("Causal patching", "Does a shift cause the changed output?", ("C16", "C16b")),
}
"""Analyses in the order of the report; any other result comes after them under its own title."""

CAPTIONS = {
    "basin_shifts/overlap": "Two separate humps would be two basins; one hump with a tail is one spread "
    "that a threshold cuts through.",
    "basin_shifts/by_position": "A high rate at position 0 alone is also what a start-up "
    "transient looks like.",
    "basin_shifts/rates": "Late positions rest on fewer questions, because short answers have ended.",
    "basin_shifts/norm_ratio": "Whether a shifted state also changes its size: an overlap sees "
    "directions only.",
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
    about: About
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
    names = list(dict.fromkeys(key.split(".")[0] for key in [*ledger.results, *ledger.missing]))
    order = [*(n for n in ABOUT if n in names), *(n for n in names if n not in ABOUT)]
    return [_section(ledger, name, i, lead) for i, name in enumerate(order)]


def by_lead(names: Iterable[str], lead: str) -> list[str]:
    """Comparisons in their order, the leading one first, any other name after them."""
    known = {name: i for i, name in enumerate(COMPARISONS)}
    return sorted(names, key=lambda name: (name != lead, known.get(name, len(known))))


def _section(ledger: Ledger, name: str, index: int, lead: str) -> Section:
    keys = {key.partition(".")[2] or EVERYWHERE: key for key in ledger.results if key.split(".")[0] == name}
    absent = {key: why for key, why in ledger.missing.items() if key.split(".")[0] == name}
    own = next((ledger.results[key].title.split(":")[0] for key in keys.values()), name)
    about = ABOUT.get(name, About(own, ""))
    panels = [
        Panel(f"a{index}-{i}", comparison, ledger.results[keys[comparison]], _rows(ledger, about, comparison))
        for i, comparison in enumerate(by_lead(keys, lead))
    ]
    return Section(
        f"a{index}", name, about, panels, {k.partition(".")[2] or EVERYWHERE: v for k, v in absent.items()}
    )


def _rows(ledger: Ledger, about: About, comparison: str) -> list[Row]:
    """The ledger's rows that stand beside a result."""
    return [r for r in ledger.rows if r.claim.id in about.claims and r.comparison in (comparison, EVERYWHERE)]
