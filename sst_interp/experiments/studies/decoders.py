"""The studies `pretraining` and `recall`: decoders trained from scratch, with a latent memory and without.

| study | model | task |
| --- | --- | --- |
| `pretraining` | one decoder | text |
| `recall` | decoders of one and two layers | in-context recall |

Compute is counted in position passes: one run of the layer stack, forward and backward, at one position.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sst_interp.errors import SSTError
from sst_interp.experiments.studies.fit import (
    NONE,
    OWN,
    ZERO,
    Arm,
    Draw,
    Schedule,
    Training,
    evaluations,
    random_model,
    score_tokens,
)
from sst_interp.experiments.studies.scores import ArmScores, Design, arm_scores
from sst_interp.experiments.studies.show import Across, interval, lines_of, number, table
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
from sst_interp.models.choices import Choices
from sst_interp.models.kinds.lrt import MemoryDesign
from sst_interp.models.model import attach, attach_looped, attach_lrt
from sst_interp.tables import markdown
from sst_interp.training.recipe import TrainingRecipe

_S2 = Schedule("interleaved", groups=2)
BASELINE = Arm("baseline", NONE)
BOTH = Arm("LRT, both", _S2, "both")
LONGER = Arm("baseline, equal compute", NONE, longer=_S2.passes)
RESIDUAL = Arm("LRT, residual", _S2, "residual")
SST = Arm("SST", Schedule("two_pass"), kind="sst")
LOOPED = Arm("looped twice", Schedule("unrolled", iterations=2), kind="looped")
"""The recurrence over depth of the Universal Transformer: the same layers again, each iteration with keys and
values of its own. Two passes per position, like LRT and SST, and not a weight more than the baseline."""
QUIET = Arm("LRT, residual from 0", _S2, "residual", gamma=0.0)
"""Starts as the baseline: how much of an LRT's loss comes from a memory that disturbs before it helps?"""
DECODER_ARMS = (BASELINE, BOTH, LONGER, RESIDUAL, QUIET, SST, LOOPED)
RECALL_ARMS = (BASELINE, BOTH, LONGER, SST, LOOPED)
"""Of a decoder that is pretrained. An interleaved step runs the stack twice at every position, so that the
baseline of equal compute takes twice as many steps."""
BIN = 16
"""Positions of a text whose losses are added up together."""
TO_BASELINES = {BASELINE.name: "the baseline at equal steps", LONGER.name: "the baseline at equal compute"}
COST = ("steps", "position_passes", "seconds", "parameters")


@dataclass(frozen=True)
class Decoder:
    """Size and optimiser of a Llama that is trained in full from random weights."""

    layers: int = 4
    d_model: int = 128
    heads: int = 4
    learning_rate: float = 3e-3
    """Peak, of all weights but the memory's."""
    memory_learning_rate: float = 6e-4
    """Peak, of gamma, projections and gates."""
    warmup: int = 20
    gamma: float = 0.1
    """Where the residual scalars start: 0.1 is the published start from scratch (arXiv 2605.26797)."""

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.d_model % (2 * self.heads):
            raise SSTError(
                f"{self.layers} layers of d_model {self.d_model} with {self.heads} heads cannot be built",
                "give d_model as an even multiple of the heads, for example 4 layers, d_model 128, 4 heads",
            )

    def weights(self, vocabulary: int, positions: int, seed: int) -> Any:
        """A Llama with random weights; input and output embeddings are one matrix.

        Standard deviation 1 / sqrt(d_model) everywhere. Then an embedding is about as long as 0.1 times a
        normed memory, and neither drowns the other at the start.
        """
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=self.d_model, intermediate_size=8 * self.d_model // 3,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=positions, initializer_range=self.d_model**-0.5, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        return random_model(config, seed)

    def design(self, arm: Arm) -> MemoryDesign:
        """The memory of an arm; of an arm without one, a residual memory, which stays at zero."""
        gamma = self.gamma if arm.gamma is None else arm.gamma
        return MemoryDesign(pathway=arm.pathway or "residual", gamma=gamma)

    def recipe(self, arm: Arm) -> TrainingRecipe:
        """How an arm is trained, in the words of `sst-interp train`."""
        method: Any = "none" if arm.kind == "looped" else arm.schedule.method
        return TrainingRecipe(
            "small", "small", "small", method=method,
            groups=arm.schedule.groups, lrt=self.design(arm), learning_rate=self.learning_rate,
            lrt_learning_rate=self.memory_learning_rate, warmup=self.warmup, dtype="float32",
        )  # fmt: skip


def decoder_training(decoder: Decoder, weights: Any, arm: Arm, draw: Draw, steps: int) -> Training:
    """A decoder before its first step; the weights are copied."""
    if arm.kind == "looped":
        looped = attach_looped(copy.deepcopy(weights), choices=Choices(kv="each"))
        return Training(looped, arm, decoder.recipe(arm), draw, steps)
    if arm.kind == "sst":
        recipe = decoder.recipe(arm)
        return Training(attach(copy.deepcopy(weights), alpha=recipe.alpha), arm, recipe, draw, steps)
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


def text_cost(result: ArmScores) -> str:
    """What every arm is and costs."""
    columns = {
        "arm": "arm", "parameters": number("parameters", ",.0f"), "steps": number("steps", ".0f"),
        "position passes, thousands": thousands, "processor seconds": number("seconds", ".0f"),
        "step / baseline's step": number("ratio", ".2f"), "gamma at the end": number("gamma", ".3f"),
        "seeds": "seeds",
    }  # fmt: skip
    return table(result.defined, columns)


def text_losses(result: ArmScores) -> str:
    """A row per arm and evaluation."""
    columns = {
        "arm": "arm", "evaluated": "evaluated", "nats per token": interval("loss", ".3f"),
        "bits per byte": interval("bits", ".3f"), "seeds": "seeds",
    }  # fmt: skip
    return table(result.finals, columns)


def text_seeds(result: ArmScores) -> str:
    """Sequential losses, a row per seed and a column per arm."""
    return table(
        result.seeds.sort_values("seed", kind="stable"),
        {"seed": "seed", "{}": Across("arm", number("loss", ".4f"))},
    )


def text_differences(result: ArmScores) -> str:
    """A row per arm with a memory and what it is compared with."""
    columns = {
        "arm, sequential": "arm", "minus": _minus, "nats per token": interval("loss", "+.3f"),
        "bits per byte": interval("bits", "+.3f"), "position passes": lambda row: f"{row['passes']:.2f}x",
        "": _said, "seeds": "seeds",
    }  # fmt: skip
    return table(result.treated(), columns)


def text_positions(result: ArmScores) -> str:
    """Loss by bin of positions, a column per arm, sequential evaluation."""
    rows = result.curves["position"].sort_values(["position", "arm"])
    return table(rows, {"from position": "position", "{}": Across("arm", number("loss", ".3f"))})


def thousands(row: Mapping[Any, Any]) -> str:
    """Thousands of position passes of a training."""
    return f"{row['position_passes'] / 1000:,.0f}"


def _minus(row: Mapping[Any, Any]) -> str:
    if row["same"]:
        return f"itself, evaluated: {row['minus']}"
    return f"baseline at equal {'compute' if 'compute' in row['minus'] else 'steps'}"


def _said(row: Mapping[Any, Any]) -> str:
    """What the interval of a difference of losses says."""
    low, high = row["loss_low"], row["loss_high"]
    if not math.isfinite(low):
        return "one seed"
    if low <= 0 <= high:
        return "no difference is shown"
    return "better" if high < 0 else "worse"


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
                "text cost": text_cost,
                "text losses": text_losses,
                "text seeds": text_seeds,
                "text differences": text_differences,
                "text positions": text_positions,
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
        """Train what is missing, and return the tables. The text is a file of documents, or Wikipedia's.

        Raises:
            SSTError: the folder holds the study of another plan or text; the text is too short; more
                interleaved groups than positions.
        """
        most = self.plan.positions
        for groups in (arm.schedule.groups for arm in self.arms):
            if not 1 <= groups <= most:
                why = f"{groups} interleaved groups do not fit into {most} positions"
                raise SSTError(why, f"give 1 to {most} groups")
        whole = articles() if text is None else text if isinstance(text, Text) else read_text(text)
        plan = replace(self.plan, text=whole.sha256, steps=self.plan.steps if steps is None else steps)
        study = Pretraining(plan, self.arms, self.rounds)
        study.corpus = build_corpus(whole, plan.vocabulary, plan.positions, plan.held_out, plan.share)
        return study.train(folder, seeds, progress)

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """What the question needs first, of every seed; variants of the memory after that."""
        return sorted(super().jobs(seeds), key=lambda job: job.arm not in (BASELINE, BOTH, LONGER))

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


def recall_scores(result: ArmScores) -> str:
    """A row per layers, arm and evaluation, and per way to guess; a column per number of pairs."""

    def right(row: Mapping[Any, Any]) -> str:
        ends = f" [{row['lowest']:.0%} to {row['highest']:.0%}]" if row["seeds"] > 1 else ""
        return f"{row['accuracy']:.0%}{ends}"

    columns = {
        "layers": "layers", "arm": "arm", "evaluated": "evaluated", "{} pairs": Across("pairs", right),
        "steps": number("steps", ".0f"), "position passes, thousands": thousands,
        "seconds": number("seconds", ".0f"), "seeds": "seeds",
    }  # fmt: skip
    lines = lines_of(result.finals, columns)
    for words, share in result.design.guesses.items():
        at = {f"{n} pairs": f"{share(int(n)):.0%}" for n in result.finals["pairs"].unique()}
        lines.append(dict.fromkeys(lines[0], "") | {"arm": words} | at)
    return markdown(lines)


def recall_differences(result: ArmScores) -> str:
    """A row per layers, arm and what it is compared with, a column per number of pairs."""
    more = Across("pairs", result.text)
    columns = {"layers": "layers", "arm, sequential": "arm", "minus": _minus, "{} pairs": more}
    return table(result.treated(), columns | {"seeds": "seeds"})


@register_study
class RecallStudy(TrainingStudy):
    """Decoders of one and two layers trained on in-context recall, with a latent memory and without."""

    name = "recall"
    question = "Does a latent memory help a small decoder with in-context recall?"
    page = "docs/pretraining.md"
    plan_file = "recall-plan.json"
    main = "accuracy"
    new_plan, default_arms = RecallPlan, RECALL_ARMS
    tables = {  # noqa: RUF012
        "accuracy": Table("recall-accuracy.parquet", ("layers", "seed", "arm"))
    }
    design = Design(
        title="Recall by number of pairs",
        unit="right answers",
        measures={"accuracy": ("right", "answers", 1), "loss": ("loss", "answers", 1)},
        arms=tuple(arm.name for arm in RECALL_ARMS),
        against=TO_BASELINES,
        baseline=BASELINE.name,
        readings={ZERO: "the same weights with a memory of zeros"},
        settings=("layers",),
        setting_words=lambda layers: f"{layers} layer{'s' * (layers > 1)}",
        x="pairs",
        cost=COST,
        guesses={"a guess": lambda pairs: 1 / pairs, "a guess among values not yet an answer": excluding},
        percent=True,
    )
    findings = (
        Finding(
            "recall",
            lambda rows: arm_scores(rows["accuracy"], RecallStudy.design),
            {"recall": recall_scores, "recall differences": recall_differences},
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
