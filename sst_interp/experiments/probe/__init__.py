"""The halting probe: from position 0, before a word is written, tell whether thinking longer helps or breaks.

`data` says what is told from what, `fit` trains many probes at once, `validate` chooses and scores them
without the answer in hand, and `scores` says what the scores are worth. `finding` and `routing` are the
results (C12, C13), `plain` has the alternatives a sceptic asks for, and `saved` is the probe that is kept.
"""
