"""A language model with a state stream: attach one to a backbone, replay tokens through it, generate.

model = sst.load("smollm2-135m", alpha=0.027)
model.replay(tokens, iterations=4).resid_post    # [question, position, layer, iteration, d_model]
model.generate(["Why is the sky blue?"], iterations=4).texts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sst_interp.backbone import Backbone
from sst_interp.bridges import Bridges
from sst_interp.certificate import Certificate
from sst_interp.choices import Choices
from sst_interp.errors import SSTError
from sst_interp.generation import Generation, Observe, generate, generate_at_depths
from sst_interp.halting import Flat, HaltingPolicy
from sst_interp.hooks import Edit
from sst_interp.kind import Kind
from sst_interp.prompt import prefill
from sst_interp.replay import Replay, replay
from sst_interp.stream import LayerBlend, Recurrence, Stream

Prompt = str | Sequence[int]


class StateStreamModel(Recurrence, Bridges):
    """A backbone with a state stream.

    Args:
        backbone: validated parts of the language model.
        tokenizer: Hugging Face tokenizer; None if only token ids are used.
        alpha: blend weights in [0, 1]: a number, one per layer [layer], or [layer, d_model].
        choices: what the paper leaves open.
        name: how listings and errors call this model.
        kind: another kind of stream, instead of `alpha` (`sst_interp.lrt`).

    Raises:
        SSTError: alpha of the wrong shape, not finite, or outside [0, 1].
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Any = None,
        alpha: float | Tensor | Sequence[float] = 0.027,
        choices: Choices | None = None,
        name: str = "model",
        kind: Kind | None = None,
    ) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.choices = choices or Choices()
        self.name = name
        self.kind = LayerBlend(expand_alpha(alpha, backbone)) if kind is None else kind
        self.kind.check(self.choices)

    def __repr__(self) -> str:
        b = self.backbone
        return (
            f"StateStreamModel({self.name}: {b.family}, {b.n_layers} layers x {b.d_model}, "
            f"{str(b.dtype).removeprefix('torch.')}, {self.kind})"
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text as it is (special tokens as the tokenizer adds them), or ids."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise SSTError("this model has no tokenizer", "pass token ids, or attach(..., tokenizer)")
        return list(self.tokenizer(prompt)["input_ids"])

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text inside a conversation: no special tokens are added."""
        if self.tokenizer is None:
            raise SSTError("this model has no tokenizer", "pass token ids, or attach(..., tokenizer)")
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(self, message: str, system: str | None = None, reply_prefix: str = "") -> list[int]:
        """Token ids of a user message in the tokenizer's chat template, ready to be answered, and of what
        the reply begins with. A tokenizer without a template gets the message as plain text.
        """
        begun = self.encode_plain(reply_prefix) if reply_prefix else []
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            return [*self.encode(message), *begun]
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": message})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return [*self.encode_plain(text), *begun]

    def batch(self, prompts: Sequence[Prompt] | Tensor) -> tuple[Tensor, Tensor]:
        """Left-padded token ids [row, column] and the padding per row.

        Raises:
            SSTError: no prompts, an empty prompt, or an id outside the vocabulary.
        """
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
            raise SSTError("one prompt was given where a list of prompts is needed", "put it in [ ]")
        rows = [self.encode(p) for p in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)]
        if not rows or not all(rows):
            raise SSTError("there is an empty prompt", "every prompt needs at least one token")
        width = max(map(len, rows))
        size = self.backbone.model.get_input_embeddings().num_embeddings
        if not all(0 <= t < size for row in rows for t in row):
            raise SSTError(f"a token id is outside the vocabulary of {size}", "was another tokenizer used?")
        limit = self.backbone.max_length
        if limit is not None and width > limit:
            raise SSTError(
                f"a prompt has {width} tokens; the context is {limit}",
                "shorten the prompt or choose a longer-context backbone",
            )
        pad = torch.tensor([width - len(row) for row in rows], device=self.backbone.device)
        filled = [[row[0]] * (width - len(row)) + row for row in rows]
        return torch.tensor(filled, device=self.backbone.device), pad

    def prefill(self, stream: Stream, tokens: Int[Tensor, "row position"]) -> Certificate:
        """Read a prompt (or a further piece of one) as `choices.prompt` says; see `prompt.prefill`."""
        return prefill(self, stream, tokens)

    def replay(
        self,
        token_ids: Sequence[Prompt] | Tensor,
        iterations: int = 1,
        method: Literal["parallel", "sequential"] = "parallel",
        *,
        start: int = 0,
        groups: int | None = None,
        sweeps: int | None = None,
        tolerance: float | None = None,
        logits: bool = True,
        check: int = 4,
    ) -> Replay:
        """Run given tokens through the model and record every layer output.

        Args:
            token_ids: [question, position], or a list of token lists or texts of different length.
            iterations: depth of every position from `start` on.
            method: `sequential` is the definition; `parallel` solves all positions at once for the same
                states: layer by layer, or by sweeps over the whole stack if `groups` or `sweeps` is given.
            start: positions before it run once and are not returned (the prompt; equal lengths needed).
            groups, sweeps, tolerance: see `sweeps.solve_by_sweeps`; `tolerance` also holds for `layerwise`.
            logits: False leaves `.logits` None (they take question x position x iteration x vocab).
            check: positions of the parallel solution recomputed one by one for the certificate.

        Returns:
            `Replay` with `.logits` [question, position, iteration, vocab], `.resid_post`
            [question, position, layer, iteration, d_model] and `.certificate`.

        Raises:
            SSTError: iterations below 1, unknown method, empty or too long input.
        """
        tokens, pad = self.batch(token_ids)
        return replay(
            self, tokens, pad, iterations, method, start=start, groups=groups, sweeps=sweeps,
            tolerance=tolerance, logits=logits, check=check,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Prompt] | Tensor,
        iterations: int | Sequence[int] = 1,
        max_new_tokens: int = 64,
        stop_tokens: Sequence[int] | None = None,
        observe: Observe | None = None,
        progress: Callable[[int], Any] | None = None,
        depth: HaltingPolicy | int | None = None,
        edit: Edit | None = None,
    ) -> Generation:
        """Generate greedily from prompts of different lengths.

        Args:
            prompts: texts (read as they are; `model.chat(text)` gives a chat turn) or token ids.
            iterations: depth of every generated position; one number, or one per prompt.
            max_new_tokens: token budget per prompt.
            stop_tokens: ids that end a text (kept as its last token); None takes the model's own.
            observe: called with a `Step` at each generated position: every iteration's layer outputs and
                logits, recorded while generating.
            progress: called with the number of positions done.
            depth: instead of `iterations`: a policy that looks at position 0 and picks each prompt's depth
                (`sst_interp.halting`, or a trained probe), or one number.
            edit: called at every site of every layer, iteration and generated position, and may change what
                it sees (`sst_interp.hooks`). The prompt is read without it.

        Raises:
            SSTError: iterations below 1, an empty prompt, prompt and budget longer than the context, or a
                probe of another model; an edit that returns another kind of tensor, or that is bound to
                places that never came.
        """
        tokens, pad = self.batch(prompts)
        depths: Sequence[int] | HaltingPolicy = (
            [iterations] * len(pad) if isinstance(iterations, int | float) else list(iterations)
        )
        if depth is not None:
            if iterations != 1:
                raise SSTError("both iterations and depth were given", "leave one of them out")
            depths = Flat(depth) if isinstance(depth, int) else depth
            depths.check(self)
        stop = self.stop_tokens if stop_tokens is None else stop_tokens
        out = generate(self, tokens, pad, depths, max_new_tokens, stop, observe, progress, edit)
        if self.tokenizer is not None:
            out.texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.tokens]
        return out

    def generate_at_depths(
        self,
        prompts: Sequence[Prompt] | Tensor,
        depths: Sequence[int],
        max_new_tokens: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> dict[int, Generation]:
        """Every prompt continued at every depth; the prompts are read once.

        Args:
            prompts: as for `generate`.
            depths: iteration depths.
            max_new_tokens: token budget per text.
            progress: called with the number of positions done.

        Raises:
            SSTError: as `generate`.
        """
        tokens, pad = self.batch(prompts)
        found = generate_at_depths(self, tokens, pad, depths, max_new_tokens, self.stop_tokens, progress)
        for out in found.values():
            if self.tokenizer is not None:
                out.texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.tokens]
        return found

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a text: the generation config's, the model config's and the tokenizer's."""
        found: set[int] = set()
        for source in (
            getattr(self.backbone.model, "generation_config", None),
            self.backbone.config,
            self.tokenizer,
        ):
            ids = getattr(source, "eos_token_id", None)
            found |= set(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
        return sorted(found)


def expand_alpha(alpha: float | Tensor | Sequence[float], backbone: Backbone) -> Tensor:
    """Blend weights as [layer, d_model] in fp32 (fp64 for a float64 backbone), checked."""
    dtype = torch.promote_types(backbone.dtype, torch.float32)
    given = torch.as_tensor(alpha, dtype=dtype, device=backbone.device).detach()
    if given.dim() == 1:
        given = given[:, None]
    shape = (backbone.n_layers, backbone.d_model)
    try:
        full = given.expand(shape).clone()
    except RuntimeError:
        raise SSTError(
            f"alpha has shape {list(given.shape)}; this backbone needs [{shape[0]}, {shape[1]}]",
            "pass one number, one per layer, or one per layer and dimension",
        ) from None
    if not bool(torch.isfinite(full).all()) or full.min() < 0 or full.max() > 1:
        raise SSTError(
            f"alpha runs from {full.min():.4g} to {full.max():.4g}; it must lie in [0, 1]",
            "the paper's range is 0.015 to 0.10",
        )
    return full


def attach(
    model: nn.Module,
    tokenizer: Any = None,
    alpha: float | Tensor | Sequence[float] = 0.027,
    choices: Choices | None = None,
    name: str | None = None,
) -> StateStreamModel:
    """Attach a state stream to any Hugging Face causal LM in memory.

    The model is not copied or changed; parts are resolved by family and validated by numbers.

    Args:
        model: `AutoModelForCausalLM` of a supported family (Llama, Qwen2/3, Mistral, Gemma 2/3, GPT-2).
        tokenizer: its tokenizer, if texts are to be used.
        alpha: blend weights (see `StateStreamModel`); the default is the paper's mean.
        choices: what the paper leaves open.
        name: how listings and errors call it; None takes the family's.

    Raises:
        SSTError: unsupported family (with the missing point), non-finite weights, alpha outside [0, 1].
    """
    backbone = Backbone(model)
    return StateStreamModel(backbone, tokenizer, alpha, choices, name or backbone.family)
