"""A training recipe: all settings that decide a checkpoint, as one record and one TOML file."""

from __future__ import annotations

import math
import random
import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from sst_interp import paths
from sst_interp.errors import SSTError, check_known, unknown_name
from sst_interp.models.choices import Choices
from sst_interp.models.kinds.lrt import MemoryDesign
from sst_interp.models.placement import ATTENTIONS, QUANTISATIONS, Placement
from sst_interp.models.solvers.implicit import Solver
from sst_interp.runs.recipe import NAME

Method = Literal["two_pass", "multi_refine", "interleaved", "chunked", "exact", "sequential", "none"]
EVERY_PASS = ("multi_refine", "interleaved")
"""Methods whose loss is the mean over all passes."""


@dataclass(frozen=True)
class TrainingRecipe:
    """All settings of a training. Raises SSTError for a value that cannot be trained with."""

    name: str
    """The checkpoint's name, and its folder's."""

    backbone: str
    """The model to start from: a shipped name, a hub id or a folder."""

    data: str | tuple[str, ...]
    """Questions with worked answers: `gsm8k`, `gsm8k:PATH`, another dataset that has a name, a .csv or .jsonl
    file with the columns `question` and `answer`, or a list of these."""

    method: Method = "two_pass"
    """How states are computed in training. `two_pass`: a blend-off pass, then `sweeps` sweeps in `groups`
    groups (the paper's: one and one). `multi_refine` and `interleaved`: as LRT is trained, with the loss on
    every pass. `chunked`: a state crosses chunk boundaries only. `exact`: the states that the model runs
    with, and their exact gradient, solved layer by layer (`sst_interp.models.solvers.implicit`).
    `sequential`: the same token by token, back-propagation through time (small models only). `none`: no
    stream, the matched baseline."""

    sweeps: int = 1
    """Passes with states after the one without (`two_pass`, `multi_refine`)."""

    groups: int = 1
    """Interleaved groups of positions that are refined in turn (`two_pass`, `interleaved`)."""

    chunk: int = 64
    """Positions per chunk (`chunked`)."""

    tolerance: float = 1e-3
    """Largest residual of a layer's states and of their gradients (`exact`): relative, root mean square over
    positions."""

    exact_sweeps: tuple[int, int] | None = None
    """Sweeps for states and for gradients (`exact`); left out: as many as the tolerance needs."""

    depths: tuple[int, int] = (1, 1)
    """Least and most iterations of every position (`exact`, `sequential`); a step draws one number."""

    deeper: float = 1.0
    """Share of steps that draw from all of `depths`; the others take the least."""

    deeper_from: int = 0
    """Step (from 0) from which they do so; all steps before it take the least."""

    recompute: bool = False
    """Compute every layer again in the backward pass (`exact`): slower, in less memory."""

    loss_weights: tuple[float, ...] = ()
    """Weight of each pass's loss (`multi_refine`, `interleaved`), the pass without states first; left out:
    equal weights."""

    lrt: MemoryDesign | None = None
    """Trains a Latent Recurrent Transformer instead of a State Stream Transformer: a table `[lrt]` with
    `source`, `pathway`, `gamma` and `projections`. `alpha` is then ignored."""

    lrt_learning_rate: float = 1e-4
    """Of the LRT's own weights. At 2e-3 a step moves keys and values by their own size, and nothing is
    learned (docs/what-did-not-work.md)."""

    alpha: float = 0.027
    """Where every blend weight starts."""

    alpha_bounds: tuple[float, float] = (0.015, 0.10)
    """Blend weights stay strictly between these (arXiv 2605.00206)."""

    alpha_learning_rate: float = 0.01
    """Of the blend weights, in the logit of their place between the bounds."""

    rank: int = 16
    """LoRA rank."""

    lora_alpha: int = 32
    """LoRA scale: the adapter's product is multiplied by lora_alpha / rank."""

    targets: tuple[str, ...] = ()
    """Linear layers that get an adapter, by the end of their names; left out: all in attention and FFN."""

    learning_rate: float = 5e-4
    """Peak of the adapters' learning rate: linear warm-up, then linear decay to a tenth."""

    warmup: int = 20
    """Steps of warm-up."""

    weight_decay: float = 0.0
    """AdamW's, on the adapters."""

    clip: float = 1.0
    """Largest global gradient norm; longer gradients are scaled down to it."""

    batch_size: int = 8
    """Examples per step."""

    batch_tokens: int | None = None
    """Instead of `batch_size`: a step takes as many examples of like length as fit into so many positions,
    padding included."""

    examples: int | None = None
    """How many examples to train on in all, over several epochs if need be; left out: one epoch."""

    holdout: int = 256
    """Examples, drawn by the seed, that are never trained on."""

    max_tokens: int = 512
    """Longer examples are left out, and counted."""

    instruction: str | None = None
    """Follows every question; left out, the dataset's default."""

    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Of weights and states. Trained values are kept in float32 (float64 with float64)."""

    device: str = "auto"
    """Where the model is put; `auto`: CUDA, then MPS, then the CPU. It is no part of what is learned."""

    quantisation: Literal["4bit", "8bit"] | None = None
    """Of the linear layers, through bitsandbytes; left out: none."""

    attention: Literal["eager", "sdpa"] | None = None
    """Implementation of attention; left out: the model's own; on a CPU
    `eager`, whose backward pass is the faster one."""

    seed: int = 0
    """Decides the split, the order, and the adapters' first values."""

    save_minutes: float = 5.0
    """Minutes between saved states, from which an interrupted training goes on."""

    choices: Choices = field(default_factory=Choices)
    """Choices that the paper leaves open (`sst_interp.models.choices`)."""

    def __post_init__(self) -> None:
        for key, (fits, expected, example) in _CHECKS.items():
            value = getattr(self, key)
            if not fits(value):
                raise SSTError(f"{key} = {value!r} is not {expected}", f"for example {key} = {example}")
        for key in ("alpha_bounds", "loss_weights"):
            object.__setattr__(self, key, tuple(map(float, getattr(self, key))))
        for key in ("data", "targets", "depths", "exact_sweeps"):
            if (value := getattr(self, key)) is not None and not isinstance(value, str):
                object.__setattr__(self, key, tuple(value))
        low, high = self.alpha_bounds
        if not low < self.alpha < high:
            raise SSTError(
                f"alpha = {self.alpha} is not between its bounds {low} and {high}",
                f"for example alpha = {(low * high) ** 0.5 or high / 2:.3g}",
            )
        makers = {"sweeps": ("two_pass", "multi_refine"), "groups": ("two_pass", "interleaved")}
        for key, methods in makers.items():
            if getattr(self, key) != 1 and self.method not in methods:
                raise SSTError(
                    f"method = {self.method!r} makes no {key}", f"leave {key} out, or use {methods[0]!r}"
                )
        if self.depths != (1, 1) and self.method not in ("exact", "sequential"):
            raise SSTError(f"method = {self.method!r} trains at depth 1", 'leave depths out, or use "exact"')
        if self.lrt is not None and self.method == "exact":
            raise SSTError(
                'method = "exact" solves layer by layer, and the state of an LRT goes to another layer',
                'method = "sequential" (called "exact" until version 0.1) is exact there',
            )
        passes = 1 + (self.sweeps if self.method == "multi_refine" else self.groups)
        if self.loss_weights and (self.method not in EVERY_PASS or len(self.loss_weights) != passes):
            raise SSTError(
                f"loss_weights has {len(self.loss_weights)} numbers for method = {self.method!r}",
                f"leave it out, or give one number for each of {passes} passes of {' or '.join(EVERY_PASS)}",
            )

    @classmethod
    def load(cls, path: str | Path) -> TrainingRecipe:
        """Read a TOML file. Without a name in it, the recipe is called as the file.

        Raises:
            SSTError: the file cannot be read, is not TOML, or holds an unknown key or a wrong value.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise SSTError(
                f"cannot read recipe {path}: {error.strerror}", "give the path of a .toml"
            ) from None
        except (ValueError, RecursionError) as error:
            hint = 'a line looks like: backbone = "smollm2-135m"'
            raise SSTError(f"{path}: not valid TOML: {error}", hint) from None
        try:
            return cls.from_dict({"name": path.stem, **values})
        except SSTError as error:
            raise SSTError(f"{path}: {error.message}", error.hint) from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingRecipe:
        """A recipe from plain values; unknown and missing keys are errors."""
        check_known("training recipe key", values, [f.name for f in fields(cls)])
        for key in ("name", "backbone", "data"):
            if key not in values:
                raise SSTError(f"{key} is missing", f"for example {key} = {_CHECKS[key][2]}")
        values = dict(values)
        for key, read in (("choices", Choices.from_dict), ("lrt", MemoryDesign.from_dict)):
            if isinstance(values.get(key), dict):
                values[key] = read(values[key])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary without the keys that are None."""
        values = {}
        for key, value in asdict(self).items():
            older = key in _LATER and value == getattr(type(self), key)  # an older training still fits
            if value is not None and not older:
                values[key] = list(value) if isinstance(value, tuple) else value
        return values

    @property
    def placement(self) -> Placement:
        """Where the model goes, and in which numbers it computes."""
        return Placement(self.device, self.dtype, self.quantisation, self.attention)

    def solver(self) -> Solver:
        """A new solver for the method `exact`."""
        return Solver(self.tolerance, self.exact_sweeps, remember=not self.recompute)

    def depth(self, step: int) -> int:
        """Iterations of every position in step `step` (from 0)."""
        drawn = random.Random(f"depth:{self.seed}:{step}")
        depth = drawn.randint(*self.depths)
        draws = drawn.random() < self.deeper and step >= self.deeper_from
        return depth if draws else self.depths[0]

    def differences(self, now: TrainingRecipe) -> list[tuple[str, Any, Any]]:
        """(key, this recipe's value, `now`'s) wherever the two would learn something different."""
        ours, theirs = self.to_dict(), now.to_dict()
        free = ("name", "save_minutes", "device")
        keys = [k for k in ours | theirs if k not in free and ours.get(k) != theirs.get(k)]
        return [(key, ours.get(key), theirs.get(key)) for key in keys]


_LATER = (
    "chunk", "loss_weights", "lrt_learning_rate", "tolerance", "exact_sweeps", "depths", "deeper",
    "deeper_from", "recompute", "batch_tokens", "device",
)  # fmt: skip
"""Keys that older recipes lack. They are written only if they differ from the default."""


def find_training_recipe(name: str) -> TrainingRecipe:
    """The recipe called `name`: a path that ends in `.toml`, or a shipped name. Raises SSTError."""
    if name.endswith(".toml"):
        return TrainingRecipe.load(name)
    known = {path.stem: path for path in paths.shipped("training").glob("*.toml")}
    if name not in known:
        raise unknown_name("training recipe", name, [*known, "FILE.toml"])
    return TrainingRecipe.load(known[name])


Check = tuple[Callable[[Any], bool], str]  # whether a value fits, and what would fit in words


def _number(low: float, high: float = math.inf, above: bool = False) -> Check:
    def fits(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (low < value if above else low <= value) and value <= high

    upto = f" to {high:g}" if high < math.inf else ""
    return fits, f"a number {'above' if above else 'from'} {low:g}{upto}"


def _whole(low: int) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= low

    return fits, f"a whole number from {low}"


def _one_of(*values: str) -> Check:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _list(value: Any, check: Check, length: int | None = None) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) == (len(value) if length is None else length)
    return is_list and all(map(check[0], value))


def _word(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


_FOLDER = "a plain folder name (letters, digits, '-', '_' and '.')"
_CHECKS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "name": (lambda v: _word(v) and re.fullmatch(NAME, v) is not None, _FOLDER, '"my-sst"'),
    "backbone": (_word, "the name of a model", '"smollm2-135m"'),
    "data": (
        lambda v: _word(v) or (_list(v, (_word, "")) and len(v) > 0),
        "the name of a dataset or a file, or a list of them", '"gsm8k"',
    ),
    "method": (*_one_of(*get_args(Method)), '"two_pass"'),
    "sweeps": (*_whole(1), "1"),
    "groups": (*_whole(1), "1"),
    "chunk": (*_whole(1), "64"),
    "tolerance": (*_number(0, above=True), "1e-3"),
    "device": (_word, "the name of a device", '"cuda"'),
    "quantisation": (lambda v: v in (None, *QUANTISATIONS), f"one of {', '.join(QUANTISATIONS)}", '"4bit"'),
    "attention": (lambda v: v in (None, *ATTENTIONS), f"one of {', '.join(ATTENTIONS)}", '"sdpa"'),
    "exact_sweeps": (lambda v: v is None or _list(v, _whole(0), 2), "two whole numbers from 0", "[2, 2]"),
    "depths": (
        lambda v: _list(v, _whole(1), 2) and v[0] <= v[1],
        "two whole numbers from 1, the lower first", "[1, 4]",
    ),
    "deeper": (*_number(0, 1), "0.2"),
    "deeper_from": (*_whole(0), "1000"),
    "recompute": (lambda v: isinstance(v, bool), "true or false", "true"),
    "loss_weights": (
        lambda v: _list(v, _number(0)) and (not v or any(v)), "a list of numbers from 0, not all 0", "[1, 1]"
    ),
    "lrt": (lambda v: v is None or isinstance(v, MemoryDesign), "a table", '[lrt] and pathway = "both"'),
    "lrt_learning_rate": (*_number(0), "1e-4"),
    "alpha_bounds": (
        lambda v: _list(v, _number(0, 1), 2) and v[0] < v[1],
        "two numbers from 0 to 1, the lower first", "[0.015, 0.10]",
    ),
    "alpha": (*_number(0, 1), "0.027"),
    "alpha_learning_rate": (*_number(0), "0.01"),
    "rank": (*_whole(1), "16"),
    "lora_alpha": (*_whole(1), "32"),
    "targets": (lambda v: _list(v, (_word, "")), "a list of names", '["q_proj", "v_proj"]'),
    "learning_rate": (*_number(0, above=True), "5e-4"),
    "warmup": (*_whole(0), "20"),
    "weight_decay": (*_number(0), "0.0"),
    "clip": (*_number(0, above=True), "1.0"),
    "batch_size": (*_whole(1), "8"),
    "batch_tokens": (
        lambda v: v is None or _whole(1)[0](v), "a whole number from 1 (left out: batch_size)", "1600"
    ),
    "examples": (
        lambda v: v is None or _whole(1)[0](v), "a whole number from 1 (left out: one epoch)", "2560"
    ),
    "holdout": (*_whole(0), "256"),
    "max_tokens": (*_whole(2), "512"),
    "instruction": (lambda v: v is None or isinstance(v, str), "text", '"Think step by step."'),
    "dtype": (*_one_of("bfloat16", "float32", "float64"), '"bfloat16"'),
    "seed": (*_whole(0), "0"),
    "save_minutes": (*_number(0), "5"),
    "choices": (lambda v: isinstance(v, Choices), "a table", "[choices]"),
}  # fmt: skip
"""Key -> whether a value fits, what would fit, an example."""
