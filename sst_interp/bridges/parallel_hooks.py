"""Reading given tokens with a hook at every site: one position after the other, or all at once.

Sequentially a hook sees [row, 1, d_model], once per position and iteration, in the order they run: this is
the definition. In parallel it sees [row, position, d_model], once per iteration, as in any forward pass: the
exact states are solved first, and one pass at the solution shows them. If a hook changes a value, later
states move; the pass is then repeated from the states of the pass before until they settle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.models.hooks import Hook
from sst_interp.models.solvers import solve_exactly
from sst_interp.models.solvers.sequential import TOLERANCE, advance, relative_change
from sst_interp.models.stream import Recurrence, Stream, access_of, stack_pass

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
"""Which hook points: a name, names, or a function of the name; None is every one that fires."""

Method = Literal["parallel", "sequential"]


def refuse_options(others: dict[str, Any]) -> None:
    """Raise SSTError for an option of TransformerLens that would be ignored."""
    given = sorted(name for name, value in others.items() if value is not None)
    if others.get("incl_bwd") is False:
        given.remove("incl_bwd")
    if "incl_bwd" in given:
        raise SSTError(
            "incl_bwd=True does not work with a state stream: the pass records no gradients",
            "leave incl_bwd out, or boot a TransformerBridge on a copy of `model.backbone.model`",
        )
    if given:
        raise SSTError(f"{', '.join(given)}: not with a state stream", "leave it out")


@torch.no_grad()
def read_sequentially(
    model: Recurrence,
    tokens: Int[Tensor, "row position"],
    iterations: int,
    hook: Hook,
    stream: Stream | None = None,
) -> Float[Tensor, "row position iteration d_model"]:
    """The last layer's outputs, every token iterated `iterations` times.

    Args:
        stream: after an earlier text; None starts anew.
    """
    positions = tokens.shape[1]
    if stream is None:
        stream = model.new_stream(torch.zeros_like(tokens[:, 0]), positions)
    last = []
    for position in range(positions):
        done = advance(model, stream, tokens[:, position], iterations, partial(hook, position))
        last.append(torch.stack([it.resid_post[-1] for it in done], dim=1))
    return torch.stack(last, dim=1)


@torch.no_grad()
def read_in_parallel(
    model: Recurrence,
    hooked: Recurrence,
    tokens: Int[Tensor, "row position"],
    iterations: int,
    hook: Hook,
) -> Float[Tensor, "row position iteration d_model"]:
    """The same to the dtype's tolerance, all positions at once.

    Args:
        model: solves the unedited states.
        hooked: runs the passes: the same model, or its twin with hooks inside.
        hook: called with position 0, the first of each pass. It may be called several times per iteration;
            the last calls count.

    Raises:
        SSTError: the hook's changes do not settle, so they do not depend on earlier positions alone.
    """
    positions = tokens.shape[1]
    stream = model.new_stream(torch.zeros_like(tokens[:, 0]), positions)
    everywhere = list(range(positions))
    solution = solve_exactly(model, stream, tokens, iterations=iterations, check=everywhere)
    incoming = torch.stack([solution.incoming[t] for t in everywhere], dim=2)
    before, columns = solution.resid_post, torch.arange(positions, device=tokens.device)
    assert before is not None
    for _ in range(positions + 1):  # k passes make the first k positions exact
        outputs, state = [], incoming
        for number in range(1, iterations + 1):
            has_state = model.kind.has_state(columns, stream.origin[:, None], number)
            access = access_of(model.choices.kv, number, number == iterations)
            y, state = stack_pass(
                hooked, stream, tokens, columns, state, has_state, access, hook(0, number), number
            )
            outputs.append(y)
        now = torch.stack(outputs, dim=3)
        if float(relative_change(now, before).max()) < TOLERANCE[model.backbone.dtype]:
            return now[-1]
        before = now
        incoming = torch.cat([torch.zeros_like(state[:, :, :1]), state[:, :, :-1]], dim=2)
    raise SSTError(
        "the edited states do not settle: an edit changes a position by what comes after it, or at random",
        'method="sequential" calls it once per position and iteration',
    )
