"""What an LRT costs: a training step over a baseline step, a decoded token over the backbone's.

    python benchmarks/lrt.py          # 4 GSM8K examples of at most 160 tokens, 7 pairs; 32 tokens after 64
    python benchmarks/lrt.py --tiny   # a random model of 3 layers: does it start?

SmolLM2-135M, bf16. Contestants take turns in one process; what counts is the median over pairs of a ratio, of
processor time, so that other work on the machine matters little. The aims: an interleaved step with S = 2 at
most 2.3 baseline steps (it has two forward and backward passes where the baseline has one), a token at most
1.15 of the backbone's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from timing import machine, paired, ratio, show

import sst_interp as sst
from sst_interp.experiments.studies.lrt_equivalence import random_memory
from sst_interp.models.kinds.lrt import MemoryDesign, Pathway
from sst_interp.models.model import StateStreamModel, attach
from sst_interp.models.solvers.sequential import advance
from sst_interp.training.data import encode, make_batch, read_items
from sst_interp.training.objective import training_loss
from sst_interp.training.recipe import TrainingRecipe, find_training_recipe
from sst_interp.training.trainer import Training

BASELINE = "baseline (no memory)"
KINDS: dict[str, dict] = {
    BASELINE: {"method": "none", "groups": 1, "lrt": None},
    "interleaved, S = 2": {"method": "interleaved", "groups": 2},
    "interleaved, S = 4": {"method": "interleaved", "groups": 4},
    "multi-refine, K = 1": {"method": "multi_refine", "groups": 1},
}
BACKBONE = "backbone"
SIZE = 0.005
"""Of the random memory that is decoded with: what it holds costs nothing, that it is not zero does."""


def processor(run: Callable[[], object]) -> Callable[[], float]:
    """The same, returning seconds of processor time."""

    def timed() -> float:
        begun = time.process_time()
        run()
        return time.process_time() - begun

    return timed


def compare(contestants: dict[str, Callable[[], object]], pairs: int, first: str, per: int = 1) -> None:
    """Print medians, and ratios to the first."""
    seconds = paired({name: processor(run) for name, run in contestants.items()}, pairs)
    show(seconds, per)
    for name in contestants:
        if name != first:
            print(f"  {name} / {first}: {ratio(seconds, name, first):.2f}", flush=True)


def training_steps(examples: int, tokens: int, pairs: int, pathway: Pathway) -> None:
    """Whole optimiser steps on one batch, with the shipped recipe's adapters."""
    model = sst.load("smollm2-135m", alpha=0.0)
    lengths = {
        n: (len(encode(item, model).tokens), item) for n, item in enumerate(read_items("gsm8k")[:2000])
    }
    fitting = sorted((x for x in lengths.values() if x[0] <= tokens), key=lambda x: -x[0])[:examples]
    del model
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "batch.jsonl"
        data.write_text(
            "".join(json.dumps({"question": i.text, "answer": i.worked}) + "\n" for _, i in fitting)
        )
        contestants = {}
        for kind, how in KINDS.items():
            recipe: TrainingRecipe = replace(
                find_training_recipe("smollm2-135m-lrt"), name="timing", data=str(data), holdout=0,
                batch_size=examples, examples=10_000 * examples,
                **({"lrt": MemoryDesign(pathway=pathway)} | how),
            )  # fmt: skip
            contestants[kind] = Training(recipe, Path(name) / kind.replace(" ", "-")).step
        sizes = ", ".join(str(n) for n, _ in fitting)
        print(f"one step of {examples} examples of {sizes} tokens, pathway {pathway}, {pairs} pairs")
        compare(contestants, pairs, BASELINE)


def decoding(models: dict[str, StateStreamModel], prompt: int, new: int, pairs: int) -> None:
    """Time per token of decoding one row, one iteration: the stack and the logits."""

    def decode(model: StateStreamModel) -> None:
        vocabulary = model.backbone.config.vocab_size
        tokens = torch.arange(1, prompt + 1)[None] % vocabulary
        with torch.no_grad():
            stream = model.new_stream(torch.zeros(1, dtype=torch.long), prompt + new)
            model.prefill(stream, tokens)
            current = tokens[:, -1]
            begun = time.process_time()
            for _ in range(new):
                last = advance(model, stream, current, 1)[0].resid_post[-1]
                current = model.backbone.unembed(last).argmax(-1)
            seconds.append(time.process_time() - begun)

    seconds: list[float] = []

    def timed(model: StateStreamModel) -> float:
        decode(model)
        return seconds[-1]

    print(f"decoding {new} tokens after {prompt}, one row, {pairs} pairs; ms per token")
    found = paired({name: (lambda m=m: timed(m)) for name, m in models.items()}, pairs)
    show(found, new)
    for name in models:
        if name != BACKBONE:
            print(f"  {name} / {BACKBONE}: {ratio(found, name, BACKBONE):.2f}", flush=True)


def with_memories(backbone: StateStreamModel) -> dict[str, StateStreamModel]:
    """The backbone without a stream, and LRTs on it."""
    models = {BACKBONE: backbone}
    for pathway, name in (("residual", "LRT, residual"), ("both", "LRT, residual and key/value")):
        kind = random_memory(backbone, SIZE, pathway)
        models[name] = StateStreamModel(backbone.backbone, kind, backbone.tokenizer)
    return models


def tiny() -> None:
    """The same on a random model, in a second."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = attach(AutoModelForCausalLM.from_config(config), alpha=0.0)
    models = with_memories(model)
    decoding(models, 8, 4, 1)
    from sst_interp.training.data import Example

    data = make_batch([Example("one", tuple(range(1, 30)), 4)])
    lrt = models["LRT, residual and key/value"]
    steps: dict[str, Callable[[], object]] = {}
    for kind, how in KINDS.items():
        recipe = TrainingRecipe("tiny", "tiny", "none", **how)
        steps[kind] = lambda recipe=recipe: training_loss(lrt, data, recipe).backward()
    compare(steps, 1, BASELINE)


def main(
    examples: int = 4, tokens: int = 160, pairs: int = 7, new: int = 32, only: str = "", small: bool = False
) -> None:
    print(machine())
    if small:
        tiny()
        return
    if only != "decoding":
        training_steps(examples, tokens, pairs, "both")
    if only != "training":
        decoding(with_memories(sst.load("smollm2-135m", alpha=0.0)), 64, new, pairs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--new", type=int, default=32, help="tokens decoded")
    parser.add_argument("--only", choices=("training", "decoding"), default="")
    parser.add_argument("--tiny", action="store_true", dest="small")
    main(**vars(parser.parse_args()))
