"""Halting policies: each picks one iteration depth per question, at position 0, for the whole text.

    model.generate(prompts, depth=Convergence(0.05, deepest=4))
    model.generate(prompts, depth=load_probe("probes/gpqa"))
    model.generate(prompts, depth=EachPosition(Convergence(0.05, deepest=4)))
    model.generate(prompts, depth=[4, 4, 1])

A policy that needs to see iterations of position 0 (`looks`) has them computed ahead on a copy of the stream,
for all questions together. After that every question runs at its own depth, as `iterations=` would run it.
A schedule sets the depths of every position: from a policy that is asked each time, or from a list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.choices import MAX_DEPTH, check_iterations, several, shown, whole
from sst_interp.models.measures import read_out, relative_l2, wide
from sst_interp.models.stream import Recurrence


class Look(NamedTuple):
    """Position 0 of a batch of questions, as many iterations as a policy needs."""

    resid_post: Float[Tensor, "iteration layer row d_model"]
    logits: Float[Tensor, "iteration row vocab"]


class HaltingPolicy(ABC):
    """Picks an iteration depth per question."""

    deepest: int
    """The deepest it may pick."""

    @property
    @abstractmethod
    def looks(self) -> int:
        """Iterations of position 0 it needs to see; 0: none."""

    @abstractmethod
    def depths(self, look: Look) -> Int[Tensor, " row"]:
        """The depth of each row, 1 to `deepest`."""

    def check(self, model: Recurrence) -> None:  # noqa: B027 (most belong to any model)
        """Raise SSTError if the policy does not belong to this model."""

    def _check_deepest(self) -> None:
        object.__setattr__(self, "deepest", whole("deepest", self.deepest, 1, MAX_DEPTH))


@dataclass(frozen=True)
class Flat(HaltingPolicy):
    """The same depth for every question."""

    deepest: int

    def __post_init__(self) -> None:
        self._check_deepest()

    @property
    def looks(self) -> int:
        """None."""
        return 0

    def depths(self, look: Look) -> Int[Tensor, " row"]:
        """`deepest`, whatever there is to see."""
        return torch.full((look.logits.shape[1],), self.deepest)


@dataclass(frozen=True)
class Threshold(HaltingPolicy):
    """Halts at the first iteration whose number is below a threshold, else at `deepest`."""

    threshold: float
    deepest: int = 4

    first = 1
    """The first iteration that has a number: differences have none at iteration 1."""

    def __post_init__(self) -> None:
        self._check_deepest()
        threshold = self.threshold
        if not isinstance(threshold, Real) or isinstance(threshold, bool) or threshold != threshold:
            raise SSTError(f"threshold = {shown(threshold)} is not a number", "for example 0.05")

    @property
    def looks(self) -> int:
        """All of them."""
        return self.deepest

    @abstractmethod
    def numbers(self, look: Look) -> Float[Tensor, "iteration row"]:
        """The number of every iteration from `first` on."""

    def depths(self, look: Look) -> Int[Tensor, " row"]:
        """The first iteration below the threshold."""
        return self.first_below(self.numbers(look)).to(torch.long)

    def first_below(self, numbers: Float[Tensor, "iteration row"]) -> Int[Tensor, " row"]:
        """The same from numbers that were recorded, of iterations `first` to `deepest`."""
        below = numbers[: self.deepest + 1 - self.first] < self.threshold
        at = below.to(torch.int8).argmax(0) if len(below) else torch.zeros(numbers.shape[1])
        return torch.where(below.any(0), at + self.first, self.deepest)


@dataclass(frozen=True)
class ExitGate(HaltingPolicy):
    """Halts where a looped model's own gate has stopped with probability `q` (Ouro, arXiv 2510.25741)."""

    model: Recurrence = field(repr=False)
    q: float = 0.5
    deepest: int = 0
    """0 takes the depth that the model was trained with."""

    def __post_init__(self) -> None:
        if "gate" not in self.model.kind.weights():
            raise SSTError(
                f"a {self.model.kind.words} without an exit gate cannot halt by it", "Ouro has one"
            )
        if self.deepest == 0:
            object.__setattr__(self, "deepest", getattr(self.model.kind, "depth", 1))
        self._check_deepest()
        if not isinstance(self.q, Real) or isinstance(self.q, bool) or not 0 < self.q <= 1:
            raise SSTError(f"q = {shown(self.q)} is not a probability above 0", "for example q=0.5")

    @property
    def looks(self) -> int:
        """All of them."""
        return self.deepest

    def depths(self, look: Look) -> Int[Tensor, " row"]:
        """The first iteration by which the gate has stopped with probability `q`."""
        kind: Any = self.model.kind
        last = look.resid_post[: self.deepest, -1].transpose(0, 1)
        stopped = kind.exit_probabilities(self.model.backbone, last).cumsum(-1)
        stopped[:, -1] = 1  # whatever was rounded off
        return (stopped >= self.q).to(torch.int8).argmax(-1) + 1

    def check(self, model: Recurrence) -> None:
        """Raise SSTError for another model than the gate's."""
        if model.kind.digest() != self.model.kind.digest():
            raise SSTError("the exit gate is another model's", "model.exit_gate() makes the model's own")


class Convergence(Threshold):
    """Halts when the state stops moving: relative L2 change in one iteration, median over layers."""

    first = 2

    def numbers(self, look: Look) -> Float[Tensor, "iteration row"]:
        """From iteration 2 on."""
        if len(look.resid_post) < 2:
            return look.logits.new_empty(0, look.logits.shape[1], dtype=torch.float32)
        return relative_l2(look.resid_post[:-1], look.resid_post[1:]).median(dim=1).values


class OutputChange(Threshold):
    """Halts when the output stops moving: KL(this iteration || the one before) of the next token, nats."""

    first = 2

    def numbers(self, look: Look) -> Float[Tensor, "iteration row"]:
        """From iteration 2 on."""
        now = wide(look.logits).log_softmax(-1)
        return (now[1:].exp() * (now[1:] - now[:-1])).sum(-1).clamp_min(0)


class Entropy(Threshold):
    """Halts when the model is sure: entropy of the next token, nats."""

    def numbers(self, look: Look) -> Float[Tensor, "iteration row"]:
        """From iteration 1 on."""
        return torch.stack([read_out(logits).entropy for logits in look.logits])


class Schedule(ABC):
    """Sets the depths of a batch of texts when a position begins."""

    looks: int = 0
    """Iterations of the position that it needs to see; 0: none."""

    @abstractmethod
    def at(self, position: int, prompts: Sequence[int], look: Look) -> list[int]:
        """The depth of each row.

        Args:
            prompts: which prompt each row goes on from.
            look: the position, as far as it `looks`; rows as in `prompts`.
        """

    def plans(self, position: int) -> bool:
        """Whether it is asked at this position; otherwise the depths stay."""
        return True

    def check(self, model: Recurrence) -> None:  # noqa: B027 (a list belongs to any model)
        """Raise SSTError if it does not belong to this model."""


class EachPosition(Schedule):
    """A policy that is asked again at every position. What it looks at is computed beside the text."""

    def __init__(self, policy: HaltingPolicy) -> None:
        if not isinstance(policy, HaltingPolicy):
            raise SSTError(
                f"{shown(policy)} is no halting policy", "for example Convergence(0.05, deepest=4)"
            )
        self.policy, self.looks, self.check = policy, policy.looks, policy.check

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.policy})"

    def at(self, position: int, prompts: Sequence[int], look: Look) -> list[int]:
        """As the policy says."""
        return check_iterations(self.policy.depths(look).tolist())


class AtFirst(EachPosition):
    """A policy that is asked at position 0, for the whole text."""

    def plans(self, position: int) -> bool:
        """At position 0."""
        return position == 0


def schedule_of(depths: Any) -> Schedule | None:
    """A policy or schedule as a schedule; None for depths that stand already."""
    if isinstance(depths, HaltingPolicy):
        return AtFirst(depths)
    return depths if isinstance(depths, Schedule) else None


class Listed(Schedule):
    """Depths that a person lists: one per position, or such a list per prompt. The last one stays."""

    def __init__(self, depths: Any, rows: int) -> None:
        nested = len(depths) and several(depths[0])
        given = [check_iterations(each, "depth") for each in depths] if nested else None
        self.depths = given or [check_iterations(depths, "depth")] * rows
        if len(self.depths) != rows:
            raise SSTError(
                f"{len(self.depths)} lists of depths for {rows} prompts", "give one list, or one per prompt"
            )

    def at(self, position: int, prompts: Sequence[int], look: Look) -> list[int]:
        """From the list."""
        return [self.depths[prompt][min(position, len(self.depths[prompt]) - 1)] for prompt in prompts]


Depths = Sequence[int] | HaltingPolicy | Schedule
Depth = HaltingPolicy | Schedule | int | Sequence[Any] | None


def depths_of(model: Recurrence, iterations: Any, depth: Depth, rows: int) -> Depths:
    """What `iterations` and `depth` of `generate` ask of so many rows. Raises SSTError as it does."""
    if several(iterations):
        depths = check_iterations(iterations)
    else:
        depths = [whole("iterations", iterations, 1, MAX_DEPTH)] * rows
    if depth is None:
        return depths
    if several(iterations) or iterations != 1:
        raise SSTError("both iterations and depth were given", "leave one of them out")
    if several(depth):
        return Listed(depth, rows)
    policy = (
        depth if isinstance(depth, HaltingPolicy | Schedule) else Flat(whole("depth", depth, 1, MAX_DEPTH))
    )
    policy.check(model)
    return policy
