"""Accuracy by flat depth: answers written greedily and graded, or letters chosen by their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_uppercase
from typing import Any

import pandas as pd
import torch

from sst_interp.choices import whole
from sst_interp.generation import Step, check_iterations
from sst_interp.model import StateStreamModel
from sst_interp.questions import Question, grade


def answers(
    model: StateStreamModel,
    questions: Sequence[Question],
    depths: Sequence[int] = (1,),
    max_new_tokens: int = 64,
    batch_size: int = 40,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Each question answered at every depth.

    Args:
        model: with a stream; a blend of zero is the plain backbone.
        questions: as they are asked.
        depths: of every generated position; the prompt is read once, at depth 1.
        max_new_tokens: token budget per answer.
        batch_size: questions answered together, at all depths. They are batched by length of prompt.
        progress: called with the number of questions done.

    Returns:
        A row per depth and question, in the order given: depth, id, correct, answer (None if none was found),
        tokens.
    """
    depths, batch_size = check_iterations(depths, "depths"), whole("batch_size", batch_size, 1)
    prompts = [model.chat(question.prompt) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = model.generate_at_depths([prompts[i] for i in chosen], depths, max_new_tokens)
        for depth, out in found.items():
            for i, text, tokens in zip(chosen, out.texts or [], out.tokens, strict=True):
                asked = questions[i]
                answer = grade(asked.kind, text, asked.n_choices, asked.choices)
                rows[depth, i] = {
                    "depth": depth,
                    "id": asked.id,
                    "correct": answer == asked.gold,
                    "answer": answer,
                    "tokens": len(tokens),
                }
        if progress is not None:
            progress(start + len(chosen))
    return pd.DataFrame([rows[depth, i] for depth in depths for i in range(len(questions))])


@torch.no_grad()
def letters(
    model: StateStreamModel,
    questions: Sequence[Question],
    depths: Sequence[int] = (1,),
    batch_size: int = 16,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """The letter with the highest logit where the answer's letter stands, after each depth.

    The reply is begun for the model with what all its letters have in common, "(", so that a model that would
    not start with a letter has to choose one. The position is iterated to the deepest depth once: at one
    position, depth D is iteration D.

    Returns:
        A row per depth and question, in the order given: depth, id, correct, answer.
    """
    depths, batch_size = check_iterations(depths, "depths"), whole("batch_size", batch_size, 1)
    codes = {letter: model.encode_plain(f"({letter})") for letter in ascii_uppercase}
    common = next(n for n in range(9) if len({tuple(c[: n + 1]) for c in codes.values()}) > 1)
    prompts = [model.chat(question.prompt) + codes["A"][:common] for question in questions]
    order = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        steps: list[Step] = []
        model.generate([prompts[i] for i in chosen], max(depths), 1, observe=steps.append)
        for depth in depths:
            logits = steps[0].logits[depth - 1]
            for row, i in enumerate(chosen):
                asked = questions[i]
                known = ascii_uppercase[: asked.n_choices]
                best = int(logits[row, [codes[letter][common] for letter in known]].argmax())
                answer = known[best]
                correct = answer == asked.gold
                rows[depth, i] = {"depth": depth, "id": asked.id, "correct": correct, "answer": answer}
        if progress is not None:
            progress(start + len(chosen))
    return pd.DataFrame([rows[depth, i] for depth in depths for i in range(len(questions))])
