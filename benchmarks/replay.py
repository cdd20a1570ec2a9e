"""Replaying 256 given tokens: sequential, layerwise, and sweeps in several cyclic groups.

    python benchmarks/replay.py

SmolLM2-135M, fp32, batch 1, every solution to a tolerance of 1e-4 with its error against sequential.
"""

from __future__ import annotations

import statistics
import time

import torch
from timing import machine

import sst_interp as sst
from sst_interp.questions import load_questions

TOKENS, TOLERANCE = 256, 1e-4


def main(pairs: int = 5) -> None:
    print(f"{TOKENS} tokens, fp32, tolerance {TOLERANCE}; {machine()}")
    for alpha in (0.027, 0.1):
        model = sst.load("smollm2-135m", alpha=alpha, dtype="float32")
        text = "\n\n".join(q.prompt for q in load_questions("arc-challenge", 8).questions)
        ids = [model.encode(text)[:TOKENS]]
        methods: dict[str, dict] = {"layerwise": {}} | {
            f"sweeps, {g} group{'s' * (g > 1)}": {"groups": g} for g in (1, 2, 4, 8)
        }
        if alpha != 0.027:
            methods = {"layerwise": {}}
        speed: dict[str, list[float]] = {name: [] for name in methods}
        found = {}
        sequential = []
        for _ in range(pairs):
            start = time.perf_counter()
            truth = model.replay(ids, method="sequential").logits
            sequential.append(time.perf_counter() - start)
            for name, how in methods.items():
                start = time.perf_counter()
                found[name] = model.replay(ids, tolerance=TOLERANCE, **how)
                speed[name].append(sequential[-1] / (time.perf_counter() - start))
        print(f"alpha {alpha}: sequential {statistics.median(sequential):.1f} s")
        for name, out in found.items():
            error = ((out.logits - truth).norm() / truth.norm()).item()
            same = (out.logits.argmax(-1) == truth.argmax(-1)).float().mean().item()
            how = out.certificate
            print(
                f"  {name:18} {statistics.median(speed[name]):5.1f}x faster   {how.sweeps:3} sweeps   "
                f"contraction {how.contraction:.2f}   logit error {error:.1e}   argmax {same:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
