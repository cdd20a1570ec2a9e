"""TransformerLens' Jacobian lens in every iteration: its own fit at depth 1, finite differences deeper."""

import pytest
import torch
from tiny import lrt, prompts, relative, tiny
from tiny_capture import tiny_llama, word_tokenizer
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import JacobianLens

from sst_interp.bridges.jacobian import fit_lenses, read_lenses
from sst_interp.bridges.transformer_lens import twin_of
from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.model import attach, attach_looped

ROW = prompts()[0][:7]
SKIP, LAST = 2, 2
STEP = 1e-3
"""Of a finite difference: RMS norms compute in float32."""
MODELS = {
    "sst": lambda: attach(tiny("llama"), alpha=0.3),
    "lrt": lambda: lrt("both"),
    "looped": lambda: attach_looped(tiny("gpt2")),
    "looped, each": lambda: attach_looped(tiny("qwen3"), core=(1, 2), choices=Choices(kv="each")),
}


def test_at_depth_1_without_a_stream_it_is_transformer_lens_own():
    model = attach(tiny_llama(torch.float32), word_tokenizer(), alpha=0.0)
    hf, _, adapter, tokenizer = twin_of(model)
    theirs = TransformerBridge(hf, adapter, tokenizer)
    texts = ["sun moon sun sun moon", "moon moon sun moon sun sun"]
    fitted = JacobianLens.fit(theirs, texts, corpus="words", skip_first_positions=1, show_progress=False)
    ids = [theirs.to_tokens(text)[0] for text in texts]
    (ours,) = fit_lenses(model, ids, skip=1, dim_batch=5)
    assert ours.source_layers == fitted.source_layers == [0, 1]
    for layer in ours.source_layers:
        assert relative(ours.jacobians[layer], fitted.jacobians[layer]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_derivative_through_the_stream(name):
    """A small step along a direction at every source position in turn, by hooks on the definition."""
    model = MODELS[name]()
    direction = torch.sin(torch.arange(32.0, dtype=torch.float64))
    lenses, bridge = fit_lenses(model, [ROW], iterations=2, skip=SKIP), model.bridge()

    def ends(step, layer, iteration, position):
        def move(tensor, hook):
            return tensor + step * direction

        seen, last = [], f"blocks.{LAST}.hook_resid_post"

        def keep(tensor, hook):
            if bridge.now.iteration == 2 and SKIP <= bridge.now.position < len(ROW) - 1:
                seen.append(tensor[0, 0].clone())

        hooks = [(f"blocks.{layer}.hook_resid_post", bridge.at(move, iteration=iteration, position=position))]
        bridge.run_with_hooks(ROW, iterations=2, method="sequential", fwd_hooks=[*hooks, (last, keep)])
        return torch.stack(seen).sum(0)

    for iteration, lens in enumerate(lenses, 1):
        for layer in lens.source_layers:
            sources = range(SKIP, len(ROW) - 1)
            moved = [
                (ends(STEP, layer, iteration, t) - ends(-STEP, layer, iteration, t)) / (2 * STEP)
                for t in sources
            ]
            predicted = lens.transport(direction, layer).double()
            assert relative(predicted, torch.stack(moved).mean(0)) < 1e-3, (iteration, layer)


@pytest.mark.parametrize("name", MODELS)
def test_every_iteration_is_read_by_transformer_lens(name):
    model = MODELS[name]()
    lenses = fit_lenses(model, [ROW], iterations=2, skip=SKIP)
    full = list(lenses)
    for lens in full[1:]:  # a layer that does not run again is read with what it had
        lens.jacobians = {**full[0].jacobians, **lens.jacobians}
    readouts = read_lenses(model, full, ROW, 2, return_full_logits=True)
    replayed = model.replay(ROW, 2, "sequential")
    for i, (lens, readout) in enumerate(zip(full, readouts, strict=True)):
        for layer in lens.source_layers:
            states = replayed.resid_post[0, :, layer, i]
            ours = model.backbone.unembed(lens.transport(states, layer).double())
            assert relative(readout.lens_logits[layer].double(), ours) < 1e-4
        assert relative(readout.lens_logits[LAST].double(), replayed.logits[0, :, i]) < 1e-4
    one = read_lenses(model, full[0], ROW, 2, return_full_logits=True)
    assert torch.equal(one[0].lens_logits[0], readouts[0].lens_logits[0])


def test_what_cannot_be_is_one_line():
    model = attach(tiny("llama"), alpha=0.3)
    lenses = fit_lenses(model, [ROW], iterations=2)
    with pytest.raises(SSTError, match="2 lenses for 3 iterations"):
        read_lenses(model, lenses, ROW, 3)
    with pytest.raises(SSTError, match="one text"):
        read_lenses(model, lenses, [ROW, ROW], 2)
    with pytest.raises(SSTError, match="no text has more than 8"):
        fit_lenses(model, [ROW], skip=7)
