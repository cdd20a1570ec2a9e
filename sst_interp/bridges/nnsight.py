"""The model in nnsight: every site of every iteration is a module whose `.output` can be read and written.

    sst = model.nnsight(iterations=4)
    with sst.generate(prompt, max_new_tokens=8) as tracer:
        for position in tracer.iter[5:6]:                            # a generated position
            y = sst.iteration[2].layers[12].resid_post.output.save()  # iteration 2, layer 12
            sst.iteration[3].layers[12].stream_state.output = y

nnsight names a value by its module and by the number of the module's call. Here the module gives iteration
and layer, and the call gives the position: `tracer.iter` runs over positions. Values come in the order they
run: positions, then iterations, layers, and the sites of `sst_interp.models.hooks`. The prompt of `generate`
is read before position 0 and calls no module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from nnsight import NNsight
from nnsight.intervention.envoy import traceable
from torch import Tensor, nn

from sst_interp.bridges.parallel_hooks import read_sequentially
from sst_interp.errors import SSTError
from sst_interp.models.choices import check_iterations
from sst_interp.models.generation import Generation, generate
from sst_interp.models.hooks import SITES, Site, Visit, alike
from sst_interp.models.model import Prompt, Prompts, StateStreamModel, listed


class Sites(nn.Module):
    """The sites of one layer in one iteration: modules that return their input."""

    def __init__(self) -> None:
        super().__init__()
        for site in SITES:
            self.add_module(site, nn.Identity())


class Iterations(nn.Module):
    """The module that nnsight wraps. It has no weights: the model runs as always and shows itself here."""

    def __init__(self, model: StateStreamModel, iterations: int) -> None:
        super().__init__()
        self.model = model
        self.iteration = nn.ModuleDict()
        """By iteration, from "1": a module whose `layers` are the sites of each layer."""
        for number in range(1, iterations + 1):
            one = nn.Module()
            one.layers = nn.ModuleList(Sites() for _ in range(model.backbone.n_layers))
            self.iteration[str(number)] = one

    def forward(self, prompts: list[Prompt]) -> Float[Tensor, "row position vocab"]:
        """Read given tokens one after the other, each iterated; the last iteration's logits."""
        tokens, pad = self.model.batch(prompts)
        if bool(pad.any()):
            raise SSTError("prompts of different length have no common positions", "trace them one by one")
        last = read_sequentially(self.model, tokens, len(self.iteration), self.hook)
        with torch.no_grad():
            return self.model.backbone.unembed(last[:, :, -1])

    def generate(
        self, prompts: list[Prompt], max_new_tokens: int, stop_tokens: Sequence[int] | None
    ) -> Generation:
        """Greedy generation from prompts of any length."""
        model = self.model
        tokens, pad = model.batch(prompts)
        stop = model.endings(stop_tokens)
        depths = [len(self.iteration)] * len(pad)
        out = generate(model, tokens, pad, depths, max_new_tokens, stop, hook=self.hook)
        return model.with_texts(out, stop)

    def hook(self, position: int, iteration: int) -> Visit:
        """Show a pass to the modules of its iteration; nnsight counts the positions."""
        layers: Any = self.iteration[str(iteration)].layers

        def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
            shown = getattr(layers[layer], site)(tensor.clone())
            return alike(shown, tensor, f"iteration {iteration}, layer {layer}, {site}, position {position}")

        return visit


class StateStreamNNsight(NNsight):
    """`trace` reads given tokens, `generate` writes new ones; `iteration[i].layers[l].SITE.output` is a
    tensor [row, 1, d_model]. Several `tracer.invoke`s make one batch, and each sees its own rows.

    Raises SSTError where something of another shape or dtype is written.
    """

    def __init__(self, model: StateStreamModel, iterations: int = 1) -> None:
        (iterations,) = check_iterations([iterations])
        super().__init__(Iterations(model, iterations))

    @traceable
    def generate(
        self, prompts: Prompts, max_new_tokens: int = 64, stop_tokens: Sequence[int] | None = None
    ) -> Generation:
        """`StateStreamModel.generate`. Its result is `tracer.result`; its steps are positions."""
        return self._module.generate(listed(prompts), max_new_tokens, stop_tokens)  # pyright: ignore

    def _batch_size(self, *inputs: Any, **_kwargs: Any) -> int:
        return len(listed(inputs[0])) if inputs else 0

    def _batch(self, invokes: list[tuple[Any, dict[str, Any]]], fn: Any) -> tuple[tuple[Any], dict[str, Any]]:
        prompts = [prompt for inputs, _ in invokes for prompt in listed(inputs[0])]
        return (prompts,), {name: value for _, kwargs in invokes for name, value in kwargs.items()}
