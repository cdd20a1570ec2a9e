"""The study `lrt-equivalence`: how far an LRT's schedules are from sequential unrolling.

Interleaved and multi-refine passes (`training.schedules`) are compared on one text with the definition, exact
back-propagation through time token by token: in states, in the loss and in gradients. Equivalence was claimed
for them (arXiv 2605.26797) and not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.experiments.studies import tables as written
from sst_interp.experiments.studies.arms import EXACT, INTERLEAVED, LRT_SCHEDULES, Schedule
from sst_interp.experiments.studies.fit import label_loss, label_loss_of_passes
from sst_interp.experiments.studies.flipflop import LrtPlan, lrt_training, pretrained
from sst_interp.experiments.studies.gradients import EVERY_PASS, NEWEST, latent_equivalence
from sst_interp.experiments.studies.study import Finding, Progress, Study, register_study
from sst_interp.experiments.studies.tasks import Labelled
from sst_interp.experiments.studies.two_pass import by_position
from sst_interp.experiments.table import Table
from sst_interp.files import check_place
from sst_interp.models.checkpoint import add_adapters, checkpoint_folder, trainable
from sst_interp.models.kinds.lrt import MemoryDesign, build_memory
from sst_interp.models.loading import load
from sst_interp.models.model import StateStreamModel
from sst_interp.models.stream import Kind
from sst_interp.training.data import encode, make_batch, read_items
from sst_interp.training.objective import Pass, answer_loss, mean_over_passes, newest, run_passes

SMALL = "small"
"""The name of the small LRT that is trained on the spot."""
RANK = 16
"""Of the adapters whose gradient is compared: fresh ones, with B = 0, as training starts with them. The
gradient of B is that of the weights seen through a random projection."""


@register_study
class LrtEquivalence(Study):
    """Schedules of an LRT against sequential unrolling, in states, loss and gradients."""

    name = "lrt-equivalence"
    question = "Are an LRT's training schedules equivalent to sequential unrolling?"
    page = "docs/lrt.md"
    options = ("model", "questions", "sizes")
    tables = {  # noqa: RUF012
        "states": Table("latent-states.parquet", ("model", "memory", "id", "method", "n")),
        "gradients": Table("latent-gradients.parquet", ("model", "memory", "id", "method", "n")),
    }
    findings = (
        Finding(
            "latent equivalence",
            lambda rows: latent_equivalence(rows["states"], rows["gradients"]),
            {
                "latent states": written.latent_states,
                "latent positions": written.latent_positions,
                "latent gradients": written.latent_gradients,
            },
        ),
    )

    def __init__(self, plan: LrtPlan | None = None, schedules: Sequence[Schedule] = LRT_SCHEDULES) -> None:
        self.plan = LrtPlan() if plan is None else plan
        """Of the small model."""
        self.schedules = schedules

    def run(
        self,
        folder: str | Path,
        *,
        model: str | None = None,
        questions: int = 4,
        sizes: Sequence[float] = (0.005, 0.02),
        data: str = "gsm8k",
        progress: Progress | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Measure what is missing, question by question, in float32.

        Args:
            folder: where the tables are; what they have is kept.
            model: a checkpoint of a Latent Recurrent Transformer; a backbone, which is given random memories;
                or `small`, the model of the study `lrt-schedules`, trained exactly and interleaved.
            questions: texts, the shortest of the data; of `small`, sequences.
            sizes: of a backbone's random memories.
            data: questions with worked answers (`training.examples.read_items`).
            progress: called with (what is measured, texts done, in all).

        Raises:
            SSTError: no model or an unknown one, a checkpoint of the other kind, or a folder that holds
                another model of that name.
        """
        if model is None:
            raise SSTError("equivalence is measured on a model", f"sst-interp study run {self.name} {SMALL}")
        check_place(Path(folder), "give another --out")
        self.read(folder)
        for size in sizes:
            if not 0 < size < float("inf"):
                raise SSTError(f"size = {size} of a random memory is not above 0", "for example 0.005")
        for label, memory, measured, texts, weights in self._models(model, questions, sizes, data):
            about = {"model": label, "memory": memory, "fingerprint": measured.kind.digest()[:16]}
            for number, text in enumerate(texts, 1):
                self.tables["gradients"].refuse_another(folder, about, ["model", "memory"], "fingerprint")
                asked = [s for s in self.schedules if _fits(s, text)]
                jobs = [about | {"id": text.id, "method": s.method, "n": s.n} for s in asked]
                if any(self.tables["gradients"].missing(folder, jobs)):
                    compared = compare_schedules(measured, text, weights, self.schedules)
                    self.tables["states"].put(folder, compared.states.assign(**about))
                    self.tables["gradients"].put(
                        folder, compared.gradients.assign(**about)
                    )  # last: both are there
                if progress is not None:
                    progress(f"{label}, {memory}", number, len(texts))
        return self.read(folder)

    def _models(
        self, name: str, questions: int, sizes: Sequence[float], data: str
    ) -> Iterator[tuple[str, str, StateStreamModel, list[Sample], Mapping[str, Tensor]]]:
        """(label, memory in words, model, texts, weights whose gradient is compared) of all by a name."""
        if name == SMALL:
            for arm in (EXACT, INTERLEAVED):
                model = lrt_training(self.plan, pretrained(self.plan.small, 0), arm, 0).finish()
                weights = dict(model.backbone.model.named_parameters())
                yield SMALL, f"trained, {arm.name}", model, sequences(model, self.plan, questions), weights
            return
        if checkpoint_folder(name) is not None:
            model, label = load(name, dtype="float32", kind="lrt"), Path(name).name
            texts, weights = shortest_texts(model, questions, data), _adapters(model)
            yield label, "trained", model, texts, weights
            return
        if not sizes:
            raise SSTError(f"{name} has no memory", "give sizes of random ones, for example 0.005")
        model = load(name, alpha=0.0, dtype="float32")
        texts, weights = shortest_texts(model, questions, data), _adapters(model)
        for size in sizes:
            model.kind = random_memory(model, size)
            yield name, f"random, size {size:g}", model, texts, weights


@dataclass(frozen=True)
class Sample:
    """One text, and what is minimised on it."""

    id: str
    tokens: Int[Tensor, "1 position"]
    loss: Callable[[Float[Tensor, "1 position d_model"]], Tensor]
    """Mean loss in nats, from the last layer's outputs."""
    loss_of_passes: Callable[[Sequence[Pass]], Tensor]
    """The same, mean over passes: what the schedule trains on."""


class Compared(NamedTuple):
    """Tables of one text."""

    states: pd.DataFrame
    """A row per schedule and bin of positions: sums of `error2` and `norm2` (squared L2 of the last layer's
    difference and of the exact one) and `relative` (relative L2 error)."""
    gradients: pd.DataFrame
    """A row per schedule, loss (`newest outputs`, `every pass`) and part (`weights`, `memory`, and each of
    the memory's own): `cosine` with the exact gradient, `norm_ratio` (over the exact one's norm), and the
    losses `loss` and `loss_exact` (nats)."""


def compare_schedules(
    model: StateStreamModel,
    text: Sample,
    weights: Mapping[str, Tensor],
    schedules: Sequence[Schedule] = LRT_SCHEDULES,
) -> Compared:
    """Every schedule against sequential unrolling, at the same weights and on the same text.

    Args:
        model: a Latent Recurrent Transformer; float32 or wider, or rounding is measured.
        text: what is read and minimised.
        weights: those of the backbone (or of adapters on it) whose gradient is compared.
        schedules: which; those with more groups than positions are left out.
    """
    kept = model.kind
    memory = {name: w.detach().clone().requires_grad_() for name, w in kept.weights().items()}
    model.kind = kept.with_weights(dict(memory))
    parts = {"weights": list(weights.values()), **{name: [w] for name, w in memory.items()}}
    try:
        exact = newest(run_passes(model, text.tokens, "sequential"))
        loss = text.loss(exact)
        true, loss_exact = _gradient(loss, parts, keep=False), float(loss.detach())
        exact, states, gradients = exact.detach()[0], [], []
        for schedule in [s for s in schedules if _fits(s, text)]:
            passes = run_passes(model, text.tokens, *schedule)
            last = newest(passes)
            about = {"id": text.id, "method": schedule.method, "n": schedule.n}
            error2, norm2 = (x.double().square().sum(-1) for x in (last.detach()[0] - exact, exact))
            sums = {"error2": error2, "norm2": norm2, "relative": (error2 / norm2).sqrt()}
            states.append(by_position(sums).assign(**about))
            for name, value, keep in (
                (NEWEST, text.loss(last), True),
                (EVERY_PASS, text.loss_of_passes(passes), False),
            ):
                losses = {"of": name, "loss": float(value.detach()), "loss_exact": loss_exact}
                gradient = _gradient(value, parts, keep)
                gradients += [about | losses | row for row in _against(gradient, true, list(memory))]
    finally:
        model.kind = kept
    return Compared(pd.concat(states, ignore_index=True), pd.DataFrame(gradients))


def _fits(schedule: Schedule, text: Sample) -> bool:
    return schedule.method != "interleaved" or schedule.n <= text.tokens.shape[1]


def _gradient(loss: Tensor, parts: Mapping[str, Sequence[Tensor]], keep: bool) -> dict[str, list[Tensor]]:
    """The gradient by part; `keep` leaves the graph for another one."""
    wanted = [w for part in parts.values() for w in part]
    gradients = iter(torch.autograd.grad(loss, wanted, retain_graph=keep, materialize_grads=True))
    return {name: [next(gradients) for _ in part] for name, part in parts.items()}


def _against(
    gradient: dict[str, list[Tensor]], true: dict[str, list[Tensor]], memory: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Cosine and norm ratio by part; the memory's weights also all together."""

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))

    products = {
        name: np.array([dot(own, own), dot(true[name], true[name]), dot(own, true[name])])
        for name, own in gradient.items()
    }
    products["memory"] = np.sum([products[name] for name in memory], axis=0)
    for name, (own, theirs, both) in products.items():
        cosine = both / np.sqrt(own * theirs) if own > 0 and theirs > 0 else np.nan
        yield {"part": name, "cosine": cosine, "norm_ratio": np.sqrt(own / theirs) if theirs > 0 else np.nan}


def _adapters(model: StateStreamModel) -> dict[str, torch.nn.Parameter]:
    return trainable(add_adapters(model.backbone.model, RANK, 2 * RANK, (), 0))


def random_memory(model: StateStreamModel, size: float, pathway: Any = "both", seed: int = 0) -> Kind:
    """A memory of a backbone with random weights of a size.

    An LRT attached to a pretrained backbone starts at zeros, where every schedule is the same. So every gamma
    is `size`, and every number of the projections and gates is drawn from a normal distribution of standard
    deviation size / sqrt(d_model): W m then has entries of `size` times those of m.
    """
    fresh = build_memory(MemoryDesign(pathway=pathway), model.backbone)
    generator = torch.Generator().manual_seed(seed)
    spread = size / model.backbone.d_model**0.5
    return fresh.with_weights(
        {
            name: torch.full_like(w, size)
            if name == "gamma"
            else (spread * torch.randn(w.shape, generator=generator, dtype=w.dtype)).to(w.device)
            for name, w in fresh.weights().items()
        }
    )


def shortest_texts(model: StateStreamModel, questions: int, data: str = "gsm8k") -> list[Sample]:
    """The questions with worked answers whose conversations are the shortest, without an instruction; the
    loss is that of the answer. Exact back-propagation runs the stack once per token: short texts are
    affordable.
    """
    examples = [encode(item, model, "") for item in read_items(data)]
    samples = []
    for example in sorted(examples, key=lambda e: (len(e.tokens), e.id))[:questions]:
        batch = make_batch([example], width=1).to(model.backbone.device)
        losses = partial(answer_loss, model, batch), partial(mean_over_passes, model, batch)
        samples.append(Sample(example.id, batch.tokens, *losses))
    return samples


def sequences(model: StateStreamModel, plan: LrtPlan, number: int) -> list[Sample]:
    """Held-out sequences of the small model's task, one by one."""
    tokens, labels = plan.small.task.draw(number, seed=0)
    rows = [Labelled(tokens[k : k + 1], labels[k : k + 1]) for k in range(number)]
    return [
        Sample(
            f"sequence {k}",
            row.tokens,
            partial(label_loss, model, row),
            partial(label_loss_of_passes, model, row),
        )
        for k, row in enumerate(rows)
    ]
