"""A question: as its dataset has it, as a model is asked it, and how the answer is read.

Texts are never part of a `repr`: a traceback, a log line or a notebook's last line shows a question's id and
gold answer only. For GPQA that is a promise to its authors. A text or its tokens as a value of their own are
`Hidden`, `HiddenBytes` or `HiddenTokens`, which show their size; what is made from them (a part, a join, a
tensor) is plain.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from string import ascii_uppercase
from typing import Any, Literal

from sst_interp.errors import SSTError

Kind = Literal["choice", "number", "text"]
LIKELIHOOD = ("likelihood", "likelihood_per_character")
"""Scorings that ask which choice the model finds likeliest, and not what it writes."""


class Hidden(str):
    """Text whose repr is its length."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<text of {len(self)} characters>"


class HiddenBytes(bytes):
    """Bytes whose repr is their number."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


class HiddenTokens(list[int]):
    """Token ids whose repr is their number: they decode to a text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self)} tokens>"


@dataclass(frozen=True)
class Item:
    """One record of a dataset, before it is put to a model."""

    id: str
    text: str = field(repr=False)
    choices: tuple[str, ...] = field(repr=False)
    """In the dataset's order; empty for a question whose answer is a number or a text."""
    answer: int | str
    """Index into `choices`, or the number or text as the dataset writes it."""
    worked: str = field(default="", repr=False)
    """The worked answer, if there is one: what a training learns to write."""
    instruction: str | None = None
    """Follows the question instead of the kind's default; empty if the question itself says it all."""
    scoring: str | None = None
    """How its dataset has it graded, where a recipe does not say (`scoring`); None: by its kind."""
    entry: Any = field(default=None, repr=False, compare=False)
    """What a scorer of the dataset's own needs to know."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", Hidden(self.text))
        object.__setattr__(self, "choices", tuple(map(Hidden, self.choices)))
        object.__setattr__(self, "worked", Hidden(self.worked))


@dataclass(frozen=True)
class Question:
    """One question as it is asked."""

    id: str
    """The dataset's own record id."""
    prompt: str = field(repr=False)
    """The user's message; the chat template is applied by whoever generates."""
    gold: str
    """A letter, a number in the form of `canonical_number`, or a text in that of `canonical_text`."""
    kind: Kind
    n_choices: int
    """0 for a number or a text."""
    choices: tuple[str, ...] = field(default=(), repr=False)
    """Their texts in the order asked; for `grade`, and what is scored by likelihood."""
    scoring: str | None = None
    """How it is graded (`sst_interp.questions.scoring`); None: by its kind."""
    entry: Any = field(default=None, repr=False, compare=False)
    """As the item has it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", Hidden(self.prompt))
        object.__setattr__(self, "choices", tuple(map(Hidden, self.choices)))


@dataclass(frozen=True)
class QuestionSet:
    """Questions in dataset order, and where they came from."""

    name: str
    questions: tuple[Question, ...]
    restricted: bool
    """The text must not be logged, stored or published (GPQA)."""
    provenance: dict[str, Any]
    """JSON-ready: dataset, split, source, sha256, licence, n, available, seed, instruction."""

    def __len__(self) -> int:
        return len(self.questions)


INSTRUCTIONS: dict[str, str] = {
    "choice": "Start your reply with the letter of the correct answer, then give a short reason.",
    "number": "Work it out step by step, then give the final number after ####.",
    "text": "Reply with the answer alone.",
}
"""The default instruction of each kind. Of the wordings tried on SmolLM2-135M, the one for choices, with
"(A)" rather than "A.", got an answer most often (22 of 24 questions)."""

_POINTS_AT_OTHERS = re.compile(
    r"(?i:\b(?:all|none|both|neither|any|either|two)\b.*\b(?:above|of these|of the following|of them)\b)"
    r"|^\W*(?:(?:[Bb]oth|[Nn]either|[Oo]nly) )?\(?[A-H]\)?,? (?:and|or|nor) \(?[A-H]\)?\W*$"
)


def ask(
    item: Item,
    seed: int = 0,
    instruction: str | None = None,
    ordered: bool = True,
    scoring: str | None = None,
) -> Question:
    """The question as it is asked: the text, the lettered choices, an instruction.

    By likelihood it is `Question: TEXT`, and on a line of its own `Answer:`, as lm-evaluation-harness words
    it; what is scored is a space and a choice after it. Neither choices nor an instruction are shown.

    The choices are shuffled by `random.Random(f"{seed}:{id}")`, so that a question looks the same whichever
    others are asked with it. Choices that point at one another ("all of the above") keep their author's
    order.

    Args:
        item: the record; `item.answer` indexes its choices.
        seed: of the shuffle.
        instruction: replaces the kind's default; `{letters}` becomes "A, B, C or D".
        ordered: the dataset's order of choices is its author's (GPQA's is not: the right one is first).
        scoring: how it is graded; None: as the item says, else by its kind.

    Raises:
        SSTError: more than 26 choices, a gold answer that is not a number, or a scoring that does not fit.
    """
    scoring = item.scoring if scoring is None else scoring
    if wrong := _misfit(item, scoring):
        raise SSTError(f"question {item.id[:60]}{wrong[0]}", wrong[1])
    if not item.choices:
        return _ask_openly(item, instruction, scoring)
    n = len(item.choices)
    if not 2 <= n <= len(ascii_uppercase):
        raise SSTError(f"question {item.id[:60]} has {n} choices; 2 to 26 can be lettered")
    order = list(range(n))
    if not (ordered and any(_POINTS_AT_OTHERS.search(choice) for choice in item.choices)):
        random.Random(f"{seed}:{item.id}").shuffle(order)
    letters = ascii_uppercase[:n]
    gold = letters[order.index(int(item.answer))]
    shuffled = tuple(item.choices[i] for i in order)
    asked = partial(
        Question, item.id, gold=gold, kind="choice", n_choices=n, choices=shuffled, scoring=scoring,
        entry=item.entry,
    )  # fmt: skip
    if scoring in LIKELIHOOD:
        return asked(f"Question: {item.text}\nAnswer:")
    instruction = _instruction(item, instruction, "choice")
    lines = (f"({letter}) {item.choices[i]}" for letter, i in zip(letters, order, strict=True))
    listed = Hidden("\n".join(lines))
    instruction = instruction.replace("{letters}", f"{', '.join(letters[:-1])} or {letters[-1]}")
    return asked(message(item.text, listed, instruction))


def _ask_openly(item: Item, instruction: str | None, scoring: str | None) -> Question:
    """A question without choices: its answer is a number, or a text if its scoring is not by number."""
    number, said = canonical_number(str(item.answer)), str(item.answer).strip()
    kind: Kind = (
        "text" if scoring == "text" or (number is None and scoring not in (None, "number")) else "number"
    )
    gold = canonical_text(said) if scoring == "text" else number or said
    asked = message(item.text, _instruction(item, instruction, kind))
    return Question(item.id, asked, gold, kind, 0, scoring=scoring, entry=item.entry)


def _instruction(item: Item, instruction: str | None, kind: Kind) -> str:
    return next(t for t in (instruction, item.instruction, INSTRUCTIONS[kind]) if t is not None)


def _misfit(item: Item, scoring: str | None) -> tuple[str, str] | None:
    """Why an item cannot be graded so, and what to type."""
    if item.choices:
        if scoring in ("number", "text"):
            return f" has choices, and scoring is {scoring!r}", 'scoring = "letter", or "likelihood"'
    elif scoring == "letter" or scoring in LIKELIHOOD:
        return f" has no choices, and scoring is {scoring!r}", "leave scoring out, or choose another dataset"
    elif scoring in (None, "number") and canonical_number(str(item.answer)) is None:
        digits = "give it as digits (18, 1,450, -2.5), or give the question choices"
        return ": the answer is not a number", f'{digits}; scoring = "text" compares texts'
    return None


def message(*parts: str) -> str:
    """The user's message: its parts, those that are not empty, a blank line apart."""
    return Hidden("\n\n".join(part for part in parts if part))


# Not part of a word or symbol (C++, B/C, A's, D-glucose), and not the article or the pronoun.
_LETTER = (
    r"([A-Z])(?![\w'’+°/]|-\w)"
    r"(?!(?<=[AI])[ \t]+(?!(?:because|since|as|due|is|and|or|which|explanation|reason)\b)\w)"
)
_OPEN = r"[\s*_`\"'(\[{$\\]*(?:(?:boxed|text|textbf|mathbf)\s*\{[\s(\\]*)*"
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option|letter)(?: (?:to|for) (?:the|this) question)?[\s*_]*"
    r"(?::|=|\bis\b|\bwould be\b|\bshould be\b)[\s*_:]*"
    r"(?:(?:the )?(?:correct |right |best )?(?:letter|option|choice|answer)\b)?[\s:]*)" + _OPEN + _LETTER
)
_CHOSEN = re.compile(
    r"(?i:\b(?:choose|select|pick|go with)(?: (?:option|choice|letter|answer))?)" + _OPEN + _LETTER
)
_VERDICT = re.compile(r"(?<!\w)" + _LETTER + r"[)\]*\"']*(?i:\s+is\s+(?:the\s+)?(?:correct|right|best)\b)")
_BOXED = re.compile(r"boxed\s*\{[\s(\\]*(?:text\w*\s*\{[\s(]*)?" + _LETTER)
_LEADING = re.compile(r"[\s*_`#>\"'(\[]*(?i:(?:option|choice|letter)\s+)?[*(\[]*" + _LETTER)
_LABEL = re.compile(r"(?m)^[ \t*_(\[-]*([A-Z])[*_]*[.):\]]")
_BOLD = re.compile(r"\*\*\(?" + _LETTER + r"\)?[.:)]?[^*\n]*\*\*")
_NAMED = re.compile(r"(?i:\b(?:option|choice|letter|answer))[\s*(\[\"']+" + _LETTER)

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"
_NUMBER = rf"((?<![\w)])[-−]\$?|\$[-−]|)\$?((?<!\w)(?<!\d\.){_DIGITS}|(?<![\w.])\.[0-9]+)"
_ANY_NUMBER = re.compile(_NUMBER)
_HASHED = re.compile(rf"####[\s*$]*{_NUMBER}")


def grade(kind: Kind, text: str, n_choices: int = 0, choices: Sequence[str] = ()) -> str | None:
    """The answer in a generated text: a letter, or a number or text in canonical form; None if there is none.

    Letters are looked for in this order: a statement ("the answer is (B)", "B is correct"; the last one
    counts, since a text may correct itself); the letter that the text begins with; a letter that begins a
    line, stands in bold, or is named ("option B"). Only capitals count, an article "A" or pronoun "I" does
    not, and a text that only lists the choices again has not answered.

    A quoted choice counts and not the letter before it: a small model writes "B) rain" where rain is D.
    SmolLM2-135M does so in a quarter of its answers. Answers found / right on 96 questions, 32 tokens, by
    letter and with quotes: ARC-Easy 84 / 18 and 93 / 29; ARC-Challenge 80 / 24 and 85 / 25 (at chance either
    way).

    Args:
        kind: `choice`, `number` or `text`.
        text: what the model wrote, without the prompt and special tokens.
        n_choices: letters beyond this many are ignored.
        choices: their texts in the order asked (`Question.choices`); without them only letters count.
    """
    if kind == "choice":
        return _choice(text, ascii_uppercase[:n_choices], choices)
    if kind == "number":
        return _number(text)
    if kind == "text":
        return canonical_text(final_lines(text)) or None
    raise ValueError(f"kind {kind!r} is neither 'choice', 'number' nor 'text'")


def _choice(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The letter found, replaced by the letter of the choice quoted right after it, if one is."""
    lists_choices = _LABEL.findall(text)[:2] == ["A", "B"]
    match = _find_letter(text, letters, lists_choices)
    quotes = [(_plain(choice), letter) for choice, letter in zip(choices, letters, strict=False)]
    if match:
        after = _plain(text[match.end(1) :])
        quoted = [(len(q), letter) for q, letter in quotes if q and f"{after} ".startswith(f"{q} ")]
        return max(quoted)[1] if quoted else match[1]
    if lists_choices:
        return None
    said = f" {_plain(text)} "
    named = [(q, letter) for q, letter in quotes if q and f" {q} " in said]
    named = [
        (q, x) for q, x in named if not any(q != other and f" {q} " in f" {other} " for other, _ in named)
    ]
    return named[0][1] if len(named) == 1 else None


def _find_letter(text: str, letters: str, lists_choices: bool) -> re.Match[str] | None:
    def matches(*patterns: re.Pattern[str]) -> list[re.Match[str]]:
        return [m for pattern in patterns for m in pattern.finditer(text) if m[1] in letters]

    if stated := matches(_STATED, _CHOSEN, _VERDICT, _BOXED):
        return max(stated, key=lambda match: match.start(1))
    leading = _LEADING.match(text)
    if leading and leading[1] in letters and not (lists_choices and leading[1] == "A"):
        return leading
    for pattern in (_BOLD, _NAMED) if lists_choices else (_LABEL, _BOLD, _NAMED):
        if labels := matches(pattern):
            return labels[0]
    return None


def _plain(text: str) -> str:
    """Words only, in lower case: how a quotation is compared."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _number(text: str) -> str | None:
    """The last `#### 18`, else the last number of the text."""
    matches = list(_HASHED.finditer(text)) or list(_ANY_NUMBER.finditer(text))
    if not matches:
        return None
    sign, digits = matches[-1].groups()
    return _canonical(bool(sign.strip("$")), digits)


_ANNOUNCED = re.compile(r"####|(?i:\banswer(?:\s+is\b)?\s*:|\banswer\s+is\b)")


def final_lines(reply: str, lines: int = 1) -> str:
    """Where a reply gives its answer: after its last `####`, `answer:` or `answer is`, else at its start.

    Args:
        lines: how many; empty ones do not count.
    """
    announced = [match.end() for match in _ANNOUNCED.finditer(reply) if reply[match.end() :].strip()]
    after = reply[announced[-1] :] if announced else reply
    return "\n".join([line.strip() for line in after.splitlines() if line.strip()][:lines])


def canonical_text(text: str) -> str:
    """A text in the one form answers are compared in: `The  Eiffel Tower.` is `eiffel tower`.

    Case, white space, an article in front, and punctuation at both ends do not count. A text that is nothing
    else stays as it is.
    """
    said = " ".join(text.casefold().split())
    bare = re.sub(r"^[\W_]+|[\W_]+$", "", said)
    bare = re.sub(r"^(?:an?|the) ", "", bare)
    return bare or said


def canonical_number(text: str) -> str | None:
    """A gold number in the one form answers are compared in: `$1,450.50` is `1450.5`, `18.0` is `18`.

    None if `text` is not one number and nothing else.
    """
    match = _ANY_NUMBER.fullmatch(text.strip().removesuffix("."))
    return _canonical(bool(match[1].strip("$")), match[2]) if match else None


def _canonical(negative: bool, digits: str) -> str:
    whole, _, fraction = digits.replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if negative and number != "0" else number
