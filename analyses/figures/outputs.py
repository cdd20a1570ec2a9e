"""Moved to `plots`; this name goes with its last importers (the figures of the halting probe)."""

from sst_interp.analyses.plots import error_bars as bars

__all__ = ["bars"]
