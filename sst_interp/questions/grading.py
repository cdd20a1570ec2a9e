"""Reading the answer out of generated text. Pure functions; None means that no answer was found.

Letters are looked for in this order:

1. a statement: "the answer is (B)", "B is correct", "I choose B"; the last one counts, since a text may
   correct itself;
2. the letter the text begins with: "B) because ...", "**B**";
3. a letter that begins a line, stands in bold, or is named ("option B").

Only capitals count. An "A" (or "I") in front of a word is the word, unless the next word is one that
follows an answer ("A because"). A text that only lists the choices again has not answered. A letter in
brackets inside a sentence is not read: "carbon (C)" names no choice.

With the texts of the choices at hand, what is quoted counts and not the letter put before it: a small
model writes "B) rain" where rain is D. SmolLM2-135M contradicts itself so in a quarter of its answers.
Measured on 96 questions each, 32 tokens, answers found / right, by letter and with quotes: ARC-Easy
84 / 18 and 93 / 29; ARC-Challenge 80 / 24 and 85 / 25 (at chance either way). For a model whose letters
and quotes agree it changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

from sst_interp.questions.item import Kind

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
    """The answer in a generated text: a letter, or a number in canonical form; None if there is none.

    Args:
        kind: `choice` or `number`.
        text: what the model wrote, without the prompt and special tokens.
        n_choices: letters beyond this many are ignored.
        choices: their texts in the order asked (`Question.choices`); without them only letters count.
    """
    if kind == "choice":
        return _choice(text, ascii_uppercase[:n_choices], choices)
    if kind == "number":
        return _number(text)
    raise ValueError(f"kind {kind!r} is neither 'choice' nor 'number'")


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
        if found := matches(pattern):
            return found[0]
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
