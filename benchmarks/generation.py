"""Time per stack pass: our generation with default capture against plain `transformers` generate.

    python benchmarks/generation.py

Same model, batch 8, bf16, 64-token prompts, 32 new tokens, no stop tokens. Also the bare forward of one
token with a cache, and the floor: reading every weight once.
"""

from __future__ import annotations

import time

import torch
from timing import machine, paired, ratio, show
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import sst_interp as sst
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.recorder import Recorder, RolloutDecoder

BATCH, PROMPT, NEW = 8, 64, 32


class Clock(StoppingCriteria):
    """Notes when each token comes and never stops."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **_):  # noqa: D102
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def main(pairs: int = 7) -> None:
    model = sst.load("smollm2-135m", alpha=0.01)
    hf = model.backbone.model
    tokens = torch.randint(5, 49000, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))
    pad = torch.zeros(BATCH, dtype=torch.long)
    never = torch.tensor([], dtype=torch.long)

    stream = model.new_stream(pad, PROMPT + NEW)
    model.prefill(stream, tokens[:, :-1])

    def decoder(depths):
        return RolloutDecoder(model, stream, tokens[:, -1], depths, never)

    def decode(depths, capture, lens="position0"):
        rollouts = decoder(depths)
        recipe = Recipe("own", "smollm2-135m", "own", depths=tuple(depths), lens_tokens=lens)
        recorder = Recorder(range(BATCH), recipe, restricted=False)
        for position in range(NEW):
            moment = rollouts.step()
            if capture:
                recorder.see(position, moment, rollouts)
            rollouts.finish_step()
        if capture:
            recorder.tables()

    cache = DynamicCache(config=model.backbone.config)
    with torch.no_grad():
        hf(tokens[:, :-1], past_key_values=cache, use_cache=True)

    def forward():
        with torch.no_grad():
            for _ in range(NEW):
                hf(tokens[:, -1:], past_key_values=cache, use_cache=True)
                cache.crop(-1)

    weights = [p.detach().view(torch.int64) for p in hf.parameters() if p.numel() % 4 == 0 and p.dim() > 1]

    def read_weights():
        for _ in range(NEW):
            for w in weights:
                w.max()

    def generate():
        """Seconds from the first new token to the last: the prompt is not counted."""
        clock = Clock()
        hf.generate(
            tokens, max_new_tokens=NEW + 1, min_new_tokens=NEW + 1, do_sample=False, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return clock.times[-1] - clock.times[0]

    contestants = {
        "transformers generate": generate,
        "ours, depth 1, default capture": lambda: decode([1], True),
        "ours, depth 1, no capture": lambda: decode([1], False),
        "bare transformers forward": forward,
        "reading all weights": read_weights,
    }
    print(f"per stack pass of {BATCH} rows; {machine()}")
    seconds = paired(contestants, pairs)
    show(seconds, per=NEW)
    for name in list(contestants)[1:]:
        print(f"  {name} / transformers generate: {ratio(seconds, name, 'transformers generate'):.2f}")
    print(
        "  default capture / none, depth 1: "
        f"{ratio(seconds, 'ours, depth 1, default capture', 'ours, depth 1, no capture'):.3f}"
    )

    print(f"per generated position, {BATCH} questions x 7 rollouts (depths 1 to 4)")
    rollouts = paired(
        {
            "default capture": lambda: decode([1, 2, 3, 4], True),
            "no capture": lambda: decode([1, 2, 3, 4], False),
            "without lens": lambda: decode([1, 2, 3, 4], True, "none"),
        },
        max(5, pairs - 2),
    )
    show(rollouts, per=NEW)
    print(f"  default capture / none, depths 1 to 4: {ratio(rollouts, 'default capture', 'no capture'):.3f}")
    lens = ratio(rollouts, "default capture", "without lens")
    print(f"  default capture / without the logit lens: {lens:.3f}")


if __name__ == "__main__":
    main()
