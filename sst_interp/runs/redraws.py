"""Re-draws: several sampled answers of depth 1 per question, in the place of one answer per depth.

They are the control of an oracle over depths (claim C11): as many chances, of one model. A recipe with
`draws` and `depths = [1]` captures them; its `questions` table has a row per draw, numbered in `draw`.

What a model writes is sampled token by token at the recipe's temperature. An answer by likelihood is a choice
drawn with probability softmax(log-likelihood / temperature): the model's own distribution, given that it
writes one of the choices. Log-likelihoods per character are put back on the scale of a text first, times the
mean length of the question's choices: as they are, their softmax is nearly even whatever the model knows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from string import ascii_uppercase

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp.models.model import StateStreamModel
from sst_interp.questions import Question
from sst_interp.questions.item import HiddenTokens
from sst_interp.questions.scoring import grade_by_likelihood
from sst_interp.runs.recipe import Recipe

Texts = dict[int, list[list[int]]]


def numbered(recipe: Recipe) -> Recipe:
    """The recipe as if its draws were depths 1, 2 ..., so that they are graded and listed as depths are."""
    return replace(recipe, depths=tuple(range(1, recipe.draws + 1)), draws=0, temperature=1.0)


def seeds(recipe: Recipe, draw: int) -> int:
    """The seed of a draw, from 1; no two draws of two seeds share one."""
    return 128 * recipe.seed + draw


def sampled(
    model: StateStreamModel, recipe: Recipe, prompts: Sequence[list[int]]
) -> tuple[Texts, dict[int, Tensor]]:
    """By draw: the texts' tokens, and whether each text had not ended within the budget [question]."""
    texts, alive = {}, {}
    for draw in numbered(recipe).depths:
        out = model.generate(
            list(prompts), 1, recipe.max_new_tokens, temperature=recipe.temperature, seed=seeds(recipe, draw)
        )
        texts[draw] = [HiddenTokens(tokens) for tokens in out.tokens]
        alive[draw] = ~torch.tensor(out.stopped)
    return texts, alive


def drawn_choices(
    recipe: Recipe, questions: Sequence[Question], sums: Float[Tensor, " choice"]
) -> list[tuple[str | None, bool, float | None]]:
    """(answer, whether it is right, margin) of each question, draw by draw.

    Args:
        sums: log-likelihoods at depth 1, the choices of one question after another.
    """
    read: list[tuple[str | None, bool, float | None]] = []
    for question, own in zip(questions, sums.split([q.n_choices for q in questions]), strict=True):
        margin, values = grade_by_likelihood(question, own.tolist())[1], own.double().numpy(force=True)
        if question.scoring == "likelihood_per_character":
            lengths = np.array([len(choice) for choice in question.choices])
            values = values / lengths * lengths.mean()
        likely = np.exp((values - values.max()) / recipe.temperature).cumsum()
        for draw in numbered(recipe).depths:
            at = random.Random(f"{seeds(recipe, draw)}:{question.id}").random() * likely[-1]
            place = min(int(np.searchsorted(likely, at, side="right")), len(likely) - 1)
            answer = ascii_uppercase[place]
            read.append((answer, answer == question.gold, margin))
    return read
