"""The model in nnsight: every site of every iteration is a module whose `.output` can be read and written.

    sst = model.nnsight(iterations=4)
    with sst.generate(prompt, max_new_tokens=8) as tracer:
        for position in tracer.iter[5:6]:                            # a generated position
            y = sst.iteration[2].layers[12].resid_post.output.save()  # iteration 2, layer 12
            sst.iteration[3].layers[12].stream_state.output = y

nnsight names a value by its module and by the number of the module's call, and after the first value of a
step it hands over whatever call of a module comes next. Here the module says iteration, layer and site, and
the loop over `tracer.iter` says the position: a value of another position is refused, and every value that is
handed over says where it is from (`y.place`). Values come in the order they run: positions, then iterations,
layers, and the sites of `sst_interp.models.hooks`. The prompt of `generate` is read before position 0 and
calls no module.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from nnsight import NNsight
from nnsight.intervention.editing import EditingTracer
from nnsight.intervention.envoy import Envoy, traceable
from nnsight.intervention.interleaver import Interleaver, Mediator, getcurrent
from nnsight.intervention.iterator import Iterations
from nnsight.intervention.tracer import InterleavingTracer
from torch import Tensor, nn

from sst_interp.bridges.parallel_hooks import read_sequentially
from sst_interp.errors import SSTError
from sst_interp.models.choices import check_iterations, several, whole
from sst_interp.models.generation import Generation, generate
from sst_interp.models.hooks import SITES, Site, Visit, alike
from sst_interp.models.model import Prompt, Prompts, StateStreamModel, listed

POSITION = "position"
"""The location at which nnsight's workers wait for a position to begin."""


class Place(NamedTuple):
    """Where a value comes from; positions and layers count from 0, iterations from 1."""

    position: int
    iteration: int
    layer: int
    site: Site

    def __str__(self) -> str:
        return f"{self.site} of layer {self.layer}, iteration {self.iteration}, position {self.position}"


class Positions(Interleaver):
    """nnsight's meeting point of a model and the code of a trace, which here knows the position that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.over = -1, False
        """The position that runs, -1 before the first; whether the last one is done."""
        self.shown: set[tuple[int, int, Site]] = set()
        """(iteration, layer, site) of all values of this position that are past."""

    def __str__(self) -> str:
        return "the last position is done" if self.over else f"position {self.position} runs"

    def __enter__(self) -> Interleaver:
        self.position, self.over = -1, False
        self.shown.clear()
        return super().__enter__()

    def begin(self, position: int) -> None:
        """Position `position` is about to run. Raises SSTError in a trace that waits for an earlier one."""
        self._refuse_missed()
        self.position = position
        self.shown.clear()
        self.handle(POSITION, position)

    def finish(self) -> None:
        """No position comes any more: loops over `tracer.iter` end, and what stands after them runs."""
        self._refuse_missed()
        self.over = True
        for mediator in self.mediators:
            if mediator.alive and mediator.pending is not None and mediator.pending.provider == POSITION:
                mediator.pending = mediator.switch(None)
        self.reindex()

    def check(self, place: Place) -> None:
        """Raise SSTError if the value at `place`, which a trace asks for, is past."""
        if self.over or place.position < self.position or place[1:] in self.shown:
            raise SSTError(
                f"{place} has passed ({self})",
                "ask for values inside `for position in tracer.iter[...]`, in the order they run: positions, "
                "iterations, layers, sites",
            )

    def _refuse_missed(self) -> None:
        """A trace still waits for a value of the position that is done: raise SSTError where it waits."""
        if self.position < 0:
            return
        for mediator in self.mediators:
            pending = mediator.pending
            if not mediator.alive or pending is None or ".iteration." not in str(pending.provider):
                continue
            said = f"nothing ran at {str(pending.provider).partition('.')[2]} in position {self.position}"
            error = SSTError(said, "ask for the `.output` of a site that this kind of model has there")
            assert mediator.worker is not None
            mediator.worker.parent = getcurrent()
            try:
                mediator.pending = mediator.worker.throw(error)
            except BaseException as raised:  # nnsight shows the lines of the trace alone
                vars(raised).setdefault("__intervention_tb__", raised.__traceback__)
                raise
        if self.mediators:
            self.reindex()


class PositionLoop(Iterations):
    """`tracer.iter[...]`: the positions that a trace asks for, while there are any."""

    def __getitem__(self, key: Any) -> PositionLoop:
        loop = PositionLoop()
        if isinstance(key, slice):
            start, step = whole("a position", key.start or 0, 0), whole("a step", key.step or 1, 1)
            stop = None if key.stop is None else whole("a position", key.stop, 0)
            loop.start, loop.stop = start, stop
            loop.steps = None if step == 1 or stop is None else list(range(start, stop, step))
            if step > 1 and stop is None:
                raise SSTError("a loop with a step needs an end", "for example tracer.iter[0:64:2]")
        elif several(key):
            loop.steps = [whole("a position", each, 0) for each in key]
        else:
            loop.start = whole("a position", key, 0)
            loop.stop = loop.start + 1
        return loop

    def __iter__(self) -> Iterator[int]:
        """Each position once it begins; the loop ends with the text.

        Raises:
            SSTError: a position that is past.
        """
        mediator: Any = Mediator.current("tracer.iter")
        run: Positions = mediator.interleaver
        before = mediator.iteration, asked_position(mediator)
        try:
            for position in self._indices():
                if position < run.position + run.over:
                    raise SSTError(
                        f"position {position} has passed ({run})", "loop over positions in their order"
                    )
                if position > run.position and not run.over:
                    mediator.iteration = position  # the call of POSITION to wait for
                    Mediator.value(POSITION)
                if run.over:
                    if self.stop is not None or self.steps is not None:
                        warnings.warn(
                            f"a loop asks for position {position}; the last one was {run.position}",
                            stacklevel=2,
                        )
                    return
                mediator.iteration = None  # a module's next call, which `Positions` holds to this position
                mediator.asked_position = position
                yield position
        finally:
            mediator.iteration, mediator.asked_position = before

    def execute(self, code: Any) -> None:
        """Nnsight's old block form."""
        raise SSTError("`with tracer.iter[...]` is gone", "write `for position in tracer.iter[...]:`")


def asked_position(mediator: Any) -> int:
    """The position whose values a trace asks for: its loop's, or 0 outside a loop."""
    return getattr(mediator, "asked_position", 0)


class PositionTracer(InterleavingTracer):
    """A trace whose `iter` loops over positions."""

    @property
    def iter(self) -> Iterations:
        """Positions: `tracer.iter[2:5]`, `tracer.iter[3]`, `tracer.iter[[0, 4]]`, or `tracer.iter[:]`."""
        return PositionLoop()


class PositionEdit(EditingTracer):
    """An edit of every later trace; its `iter` loops over positions, too."""

    iter = PositionTracer.iter


def in_order(name: str) -> Any:
    """Nnsight's property of that name, with values that say where they are from and are refused when past."""
    served: Any = getattr(Envoy, name)

    def read(self: PointEnvoy) -> Any:
        self.check()
        value = served.__get__(self)
        if isinstance(value, Tensor):
            vars(value)["place"] = self.check()
        return value

    def write(self: PointEnvoy, value: Any) -> None:
        self.check()
        served.__set__(self, value)

    return property(read, write, doc=served.__doc__)


class PointEnvoy(Envoy):
    """A site as a trace sees it: `output` is a tensor [row, 1, d_model] whose `place` says where it is from.

    A site changes nothing, so its `input` is its output before it is written to.

    Raises:
        SSTError: the value is past.
    """

    output, input, inputs = map(in_order, ("output", "input", "inputs"))

    def check(self) -> Place:
        """The place that the trace asks for. Raises SSTError if it is past."""
        module: Any = self._module
        run: Any = self.interleaver
        place = Place(asked_position(Mediator.current(self.path)), *module.at)
        run.check(place)
        return place


class Point(nn.Identity):
    """The module of one site: returns its input."""

    def __init__(self, iteration: int, layer: int, site: Site) -> None:
        super().__init__()
        self.at = iteration, layer, site


class Sites(nn.Module):
    """The sites of one layer in one iteration."""

    def __init__(self, iteration: int, layer: int) -> None:
        super().__init__()
        for site in SITES:
            self.add_module(site, Point(iteration, layer, site))


class Shown(nn.Module):
    """The module that nnsight wraps. It has no weights: the model runs as always and shows itself here."""

    def __init__(self, model: StateStreamModel, iterations: int, run: Positions) -> None:
        super().__init__()
        self.model, self.run = model, run
        self.iteration = nn.ModuleDict()
        """By iteration, from "1": a module whose `layers` are the sites of each layer."""
        for number in range(1, iterations + 1):
            one = nn.Module()
            one.layers = nn.ModuleList(Sites(number, layer) for layer in range(model.backbone.n_layers))
            self.iteration[str(number)] = one

    def forward(self, prompts: list[Prompt]) -> Float[Tensor, "row position vocab"]:
        """Read given tokens one after the other, each iterated; the last iteration's logits."""
        tokens, pad = self.model.batch(prompts)
        if bool(pad.any()):
            raise SSTError("prompts of different length have no common positions", "trace them one by one")
        last = read_sequentially(self.model, tokens, len(self.iteration), self.hook)
        self.run.finish()
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
        self.run.finish()
        return model.with_texts(out, stop)

    def hook(self, position: int, iteration: int) -> Visit:
        """Show a pass to the modules of its iteration."""
        layers: Any = self.iteration[str(iteration)].layers
        if iteration == 1:
            self.run.begin(position)

        def visit(site: Site, layer: int, tensor: Tensor) -> Tensor:
            shown = getattr(layers[layer], site)(tensor.clone())
            self.run.shown.add((iteration, layer, site))
            return alike(shown, tensor, str(Place(position, iteration, layer, site)))

        return visit


class StateStreamNNsight(NNsight):
    """`trace` reads given tokens, `generate` writes new ones; `iteration[i].layers[l].SITE.output` is a
    tensor [row, 1, d_model]. Several `tracer.invoke`s make one batch, and each sees its own rows.

    Raises SSTError where something of another shape or dtype is written, and for a value that is past.
    """

    def __init__(self, model: StateStreamModel, iterations: int = 1) -> None:
        (iterations,) = check_iterations([iterations])
        run = Positions()
        super().__init__(Shown(model, iterations, run), interleaver=run, envoys={Point: PointEnvoy})

    def trace(self, *args: Any, tracer_cls: Any = PositionTracer, **kwargs: Any) -> Any:
        """nnsight's, with loops over positions."""
        return super().trace(*args, tracer_cls=tracer_cls, **kwargs)

    def edit(self, *, inplace: bool = False, backend: Any = None) -> PositionEdit:
        """nnsight's, with loops over positions."""
        return PositionEdit(self, inplace=inplace, backend=backend)

    @traceable
    def generate(
        self, prompts: Prompts, max_new_tokens: int = 64, stop_tokens: Sequence[int] | None = None
    ) -> Generation:
        """`StateStreamModel.generate`. Its result is `tracer.result`; its steps are positions."""
        return self._module.generate(listed(prompts), max_new_tokens, stop_tokens)  # pyright: ignore

    def _batch_size(self, *inputs: Any, **_kwargs: Any) -> int:
        rows = len(listed(inputs[0])) if inputs else 0
        if inputs and not rows:
            raise SSTError("there is no prompt", "a trace reads at least one token")
        return rows

    def _batch(self, invokes: list[tuple[Any, dict[str, Any]]], fn: Any) -> tuple[tuple[Any], dict[str, Any]]:
        prompts = [prompt for inputs, _ in invokes for prompt in listed(inputs[0])]
        return (prompts,), {name: value for _, kwargs in invokes for name, value in kwargs.items()}
