"""One module per question asked of a run: pure functions on its tables that return a typed result."""

from __future__ import annotations

import importlib
import pkgutil

from sst_interp.analyses.answers import Overthinking, overthinking
from sst_interp.analyses.approximation import ApproximationError, approximation_error
from sst_interp.analyses.basin_shifts import (
    PAPER_THRESHOLD,
    BasinShifts,
    QuestionMap,
    all_comparisons,
    basin_shifts,
    question_map,
)
from sst_interp.analyses.bf16_noise import Bf16Noise, bf16_noise
from sst_interp.analyses.bimodality import Bimodality, bimodality
from sst_interp.analyses.content import Content, content
from sst_interp.analyses.depth_scores import DepthScores, depth_scores
from sst_interp.analyses.divergence import Divergence, divergence
from sst_interp.analyses.dwell import Dwell, dwell
from sst_interp.analyses.halting import Halting, halting, halting_of
from sst_interp.analyses.kinds import Kinds, kinds
from sst_interp.analyses.kinds_answers import KindsAnswers, kinds_answers
from sst_interp.analyses.kinds_contraction import KindsContraction, kinds_contraction
from sst_interp.analyses.layer_profile import LayerProfile, layer_profile
from sst_interp.analyses.output_change import TokenReplacement, token_replacement
from sst_interp.analyses.overlap import (
    OverlapDistribution,
    deepest_pair,
    overlap_distribution,
    overlap_of,
    pair_words,
)
from sst_interp.analyses.position_zero import PositionZero, position_zero
from sst_interp.analyses.precedence import Precedence, precedence
from sst_interp.analyses.result import ANALYSES, Analysis, Result, analysis, json_ready, table_html
from sst_interp.analyses.routing import Routing, routing, routing_of
from sst_interp.analyses.settling import Settling, settling
from sst_interp.analyses.shifts_per_question import ShiftsPerQuestion, shifts_per_question
from sst_interp.analyses.state_settling import StateSettling, state_settling
from sst_interp.analyses.statistics.bootstrap import (
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    resample_weights,
)
from sst_interp.analyses.statistics.modes import Modes, find_modes
from sst_interp.analyses.statistics.permutation import label_permutation, sign_flip
from sst_interp.analyses.training_curves import TrainingCurves, training_curves

__all__ = [
    "ANALYSES",
    "PAPER_THRESHOLD",
    "Analysis",
    "ApproximationError",
    "BasinShifts",
    "Bf16Noise",
    "Bimodality",
    "Content",
    "DepthScores",
    "Divergence",
    "Dwell",
    "Halting",
    "Interval",
    "Kinds",
    "KindsAnswers",
    "KindsContraction",
    "LayerProfile",
    "Modes",
    "OverlapDistribution",
    "Overthinking",
    "PositionZero",
    "Precedence",
    "QuestionMap",
    "Result",
    "Routing",
    "Settling",
    "ShiftsPerQuestion",
    "StateSettling",
    "TokenReplacement",
    "TrainingCurves",
    "all_comparisons",
    "analysis",
    "approximation_error",
    "basin_shifts",
    "bf16_noise",
    "bimodality",
    "bootstrap_ends",
    "cluster_bootstrap",
    "content",
    "deepest_pair",
    "depth_scores",
    "divergence",
    "dwell",
    "find_modes",
    "halting",
    "halting_of",
    "json_ready",
    "kinds",
    "kinds_answers",
    "kinds_contraction",
    "label_permutation",
    "layer_profile",
    "load",
    "overlap_distribution",
    "overlap_of",
    "overthinking",
    "pair_words",
    "position_zero",
    "precedence",
    "question_map",
    "resample_weights",
    "routing",
    "routing_of",
    "settling",
    "shifts_per_question",
    "sign_flip",
    "state_settling",
    "table_html",
    "token_replacement",
    "training_curves",
]


def load() -> dict[str, Analysis]:
    """Import every module here, so that its analyses are registered; returns the registry."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return ANALYSES
