"""HRM-Text (`hrm_text`, arXiv 2605.20613): a fast stack of layers inside a slow one, both run in cycles.

With the embedding `e`, N a norm without weights, and slow cycles of F fast steps each:

    L(t, i) = N(fast(L(t, i-1) + H)),      L(t, 0) = 0
    H       = N(slow(H + L(t, i)))         # after each F-th step; before the first, H = e(t)

The iteration axis counts fast steps. It has two indices, and `name_of(i)` says them: iteration i is fast step
(i - 1) mod F + 1 of slow cycle (i - 1) div F + 1. The slow stack runs after every fast step as a read-out
(what the model says if it stops there), and its output becomes H after each F-th. The layers are those of the
fast stack, then those of the slow one. Every (iteration, layer) keeps its own keys and values.

Text is read causally: the published model reads an instruction in both directions if it is told where one is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices
from sst_interp.models.kinds import kind
from sst_interp.models.kinds.looped import Looped
from sst_interp.models.stream import Pass, PassInputs, Reading, Recurrence, run_layer


@kind("hrm_text", "hierarchical model (HRM-Text)")
@dataclass(frozen=True, eq=False)
class HierarchicalText(Looped):
    """Two stacks: the fast one is the core, the slow one reads it out and is committed once per cycle."""

    fast_steps: int = 3
    """F: fast steps per slow cycle."""

    native = "hrm_text"

    @classmethod
    def of(cls, backbone: Backbone) -> tuple[HierarchicalText, Choices]:
        """Cycles of its config.json."""
        config = backbone.config
        n, steps = config.num_layers_per_stack, config.L_cycles
        return cls((0, n), depth=steps * config.H_cycles, fast_steps=steps), Choices(kv="each")

    def check(self, choices: Choices) -> None:
        """Raise SSTError for shared keys and values too: its two stacks do not run equally often."""
        super().check(choices)
        if choices.kv != "each" or choices.blend != "convex":
            raise SSTError(
                f"a {self.words} keeps its keys and values of each iteration, and blends nothing",
                'choices=Choices(kv="each")',
            )

    def name_of(self, iteration: int) -> str:
        """Its slow cycle and fast step."""
        cycle, step = divmod(iteration - 1, self.fast_steps)
        return f"iteration {iteration} (slow cycle {cycle + 1}, fast step {step + 1})"

    def slots(self, backbone: Backbone) -> int:
        """One per layer: of the fast stack its last output, of the slow one the last that was committed."""
        return backbone.n_layers

    def memory(self, backbone: Backbone) -> list[int]:
        """The outputs of both stacks."""
        return [self.span(backbone.n_layers)[1] - 1, backbone.n_layers - 1]

    def one_pass(self, model: Recurrence, p: Pass, at: PassInputs) -> tuple[Tensor, Tensor]:
        """One fast step, and the slow stack as a read-out."""
        backbone, end = model.backbone, self.span(model.backbone.n_layers)[1]
        low = backbone.decoder.z_L_init.to(at.embedded).expand_as(at.embedded)
        high = at.embedded
        if p.iteration > 1 and p.state is not None:
            there = True if p.has_state is None else p.has_state[..., None]
            carried = p.visit("stream_state", 0, backbone.decoder.L_module.final_norm(p.state[end - 1]))
            low = torch.where(torch.as_tensor(there, device=low.device), carried, low)
            if p.iteration > self.fast_steps:
                slow = backbone.final_norm(p.state[-1])
                high = torch.where(torch.as_tensor(there, device=low.device), slow, high)
        outputs: list[Tensor] = []
        x = low + high
        for index in range(end):
            x, _ = run_layer(backbone.layers[index], index, x, at, Reading(), p.visit)
            outputs.append(x)
        x = high + backbone.decoder.L_module.final_norm(x)
        for index in range(end, backbone.n_layers):
            x, _ = run_layer(backbone.layers[index], index, x, at, Reading(), p.visit)
            outputs.append(x)
        resid_post = torch.stack(outputs)
        if p.iteration % self.fast_steps == 0 or p.state is None:
            return resid_post, resid_post
        return resid_post, torch.cat([resid_post[:end], p.state[end:]])
