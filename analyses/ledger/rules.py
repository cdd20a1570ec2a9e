"""Moved to `sst_interp.findings`; this name goes with its last importers (probe and patching rows)."""

from sst_interp.findings import experiments  # noqa: F401 (it registers the claims)
from sst_interp.findings.claims import (
    CLAIMS,
    EVERYWHERE,
    FAILS,
    HOLDS,
    LEAST,
    UNTESTED,
    Claim,
    Finding,
    Row,
    judged,
    untestable,
)

C12, C13, C16, C16B = (CLAIMS[id].claim for id in ("C12", "C13", "C16", "C16b"))

__all__ = [
    "C12",
    "C13",
    "C16",
    "C16B",
    "EVERYWHERE",
    "FAILS",
    "HOLDS",
    "LEAST",
    "UNTESTED",
    "Claim",
    "Finding",
    "Row",
    "judged",
    "untestable",
]
