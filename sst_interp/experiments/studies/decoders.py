"""The studies `pretraining` and `recall`: decoders trained from scratch, with a latent memory and without.

| study | model | task |
| --- | --- | --- |
| `pretraining` | one decoder | text |
| `recall` | decoders of one and two layers | in-context recall |

Compute is counted in position passes: one run of the layer stack, forward and backward, at one position.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sst_interp.errors import SSTError
from sst_interp.experiments.studies import tables as written
from sst_interp.experiments.studies.arms import (
    BASELINE,
    BOTH,
    DECODER_ARMS,
    LONGER,
    QUIET,
    RESIDUAL,
    Arm,
    Decoder,
)
from sst_interp.experiments.studies.fit import OWN, ZERO, Draw, Training, evaluations, score_tokens
from sst_interp.experiments.studies.scores import Design, arm_scores
from sst_interp.experiments.studies.study import Finding, Job, Progress, TrainingStudy, register_study
from sst_interp.experiments.studies.tasks import (
    Corpus,
    Recall,
    Text,
    articles,
    build_corpus,
    every_next,
    read_text,
)
from sst_interp.experiments.table import Table
from sst_interp.models.model import attach_lrt

BIN = 16
"""Positions of a text whose losses are added up together."""
TO_BASELINES = {BASELINE.name: "the baseline at equal steps", LONGER.name: "the baseline at equal compute"}
COST = ("steps", "position_passes", "seconds", "parameters")


def decoder_training(decoder: Decoder, weights: Any, arm: Arm, draw: Draw, steps: int) -> Training:
    """A decoder before its first step; the weights are copied."""
    design = decoder.design(arm)
    gamma = design.gamma if arm.pathway else 0.0
    model = attach_lrt(copy.deepcopy(weights), pathway=design.pathway, gamma=gamma)
    return Training(model, arm, decoder.recipe(arm), draw, steps)


@dataclass(frozen=True)
class TextPlan:
    """Everything that decides the results of `pretraining`, but the seeds and the arms."""

    decoder: Decoder = field(default_factory=lambda: Decoder(learning_rate=6e-3))
    vocabulary: int = 1024
    """Symbols of the byte-level BPE."""
    positions: int = 128
    """Of a window."""
    batch: int = 8
    steps: int = 300
    held_out: int = 256
    """Windows that losses are measured on."""
    share: float = 0.1
    """Of documents that are held out."""
    text: str = ""
    """sha256 of the text, filled in by the study: results on another text are another study."""


@register_study
class Pretraining(TrainingStudy):
    """One small decoder trained on text from random weights, with a latent memory and without."""

    name = "pretraining"
    question = "Does a latent memory help a small decoder that is pretrained on text?"
    page = "docs/pretraining.md"
    options = ("seeds", "steps", "text")
    plan_file = "pretraining-plan.json"
    new_plan, default_arms, default_rounds = TextPlan, DECODER_ARMS, 5
    tables = {  # noqa: RUF012
        "losses": Table("pretraining-losses.parquet", ("seed", "arm")),
        "times": Table("pretraining-times.parquet", ("arm",)),
    }
    design = Design(
        title="Pretraining with a latent memory",
        unit="nats per token",
        measures={"loss": ("loss", "tokens", 1), "bits": ("loss", "bytes", np.log(2))},
        arms=tuple(arm.name for arm in DECODER_ARMS),
        against=TO_BASELINES,
        baseline=BASELINE.name,
        readings={ZERO: "the same weights with a memory of zeros", OWN: "the loss that training sees"},
        along={"position": "position in the window, first of its bin"},
        cost=(*COST, "gamma"),
    )
    findings = (
        Finding(
            "text",
            lambda rows: arm_scores(rows["losses"], Pretraining.design, rows["times"]),
            {
                "text cost": written.text_cost,
                "text losses": written.text_losses,
                "text seeds": written.text_seeds,
                "text differences": written.text_differences,
                "text positions": written.text_positions,
            },
        ),
    )
    corpus: Corpus

    def run(
        self,
        folder: str | Path,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        steps: int | None = None,
        text: Text | str | Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Train what is missing, and return the tables.

        Args:
            text: documents, or a file of them (`tasks.read_text`); None for articles of Wikipedia.

        Raises:
            SSTError: the folder holds the study of another plan or text; the text is too short; more
                interleaved groups than positions.
        """
        for arm in self.arms:
            if not 1 <= arm.schedule.groups <= self.plan.positions:
                raise SSTError(
                    f"{arm.schedule.groups} interleaved groups do not fit into {self.plan.positions} "
                    "positions",
                    f"give 1 to {self.plan.positions} groups",
                )
        whole = articles() if text is None else text if isinstance(text, Text) else read_text(text)
        plan = replace(self.plan, text=whole.sha256, steps=self.plan.steps if steps is None else steps)
        study = Pretraining(plan, self.arms, self.rounds)
        study.corpus = build_corpus(whole, plan.vocabulary, plan.positions, plan.held_out, plan.share)
        return study.train(folder, seeds, progress)

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """What the question needs first, of every seed; variants of the memory after that."""
        return sorted(super().jobs(seeds), key=lambda job: job.arm in (RESIDUAL, QUIET))

    def begin(self, job: Job) -> Training:
        """From random weights, on windows at random places."""
        plan, corpus, first = self.plan, self.corpus, 1_000_000 * (job.seed + 1)
        weights = plan.decoder.weights(len(corpus.n_bytes), plan.positions, job.seed)
        draw = lambda step: corpus.draw(plan.batch, first + step)  # noqa: E731
        return decoder_training(plan.decoder, weights, job.arm, draw, plan.steps)

    def measure(self, job: Job, training: Training, after_step: Callable[[], Any]) -> dict[str, pd.DataFrame]:
        """Losses on the held-out windows, under every evaluation, in bins of positions."""
        model, corpus = training.finish(after_step), self.corpus
        batch = every_next(corpus.held_out)
        n_bytes = corpus.n_bytes[corpus.held_out[:, 1:]].double()
        bins = torch.arange(corpus.positions - 1) // BIN
        parts = []
        for evaluated, how in evaluations(job.arm).items():
            nats, _ = score_tokens(model, batch, how)
            columns = {"tokens": torch.ones_like(n_bytes), "bytes": n_bytes, "loss": nats.double()}
            sums = {name: torch.bincount(bins, v.sum(dim=0)).tolist() for name, v in columns.items()}
            first = [BIN * k for k in range(len(sums["loss"]))]
            about = training.about() | {"evaluated": evaluated, "documents": corpus.held_out_documents}
            parts.append(pd.DataFrame({"position": first} | sums).assign(**about))
        return {"losses": pd.concat(parts, ignore_index=True).assign(seed=job.seed)}


@dataclass(frozen=True)
class RecallPlan:
    """Everything that decides the results of `recall`, but the seeds and the arms."""

    task: Recall = field(default_factory=Recall)
    layers: tuple[int, ...] = (1, 2)
    """A decoder of each; one layer of attention alone cannot look a value up by the key before it."""
    decoder: Decoder = field(default_factory=lambda: Decoder(d_model=64, learning_rate=5e-3))
    """Its number of layers means nothing here."""
    steps: int = 800
    batch: int = 32
    held_out: int = 128
    """Sequences per number of pairs, half of them with a filler."""


def excluding(pairs: int) -> float:
    """Share of right answers of a guess among the values that were not an answer yet."""
    return sum(1 / left for left in range(1, pairs + 1)) / pairs


@register_study
class RecallStudy(TrainingStudy):
    """Decoders of one and two layers trained on in-context recall, with a latent memory and without."""

    name = "recall"
    question = "Does a latent memory help a small decoder with in-context recall?"
    page = "docs/pretraining.md"
    plan_file = "recall-plan.json"
    main = "accuracy"
    new_plan, default_arms = RecallPlan, (BASELINE, BOTH, LONGER)
    tables = {  # noqa: RUF012
        "accuracy": Table("recall-accuracy.parquet", ("layers", "seed", "arm"))
    }
    design = Design(
        title="Recall by number of pairs",
        unit="right answers",
        measures={"accuracy": ("right", "answers", 1), "loss": ("loss", "answers", 1)},
        arms=tuple(arm.name for arm in (BASELINE, BOTH, LONGER)),
        against=TO_BASELINES,
        baseline=BASELINE.name,
        readings={ZERO: "the same weights with a memory of zeros"},
        settings=("layers",),
        setting_words=lambda layers: f"{layers} layer{'s' * (layers > 1)}",
        x="pairs",
        cost=COST,
        guesses={
            "a guess": lambda pairs: 1 / pairs,
            "a guess among values not yet an answer": excluding,
        },
        percent=True,
    )
    findings = (
        Finding(
            "recall",
            lambda rows: arm_scores(rows["accuracy"], RecallStudy.design),
            {"recall": written.recall, "recall differences": written.recall_differences},
        ),
    )

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """Number of layers by number of layers."""
        return [Job(seed, arm, n) for n in self.plan.layers for seed in seeds for arm in self.arms]

    def about(self, job: Job) -> dict[str, Any]:
        """The number of layers, too."""
        return {"layers": job.setting} | super().about(job)

    def begin(self, job: Job) -> Training:
        """From random weights."""
        plan, first = self.plan, 1_000_000 * (job.seed + 1)
        decoder = replace(plan.decoder, layers=job.setting)
        weights = decoder.weights(plan.task.vocabulary, plan.task.positions, job.seed)
        draw = lambda step: plan.task.draw(plan.batch, first + step)  # noqa: E731
        return decoder_training(decoder, weights, job.arm, draw, plan.steps)

    def measure(self, job: Job, training: Training, after_step: Callable[[], Any]) -> dict[str, pd.DataFrame]:
        """Answers to held-out sequences, under every evaluation and for every number of pairs."""
        model, plan, rows = training.finish(after_step), self.plan, []
        for evaluated, how in evaluations(job.arm).items():
            for n in plan.task.pairs:
                sums = {"answers": 0, "right": 0.0, "loss": 0.0}
                for filler in (False, True):
                    batch = plan.task.draw(plan.held_out // 2, 1 + int(filler), n, filler)
                    nats, right = score_tokens(model, batch, how)
                    sums["answers"] += int((~right.isnan()).sum())
                    sums["right"] += float(right.nansum())
                    sums["loss"] += float(nats.nansum())
                rows.append(training.about() | {"evaluated": evaluated, "pairs": n} | sums)
        return {"accuracy": pd.DataFrame(rows).assign(layers=job.setting, seed=job.seed)}
