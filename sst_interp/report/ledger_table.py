"""The claims ledger as the report's first table: a row per claim, a cell per comparison."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sst_interp.findings.claims import EVERYWHERE, FAILS, HOLDS, UNTESTED, Claim, Row
from sst_interp.findings.ledger import Ledger
from sst_interp.report.sections import by_lead

CHIPS = {HOLDS: ("holds", "\u2713"), FAILS: ("fails", "\u2717"), UNTESTED: ("untested", "\u25cb")}
"""Class and mark of a verdict: it shows in words, shape and colour."""


@dataclass(frozen=True)
class Cell:
    """One verdict: what is seen at once, and what behind it."""

    row: Row
    short: str
    """This run's figure without what stands in brackets."""

    @property
    def chip(self) -> tuple[str, str]:
        """CSS class and mark."""
        return CHIPS.get(self.row.state, CHIPS[UNTESTED])

    @property
    def reason(self) -> str:
        """Why it is not testable; empty if it is."""
        return self.row.finding.verdict.partition(": ")[2]


@dataclass(frozen=True)
class ClaimRow:
    """One claim: its cells by comparison, or one cell for the whole run."""

    claim: Claim
    cells: dict[str, Cell]

    @property
    def whole(self) -> Cell | None:
        """The cell of a claim that does not depend on a comparison."""
        return self.cells.get(EVERYWHERE)


def claim_rows(ledger: Ledger, lead: str) -> tuple[list[str], list[ClaimRow]]:
    """(comparisons in their order, rows). A claim measured more than once for the run has a row for each."""
    columns = by_lead({r.comparison for r in ledger.rows if r.comparison != EVERYWHERE}, lead)
    rows: list[ClaimRow] = []
    for row in ledger.rows:
        cell = Cell(row, shortened(row.finding.here))
        last = rows[-1] if rows else None
        if last is None or last.claim.id != row.claim.id or row.comparison in last.cells:
            rows.append(ClaimRow(row.claim, {row.comparison: cell}))
        else:
            last.cells[row.comparison] = cell
    return columns, rows


def shortened(words: str) -> str:
    """The first figure of a finding: up to the first semicolon, and with its first interval only."""
    words = re.split(r"; ", words)[0]
    return "" if words == "none" else words
