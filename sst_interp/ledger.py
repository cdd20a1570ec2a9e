"""Moved to `sst_interp.findings.of_run`."""

from sst_interp.findings.of_run import approximation_of, blend_of, companions, ledger_of

__all__ = ["approximation_of", "blend_of", "companions", "ledger_of"]
