"""Moved to `analyses.answers`; this name goes with its last importers (the halting probe)."""

from sst_interp.analyses.answers import NO_ANSWER, Answers, answers_of, mean_of

__all__ = ["NO_ANSWER", "Answers", "answers_of", "mean_of"]
