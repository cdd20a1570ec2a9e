"""Capturing a run: every question at every depth, measured while it is generated, batch by batch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor

from sst_interp import paths
from sst_interp.errors import SSTError
from sst_interp.files import sync
from sst_interp.models.choices import TRAINED
from sst_interp.models.generation import check_room
from sst_interp.models.kinds.looped import loop_of
from sst_interp.models.likelihood import longest_of, score
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers.sequential import Certificate
from sst_interp.questions import Question, QuestionSet, graded
from sst_interp.questions.item import LIKELIHOOD, Hidden, HiddenTokens
from sst_interp.questions.scoring import choice_scores, grade_by_likelihood
from sst_interp.runs import manifest
from sst_interp.runs.controls import Controls, Watch, spread
from sst_interp.runs.fleet import Fleet, Unfit, staff
from sst_interp.runs.memory import preflight
from sst_interp.runs.numerics import apart, digest, numerics
from sst_interp.runs.provenance import choice_tokens, prompt_tokens, provenance, questions_of
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.recorder import Recorder, RolloutDecoder
from sst_interp.runs.redraws import drawn_choices, numbered, sampled
from sst_interp.runs.states import Spool, Spooled, stage_states
from sst_interp.runs.store import Run, open_run
from sst_interp.runs.writer import OWNER, RunWriter, States, disk_errors
from sst_interp.tables import bar, say

Step = tuple[str, int]
"""What is done with a batch: `batch`, its `controls`, or both `again`, to compare."""


class Captured(NamedTuple):
    """What a step gives, as `RunWriter` takes it."""

    tables: dict[str, dict[str, Any]]
    states: States | None
    numerics: dict[str, Any]


class About(NamedTuple):
    """What the recipe and the model fix before the first batch: the same for every worker of a run."""

    provenance: dict[str, Any]
    numerics: dict[str, Any]
    controlled: list[int]
    """How many questions with controls each batch has."""
    notes: list[str]


def capture(
    recipe: Recipe,
    model: StateStreamModel | None = None,
    folder: str | Path | None = None,
    fresh: bool = False,
    progress: bool = True,
    fleet: Fleet | None = None,
    verify: int | None = None,
    mixed: bool = False,
) -> Run:
    """Capture a run, or the rest of one, and open it.

    Args:
        recipe: what to capture.
        model: a loaded model to use instead of the recipe's checkpoint (it must be the same on resuming).
        folder: where the run goes; None is the runs folder.
        fresh: erase what the run already has.
        progress: show a bar with an ETA on stderr.
        fleet: workers that capture batches side by side; None is this process. The shards are the same.
        verify: hash every shard, then capture so many batches again and compare each sha256.
        mixed: go on with batches of other hardware or versions, whose last bits may differ.

    Raises:
        SSTError: see `load`, `load_questions` and `RunWriter.open`; a prompt longer than the context; too
            little memory; batches that failed three times, or that are not the same when captured again.
    """
    place = Path(folder) if folder is not None else paths.runs_dir() / recipe.name
    folder = place.absolute()  # workers may have another working folder
    if not fresh:  # before anything is loaded
        manifest.refuse_other_origin(folder, manifest.read_manifest(folder), recipe, {}, None)
    if fleet is not None and recipe.device == "cpu":
        fleet = replace(fleet, gpus=0)
    if model is not None and fleet is not None:
        raise SSTError("workers load the model by its name", "name the checkpoint, and pass no model")
    make = partial(Job, recipe, folder, model, progress and fleet is None, fleet and str(os.getpid()))
    with staff(fleet, make) as team:
        about: About = team.first()
        n = len(about.controlled)
        opened = (folder, recipe, about.provenance, n, fresh, about.numerics, mixed, verify is not None)
        with RunWriter.open(*opened) as writer:
            steps = _missing(writer, about)
            again: list[Step] = [("again", batch) for batch in sorted(spread(verify or 0, n))]
            for note in _notes(writer, about, mixed) if steps else ():
                say(f"note: {note}", sys.stderr)
            differ: dict[int, list[str]] = {}

            def done(step: Step, made: Captured) -> Step | None:
                what, batch = step
                if what == "again":
                    differ[batch] = writer.compare(batch, made.tables, made.states)
                elif what == "controls":
                    writer.add(batch, made.tables)
                else:
                    writer.commit(batch, *made)
                return ("controls", batch) if what == "batch" and about.controlled[batch] else None

            def accept(theirs: About) -> None:
                ours, here = manifest.plain(about.provenance), manifest.plain(theirs.provenance)
                other = [k for k in ours if k.endswith("_hash") and ours[k] != here[k]]
                if here["versions"]["sst-interp"] != version("sst-interp"):
                    other.append(f"sst-interp {here['versions']['sst-interp']}, not {version('sst-interp')}")
                if not mixed and theirs.numerics != about.numerics:
                    other.append(apart(about.numerics, theirs.numerics))
                if other:
                    raise Unfit(f"it has another {', '.join(other)}", "make all machines alike, or --mixed")

            units = sum((what != "controls") + about.controlled[b] for what, b in steps + again)
            how = {"unit": "pos", "disable": not (progress and units), "smoothing": 0.1}
            with bar(f"capturing {recipe.name}", total=units * recipe.max_new_tokens, **how) as shown:
                failed = team.run(steps, done, shown, lambda step: _named(step, n), accept)
                if again and not failed:
                    failed = team.run(again, done, shown, lambda step: _named(step, n), accept)
            _refuse_failed(recipe.name, failed, differ)
            writer.finish()
    if verify is not None:
        say(f"verified: {len(differ)} batches were captured again, with the same sha256", sys.stderr)
    return open_run(place)


def _missing(writer: RunWriter, about: About) -> list[Step]:
    """What is left to do, longest prompts first: what does not fit the memory fails at once."""
    steps: list[Step] = []
    for batch in reversed(range(len(about.controlled))):
        if batch in writer.committed and about.controlled[batch] and writer.lacks(batch, "noise"):
            if writer.captured_on(batch) in (None, digest(about.numerics)):
                steps.append(("controls", batch))
                continue
            writer.drop([batch])  # its states are compared with what is captured here
        if batch not in writer.committed:
            steps.append(("batch", batch))
    return steps


def _notes(writer: RunWriter, about: About, mixed: bool) -> list[str]:
    """What to say before batches are captured. Raises SSTError if the others are of other hardware."""
    run, old = writer.folder.name, [b for b in writer.committed if writer.captured_on(b) is None]
    if not mixed:
        manifest.refuse_other_numerics(run, writer.manifest, about.numerics)
    unknown = f"run {run} does not say what {len(old)} of its batches were captured on: last bits may differ"
    return about.notes + ([unknown] if old else [])


def _named(step: Step, n: int) -> str:
    what, batch = step
    words = {"batch": "batch", "controls": "controls of batch", "again": "once more batch"}[what]
    return f"{words} {batch + 1} of {n}"


def _refuse_failed(run: str, failed: dict[Any, str], differ: dict[int, list[str]]) -> None:
    """Raise SSTError, with the numbers of batches that were skipped or are not what they were."""
    if failed:
        named = ", ".join(str(batch + 1) for batch in sorted({batch for _, batch in failed}))
        reason = next(iter(failed.values()))
        raise SSTError(
            f"run {run}: of batch {named} three attempts failed: {reason}",
            f"all others are kept; `sst-interp capture --run {run}` tries once more",
        )
    if other := {batch: files for batch, files in differ.items() if files}:
        files = ", ".join(file for files in other.values() for file in files)
        raise SSTError(
            f"run {run}: captured again here, {files} has another sha256",
            "other hardware, versions or threads give other last bits (numerics in manifest.json)",
        )


class Job:
    """A loaded model and a run's batches. Every worker of a capture has one.

    Args:
        model: instead of the recipe's checkpoint.
        progress: say what is loaded.
        owner: what the run's folder says of who writes it, for a worker that must see the same folder.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        model: StateStreamModel | None = None,
        progress: bool = False,
        owner: str | None = None,
    ) -> None:
        self.recipe, self.folder, self.owner = recipe, folder, owner
        self.questions = questions_of(recipe)
        if model is not None:
            refuse_other_model(model, recipe)
        else:
            if progress:
                say(f"loading {recipe.checkpoint} {recipe.placement.resolved()}", sys.stderr)
            how = {"kind": recipe.kind, "loop": recipe.loop, **recipe.placement.how()}
            model = load(recipe.checkpoint, recipe.alpha, recipe.choices, **how)
        self.model = model
        self.prompts = [prompt_tokens(model, q, recipe.reply_prefix) for q in self.questions.questions]
        lengths = [len(p) for p in self.prompts]
        check_room(model, max(lengths), recipe.max_new_tokens)
        if recipe.keep_layers is not None and recipe.keep_layers[-1] >= model.backbone.n_layers:
            said = f"keep_layers names layer {recipe.keep_layers[-1]} of {model.backbone.n_layers}"
            raise SSTError(said, f"layers are numbered 0 to {model.backbone.n_layers - 1}")
        self.batches = batches_of(lengths, recipe.batch_size)
        self.controls = Controls(model, recipe, len(lengths))
        self._watch: Watch | None = None

    def about(self) -> About:
        """What the run is of. Raises SSTError if a batch cannot fit the memory."""
        lengths = [len(p) for p in self.prompts]
        about = provenance(self.model, self.questions)
        controlled = [len(self.controls.chosen.intersection(rows)) for rows in self.batches]
        notes = preflight(self.model, self.recipe, lengths, self.folder)
        return About(about, numerics(self.model), controlled, notes)

    def __call__(self, step: Step, told: Callable[[int], Any]) -> Captured:
        """Do one step; `told` gets the positions."""
        what, batch = step
        if what == "controls":
            if self._watch is None or self._watch.batch != batch:  # of another session or worker
                self._captured(batch, lambda _: None)
            return Captured(self._controls(told), None, numerics(self.model))
        tables, states = self._captured(batch, told)
        if isinstance(states, dict) and self.recipe.keep == "all":
            name = f"{batch:04d}{'' if self.owner is None else f'.{uuid4().hex[:8]}'}.safetensors"
            with disk_errors(self.folder):
                (self.folder / "states").mkdir(exist_ok=True)
                sync(self.folder)
                states = stage_states(self.folder / "states" / name, states)
        if what == "again":
            tables |= self._controls(told)
        return Captured(tables, states, numerics(self.model))

    def _captured(self, batch: int, told: Callable[[int], Any]) -> tuple[dict[str, dict[str, Any]], States]:
        spool, rows = None, self.batches[batch]
        self._watch = self.controls.watch(batch, rows)
        if self.recipe.keep == "all":
            if self.owner is not None and not _says(self.folder / OWNER, self.owner):
                said = f"{self.folder} is not the run's folder there"
                raise Unfit(said, "put the runs on a file system that all machines share: SST_INTERP_RUNS")
            with disk_errors(self.folder):
                spool = Spool(self.folder)
        given = self.model, self.recipe, rows, self.questions, self.prompts, SimpleNamespace(update=told)
        with disk_errors(self.folder):
            return capture_batch(*given, self._watch, spool)

    def _controls(self, told: Callable[[int], Any]) -> dict[str, dict[str, Any]]:
        """The controls of the batch that was captured last."""
        watch, self._watch = self._watch, None
        return {} if watch is None else watch.tables(told)


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
    spool: Spool | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor | Spooled]]:
    """Generate one batch in all rollouts and measure it.

    Args:
        rows: the batch's questions, by index in the run.
        questions: the run's.
        prompts: token ids per question of the run.
        bar: told of each position (`update`).
        watch: the controls of this batch, if it has any, for afterwards.
        spool: takes the states of `keep = "all"`.

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
    recorder = Recorder(rows, recipe, questions.restricted, spool)
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
    answered, alive = recipe, decoder.alive
    if recipe.draws:
        answered, (texts, alive) = numbered(recipe), sampled(model, recipe, prompts)
    read = graded_replies(model, answered, asked, texts)
    if recipe.scoring in LIKELIHOOD:
        sums = score(model, stream, tokens[:, -1], choices, recipe.depths).sums
        read = drawn_choices(recipe, asked, sums[0]) if recipe.draws else graded_choices(asked, sums)
    if questions.restricted and not all(answer is None or SHOWN.fullmatch(answer) for answer, *_ in read):
        said = f"scorer {recipe.scoring!r} gives more than a letter or a number for a restricted dataset"
        raise SSTError(said, "answers are stored with the run, and its text must not be")
    about = [(row, question, len(prompt)) for row, question, prompt in zip(rows, asked, prompts, strict=True)]
    answers = answers_table(answered, about, read, texts, alive, certificate)
    if recipe.draws:
        answers |= {"draw": answers["depth"], "depth": [1] * len(answers["depth"])}
    elif recipe.scoring in LIKELIHOOD:
        parts = zip(asked, sums.split([question.n_choices for question in asked], dim=1), strict=True)
        answers["choice_scores"] = [choice_scores(q, own) for q, part in parts for own in part.tolist()]
    tables = {"questions": answers, **recorder.tables()}
    if watch is not None:
        watch.read(prompts, texts[1])
    return {name: columns for name, columns in tables.items() if columns}, recorder.states()


def _says(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except OSError:
        return False


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
    loop = None if recipe.loop is None else loop_of(model.backbone.n_layers, recipe.loop)
    if loop is not None and loop.config() != model.kind.config():
        raise SSTError(f"the model is {model.kind}, the recipe's loop {loop}", "attach it with the same loop")
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
