"""The command of causal patching; what it measures is in `sst_interp.experiments.patching`."""
