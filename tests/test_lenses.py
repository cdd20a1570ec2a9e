"""Lenses per (layer, iteration): Jacobians against finite differences, the identity, files, read-outs."""

import pytest
import torch
from tiny import lrt, prompts, tiny

from sst_interp.errors import SSTError
from sst_interp.experiments.lenses import (
    jacobian_lens,
    logit_lens,
    open_lens,
    read_outs,
    read_states,
    tuned_lens,
)
from sst_interp.experiments.trajectory import trajectory
from sst_interp.models.model import attach, attach_looped

DEPTH = 3
MAKE = {  # GPT-2: the norms of the others are computed in float32, which hides anything below 1e-3 here
    "sst": lambda: attach(tiny("gpt2"), alpha=0.3),
    "lrt": lambda: lrt("residual", hf=tiny("gpt2")),
    "looped": lambda: attach_looped(tiny("gpt2")),
}
TEXTS = prompts(6)


@pytest.fixture(params=MAKE, scope="module")
def model(request):
    return MAKE[request.param]()


@pytest.fixture(scope="module")
def lens(model):
    return jacobian_lens(model, TEXTS[:3], DEPTH)


@pytest.mark.parametrize("cell", [(0, 1), (1, 2), (2, 2)])
def test_the_jacobian_is_the_mean_of_finite_differences(model, lens, cell):
    g, e = torch.Generator().manual_seed(0), 1e-5
    v = torch.randn(32, generator=g, dtype=torch.float64)
    up, down = (trajectory(model, TEXTS[:3], DEPTH, add={cell: s * v.expand(3, -1)}).output for s in (e, -e))
    seen = lens.weight[cell[0], cell[1] - 1] @ v
    assert seen.norm() > 0.1
    torch.testing.assert_close(seen, ((up - down) / (2 * e)).mean(0), rtol=1e-6, atol=1e-6)


def test_the_last_cell_is_the_identity_and_every_lens_says_the_output(model, lens):
    assert torch.equal(lens.weight[-1, -1], torch.eye(32, dtype=torch.float64))
    states = read_states(model, TEXTS, DEPTH)
    said = logit_lens(model, DEPTH).logits(model, states)
    seen = []
    model.generate(TEXTS, DEPTH, 1, stop_tokens=[], observe=seen.append)
    torch.testing.assert_close(states[:, -1, -1], seen[0].iterations[-1].resid_post[-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(said[:, 1, 1], model.backbone.unembed(states[:, 1, 1]))
    torch.testing.assert_close(lens.logits(model, states)[:, -1, -1], said[:, -1, -1])


def test_training_lowers_the_kl_of_its_own_texts_and_leaves_the_last_cell(model):
    texts = [[*text, 5] for text in TEXTS]
    tuned = tuned_lens(model, TEXTS, DEPTH, steps=20, rate=1e-2)
    cells = read_outs(model, texts, [logit_lens(model, DEPTH), tuned], resamples=20).cells
    before, after = (cells[cells["lens"] == name]["kl"].to_numpy() for name in ("logit", "tuned"))
    assert max(before[-1], after[-1]) < 1e-12
    assert after[:-1].mean() < 0.5 * before[:-1].mean()


def test_a_file_gives_the_lens_back_and_refuses_another_model(model, lens, tmp_path):
    path = tmp_path / "j.safetensors"
    lens.save(path)
    again = open_lens(path, model)
    assert torch.equal(again.weight, lens.weight)
    assert (again.name, again.texts) == ("jacobian", 3)
    with pytest.raises(SSTError, match="another model"):
        open_lens(path, attach(tiny("gpt2", seed=1), alpha=0.3))
    path.write_bytes(b"nothing")
    with pytest.raises(SSTError):
        open_lens(path)


def test_read_outs_say_what_they_rest_on(model, lens):
    result = read_outs(model, TEXTS, [logit_lens(model, DEPTH), lens], resamples=20)
    assert len(result.table) == 2 * 3 * DEPTH
    assert "6 held-out texts" in result.verdict
    assert set(result.figures()) == {"kl_logit", "kl_jacobian"}
    last = result.cells.groupby("lens").tail(1)
    assert (last["kl"] < 1e-12).all()
    assert (last["agree"] == 1).all()
    assert (last["control"] > 0).all()
    with pytest.raises(SSTError, match="two texts"):
        read_outs(model, TEXTS[:1], [lens])
