"""Which dtype and batch size a capture should use: time per question and noise, measured.

    python benchmarks/precision.py

Captures of the same 16 ARC-Challenge questions (depths 1 to 4, 6 new tokens) in bf16 at several batch
sizes and in fp32; and how far apart the same states come out when only the batch shape or the dtype differs.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from timing import machine

import sst_interp as sst
from sst_interp.questions import load_questions
from sst_interp.runs.capture import capture
from sst_interp.runs.recipe import Recipe


def main() -> None:
    print(f"16 questions, 7 rollouts, 6 positions; {machine()}")
    for dtype, batch in (("bfloat16", 4), ("bfloat16", 8), ("bfloat16", 16), ("float32", 8)):
        model = sst.load("smollm2-135m", alpha=0.01, dtype=dtype)
        recipe = Recipe(
            name="timing", checkpoint="smollm2-135m", dataset="arc-challenge", questions=16,
            max_new_tokens=6, alpha=0.01, batch_size=batch, dtype=dtype,
        )  # fmt: skip
        seconds = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                capture(recipe, model, Path(folder) / "timing", progress=False)
                seconds.append(time.perf_counter() - start)
        print(f"  {dtype:9} batch {batch:2}: {sorted(seconds)[1] / 16:6.2f} s a question", flush=True)

    prompts = load_questions("arc-challenge", 4).questions
    states = {}
    for dtype in ("bfloat16", "float32"):
        model = sst.load("smollm2-135m", alpha=0.01, dtype=dtype)
        ids = [model.chat(q.prompt)[:64] for q in prompts]
        states[dtype, "batch 4"] = model.replay(ids, check=0, logits=False).resid_post.float()
        states[dtype, "batch 1"] = torch.cat(
            [model.replay([i], check=0, logits=False).resid_post.float() for i in ids]
        )
    for (a, b), name in {
        (("bfloat16", "batch 1"), ("bfloat16", "batch 4")): "bf16, batch 1 against 4",
        (("float32", "batch 1"), ("float32", "batch 4")): "fp32, batch 1 against 4",
        (("float32", "batch 4"), ("bfloat16", "batch 4")): "fp32 against bf16",
    }.items():
        overlap = torch.nn.functional.cosine_similarity(states[a], states[b], dim=-1).flatten()
        low, middle = overlap.quantile(torch.tensor([0.001, 0.5])).tolist()
        print(f"  {name:24} overlap: median {middle:.6f}, lowest 0.1% below {low:.4f}")


if __name__ == "__main__":
    main()
