"""Lenses per (layer, iteration): what would a state say, if the rest of the pass were one affine map?

    lens = jacobian_lens(model, texts, iterations=4)
    lens.save("lens.safetensors")
    read_outs(model, held_out, [logit_lens(model, 4), lens]).verdict

| lens | map of a state y at (layer, iteration) | fitted by |
| --- | --- | --- |
| `logit` | y | nothing |
| `jacobian` | J y, J = mean over texts of d output / d y | one backward pass per dimension and batch |
| `tuned` | A y + b | KL of the lens from the output, next token, Adam, from A = 1, b = 0 |

The final norm and the unembedding follow. The output is what the last layer hands to them in the last
iteration, so at the last cell the Jacobian is the identity and all three agree. (A loop that is damped, or a
norm that follows its last layer, is part of the map.) A cell that does not reach the output has J = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sst_interp.analyses.plots import canvas
from sst_interp.analyses.result import Result
from sst_interp.analyses.statistics.bootstrap import as_columns, mean_over_questions
from sst_interp.errors import SSTError
from sst_interp.experiments.trajectory import identity, trajectory
from sst_interp.files import put_in_place, stage, unreadable
from sst_interp.models.measures import wide
from sst_interp.models.model import StateStreamModel

BATCH = 8
"""Texts that are read together."""
TOGETHER = 32
"""Directions that are pulled back together."""
FORMAT = "sst-interp lens 1"
AGAIN = "`sst-interp lens` makes lenses"


@dataclass(frozen=True, eq=False)
class Lens:
    """An affine map of each cell's state to the output's place."""

    name: str
    """`logit`, `jacobian` or `tuned`."""
    model: str
    """`identity` of the model that it was fitted on."""
    weight: Float[Tensor, "layer iteration d_model d_model"]
    bias: Float[Tensor, "layer iteration d_model"]
    texts: int = 0
    """How many it was fitted on."""

    @property
    def iterations(self) -> int:
        """The depth that it reads."""
        return self.weight.shape[1]

    def logits(
        self, model: StateStreamModel, states: Float[Tensor, "row layer iteration d_model"]
    ) -> Float[Tensor, "row layer iteration vocab"]:
        """What each cell would say.

        Raises:
            SSTError: states of another shape than the lens was fitted on.
        """
        if states.shape[1:] != self.bias.shape:
            raise SSTError(
                f"the states are {list(states.shape[1:])} and the lens {list(self.bias.shape)} "
                "(layers, iterations, d_model)",
                "fit a lens at this depth",
            )
        moved = torch.einsum("rlid,lied->rlie", states.to(self.weight), self.weight) + self.bias
        return model.backbone.unembed(moved.to(model.backbone.dtype))

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, in place at once. Raises SSTError if the place cannot be written."""
        about = {"format": FORMAT, "name": self.name, "model": self.model, "texts": str(self.texts)}
        tensors = {"weight": self.weight.contiguous().cpu(), "bias": self.bias.contiguous().cpu()}
        stage(Path(path), lambda at: save_file(tensors, at, about))
        put_in_place(Path(path))


def open_lens(path: str | Path, model: StateStreamModel | None = None) -> Lens:
    """A lens from its file.

    Args:
        model: refuse a lens of any other.

    Raises:
        SSTError: no lens there, a damaged file, or another model's lens.
    """
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise SSTError(f"{path} is no lens", AGAIN)
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
            lens = Lens(about["name"], about["model"], weight, bias, int(about["texts"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise unreadable(path, error, AGAIN) from None
    if model is not None and lens.model != identity(model):
        raise SSTError(f"{path} was fitted on another model", f"fit one on this: {AGAIN}")
    return lens


def logit_lens(model: StateStreamModel, iterations: int) -> Lens:
    """The identity at every cell."""
    b = model.backbone
    eye = torch.eye(b.d_model, dtype=torch.promote_types(b.dtype, torch.float32), device=b.device)
    weight = eye.expand(b.n_layers, iterations, -1, -1).clone()
    return Lens("logit", identity(model), weight, torch.zeros_like(weight[..., 0]))


def jacobian_lens(
    model: StateStreamModel,
    texts: Sequence[Sequence[int]],
    iterations: int,
    each: Callable[[int], object] = lambda done: None,
) -> Lens:
    """Mean Jacobian of the output by every cell, at the last token of each text.

    Costs d_model / 32 batched backward passes through one position per `BATCH` texts.

    Args:
        texts: token ids.
        each: called with the number of texts done.

    Raises:
        SSTError: no texts, an empty one, or iterations below 1.
    """
    if not texts:
        raise SSTError("there are no texts to fit a lens on", "some dozens are enough for a first look")
    start = logit_lens(model, iterations)
    weight = torch.zeros_like(start.weight)
    for first in range(0, len(texts), BATCH):
        t = trajectory(model, texts[first : first + BATCH], iterations, gradients=True)
        units = torch.eye(weight.shape[-1]).to(t.output)
        for k in range(0, len(units), TOGETHER):
            some = units[k : k + TOGETHER, None].expand(-1, len(t.output), -1)
            pulled = (
                t.pull(t.output, some, batched=True).sum(1).to(weight)
            )  # [direction, layer, iteration, d]
            weight[:, :, k : k + TOGETHER] += pulled.permute(1, 2, 0, 3)
        each(min(first + BATCH, len(texts)))
    return Lens("jacobian", start.model, weight / len(texts), start.bias, len(texts))


def tuned_lens(
    model: StateStreamModel,
    texts: Sequence[Sequence[int]],
    iterations: int,
    steps: int = 100,
    rate: float = 1e-3,
) -> Lens:
    """An affine map per cell, trained on KL(output || lens) of the next token at the last token of each text.

    The last cell stays the identity. Costs `steps` read-outs of every text, cell by cell; no pass through
    the layers beyond the first reading.

    Args:
        steps: of Adam, each over all texts.
        rate: its first learning rate, which falls linearly to 0.

    Raises:
        SSTError: as `jacobian_lens`.
    """
    if not texts:
        raise SSTError("there are no texts to fit a lens on", "some dozens are enough for a first look")
    start, states = logit_lens(model, iterations), read_states(model, texts, iterations)
    target = _log_probs(model, states[:, -1, -1])
    weight, bias = start.weight.clone(), start.bias.clone()
    for layer, iteration in np.ndindex(*bias.shape[:2]):
        if (layer, iteration) == (bias.shape[0] - 1, bias.shape[1] - 1):
            continue
        a, b = weight[layer, iteration].clone(), bias[layer, iteration].clone()
        adam = torch.optim.Adam([a.requires_grad_(), b.requires_grad_()], lr=rate)
        own = states[:, layer, iteration].to(a)
        for step in range(steps):
            adam.param_groups[0]["lr"] = rate * (1 - step / steps)
            adam.zero_grad()
            loss = _kl(target, _log_probs(model, (own @ a.T + b).to(states))).mean()
            a.grad, b.grad = torch.autograd.grad(loss, [a, b])
            adam.step()
        weight[layer, iteration], bias[layer, iteration] = a.detach(), b.detach()
    return Lens("tuned", start.model, weight, bias, len(texts))


def read_states(
    model: StateStreamModel, texts: Sequence[Sequence[int]], iterations: int
) -> Float[Tensor, "text layer iteration d_model"]:
    """Every cell at the last token of each text."""
    batches = [texts[first : first + BATCH] for first in range(0, len(texts), BATCH)]
    return torch.cat([trajectory(model, batch, iterations).states for batch in batches])


@dataclass(frozen=True, eq=False)
class ReadOuts(Result):
    """How well lenses read the output off every cell of held-out texts."""

    cells: pd.DataFrame
    """A row per lens, layer (from 0) and iteration (from 1): `kl` (nats, of the output from the lens) with
    `kl_low` and `kl_high` (texts resampled), `agree` (share of texts with the output's most likely token),
    `perplexity` of the token that follows, and `control`: the KL if the state is another text's."""
    texts: int

    @property
    def title(self) -> str:
        """A short name for a heading."""
        return "Lenses by layer and iteration"

    @property
    def table(self) -> pd.DataFrame:
        """The cells."""
        return self.cells

    @property
    def verdict(self) -> str:
        """Which lens reads best before the last cell, and at how many cells it beats another text's state."""
        last = (self.cells["layer"] == self.cells["layer"].max()) & (
            self.cells["iteration"] == self.cells["iteration"].max()
        )
        early = self.cells[~last]
        if early.empty:
            return "There is no cell before the last one, so there is nothing to compare."
        mean = early.groupby("lens", sort=False)["kl"].mean()
        best = str(mean.idxmin())
        own = early[early["lens"] == best]
        above = int((own["kl_high"] < own["control"]).sum())
        words = (
            f"The {best} lens reads the output best before the last cell: {mean[best]:.3g} nats on average. "
        )
        words += f"It beats the state of another text at {above} of {len(own)} cells. "
        return words + f"{self.texts} held-out texts, mean over cells; the table has every lens."

    def figure(self) -> go.Figure:
        """KL by layer, a line per iteration of the lens with the lowest KL."""
        return next(iter(self.figures().values()))

    def figures(self) -> dict[str, go.Figure]:
        """kl_LENS: layer x iteration."""
        made = {}
        for lens, own in self.cells.groupby("lens", sort=False):
            wide_table = own.pivot(index="layer", columns="iteration", values="kl")
            figure = canvas(
                f"What the {lens} lens misses of the output",
                f"KL in nats, {self.texts} held-out texts",
                "iteration",
                "layer (0-based)",
            )
            figure.add_heatmap(
                x=wide_table.columns.to_numpy(), y=wide_table.index.to_numpy(), z=wide_table.to_numpy(),
                colorscale="Cividis_r", colorbar={"title": {"text": "nats", "side": "right"}},
                hovertemplate="layer %{y}, iteration %{x}: %{z:.3g} nats<extra></extra>",
            )  # fmt: skip
            made[f"kl_{lens}"] = figure
        return made


@torch.no_grad()
def read_outs(
    model: StateStreamModel,
    texts: Sequence[Sequence[int]],
    lenses: Sequence[Lens],
    resamples: int = 2000,
    seed: int = 0,
) -> ReadOuts:
    """Read held-out texts by several lenses: all but the last token is read, and the last is what follows.

    Args:
        texts: token ids, two or more each, none of them fitted on; from different sources, since they are
            what the intervals resample.
        lenses: of one depth.

    Raises:
        SSTError: fewer than two texts, a text of one token, a lens of another model, or of another depth.
    """
    if len(texts) < 2 or any(len(text) < 2 for text in texts):
        raise SSTError("two texts of two tokens are the least", "give more or longer texts")
    if not lenses or any(lens.model != identity(model) for lens in lenses):
        raise SSTError("there is no lens, or one of another model", AGAIN)
    states = read_states(model, [text[:-1] for text in texts], lenses[0].iterations)
    target, follows = _log_probs(model, states[:, -1, -1]), torch.tensor([text[-1] for text in texts])
    rows, shifted = [], target.roll(1, 0)
    for lens in lenses:
        logits = lens.logits(model, states)
        for layer, iteration in np.ndindex(*logits.shape[1:3]):
            said = wide(logits[:, layer, iteration]).log_softmax(-1)
            kl = mean_over_questions(_kl(target, said).cpu().numpy(), resamples, seed)
            nats = -said.gather(1, follows.to(said.device)[:, None]).mean()
            rows.append(
                {
                    "lens": lens.name,
                    "layer": layer,
                    "iteration": iteration + 1,
                    **as_columns(kl=kl),
                    "agree": float((said.argmax(-1) == target.argmax(-1)).double().mean()),
                    "perplexity": float(nats.exp()),
                    "control": float(_kl(shifted, said).mean()),
                }
            )
    return ReadOuts(pd.DataFrame(rows), len(texts))


def _log_probs(model: StateStreamModel, y: Tensor) -> Tensor:
    return wide(model.backbone.unembed(y.to(model.backbone.dtype))).log_softmax(-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)
