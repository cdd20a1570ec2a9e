"""Causal patching: put one depth's state in the place of another's, go on generating, and see what follows.

`study.patch_run` patches a run's questions, `sst_interp.analyses.patching` reads the rows; docs/patching.md.
"""
