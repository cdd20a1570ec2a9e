"""A trained probe: a halting policy that is saved, loaded, and refused for another model.

folder/probe.safetensors   dimensions, their means and scales, and the weights
folder/probe.json          layer, iteration, label, depths, threshold, the model's hashes, the evidence
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sst_interp.analyses.answers import answers_of
from sst_interp.analyses.result import json_ready
from sst_interp.errors import SSTError
from sst_interp.experiments.probe import Features, Labels, halting_labels, position0, usable_layers
from sst_interp.experiments.probe.finding import PERMUTATIONS, Halting
from sst_interp.experiments.probe.finding import halting as validated
from sst_interp.experiments.probe.fit import Design, Inputs, Problems, TwoLayer, fit
from sst_interp.experiments.probe.routing import Routing, routing_of
from sst_interp.experiments.probe.validate import Progress, blocks_of, choose, random_keys
from sst_interp.files import check_place, read_json, replace_json, stage, unreadable
from sst_interp.files import put_in_place as publish
from sst_interp.models.halting import HaltingPolicy, Look
from sst_interp.runs.fleet import Fleet
from sst_interp.runs.recipe import MAX_DEPTH
from sst_interp.runs.store import open_run

if TYPE_CHECKING:
    from sst_interp.models.model import StateStreamModel
    from sst_interp.runs.run import Run

FORMAT = 1
CONFIG, WEIGHTS = "probe.json", "probe.safetensors"
STREAM = ("carry", "blend", "prompt", "kv")
"""Choices that change the states a probe reads."""
PLAIN: dict[str, type] = {
    "layer": int, "iteration": int, "shallowest": int, "deepest": int, "halts": bool, "log_odds": float,
    "label": str, "model": dict, "threshold": float, "evidence": dict,
}  # fmt: skip
"""Fields of the JSON file."""
NAMES = {int: "whole number", bool: "true or false", float: "number", str: "text", dict: "object"}


@dataclass(frozen=True, eq=False)
class HaltingProbe(HaltingPolicy):
    """A trained probe. It is a halting policy: `model.generate(prompts, depth=probe)`."""

    layer: int
    """The layer whose output it reads, 0-based."""
    iteration: int
    """The iteration of position 0 whose state it reads."""
    dims: Int[Tensor, " k"]
    weights: Mapping[str, Tensor]
    """mean and scale [k] of the dimensions; w, c of a linear probe; w, b, u, c of a two-layer one."""
    shallowest: int
    """Depth of a question to halt."""
    deepest: int
    """Depth of the others."""
    halts: bool
    """Whether a positive question should halt."""
    log_odds: float
    """Of the positive class in training, for a logit of 0."""
    label: str
    """Definition of a positive question."""
    model: Mapping[str, Any]
    """model_hash, alpha_hash, n_layers, d_model and the choices in `STREAM` of its model."""
    threshold: float = 0.0
    """A question is positive if its logit is above."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Out-of-fold results of probes made in this way."""

    def __post_init__(self) -> None:
        if problem := self._problem():
            hint = "train it again: `sst-interp probe --run NAME --save FOLDER`"
            raise SSTError(f"this halting probe cannot be used: {problem}", hint)

    def _problem(self) -> str | None:
        for key in ("n_layers", "d_model"):
            if type(self.model.get(key, 0)) is not int:
                return f"its model's {key} is no whole number"
        if self.layer < 0 or self.layer >= self.model.get("n_layers", math.inf):
            return f"there is no layer {self.layer}"
        if not 1 <= self.shallowest <= self.deepest <= MAX_DEPTH:
            return f"depths {self.shallowest} and {self.deepest} are not in order from 1 to {MAX_DEPTH}"
        if not 1 <= self.iteration <= self.deepest:
            return f"iteration {self.iteration} is not one of 1 to {self.deepest}, its deepest depth"
        for name in ("threshold", "log_odds"):
            if not math.isfinite(getattr(self, name)):
                return f"{name} is {getattr(self, name)}"
        if self.dims.dtype != torch.int64 or self.dims.ndim != 1:
            return "dims are no list of whole numbers"
        width, k = self.model.get("d_model", math.inf), len(self.dims)
        if k and not 0 <= int(self.dims.min()) <= int(self.dims.max()) < width:
            return f"there is no dimension {int(self.dims.max())}"
        layers = ("mean", "scale", "w", "b", "u", "c") if "u" in self.weights else ("mean", "scale", "w", "c")
        if set(self.weights) != set(layers):
            return f"its weights are {', '.join(sorted(self.weights))}, not {', '.join(sorted(layers))}"
        h = (len(self.weights["u"]),) if "u" in self.weights and self.weights["u"].ndim else ()
        shapes = {"mean": (k,), "scale": (k,), "w": (*h, k), "b": h, "u": h, "c": ()}
        for name, tensor in self.weights.items():
            if tensor.shape != shapes[name] or not tensor.is_floating_point():
                return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not of {shapes[name]}"
            if not bool(torch.isfinite(tensor).all()):
                return f"{name} is not finite"
        return None

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
        refuse_other(self.model, model_identity(model))

    def save(self, folder: str | Path) -> Path:
        """Write it to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in (*self.weights.items(), ("dims", self.dims))}
        stage(folder / WEIGHTS, lambda path: save_file(tensors, path))
        publish(folder / WEIGHTS)
        replace_json(folder / CONFIG, {"format": FORMAT} | {name: getattr(self, name) for name in PLAIN})
        return folder


def load_probe(folder: str | Path, model: StateStreamModel | None = None) -> HaltingProbe:
    """A saved probe. Raises SSTError if a file is missing or damaged, or if it is not of this model."""
    folder, again = Path(folder), "save it again"
    config = read_json(folder / CONFIG, again)
    if config.get("format") != FORMAT:
        raise SSTError(f"{folder / CONFIG} is not of format {FORMAT}", "upgrade sst-interp")
    for name, kind in PLAIN.items():
        if name not in config:
            raise SSTError(f"{folder / CONFIG} lacks {name}", again)
        if kind is float and type(config[name]) is int and abs(config[name]) < 2**53:
            config[name] = float(config[name])
        if type(config[name]) is not kind:
            raise SSTError(f"{folder / CONFIG}: {name} is no {NAMES[kind]}", again)
    if not config["model"].get("model_hash"):
        raise SSTError(f"{folder / CONFIG} does not say which model the probe belongs to", again)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise unreadable(folder / WEIGHTS, error, again) from None
    if "dims" not in tensors:
        raise SSTError(f"{folder / WEIGHTS} lacks dims", again)
    fields = {name: config[name] for name in PLAIN}
    try:
        probe = HaltingProbe(dims=tensors.pop("dims"), weights=tensors, **fields)
    except SSTError as error:
        raise SSTError(f"{folder}: {error.message}", error.hint) from None
    if model is not None:
        probe.check(model)
    return probe


def train_probe(
    run: Run, features: Features, labels: Labels, design: Design, evidence: Mapping[str, Any] | None = None
) -> HaltingProbe:
    """Choose and train on every question."""
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
    odds, about = float(np.log(labels.n_positive / labels.n_negative)), (labels.definition, run_identity(run))
    depths = labels.shallowest, labels.deepest, labels.halts
    evidence = dict(evidence or {})
    return HaltingProbe(place, features.iteration, own, weights, *depths, odds, *about, evidence=evidence)


def model_identity(model: StateStreamModel) -> dict[str, Any]:
    """What the states of a model depend on."""
    alpha = model.kind.digest()
    shape = {"n_layers": model.backbone.n_layers, "d_model": model.backbone.d_model}
    choices = {name: getattr(model.choices, name) for name in STREAM}
    return {"model_hash": model.backbone.content_hash, "alpha_hash": alpha} | shape | choices


def run_identity(run: Run) -> dict[str, Any]:
    """The same of a run's model, as far as its manifest says."""
    said = run.manifest["provenance"]
    stated = {key: said[key] for key in ("model_hash", "alpha_hash", "n_layers", "d_model") if key in said}
    return stated | {name: getattr(run.recipe.choices, name) for name in STREAM}


def refuse_other(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise if an identity differs from a model's or lacks a part of it."""
    for key, value in theirs.items():
        if ours.get(key) != value:
            before, after = (str(v)[:12] for v in (ours.get(key, "unknown"), value))
            wrong = f"it was trained on {key} = {before}, this model has {after}"
            hint = "train one on a run of this model: `sst-interp probe --run NAME`"
            raise SSTError(f"this probe belongs to another model: {wrong}", hint)


class Probed(NamedTuple):
    """A halting probe: validated, routed by, and trained on every question."""

    halting: Halting
    routing: Routing
    probe: HaltingProbe


def layer_of(text: str | int | None) -> int | None:
    """A layer's number, or None for `auto`: chosen inside each fold. Raises SSTError for anything else."""
    if text is None or text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise SSTError(f"layer {text!r} is neither auto nor a number", "for example --layer 15") from None


def check_save(save: str | Path) -> None:
    """Raise SSTError if a probe cannot be saved there."""
    if not str(save).strip() or Path(save) == Path():
        raise SSTError("--save names no folder", "for example --save probes/gpqa")
    check_place(Path(save), "give another --save")


def probe_run(
    run: Run | str,
    label: str = "must-halt",
    layer: str | int | None = "auto",
    permutations: int = PERMUTATIONS,
    design: Design | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
    fleet: Fleet | None = None,
) -> Probed:
    """Validate a halting probe on a run, route by it, train it, and keep it.

    Args:
        run: a captured run, or its name.
        label, permutations, design, progress, fleet: as for `finding.halting_of`.
        layer: `auto` or a number.
        save: a folder to keep the probe in.

    Raises:
        Untestable: as `finding.halting`.
        SSTError: an unknown run, label or layer, or a folder that cannot be written.
    """
    run = open_run(run) if isinstance(run, str) else run
    if save is not None:
        check_save(save)
    asked = layer_of(layer)
    how: dict[str, Any] = {"permutations": permutations, "progress": progress, "fleet": fleet}
    halting = validated(run, label, layer=asked, design=design, **how)
    labels = halting_labels(answers_of(run.questions), label)
    features = position0(run, labels.questions)
    design = replace(design or Design(), layers=usable_layers(features, asked))
    evidence = {"run": run.name, "reply_prefix": run.recipe.reply_prefix, "auc": halting.auc.estimate}
    evidence |= {"p": halting.p_auc, "hits": halting.hits, "positive": halting.n_positive}
    evidence |= {"called": halting.called, "questions": halting.n_questions, "permutations": permutations}
    probe = train_probe(run, features, labels, design, json_ready(evidence))
    if save is not None:
        probe.save(save)
    return Probed(halting, routing_of(run, halting), probe)
