"""Time per generated token of each kind of model, beside its backbone: what depth costs.

    python benchmarks/kinds.py [--checkpoint NAME ...] [--document docs/kinds.md]

One sequence, bf16, a 64-token prompt, 16 new tokens, no stop tokens, depths 1 and 4. Process time: other work
on the machine does not count towards it. The models take turns. The backbone is the same code with alpha 0 at
depth 1, so a ratio is the price of the kind and of its depth, and not of this package.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timing import machine, paired

import sst_interp as sst
from sst_interp.runs.provenance import kind_words
from sst_interp.tables import fill, markdown

PROMPT, NEW = 64, 16
DEPTHS = (1, 4)


def decoding(model: sst.StateStreamModel, depth: int) -> Callable[[], float]:
    """A contestant: process seconds per new token at this depth, the prompt not counted."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, 49000, (PROMPT,), generator=generator).tolist()

    def run() -> float:
        marks: list[float] = []
        model.generate([prompt], depth, NEW, [], observe=lambda _step: marks.append(time.process_time()))
        return (marks[-1] - marks[0]) / (len(marks) - 1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", nargs="*", default=["smollm2-135m-sst", "smollm2-135m-lrt"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--document")
    how = parser.parse_args()
    models = {"backbone": sst.load("smollm2-135m", alpha=0.0)}
    for name in how.checkpoint:
        model = sst.load(name)
        models[model.kind.name] = model
    models["looped"] = sst.load("smollm2-135m", kind="looped")
    models["loop over layers 12 to 17"] = sst.load(
        "smollm2-135m", kind="looped", loop={"core": [12, 18], "damping": 0.5}, choices=sst.Choices(kv="each")
    )
    contestants = {f"{kind} {d}": decoding(m, d) for kind, m in models.items() for d in DEPTHS}
    seconds = paired(contestants, how.rounds)
    rows = []
    for kind in models:
        row: dict[str, object] = {"kind": kind_words(kind) or kind}
        for depth in DEPTHS:
            own, floor = seconds[f"{kind} {depth}"], seconds["backbone 1"]
            over = sorted(a / b for a, b in zip(own, floor, strict=True))
            layers = models[kind].backbone.n_layers
            run = layers + (depth - 1) * len(models[kind].kind.iterated(layers))
            row[f"passes per token, depth {depth}"] = f"{run / layers:g}"
            row[f"ms per token, depth {depth}"] = f"{1e3 * statistics.median(own):.1f}"
            row[f"over the backbone, depth {depth}"] = (
                f"{statistics.median(over):.2f} ({over[0]:.2f} to {over[-1]:.2f})"
            )
        rows.append(row)
    table = markdown(rows)
    print(f"{machine()}; process time, {how.rounds} rounds\n\n{table}")
    if how.document:
        fill(how.document, {"cost": table}, others=True)


if __name__ == "__main__":
    main()
