"""Exact training, solved segment by segment, is back-propagation through time: in states and gradients."""

import json
from dataclasses import replace
from itertools import pairwise
from types import MethodType

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import lrt
from tiny_training import answer_batch as batch
from tiny_training import save_backbone, training_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from sst_interp.errors import SSTError
from sst_interp.models.checkpoint import add_adapters, trainable
from sst_interp.models.choices import Choices
from sst_interp.models.model import attach
from sst_interp.models.solvers.implicit import Chain, Solver, _Solve, exact_states, lay_out
from sst_interp.models.solvers.sequential import advance
from sst_interp.training.card import ABOUT, how_well_solved, read_about, read_log, write_card
from sst_interp.training.objective import training_loss
from sst_interp.training.recipe import TrainingRecipe
from sst_interp.training.trainer import Training

T, TIGHT = 19, 1e-13


def in_float64(model):
    """transformers' RMS norms work in float32, which hides anything below 1e-7. The same in the own dtype."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            plus = 1.0 if "Gemma" in type(module).__name__ else 0.0

            def forward(self, x, eps=eps, plus=plus):
                return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (plus + self.weight)

            module.forward = MethodType(forward, module)
    return model


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def recipe(tmp_path, backbone):
    return training_recipe(tmp_path, backbone)


def model_of(family="llama", alpha=0.1, **choices):
    model = attach(tiny.tiny(family), alpha=alpha, choices=Choices(**choices))
    in_float64(model.backbone.model)
    model.alpha = model.alpha.requires_grad_()
    return model


def loss_and_gradients(model, last, used, leaves=None):
    """Of a loss that reads every position that is used."""
    weights = torch.randn(last.shape, dtype=last.dtype, generator=torch.Generator().manual_seed(5))
    loss = (last.tanh() * weights)[used].sum()
    leaves = [model.alpha, *model.backbone.model.parameters()] if leaves is None else leaves
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.detach(), [g for g in found if g is not None]


def through_time(model, tokens, depth=1, pad=None, origin=None):
    """The definition, differentiable."""
    stream = model.new_stream(torch.zeros(len(tokens), dtype=torch.long) if pad is None else pad, T)
    if origin is not None:
        stream.origin = origin
    return torch.stack([advance(model, stream, tokens[:, t], depth)[-1].resid_post[-1] for t in range(T)], 1)


def some_tokens(rows=3, seed=0):
    return torch.randint(3, 97, (rows, T), generator=torch.Generator().manual_seed(seed))


def same(ours, theirs, rtol=1e-8):
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0)
    assert len(ours[1]) == len(theirs[1])
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert float((a - b).norm()) <= rtol * float(b.norm()) + 1e-12


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loss_and_every_gradient_are_those_of_back_propagation_through_time(family, depth):
    """With padding on both sides: a loss that reads none of it is not changed by it."""
    model, tokens = model_of(family), some_tokens()
    pad, until = torch.tensor([0, 2, 5]), torch.tensor([T, T - 3, T - 1])
    column = torch.arange(T)
    used = (column >= pad[:, None]) & (column < until[:, None])
    solver = Solver(TIGHT, at_once=4)
    last = exact_states(model, tokens, solver, iterations=depth, pad=pad, until=until)
    theirs = loss_and_gradients(model, through_time(model, tokens, depth, pad), used)
    same(loss_and_gradients(model, last, used), theirs)
    assert len(solver.states) == len(solver.adjoints) == model.backbone.n_layers
    assert min(s.sweeps for s in [*solver.states, *solver.adjoints]) > 2


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "choices",
    [{"carry": "ffn_output"}, {"blend": "additive"}, {"kv": "first"}, {"prompt": "blend_off"},
     {"carry": "ffn_output", "blend": "additive", "kv": "first"}],
    ids=lambda c: "-".join(c.values()),
)  # fmt: skip
def test_so_they_are_with_every_choice(choices, depth):
    model, tokens = model_of(**choices), some_tokens()
    origin = torch.tensor([4, 7, 5]) if model.choices.prompt == "blend_off" else None
    last = exact_states(model, tokens, Solver(TIGHT, at_once=4), iterations=depth, origin=origin)
    used = torch.ones_like(tokens, dtype=torch.bool)
    theirs = loss_and_gradients(model, through_time(model, tokens, depth, origin=origin), used)
    same(loss_and_gradients(model, last, used), theirs)


@pytest.mark.parametrize("remember", [True, False])
def test_so_they_are_of_adapters_and_when_layers_are_computed_again(remember):
    model, tokens = model_of(), some_tokens()
    adapters = list(trainable(add_adapters(model.backbone.model, 2, 4, (), 0)).values())
    with torch.no_grad():
        for p in adapters:
            p.normal_(0, 0.1, generator=torch.Generator().manual_seed(p.numel()))
    used, leaves = torch.ones_like(tokens, dtype=torch.bool), [model.alpha, *adapters]
    last = exact_states(model, tokens, Solver(TIGHT, remember=remember, at_once=4))
    ours = loss_and_gradients(model, last, used, leaves)
    same(ours, loss_and_gradients(model, through_time(model, tokens), used, leaves))


def test_the_gradient_can_be_asked_for_twice():
    model, tokens = model_of(), some_tokens()
    loss = exact_states(model, tokens, Solver(TIGHT)).square().sum()
    first = torch.autograd.grad(loss, model.alpha, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, model.alpha), first)


def one_chain(alpha=0.1, seed=0, rows=2, links=24, segments=4, **solver):
    """A layer's chain, m [row, link, 1, d_model] and alpha, ready to be differentiated."""
    model = model_of()
    g = torch.Generator().manual_seed(seed)
    m = torch.randn(rows, links, 1, 32, dtype=torch.float64, generator=g).requires_grad_()
    used = torch.ones(rows, links, dtype=torch.bool)
    has_state = torch.arange(links).expand(rows, links) > 0
    layout = lay_out(used, has_state, segments)
    layer, weight = model.backbone.layers[1], torch.full((32,), alpha, dtype=torch.float64).requires_grad_()

    def y(m, weight, *parameters, **changes):
        asked = Solver(**(solver | changes))
        chain = Chain(layer, model.choices, layout, asked, True)
        return _Solve.apply(m, weight, chain, *chain.parameters), asked

    return y, m, weight, layer


def test_gradcheck_on_one_layer():
    y, m, weight, layer = one_chain(rows=1, links=17, segments=2, tolerance=TIGHT)
    wide = m.detach()[:, :, :, :]
    torch.autograd.gradcheck(lambda m, a: y(m, a)[0], (wide.requires_grad_(), weight), fast_mode=True)
    down: torch.Tensor = layer.ffn.down_proj.weight  # type: ignore[assignment]
    torch.autograd.gradcheck(lambda _: y(wide, weight)[0], (down,), fast_mode=True)


@settings(max_examples=12, deadline=None)
@given(alpha=st.floats(0.01, 0.15), seed=st.integers(0, 99))
def test_a_sweep_divides_the_error_by_the_norm_of_a_link(alpha, seed):
    """alpha (1 + gain), the gain being the FFN's: of states, and of their gradients."""
    y, m, weight, layer = one_chain(alpha, seed)
    exact, _ = y(m, weight, tolerance=TIGHT)
    gradient = torch.randn(exact.shape, dtype=exact.dtype, generator=torch.Generator().manual_seed(seed))
    (true,) = torch.autograd.grad(exact, m, gradient)
    norms = []
    for row, link in ((r, k) for r in range(2) for k in range(1, 24, 2)):
        u = ((1 - weight) * m[row, link, 0] + weight * exact[row, link - 1, 0]).detach()
        jacobian = torch.autograd.functional.jacobian(lambda u: u + layer.ffn_branch(u[None])[0], u)
        norms.append(float(torch.linalg.matrix_norm(jacobian, 2)))
    factor = 1.1 * alpha * max(norms)
    errors = []
    for n in range(4):
        states, _ = y(m, weight, sweeps=(n, 9))
        found, _ = y(m, weight, sweeps=(9, n))
        (of_m,) = torch.autograd.grad(found, m, gradient)
        errors.append([float((states - exact).detach().norm()), float((of_m - true).norm())])
    for before, after in pairwise(errors):
        assert after[0] <= factor * before[0] + 1e-12
        assert after[1] <= factor * before[1] + 1e-12
    assert errors[1][0] < errors[0][0]


def test_a_chain_that_does_not_contract_is_said_and_still_solved():
    """With fixed sweeps the residual says it; until a tolerance it takes as many as it needs."""
    model, tokens = model_of(alpha=0.5), some_tokens()
    used = torch.ones_like(tokens, dtype=torch.bool)
    theirs = loss_and_gradients(model, through_time(model, tokens), used)
    fixed = Solver(sweeps=(2, 2), at_once=4)
    off = loss_and_gradients(model, exact_states(model, tokens, fixed), used)
    with pytest.raises(AssertionError):
        same(off, theirs, rtol=1e-3)
    assert min(fixed.line()["state_residual"], fixed.line()["adjoint_residual"]) > fixed.tolerance
    solver = Solver(TIGHT, at_once=4)
    same(loss_and_gradients(model, exact_states(model, tokens, solver), used), theirs)
    assert max(s.sweeps for s in solver.states + solver.adjoints) <= T
    assert min(solver.line()["state_sweeps"], solver.line()["adjoint_sweeps"]) > 8


def test_without_a_blend_nothing_is_mended():
    model, tokens = model_of(alpha=0.0), some_tokens()
    solver = Solver(TIGHT, at_once=4)
    last = exact_states(model, tokens, solver)
    last.sum().backward()
    torch.testing.assert_close(
        model.backbone.unembed(last), model.backbone.model(tokens).logits, rtol=1e-10, atol=1e-10
    )
    assert solver.line() == dict.fromkeys(solver.line(), 0.0)


def test_padding_costs_nothing_and_a_sweep_one_link_per_segment():
    model, tokens = model_of(), some_tokens()
    seen = []
    model.backbone.layers[1].ffn.register_forward_hook(lambda _m, args, _out: seen.append(len(args[0])))
    until, segments = torch.tensor([T - 2, 10, 14]), 4
    steps = -(-int(until.sum()) // segments)
    for sweeps in (0, 3):
        exact_states(model, tokens, Solver(sweeps=(sweeps, 0), at_once=segments), until=until)
        assert seen == [segments] * (steps + 1 + sweeps)  # once more for the first guess
        seen.clear()


class Waits(TorchDispatchMode):
    """Counts where the processor waits for a number."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_processor_waits_at_most_twice_per_layer_and_sweep():
    model, tokens = model_of(), some_tokens()
    counts = {}
    for name, solver in (("fixed", Solver(sweeps=(2, 2), at_once=4)), ("until", Solver(1e-6, at_once=4))):
        with Waits() as waits:
            exact_states(model, tokens, solver).sum().backward()
        counts[name] = waits.n
    sweeps = sum(s.sweeps + 1 for s in solver.states + solver.adjoints)
    assert counts["until"] - counts["fixed"] <= sweeps  # once, and what the masks ask is asked in both
    assert counts["fixed"] <= 2 * model.backbone.n_layers


def test_a_memory_that_goes_to_another_layer_is_refused():
    with pytest.raises(SSTError, match="its state goes to another layer"):
        exact_states(lrt("both", size=0.05), some_tokens(), Solver())
    values = {"name": "n", "backbone": "b", "data": "d", "lrt": {"pathway": "both"}, "method": "exact"}
    with pytest.raises(SSTError, match="solves layer by layer"):
        TrainingRecipe.from_dict(values)


def test_states_that_overflow_end_the_training_with_its_last_state_kept(recipe, tmp_path):
    training = Training(replace(recipe, method="exact"), tmp_path / "out")
    training.step()
    training.save()
    with torch.no_grad():
        training.masters.values["alpha.logit"].fill_(torch.nan)
    with pytest.raises(SSTError, match=r"step 2: the loss \(nan\)") as told:
        training.step()
    assert "the last saved state is kept" in str(told.value.hint)


@pytest.mark.parametrize("depth", [1, 2])
def test_training_minimises_the_loss_of_the_definition(depth):
    """Answers only, and what follows the last answer is not computed at all."""
    model = model_of()
    about = {"name": "n", "backbone": "b", "data": "d", "tolerance": TIGHT, "depths": (depth, depth)}
    losses = [
        training_loss(model, batch(), TrainingRecipe.from_dict(about | {"method": method}))
        for method in ("exact", "sequential")
    ]
    ours, theirs = (torch.autograd.grad(loss, model.alpha)[0] for loss in losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_every_step_says_how_well_it_was_solved_and_so_does_the_card(recipe, tmp_path):
    exact = replace(recipe, method="exact", examples=9, depths=(1, 3))
    Training(exact, tmp_path / "out").run()
    log = read_log(tmp_path / "out").iloc[1:]
    for way in ("state", "adjoint"):
        assert (log[f"{way}_residual"] < exact.tolerance).all()
        assert (log[f"{way}_sweeps"] >= 0).all()
    assert "solved to the tolerance of 0.001" in (tmp_path / "out" / "README.md").read_text()
    few = replace(exact, exact_sweeps=(0, 0), name="few")
    Training(few, tmp_path / "few").run()
    assert "**3 of 3 steps were not solved" in write_card(tmp_path / "few").read_text()
    assert how_well_solved(log[["step"]], 1e-3) == ""
    assert {exact.depth(step) for step in range(50)} == {1, 2, 3}


def test_an_older_training_called_exact_was_sequential(recipe, tmp_path):
    old = replace(recipe, method="sequential", examples=3)
    Training(old, tmp_path / "out").run()
    about = json.loads((tmp_path / "out" / ABOUT).read_text())
    about["recipe"]["method"], about["format"] = "exact", 1
    (tmp_path / "out" / ABOUT).write_text(json.dumps(about))
    assert TrainingRecipe.from_dict(read_about(tmp_path / "out")["recipe"]) == old


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tolerance": 0}, "tolerance = 0"),
        ({"exact_sweeps": [2]}, "two whole numbers from 0"),
        ({"depths": [3, 1]}, "the lower first"),
        ({"depths": [1, 2], "method": "two_pass"}, "trains at depth 1"),
        ({"recompute": 1}, "true or false"),
    ],
)
def test_a_wrong_recipe_is_one_line(values, message):
    with pytest.raises(SSTError, match=message):
        TrainingRecipe.from_dict({"name": "t", "backbone": "b", "data": "d", "method": "exact"} | values)
