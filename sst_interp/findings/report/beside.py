"""A second run beside a report's own: the overlaps of the questions that both were asked, and both grades."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sst_interp.errors import SSTError
from sst_interp.findings.claims import Row
from sst_interp.findings.ledger import Ledger
from sst_interp.findings.report.explorer import Threshold, explorer_data
from sst_interp.tables import visible

SHARE = 3_000_000
"""Bytes of the second run's overlaps at most; the first run's data get what is left."""


@dataclass(frozen=True, eq=False)
class Beside:
    """A run and its ledger."""

    run: Any
    ledger: Ledger

    def data(self, run: Any, thresholds: dict[str, Threshold]) -> dict[str, Any]:
        """JSON-ready: the name, and the overlaps of the questions that `run` was asked, too.

        Raises:
            SSTError: the two runs share no question.
        """
        asked = set(run.questions["id"])
        own = self.run.questions
        both = own[own["id"].isin(asked).to_numpy(dtype=bool)]["question"].unique().tolist()
        if not both:
            said = f"{self.run.name} was asked none of the questions of {run.name}"
            raise SSTError(said, "put a run of the same dataset beside it")
        if self.run.recipe.choices.overlap != run.recipe.choices.overlap:
            said = f"{self.run.name} measures another overlap than {run.name}"
            raise SSTError(said, "put a run with the same choices.overlap beside it")
        shown = explorer_data(self.run, thresholds, questions=both, largest=SHARE, overlap_only=True)
        return {"name": visible(self.run.name), "explorer": shown}

    def claims(self, ledger: Ledger) -> list[tuple[Row | None, Row | None]]:
        """(row of `ledger`, row of this one) for every claim of either."""
        first, second = ({row.claim.id: row for row in of.rows} for of in (ledger, self.ledger))
        return [(first.get(id), second.get(id)) for id in dict.fromkeys([*first, *second])]
