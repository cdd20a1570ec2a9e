"""Synthetic runs with the columns and types of docs/run-format.md, and known answers.

`pairs_table` draws overlaps that are correlated between neighbouring layers and within a question;
`Planted` says what was put in. Nothing here needs a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from sst_interp.analyses.contrast import Contrast
from sst_interp.models.choices import COMPARISONS, Choices

PAIR_TYPES = {
    "question": "int32",
    "comparison": "str",
    "position": "int16",
    "layer": "int16",
    "a": "int8",
    "b": "int8",
    "same_prefix": "bool",
    "cosine": "float32",
    "relative_l2": "float32",
    "norm_a": "float32",
    "norm_b": "float32",
    "bf16_ratio": "float32",
}


@dataclass(frozen=True)
class Planted:
    """What is planted: 1 - overlap is log-normal around `stable`, or `shifted` where a pair shifted."""

    share: float = 0.14
    """Expected share of shifted pairs; 0 plants none."""
    stable: float = 0.003
    shifted: float = 0.5
    spread: float = 0.5
    """Standard deviation of log(1 - overlap) at stable pairs."""
    shifted_spread: float = 0.25
    question_spread: float = 0.7
    """Between-question standard deviation of the log odds of a shift."""
    uniform: bool = False
    """Shifted overlaps are uniform on [0, 1] instead of a mode: noise below one mode."""
    norm_ratio: float = 1.3
    """norm_b / norm_a at shifted pairs; 1 at stable ones."""
    stable_layers: int = 0
    """Layers, from the first, that never shift."""
    layer_places: tuple[float, ...] = ()
    """1 - overlap of the stable pairs of each layer, instead of `stable`: a mode of its own for each."""
    persistence: float = 0.0
    """Chance that a position does what the one before did: the rate stays, shifts come in bursts."""
    identical: float = 0.0
    """Share of stable pairs that are bit-identical."""


def latent(rng: np.random.Generator, questions: int, positions: int, layers: int) -> np.ndarray:
    """Standard normal values [question, position, layer] that share a question, position and layer part."""
    own = rng.normal(size=(questions, positions, layers))
    for layer in range(1, layers):
        own[..., layer] = 0.9 * own[..., layer - 1] + np.sqrt(1 - 0.81) * own[..., layer]
    parts = ((questions, 1, 1), 0.4), ((questions, positions, 1), 0.4), ((questions, 1, layers), 0.2)
    return 0.8 * own + sum(weight * rng.normal(size=shape) for shape, weight in parts)


def smooth(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Profiles that change slowly along the text, as real ones do."""
    x = rng.normal(size=shape)
    for i in range(1, shape[-1]):
        x[..., i] = 0.7 * x[..., i - 1] + np.sqrt(1 - 0.49) * x[..., i]
    return x


def distances(
    rng: np.random.Generator, shape: tuple[int, int, int], planted: Planted
) -> tuple[np.ndarray, ...]:
    """1 - overlap and which pairs shifted, both [question, position, layer]."""
    stable = np.array(planted.layer_places) if planted.layer_places else planted.stable
    u = stable * np.exp(planted.spread * latent(rng, *shape))
    if planted.identical:
        u = np.where(rng.random(shape) < planted.identical, 0, u)
    if not planted.share:
        return np.minimum(u, 2), np.zeros(shape, dtype=bool)
    # A probit threshold whose marginal is `share` whatever the spread between questions.
    centre = norm.ppf(planted.share) * np.sqrt(1 + planted.question_spread**2)
    odds = centre + planted.question_spread * rng.normal(size=(shape[0], 1, 1))
    moved = rng.random(shape) < norm.cdf(odds)
    if planted.persistence:
        kept = rng.random(shape) < planted.persistence
        for position in range(1, shape[1]):
            moved[:, position] = np.where(kept[:, position], moved[:, position - 1], moved[:, position])
    moved[..., : planted.stable_layers] = False
    if planted.uniform:
        far = rng.random(shape)
    else:
        far = planted.shifted * np.exp(planted.shifted_spread * rng.normal(size=shape))
    return np.where(moved, np.minimum(far, 2), u), moved


def pairs_table(
    questions: int = 24,
    positions: int = 16,
    layers: int = 8,
    depths: tuple[int, ...] = (4,),
    comparisons: tuple[str, ...] = ("teacher_forced",),
    planted: Planted | None = None,
    diverge: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """A `pairs` table. Free-running texts differ from position `diverge` on; nothing shifts before it."""
    rng = np.random.default_rng(seed)
    planted = planted or Planted()
    shape = questions, positions, layers
    q, p, layer = (part.ravel() for part in np.indices(shape))
    tables = []
    for comparison in comparisons:
        for depth in depths:
            u, moved = distances(rng, shape, planted)
            u, moved = u.ravel(), moved.ravel()
            same = (p < diverge) if comparison == "free_running" else np.ones(len(p), dtype=bool)
            if comparison == "free_running":
                calm = planted.stable * np.exp(planted.spread * latent(rng, *shape)).ravel()
                u, moved = np.where(same, calm, u), moved & ~same
            norm_a = 100 * np.exp(0.1 * rng.normal(size=len(p)))
            size = np.where(moved, planted.norm_ratio, 1.0) * np.exp(0.02 * rng.normal(size=len(p)))
            size = np.where(u == 0, 1.0, size)  # bit-identical
            # |b - a|^2 / |a|^2 = 1 + s^2 - 2 s cos, with s the ratio of the norms.
            relative = np.sqrt(np.maximum((1 - size) ** 2 + 2 * size * u, 0))
            tables.append(
                pd.DataFrame(
                    {
                        "question": q,
                        "comparison": comparison,
                        "position": p,
                        "layer": layer,
                        "a": 1,
                        "b": depth,
                        "same_prefix": same,
                        "cosine": 1 - u,
                        "relative_l2": relative,
                        "norm_a": norm_a,
                        "norm_b": norm_a * size,
                        "bf16_ratio": 256 * relative,
                    }
                )
            )
    table = pd.concat(tables) if tables else pd.DataFrame(columns=list(PAIR_TYPES))
    return table.astype(PAIR_TYPES).reset_index(drop=True)


@dataclass
class SyntheticRecipe:
    """The fields of a recipe that a report shows."""

    name: str = "demo"
    checkpoint: str = "tiny-random"
    dataset: str = "made-up"
    depths: tuple[int, ...] = (1, 4)
    max_new_tokens: int = 16
    kind: str | None = None
    alpha: float | None = 0.027
    choices: Choices = field(default_factory=Choices)

    def to_toml(self) -> str:
        return f'name = "{self.name}"\ncheckpoint = "{self.checkpoint}"\ndepths = [1, 4]\n'


@dataclass
class SyntheticRun:
    """What a report needs of a run."""

    name: str
    pairs: pd.DataFrame
    questions: pd.DataFrame
    recipe: SyntheticRecipe = field(default_factory=SyntheticRecipe)
    steps: pd.DataFrame = field(default_factory=pd.DataFrame)
    outputs: pd.DataFrame = field(default_factory=pd.DataFrame)
    lens: pd.DataFrame = field(default_factory=pd.DataFrame)
    manifest: dict[str, Any] = field(
        default_factory=lambda: {"versions": {"torch": "2.13.0"}, "dtype": "bfloat16"}
    )


def synthetic_run(
    name: str = "demo",
    ids: list[str] | None = None,
    comparisons: tuple[str, ...] = COMPARISONS,
    choices: Choices | None = None,
    **options: Any,
) -> SyntheticRun:
    """A run-like object; `ids` replaces the record ids of its questions."""
    pairs = pairs_table(comparisons=comparisons, **options)
    n = int(pairs["question"].max()) + 1 if len(pairs) else 0
    ids = ids or [f"record-{i}" for i in range(n)]
    questions = pd.DataFrame(
        {
            "question": np.repeat(np.arange(n), 2).astype("int32"),
            "id": [ids[i] for i in range(n) for _ in range(2)],
            "depth": np.tile(np.array([1, 4], dtype="int8"), n),
            "correct": [True, False] * n,
        }
    )
    return SyntheticRun(name, pairs, questions, SyntheticRecipe(name=name, choices=choices or Choices()))


def contrast(
    pairs: pd.DataFrame | None = None, comparison: str | None = None, *, outputs=None, steps=None,
    questions=None, noise=None, nudges=None, **options: Any,
) -> Contrast:  # fmt: skip
    """A contrast of tables; `options` are those of `Contrast.of`."""
    tables = {
        "pairs": pairs, "outputs": outputs, "steps": steps, "questions": questions, "noise": noise,
        "nudges": nudges,
    }  # fmt: skip
    if comparison is None and pairs is not None and len(pairs):
        comparison = str(pairs["comparison"].iloc[0])
    return Contrast.of(SimpleNamespace(**tables), comparison, **options)
