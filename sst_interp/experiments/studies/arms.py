"""What a study compares: schedules, arms of a training, blends, and the models they start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.kinds.lrt import MemoryDesign, Pathway
from sst_interp.models.kinds.sst import PAPER_ALPHA
from sst_interp.training.recipe import Method, TrainingRecipe


class Schedule(NamedTuple):
    """How states are computed in training: the arguments of `training.schedules.run_passes`."""

    method: Method = "two_pass"
    sweeps: int = 1
    groups: int = 1
    chunk: int = 64

    @property
    def passes(self) -> int:
        """How often it runs the stack at every position, whether all at once or one after the other."""
        if self.method in ("none", "exact", "sequential", "chunked"):
            return 1
        return 2 if self.method == "interleaved" else 1 + self.sweeps

    @property
    def n(self) -> int:
        """The number that names it: S groups of `interleaved`, K sweeps of the others."""
        return self.groups if self.method == "interleaved" else self.sweeps


TWO_PASSES = tuple(Schedule(sweeps=k) for k in (1, 2, 4, 8))
"""A pass without the blend and 1, 2, 4 or 8 sweeps. Two-pass training is the first."""
CYCLIC = tuple(Schedule(groups=g, sweeps=k) for g in (2, 4, 8) for k in (1, 2, 4))
"""The same numbers of passes in cyclic groups."""
LRT_SCHEDULES = (
    *(Schedule("interleaved", groups=s) for s in (1, 2, 4, 8)),
    *(Schedule("multi_refine", sweeps=k) for k in (1, 2, 3, 4)),
)
"""S = 1 and K = 1 are the same two passes."""


@dataclass(frozen=True)
class Arm:
    """One way to train. Tables and findings know it by its name."""

    name: str
    schedule: Schedule
    pathway: Pathway | None = None
    """Of a decoder's latent memory; None: it has none."""
    gamma: float | None = None
    """Where a decoder's residual scalars start; None: where the decoder says."""
    longer: int = 1
    """Times as many steps as planned."""

    @property
    def passes(self) -> int:
        """Compute of a step in position passes: runs of the layer stack at every position."""
        return self.schedule.passes


NONE = Schedule("none")
EXACT = Arm("exact", Schedule("sequential"))
TWO_PASS = Arm("two-pass", Schedule())
NO_STREAM, NO_MEMORY = Arm("no stream", NONE), Arm("no memory", NONE)
STREAM_ARMS = (
    EXACT,
    TWO_PASS,
    Arm("2 sweeps", Schedule(sweeps=2)),
    Arm("4 sweeps", Schedule(sweeps=4)),
    Arm("2 groups", Schedule(groups=2)),
    Arm("4 groups", Schedule(groups=4)),
    NO_STREAM,
)
"""Of a small SST. Groups make one sweep, so that they cost as many passes as two-pass training."""
INTERLEAVED = Arm("interleaved S=2", Schedule("interleaved", groups=2))
LRT_ARMS = (
    EXACT,
    INTERLEAVED,
    Arm("interleaved S=4", Schedule("interleaved", groups=4)),
    Arm("multi-refine K=1", Schedule("multi_refine")),
    Arm("multi-refine K=3", Schedule("multi_refine", sweeps=3)),
    Arm("chunks of 4", Schedule("chunked", chunk=4)),
    NO_MEMORY,
)
"""Of a small LRT; its memory is the plan's."""

_S2 = Schedule("interleaved", groups=2)
BASELINE = Arm("baseline", NONE)
BOTH = Arm("LRT, both", _S2, "both")
LONGER = Arm("baseline, equal compute", NONE, longer=_S2.passes)
RESIDUAL = Arm("LRT, residual", _S2, "residual")
QUIET = Arm("LRT, residual from 0", _S2, "residual", gamma=0.0)
"""Starts as the baseline: how much of an LRT's loss comes from a memory that disturbs before it helps?"""
DECODER_ARMS = (BASELINE, BOTH, LONGER, RESIDUAL, QUIET)
"""Of a decoder that is pretrained. An interleaved step runs the stack twice at every position, so that the
baseline of equal compute takes twice as many steps."""


class Blend(NamedTuple):
    """Bounds of alpha, and where every blend weight starts."""

    low: float
    high: float
    start: float


@dataclass(frozen=True)
class Condition:
    """A blend with the same weight in some layers and none in the others.

    The blend is in every layer, so what counts may be `L * alpha` and not alpha. A blend weight of 0 switches
    a layer off, so that L varies on one backbone, independently of alpha.
    """

    alpha: float
    where: str = "all"
    """`all`, `first`, `last` or `spread` (evenly over the stack)."""
    n: int = 0
    """How many layers; left out with `all`."""
    schedules: tuple[Schedule, ...] = TWO_PASSES

    @property
    def layers(self) -> str:
        """Which layers, in words."""
        return self.where if self.where == "all" else f"{self.n} {self.where}"

    def weights(self, n_layers: int) -> Float[Tensor, " layer"]:
        """Alpha of every layer."""
        weights = torch.zeros(n_layers, dtype=torch.float64)
        weights[switched_on(n_layers, self.where, self.n)] = self.alpha
        return weights


def switched_on(n_layers: int, where: str, n: int = 0) -> list[int]:
    """The layers that blend. `spread` takes the middle of each of `n` equal parts of the stack.

    Raises:
        SSTError: an unknown `where`, or not 1 to `n_layers` layers.
    """
    known = ("all", "first", "last", "spread")
    if where not in known:
        raise SSTError(f"layers {where!r} are not one of {', '.join(known)}", "for example 'all'")
    if where == "all":
        return list(range(n_layers))
    if not 1 <= n <= n_layers:
        raise SSTError(f"{n} layers cannot blend in a stack of {n_layers}", f"give 1 to {n_layers}")
    if where == "spread":
        return [int((k + 0.5) * n_layers / n) for k in range(n)]
    return list(range(n)) if where == "first" else list(range(n_layers - n, n_layers))


def grid(n_layers: int, alphas: Sequence[float] = (0.005, 0.01, 0.027, 0.05, 0.1)) -> list[Condition]:
    """The blends of an untrained backbone: every alpha in all layers (the paper's mean also in cyclic
    groups), and in a third and a tenth of the layers, spread or (a third) the first or the last.
    """
    third, tenth = max(1, n_layers // 3), max(1, n_layers // 10)
    few = TWO_PASSES[:3]  # enough for the size of the two-pass error and its contraction
    blends = [Condition(a, schedules=TWO_PASSES if a > 0.01 else few) for a in alphas if a != PAPER_ALPHA]
    blends.append(Condition(PAPER_ALPHA, schedules=TWO_PASSES + CYCLIC))
    blends += [Condition(a, "spread", third, few) for a in alphas if a >= 0.01]
    blends += [Condition(a, "spread", tenth, few) for a in (PAPER_ALPHA, max(alphas))]
    blends += [Condition(PAPER_ALPHA, where, third, few) for where in ("first", "last")]
    return blends


def short_sighted(vocabulary: int, positions: int, layers: int, d_model: int, window: int, seed: int) -> Any:
    """A small Mistral with random weights: Llama's layers with an attention window of `window` positions."""
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=d_model, intermediate_size=2 * d_model,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=4 * positions, sliding_window=window,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return _random(config, seed)


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
        return _random(config, seed)

    def design(self, arm: Arm) -> MemoryDesign:
        """The memory of an arm; of an arm without one, a residual memory, which stays at zero."""
        gamma = self.gamma if arm.gamma is None else arm.gamma
        return MemoryDesign(pathway=arm.pathway or "residual", gamma=gamma)

    def recipe(self, arm: Arm) -> TrainingRecipe:
        """How an arm is trained, in the words of `sst-interp train`."""
        return TrainingRecipe(
            "small", "small", "small", method=arm.schedule.method, groups=arm.schedule.groups,
            lrt=self.design(arm), learning_rate=self.learning_rate,
            lrt_learning_rate=self.memory_learning_rate, warmup=self.warmup, dtype="float32",
        )  # fmt: skip


def _random(config: Any, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
