"""A recipe: everything that decides what a run contains, as one frozen record and one TOML file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sst_interp import paths
from sst_interp.errors import SSTError, unknown_name
from sst_interp.files import read_whole
from sst_interp.models.choices import ANALYSIS, MAX_DEPTH, Choices
from sst_interp.models.kinds import kind_named, kinds

DType = Literal["bfloat16", "float32", "float64"]
Keep = Literal["none", "position0", "shifts", "all"]
LensTokens = Literal["none", "position0", "all"]
NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}"
LARGEST = 1 << 20
"""Bytes of a recipe's file at most."""
MAX_POSITIONS = 32767
"""Positions are int16 in the tables."""


@dataclass(frozen=True)
class Recipe:
    """What a run captures: which model answers which questions at which depths, and what is recorded.

    Raises SSTError (which key, what is wrong, a value that is right) for anything that cannot be captured.
    """

    name: str
    """The run's name, and its folder's: letters, digits, `-`, `_` and `.`."""

    checkpoint: str
    """The model: a shipped name, a folder, or a hub id."""

    dataset: str
    """The questions: a shipped name or a file."""

    questions: int | None = None
    """How many questions, from the first; all of them when left out."""

    depths: tuple[int, ...] = (1, 2, 3, 4)
    """Iteration depths, kept ascending. Depth 1 is the reference of every comparison: it is always there."""

    max_new_tokens: int = 48
    """Token budget of every answer."""

    kind: str | None = None
    """`looped` iterates a plain backbone with no stream (docs/kinds.md). Left out: what the checkpoint says
    it is, or a plain backbone with the blend `alpha`. A checkpoint of another kind is refused."""

    alpha: float | None = None
    """A fixed blend in [0, 1]; left out, the checkpoint's own, and of a backbone without one, none."""

    batch_size: int = 8
    """Questions per batch: the unit that is committed and resumed. It changes bf16 rounding, so it is part
    of what a run is."""

    dtype: DType = "bfloat16"
    """Number format of weights and states."""

    keep: Keep = "position0"
    """Which full hidden states are written (docs/run-format.md, states)."""

    lens_tokens: LensTokens = "position0"
    """At which positions the leading tokens of every layer are recorded (docs/run-format.md, lens), of a
    dataset whose text may be shown. `all` unembeds every layer at every position."""

    seed: int = 0
    """Decides the order in which answer choices are shown."""

    split: str | None = None
    """Of the dataset; the default is the first that `sst-interp datasets` lists."""

    instruction: str | None = None
    """Replaces the default instruction that follows every question."""

    reply_prefix: str | None = None
    """How every reply begins, so that a model that seldom answers by letter does: "The answer is (". It is
    read as part of the prompt (position 0 emits what comes next) and graded as part of the reply."""

    controls: int = 0
    """How many questions, evenly spread, also get the controls that need the model: the noise floor and
    nudges of the same size (docs/run-format.md, noise and nudges). Each takes about half a batch's time."""

    choices: Choices = field(default_factory=Choices)
    """What the paper leaves open (`sst_interp.models.choices`)."""

    def __post_init__(self) -> None:
        for key, (fits, expected, example) in _CHECKS.items():
            value = getattr(self, key)
            if not fits(value):
                raise SSTError(f"{key} = {_show(value)} is not {expected}", f"for example {key} = {example}")
        if not isinstance(self.choices, Choices):
            raise SSTError(
                f"choices = {_show(self.choices)} is not a table",
                "for example [choices] on a line of its own",
            )
        # One spelling of each value, so that equal recipes have equal fingerprints.
        object.__setattr__(self, "depths", tuple(sorted(self.depths)))
        if self.alpha is not None and self.kind not in (None, "sst"):
            raise SSTError(
                f"kind = {self.kind!r}: a {kind_named(self.kind).words} has no alpha", "leave one out"
            )
        if self.alpha is not None:
            object.__setattr__(self, "alpha", float(self.alpha) + 0.0)
        if isinstance(threshold := self.choices.threshold, int):
            object.__setattr__(self, "choices", replace(self.choices, threshold=float(threshold)))

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> Recipe:
        """Read a TOML file. `name` goes before the file's own `name`, and that before the file's stem."""
        path = Path(path)
        try:
            text = read_whole(path, LARGEST).decode("utf-8-sig")
        except OSError as error:
            hint = "`sst-interp runs` lists what there is"
            raise SSTError(f"cannot read recipe {path}: {error.strerror}", hint) from None
        except UnicodeDecodeError as error:
            raise SSTError(f"{path}: not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
        return cls.loads(text, name, source=str(path), default_name=path.stem)

    @classmethod
    def loads(
        cls, text: str, name: str | None = None, source: str = "recipe", default_name: str = ""
    ) -> Recipe:
        """Read TOML text; `source` is how errors call it."""
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            hint = 'a line looks like: checkpoint = "smollm2-135m"'
            raise SSTError(f"{source}: not valid TOML: {error}", hint) from None
        values["name"] = name or values.get("name", default_name)
        try:
            return cls.from_dict(values)
        except SSTError as error:
            raise SSTError(f"{source}: {error.message}", error.hint) from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from plain values (TOML or JSON); unknown and missing keys are errors."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name("recipe key", key, known)
        for key in ("name", "checkpoint", "dataset"):
            if key not in values:
                raise SSTError(f"{key} is missing", f"for example {key} = {_CHECKS[key][2]}")
        choices: Any = values.get("choices", {})
        choices = Choices.from_dict(choices) if isinstance(choices, dict) else choices
        return cls(**{**values, "choices": choices})

    def to_dict(self) -> dict[str, Any]:
        """A JSON- and TOML-ready dictionary; what is left to its default of None, or without controls, is
        left out.
        """
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if not self.controls:
            del values["controls"]
        return values | {"depths": list(self.depths), "choices": self.choices.to_dict()}

    def to_toml(self) -> str:
        """TOML text from which `Recipe.loads` gives an equal recipe."""
        values = self.to_dict()
        tables = {key: values.pop(key) for key in [k for k, v in values.items() if isinstance(v, dict)]}
        lines = [f"{key} = {_toml(value)}" for key, value in values.items()]
        for table, entries in tables.items():
            lines += ["", f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in entries.items())]
        return "\n".join(lines) + "\n"

    def with_settings(self, settings: Sequence[str]) -> Recipe:
        """The recipe with keys set as a command line sets them, and checked like a file's.

        Args:
            settings: `KEY=VALUE` each: `questions=8`, `depths=1,2`, `choices.kv=first`. A value is read as
                TOML where it is TOML, and as text where it is not.

        Raises:
            SSTError: not of that form, an unknown key, or a value that does not fit.
        """
        values = self.to_dict()
        for setting in settings:
            key, equals, text = setting.partition("=")
            key, text = key.strip(), text.strip()
            if not equals or not key:
                raise SSTError(f"--set {setting!r} sets nothing", "for example --set questions=8")
            value = [*_setting(text)] if key == "depths" and not text.startswith("[") else _setting(text)[0]
            choices, _, choice = key.partition(".")
            if choice and choices == "choices":
                values["choices"] = values["choices"] | {choice: value}
            else:
                values[key] = value
        try:
            return Recipe.from_dict(values)
        except SSTError as error:
            raise SSTError(f"--set: {error.message}", error.hint) from None

    def fingerprint(self) -> str:
        """sha256 of everything that decides the run's contents: not the name, nor choices of analysis."""
        values = _identity(self)
        for key in _LATER:  # so that it is what it was before there were any
            if values[key] == getattr(Recipe, key):
                del values[key]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def differences(self, now: Recipe) -> list[tuple[str, Any, Any]]:
        """(key, this recipe's value, `now`'s value) wherever the two would capture something different."""
        ours, theirs = _identity(self), _identity(now)
        return [(key, value, theirs[key]) for key, value in ours.items() if value != theirs[key]]


_LATER = ("controls", "reply_prefix", "kind", "lens_tokens")
"""Keys that older recipes do not know; at their defaults they are not in the fingerprint."""


def known_recipes() -> dict[str, Path]:
    """Every recipe that `find_recipe` knows by name, and the file it would read."""
    found: dict[str, Path] = {}
    for where in (paths.shipped("runs"), paths.shipped("recipes"), paths.runs_dir()):  # the last one wins
        found |= {path.stem: path for path in where.glob("*.toml")}
        found |= {path.parent.name: path for path in where.glob("*/run.toml")}
    return found


def find_recipe(name: str, captured: bool = True) -> Recipe:
    """The recipe called `name`.

    Looked for as a run's own `run.toml` (unless `captured` is False), as a file (a path, or a name that ends
    in `.toml`), in the runs folder, and among the shipped ones. Raises SSTError with the nearest known names.
    """
    path = Path(name)
    if captured and re.fullmatch(NAME, name) and os.path.isfile(own := paths.runs_dir() / name / "run.toml"):
        return Recipe.load(own, name)
    if name.endswith(".toml") or len(path.parts) > 1:
        if os.path.isdir(path):
            return Recipe.load(path / "run.toml", path.resolve().name)
        return Recipe.load(path)
    known = known_recipes()
    if name not in known:
        raise unknown_name("run", name, known, "sst-interp runs")
    for file in (paths.runs_dir() / f"{name}.toml", paths.shipped("recipes") / f"{name}.toml"):
        if not captured and file.is_file():
            return Recipe.load(file, name)
    return Recipe.load(known[name], name)


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What decides a run's contents. An `overlap` does only if it has to be measured while capturing."""
    values: dict[str, Any] = {**asdict(recipe), "depths": list(recipe.depths)}
    del values["name"]
    choices = {key: value for key, value in values.pop("choices").items() if key not in ANALYSIS}
    if choices["overlap"] != "lens_jaccard":
        choices["overlap"] = "cosine or relative_l2"
    return values | {f"choices.{key}": value for key, value in choices.items()}


def _show(value: Any) -> str:
    return text if len(text := repr(value)) <= 60 else text[:57] + "..."


def _toml(value: str | bool | int | float | list[Any]) -> str:
    """One TOML value. JSON writes them the same way, but for a character that TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _setting(text: str) -> list[Any]:
    """The values of `1,2` or of one TOML value; what is not TOML is one text."""
    try:
        return tomllib.loads(f"value = [{text}]")["value"] or [text]
    except (ValueError, RecursionError):
        return [text]


def _number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, int) and _number(value, low, high)


def _text(value: Any) -> bool:
    """Text that a file can hold (undecodable bytes of a command line are not)."""
    return isinstance(value, str) and value == value.encode(errors="replace").decode()


def _named(value: Any) -> bool:
    """Text that can be the name of a file."""
    return _text(value) and value.strip() != "" and "\0" not in value


def _depths(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not all(_whole(depth, 1, MAX_DEPTH) for depth in value):
        return False
    return 1 in value and len(set(value)) == len(value)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "name": (
        lambda v: isinstance(v, str) and re.fullmatch(NAME, v) is not None,
        "a plain folder name (letters, digits, '-', '_' and '.', at most 100, no '.' in front)",
        '"demo"',
    ),
    "checkpoint": (_named, "the name of a model", '"smollm2-135m"'),
    "dataset": (_named, "the name of a dataset", '"arc-challenge"'),
    "questions": (lambda v: v is None or _whole(v, 1), "a whole number from 1 (left out: all)", "24"),
    "depths": (
        _depths,
        f"a list of distinct whole numbers from 1 to {MAX_DEPTH} with 1, the reference, among them",
        "[1, 2, 3, 4]",
    ),
    "max_new_tokens": (
        lambda v: _whole(v, 1, MAX_POSITIONS),
        f"a whole number from 1 to {MAX_POSITIONS}",
        "48",
    ),
    "kind": (
        lambda v: v is None or (isinstance(v, str) and v in kinds()),
        f"one of {', '.join(kinds())}",
        '"looped"',
    ),
    "alpha": (lambda v: v is None or _number(v, 0, 1), "a number from 0 to 1", "0.027"),
    "batch_size": (lambda v: _whole(v, 1), "a whole number from 1", "8"),
    "dtype": (lambda v: v in get_args(DType), f"one of {', '.join(get_args(DType))}", '"bfloat16"'),
    "keep": (lambda v: v in get_args(Keep), f"one of {', '.join(get_args(Keep))}", '"position0"'),
    "lens_tokens": (
        lambda v: v in get_args(LensTokens),
        f"one of {', '.join(get_args(LensTokens))}",
        '"position0"',
    ),
    "seed": (lambda v: _whole(v, 0), "a whole number from 0", "0"),
    "controls": (lambda v: _whole(v, 0), "a whole number from 0 (left out: none)", "24"),
    "split": (lambda v: v is None or _text(v), "text", '"validation"'),
    "instruction": (lambda v: v is None or _text(v), "text", '"Answer with one letter."'),
    "reply_prefix": (lambda v: v is None or (_text(v) and v), "text", '"The answer is ("'),
}
