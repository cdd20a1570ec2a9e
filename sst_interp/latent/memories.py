"""What equivalence is measured on: memories with random weights on a backbone, checkpoints, the small model.

An LRT attached to a pretrained backbone starts at zeros, where every schedule is the same. So a backbone is
measured with random weights of a stated size: every gamma is `size`, and every number of the projections and
gates is drawn from a normal distribution of standard deviation size / sqrt(d_model), so that W m has entries
of `size` times those of m.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.approximation.small import Arm, pretrained
from sst_interp.errors import SSTError
from sst_interp.kind import Kind
from sst_interp.latent.equivalence import Text
from sst_interp.latent.small import EXACT, LatentPlan, train_latent
from sst_interp.lrt_attach import build_memory
from sst_interp.lrt_design import MemoryDesign
from sst_interp.model import StateStreamModel
from sst_interp.training.batches import make_batch
from sst_interp.training.examples import Example, encode, read_items
from sst_interp.training.objective import answer_loss, mean_over_passes
from sst_interp.training.schedules import Pass


def random_memory(model: StateStreamModel, size: float, pathway: Any = "both", seed: int = 0) -> Kind:
    """A memory of a backbone with random weights of a size.

    Raises:
        SSTError: a size that is not above 0.
    """
    if not 0 < size < float("inf"):
        raise SSTError(f"size = {size} of a random memory is not above 0", "for example 0.005")
    fresh = build_memory(MemoryDesign(pathway=pathway), model.backbone)
    generator = torch.Generator().manual_seed(seed)
    spread = size / model.backbone.d_model**0.5
    return fresh.with_weights(
        {
            name: torch.full_like(w, size)
            if name == "gamma"
            else (spread * torch.randn(w.shape, generator=generator, dtype=w.dtype)).to(w.device)
            for name, w in fresh.weights().items()
        }
    )


def shortest_texts(model: StateStreamModel, questions: int, data: str = "gsm8k") -> list[Text]:
    """The questions with worked answers whose conversations are the shortest, without an instruction.

    Exact back-propagation through time runs the stack once per token, so that short texts are all that is
    affordable.
    """
    examples = sorted(
        (encode(item, model, "") for item in read_items(data)), key=lambda e: (len(e.tokens), e.id)
    )
    return [text_of(model, example) for example in examples[:questions]]


def text_of(model: StateStreamModel, example: Example) -> Text:
    """A conversation; the loss is that of its answer, as `sst-interp train` takes it."""
    batch = make_batch([example], width=1).to(model.backbone.device)
    return Text(
        example.id, batch.tokens, partial(answer_loss, model, batch), partial(mean_over_passes, model, batch)
    )


def small_model(
    arm: Arm = EXACT, plan: LatentPlan | None = None, seed: int = 0
) -> tuple[StateStreamModel, LatentPlan]:
    """The small model of `latent.small`, trained with one schedule, and its plan."""
    plan = plan or LatentPlan()
    return train_latent(plan, pretrained(plan.small, seed), arm, seed), plan


def sequences(model: StateStreamModel, plan: LatentPlan, number: int) -> list[Text]:
    """Held-out sequences of the small model's task, one by one."""
    tokens, labels = plan.small.task.draw(number, seed=0)
    return [
        Text(
            f"sequence {k}",
            tokens[k : k + 1],
            partial(_label_loss, model, labels[k : k + 1]),
            partial(_mean_label_loss, model, labels[k : k + 1]),
        )
        for k in range(number)
    ]


def _label_loss(model: StateStreamModel, labels: Tensor, last: Tensor) -> Tensor:
    return cross_entropy(model.backbone.unembed(last).flatten(0, 1), labels.flatten())


def _mean_label_loss(model: StateStreamModel, labels: Tensor, passes: Sequence[Pass]) -> Tensor:
    return torch.stack([_label_loss(model, labels[:, p.at], p.last) for p in passes]).mean()
