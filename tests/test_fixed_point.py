"""A loop at its fixed point: solved, its gradient exact in constant memory, and the study of it."""

from dataclasses import replace

import pytest
import torch
from tiny import prompts, relative, tiny

from sst_interp.errors import SSTError
from sst_interp.experiments.studies.fixed_point import (
    AT_FIXED_POINT,
    GUESS,
    ONE_PASS,
    SOLVED,
    UNROLLED,
    FixedPointPlan,
    FixedPointStudy,
    readings,
)
from sst_interp.experiments.studies.tasks import FlipFlop
from sst_interp.models.choices import Choices
from sst_interp.models.model import attach, attach_looped
from sst_interp.models.solvers import fixed_point
from sst_interp.models.solvers.fixed_point import fixed_point_states
from sst_interp.models.solvers.implicit import Solver
from sst_interp.training.objective import run_passes

TOKENS = torch.tensor([prompts()[0], prompts()[0][::-1]])
FLOOR = 1e-7
"""transformers takes its norms in float32, whatever the model's dtype."""
CONTRACTS = {"inject": "add", "initial": "prelude", "norm": "rms", "prelude_norm": "rms"}
TINY = FixedPointPlan(
    task=FlipFlop(positions=6), windows=(2,), layers=(1, 1, 1), d_model=16, steps=2, batch=4, held_out=8
)


def loop(family="llama", kv="each", **how):
    return attach_looped(tiny(family), choices=Choices(kv=kv), core=(1, 2), **(CONTRACTS | how))


def gradients(model, last, weight):
    (last * weight).sum().backward()
    named = dict(model.backbone.model.named_parameters())
    found = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    model.backbone.model.zero_grad()
    return found


@pytest.mark.parametrize(("family", "how"), [("llama", {}), ("gemma3", {"damping": 0.3}), ("gpt2", {})])
def test_solved_it_is_the_deepest_model_and_has_its_gradient(family, how, monkeypatch):
    monkeypatch.setattr(fixed_point, "MOST", 250)
    model = loop(family, **how)
    solver = Solver(tolerance=FLOOR)
    solved = fixed_point_states(model, TOKENS, solver)
    assert solved.residual < FLOOR
    weight = torch.randn_like(solved.last)
    implicit = gradients(model, solved.last, weight)
    assert solver.adjoints[0].residual < FLOOR
    deep = run_passes(model, TOKENS, "unrolled", iterations=solved.iterations)[-1].last
    assert relative(solved.last, deep) < 10 * FLOOR
    through_time = gradients(model, deep, weight)
    assert implicit.keys() == through_time.keys()
    for name, gradient in through_time.items():
        assert relative(implicit[name], gradient) < 2000 * FLOOR, name
    cut = Solver(sweeps=(250, 0))  # without the adjoint the gradient is another one
    wrong = gradients(model, fixed_point_states(model, TOKENS, cut).last, weight)
    assert max(relative(wrong[name], g) for name, g in through_time.items()) > 1e-2


@torch.no_grad()
def test_at_the_fixed_point_it_does_not_matter_which_keys_are_kept():
    """What later positions attend to is the same for every iteration: `each` and `last` are one model."""
    solved = fixed_point_states(loop(), TOKENS, Solver(tolerance=FLOOR))
    shared = loop(kv="last").replay(TOKENS, 60, "sequential", logits=False)
    assert relative(shared.resid_post[:, :, -1, -1], solved.last) < 100 * FLOOR
    zeros = fixed_point_states(loop(initial="zeros"), TOKENS, Solver(tolerance=FLOOR))
    assert relative(zeros.last, solved.last) < 100 * FLOOR  # nor where it starts


def test_memory_does_not_grow_with_iterations():
    def remembered(make):
        sizes = []
        keep = lambda t: (sizes.append(t.numel()), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            make()
        return sum(sizes)

    model = loop()
    few, many = (
        remembered(lambda n=n: fixed_point_states(model, TOKENS, Solver(sweeps=(n, n)))) for n in (2, 20)
    )
    assert few == many
    unrolled = [remembered(lambda n=n: run_passes(model, TOKENS, "unrolled", iterations=n)) for n in (2, 20)]
    assert unrolled[1] > 5 * unrolled[0]


def test_a_model_without_a_core_is_refused():
    with pytest.raises(SSTError, match="has no core to be solved"):
        fixed_point_states(attach(tiny("llama"), alpha=0.1), TOKENS)


def test_every_reading_is_of_the_same_weights_and_comes_closer():
    model = TINY.model(2, 0)
    rows = readings(model, TINY.task, 8).set_index("evaluated")
    assert rows.loc[AT_FIXED_POINT, "apart"] == 0
    assert rows["apart"].is_monotonic_decreasing
    tokens, labels = TINY.task.draw(8, seed=0)
    for depth in (1, 4):
        logits = model.replay(tokens, depth).logits[:, :, -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        assert rows.loc[f"depth {depth}", "loss"] == pytest.approx(float(loss), rel=1e-4)


def test_the_study_goes_on_and_shows_every_table(tmp_path):
    one = FixedPointStudy(TINY, (SOLVED,))
    one.run(tmp_path, seeds=[0])
    first = one.read(tmp_path)["losses"]
    study = FixedPointStudy(TINY, (SOLVED, UNROLLED, ONE_PASS))
    rows = study.run(tmp_path, seeds=[0, 1])["losses"]
    assert len(rows) == 6 * len(first)
    kept = rows[(rows["arm"] == SOLVED.name) & (rows["seed"] == 0)]
    assert kept["loss"].tolist() == first["loss"].tolist()
    shown = study.show(tmp_path)
    assert set(shown) == set(study.names())
    assert "its own first guess" in shown["fixed point verdict"]
    assert shown["fixed point right"].count(SOLVED.name) >= 1
    assert GUESS in shown["fixed point distances"]


def test_all_arms_of_a_seed_start_alike():
    study = FixedPointStudy(replace(TINY, windows=(2, 6)))
    jobs = study.jobs([0])
    starts = [study.begin(job) for job in jobs]
    for training in starts[1:]:
        for name, value in starts[0].masters.adapters.items():
            assert torch.equal(value, training.masters.adapters[name])
        assert torch.equal(training.draw(1).tokens, starts[0].draw(1).tokens)
