"""Seeing every layer while generating: time and peak memory of each way, at depths 1 and 4.

    python benchmarks/capture.py            # SmolLM2-135M, batch 8, 64-token prompts, 64 and 128 new tokens
    python benchmarks/capture.py --tiny     # random weights, a few tokens: does it start?

The task: every layer's output, at every generated position and iteration. What a library hands over is
stacked at the end of the text. The native path measures while it generates (here: norms, and cosines to the
first iteration), so it has nothing to keep; to compare like with like it is also made to keep everything.
The libraries see the stream through `sst_interp.bridges`. By themselves they see the plain backbone, as
`output_hidden_states` does: that is compared with plain generation, at depth 1 only.

Every contestant's peak memory is measured in a process of its own, above what the model takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from timing import machine, paired, ratio, show

import sst_interp as sst
from sst_interp.models.hooks import Record
from sst_interp.models.measures import cosine
from sst_interp.models.model import StateStreamModel

PLAIN = "transformers generate"
HIDDEN = "output_hidden_states"
LENS_ALONE = "TransformerLens by itself"
NNSIGHT_ALONE = "nnsight by itself"
STREAM = "stream, not captured"
NATIVE = "native"
KEPT = "native, everything kept"
RECORD = "native recorder"
LENS = "TransformerLens"
NNSIGHT = "nnsight"
ALONE = (HIDDEN, LENS_ALONE, NNSIGHT_ALONE)


def load(tiny: bool) -> StateStreamModel:
    if not tiny:
        return sst.load("smollm2-135m", alpha=0.01)
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return sst.attach(AutoModelForCausalLM.from_config(config), alpha=0.01)


def contestant(name: str, model: StateStreamModel, tokens: torch.Tensor, new: int, depth: int) -> Any:
    """A function that generates `new` tokens and sees every layer of every iteration."""
    hf, layers = model.backbone.model, model.backbone.n_layers
    how: dict[str, Any] = {"max_new_tokens": new, "stop_tokens": []}
    plain: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    plain["pad_token_id"] = 0

    def measure(step: Any) -> list[torch.Tensor]:
        first = step.iterations[0].resid_post
        return [
            torch.stack([it.resid_post.float().norm(dim=-1), cosine(first, it.resid_post)])
            for it in step.iterations
        ]

    def native() -> None:
        kept = []
        model.generate(tokens, depth, observe=lambda step: kept.append(measure(step)), **how)
        assert len(kept) == new

    def everything() -> None:
        kept = []
        model.generate(
            tokens, depth, **how,
            observe=lambda step: kept.append(torch.stack([it.resid_post for it in step.iterations])),
        )  # fmt: skip
        assert torch.stack(kept).shape[:3] == (new, depth, layers)

    def recorder() -> None:
        record = Record(["resid_post"])
        model.generate(tokens, depth, edit=record, **how)
        assert record["resid_post"].shape[1:4] == (new, layers, depth)

    def lens() -> None:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(layers)]
        _, caches = model.bridge().generate_with_caches(tokens, names, iterations=depth, **how)
        stacked = torch.stack([cache.stack_activation("resid_post") for cache in caches])
        assert stacked.shape[:2] == (depth, layers)

    def hidden() -> None:
        out = hf.generate(tokens, output_hidden_states=True, return_dict_in_generate=True, **plain)
        kept = [torch.stack([h[:, -1] for h in step]) for step in out.hidden_states]
        assert torch.stack(kept).shape[:2] == (new, layers + 1)

    def lens_alone() -> None:
        kept: list[torch.Tensor] = []
        names = {f"blocks.{layer}.hook_out" for layer in range(layers)}
        hooks = [(lambda name: name in names, lambda x, hook: kept.append(x[:, -1]))]
        with peer.hooks(fwd_hooks=hooks):
            peer.generate(tokens, max_new_tokens=new, do_sample=False, stop_at_eos=False, verbose=False)
        assert torch.stack(kept).shape[0] == new * layers

    def nnsight_alone() -> None:
        kept = []
        with peer.trace(tokens, fn=peer._module.generate, **plain) as tracer:
            for _ in tracer.iter[:new]:
                for layer in range(layers):
                    kept.append(peer.model.layers[layer].output[:, -1].save())
        assert torch.stack(kept).shape[0] == new * layers

    def nnsight() -> None:
        kept = []
        with seen.generate(tokens, **how) as tracer:
            for _ in tracer.iter[:new]:
                for number in range(1, depth + 1):
                    for layer in range(layers):
                        kept.append(seen.iteration[number].layers[layer].resid_post.output.save())
        assert torch.stack(kept).shape[0] == new * depth * layers

    seen: Any = model.nnsight(depth) if name == NNSIGHT else None
    peer: Any = None
    if name == LENS:
        model.bridge()
    if name == LENS_ALONE:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        peer = build_bridge_from_module(
            copy.deepcopy(hf), type(hf).__name__, hf_config=copy.deepcopy(hf.config)
        )
    if name == NNSIGHT_ALONE:
        from nnsight import NNsight

        peer = NNsight(copy.deepcopy(hf))
    return {
        PLAIN: lambda: hf.generate(tokens, **plain),
        HIDDEN: hidden,
        LENS_ALONE: lens_alone,
        NNSIGHT_ALONE: nnsight_alone,
        STREAM: lambda: model.generate(tokens, depth, **how),
        NATIVE: native,
        KEPT: everything,
        RECORD: recorder,
        LENS: lens,
        NNSIGHT: nnsight,
    }[name]


def peak(name: str, depth: int, new: int, options: argparse.Namespace) -> float:
    """MB that a contestant takes above its model, in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, "--depth", str(depth), "--new", str(new)]
    command += ["--batch", str(options.batch), "--prompt", str(options.prompt), *["--tiny"] * options.tiny]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])["mb"]


def alone(options: argparse.Namespace) -> None:
    """One contestant, once: what it adds to the process's peak."""
    model = load(options.tiny)
    tokens = prompts(model, options)
    run = contestant(options.alone, model, tokens, options.new, options.depth)
    contestant(STREAM, model, tokens, 2, options.depth)()  # kernels and buffers that everybody needs
    Path("/proc/self/clear_refs").write_text("5")  # loading took more than what is measured here
    before = resident("VmRSS")
    run()
    print(json.dumps({"mb": resident("VmHWM") - before}))


def resident(what: str) -> float:
    """MB of this process in memory, now (`VmRSS`) or at its peak (`VmHWM`). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def prompts(model: StateStreamModel, options: argparse.Namespace) -> torch.Tensor:
    size = model.backbone.model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, size - 5, (options.batch, options.prompt), generator=generator)


def main(options: argparse.Namespace) -> None:
    model = load(options.tiny)
    tokens, new = prompts(model, options), options.new
    print(f"{options.batch} rows, {options.prompt}-token prompts, {new} new tokens; {machine()}")
    for depth in (1, 4):
        names = [STREAM, NATIVE, KEPT, RECORD, LENS, NNSIGHT]
        if depth == 1:
            names = [PLAIN, *ALONE, *names]
        print(f"depth {depth}: time per text")
        runs = {name: contestant(name, model, tokens, new, depth) for name in names}
        seconds = paired(runs, options.pairs)
        show(seconds, unit="ms")
        for name in names:
            if name not in (PLAIN, STREAM):
                base = PLAIN if name in ALONE else STREAM
                over = ratio(seconds, name, base)
                print(f"  {name:26} / {base}: {over:.3f}   / {NATIVE}: {ratio(seconds, name, NATIVE):.3f}")
        every = [name for name in names if name not in (PLAIN, STREAM, *ALONE)]
        fastest = min(every, key=lambda name: statistics.median(seconds[name]))
        print(f"  fastest of those that see every iteration: {fastest}")
        if options.memory:
            print(f"depth {depth}: peak memory above the model, MB, at {new} and {2 * new} new tokens")
            for name in names:
                mb = [peak(name, depth, length, options) for length in (new, 2 * new)]
                print(f"  {name:26} {mb[0]:8.1f} {mb[1]:8.1f}   growth {mb[1] - mb[0]:+.1f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a random model and a few tokens")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--prompt", type=int, default=None)
    parser.add_argument("--new", type=int, default=None)
    parser.add_argument("--pairs", type=int, default=None)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for option, small, full in (("batch", 2, 8), ("prompt", 4, 64), ("new", 3, 64), ("pairs", 1, 5)):
        if getattr(options, option) is None:
            setattr(options, option, small if options.tiny else full)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    with torch.no_grad():
        alone(options) if options.alone else main(options)
    if not options.alone:
        print(f"{time.perf_counter() - start:.0f} s")
