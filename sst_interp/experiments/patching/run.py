"""Patches of a run's questions, one after the other. Each question is kept when it is finished.

FOLDER/plan.json            what is patched, and of which run: another plan is refused
FOLDER/qQUESTION.parquet    the rows of one question (docs/patching.md)

Shipped patches of the same run and plan (`data/patching/RUN`) are copied and not made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sst_interp import paths
from sst_interp.analyses.contrast import Contrast
from sst_interp.errors import SSTError
from sst_interp.experiments.origin import origin_of, written_tokens
from sst_interp.experiments.patching.effects import Texts, TextStates, effects, read_text, spread
from sst_interp.files import check_place, put_in_place, read_json, read_table, replace_json, stage
from sst_interp.models.choices import whole
from sst_interp.models.model import StateStreamModel
from sst_interp.questions import graded
from sst_interp.questions.item import LIKELIHOOD
from sst_interp.questions.scoring import grade_by_likelihood
from sst_interp.runs import manifest
from sst_interp.runs.fleet import Fleet, each
from sst_interp.runs.provenance import choice_tokens, prompt_tokens
from sst_interp.runs.run import Run

ROLES = ("first", "shift", "stable", "random")
"""Why a position is patched. `first`: it is position 0. `shift`, `stable`: of the other positions, it has the
lowest, the highest mean overlap over layers. `random`: any other position."""
PLAN, SHARDS = "plan.json", "q*.parquet"
PLAN_LOST = "put a copy back, or delete the folder: its questions are then patched again"


@dataclass(frozen=True)
class Plan:
    """Which patches are made."""

    layers: int = 6
    """How many single layers, spread evenly, the last among them."""
    windows: int = 5
    """Into how many windows all layers are cut."""
    new_tokens: int = 6
    """Tokens written after the patched position's."""
    seed: int = 0
    """Of the order of questions, the random positions and the random directions."""


def patch_run(
    run: Run,
    folder: str | Path,
    questions: int = 40,
    plan: Plan | None = None,
    model: StateStreamModel | None = None,
    progress: Callable[[int, int], Any] | None = None,
    fleet: Fleet | None = None,
) -> pd.DataFrame:
    """Patch questions of a run that the folder does not have yet.

    Args:
        run: with a depth above 1 and its tokens.
        questions: how many, in an order of the plan's seed: more of them go on from fewer.
        model: the run's model, if it is loaded already; None loads what the recipe names.
        fleet: workers that patch questions side by side; None is this process.

    Returns:
        All rows (docs/patching.md).

    Raises:
        SSTError: no tokens or one depth only in the run, a model or questions that are not the run's,
            a folder with another plan, with a damaged file or that cannot be written.
    """
    plan, folder = plan or Plan(), Path(folder)
    for name, value in (asdict(plan) | {"seed": 1, "questions": questions}).items():
        whole(name, value, 1)
    check_place(folder, "give another --out")
    overlaps, threshold = overlaps_of(run)
    known = sorted(overlaps)
    order = [known[k] for k in np.random.default_rng(plan.seed).permutation(len(known))]
    chosen = order[:questions]
    written_tokens(run, chosen[0], 1)  # a restricted run is refused before anything is loaded
    _same_plan(folder, run, plan, threshold)
    if any(folder.glob(SHARDS)):
        read_patching(folder)  # a damaged file is refused before minutes of patching
    missing = [q for q in chosen if not _shard(folder, q).is_file()]
    if missing:
        after = dict(zip(order, [*order[1:], order[0]], strict=True))
        kept = [q for q in chosen if q not in missing]

        def done(pair: tuple[int, int], rows: pd.DataFrame) -> None:
            stage(_shard(folder, pair[0]), rows.to_parquet)
            put_in_place(_shard(folder, pair[0]))
            kept.append(pair[0])
            if progress is not None:
                progress(len(kept), len(chosen))

        if progress is not None:
            progress(len(kept), len(chosen))
        bare = run if fleet is None else replace(run)  # a worker reads the tables itself
        make = partial(_Patching, bare, plan, threshold, overlaps, model)
        each(fleet, make, [(q, after[q]) for q in missing], done, lambda pair: f"question {pair[0]}")
    if progress is not None:
        progress(len(chosen), len(chosen))
    return read_patching(folder)


def read_patching(folder: str | Path) -> pd.DataFrame:
    """All rows in a folder; `attrs` has the plan. Raises SSTError if there are none or a file is damaged."""
    shards = sorted(Path(folder).glob(SHARDS))
    if not shards:
        raise SSTError(f"{folder} holds no patched questions", "`sst-interp patch --run NAME` makes them")
    again = "delete it: only that question is patched again"
    columns = ("question", "position", "role")
    table = pd.concat([read_table(shard, again, columns) for shard in shards], ignore_index=True)
    table.attrs |= read_json(Path(folder) / PLAN, PLAN_LOST)
    return table


def overlaps_of(run: Run) -> tuple[dict[int, pd.DataFrame], float]:
    """Question -> overlaps [position, layer], teacher-forced, depth 1 against the deepest; the threshold."""
    c = Contrast.of(run, "teacher_forced")
    table = c.rows[["question", "position", "layer"]].assign(overlap=c.overlap)
    wide = table.pivot(index=["question", "position"], columns="layer", values="overlap")
    by_question: dict[int, Any] = {int(q): wide.xs(q) for q in wide.index.unique(level=0)}
    return by_question, float(c.threshold)


def positions_of(overlaps: pd.DataFrame, last: int, key: Sequence[int]) -> dict[str, int]:
    """Role -> position. A short text lacks some roles.

    Args:
        overlaps: [position, layer] of one question.
        last: the last position that may be patched.
        key: decides the random position.
    """
    mean = overlaps.mean(axis=1)
    mean = mean[(mean.index <= last) & mean.notna()]
    later = mean[mean.index > 0].sort_values(kind="stable")
    roles = {"first": 0} if 0 in mean.index else {}
    if len(later) >= 1:
        roles["shift"] = int(later.index[0])
    if len(later) >= 2:
        roles["stable"] = int(later.index[-1])
    if len(later) >= 3:
        roles["random"] = int(np.random.default_rng(key).choice(sorted(later.index[1:-1])))
    return roles


class _Patching:
    """Patches one question after the other; `other` and `stranger` vectors are the next question's."""

    def __init__(
        self,
        run: Run,
        plan: Plan,
        threshold: float,
        overlaps: dict[int, pd.DataFrame],
        model: StateStreamModel | None,
    ) -> None:
        self.run, self.plan, self.threshold, self.overlaps = run, plan, threshold, overlaps
        self.model, self.asked = origin_of(run, model)
        self.depth = max(run.recipe.depths)
        self.layers = spread(self.model.backbone.n_layers, plan.layers)
        self._readings: dict[int, TextStates] = {}

    def __call__(self, pair: tuple[int, int], told: Callable[[int], Any]) -> pd.DataFrame:
        """Every row of one question; the other is the one whose states stand in as a stranger's."""
        question, stranger = pair
        plan, tokens = self.plan, written_tokens(self.run, question, 1)
        reading, other = self._reading(question), self._reading(stranger)
        self._readings = {q: r for q, r in self._readings.items() if q in (question, stranger)}
        overlaps, rows = self.overlaps[question], []
        for role, position in positions_of(overlaps, len(tokens) - 1, (plan.seed, question)).items():
            effect, texts = effects(
                self.model, reading, other, position, self.layers, plan.windows, plan.new_tokens,
                (plan.seed, question), choice_tokens(self.model, self.asked[question]),
            )  # fmt: skip
            every = range(self.model.backbone.n_layers)  # a layer that runs once has no pair: it stays
            own = overlaps.loc[[position]].reindex(columns=every, fill_value=1.0).to_numpy(dtype=float)[0]
            answer = cache(partial(self._answer, question, tokens[:position]))  # most texts are alike
            for row, written in zip(effect, texts, strict=True):
                answers = self._likeliest(question, written)
                if self.run.recipe.scoring not in LIKELIHOOD:
                    answers = [answer(tuple(text)) for text in written[:3]]
                answered = row["continued"] and answers is not None
                patched, base, donor = answers or ("", "", "")
                here = own[row["first"] : row["last"] + 1]
                rows.append(
                    {
                        "question": question,
                        "position": position,
                        "role": role,
                        **row,
                        "overlap": float(here.mean()),
                        "shifted": float((here < self.threshold).mean()),
                        "position_shifted": float((own < self.threshold).mean()),
                        "answer_changed": float(patched != base) if answered else nan,
                        "answer_donors": float(patched == donor) if answered else nan,
                        "answers_differ": float(base != donor) if answered else nan,
                    }
                )
        return pd.DataFrame(rows)

    def _reading(self, question: int) -> TextStates:
        if question not in self._readings:
            prompt = prompt_tokens(self.model, self.asked[question], self.run.recipe.reply_prefix)
            written = written_tokens(self.run, question, 1)
            self._readings[question] = read_text(self.model, prompt, written, self.depth)
        return self._readings[question]

    def _likeliest(self, question: int, written: Texts) -> list[str | None] | None:
        """The likeliest choices of the patched row, the base and the donor; None after position 0."""
        asked = self.asked[question]
        if written.sums is None:
            return None
        return [grade_by_likelihood(asked, sums)[0].answer for sums in written.sums]

    def _answer(self, question: int, before: Sequence[int], new: Sequence[int]) -> str | None:
        """The answer in the text so far."""
        asked = self.asked[question]
        stops = [k for k, token in enumerate(new, 1) if token in self.model.stop_tokens]
        tokens = [*before, *new[: stops[0] if stops else len(new)]]
        reply = self.run.recipe.reply_prefix or ""
        reply += self.model.tokenizer.decode(tokens, skip_special_tokens=True)
        return graded(asked, reply).answer


def _same_plan(folder: Path, run: Run, plan: Plan, threshold: float) -> None:
    """Refuse a folder with rows of anything else; note all that the rows depend on. Copy shipped ones."""
    now = {k: v for k, v in run.manifest["provenance"].items() if k.endswith("_hash")}
    now |= {"run": run.name, "plan": asdict(plan), "threshold": threshold, "depth": max(run.recipe.depths)}
    now |= {"recipe": run.manifest["recipe_fingerprint"], "capture": manifest.content_hash(run.manifest)}
    path = folder / PLAN
    if path.is_file():
        then = read_json(path, PLAN_LOST)
        if other := [key for key in now | then if now.get(key) != then.get(key)]:
            raise SSTError(
                f"{folder} holds patches of another plan or run: {', '.join(other)} differ",
                "delete it, or give another --out",
            )
    elif any(folder.glob(SHARDS)):
        raise SSTError(f"{path} is missing", PLAN_LOST)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(path, now)
    done = shipped_patches(run.name)
    if (done / PLAN).is_file() and read_json(done / PLAN, PLAN_LOST) == now:
        for shard in done.glob(SHARDS):
            if not (folder / shard.name).is_file():
                stage(folder / shard.name, lambda path, source=shard: shutil.copyfile(source, path))
                put_in_place(folder / shard.name)


def shipped_patches(name: str) -> Path:
    """The folder of a shipped run's patches; it may not exist."""
    return paths.shipped("patching") / name


def _shard(folder: Path, question: int) -> Path:
    return folder / f"q{question:05d}.parquet"
