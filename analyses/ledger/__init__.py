"""The claims ledger: every analysis of a run, and what it says about each claim by a stated rule."""
