"""The study `two-pass`: what a fixed number of sweeps leaves of the exact states, on given text.

Training computes states by a pass without the blend and a few sweeps (`models.solvers.sweeps`). Here the same
text is also solved exactly, and the two are compared position by position: sums per question and bin of
positions, from which `errors` computes everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from sst_interp.errors import SSTError
from sst_interp.experiments.studies import errors
from sst_interp.experiments.studies.fit import Schedule
from sst_interp.experiments.studies.study import Finding, Progress, Study, register_study
from sst_interp.experiments.table import Table
from sst_interp.files import check_place
from sst_interp.models.checkpoint import checkpoint_folder, read_checkpoint
from sst_interp.models.kinds.sst import PAPER_ALPHA, LayerBlend
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.models.solvers.layerwise import solve_layerwise
from sst_interp.models.solvers.sequential import advance, relative_change
from sst_interp.models.solvers.sweeps import solve_by_sweeps
from sst_interp.models.stream import Recurrence
from sst_interp.questions.datasets import load_items
from sst_interp.training.data import Example, encode

TWO_PASSES = tuple(Schedule(sweeps=k) for k in (1, 2, 4, 8))
"""A pass without the blend and 1, 2, 4 or 8 sweeps. Two-pass training is the first."""
CYCLIC = tuple(Schedule(groups=g, sweeps=k) for g in (2, 4, 8) for k in (1, 2, 4))
"""The same numbers of passes in cyclic groups."""
TOLERANCE = 1e-6
"""Of the layerwise solution that is taken as exact: a unit of float32's rounding."""
SUMS = ("error2", "norm2", "relative", "state", "argmax", "kl", "tokens", "loss", "loss_exact")
"""The columns of `measure_errors` that are sums over the positions of a bin."""
KEYS = ("method", "groups", "sweeps", "reference", "question", "id", "position", "positions")
"""Its other columns."""
NAMED = ("model", "layers", "alpha", "alpha_low", "alpha_high")
BLEND = ("model", "layers", "n_layers", "alpha", "alpha_low", "alpha_high", "blend_hash")
"""The columns that say which blend was measured."""

Reference = Literal["layerwise", "sequential"]
Where = Literal["all", "first", "last", "spread"]


@dataclass(frozen=True)
class Condition:
    """A blend with the same weight in some layers and none in the others.

    So L, the number of layers that blend, varies on one backbone, independently of alpha.
    """

    alpha: float
    where: Where = "all"
    """`spread`: evenly over the stack."""
    n: int = 0
    """How many layers; left out with `all`."""
    schedules: tuple[Schedule, ...] = TWO_PASSES

    @property
    def layers(self) -> str:
        """Which layers, in words."""
        return self.where if self.where == "all" else f"{self.n} {self.where}"

    def weights(self, n_layers: int) -> Float[Tensor, " layer"]:
        """Alpha of every layer."""
        weights = torch.zeros(n_layers, dtype=torch.float64)
        weights[switched_on(n_layers, self.where, self.n)] = self.alpha
        return weights


def switched_on(n_layers: int, where: Where, n: int = 0) -> list[int]:
    """The layers that blend. `spread` takes the middle of each of `n` equal parts of the stack."""
    if where == "all":
        return list(range(n_layers))
    if not 1 <= n <= n_layers:
        raise SSTError(f"{n} layers cannot blend in a stack of {n_layers}", f"give 1 to {n_layers}")
    if where == "spread":
        return [int((k + 0.5) * n_layers / n) for k in range(n)]
    return list(range(n)) if where == "first" else list(range(n_layers - n, n_layers))


def grid(n_layers: int, alphas: Sequence[float] = (0.005, 0.01, 0.027, 0.05, 0.1)) -> list[Condition]:
    """The blends of an untrained backbone: every alpha in all layers, and some in a third or a tenth."""
    third, tenth = max(1, n_layers // 3), max(1, n_layers // 10)
    few = TWO_PASSES[:3]  # enough for the size of the two-pass error and its contraction
    blends = [Condition(a, schedules=TWO_PASSES if a > 0.01 else few) for a in alphas if a != PAPER_ALPHA]
    blends.append(Condition(PAPER_ALPHA, schedules=TWO_PASSES + CYCLIC))
    blends += [Condition(a, "spread", third, few) for a in alphas if a >= 0.01]
    blends += [Condition(a, "spread", tenth, few) for a in (PAPER_ALPHA, max(alphas))]
    return [*blends, *(Condition(PAPER_ALPHA, where, third, few) for where in ("first", "last"))]


@register_study
class TwoPass(Study):
    """Errors of sweeps on real text, model by model.

    A backbone is measured without training, for every condition; a trained checkpoint with its own blend, and
    then that blend on the backbone alone: the difference is what co-training has done to the error.
    """

    name = "two-pass"
    question = "How far are the states of two passes, and of a few more, from the exact ones on real text?"
    page = "docs/approximation.md"
    options = ("model", "questions", "verify")
    tables = {  # noqa: RUF012
        "errors": Table("errors.parquet", (*NAMED, "method", "groups", "sweeps", "reference", "question"))
    }
    findings = (
        Finding(
            "errors",
            lambda rows: errors.approximation_error(rows["errors"]),
            {"two-pass": errors.two_pass, "sweeps": errors.by_sweeps, "groups": errors.by_groups},
        ),
        Finding(
            "contraction",
            lambda rows: errors.contraction(rows["errors"]),
            {"contraction": errors.rates_table},
        ),
    )

    def __init__(self, conditions: Sequence[Condition] | None = None) -> None:
        self.conditions = conditions
        """Of a backbone; None for `grid`."""

    def run(
        self,
        folder: str | Path,
        *,
        model: str | None = None,
        questions: int = 8,
        verify: bool = False,
        data: str = "gsm8k",
        progress: Progress | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Measure what is missing, in float32.

        Args:
            model: a backbone or a checkpoint, by name or folder.
            questions: texts, the first of the data: questions with their worked answers.
            verify: compare the first text with the sequential solution, too.
            data: a name of `questions.known_datasets()` whose records have worked answers.
            progress: called with (what is measured, texts done, in all).

        Raises:
            SSTError: no model or an unknown one, or a table that holds another model of that name.
        """
        if model is None:
            raise SSTError(
                "two-pass is measured on a model", f"sst-interp study run {self.name} smollm2-135m"
            )
        check_place(Path(folder), "give another --out")
        self.read(folder)  # a damaged table is refused before anything is loaded
        loaded, label, trained = load(model, dtype="float32"), Path(model).name, checkpoint_folder(model)
        examples = [encode(item, loaded) for item in load_items(data)[0][:questions]]
        for blended, name, layers, schedules in self._blends(loaded, label, model, trained):
            about = blend_of(blended, name, layers)
            words = f"{name}, alpha {about['alpha']:.4g} in {about['n_layers']} layers ({layers})"
            several = about["alpha_low"] == about["alpha_high"]  # one of several blends of one backbone
            names = ["model", "layers", *(["alpha"] if several else [])]
            self.tables["errors"].refuse_another(folder, about, names, "blend_hash")
            for number, example in enumerate(examples):
                self._measure(folder, blended, about, number, example, schedules, "layerwise")
                if verify and number == 0:
                    self._measure(folder, blended, about, number, example, schedules[:1], "sequential")
                if progress is not None:
                    progress(words, number + 1, len(examples))
            verify = False
        return self.read(folder)

    def _blends(
        self, model: StateStreamModel, label: str, name: str, trained: Path | None
    ) -> Iterator[tuple[StateStreamModel, str, str, Sequence[Schedule]]]:
        """(model with the blend, its label, blended layers, schedules) of everything measured by a name."""
        if trained is None:
            backbone = model.backbone
            for condition in grid(backbone.n_layers) if self.conditions is None else self.conditions:
                alpha = condition.weights(backbone.n_layers)
                blended = StateStreamModel(backbone, LayerBlend(alpha), model.tokenizer, model.choices, name)
                yield blended, label, condition.layers, condition.schedules
            return
        yield model, label, "all", TWO_PASSES + CYCLIC
        config, kind, _ = read_checkpoint(trained, "sst")
        bare = load(config["backbone"]["name"], kind.weights()["alpha"], model.choices, "float32")
        yield bare, f"{label}, blend only", "all", TWO_PASSES

    def _measure(
        self,
        folder: str | Path,
        model: StateStreamModel,
        about: dict[str, Any],
        number: int,
        example: Example,
        schedules: Sequence[Schedule],
        reference: Reference,
    ) -> None:
        """One text, unless the table has all of it."""
        table = self.tables["errors"]
        how = {"method": "sweeps", "reference": reference, "question": number}
        jobs = [about | how | {"groups": s.groups, "sweeps": s.sweeps} for s in schedules]
        if any(table.missing(folder, jobs)):
            rows = measure_errors(model, [example], schedules, reference, number)
            table.put(folder, rows.assign(**about)[[*BLEND, *rows.columns]])


def blend_of(model: StateStreamModel, label: str, layers: str) -> dict[str, Any]:
    """The columns `BLEND`. The hash is of backbone and blend: a checkpoint that is trained on is another.

    Raises:
        SSTError: the model has no blend.
    """
    alpha = model.alpha
    on = alpha[alpha.any(dim=1)]
    if not len(on):
        raise SSTError(f"{label} has no blend", "an error needs an alpha above 0")
    digest = hashlib.sha256(model.backbone.content_hash.encode())
    digest.update(alpha.to(torch.float32).cpu().numpy().tobytes())
    ends = (on.double().mean(), on.min(), on.max())
    values = [label, layers, len(on), *(round(float(end), 6) for end in ends), digest.hexdigest()[:16]]
    return dict(zip(BLEND, values, strict=True))


class Outputs(NamedTuple):
    """What is compared of one text, position by position."""

    logits: Float[Tensor, "position vocab"]
    states: Float[Tensor, "layer position d_model"]


def measure_errors(
    model: Recurrence,
    examples: Sequence[Example],
    schedules: Sequence[Schedule] = TWO_PASSES,
    reference: Reference = "layerwise",
    first_question: int = 0,
) -> pd.DataFrame:
    """Errors of every schedule on every example against the exact states, one iteration per position.

    Args:
        model: with a stream; float32 or wider, or rounding is measured.
        examples: conversations with an answer.
        schedules: what is compared; of each, groups and sweeps count.
        reference: how the exact states are computed; `sequential` is the definition and slow, and adds rows
            for the layerwise solution itself (method `layerwise`).
        first_question: number of the first example.

    Returns:
        A row per (schedule, question, bin of positions), with sums over the bin: `error2` and `norm2`
        (squared L2 of the logits' difference and of the exact logits), `relative` (relative L2 of the
        logits), `state` (relative L2 of the layer outputs, mean over layers), `argmax` (most likely tokens
        that differ), `kl` (of the exact next-token distribution from the approximate one, nats); and over the
        `tokens` of the answer that are predicted there `loss` and `loss_exact` (nats).

    Raises:
        SSTError: no examples, or states that overflow.
    """
    if not examples:
        raise SSTError("there are no examples to measure errors on", "give at least one")
    parts = []
    for number, example in enumerate(examples, first_question):
        tokens = torch.tensor([example.tokens], device=model.backbone.device)
        answer = torch.zeros(tokens.shape[1], dtype=torch.bool, device=tokens.device)
        answer[example.prompt - 1 : -1] = True
        exact = outputs_of(model, tokens, reference)
        check: list[Any] = ["layerwise"] if reference == "sequential" else []
        for how in [*check, *schedules]:
            rows = compare(exact, outputs_of(model, tokens, how), tokens[0], answer)
            named = ("layerwise", 0, 0) if how == "layerwise" else ("sweeps", how.groups, how.sweeps)
            about = dict(zip(("method", "groups", "sweeps"), named, strict=True))
            parts.append(rows.assign(**about, reference=reference, question=number, id=example.id))
    narrow = {"groups": "int16", "sweeps": "int16", "question": "int32", "position": "int32"}
    narrow |= {"positions": "int32", "argmax": "int32", "tokens": "int32"}
    return pd.concat(parts, ignore_index=True)[[*KEYS, *SUMS]].astype(narrow)


@torch.no_grad()
def outputs_of(model: Recurrence, tokens: Int[Tensor, "1 position"], how: Reference | Schedule) -> Outputs:
    """The states of one text: token by token, solved layer by layer to a tight tolerance, or by sweeps."""
    first = torch.zeros(1, dtype=torch.long, device=tokens.device)
    stream = model.new_stream(first, tokens.shape[1])
    if how == "sequential":
        steps = [advance(model, stream, tokens[:, t], 1)[0].resid_post for t in range(tokens.shape[1])]
        states = torch.stack(steps, dim=2)[:, 0]
    else:
        if isinstance(how, Schedule):
            solved = solve_by_sweeps(model, stream, tokens, groups=how.groups, sweeps=how.sweeps)
        else:
            solved = solve_layerwise(model, stream, tokens, tolerance=TOLERANCE)
        assert solved.resid_post is not None
        states = solved.resid_post[:, 0, :, 0]
    wide = torch.promote_types(states.dtype, torch.float32)
    return Outputs(model.backbone.unembed(states[-1]).to(wide), states)


def compare(
    exact: Outputs, approximate: Outputs, tokens: Int[Tensor, " position"], answer: Bool[Tensor, " position"]
) -> pd.DataFrame:
    """The sums of `measure_errors` by bin of positions.

    `answer` marks the positions whose next token is part of the answer.
    """
    a, b = exact.logits, approximate.logits
    error2, norm2 = (a - b).double().square().sum(-1), a.double().square().sum(-1)
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    targets = tokens.roll(-1)
    columns = {
        "error2": error2,
        "norm2": norm2,
        "relative": (error2 / norm2).sqrt(),
        "state": relative_change(exact.states, approximate.states).mean(0),
        "argmax": a.argmax(-1) != b.argmax(-1),
        "kl": (log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0),
        "tokens": answer,
        "loss": cross_entropy(b, targets, reduction="none") * answer,
        "loss_exact": cross_entropy(a, targets, reduction="none") * answer,
    }
    return by_position({name: value.double() for name, value in columns.items()})


def by_position(columns: Mapping[str, Float[Tensor, " position"]]) -> pd.DataFrame:
    """Sums over bins of positions: 0 | 1 | 2, 3 | 4 to 7 | 8 to 15 | ...

    `position` is the first of a bin, and `positions` how many it has.
    """
    n = len(next(iter(columns.values())))
    bins = np.frexp(np.arange(n))[1]
    starts = np.append(0, 2 ** np.arange(int(bins[-1])))
    sums = {name: np.bincount(bins, value.cpu().numpy()) for name, value in columns.items()}
    return pd.DataFrame({"position": starts, "positions": np.bincount(bins)} | sums)
