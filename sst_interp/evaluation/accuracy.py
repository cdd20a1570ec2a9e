"""Accuracy by flat depth: every question answered greedily, every answer graded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from sst_interp.model import StateStreamModel
from sst_interp.questions import Question, grade


def answers(
    model: StateStreamModel,
    questions: Sequence[Question],
    depths: Sequence[int] = (1,),
    max_new_tokens: int = 64,
    batch_size: int = 16,
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
