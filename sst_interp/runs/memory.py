"""What a capture takes, by estimate: on the device, in memory, on the disk. Nothing is loaded for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sst_interp.errors import SSTError
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.recorder import LENS_TOP, pairs_of, rollouts_of

GB = 1e9
KEYS = {
    "keys and values": "batch_size or max_new_tokens",
    "logits": "batch_size",
    "states and comparisons": "batch_size or depths",
    "reading the prompts": "batch_size",
    "controls": "controls or max_new_tokens",
}
"""What is held on the device, and which key of the recipe makes it smaller."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a backbone."""

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    d_head: int
    vocab: int
    parameters: int
    itemsize: int = 2
    """Bytes of one number."""

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Of a model that is loaded."""
        config, weights = model.backbone.config, list(model.backbone.model.parameters())
        named = lambda *names: next(n for n in (getattr(config, x, None) for x in names) if n)  # noqa: E731
        heads, d = named("num_attention_heads", "n_heads", "n_head"), model.backbone.d_model
        return cls(
            model.backbone.n_layers, d, getattr(config, "intermediate_size", None) or 4 * d, heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or d // heads, config.vocab_size,
            sum(weight.numel() for weight in weights), model.backbone.dtype.itemsize,
        )  # fmt: skip


class Need(NamedTuple):
    """Bytes, at the most: a text that ends early takes less."""

    weights: int
    device: dict[str, int]
    """Beside the weights, by what it is for (`KEYS`). `controls` come after their batch, in its place."""
    memory: int
    """The rows of a batch while they are recorded."""
    states: int
    """The file of a batch's kept states."""
    disk: int
    """The whole run."""

    @property
    def at_once(self) -> int:
        """On the device, beside the weights."""
        batch = sum(size for what, size in self.device.items() if what != "controls")
        return max(batch, self.device["controls"])


def estimate(shape: Shape, recipe: Recipe, prompt: int, questions: int) -> Need:
    """What a capture takes.

    Args:
        prompt: tokens of the longest prompt.
        questions: how many the run has.
    """
    L, d, b, T = shape.layers, shape.d_model, shape.itemsize, recipe.max_new_tokens
    B, deepest = min(recipe.batch_size, questions), max(recipe.depths)
    rollouts, pairs = rollouts_of(recipe.depths), len(pairs_of(recipe.depths))
    passes = sum(rollout.depth for rollout in rollouts)  # iterations of all rollouts at one position
    per_iteration = deepest if recipe.choices.kv == "each" else 1
    columns = (len(rollouts) + 1) * B * (prompt + T) * L * per_iteration  # and the prompts' own
    device = {
        "keys and values": columns * 2 * shape.kv_heads * shape.d_head * b,
        "logits": passes * B * shape.vocab * (b + 4),
        "states and comparisons": passes * B * L * d * b + pairs * B * L * d * (2 * b + 12),
        "reading the prompts": B * prompt * (8 * d + 3 * shape.d_ff) * b
        + B * shape.heads * prompt * prompt * b,
        "controls": ((len(recipe.depths) + 3) * b + 24) * L * T * d if recipe.controls else 0,
    }
    memory = B * T * (860 * passes + 60 * pairs + 55 * pairs * L)
    kept = L if recipe.keep_layers is None else len(recipe.keep_layers)
    positions = T if recipe.keep_positions is None else len(recipe.keep_positions)
    state = kept * d * b
    states = {"none": 0, "position0": deepest * state, "shifts": (deepest + 2 * positions * pairs) * state}
    of_one = states.get(recipe.keep, (deepest + positions * passes) * state)
    lens = 4 * LENS_TOP * L * (T if recipe.lens_tokens == "all" else 1) * passes
    tables = T * (200 * passes + 20 * pairs + 14 * pairs * L) + lens
    return Need(shape.parameters * b, device, memory, B * of_one, questions * (of_one + tables))


def free_memory(model: Any) -> int | None:
    """Bytes that are free where a Hugging Face model's weights are; None if nobody says."""
    devices = {weight.device for weight in model.parameters()}
    if all(device.type == "cuda" for device in devices):
        cached = sum(torch.cuda.memory_reserved(d) - torch.cuda.memory_allocated(d) for d in devices)
        return cached + sum(torch.cuda.mem_get_info(device)[0] for device in devices)
    if any(device.type != "cpu" for device in devices):
        return None
    return _free_on_host()


def _free_on_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    known = dict(line.split(":", 1) for line in lines)
    return int(known["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in known else None


def preflight(model: Any, recipe: Recipe, prompts: Sequence[int], folder: Path) -> list[str]:
    """Notes on a capture that may not fit the memory or the disk.

    Args:
        prompts: tokens of every prompt.
        folder: the run's.

    Raises:
        SSTError: its largest batch cannot fit the device; it names the key to change.
    """
    shape, longest, n = Shape.of(model), max(prompts), len(prompts)
    need, free = estimate(shape, recipe, longest, n), free_memory(model.backbone.model)
    if free is not None and need.at_once > free:
        what = max(need.device, key=lambda name: need.device[name])
        sizes = range(min(recipe.batch_size, n) - 1, 0, -1)
        smaller = (replace(recipe, batch_size=size) for size in sizes)
        fits = next((r for r in smaller if estimate(shape, r, longest, n).at_once <= free), None)
        hint = f"lower {KEYS[what]}" if fits is None else f"batch_size = {fits.batch_size} fits"
        raise SSTError(
            f"a batch of run {recipe.name} needs about {need.at_once / GB:.1f} GB beside the weights, "
            f"{need.device[what] / GB:.1f} for {what}; {max(free, 0) / GB:.1f} are free",
            f"{hint}: it is a key of the recipe (docs/cluster.md has a table)",
        )
    notes, host = [], _free_on_host()
    if host is not None and need.memory > host:
        notes.append(
            f"a batch's rows may take {need.memory / GB:.1f} GB of memory, {host / GB:.1f} are free: "
            "lower batch_size or max_new_tokens if it does not fit"
        )
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    room = shutil.disk_usage(place).free
    spooled = 2 * need.states if recipe.keep == "all" else 0
    if need.disk + spooled > room:
        notes.append(
            f"the run may take {need.disk / GB:.1f} GB, {room / GB:.1f} are free on the disk: "
            "keep, keep_layers and keep_positions decide how much"
        )
    return notes


GEMMA_3_27B = Shape(62, 5376, 21504, 32, 16, 128, 262_208, 27_009_346_304)
"""`google/gemma-3-27b-it` without its vision tower, in bfloat16."""
GPQA = 400, 198
"""Tokens of a long prompt, and questions."""
GPU = 80e9 - 3e9
"""Bytes of one H100, less what CUDA takes for itself."""


CASES = ((1, 2, 3, 4), 64), ((1, 2, 3, 4), 2000), ((1, 64), 64), ((1, 64), 2000)
"""Depths and new tokens of the table in docs/cluster.md."""


def table(shape: Shape = GEMMA_3_27B, room: float = GPU) -> list[dict[str, str]]:
    """What each of `CASES` takes on GPQA, and the largest batch that fits one GPU."""
    rows = []
    for depths, tokens in CASES:
        recipe = Recipe("r", "c", "d", depths=depths, max_new_tokens=tokens)
        needs = {n: estimate(shape, replace(recipe, batch_size=n), *GPQA) for n in range(1, 9)}
        fits = max((n for n in needs if needs[n].weights + needs[n].at_once <= room), default=0)
        need, used, every = needs[8], needs[max(fits, 1)], replace(recipe, keep="all")
        some = replace(every, keep_layers=tuple(range(0, shape.layers, 8)), keep_positions=tuple(range(64)))
        rows.append(
            {
                "depths": ", ".join(map(str, depths)),
                "new tokens": f"{tokens:,}",
                "GPU, beside the weights, batch of 8": f"{need.at_once / GB:,.0f} GB",
                "of that keys and values": f"{need.device['keys and values'] / GB:,.0f} GB",
                "recipe for a GPU of 80 GB": f"`batch_size = {fits}`" if fits else "two GPUs, or 4bit",
                "its rows, in memory": f"{used.memory / GB:,.1f} GB",
                "the run": f"{used.disk / GB:,.0f} GB",
                "with every state": f"{estimate(shape, every, *GPQA).disk / GB:,.0f} GB",
                "with those of 8 layers, 64 positions": f"{estimate(shape, some, *GPQA).disk / GB:,.0f} GB",
            }
        )
    return rows
