"""What the probe is told from: states at position 0, and the plain numbers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.errors import SSTError

if TYPE_CHECKING:
    from sst_interp.run import Run

SCALARS = ("prompt length", "entropy", "margin")
"""What needs no probe of states: length of the prompt in tokens; entropy (nats) and margin (logits) of the
next-token distribution at depth 1, position 0."""


@dataclass(frozen=True, eq=False)
class Features:
    """What is known of each question at position 0."""

    states: Float[Tensor, "question layer d_model"]
    """Layer outputs, float32."""
    iteration: int
    """After which iteration at position 0 they were read."""
    constant: tuple[int, ...]
    """Layers whose state is the same for every question: nothing can be read there."""
    scalars: Float[Tensor, "question scalar"]
    """`SCALARS`; NaN where the run does not have one."""


def position0(run: Run, questions: Sequence[int] | np.ndarray, iteration: int = 1) -> Features:
    """Read the features of some questions of a run: all layers.

    Args:
        run: captured with `keep = "position0"` (the default) or more.
        questions: indices in the run.
        iteration: after which iteration. 1 is known before anything is iterated.

    Raises:
        SSTError: states were not kept, an iteration that was not captured, or states that are not finite.
    """
    states: list[Tensor] = []
    for question in questions:
        found = run.states(int(question))
        if not 1 <= iteration <= found.shape[1]:
            raise SSTError(
                f"iteration {iteration} was not captured: run {run.name} has 1 to {found.shape[1]} at "
                "position 0",
                "1 is known before anything is iterated",
            )
        states.append(found[:, iteration - 1].float())
    if not states:
        raise SSTError(f"run {run.name}: no questions to read states of", "capture some first")
    return features_of(torch.stack(states), torch.from_numpy(_scalars(run, questions)).float(), iteration)


def features_of(
    states: Float[Tensor, "question layer d_model"],
    scalars: Float[Tensor, "question scalar"] | None = None,
    iteration: int = 1,
) -> Features:
    """Features from states and scalars in memory.

    Raises:
        SSTError: states that are not finite.
    """
    if not bool(torch.isfinite(states).all()):
        layer = int((~torch.isfinite(states)).any(2).any(0).nonzero()[0])
        raise SSTError(f"states of layer {layer} are not finite", "capture the run again, in another dtype")
    same = (states == states[:1]).all(2).all(0)
    if scalars is None:
        scalars = torch.full((len(states), len(SCALARS)), torch.nan)
    return Features(states, iteration, tuple(same.nonzero()[:, 0].tolist()), scalars)


def usable_layers(features: Features, layer: int | None = None) -> tuple[int, ...]:
    """The layers a probe may choose from: all that are not constant, or the one that is asked for.

    Raises:
        SSTError: a layer that was not captured, or features that are constant.
    """
    n = features.states.shape[1]
    if layer is not None and not 0 <= layer < n:
        raise SSTError(
            f"layer {layer} was not captured: there are layers 0 to {n - 1}",
            "--layer auto chooses among all of them",
        )
    asked = range(n) if layer is None else [layer]
    usable = tuple(place for place in asked if place not in features.constant)
    if not usable:
        which = "every layer" if layer is None else f"layer {layer}"
        raise SSTError(
            f"features are constant: {which} has the same state at position 0 of all {len(features.states)} "
            "questions",
            "capture more questions" if layer is None else "--layer auto chooses among the others",
        )
    return usable


def _scalars(run: Run, questions: Sequence[int] | np.ndarray) -> np.ndarray:
    """`SCALARS` [question, scalar]; NaN where a table lacks them."""
    lengths = run.questions.drop_duplicates("question").set_index("question")["prompt_tokens"]
    steps = run.table("steps", ["question", "text", "depth", "position", "iteration", "entropy", "margin"])
    first = (steps["position"] == 0) & (steps["depth"] == 1) & (steps["iteration"] == 1)
    own = steps[(first & (steps["text"] == "own")).to_numpy(dtype=bool)].set_index("question")
    columns = [lengths, own["entropy"], own["margin"]]
    order = np.asarray(questions)
    return np.stack([c.reindex(order).to_numpy(dtype=float) for c in columns], axis=1)
