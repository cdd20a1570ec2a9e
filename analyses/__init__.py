"""One module per question asked of a run: pure functions on its tables that return a typed result."""

from sst_interp.analyses.basin_shifts import (
    PAPER_THRESHOLD,
    BasinShifts,
    QuestionMap,
    all_comparisons,
    basin_shifts,
    question_map,
)
from sst_interp.analyses.depth_scores import DepthScores, depth_scores
from sst_interp.analyses.modes import Modes, find_modes
from sst_interp.analyses.overlap import (
    OverlapDistribution,
    deepest_pair,
    overlap_distribution,
    overlap_of,
    pair_words,
)
from sst_interp.analyses.result import Result, json_ready, table_html
from sst_interp.analyses.statistics import (
    Interval,
    bootstrap_ends,
    cluster_bootstrap,
    resample_weights,
)
from sst_interp.analyses.training_curves import TrainingCurves, training_curves

__all__ = [
    "PAPER_THRESHOLD",
    "BasinShifts",
    "DepthScores",
    "Interval",
    "Modes",
    "OverlapDistribution",
    "QuestionMap",
    "Result",
    "TrainingCurves",
    "all_comparisons",
    "basin_shifts",
    "bootstrap_ends",
    "cluster_bootstrap",
    "deepest_pair",
    "depth_scores",
    "find_modes",
    "json_ready",
    "overlap_distribution",
    "overlap_of",
    "pair_words",
    "question_map",
    "resample_weights",
    "table_html",
    "training_curves",
]
