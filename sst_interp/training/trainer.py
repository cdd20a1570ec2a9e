"""Training: from a recipe to a checkpoint, interruptible at any point.

NAME/                         the checkpoint (`sst_interp.models.checkpoint`)
NAME/training.json, .jsonl    the recipe and the log (`sst_interp.training.card`)
NAME/README.md                the model card
NAME/training.html            loss and blend weights over the steps
NAME/training.safetensors     while unfinished: everything the next step depends on

The state is saved every few minutes. A training that is started again goes on from it and takes the same
steps as an uninterrupted one (with the same versions and number of threads).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sst_interp import paths
from sst_interp.errors import SSTError
from sst_interp.files import (
    check_place,
    put_in_place,
    replace_bytes,
    replace_json,
    stage,
    temporary,
    unreadable,
)
from sst_interp.models.checkpoint import ADAPTERS, CONFIG, WEIGHTS, add_adapters, save_checkpoint, trainable
from sst_interp.models.kinds.lrt import build_memory
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.training.card import ABOUT, CURVES, FORMAT, LOG, read_about, write_card
from sst_interp.training.data import Split, load_split, make_batch, refuse_short_batches, schedule
from sst_interp.training.evaluation import EVALUATION, answer_losses, remove_evaluation
from sst_interp.training.objective import training_loss
from sst_interp.training.recipe import EVERY_PASS, TrainingRecipe

STATE = "training.safetensors"
VERSIONS = ("sst-interp", "torch", "transformers", "peft")
LOOKS = 11
"""How often the held-out loss is measured, evenly from before the first step to after the last."""
LOOK_EXAMPLES = 24
"""On how many held-out examples."""
LOOK_DEPTHS = (1, 4)
"""Iterations of every position at which they are measured; a model without a stream is at depth 1 only."""


class Training:
    """A training in progress. `run` takes it to its end; `step` is one step.

    Args:
        folder: where the checkpoint goes; None for `checkpoints/NAME`.
        fresh: erase what an earlier training left there, its checkpoint and evaluation included.

    Raises:
        SSTError: data or backbone cannot be loaded, or the folder holds another recipe's training.
    """

    def __init__(self, recipe: TrainingRecipe, folder: str | Path | None = None, fresh: bool = False) -> None:
        self.recipe = recipe
        self.folder = paths.checkpoints_dir() / recipe.name if folder is None else Path(folder)
        begun = (self.folder / ABOUT).is_file()
        resumes = begun and not fresh
        if resumes:
            _refuse_changes(self.folder, recipe)
        elif not begun and self.folder.is_dir() and _holds_more(self.folder):
            raise SSTError(f"{self.folder} is not a training", "give an empty or a new folder with --out")
        check_place(self.folder, "give another folder with --out")
        self.model: StateStreamModel = load(
            recipe.backbone, recipe.alpha, recipe.choices, **recipe.placement.how()
        )
        if recipe.lrt is not None:
            self.model.kind = build_memory(recipe.lrt, self.model.backbone)
            self.model.kind.check(self.model.choices)
        self.split: Split = load_split(recipe, self.model)
        if resumes and read_about(self.folder)["data"]["hash"] != self.split.data_hash:
            raise SSTError(
                f"{self.folder} was begun with other data than {recipe.data} holds now",
                "give the data it was begun with, another --out, or --fresh",
            )
        self.backbone_hash = self.model.backbone.content_hash
        if self.model.backbone.device.type == "cpu" and recipe.attention is None:
            # The fused attention's backward is the slower one on CPUs: a step took 10% longer with it.
            self.model.backbone.config._attn_implementation = "eager"
        self.adapters: Any = add_adapters(
            self.model.backbone.model, recipe.rank, recipe.lora_alpha, recipe.targets, recipe.seed
        )
        lengths = [len(example.tokens) for example in self.split.train]
        self.schedule = schedule(
            lengths, recipe.batch_size, recipe.examples, recipe.seed, recipe.batch_tokens
        )
        if recipe.method == "interleaved":
            refuse_short_batches([max(lengths[i] for i in step) for step in self.schedule], recipe.groups)
        shape, memory = None, None
        if recipe.method != "none" and recipe.lrt is None:
            shape = (self.model.backbone.n_layers, self.model.backbone.d_model)
        elif recipe.method != "none":
            memory = self.model.kind.weights()
        self.masters = MasterWeights(recipe, trainable(self.adapters), shape, len(self.schedule), memory)
        self.done, self.log = 0, []
        if resumes:
            self._resume()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / STATE).unlink(missing_ok=True)  # first: it belongs to the recipe that goes
            self._write_about("training")
        if not self.done:
            _erase(self.folder)
        self._use_stream()

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        return len(self.schedule)

    def step(self) -> dict[str, float]:
        """Take one step; returns its line of the log.

        Raises:
            SSTError: the loss or the gradient is not finite. The step has changed nothing, and the log of the
                steps before it is written.
        """
        recipe, began = self.recipe, time.perf_counter()
        examples = [self.split.train[i] for i in self.schedule[self.done]]
        batch = make_batch(examples).to(self.model.backbone.device)
        if (weights := self.masters.stream()) is not None:
            self.model.kind = self.model.kind.with_weights(weights)
        solver = recipe.solver()
        loss = training_loss(self.model, batch, recipe, self.done, solver)
        value, norm = float(loss.detach()), math.nan
        if math.isfinite(value):
            loss.backward()
            norm = self.masters.gradient_norm()
        if not math.isfinite(norm):
            self.masters.forget()
            self._write_log()
            saved = (self.folder / STATE).is_file()
            kept = "the last saved state is kept" if saved else "no state was saved yet"
            raise SSTError(
                f"step {self.done + 1}: the loss ({value:.4g}) or its gradient is not finite",
                f"{kept}; {LOG} has the steps before; a lower learning_rate or alpha may train",
            )
        self.masters.step(self.done, norm)
        self._use_stream()
        self.done += 1
        tokens, seconds = sum(len(example.tokens) for example in examples), time.perf_counter() - began
        line = {"step": self.done, "loss": value, "gradient_norm": norm, "tokens": tokens, "seconds": seconds}
        line |= solver.line()
        if self.masters.logit is not None:
            for name in ("mean", "min", "max"):
                line[f"alpha_{name}"] = float(getattr(self.model.alpha, name)())
        if "gamma" in self.masters.memory:
            line["gamma_mean"] = float(self.masters.memory["gamma"].detach().mean())
        self.log.append(line)
        return line

    def look(self) -> dict[str, float]:
        """Loss on held-out examples: under exact evaluation, and as the recipe's method computes it."""
        recipe, held_out = self.recipe, self.split.held_out
        examples = held_out[:: max(1, len(held_out) // LOOK_EXAMPLES)][:LOOK_EXAMPLES]
        if not examples:
            return {}
        ways: dict[str, dict[str, Any]] = {"held_out_exact": {}}
        if recipe.method != "none" and recipe.lrt is None:
            ways |= {f"held_out_depth_{d}": {"iterations": d} for d in LOOK_DEPTHS[1:]}
        if recipe.method in ("two_pass", *EVERY_PASS):
            ways["held_out_as_trained"] = {"sweeps": recipe.sweeps, "groups": recipe.groups}
        means = {}
        for name, how in ways.items():
            losses = answer_losses(self.model, examples, recipe.batch_size, **how)
            means[name] = float(losses["loss"].sum() / losses["tokens"].sum())
        return means

    def run(
        self,
        each: Callable[[Training, dict[str, float]], object] | None = None,
        finish: Callable[[Path], object] | None = None,
    ) -> Path:
        """Train to the end; returns the checkpoint's folder.

        Args:
            each: called after every step with the training and the step's line of the log.
            finish: called with the folder once the checkpoint and its card are there. If the process is
                killed before it returns, the same training run again calls it again.

        Raises:
            SSTError: see `step`. A state is saved before a KeyboardInterrupt passes.
        """
        looks = {round(k * self.steps / (LOOKS - 1)) for k in range(LOOKS)}
        if self.done == 0 and not self.log:
            self.log.append({"step": 0, **self.look()})
        saved = time.monotonic()
        try:
            while self.done < self.steps:
                line = self.step()
                if self.done in looks:
                    line |= self.look()
                if each is not None:
                    each(self, line)
                if time.monotonic() - saved > 60 * self.recipe.save_minutes and self.done < self.steps:
                    self.save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            self.save()
            raise
        self.save()
        self._write_about("complete")
        write_card(self.folder)
        if finish is not None:
            finish(self.folder)
        (self.folder / STATE).unlink(missing_ok=True)  # last: while it is there, the same command finishes
        return self.folder

    def save(self) -> None:
        """Write the checkpoint as it is now, the log, and (last) the state to go on from."""
        save_checkpoint(self.model, self.folder, self.recipe.backbone, self.adapters, self.backbone_hash)
        self._write_log()
        if not self.done:
            return
        # The log rides along, so that log and state are of one moment whatever happens between two files.
        about = {"done": str(self.done), "log": json.dumps(self.log)}
        tensors = {name: value.contiguous() for name, value in self.masters.state().items()}
        stage(self.folder / STATE, lambda path: save_file(tensors, path, about))
        put_in_place(self.folder / STATE)

    def _write_log(self) -> None:
        replace_bytes(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in self.log).encode())

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.masters.restore(tensors)
            self.done, self.log = int(about["done"]), json.loads(about["log"])
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise unreadable(path, error, "put a copy back, or --fresh trains anew") from None

    def _use_stream(self) -> None:
        """Give the model the stream's weights without gradients. Without a stream they are 0."""
        weights = self.masters.stream()
        if weights is None:
            weights = {name: 0 * value for name, value in self.model.kind.weights().items()}
        self.model.kind = self.model.kind.with_weights({k: v.detach().clone() for k, v in weights.items()})

    def _write_about(self, state: str) -> None:
        replace_json(
            self.folder / ABOUT,
            {
                "format": FORMAT,
                "state": state,
                "recipe": self.recipe.to_dict(),
                "backbone": {"name": self.recipe.backbone, "content_hash": self.backbone_hash},
                "data": {
                    "hash": self.split.data_hash,
                    "train": len(self.split.train),
                    "held_out": [example.id for example in self.split.held_out],
                    "too_long": self.split.too_long,
                },
                "steps": self.steps,
                "versions": {name: version(name) for name in VERSIONS},
                "threads": torch.get_num_threads(),
            },
        )


class MasterWeights:
    """The trained values in fp32, AdamW over them, and the learning rate of every step.

    A bf16 weight of 1 cannot take a step of 0.001. So the optimiser works on fp32 masters, and the model
    computes with their bf16 roundings. Blend weights are trained as the logit of their place between the
    bounds: alpha = low + (high - low) * sigmoid(logit).

    Args:
        adapters: the model's adapter weights by name; they are overwritten after every step.
        shape: of the blend weights, [layer, d_model]; None without a blend.
        steps: of the whole training, for the learning rate.
        memory: weights of a Latent Recurrent Transformer, which are trained as they are.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        adapters: dict[str, nn.Parameter],
        shape: tuple[int, int] | None,
        steps: int,
        memory: dict[str, Tensor] | None = None,
    ) -> None:
        self.recipe, self.adapters, self.steps = recipe, adapters, steps
        dtype = torch.float64 if recipe.dtype == "float64" else torch.float32
        self.values = {name: nn.Parameter(p.detach().to(dtype).clone()) for name, p in adapters.items()}
        groups = [_group(self.values.values(), recipe.learning_rate, recipe.weight_decay)]
        self.logit: nn.Parameter | None = None
        if shape is not None:
            low, high = recipe.alpha_bounds
            device = next(iter(adapters.values())).device
            place = torch.full(shape, (recipe.alpha - low) / (high - low), dtype=dtype, device=device)
            self.logit = self.values["alpha.logit"] = nn.Parameter(torch.logit(place))
            groups.append(_group([self.logit], recipe.alpha_learning_rate))
        self.memory = {name: nn.Parameter(w.detach().to(dtype).clone()) for name, w in (memory or {}).items()}
        """A Latent Recurrent Transformer's weights by name, differentiable."""
        if self.memory:
            self.values |= {f"memory.{name}": value for name, value in self.memory.items()}
            groups.append(_group(self.memory.values(), recipe.lrt_learning_rate))
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.99))
        self._peaks = [group["lr"] for group in groups]

    def alpha(self) -> Float[Tensor, "layer d_model"]:
        """The blend weights, differentiable."""
        assert self.logit is not None
        low, high = self.recipe.alpha_bounds
        return low + (high - low) * torch.sigmoid(self.logit)

    def stream(self) -> dict[str, Tensor] | None:
        """The stream's own weights by name, differentiable; None if none are trained."""
        if self.logit is not None:
            return {"alpha": self.alpha()}
        return dict(self.memory) if self.memory else None

    def gradient_norm(self) -> float:
        """Take the gradient over from the model; returns its norm."""
        for name, parameter in self.adapters.items():
            if parameter.grad is not None:
                self.values[name].grad = parameter.grad.to(self.values[name].dtype)
                parameter.grad = None
        gradients = [value.grad for value in self.values.values() if value.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def step(self, number: int, norm: float) -> None:
        """Step `number` (from 0), with gradients scaled down to the recipe's clip.

        A memory is clipped apart from the adapters: its gradient is ten to a hundred times theirs, and would
        decide how they are scaled.
        """
        if self.memory:
            memory = list(self.memory.values())
            adapters = [value for name, value in self.values.items() if not name.startswith("memory.")]
            for part in (adapters, memory):
                gradients = [value.grad for value in part if value.grad is not None]
                nn.utils.clip_grads_with_norm_(part, self.recipe.clip, nn.utils.get_total_norm(gradients))
        else:
            nn.utils.clip_grads_with_norm_(self.values.values(), self.recipe.clip, torch.tensor(norm))
        for group, peak in zip(self.optimiser.param_groups, self._peaks, strict=True):
            group["lr"] = peak * rate(number, self.steps, self.recipe.warmup)
        self.optimiser.step()
        self.forget()
        self.write_back()

    def forget(self) -> None:
        """Drop all gradients."""
        self.optimiser.zero_grad()
        for parameter in self.adapters.values():
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Give the model the current values, rounded to its dtype."""
        for name, parameter in self.adapters.items():
            parameter.copy_(self.values[name])

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, by name."""
        tensors = {f"value/{name}": value.detach() for name, value in self.values.items()}
        for name, value in self.values.items():
            for key, moment in self.optimiser.state.get(value, {}).items():
                tensors[f"{key}/{name}"] = moment
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up a `state`."""
        for name, value in self.values.items():
            value.copy_(tensors[f"value/{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimiser.state[value] = {
                key: tensors[f"{key}/{name}"].clone().to("cpu" if key == "step" else value.device)
                for key in keys
            }
        self.write_back()


def _group(values: Iterable[nn.Parameter], learning_rate: float, weight_decay: float = 0.0) -> dict[str, Any]:
    """One group of AdamW's parameters."""
    return {"params": list(values), "lr": learning_rate, "weight_decay": weight_decay}


def rate(number: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at step `number`: linear, up for `warmup` steps, down to a tenth."""
    if number < warmup:
        return (number + 1) / warmup
    return 1 - 0.9 * (number - warmup) / max(1, steps - warmup)


def _holds_more(folder: Path) -> bool:
    """Whether a folder holds anything but the staged file of a training that was killed at its start."""
    return any(path != temporary(folder / ABOUT) for path in folder.iterdir())


def _erase(folder: Path) -> None:
    """Remove an earlier training's checkpoint and evaluation. Everything else in the folder stays."""
    for name in (CONFIG, WEIGHTS, *ADAPTERS, LOG, "README.md", CURVES):  # without the first, no checkpoint
        (folder / name).unlink(missing_ok=True)
    remove_evaluation(folder / EVALUATION)


def _refuse_changes(folder: Path, recipe: TrainingRecipe) -> None:
    about = read_about(folder)
    then = TrainingRecipe.from_dict(about["recipe"])
    for key, old, new in then.differences(recipe):
        raise SSTError(
            f"{folder} was begun with {key} = {old!r}; the recipe now says {new!r}",
            "undo the change, give another --out, or --fresh to erase it and train anew",
        )
    if about["state"] == "complete" and not (folder / STATE).is_file():
        raise SSTError(f"{folder} is trained already", "--fresh trains it anew")
