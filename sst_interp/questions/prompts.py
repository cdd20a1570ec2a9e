"""How a question is put to a model: the user's message, and the order of the choices.

The message is the question, the lettered choices, and an instruction. The choices are shuffled by
`random.Random(f"{seed}:{id}")`, so a question looks the same whichever others are asked with it. A
question whose choices point at one another ("all of the above", "both A and C") keeps the order its
author gave it, where the dataset has such an order.
"""

from __future__ import annotations

import random
import re
from string import ascii_uppercase

from sst_interp.errors import SSTError
from sst_interp.questions.grading import canonical_number
from sst_interp.questions.item import Hidden, Item, Kind, Question

INSTRUCTIONS: dict[str, str] = {
    "choice": "Start your reply with the letter of the correct answer, then give a short reason.",
    "number": "Work it out step by step, then give the final number after ####.",
}
"""The default instruction of each kind. The wording for choices, and "(A)" rather than "A.", are the pair
for which an answer was found most often among those tried on SmolLM2-135M (22 of 24 questions)."""

_POINTS_AT_OTHERS = re.compile(
    r"(?i:\b(?:all|none|both|neither|any|either|two)\b.*\b(?:above|of these|of the following|of them)\b)"
    r"|^\W*(?:(?:[Bb]oth|[Nn]either|[Oo]nly) )?\(?[A-H]\)?,? (?:and|or|nor) \(?[A-H]\)?\W*$"
)


def ask(item: Item, seed: int = 0, instruction: str | None = None, ordered: bool = True) -> Question:
    """The question as it is asked.

    Args:
        item: the record; `item.answer` indexes its choices.
        seed: of the shuffle.
        instruction: replaces the kind's default; `{letters}` becomes "A, B, C or D".
        ordered: the dataset's order of choices is its author's (GPQA's is not: the right one is first).

    Raises:
        SSTError: more than 26 choices, or a gold answer that is not a number.
    """
    kind: Kind = "choice" if item.choices else "number"
    instruction = INSTRUCTIONS[kind] if instruction is None else instruction
    if kind == "number":
        gold = canonical_number(str(item.answer))
        if gold is None:
            raise SSTError(
                f"question {item.id[:60]}: the answer is not a number",
                "give it as digits (18, 1,450, -2.5), or give the question choices",
            )
        return Question(item.id, message(item.text, instruction), gold, "number", 0)
    n = len(item.choices)
    if not 2 <= n <= len(ascii_uppercase):
        raise SSTError(f"question {item.id[:60]} has {n} choices; 2 to 26 can be lettered")
    order = list(range(n))
    if not (ordered and any(_POINTS_AT_OTHERS.search(choice) for choice in item.choices)):
        random.Random(f"{seed}:{item.id}").shuffle(order)
    letters = ascii_uppercase[:n]
    lines = (f"({letter}) {item.choices[i]}" for letter, i in zip(letters, order, strict=True))
    listed = Hidden("\n".join(lines))
    instruction = instruction.replace("{letters}", f"{', '.join(letters[:-1])} or {letters[-1]}")
    gold = letters[order.index(int(item.answer))]
    return Question(
        item.id,
        message(item.text, listed, instruction),
        gold,
        "choice",
        n,
        tuple(item.choices[i] for i in order),
    )


def message(*parts: str) -> str:
    """The user's message: its parts, those that are not empty, a blank line apart."""
    return Hidden("\n\n".join(part for part in parts if part))
