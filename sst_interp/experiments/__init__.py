"""What needs a model again: kinds side by side, patching, the probe, studies."""
