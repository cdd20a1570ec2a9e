"""A model with a state stream in inspect_ai: any task, at any depth, with the hidden states if asked for.

    inspect eval task.py --model sst-interp/smollm2-135m-sst -M iterations=4
    inspect eval task.py --model sst-interp/smollm2-135m-sst -M halting=convergence -M threshold=0.05

Samples that wait at the same time are written as one batch, and one batch is written at a time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import torch
from anyio.to_thread import run_sync
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo
from torch import Tensor

from sst_interp.bridges import for_harness
from sst_interp.errors import SSTError
from sst_interp.models.choices import MAX_DEPTH, whole
from sst_interp.models.generation import Generation, Step
from sst_interp.models.model import StateStreamModel
from sst_interp.models.prompts import in_time

SAMPLING = ("temperature", "top_p", "top_k")
"""Options that `model.generate` is given."""
REFUSED = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "num_choices", "logprobs",
    "top_logprobs", "prompt_logprobs", "response_schema", "reasoning_effort", "reasoning_tokens",
    "modalities", "extra_body",
)  # fmt: skip
"""Options that change what is written, or what is returned, and that there is no way to honour."""
LONGEST = 2048
"""Tokens of a text, where neither the task nor the model says."""


@dataclass(eq=False)
class Waiting:
    """A prompt that waits for its text."""

    prompt: list[int]
    budget: int
    options: dict[str, Any]
    seed: int
    done: ModelOutput | SSTError | None = None


@dataclass
class States:
    """Hidden states of chosen layers and iterations, collected while a batch is written."""

    layers: list[int]
    iterations: list[int]
    of_prompt: dict[int, list[Any]] = field(default_factory=dict)
    """Prompt -> nested lists [position, layer, iteration, d_model]."""

    def observe(self, step: Step) -> None:
        """Keep those of one generated position. Iterations that a prompt does not reach are left out."""
        kept = [it for it in step.iterations if it.number in self.iterations]
        values = [it.resid_post[self.layers].float().cpu() for it in kept]
        for row, (prompt, alive) in enumerate(zip(step.rows.tolist(), step.alive.tolist(), strict=True)):
            reached = [each[:, row] for each in values if row < each.shape[1]]
            if alive:
                here = torch.stack(reached, 1).tolist() if reached else [[] for _ in self.layers]
                self.of_prompt.setdefault(prompt, []).append(here)


@modelapi("sst-interp")
class StateStreamAPI(ModelAPI):
    """A model of `sst.load` as inspect_ai's provider.

    The metadata of an output has the depth (`iterations`) and, if `hidden_layers` was given,
    `hidden_states` as lists [position, layer, iteration, d_model], with `hidden_layers` and
    `hidden_iterations` beside it. Positions are those that wrote the text.

    Args:
        model_name: what `sst.load` takes.
        config: inspect_ai's own.
        iterations, halting, threshold, deepest: the depth; see `sst_interp.bridges.for_harness`.
        batch_size: the most samples in one batch.
        hidden_layers: layers, from 0, or `all`.
        hidden_iterations: iterations, from 1; None is every one.
        loaded: a model in memory, instead of one of that name.
        how: of `sst.load`: `alpha`, `dtype`, `device`, `kind`, `trust_remote_code`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (inspect_ai's own signature)
        iterations: int = 1,
        halting: str | None = None,
        threshold: float | None = None,
        deepest: int = 4,
        batch_size: int = 16,
        hidden_layers: Any = None,
        hidden_iterations: Any = None,
        loaded: StateStreamModel | None = None,
        **how: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        try:
            given = loaded or model_name
            self.model, self.depth = for_harness(given, iterations, halting, threshold, deepest, **how)
            self.batch_size = whole("batch_size", batch_size, 1)
            deep = self.depth if isinstance(self.depth, int) else self.depth.deepest
            last = self.model.backbone.n_layers - 1
            self.layers = None if hidden_layers is None else _numbers("hidden_layers", hidden_layers, 0, last)
            every = "all" if hidden_iterations is None else hidden_iterations
            self.iterations = _numbers("hidden_iterations", every, 1, min(deep, MAX_DEPTH))
            if self.model.tokenizer is None:
                raise SSTError(f"{self.model.name} has no tokenizer", "attach(model, tokenizer)")
            self._refuse(config)  # before the first sample
        except SSTError as error:
            raise PrerequisiteError(str(error)) from error
        self.waiting: list[Waiting] = []
        self.turn = anyio.Lock()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The text that answers a conversation; it waits for its turn with others like it."""
        try:
            mine = self._asked(input, tools, config)
            self.waiting.append(mine)
            try:
                async with self.turn:
                    if mine.done is None:
                        alike = [
                            each for each in self.waiting if each is not mine and self._alike(each, mine)
                        ]
                        await run_sync(self._write, [mine, *alike[: self.batch_size - 1]])
            finally:
                if mine in self.waiting:
                    self.waiting.remove(mine)
            if isinstance(mine.done, SSTError):
                raise mine.done
        except SSTError as error:
            raise PrerequisiteError(str(error)) from error
        assert mine.done is not None
        return mine.done

    def _asked(self, turns: list[ChatMessage], tools: list[ToolInfo], config: GenerateConfig) -> Waiting:
        """The prompt's ids and what is asked of its text. Raises SSTError for what cannot be done."""
        if tools:
            raise SSTError("tools are not supported", "leave the tools out of the task")
        self._refuse(config)
        options = {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}
        options["stop"] = [string for string in config.stop_seqs or () if string]
        prompt = self._ids(turns)
        limit = self.model.backbone.max_length
        budget = config.max_tokens or LONGEST
        if limit is not None:
            if len(prompt) >= limit:
                raise SSTError(f"a prompt has {len(prompt)} tokens; the context is {limit}", "shorten it")
            budget = min(budget, limit - len(prompt))
        seed = random.randrange(2**31) if config.seed is None else config.seed
        return Waiting(prompt, budget, options, seed)

    def _refuse(self, config: GenerateConfig) -> None:
        """Raise SSTError for an option that there is no way to honour."""
        refused = [name for name in REFUSED if getattr(config, name) is not None]
        if refused:
            raise SSTError(f"generation option {refused[0]} is not supported", "leave it out")

    def _ids(self, turns: list[ChatMessage]) -> list[int]:
        """Token ids of a conversation in the tokenizer's template; without one, lines of `role: text`."""
        for turn in turns:
            if not isinstance(turn.content, str) and any(
                part.type not in ("text", "reasoning") for part in turn.content
            ):
                raise SSTError("a message holds more than text", "the model reads text only")
        said = [{"role": turn.role, "content": turn.text} for turn in turns]
        if not getattr(self.model.tokenizer, "chat_template", None):
            alone = len(said) == 1 and said[0]["role"] == "user"
            lines = "".join(f"{turn['role']}: {turn['content']}\n" for turn in said)
            return self.model.encode(said[0]["content"] if alone else lines)
        begun = said[-1]["role"] == "assistant"  # the answer's first words are given
        how = {"tokenize": False, "add_generation_prompt": not begun, "continue_final_message": begun}
        text = in_time(
            lambda: self.model.tokenizer.apply_chat_template(said, **how),
            f"the chat template of {self.model.name}",
        )
        return self.model.encode_plain(text)

    def _alike(self, one: Waiting, other: Waiting) -> bool:
        """Whether two prompts can be written in one batch: same options, and together they fit."""
        limit = self.model.backbone.max_length
        room = limit is None or max(len(one.prompt), len(other.prompt)) + other.budget <= limit
        same = (one.budget, one.options) == (other.budget, other.options)
        return one.done is None and same and room

    def _write(self, batch: Sequence[Waiting]) -> None:
        """Write the texts of a batch, and hand each its output or the error."""
        options: dict[str, Any] = {**batch[0].options, "seed": [each.seed for each in batch]}
        states = None if self.layers is None else States(self.layers, self.iterations)
        if states is not None:
            options["observe"] = states.observe
        try:
            out = self.model.generate(
                [each.prompt for each in batch], depth=self.depth, max_new_tokens=batch[0].budget, **options
            )
        except SSTError as error:
            for each in batch:
                each.done = error
            return
        for row, each in enumerate(batch):
            each.done = self._output(each, out, row, states)

    def _output(self, asked: Waiting, out: Generation, row: int, states: States | None) -> ModelOutput:
        """One row of a batch as inspect_ai's output."""
        assert out.texts is not None
        text, depth, new = out.texts[row], out.iterations[row], len(out.tokens[row])
        reason: StopReason = "stop" if out.stopped[row] else "max_tokens"
        metadata: dict[str, Any] = {"iterations": depth}
        if asked.options.keys() & set(SAMPLING) and asked.options.get("temperature") != 0:
            metadata["seed"] = asked.seed
        if states is not None:
            metadata["hidden_states"] = states.of_prompt[row]
            metadata["hidden_layers"] = states.layers
            metadata["hidden_iterations"] = [number for number in states.iterations if number <= depth]
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(
                input_tokens=len(asked.prompt), output_tokens=new, total_tokens=len(asked.prompt) + new
            ),
            metadata=metadata,
        )

    def max_tokens(self) -> int | None:
        """inspect_ai's default budget: the rest of the context, at most 2,048 tokens."""
        return LONGEST

    def max_connections(self) -> int:
        """Samples that may wait at once: one batch."""
        return self.batch_size

    def collapse_user_messages(self) -> bool:
        """Chat templates want turns that alternate."""
        return True


def _numbers(name: str, given: Any, low: int, high: int) -> list[int]:
    """Layers or iterations as a command line gives them: `all`, one number, `0,2`, or a list."""
    if given == "all" or given is True:
        return list(range(low, high + 1))
    several = given.split(",") if isinstance(given, str) else given
    if isinstance(several, Tensor):
        several = several.tolist()
    if not isinstance(several, Sequence):
        several = [several]
    read = [int(each) if isinstance(each, str) and each.strip().isdecimal() else each for each in several]
    return sorted({whole(name, each, low, high) for each in read})
