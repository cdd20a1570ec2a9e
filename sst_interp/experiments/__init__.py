"""Experiments that run a model again: comparisons of kinds, patching, the probe, studies."""
