"""Capturing a run: every question at every depth, measured while it is generated, batch by batch."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp import paths
from sst_interp.errors import SSTError
from sst_interp.models.choices import TRAINED
from sst_interp.models.generation import check_room
from sst_interp.models.likelihood import longest_of, score
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers.sequential import Certificate
from sst_interp.questions import Question, QuestionSet, graded
from sst_interp.questions.item import LIKELIHOOD, Hidden, HiddenTokens
from sst_interp.questions.scoring import grade_by_likelihood
from sst_interp.runs import manifest
from sst_interp.runs.controls import Controls, Watch
from sst_interp.runs.provenance import choice_tokens, prompt_tokens, provenance, questions_of
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.recorder import Recorder, RolloutDecoder
from sst_interp.runs.store import Run, open_run
from sst_interp.runs.writer import RunWriter
from sst_interp.tables import bar, say


def capture(
    recipe: Recipe,
    model: StateStreamModel | None = None,
    folder: str | Path | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Run:
    """Capture a run, or the rest of one, and open it.

    Args:
        recipe: what to capture.
        model: a loaded model to use instead of the recipe's checkpoint (it must be the same on resuming).
        folder: where the run goes; None is the runs folder.
        fresh: erase what the run already has.
        progress: show a bar with an ETA on stderr.

    Raises:
        SSTError: see `load`, `load_questions` and `RunWriter.open`; a prompt longer than the context.
    """
    folder = Path(folder) if folder is not None else paths.runs_dir() / recipe.name
    if not fresh:  # before anything is loaded
        manifest.refuse_other_origin(folder, manifest.read_manifest(folder), recipe, {}, None)
    questions = questions_of(recipe)
    if model is not None:
        refuse_other_model(model, recipe)
    else:
        if progress:
            say(f"loading {recipe.checkpoint}", sys.stderr)
        model = load(recipe.checkpoint, recipe.alpha, recipe.choices, recipe.dtype, kind=recipe.kind)
    prompts = [prompt_tokens(model, q, recipe.reply_prefix) for q in questions.questions]
    check_room(model, max(map(len, prompts)), recipe.max_new_tokens)
    batches = batches_of([len(p) for p in prompts], recipe.batch_size)
    controls = Controls(model, recipe, len(prompts))
    with RunWriter.open(folder, recipe, provenance(model, questions), len(batches), fresh) as writer:
        todo = [b for b in range(len(batches)) if b not in writer.committed]
        again = sum(len(controls.chosen.intersection(batches[b])) for b in todo)
        progress_bar = bar(
            f"capturing {recipe.name}",
            total=(len(todo) + again) * recipe.max_new_tokens,
            unit="pos",
            disable=not progress or not todo,
            smoothing=0.1,
        )
        with progress_bar:
            for batch in todo:
                rows = batches[batch]
                progress_bar.set_postfix_str(f"batch {batch + 1} of {len(batches)}")
                watch = controls.watch(rows)
                measured = capture_batch(model, recipe, rows, questions, prompts, progress_bar, watch)
                writer.commit(batch, *measured)
        writer.finish()
    return open_run(folder)


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Question indices per batch: neighbours in length, to pad little."""
    order = sorted(range(len(lengths)), key=lambda r: (lengths[r], r))
    return [order[i : i + size] for i in range(0, len(order), size)]


@torch.no_grad()
def capture_batch(
    model: StateStreamModel,
    recipe: Recipe,
    rows: Sequence[int],
    questions: QuestionSet,
    prompts: Sequence[list[int]],
    bar: Any,
    watch: Watch | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Generate one batch in all rollouts and measure it.

    Args:
        rows: the batch's questions, by index in the run.
        questions: the run's.
        prompts: token ids per question of the run.
        bar: told of each position (`update`).
        watch: the controls of this batch, if it has any.

    Returns:
        (tables, states) as `RunWriter.commit` takes them.
    """
    prompts, asked = [prompts[row] for row in rows], [questions.questions[row] for row in rows]
    choices = [choice_tokens(model, question) for question in asked]
    tokens, pad = model.batch(prompts)
    longest = longest_of(choices) if recipe.scoring in LIKELIHOOD else 0
    check_room(model, tokens.shape[1], longest)
    stream = model.new_stream(pad, tokens.shape[1] + max(recipe.max_new_tokens, longest) - 1)
    certificate = model.prefill(stream, tokens[:, :-1])
    ends = {None, *model.stop_tokens}
    stop = torch.tensor(model.stop_tokens, device=tokens.device, dtype=torch.long)
    decoder = RolloutDecoder(model, stream, tokens[:, -1], recipe.depths, stop)
    recorder = Recorder(rows, recipe, questions.restricted)
    texts: dict[int, list[list[int]]] = {d: [HiddenTokens() for _ in rows] for d in recipe.depths}
    for position in range(recipe.max_new_tokens):
        moment = decoder.step()
        written = recorder.see(position, moment, decoder)
        if watch is not None:
            watch.see(moment)
        for depth, tokens_of in written.items():
            for text, token in zip(texts[depth], tokens_of, strict=True):
                if token is not None:
                    text.append(token)
        decoder.finish_step()
        bar.update(1)
        if ends.issuperset(token for tokens_of in written.values() for token in tokens_of):
            break
    bar.update(recipe.max_new_tokens - position - 1)
    read = graded_replies(model, recipe, asked, texts)
    if recipe.scoring in LIKELIHOOD:
        sums = score(model, stream, tokens[:, -1], choices, recipe.depths).sums
        read = graded_choices(asked, sums)
    if questions.restricted and not all(answer is None or SHOWN.fullmatch(answer) for answer, *_ in read):
        said = f"scorer {recipe.scoring!r} gives more than a letter or a number for a restricted dataset"
        raise SSTError(said, "answers are stored with the run, and its text must not be")
    about = [(row, question, len(prompt)) for row, question, prompt in zip(rows, asked, prompts, strict=True)]
    answers = answers_table(recipe, about, read, texts, decoder.alive, certificate)
    tables = {"questions": answers, **recorder.tables()}
    if watch is not None:
        tables |= watch.tables(prompts, texts[1], bar.update)
    return {name: columns for name, columns in tables.items() if columns}, recorder.states()


SHOWN = re.compile(r"[A-Z]|-?[0-9.]+")
"""Answers of a restricted dataset that may be stored."""
Read = tuple[str | None, bool, float | None]
"""(answer, whether it is right, its margin by likelihood) of a question at a depth."""


def graded_replies(
    model: StateStreamModel,
    recipe: Recipe,
    questions: Sequence[Question],
    texts: dict[int, list[list[int]]],
) -> list[Read]:
    """What each question's reply says, depth by depth."""
    read: list[Read] = []
    for k, question in enumerate(questions):
        for depth in recipe.depths:
            said = model.tokenizer.decode(texts[depth][k], skip_special_tokens=True)
            answer, correct = graded(question, Hidden((recipe.reply_prefix or "") + said))
            read.append((answer, correct, None))
    return read


def graded_choices(questions: Sequence[Question], sums: Float[Tensor, "depth choice"]) -> list[Read]:
    """The likeliest choice of each question, depth by depth; `sums` has the choices of one after another."""
    read: list[Read] = []
    per_question = sums.split([question.n_choices for question in questions], dim=1)
    for question, of_question in zip(questions, per_question, strict=True):
        for at_depth in of_question.tolist():
            (answer, correct), margin = grade_by_likelihood(question, at_depth)
            read.append((answer, correct, margin))
    return read


def answers_table(
    recipe: Recipe,
    asked: Sequence[tuple[int, Question, int]],
    read: Sequence[Read],
    texts: dict[int, list[list[int]]],
    alive: dict[int, torch.Tensor],
    certificate: Certificate,
) -> dict[str, list[Any]]:
    """The `questions` table of a batch.

    Args:
        asked: (index in the run, question, tokens of its prompt).
        read: question by question, and depth by depth.
    """
    rows_of_it = []
    cells = [(k, *about, depth) for k, about in enumerate(asked) for depth in recipe.depths]
    for (k, row, question, length, depth), (answer, correct, margin) in zip(cells, read, strict=True):
        rows_of_it.append(
            {
                "question": row,
                "id": question.id,
                "depth": depth,
                "gold": question.gold,
                "answer": answer,
                "correct": correct,
                **({} if margin is None else {"likelihood_margin": margin}),
                "tokens": len(texts[depth][k]),
                "stopped": not bool(alive[depth][k]),
                "prompt_tokens": length,
                "prompt_sweeps": certificate.sweeps,
                "prompt_residual": certificate.residual,
                "prompt_logit_error": certificate.logit_error,
            }
        )
    return {name: [row[name] for row in rows_of_it] for name in rows_of_it[0]}


def refuse_other_model(model: StateStreamModel, recipe: Recipe) -> None:
    """Raise SSTError if a model that was handed in is not the recipe's, which is what gets recorded."""
    dtype = str(model.backbone.dtype).removeprefix("torch.")
    if dtype != recipe.dtype:
        raise SSTError(f"the model is {dtype}, the recipe says {recipe.dtype}", f"dtype = {dtype!r}")
    if recipe.kind is not None and recipe.kind != model.kind.name:
        said = f"the model is a {model.kind.words}, the recipe's kind is {recipe.kind!r}"
        raise SSTError(said, f'kind = "{model.kind.name}"')
    if recipe.alpha is not None and model.kind.name != "sst":
        raise SSTError(f"a {model.kind.words} has no alpha", "leave alpha out of the recipe")
    if recipe.alpha is not None and not torch.allclose(
        model.alpha, torch.as_tensor(recipe.alpha).to(model.alpha)
    ):
        raise SSTError(f"the model's alpha is not the recipe's {recipe.alpha:g}", "attach it with the same")
    for name in (*TRAINED, "prompt"):
        ours, theirs = getattr(model.choices, name), getattr(recipe.choices, name)
        if ours != theirs:
            raise SSTError(f"the model has {name} = {ours!r}, the recipe {theirs!r}", f"{name} = {ours!r}")
