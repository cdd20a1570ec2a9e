"""What the paper leaves open, one field per choice, each with a default and recorded in every capture.

Beside them stand the checks of numbers, depths and weights that a person gives.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from sst_interp.errors import SSTError, check_known

MAX_DEPTH = 127
"""The deepest iteration anywhere: depths and iterations are int8 in a run's tables."""

Comparison = Literal["teacher_forced", "within", "free_running"]
COMPARISONS: tuple[Comparison, ...] = get_args(Comparison)
BEFORE = {"replayed": "teacher_forced", "free": "free_running", "handoff": "initial_guess"}
"""Names of version 0.1 -> today's, for old runs, recipes and checkpoints."""


@dataclass(frozen=True)
class Choices:
    """The choices of a state stream. Each is an option; the first value listed is the default."""

    carry: Literal["layer_output", "ffn_output"] = "layer_output"
    """What a layer hands on: its output `y` (the paper), or its FFN branch alone."""

    blend: Literal["convex", "additive"] = "convex"
    """`convex`: m~ = (1 - alpha) m + alpha s (the paper). `additive`: m~ = m + alpha s."""

    prompt: Literal["exact", "blend_off", "two_pass"] = "exact"
    """How the prompt is read. `exact`: recurrence on, one iteration per token, solved in parallel and
    certified. `blend_off`: plain backbone; the recurrence starts at position 0. `two_pass`: one
    blend-off pass, one sweep with its outputs as states (what SST V2 trains on)."""

    kv: Literal["last", "first", "each"] = "last"
    """Which iteration's keys and values later positions attend to. `each`: iteration i attends to those of
    iteration i, so that every iteration keeps its own (looped models only)."""

    initial_guess: Literal["shift", "scan"] = "shift"
    """How a blend-off pass becomes states: the two-pass prompt, and any sweep solver's first guess.
    `shift`: s_t = y_(t-1). `scan`: a moving average, s_t = (1 - alpha) y_(t-1) + alpha s_(t-1)."""

    overlap: Literal["cosine", "relative_l2", "lens_jaccard"] = "cosine"
    """Similarity of two hidden states. `relative_l2`: 1 - |b - a| / |a|. `lens_jaccard`: Jaccard index of
    their logit-lens top-100 token sets (it costs one unembedding per layer)."""

    comparison: Comparison = "teacher_forced"
    """The comparison a summary leads with. All three are always measured, and never pooled."""

    threshold: Literal["antimode"] | float = "antimode"
    """Overlap below which a pair counts as shifted: the antimode of the run's own distribution (0.99,
    labelled as the paper's, where the distribution has one mode), or a fixed number."""

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if (value := getattr(self, name)) not in allowed:
                raise SSTError(
                    f"choice {name} = {value!r} is not one of {', '.join(map(repr, allowed))}",
                    f"for example {name} = {allowed[0]!r}",
                )
        if self.threshold != "antimode" and (
            not isinstance(self.threshold, int | float)
            or isinstance(self.threshold, bool)
            or not 0 < self.threshold <= 1
        ):
            raise SSTError(
                f"choice threshold = {self.threshold!r} is neither 'antimode' nor a number in (0, 1]",
                "for example threshold = 0.99",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Choices:
        """Choices from a recipe's `[choices]` table; an unknown key is an error with the nearest name."""
        known = [field.name for field in fields(cls)]
        values = {BEFORE.get(key, key): value for key, value in values.items()}
        check_known("choice", values, known)
        if "comparison" in values and isinstance(values["comparison"], str):
            values["comparison"] = BEFORE.get(values["comparison"], values["comparison"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A JSON- and TOML-ready dictionary."""
        return asdict(self)


_ALLOWED: dict[str, tuple[Any, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(Choices).items() if get_origin(hint) is Literal
}

TRAINED = ("carry", "blend", "kv", "initial_guess")
"""Choices that a checkpoint is trained with."""

ANALYSIS = ("comparison", "threshold")
"""Choices that only matter when a run is read: changing them needs no new capture."""


def check_choices(choices: Any) -> Choices:
    """These choices, or the defaults for None; SSTError for anything else."""
    if choices is not None and not isinstance(choices, Choices):
        raise SSTError(
            f"choices = {shown(choices)} is a {type(choices).__name__}, not Choices",
            'for example choices=Choices(prompt="blend_off"); Choices.from_dict reads a dictionary',
        )
    return choices or Choices()


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int, if it is a whole number from `low` to `high`: Python's, NumPy's, or a tensor's.

    Raises:
        SSTError: it is something else, a bool included.
    """
    number = None
    if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
        try:
            number = operator.index(value)
        except (TypeError, RuntimeError, ValueError):
            number = None
    if number is None or number < low or (high is not None and number > high):
        upto = "" if high is None else f" to {high}"
        raise SSTError(
            f"{name} = {shown(value)} is not a whole number from {low}{upto}", f"for example {name} = {low}"
        )
    return number


def check_iterations(depths: Iterable[Any], name: str = "iterations") -> list[int]:
    """Depths as ints.

    Raises:
        SSTError: there are none, or one is not a whole number from 1 to 127.
    """
    if isinstance(depths, str) or not isinstance(depths, Iterable):
        raise SSTError(f"{name} = {shown(depths)} is not a list of depths", f"for example {name} = [1, 2]")
    found = [whole(name, depth, 1, MAX_DEPTH) for depth in depths]
    if not found:
        raise SSTError(f"{name} names no depth", f"for example {name} = [1, 2]")
    return found


def several(value: Any) -> bool:
    """Whether a value is a list, an array or a tensor with an axis: not one number, and no text."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def shown(value: Any) -> str:
    """A value as an error shows it: one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_weights(name: str, value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that a person gave as weights, as a tensor.

    Raises:
        SSTError: they are no real numbers in memory.
    """
    try:
        seen = torch.as_tensor(value)
        if seen.is_complex() or seen.is_meta or seen.dtype == torch.bool:
            raise TypeError(str(seen.dtype))
        return torch.as_tensor(value, dtype=dtype, device=device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise SSTError(
            f"{name} = {shown(value)} is neither a number nor a list or tensor of real numbers",
            f"for example {name}=0.1",
        ) from None
