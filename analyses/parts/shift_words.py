"""The sentences of basin shifts and of modes within layers, computed from their numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sst_interp.analyses.statistics.bootstrap import LEVEL, none_seen_bound, percent_text, questions_words

if TYPE_CHECKING:
    from sst_interp.analyses.basin_shifts import BasinShifts
    from sst_interp.analyses.bimodality import Bimodality
    from sst_interp.analyses.overlap import OverlapDistribution


def shift_verdict(result: BasinShifts, distribution: OverlapDistribution) -> str:
    """How much shifts, whether that is a second mode, and what else accounts for it."""
    n = f"{result.n_pairs:,} pairs from {questions_words(result.n_questions)}"
    words = f"{result.words}: "
    if result.share.estimate == 0:
        bound = percent_text(none_seen_bound(result.n_questions))
        words += f"no pair fell below {result.threshold:.4g} ({result.provenance}), i.e. no basin shift was "
        words += f"seen in {n}; at most {bound} of such questions have one (95%)."
    else:
        words += f"{result.share.text(percent=True)} of {n} fell below {result.threshold:.4g} "
        words += f"({result.provenance}). "
        if distribution.modes.two:
            at = " and ".join(f"{m:.3g}" for m in distribution.modes.at)
            words += f"The overlaps have two modes, at {at}"
            deep = distribution.modes.depth_interval
            words += f", with a valley {deep.text(percent=True)} deep." if deep else "."
        elif math.isnan(distribution.modes.p_value):
            words += f"Whether there are two modes was not tested: {distribution.modes.reason}."
        else:
            words += "The overlaps have one mode, so this is a cut through one spread, not a second basin."
        if max(result.of_layer, result.of_position) > 0.5:
            which, part = max(
                ("layer", result.of_layer), ("position", result.of_position), key=lambda x: x[1]
            )
            words += f" The {which} alone accounts for {part:.0%} of the variance of which pairs shift."
    if result.same_prefix is not None and result.other_prefix is not None:
        words += f" Before the two texts first differ {result.same_prefix.text(percent=True)} shift, from "
        words += f"there on {result.other_prefix.text(percent=True)}"
        if result.other_prefix.estimate > 2 * result.same_prefix.estimate:
            words += ": most of it says only that the texts diverged"
        words += "."
    if distribution.n_excluded:
        words += f" {distribution.n_excluded:,} pairs without an overlap are left out."
    return words


def mode_counts(found: Bimodality) -> str:
    """Modes pooled against modes within."""
    row = found.headline("pair").iloc[0]
    two, tested = found.layers_two, found.layers_tested
    within = f"{two} of {tested} layers" if tested else "no layer, as none has enough questions"
    depth = f"{row['depth']:.0%} [{row['depth_low']:.0%}, {row['depth_high']:.0%}]"
    if found.pooled_two:
        words = f"over all layers there are two modes (antimode depth {depth}, p = {row['p']:.2g}); "
        words += f"within layers, tested together, two modes are in {within}"
        if found.made_by_pooling:
            words += ": it is pooling layers that makes the two modes"
        elif tested and not two:
            words += f" ({(found.by_layer['modes'] == 'two').sum()} if each is tested alone)"
    elif two:
        words = f"over all layers there is one mode, but within layers, tested together, two in {within}"
    else:
        small = ", too small to count" if row["p"] < 1 - LEVEL else ""
        words = (
            f"over all layers there is one mode (deepest valley {depth}, p = {row['p']:.2g}{small}); within "
        )
        words += f"layers, tested together, two modes are in {within}"
    pairs = found.scopes[found.scopes["scope"] == "pair"]["modes"].tolist()
    if len(pairs) > 1:
        words += (
            f". Of its {len(pairs)} pairs {pairs.count('two')} have two modes over all layers; all pairs "
        )
        words += f"pooled have {found.scopes['modes'].iloc[0]}"
    if found.between_layers is not None:
        words += f". Layers account for {found.between_layers.text(percent=True)} of the spread"
    return words + "."


def mode_fits(found: Bimodality) -> str:
    """Mixtures and the dip test."""
    row, layers = found.headline("pair").iloc[0], found.by_layer
    words = ""
    if found.identical is not None:
        words += f"{found.identical.text(percent=True)} of the pairs are bit-identical and "
    words += f"{percent_text(row['at_one'])} cannot be told from 1; besides these, left-out questions "
    if row["components"]:
        words += f"favour {('one component', 'two components')[row['components'] - 1]} over all layers, and "
        words += f"two in {(layers['components'] == 2).sum()} of {len(layers)}"
    else:
        words += "are too few to choose a number of components"
    if found.dip_reason:
        return f"{words}; dip test {found.dip_reason}"
    words += f"; dip {row['dip']:.3f} over all layers (p = {row['dip_p_questions']:.2g} from all pairs, "
    return words + f"{row['dip_p']:.2g} from one pair per question)"
