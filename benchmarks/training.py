"""What training costs: exact against two-pass; one optimiser step of every kind on the same batch of GSM8K
against the baseline step; and the baseline step against peft and transformers' Trainer.

    OMP_NUM_THREADS=1 python benchmarks/training.py --part exact       # time, memory and gradient error
    python benchmarks/training.py                                      # all; steps of 8 examples, 192 tokens
    python benchmarks/training.py --examples 1 --tokens 128 --pairs 1  # does it start?

Exact against two-pass: forward and backward pass of 8 rows of GSM8K text, the loss on each row's second
half, LoRA on all linear layers with random second factors, alpha 0.027. Times are processor time, so a busy
machine does not count. Memory is the peak of a process of its own, less what it had when the step began. The
gradient's error is taken in float32 against back-propagation through time (over more than 64 tokens, which
that has no room for, against exact training to 1e-7).

SmolLM2-135M, bf16, the shipped recipe's LoRA. The floor of a two-pass step is 2: it has two forward and two
backward passes where the baseline has one. The Trainer is driven by its own loop; its step is timed from its
callbacks `on_step_begin` to `on_step_end`, without fetching data, and our baseline takes its turn in between.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from timing import machine, paired, ratio, show
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import sst_interp as sst
from sst_interp.experiments.studies.gradient_errors import BASE, text_rows, with_adapters
from sst_interp.models.checkpoint import add_adapters
from sst_interp.questions.datasets import load_items
from sst_interp.questions.item import Item
from sst_interp.training.data import encode, make_batch
from sst_interp.training.objective import training_loss
from sst_interp.training.recipe import TrainingRecipe, find_training_recipe
from sst_interp.training.trainer import Training

BASELINE = "baseline (no stream)"
KINDS: dict[str, dict] = {
    BASELINE: {"method": "none"},
    "two-pass": {"method": "two_pass"},
    "exact": {"method": "exact"},
    "2 sweeps": {"method": "two_pass", "sweeps": 2},
    "4 sweeps": {"method": "two_pass", "sweeps": 4},
    "two-pass, 2 groups": {"method": "two_pass", "groups": 2},
    "two-pass, 4 groups": {"method": "two_pass", "groups": 4},
}


TWO_PASS = "two-pass"
SCHEDULES: dict[str, dict] = {
    TWO_PASS: {"method": "two_pass"},
    "exact (2, 2)": {"method": "exact", "exact_sweeps": (2, 2)},
    "exact to 1e-3": {"method": "exact"},
    "exact to 1e-3, recomputed": {"method": "exact", "recompute": True},
    "no stream": {"method": "none"},
}
"""Of which forward and backward passes are compared."""


def peak_memory(step: Callable[[], object]) -> float:
    """Bytes by which the resident memory of a process of its own grows at most during a step (Linux)."""
    read, write = os.pipe()
    if not (child := os.fork()):
        step()  # what the first step allocates for good
        now = lambda key: int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]  # noqa: E731
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = now("VmRSS")
        step()
        os.write(write, str(1024 * (now("VmHWM") - before)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return float(os.read(read, 99))


def exact_against_two_pass(tokens: int, pairs: int, rows: int = 8) -> None:
    """Time and memory in bf16, gradient error in float32."""
    recipes = {kind: TrainingRecipe("b", "b", "b", **how) for kind, how in SCHEDULES.items()}

    model, weights = with_adapters("smollm2-135m", BASE)
    batch = text_rows(model, rows, tokens)
    truth = {"method": "sequential"} if tokens <= 64 else {"method": "exact", "tolerance": 1e-7}

    def gradients(recipe: TrainingRecipe) -> tuple[torch.Tensor, torch.Tensor]:
        loss = training_loss(model, batch, recipe)
        of_alpha, *others = torch.autograd.grad(loss, weights, materialize_grads=True)
        return torch.cat([g.flatten() for g in (of_alpha, *others)]), torch.cat([g.flatten() for g in others])

    true = gradients(TrainingRecipe("b", "b", "b", **truth))
    errors = {
        kind: [float((g - t).norm() / t.norm()) for g, t in zip(gradients(recipe), true, strict=True)]
        for kind, recipe in recipes.items()
        if recipe.method != "none"
    }

    model, _ = with_adapters("smollm2-135m", BASE, "bfloat16")

    def step(recipe: TrainingRecipe) -> float:
        began = time.process_time()
        training_loss(model, batch, recipe).backward()
        return time.process_time() - began

    memory = {kind: peak_memory(lambda r=recipe: step(r)) for kind, recipe in recipes.items()}
    seconds = paired({kind: (lambda r=recipe: step(r)) for kind, recipe in recipes.items()}, pairs)
    print(f"{rows} rows of {tokens} tokens, {pairs} pairs: time and peak memory against two-pass's; error of "
          f"the gradient against {truth}: all, and adapters alone")  # fmt: skip
    for kind in recipes:
        off = " ".join(f"{error:8.3%}" for error in errors.get(kind, []))
        print(
            f"  {kind:28} {ratio(seconds, kind, TWO_PASS):5.2f} x {memory[kind] / memory[TWO_PASS]:5.2f} x "
            f"({memory[kind] / 1e9:.2f} GB)  {off}"
        )
    show(seconds)


def choose(examples: int, tokens: int) -> list[Item]:
    """The GSM8K test questions whose conversations are nearest to `tokens` long, and not longer."""
    model = sst.load("smollm2-135m")
    items, _ = load_items("gsm8k")
    lengths = {n: len(encode(item, model).tokens) for n, item in enumerate(items)}
    fitting = sorted((n for n in lengths if lengths[n] <= tokens), key=lambda n: -lengths[n])
    print(f"examples of {', '.join(str(lengths[n]) for n in fitting[:examples])} tokens")
    return [items[n] for n in fitting[:examples]]


def our_training(kind: str, data: Path, folder: Path, examples: int) -> Training:
    """A training whose every batch is the whole file."""
    recipe: TrainingRecipe = replace(
        find_training_recipe("smollm2-135m-sst"), name="timing", data=str(data), holdout=0,
        batch_size=examples, examples=10_000 * examples, **KINDS[kind],
    )  # fmt: skip
    return Training(recipe, folder / kind.replace(" ", "-"))


class InTurn(TrainerCallback):
    """Times every step of a Trainer, and lets our baseline take one before it."""

    def __init__(self, ours: Training) -> None:
        self.ours = ours
        self.seconds: dict[str, list[float]] = {BASELINE: [], "Trainer": []}
        self.losses: list[float] = []

    def on_step_begin(self, *_args, **_kwargs):  # noqa: D102
        begun = time.perf_counter()
        self.ours.step()
        self.begun = time.perf_counter()
        self.seconds[BASELINE].append(self.begun - begun)

    def on_step_end(self, *_args, **_kwargs):  # noqa: D102
        self.seconds["Trainer"].append(time.perf_counter() - self.begun)

    def on_log(self, _args, _state, _control, logs=None, **_kwargs):  # noqa: D102
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def against_trainer(ours: Training, folder: Path, adapters: str, pairs: int) -> tuple[dict, float]:
    """Seconds per step of our baseline and of peft + Trainer, in turn, and the Trainer's first loss.

    Args:
        adapters: their dtype: `bfloat16`, as ours, or `float32`, peft's default.
    """
    from peft import LoraConfig, get_peft_model

    recipe = ours.recipe
    fresh = sst.load(recipe.backbone, alpha=0.0)
    if adapters == "bfloat16":
        model = add_adapters(
            fresh.backbone.model, recipe.rank, recipe.lora_alpha, recipe.targets, recipe.seed
        )
    else:
        config = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.lora_alpha, lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(fresh.backbone.model, config)
    examples = ours.split.train
    batch = make_batch(examples)
    rows = []
    for row, example in enumerate(examples):
        n = len(example.tokens)
        tokens, real = batch.tokens[row], torch.arange(batch.tokens.shape[1]) < n
        answer = real & (torch.arange(len(tokens)) >= example.prompt)
        rows.append(
            {"input_ids": tokens, "attention_mask": real.long(), "labels": torch.where(answer, tokens, -100)}
        )
    arguments = TrainingArguments(
        str(folder / f"trainer-{adapters}"), per_device_train_batch_size=len(rows), max_steps=pairs + 1,
        num_train_epochs=10_000, learning_rate=recipe.learning_rate, max_grad_norm=recipe.clip,
        use_cpu=True, save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    turns = InTurn(ours)
    Trainer(
        model, arguments, data_collator=default_data_collator, train_dataset=rows, callbacks=[turns]
    ).train()
    return {name: values[1:] for name, values in turns.seconds.items()}, turns.losses[0]


def main(part: str = "all", examples: int = 8, tokens: int = 192, pairs: int = 5) -> None:
    print(machine())
    if part != "steps":
        for length in (64, 200) if part == "exact" or tokens > 128 else (32,):
            exact_against_two_pass(length, pairs)
    if part == "exact":
        return
    items = choose(examples, tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "batch.jsonl"
        lines = [json.dumps({"question": item.text, "answer": item.worked}) for item in items]
        data.write_text("\n".join(lines) + "\n")
        trainings = {kind: our_training(kind, data, folder, len(items)) for kind in KINDS}
        losses: dict[str, float] = {}

        def step(kind: str) -> None:
            losses.setdefault(kind, trainings[kind].step()["loss"])

        print(f"one step of {len(items)} examples, {pairs} pairs")
        seconds = paired({kind: (lambda kind=kind: step(kind)) for kind in KINDS}, pairs)
        show(seconds)
        for kind in list(KINDS)[1:]:
            print(f"  {kind} / {BASELINE}: {ratio(seconds, kind, BASELINE):.2f}", flush=True)
        ours = trainings.pop(BASELINE)
        trainings.clear()
        for adapters in ("bfloat16", "float32"):
            found, loss = against_trainer(ours, folder, adapters, pairs)
            print(f"peft + Trainer, {adapters} adapters (first loss {loss:.4f}, ours {losses[BASELINE]:.4f})")
            show(found)
            print(f"  {BASELINE} / Trainer: {ratio(found, BASELINE, 'Trainer'):.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["exact", "steps", "all"], default="all")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--pairs", type=int, default=5)
    main(**vars(parser.parse_args()))
