"""Moved to `sst_interp.findings.of_run`."""

from sst_interp.findings.of_run import capture_of, keep_findings, kept_findings

__all__ = ["capture_of", "keep_findings", "kept_findings"]
