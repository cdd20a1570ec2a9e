"""A recipe: everything that decides what a run contains, as one frozen record and one TOML file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sst_interp import paths
from sst_interp.errors import SSTError, check_known, unknown_name
from sst_interp.files import read_whole
from sst_interp.models.choices import ANALYSIS, BEFORE, MAX_DEPTH, Choices, shown
from sst_interp.models.kinds import kind_named, kinds
from sst_interp.models.kinds.looped import SETTINGS
from sst_interp.models.placement import ATTENTIONS, QUANTISATIONS, Placement
from sst_interp.questions.item import LIKELIHOOD

DType = Literal["bfloat16", "float32", "float64"]
Keep = Literal["none", "position0", "shifts", "all"]
LensTokens = Literal["none", "position0", "all"]
LISTS = ("depths", "keep_layers", "keep_positions")
"""Keys whose values are whole numbers, kept ascending."""
NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}"
LARGEST = 1 << 20  # bytes of a recipe's file
MAX_POSITIONS = 32767
"""Positions are int16 in the tables."""
Check = tuple[Callable[[Any], bool], str]
"""Whether a value fits, and the words for what does."""


@dataclass(frozen=True)
class Recipe:
    """What a run captures: which model answers which questions at which depths, and what is recorded.

    Raises:
        SSTError: a value that cannot be captured; it names the key and a right value.
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
    """`looped` iterates a plain backbone with no stream (docs/kinds.md). Left out: the checkpoint's own, or a
    plain backbone with the blend `alpha`. A checkpoint of another kind is refused."""

    loop: dict[str, Any] | None = None
    """How kind `looped` loops (docs/looped.md): `prelude`, `core`, `coda` as [first, one after the last],
    `inject`, `norm`, `damping` ... Left out: over the whole stack. Which keys and values: `choices.kv`."""

    alpha: float | None = None
    """A fixed blend in [0, 1]; left out, the checkpoint's own, and of a backbone without one, none."""

    batch_size: int = 8
    """Questions per batch: the unit that is committed and resumed. It changes bf16 rounding, so it is part
    of what a run is."""

    dtype: DType = "bfloat16"
    """Number format of weights and states."""

    keep: Keep = "position0"
    """Which full hidden states are written (docs/run-format.md, states)."""

    keep_layers: tuple[int, ...] | None = None
    """The layers, from 0, whose states are kept, of those that `keep` names; left out: all."""

    keep_positions: tuple[int, ...] | None = None
    """The positions, from 0, whose states `keep = "all"` and `"shifts"` keep; left out: all."""

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
    """How every reply begins, for a model that seldom answers by letter: "The answer is (". The model reads
    it with the prompt (position 0 emits what comes next); it is graded with the reply."""

    scoring: str | None = None
    """How answers are graded. Left out: by what the model writes, a letter or a number. `likelihood` or
    `likelihood_per_character`: the answer is the choice with the highest log-likelihood after
    `Question: ... Answer:`, without a chat template, and what is captured is what the model writes there.
    `text`, or the name of a scorer (`sst_interp.questions.scoring`)."""

    columns: dict[str, str | list[str]] | None = None
    """What a file or a hub dataset calls its columns: `question`, `answer`, `choices`, `id`."""

    controls: int = 0
    """How many questions, evenly spread, also get the controls that need the model: the noise floor and
    norm-matched perturbations (docs/run-format.md). Each takes about half a batch's time."""

    draws: int = 0
    """Sampled answers of depth 1 per question (`sst_interp.runs.redraws`); `depths` must be [1]. 0: none."""

    temperature: float = 1.0
    """At which `draws` are sampled."""

    device: str = "auto"
    """Where the model is put; `auto`: CUDA, then MPS, then the CPU. It is no part of what a run is."""

    quantisation: Literal["4bit", "8bit"] | None = None
    """Of the linear layers, through bitsandbytes; left out: none."""

    attention: Literal["eager", "sdpa"] | None = None
    """Implementation of attention; left out: the model's own."""

    choices: Choices = field(default_factory=Choices)
    """What the paper leaves open (`sst_interp.models.choices`)."""

    def __post_init__(self) -> None:
        check_fields(self, _CHECKS)
        # One spelling of each value, so that equal recipes have equal fingerprints.
        for key in LISTS:
            if (numbers := getattr(self, key)) is not None:
                object.__setattr__(self, key, tuple(sorted(numbers)))
        if self.keep_positions is not None:
            if self.keep not in ("all", "shifts"):
                hint = 'keep = "all", or leave keep_positions out'
                raise SSTError(f"keep_positions is not read with keep = {self.keep!r}", hint)
            if self.keep_positions[-1] >= self.max_new_tokens:
                said = f"keep_positions names position {self.keep_positions[-1]} of {self.max_new_tokens}"
                raise SSTError(said, f"positions are numbered 0 to {self.max_new_tokens - 1}")
        if self.loop is not None:
            if self.kind != "looped":
                raise SSTError("[loop] is of a looped model", 'kind = "looped"')
            check_known("setting of [loop]", self.loop, SETTINGS)
            lists = {key: list(v) if isinstance(v, tuple) else v for key, v in self.loop.items()}
            object.__setattr__(self, "loop", lists or None)
        if self.alpha is not None:
            if self.kind not in (None, "sst"):
                words = kind_named(self.kind).words
                raise SSTError(f"kind = {self.kind!r}: a {words} has no alpha", "leave one out")
            object.__setattr__(self, "alpha", float(self.alpha) + 0.0)
        if self.scoring in LIKELIHOOD:
            for key in ("instruction", "reply_prefix"):
                if getattr(self, key):
                    raise SSTError(
                        f"{key} is not read with scoring = {self.scoring!r}", "leave one of them out"
                    )
        object.__setattr__(self, "temperature", float(self.temperature))
        if self.draws and (self.depths != (1,) or self.controls):
            raise SSTError("draws are sampled at depth 1 alone", "set depths = [1] and controls = 0")
        if self.temperature != 1 and not self.draws:
            raise SSTError("temperature is read with draws alone", "set draws, or leave temperature out")
        if self.controls and self.quantisation is not None:
            raise SSTError(
                "controls compare with float32, and quantised weights have no float32 twin",
                "controls = 0, or leave quantisation out",
            )
        if isinstance(threshold := self.choices.threshold, int):
            object.__setattr__(self, "choices", replace(self.choices, threshold=float(threshold)))

    @property
    def placement(self) -> Placement:
        """Where the model goes, and in which numbers it computes."""
        return Placement(self.device, self.dtype, self.quantisation, self.attention)

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
        check_known("recipe key", values, [f.name for f in fields(cls)])
        for key in ("name", "checkpoint", "dataset"):
            if key not in values:
                raise SSTError(f"{key} is missing", f"for example {key} = {_CHECKS[key][1]}")
        choices: Any = values.get("choices", {})
        choices = Choices.from_dict(choices) if isinstance(choices, dict) else choices
        return cls(**{**values, "choices": choices})

    def to_dict(self) -> dict[str, Any]:
        """A JSON- and TOML-ready dictionary, without keys that are None or, of `controls`, `draws` and
        `temperature`, at their defaults.
        """
        values = {key: value for key, value in asdict(self).items() if value is not None}
        for key in ("controls", "draws", "temperature"):
            if values[key] == getattr(Recipe, key):
                del values[key]
        if self.device == "auto":
            del values["device"]
        lists = {key: list(values[key]) for key in LISTS if key in values}
        return values | lists | {"choices": self.choices.to_dict()}

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
            value = [*_setting(text)] if key in LISTS and not text.startswith("[") else _setting(text)[0]
            table, _, entry = key.partition(".")
            if entry and table in ("choices", "columns", "loop"):
                values[table] = values.get(table, {}) | {entry: value}
            else:
                values[key] = value
        try:
            return Recipe.from_dict(values)
        except SSTError as error:
            raise SSTError(f"--set: {error.message}", error.hint) from None

    def fingerprint(self) -> str:
        """sha256 of everything that decides the run's contents: not the name, nor choices of analysis."""
        values = _identity(self)
        for key in _LATER:
            if values[key] == getattr(Recipe, key):
                del values[key]
        for old, new in BEFORE.items():
            if f"choices.{new}" in values:
                values[f"choices.{old}"] = values.pop(f"choices.{new}")
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def differences(self, now: Recipe) -> list[tuple[str, Any, Any]]:
        """(key, this recipe's value, `now`'s value) wherever the two would capture something different."""
        ours, theirs = _identity(self), _identity(now)
        return [(key, value, theirs[key]) for key, value in ours.items() if value != theirs[key]]


_LATER = (
    "controls", "reply_prefix", "kind", "lens_tokens", "scoring", "columns", "keep_layers", "keep_positions",
    "loop", "draws", "temperature", "quantisation", "attention",
)  # fmt: skip
"""Keys that older recipes do not know: at their defaults they are not in the fingerprint."""


def known_recipes() -> dict[str, Path]:
    """Every recipe that `find_recipe` knows by name, and the file it would read."""
    known: dict[str, Path] = {}
    for where in (paths.shipped("runs"), paths.shipped("recipes"), paths.runs_dir()):  # the last one wins
        known |= {path.stem: path for path in where.glob("*.toml")}
        known |= {path.parent.name: path for path in where.glob("*/run.toml")}
    return known


def find_recipe(name: str, captured: bool = True) -> Recipe:
    """The recipe called `name`: a run's own `run.toml`, a file, one of the runs folder, or a shipped one.

    Args:
        captured: whether a run's own counts.

    Raises:
        SSTError: there is none; it has the nearest known names.
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
    values: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()}
    del values["name"], values["device"]
    choices = {key: value for key, value in values.pop("choices").items() if key not in ANALYSIS}
    if choices["overlap"] != "lens_jaccard":
        choices["overlap"] = "cosine or relative_l2"
    return values | {f"choices.{key}": value for key, value in choices.items()}


def _toml(value: str | bool | int | float | list[Any]) -> str:
    """One TOML value. JSON writes them the same way, but for a character that TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _setting(text: str) -> list[Any]:
    """The values of `1,2` or of one TOML value; what is not TOML is one text."""
    try:
        return tomllib.loads(f"value = [{text}]")["value"] or [text]
    except (ValueError, RecursionError):
        return [text]


def number(low: float = -math.inf, high: float = math.inf, open_below: bool = False) -> Check:
    """A number from `low` (above it, if `open_below`) to `high`."""
    words = f"above {low:g}" if open_below else f"from {low:g}"

    def fits(value: Any) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            return False
        return value > low or not open_below

    return fits, f"a number {words}" + ("" if high == math.inf else f" to {high:g}")


def whole(low: int, high: float = math.inf) -> Check:
    """A whole number from `low` to `high`."""
    fits, words = number(low, high)
    return lambda value: isinstance(value, int) and fits(value), words.replace("a ", "a whole ", 1)


def one_of(values: Iterable[str]) -> Check:
    """One of these texts."""
    known = tuple(values)
    return lambda value: isinstance(value, str) and value in known, f"one of {', '.join(known)}"


def text(what: str = "text", empty: bool = True) -> Check:
    """Text that a file can hold, unlike undecodable bytes of a command line; not `empty`: a file's name."""

    def fits(value: Any) -> bool:
        if not isinstance(value, str) or value != value.encode(errors="replace").decode():
            return False
        return empty or (value.strip() != "" and "\0" not in value)

    return fits, what


def or_none(check: Check, words: str = "") -> Check:
    """None too; `words` say what it means."""
    return lambda value: value is None or check[0](value), check[1] + words


def check_fields(record: Any, checks: Mapping[str, tuple[Check, str]]) -> None:
    """Raise SSTError (which field, what it must be, an example) for the first field that does not fit."""
    for key, ((fits, expected), example) in checks.items():
        value = getattr(record, key)
        if not fits(value):
            raise SSTError(f"{key} = {shown(value)} is not {expected}", f"for example {key} = {example}")


FOLDER: Check = (
    lambda value: isinstance(value, str) and re.fullmatch(NAME, value) is not None,
    "a plain folder name (letters, digits, '-', '_' and '.', at most 100, no '.' in front)",
)


def _depths(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not all(map(whole(1, MAX_DEPTH)[0], value)):
        return False
    return 1 in value and len(set(value)) == len(value)


def _numbers(value: Any) -> bool:
    several = isinstance(value, list | tuple) and len(value) > 0 and all(map(whole(0)[0], value))
    return several and len(set(value)) == len(value)


def _columns(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key in COLUMNS and all(map(text(empty=False)[0], names if isinstance(names, list) else [names]))
        for key, names in value.items()
    )


COLUMNS = ("question", "answer", "choices", "id")
_DEPTHS = _depths, f"a list of distinct whole numbers from 1 to {MAX_DEPTH} with 1, the reference, among them"
_NUMBERS = or_none((_numbers, "a list of distinct whole numbers from 0"), " (left out: all)")
_CHECKS: dict[str, tuple[Check, str]] = {
    "name": (FOLDER, '"demo"'),
    "checkpoint": (text("the name of a model", empty=False), '"smollm2-135m"'),
    "dataset": (text("the name of a dataset", empty=False), '"arc-challenge"'),
    "questions": (or_none(whole(1), " (left out: all)"), "24"),
    "depths": (_DEPTHS, "[1, 2, 3, 4]"),
    "max_new_tokens": (whole(1, MAX_POSITIONS), "48"),
    "kind": (
        or_none((lambda v: isinstance(v, str) and v in kinds(), f"one of {', '.join(kinds())}")),
        '"looped"',
    ),
    "loop": (or_none((lambda value: isinstance(value, dict), "a table")), "{core = [8, 16]}"),
    "alpha": (or_none(number(0, 1)), "0.027"),
    "batch_size": (whole(1), "8"),
    "dtype": (one_of(get_args(DType)), '"bfloat16"'),
    "device": (text("the name of a device", empty=False), '"cuda"'),
    "quantisation": (or_none(one_of(QUANTISATIONS), " (left out: none)"), '"4bit"'),
    "attention": (or_none(one_of(ATTENTIONS), " (left out: the model's own)"), '"sdpa"'),
    "keep": (one_of(get_args(Keep)), '"position0"'),
    "keep_layers": (_NUMBERS, "[0, 12, 29]"),
    "keep_positions": (_NUMBERS, "[0, 1, 2, 3]"),
    "lens_tokens": (one_of(get_args(LensTokens)), '"position0"'),
    "seed": (whole(0), "0"),
    "controls": (whole(0), "24"),
    "draws": (whole(0, MAX_DEPTH), "4"),
    "temperature": (number(0, 100, open_below=True), "1.0"),
    "split": (or_none(text()), '"validation"'),
    "instruction": (or_none(text()), '"Answer with one letter."'),
    "scoring": (or_none(text("the name of a scoring", empty=False)), '"likelihood_per_character"'),
    "columns": (
        or_none((_columns, f"a table of column names for {', '.join(COLUMNS)}")),
        '{question = "goal", choices = ["sol1", "sol2"], answer = "label"}',
    ),
    "reply_prefix": (or_none(text("text that is not empty", empty=False)), '"The answer is ("'),
    "choices": ((lambda value: isinstance(value, Choices), "a table"), "{}"),
}
