"""Causal patching: put one depth's state in the place of another's, go on generating, and compare.

`run.patch_run` patches a run's questions, `finding.patching` reads the rows; docs/patching.md.
"""
