"""What is compared: a decoder with a latent memory against one without, at equal steps and at equal compute.

Compute is counted in *position passes*: one run of the layer stack, forward and backward, at one position.
Interleaved training runs it twice at every position, once with a memory of zeros and once in its group, so
that the baseline of equal compute takes twice as many steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sst_interp.errors import SSTError
from sst_interp.lrt_design import MemoryDesign, Pathway
from sst_interp.training.recipe import Method, TrainingRecipe


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    pathway: Pathway | None = None
    """Where the memory is read; None: there is no memory."""
    groups: int = 2
    """Interleaved groups of positions (S)."""
    longer: int = 1
    """Times as many steps as planned."""
    gamma: float | None = None
    """Where the residual scalars start; None: where the decoder says (`Decoder.gamma`)."""

    @property
    def method(self) -> Method:
        """The schedule, in the words of `training.schedules`."""
        return "none" if self.pathway is None else "interleaved"

    @property
    def passes(self) -> int:
        """How often a training step runs the stack at every position."""
        return 1 if self.pathway is None else 2


BASELINE = Arm("baseline")
RESIDUAL = Arm("LRT, residual", "residual")
QUIET = Arm("LRT, residual from 0", "residual", gamma=0.0)
"""Starts as the baseline: what of an LRT's loss is due to a memory that disturbs before it helps?"""
BOTH = Arm("LRT, both", "both")
LONGER = Arm("baseline, equal compute", longer=BOTH.passes)
ARMS = (BASELINE, BOTH, LONGER, RESIDUAL, QUIET)
"""Names are what tables and analyses know them by."""


@dataclass(frozen=True)
class Decoder:
    """Size and optimiser of a model that is trained in full from random weights."""

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

        Standard deviation 1 / sqrt(d_model) everywhere, so that an embedding has about the length that 0.1
        times a normed memory has, and neither drowns the other at the start.
        """
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=self.d_model, intermediate_size=8 * self.d_model // 3,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads,
            max_position_embeddings=positions, initializer_range=self.d_model**-0.5, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def gamma_of(self, arm: Arm) -> float:
        """Where an arm's residual scalars start."""
        return self.gamma if arm.gamma is None else arm.gamma

    def recipe(self, arm: Arm) -> TrainingRecipe:
        """How an arm is trained, in the words of `sst-interp train`."""
        return TrainingRecipe(
            "small", "small", "small", method=arm.method, groups=arm.groups if arm.pathway else 1,
            lrt=MemoryDesign(pathway=arm.pathway or "residual", gamma=self.gamma_of(arm)),
            learning_rate=self.learning_rate, lrt_learning_rate=self.memory_learning_rate, warmup=self.warmup,
            dtype="float32",
        )  # fmt: skip
