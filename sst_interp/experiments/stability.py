"""Local stability: does one more iteration enlarge a small change of a state, or shrink it?

    local_stability(model, texts, iterations=4).verdict

At (layer, iteration k) the map is d y_k / d y_(k-1) of that layer's own output, earlier positions held. Its
largest singular value says how much the worst small change grows in one iteration; its spectral radius, how
much a change would grow per iteration if the map stayed the same. `growth` is the largest singular value of
d y_D / d y_1, per iteration: what really happens along the trajectory. Power iteration, on vector-Jacobian
products and their derivatives; `random` is the growth of a random direction, the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.analyses.plots import GREY, Line, lines
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import as_columns, mean_over_questions
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.trajectory import trajectory
from sst_interp.models.model import StateStreamModel
from sst_interp.runs.perturbations import generator


@dataclass(frozen=True, eq=False)
class Stability(Result):
    """How iterations stretch a small change, at the last token of each text."""

    cells: pd.DataFrame
    """A row per layer and iteration from 2 on: `stretch` (largest singular value, mean over texts, with
    `stretch_low` and `stretch_high`), `radius` (spectral radius), `random` (of a random direction)."""
    growth: pd.DataFrame
    """A row per layer: `growth` per iteration from the first to the last, with its interval."""
    texts: int

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Local stability"

    @property
    def table(self) -> pd.DataFrame:
        """The cells."""
        return self.cells

    @property
    def verdict(self) -> str:
        """At how many layers a small change grows, shrinks, or neither surely."""
        grows = int((self.growth["growth_low"] > 1).sum())
        shrinks = int((self.growth["growth_high"] < 1).sum())
        words = f"Iterations enlarge the worst small change at {grows} layers, "
        words += f"and shrink every one at {shrinks}. "
        return words + f"Of {len(self.growth)} layers, position 0, {self.texts} texts."

    def figure(self) -> go.Figure:
        """Growth by layer."""
        g = self.growth
        figure = lines(
            "Growth of the worst small change per iteration", f"position 0, {self.texts} texts",
            "layer (0-based)", "factor per iteration",
            [Line("growth", g["layer"], g["growth"], g["growth_low"], g["growth_high"])],
        )  # fmt: skip
        figure.add_hline(y=1, line={"color": GREY, "dash": "dot"})
        return figure


def local_stability(
    model: StateStreamModel,
    texts: Sequence[Sequence[int]],
    iterations: int,
    layers: Sequence[int] | None = None,
    rounds: int = 20,
    resamples: int = 2000,
    seed: int = 0,
) -> Stability:
    """Stretch, spectral radius and growth at the last token of each text.

    Costs about 5 `rounds` backward passes per layer and iteration, for all texts together.

    Args:
        layers: default: those that iterate.
        rounds: of power iteration.

    Raises:
        SSTError: no texts.
        Untestable: one iteration, or no layer whose state reaches its own next iteration.
    """
    if not texts:
        raise SSTError("there are no texts", "give token ids, some texts")
    if iterations < 2:
        raise Untestable("one iteration maps no state to a further one")
    t = trajectory(model, texts, iterations, gradients=True)
    start = torch.randn(t.output.shape, generator=generator(seed, "stability"), dtype=torch.float64).to(
        t.output
    )
    rows, growth = [], []
    for layer in model.kind.iterated(model.backbone.n_layers) if layers is None else layers:
        own = t.cells[layer]
        for k in range(1, iterations):
            stretch = largest_stretch(own[k - 1], own[k], start, rounds)
            if stretch is None:
                continue
            pushed = push(own[k - 1], own[k], start).norm(dim=-1) / start.norm(dim=-1)
            radius = spectral_radius(own[k - 1], own[k], start, rounds).double().mean()
            ends = as_columns(stretch=mean_over_questions(stretch.double().cpu().numpy(), resamples, seed))
            here = {"layer": layer, "iteration": k + 1, **ends}
            rows.append(here | {"radius": float(radius), "random": float(pushed.double().mean())})
        whole = largest_stretch(own[0], own[-1], start, rounds)
        if whole is not None:
            rates = whole.double().cpu().numpy() ** (1 / (iterations - 1))
            ends = as_columns(growth=mean_over_questions(rates, resamples, seed))
            growth.append({"layer": layer, **ends})
    if not growth:
        raise Untestable("no layer's state reaches its own next iteration")
    return Stability(pd.DataFrame(rows), pd.DataFrame(growth), len(texts))


def _pulled(x: Tensor, y: Tensor, u: Tensor, create: bool) -> Tensor | None:
    """U dy/dx [row, 1, d_model]; None where x does not reach y."""
    if x is y:
        return None
    (g,) = torch.autograd.grad(y, x, u, retain_graph=True, create_graph=create, allow_unused=True)
    return g


def push(x: Tensor, y: Tensor, v: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """The Jacobian-vector product dy/dx v: the derivative of u dy/dx by u. Zero where x does not reach y."""
    u = torch.zeros_like(y, requires_grad=True)
    pulled = _pulled(x, y, u, create=True)
    if pulled is None or not pulled.requires_grad:
        return torch.zeros_like(v)
    (out,) = torch.autograd.grad(pulled, u, v[:, None], retain_graph=True)
    return out[:, 0]


def largest_stretch(x: Tensor, y: Tensor, start: Tensor, rounds: int) -> Float[Tensor, " row"] | None:
    """Largest singular value of dy/dx of each row; None where x does not reach y."""
    v = start / start.norm(dim=-1, keepdim=True)
    size = torch.zeros_like(v[:, 0])
    for _ in range(rounds):
        pushed = push(x, y, v)
        size = pushed.norm(dim=-1)
        back = _pulled(x, y, pushed[:, None], create=False)
        if back is None:
            return None
        v = back[:, 0] / back[:, 0].norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return size


def spectral_radius(x: Tensor, y: Tensor, start: Tensor, rounds: int) -> Float[Tensor, " row"]:
    """Growth of a vector under dy/dx per application, over the last half (a complex pair turns it)."""
    v, logs = start / start.norm(dim=-1, keepdim=True), []
    for _ in range(rounds):
        v = push(x, y, v)
        size = v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        logs.append(size.log()[:, 0])
        v = v / size
    return torch.stack(logs[rounds // 2 :]).mean(0).exp()
