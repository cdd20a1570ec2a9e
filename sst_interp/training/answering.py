"""A model asked: what it writes, which letter or choice is likeliest, and the loss of worked answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from string import ascii_uppercase
from typing import Any

import pandas as pd
import torch

from sst_interp.models.choices import check_iterations, whole
from sst_interp.models.generation import Step
from sst_interp.models.likelihood import loglikelihood
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers import solve_exactly
from sst_interp.models.solvers.sweeps import solve_by_sweeps
from sst_interp.questions import Graded, Question, graded
from sst_interp.questions.scoring import grade_by_likelihood
from sst_interp.runs.provenance import choice_tokens, prompt_tokens
from sst_interp.training.data import Example, make_batch
from sst_interp.training.objective import answer_token_losses


def _by_length(
    lengths: Sequence[int], batch_size: int, progress: Callable[[int], Any] | None
) -> Iterator[list[int]]:
    """Batches of indices, shortest first; reports how many are done after each."""
    batch_size = whole("batch_size", batch_size, 1)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen
        if progress is not None:
            progress(start + len(chosen))


def answers(
    model: StateStreamModel,
    questions: Sequence[Question],
    depths: Sequence[int] = (1,),
    max_new_tokens: int = 64,
    batch_size: int = 40,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Each question answered greedily at every depth.

    Args:
        depths: of every generated position. The prompt is read once, at depth 1.
        batch_size: questions answered together, at all depths; they are batched by prompt length.

    Returns:
        A row per depth and question, in the order given: depth, id, correct, answer (None if the text has
        none), tokens.
    """
    depths = check_iterations(depths, "depths")
    prompts = [model.chat(question.prompt) for question in questions]
    rows = {}
    for chosen in _by_length([len(prompt) for prompt in prompts], batch_size, progress):
        written = model.generate_at_depths([prompts[i] for i in chosen], depths, max_new_tokens)
        for depth, out in written.items():
            for i, text, tokens in zip(chosen, out.texts or [], out.tokens, strict=True):
                asked = questions[i]
                rows[depth, i] = _row(depth, asked, graded(asked, text)) | {"tokens": len(tokens)}
    return pd.DataFrame([rows[depth, i] for depth in depths for i in range(len(questions))])


@torch.no_grad()
def letters(
    model: StateStreamModel,
    questions: Sequence[Question],
    depths: Sequence[int] = (1,),
    batch_size: int = 16,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """The choice whose letter has the highest logit, after each depth.

    The reply is begun for the model with the tokens that all letters in brackets share, "(": so it has to
    choose a letter. The position is iterated once, to the deepest depth: depth D is its iteration D.

    Returns:
        A row per depth and question, in the order given: depth, id, correct, answer.
    """
    depths = check_iterations(depths, "depths")
    codes = {letter: model.encode_plain(f"({letter})") for letter in ascii_uppercase}
    common = next(n for n in range(9) if len({tuple(c[: n + 1]) for c in codes.values()}) > 1)
    prompts = [model.chat(question.prompt) + codes["A"][:common] for question in questions]
    rows = {}
    for chosen in _by_length([len(prompt) for prompt in prompts], batch_size, progress):
        steps: list[Step] = []
        model.generate([prompts[i] for i in chosen], max(depths), 1, observe=steps.append)
        for depth in depths:
            for i, logits in zip(chosen, steps[0].logits[depth - 1], strict=True):
                known = ascii_uppercase[: questions[i].n_choices]
                best = known[int(logits[[codes[letter][common] for letter in known]].argmax())]
                rows[depth, i] = _row(depth, questions[i], Graded(best, best == questions[i].gold))
    return pd.DataFrame([rows[depth, i] for depth in depths for i in range(len(questions))])


def choices(
    model: StateStreamModel,
    questions: Sequence[Question],
    depths: Sequence[int] = (1,),
    batch_size: int = 16,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """The likeliest choice of every question at every depth.

    Args:
        questions: asked with a scoring by likelihood.
        depths: of every position from the prompt's last token on.
        batch_size: questions whose prompts are read together; they are batched by prompt length.

    Returns:
        A row per depth and question, in the order given: depth, id, correct, answer, margin (of the right
        choice over the best wrong one: nats, or nats per character).
    """
    depths = check_iterations(depths, "depths")
    prompts = [prompt_tokens(model, question) for question in questions]
    rows = {}
    for chosen in _by_length([len(prompt) for prompt in prompts], batch_size, progress):
        tokens, pad = model.batch([prompts[i] for i in chosen])
        asked = [questions[i] for i in chosen]
        of_each = [choice_tokens(model, question) for question in asked]
        sums = loglikelihood(model, tokens, pad, of_each, depths).sums
        per_question = sums.split([question.n_choices for question in asked], dim=1)
        for i, question, of_question in zip(chosen, asked, per_question, strict=True):
            for depth, values in zip(depths, of_question.tolist(), strict=True):
                of_choices, margin = grade_by_likelihood(question, values)
                rows[depth, i] = _row(depth, question, of_choices) | {"margin": margin}
    return pd.DataFrame([rows[depth, i] for depth in depths for i in range(len(questions))])


def _row(depth: int, asked: Question, graded: Graded) -> dict[str, Any]:
    return {"depth": depth, "id": asked.id, "correct": graded.correct, "answer": graded.answer}


@torch.no_grad()
def answer_losses(
    model: StateStreamModel,
    examples: Sequence[Example],
    batch_size: int = 8,
    iterations: int = 1,
    sweeps: int | None = None,
    groups: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Cross-entropy of every example's answer.

    Args:
        batch_size: examples per pass; they are batched by length.
        iterations: depth of every position, the prompt's too.
        sweeps: None solves the states exactly; a number takes that many sweeps over `groups` groups
            (1 and 1: the paper's two-pass training).

    Returns:
        A row per example in the order given: id, tokens (of the answer), loss (summed, nats).
    """
    (iterations,) = check_iterations([iterations])
    device = model.backbone.device
    rows: dict[int, dict[str, Any]] = {}
    for chosen in _by_length([len(example.tokens) for example in examples], batch_size, progress):
        batch = make_batch([examples[i] for i in chosen]).to(device)
        tokens = batch.tokens
        stream = model.new_stream(torch.zeros(len(chosen), dtype=torch.long, device=device), tokens.shape[1])
        if sweeps is None:
            solution = solve_exactly(model, stream, tokens, iterations=iterations, keep=False)
        else:
            solution = solve_by_sweeps(
                model, stream, tokens, iterations=iterations, sweeps=sweeps, groups=groups, keep=False
            )
        losses = answer_token_losses(model, batch, solution.last[:, :, -1])
        summed = losses.new_zeros(len(chosen)).index_add_(0, batch.answer.nonzero()[:, 0], losses)
        for i, loss, count in zip(chosen, summed.tolist(), batch.answer.sum(1).tolist(), strict=True):
            rows[i] = {"id": examples[i].id, "tokens": count, "loss": loss}
    return pd.DataFrame([rows[i] for i in range(len(examples))])
