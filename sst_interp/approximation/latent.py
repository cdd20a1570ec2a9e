"""A small Latent Recurrent Transformer, trained in full under every schedule to the same number of steps.

Its loss is then taken under *sequential* evaluation, whatever the schedule computed in training. Task and
start are those of `approximation.small`: flip-flop with a short attention window, from weights that were
trained without a memory.

    python -m sst_interp.approximation.latent FOLDER
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.approximation.small import BASELINE, Arm, Plan, pretrained
from sst_interp.lrt_attach import attach_lrt
from sst_interp.lrt_design import MemoryDesign
from sst_interp.model import StateStreamModel
from sst_interp.training.optimiser import Masters
from sst_interp.training.recipe import EVERY_PASS, TrainingRecipe
from sst_interp.training.schedules import Pass, newest, run_passes

ARMS = (
    Arm("exact", "exact"),
    Arm("interleaved S=2", "interleaved", groups=2),
    Arm("interleaved S=4", "interleaved", groups=4),
    Arm("multi-refine K=1", "multi_refine"),
    Arm("multi-refine K=3", "multi_refine", sweeps=3),
    Arm("chunks of 4", "chunked", chunk=4),
    BASELINE,
)


@dataclass(frozen=True)
class LatentPlan:
    """Everything that decides the results, but the seeds."""

    small: Plan = field(default_factory=Plan)
    """Task, model, optimiser and lengths; its blends mean nothing here."""
    design: MemoryDesign = field(default_factory=lambda: MemoryDesign(pathway="both", gamma=0.1))
    memory_learning_rate: float = 5e-3


def train_latent(plan: LatentPlan, weights: Any, arm: Arm, seed: int) -> tuple[StateStreamModel, float]:
    """One training from the start to the end: the model, and seconds of this process per step."""
    model, small, design = attach_lrt(copy.deepcopy(weights)), plan.small, plan.design
    recipe = TrainingRecipe(
        "latent", "small", "flip-flop", learning_rate=small.learning_rate, dtype="float32", lrt=design,
        lrt_learning_rate=plan.memory_learning_rate,
    )  # fmt: skip
    memory = None
    if arm.method != "none":
        model = attach_lrt(
            model.backbone.model, None, design.source, design.pathway, design.gamma, design.projections
        )
        memory = model.kind.weights()
    parameters = dict(model.backbone.model.named_parameters())
    masters = Masters(recipe, parameters, None, small.steps, memory)
    began = time.process_time()
    for step in range(small.steps):
        tokens, labels = small.task.draw(small.batch, 1_000_000 * (seed + 1) + step)
        if masters.memory:
            model.kind = model.kind.with_weights(masters.stream() or {})
        found = _passes(model, tokens, arm)
        counted = found if arm.method in EVERY_PASS else [Pass(torch.arange(tokens.shape[1]), newest(found))]
        losses = [_losses(model, p.last, labels[:, p.at]).mean() for p in counted]
        torch.stack(losses).mean().backward()
        masters.step(step, masters.gradient_norm())
    model.kind = model.kind.with_weights({k: v.detach() for k, v in model.kind.weights().items()})
    return model, (time.process_time() - began) / small.steps


@torch.no_grad()
def evaluate_latent(model: StateStreamModel, plan: LatentPlan, arm: Arm) -> dict[str, float]:
    """Mean loss (nats) and share of right labels on held-out sequences, states computed as `arm` does."""
    tokens, labels = plan.small.task.draw(plan.small.held_out, seed=0)
    last = newest(_passes(model, tokens, arm))
    right = model.backbone.unembed(last).argmax(-1) == labels
    return {"loss": float(_losses(model, last, labels).mean()), "accuracy": float(right.double().mean())}


def run_latent_study(
    folder: str | Path,
    plan: LatentPlan | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[Arm] = ARMS,
    progress: Callable[[str], Any] | None = None,
) -> pd.DataFrame:
    """Train every arm from the same start and on the same data.

    Returns:
        A row per seed, arm and evaluation (`sequential`, the definition; `own`, as the arm computes states):
        loss, accuracy, seconds_per_step. Also written, arm by arm, to `latent-losses.parquet` in the folder.
    """
    plan, rows = plan or LatentPlan(), []
    for seed in seeds:
        weights = pretrained(plan.small, seed)
        for arm in arms:
            if progress is not None:
                progress(f"seed {seed}, {arm.name}")
            model, seconds = train_latent(plan, weights, arm, seed)
            about = {"seed": seed, "arm": arm.name, "seconds_per_step": seconds}
            for name, how in (("sequential", Arm("exact", "exact")), ("own", arm)):
                rows.append(about | {"evaluated": name} | evaluate_latent(model, plan, how))
            Path(folder).mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_parquet(Path(folder) / "latent-losses.parquet")
    return pd.DataFrame(rows)


def _passes(model: StateStreamModel, tokens: Tensor, arm: Arm) -> list[Pass]:
    return run_passes(model, tokens, arm.method, arm.sweeps, arm.groups, arm.chunk)


def _losses(model: StateStreamModel, last: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(model.backbone.unembed(last).transpose(1, 2), labels, reduction="none")


if __name__ == "__main__":
    found = run_latent_study(sys.argv[1], progress=print)
    means = found.groupby(["arm", "evaluated"])[["loss", "accuracy", "seconds_per_step"]].agg(["mean", "std"])
    print(means.round(4).to_string())
