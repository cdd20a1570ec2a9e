"""Local stability against the whole Jacobian of small models of three kinds."""

import pytest
import torch
from tiny import lrt, prompts, tiny

from sst_interp.errors import Untestable
from sst_interp.experiments.stability import local_stability, push
from sst_interp.experiments.trajectory import trajectory
from sst_interp.models.model import attach, attach_looped

MAKE = {
    "sst": lambda: attach(tiny("gpt2"), alpha=0.3),
    "lrt": lambda: lrt("residual", hf=tiny("gpt2")),
    "looped": lambda: attach_looped(tiny("gpt2")),
}


@pytest.mark.parametrize("kind", MAKE)
def test_stretch_and_products_are_those_of_the_whole_jacobian(kind):
    model, texts = MAKE[kind](), prompts(2)
    t = trajectory(model, texts, 3, gradients=True)
    x, y = t.cells[2][0], t.cells[2][1]
    units = torch.eye(32, dtype=torch.float64)
    rows = [torch.autograd.grad(y, x, u.expand(2, 1, -1), retain_graph=True)[0][:, 0] for u in units]
    jacobian = torch.stack(rows, 1)
    v = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(push(x, y, v), (jacobian @ v[..., None])[..., 0])
    result = local_stability(model, texts, 3, layers=[2], rounds=200, resamples=20)
    first = result.cells.iloc[0]
    assert first["stretch"] == pytest.approx(torch.linalg.svdvals(jacobian)[:, 0].mean().item(), rel=1e-3)
    radius = torch.linalg.eigvals(jacobian).abs().max(-1).values.mean().item()
    assert first["radius"] == pytest.approx(radius, rel=0.05)
    assert first["random"] <= first["stretch"]
    assert result.verdict.startswith("Iterations enlarge")


def test_a_stream_that_is_off_has_no_map():
    with pytest.raises(Untestable):
        local_stability(attach(tiny("gpt2"), alpha=0.3), prompts(2), 1)
