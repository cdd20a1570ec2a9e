"""One probe, kept: weights in safetensors, what it is and which model it belongs to in JSON.

folder/probe.safetensors   dimensions it reads, their means and scales, and the weights
folder/probe.json          layer, iteration, label, depths, threshold, the model's hashes, the evidence
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sst_interp.durable import publish, replace_json, stage
from sst_interp.errors import SSTError
from sst_interp.halting import HaltingPolicy, Look
from sst_interp.probe.design import Design
from sst_interp.probe.features import Features
from sst_interp.probe.fitting import Inputs, Problems, fit
from sst_interp.probe.labels import Labels
from sst_interp.probe.networks import TwoLayer
from sst_interp.probe.selection import blocks_of, choose, random_keys

if TYPE_CHECKING:
    from sst_interp.model import StateStreamModel
    from sst_interp.run import Run

FORMAT = 1
CONFIG, WEIGHTS = "probe.json", "probe.safetensors"
STREAM = ("carry", "blend", "prompt", "kv")
"""Choices that change the states a probe reads."""


@dataclass(frozen=True, eq=False)
class HaltingProbe(HaltingPolicy):
    """A trained probe. It is a halting policy: `model.generate(prompts, depth=probe)`."""

    layer: int
    """Which layer's output it reads, 0-based ..."""
    iteration: int
    """... after which iteration of position 0."""
    dims: Int[Tensor, " k"]
    """Which dimensions."""
    weights: Mapping[str, Tensor]
    """mean and scale [k] of the dimensions; w, c of a linear probe; w, b, u, c of a two-layer one."""
    shallowest: int
    """Depth of a question to halt."""
    deepest: int
    """Depth of the others."""
    halts: bool
    """Whether a positive question is one to halt."""
    log_odds: float
    """Of the positive class in training: what a logit of 0 stands for."""
    label: str
    """What positive means."""
    model: Mapping[str, Any]
    """Which model it belongs to: model_hash, alpha_hash, n_layers, d_model and the choices in `STREAM`."""
    threshold: float = 0.0
    """Logit above which a question counts as positive; 0: more likely than the base rate."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """What validation said of probes made in this way; it is not about this one's own training questions."""

    @property
    def looks(self) -> int:
        """The iteration it reads."""
        return self.iteration

    def logits(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        """Of states of its layer; above 0: more likely positive than the base rate."""
        w = self.weights
        z = (states.float().cpu()[:, self.dims] - w["mean"]) * w["scale"]
        if "u" not in w:
            return z @ w["w"] + w["c"]
        layers = TwoLayer(w["w"][None], w["b"][None], w["u"][None], w["c"][None])
        return layers.logits(z.T[None])[0]

    def probability(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, " row"]:
        """Of being positive, at the base rate of its training questions."""
        return torch.sigmoid(self.logits(states) + self.log_odds)

    def depths(self, look: Look) -> Int[Tensor, " row"]:
        """`shallowest` for a question to halt, `deepest` for the others."""
        positive = self.logits(look.resid_post[self.iteration - 1, self.layer]) > self.threshold
        return torch.where(positive == self.halts, self.shallowest, self.deepest)

    def check(self, model: StateStreamModel) -> None:
        """Raise SSTError if it was trained on the states of another model."""
        refuse_other(self.model, model_identity(model), "the probe was trained on", "this model has")

    def save(self, folder: str | Path) -> Path:
        """Write it to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in self.weights.items()} | {
            "dims": self.dims.contiguous()
        }
        stage(folder / WEIGHTS, lambda path: save_file(tensors, path))
        publish(folder / WEIGHTS)
        config = {name: getattr(self, name) for name in _PLAIN}
        replace_json(folder / CONFIG, {"format": FORMAT, **config})
        return folder


_PLAIN = ("layer", "iteration", "shallowest", "deepest", "halts", "log_odds", "label", "model", "threshold")
_PLAIN += ("evidence",)


def load_probe(folder: str | Path, model: StateStreamModel | None = None) -> HaltingProbe:
    """Read a probe.

    Args:
        folder: where it was saved.
        model: the model it is to be used with, checked now rather than at first use.

    Raises:
        SSTError: a file is missing or damaged, or the probe belongs to another model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise SSTError(f"probe {folder} cannot be read: {error}", "save it again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SSTError(f"probe {folder}: {CONFIG} is not of format {FORMAT}", "upgrade sst-interp")
    if missing := [name for name in _PLAIN if name not in config]:
        raise SSTError(f"probe {folder}: {CONFIG} lacks {missing[0]}", "save it again")
    if not {"dims", "mean", "scale", "w", "c"} <= set(tensors):
        raise SSTError(f"probe {folder}: {WEIGHTS} holds {sorted(tensors)}", "save it again")
    dims = tensors.pop("dims")
    probe = HaltingProbe(dims=dims, weights=tensors, **{name: config[name] for name in _PLAIN})
    if model is not None:
        probe.check(model)
    return probe


def train_probe(
    run: Run, features: Features, labels: Labels, design: Design, evidence: Mapping[str, Any] | None = None
) -> HaltingProbe:
    """Choose and train on every question. What it is worth is what validation says of its kind."""
    inputs, keys = Inputs(features.states), random_keys(len(labels.positive), design.seed)
    y = torch.from_numpy(labels.positive[None].astype(np.float32))
    blocks = blocks_of(y.numpy(), design.blocks, keys)
    layer, dims, penalty = (c[0] for c in choose(design, inputs, y, blocks, (frozenset(),)))
    everything = np.ones((1, len(labels.positive)), dtype=bool)
    fits = fit(design, inputs, y, Problems(np.zeros(1, int), everything, layer, dims, penalty), keep=True)
    read, (mean, scale, *params) = fits.read[0], fits.weights[0]
    # From preconditioned inputs back to states: x = (state - m) * s.
    place, own = int(layer[0]), read.long()
    m, s = inputs.mean[place, own], inputs.scale[place, own]
    weights = {"mean": m + mean[own] / torch.where(s > 0, s, 1), "scale": scale[own] * s}
    if design.kind == "two_layer":
        weights |= dict(zip(("w", "b", "u", "c"), params, strict=True))
    else:
        weights |= {"w": params[0][own], "c": params[1]}
    return HaltingProbe(
        place,
        features.iteration,
        own,
        weights,
        labels.shallowest,
        labels.deepest,
        labels.halts,
        float(np.log(labels.n_positive / labels.n_negative)),
        labels.definition,
        run_identity(run),
        evidence=dict(evidence or {}),
    )


def model_identity(model: StateStreamModel) -> dict[str, Any]:
    """What a probe's states depend on, of a model."""
    alpha = model.kind.digest()
    shape = {"n_layers": model.backbone.n_layers, "d_model": model.backbone.d_model}
    choices = {name: getattr(model.choices, name) for name in STREAM}
    return {"model_hash": model.backbone.content_hash, "alpha_hash": alpha} | shape | choices


def run_identity(run: Run) -> dict[str, Any]:
    """The same of the model a run was captured with, as far as its manifest says."""
    said = run.manifest["provenance"]
    found = {key: said[key] for key in ("model_hash", "alpha_hash", "n_layers", "d_model") if key in said}
    return found | {name: getattr(run.recipe.choices, name) for name in STREAM}


def refuse_other(ours: Mapping[str, Any], theirs: Mapping[str, Any], was: str, now: str) -> None:
    """Raise if two identities differ in something both state."""
    for key, value in ours.items():
        if key in theirs and theirs[key] != value:
            before, after = (str(v)[:12] for v in (value, theirs[key]))
            raise SSTError(
                f"this probe belongs to another model: {was} {key} = {before}, {now} {after}",
                "train one on a run of this model: `sst-interp probe --run NAME`",
            )
