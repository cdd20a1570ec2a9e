"""Every training study on a plan that takes a second, and tables of scores with planted effects."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from sst_interp.experiments.studies.decoders import (
    BASELINE,
    BOTH,
    Decoder,
    Pretraining,
    RecallPlan,
    RecallStudy,
    TextPlan,
)
from sst_interp.experiments.studies.fit import EXACT, NO_MEMORY, NO_STREAM, TWO_PASS
from sst_interp.experiments.studies.flipflop import (
    INTERLEAVED,
    Blend,
    ExactTraining,
    LrtPlan,
    LrtSchedules,
    Plan,
)
from sst_interp.experiments.studies.scores import Design
from sst_interp.experiments.studies.tasks import Document, FlipFlop, Recall, Text

SMALL = Plan(
    task=FlipFlop(positions=6), layers=2, d_model=16, pretraining=2, steps=4, batch=4, every=2, held_out=8,
    blends=(Blend(0.015, 0.10, 0.05), Blend(0.015, 0.50, 0.3)),
)  # fmt: skip
LRT = LrtPlan(SMALL)
POSITIONS = 12
TEXT = TextPlan(
    decoder=Decoder(layers=2, d_model=16, heads=2, warmup=1), vocabulary=280, positions=POSITIONS,
    batch=4, steps=3, held_out=12,
)  # fmt: skip
RECALL = RecallPlan(
    task=Recall(pairs=(1, 3), symbols=4), layers=(1, 2), decoder=Decoder(d_model=8, heads=2, warmup=1),
    steps=2, batch=4, held_out=8,
)  # fmt: skip


def some_text(documents: int = 20, seed: int = 0) -> Text:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdé fg", k=4)) for _ in range(30)]
    passage = lambda: " ".join(rng.choices(words, k=30))  # noqa: E731
    return Text(tuple(Document(f"d{k}", (passage(), passage())) for k in range(documents)))


def tiny_study(name: str, rounds: int = 0) -> tuple[Any, dict[str, Any]]:
    """A training study with few arms on a tiny plan, and further arguments of its `run`."""
    if name == "exact-training":
        return ExactTraining(
            replace(SMALL, blends=SMALL.blends[:1]), (EXACT, TWO_PASS, NO_STREAM), rounds
        ), {}
    if name == "lrt-schedules":
        return LrtSchedules(LRT, (EXACT, INTERLEAVED, NO_MEMORY), rounds), {}
    if name == "pretraining":
        return Pretraining(TEXT, (BASELINE, BOTH), rounds), {"text": some_text()}
    return RecallStudy(RECALL, (BASELINE, BOTH)), {}


NAMES = ("exact-training", "lrt-schedules", "pretraining", "recall")
DESIGNS = {
    "exact-training": ExactTraining.design,
    "lrt-schedules": LrtSchedules.design,
    "pretraining": Pretraining.design,
}
DESIGNS |= {"recall": RecallStudy.design}
TREATED = {"exact-training": TWO_PASS, "lrt-schedules": INTERLEAVED, "pretraining": BOTH, "recall": BOTH}
SETTINGS = {"exact-training": [(0.015, 0.1, 0.027), (0.015, 0.5, 0.2)], "recall": [(1,), (2,)]}


def planted(
    name: str, effects: Mapping[str, float] | None = None, seeds: int = 5, noise: float = 0.01, seed: int = 0,
    reading: float = 0.1, spread: float = 0.05,
) -> pd.DataFrame:  # fmt: skip
    """A study's table of scores. Every arm scores about 0.5, plus its effect and what its seed has in common
    with the other arms; under another evaluation `reading` more.
    """
    design: Design = DESIGNS[name]
    effects = effects or {}
    rng, rows = np.random.default_rng(seed), []
    arms = [*design.against, TREATED[name].name]
    for setting in SETTINGS.get(name, [()]):
        for s in range(seeds):
            common = spread * rng.normal()
            for arm in arms:
                score = 0.5 + common + effects.get(arm, 0) + noise * rng.normal()
                for evaluated in (design.definition, *design.readings):
                    value = score + reading * (evaluated != design.definition)
                    about = dict(zip(design.settings, setting, strict=True))
                    about |= {"seed": s, "arm": arm, "evaluated": evaluated}
                    rows += [about | row for row in _sums(design, value, arm)]
    return pd.DataFrame(rows)


def _sums(design: Design, value: float, arm: str) -> list[dict[str, Any]]:
    passes = 1 if arm == BASELINE.name else 2
    cost = {"steps": passes, "position_passes": 1000 * passes, "seconds": 1.0, "parameters": 10}
    cost |= {"gamma": 0.1, "alpha": 0.05, "alpha_1": 0.01, "alpha_99": 0.09}
    counts = {"labels": 100.0, "tokens": 100.0, "answers": 100.0, "bytes": 250.0}
    right = 100 * (value if design.percent else 0.8)
    sums = {"loss": 100 * value, "correct": right, "right": right}
    row = cost | counts | sums
    if design.x:
        return [row | {design.x: n} for n in (2, 8)]
    column = "position" if "position" in design.along else "distance"
    rows = [row | {column: 0}, row | {column: 16}]
    if "step" in design.along:
        rows = [r | {"step": 0, "loss": 200.0} for r in rows] + [r | {"step": 10} for r in rows]
    return rows


def gradients(cosine: float = 0.8, seeds: int = 4, seed: int = 0) -> pd.DataFrame:
    """The table `gradients` of `exact-training`: of two passes with a cosine, of 4 sweeps with 0.99."""
    rng = np.random.default_rng(seed)
    grid = pd.MultiIndex.from_product(
        [[0.1, 0.5], range(seeds), [0, 20, 40], ["two-pass", "4 sweeps"], ["weights", "alpha"]],
        names=["alpha_high", "seed", "step", "arm", "part"],
    ).to_frame(index=False)
    grid["alpha_low"], grid["start"] = 0.015, 0.03
    grid["cosine"] = np.where(grid["arm"] == "two-pass", cosine, 0.99) + 0.002 * rng.normal(size=len(grid))
    return grid.assign(norm_ratio=0.5)
