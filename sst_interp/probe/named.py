"""The halting probe of a run by its name: what `sst-interp probe` calls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sst_interp.analyses.halting import PERMUTATIONS, Halting, halting_of
from sst_interp.analyses.parts.answers import answers_of
from sst_interp.analyses.parts.probe_validation import Progress, at_chance
from sst_interp.analyses.routing import Routing, routing_of
from sst_interp.errors import SSTError
from sst_interp.guarded import check_place
from sst_interp.probe.design import Design
from sst_interp.probe.features import position0, usable_layers
from sst_interp.probe.labels import halting_labels
from sst_interp.probe.saving import HaltingProbe, train_probe
from sst_interp.runs import open_run

if TYPE_CHECKING:
    from sst_interp.run import Run


class Probed(NamedTuple):
    """Everything the command has to show."""

    halting: Halting
    """What the probe tells, and what it is worth."""
    routing: Routing
    """What routing by it would do to accuracy and cost."""
    probe: HaltingProbe
    """The probe itself, trained on every question."""


def layer_of(text: str | int | None) -> int | None:
    """`auto` or a layer's number, as typed; None: chosen inside each fold.

    Raises:
        SSTError: anything else.
    """
    if text is None or text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise SSTError(f"layer {text!r} is neither auto nor a number", "for example --layer 15") from None


def probe_run(
    run: Run | str,
    label: str = "must-halt",
    layer: str | int | None = "auto",
    permutations: int = PERMUTATIONS,
    design: Design | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> Probed:
    """Validate a halting probe on a run, route by it, train it, and keep it.

    Args:
        run: a captured run, or its name.
        label: what is to be told (`probe.labels.RULES`).
        layer: `auto` or a number.
        permutations: of the labels.
        design: the kind of probe and its candidates.
        save: a folder to keep the probe in.
        progress: called with (what, done, of).

    Raises:
        SSTError: an unknown run or label, labels all equal, a class of fewer than two questions, a layer or
            states that were not captured, constant features, a place where nothing can be saved.
    """
    run = open_run(run) if isinstance(run, str) else run
    if save is not None:
        check_place(Path(save), "give another --save")
    asked = layer_of(layer)
    if not len(run.questions):
        raise SSTError(f"run {run.name} has no questions", f"`sst-interp capture --run {run.name}`")
    answers = answers_of(run.questions)
    labels = halting_labels(answers, label)
    features = position0(run, labels.questions)
    design = replace(design or Design(), layers=usable_layers(features, asked))
    found = halting_of(features, labels, asked, design, permutations, progress=progress)
    found = replace(found, at_chance=at_chance(answers, label))
    said = {"auc": found.auc.estimate, "p": found.p_auc, "hits": found.hits, "positive": found.n_positive}
    said |= {"called": found.called, "questions": found.n_questions, "permutations": permutations}
    evidence = {name: value if value == value else None for name, value in said.items()}
    seen = {"run": run.name, "reply_prefix": run.recipe.reply_prefix}
    probe = train_probe(run, features, labels, design, seen | evidence)
    if save is not None:
        probe.save(save)
    return Probed(found, routing_of(run, found), probe)
