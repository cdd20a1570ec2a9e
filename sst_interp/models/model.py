"""A language model with a state stream: attach one to a backbone, replay tokens through it, generate.

model = sst.load("smollm2-135m", alpha=0.027)
model.replay(tokens, iterations=4).resid_post    # [question, position, layer, iteration, d_model]
model.generate(["Why is the sky blue?"], iterations=4).texts
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Number
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from sst_interp.errors import SSTError, upstairs
from sst_interp.models.backbone import Backbone, first_line
from sst_interp.models.choices import (
    MAX_DEPTH,
    Choices,
    as_weights,
    check_choices,
    check_iterations,
    shown,
    whole,
)
from sst_interp.models.generation import Generation, Observe, generate, generate_at_depths
from sst_interp.models.halting import Flat, HaltingPolicy
from sst_interp.models.hooks import Edit
from sst_interp.models.kinds.looped import Looped
from sst_interp.models.kinds.lrt import MemoryDesign, Pathway, Projections, build_memory
from sst_interp.models.kinds.sst import PAPER_ALPHA, LayerBlend
from sst_interp.models.likelihood import LogLikelihood, loglikelihood
from sst_interp.models.solvers import Replay, prefill, replay
from sst_interp.models.solvers.sequential import Certificate
from sst_interp.models.stream import Kind, Recurrence, Stream

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt] | Tensor | np.ndarray
"""One prompt or several: texts, or token ids as a list, tuple, tensor or array; also ids [row, position]."""

TEMPLATE_SECONDS = 10.0
"""A chat template that takes longer is stopped."""


class StateStreamModel(Recurrence):
    """A backbone with a state stream.

    Args:
        backbone: validated parts of the language model.
        kind: the stream, as `kind.fit` fits it to the backbone.
        tokenizer: Hugging Face tokenizer; None if only token ids are used.
        choices: what the paper leaves open.
        name: how listings and errors call this model.

    Raises:
        SSTError: weights that do not fit the backbone; choices of another type, or that the kind cannot make.
    """

    def __init__(
        self,
        backbone: Backbone,
        kind: Kind,
        tokenizer: Any = None,
        choices: Choices | None = None,
        name: str = "model",
    ) -> None:
        self.choices = check_choices(choices)
        kind.check(self.choices)
        super().__init__(backbone, kind.fit(backbone), self.choices)
        self.tokenizer = tokenizer
        self.name = name

    def __repr__(self) -> str:
        b = self.backbone
        return (
            f"StateStreamModel({self.name}: {b.family}, {b.n_layers} layers x {b.d_model}, "
            f"{str(b.dtype).removeprefix('torch.')}, {self.kind})"
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text as it is (special tokens as the tokenizer adds them), or ids."""
        return self._tokenize(prompt) if isinstance(prompt, str) else _ids(prompt)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text inside a conversation: no special tokens are added."""
        return self._tokenize(text, add_special_tokens=False)

    def encode_pair(self, context: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of a context and of a text that continues it.

        The continuation's are those of the two together after as many as the context has alone, and white
        space at the context's end belongs to the continuation: lm-evaluation-harness splits them so.
        """
        if not isinstance(context, str) or not isinstance(continuation, str):
            after = self.encode_plain(continuation) if isinstance(continuation, str) else _ids(continuation)
            return self.encode(context), after
        before = context.rstrip()
        ids = self.encode(before)
        return ids, self.encode(context + continuation)[len(ids) :]

    def _tokenize(self, text: str, **how: bool) -> list[int]:
        if self.tokenizer is None:
            raise SSTError("this model has no tokenizer", "pass token ids, or attach(..., tokenizer)")
        return list(self.tokenizer(text, **how)["input_ids"])

    def chat(self, message: str, system: str | None = None, reply_prefix: str = "") -> list[int]:
        """Token ids of a user message in the tokenizer's chat template, then of `reply_prefix`.

        A tokenizer without a template gets the message as plain text.

        Raises:
            SSTError: the template raises an error, or takes more than 10 s.
        """
        begun = self.encode_plain(reply_prefix) if reply_prefix else []
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            return [*self.encode(message), *begun]
        turns = [{"role": "system", "content": system}] if system is not None else []
        turns.append({"role": "user", "content": message})
        text = _in_time(
            lambda: self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
            f"the chat template of {self.name}",
        )
        return [*self.encode_plain(text), *begun]

    def batch(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Left-padded token ids [row, column] and the padding per row. One prompt alone is a batch of one.

        Raises:
            SSTError: no prompts, an empty prompt, or ids that are not whole numbers of the vocabulary.
        """
        rows = [self.encode(prompt) for prompt in listed(prompts)]
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

    def bridge(self) -> Any:
        """The model as a TransformerLens `TransformerBridge`, made once; it shares the weights."""
        return upstairs("bridges:bridge")(self)

    def run_with_cache(self, prompts: Prompts, iterations: int = 1, *args: Any, **options: Any) -> Any:
        """(logits, caches) of given tokens, one of each per iteration; see `sst_interp.bridges`."""
        return upstairs("bridges:run_with_cache")(self, prompts, iterations, *args, **options)

    def nnsight(self, iterations: int = 1) -> Any:
        """The model for nnsight: `trace` and `generate` at this depth."""
        return upstairs("bridges:open_nnsight")(self, iterations)

    def push_to_hub(self, repo_id: str, **how: Any) -> str:
        """Upload the stream for `sst.load(repo_id)`; see `sst_interp.models.loading.push_to_hub`."""
        return upstairs("models.loading:push_to_hub")(self, repo_id, **how)

    def prefill(self, stream: Stream, tokens: Int[Tensor, "row position"]) -> Certificate:
        """Read a prompt, or a further piece of one, as `choices.prompt` says."""
        return prefill(self, stream, tokens)

    def replay(
        self,
        token_ids: Prompts,
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
        """Every layer output and logit on given tokens.

        Args:
            token_ids: one prompt or several: texts, or ids [position] or [question, position].
            iterations: depth of every position from `start` on.
            method: `sequential` is the definition; `parallel` solves all positions at once for the same
                states, by sweeps over the whole stack if `groups` or `sweeps` is given.
            start: positions before it run once and are not returned (the prompt; equal lengths needed).
            groups, sweeps, tolerance: see `sst_interp.models.solvers.sweeps.solve_by_sweeps`.
            logits: False leaves `.logits` None.
            check: positions of the parallel solution recomputed one by one for the certificate.

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
        prompts: Prompts,
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
            prompts: one or several: texts, read as they are, or ids (`model.chat(text)` gives a chat turn).
            iterations: depth of every generated position; one number, or one per prompt.
            max_new_tokens: token budget per prompt.
            stop_tokens: ids that end a text (kept as its last token); None takes the model's own.
            observe: called with each generated position's `Step`: every iteration's layer outputs and logits.
            progress: called with the number of positions done.
            depth: instead of `iterations`: a policy that picks each prompt's depth at position 0
                (`sst_interp.models.halting`, or a trained probe), or one number.
            edit: called at every site of every layer, iteration and generated position, and may change what
                it is given (`sst_interp.models.hooks`). The prompt is read without it.

        Raises:
            SSTError: iterations below 1, an empty prompt, prompt and budget longer than the context, a probe
                of another model, or an edit that returns another kind of tensor or is never called.
        """
        tokens, pad = self.batch(prompts)
        depths: Sequence[int] | HaltingPolicy
        if isinstance(iterations, Sequence | Tensor | np.ndarray) and np.ndim(iterations):
            depths = check_iterations(iterations)
        else:
            depths = [whole("iterations", iterations, 1, MAX_DEPTH)] * len(pad)
        if depth is not None:
            if isinstance(iterations, Sequence) or iterations != 1:
                raise SSTError("both iterations and depth were given", "leave one of them out")
            depths = depth if isinstance(depth, HaltingPolicy) else Flat(whole("depth", depth, 1, MAX_DEPTH))
            depths.check(self)
        stop = self.stop_tokens if stop_tokens is None else check_stop(stop_tokens)
        out = generate(self, tokens, pad, depths, max_new_tokens, stop, observe, progress, edit)
        return self._with_texts(out)

    def generate_at_depths(
        self,
        prompts: Prompts,
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
            SSTError: as `generate`; no depths.
        """
        tokens, pad = self.batch(prompts)
        by_depth = generate_at_depths(self, tokens, pad, depths, max_new_tokens, self.stop_tokens, progress)
        return {depth: self._with_texts(out) for depth, out in by_depth.items()}

    def loglikelihood(
        self, context: Prompt, continuations: Sequence[Prompt], iterations: int | Sequence[int] = 1
    ) -> LogLikelihood:
        """How likely each continuation of a context is, at one depth or at several.

            model.loglikelihood("The sky is", [" blue", " green"], iterations=4).sums

        Args:
            context: a text, or ids. It is read once, at depth 1, up to its last token.
            continuations: texts, or lists of ids.
            iterations: depth of every position from the context's last token on; a list adds an axis.

        Raises:
            SSTError: as `generate`; an empty context or continuation.
        """
        several = isinstance(iterations, Sequence | Tensor | np.ndarray) and np.ndim(iterations) > 0
        depths: Any = iterations if several else [iterations]
        if isinstance(continuations, str):
            raise SSTError("continuations are one text", 'give a list, for example [" blue", " green"]')
        pairs = [self.encode_pair(context, continuation) for continuation in continuations]
        after = [ids for _, ids in pairs]
        tokens, pad = self.batch([pairs[0][0] if pairs else self.encode(context)])
        out = loglikelihood(self, tokens, pad, [after], check_iterations(depths))
        return out if several else LogLikelihood(out.sums[0], out.terms[0], out.lengths, out.greedy[0])

    def _with_texts(self, out: Generation) -> Generation:
        if self.tokenizer is not None:
            out.texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.tokens]
        return out

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a text: the generation config's, the model config's and the tokenizer's."""
        ids: set[int] = set()
        generation_config = getattr(self.backbone.model, "generation_config", None)
        for source in (generation_config, self.backbone.config, self.tokenizer):
            ends = getattr(source, "eos_token_id", None)
            ids |= set(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends])
        return sorted(ids)


def listed(prompts: Any) -> list[Prompt]:
    """Prompts as a list; one prompt alone becomes a list of one.

    Raises:
        SSTError: they are neither texts nor ids [position] or [row, position].
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Tensor | np.ndarray):
        if prompts.ndim not in (1, 2):
            raise SSTError(
                f"token ids have shape {list(prompts.shape)}", "give [position] or [row, position]"
            )
        return [_ids(row) for row in (prompts if prompts.ndim == 2 else prompts[None])]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise SSTError(
            f"prompts are a {type(prompts).__name__}, not texts or token ids",
            'for example ["Why is the sky blue?"] or [[12, 7, 9]]',
        )
    flat = bool(prompts) and all(isinstance(p, Number) or getattr(p, "ndim", None) == 0 for p in prompts)
    return [_ids(prompts)] if flat else [p if isinstance(p, str) else _ids(p) for p in prompts]


def _ids(row: Any) -> list[int]:
    """One prompt's token ids as ints, or SSTError. (No error shows a prompt's text: it may be restricted.)"""
    hint = "token ids are whole numbers from 0, as a tokenizer gives them"
    if isinstance(row, Tensor | np.ndarray):
        dtype = str(row.dtype).removeprefix("torch.")
        if row.ndim != 1 or "int" not in dtype or getattr(row, "is_meta", False):
            raise SSTError(f"a prompt is of {dtype} and shape {list(row.shape)}, not ids [position]", hint)
        return row.tolist()
    if not isinstance(row, Sequence) or isinstance(row, str | bytes):
        raise SSTError(f"a prompt is a {type(row).__name__}, neither text nor token ids", hint)
    for token in row:
        if not isinstance(token, Number | Tensor | np.ndarray):
            raise SSTError(f"a prompt has a {type(token).__name__} among its token ids", hint)
    return [token if type(token) is int else whole("a token id", token, 0) for token in row]


def check_stop(stop_tokens: Any) -> list[int]:
    """The ids that end a text as ints, or SSTError."""
    if isinstance(stop_tokens, str) or not isinstance(stop_tokens, Iterable):
        raise SSTError(f"stop_tokens = {shown(stop_tokens)} is no list of token ids", "for example [2]")
    return [whole("a stop token", token, 0) for token in stop_tokens]


class _TooLong(BaseException):
    """Raised inside a thread that has taken too long."""


def _in_time(work: Callable[[], Any], what: str) -> Any:
    """What `work`, the code of a stranger, returns.

    Raises:
        SSTError: it raises anything, or takes longer than `TEMPLATE_SECONDS`.
    """
    done: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except BaseException as error:  # handed to the caller
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    hint = "mend `chat_template` of the tokenizer, or set it to None to send messages as plain text"
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TooLong)
        )
        raise SSTError(f"{what} has not ended after {TEMPLATE_SECONDS:g} s", hint)
    value, error = done[0]
    if error is not None:
        raise SSTError(f"{what} fails: {type(error).__name__}: {first_line(error)}", hint) from error
    return value


def attach(
    model: nn.Module,
    tokenizer: Any = None,
    alpha: float | Tensor | Sequence[float] = PAPER_ALPHA,
    choices: Choices | None = None,
    name: str | None = None,
    kind: Kind | None = None,
) -> StateStreamModel:
    """Attach a state stream to any Hugging Face causal LM in memory.

    The model is not copied or changed; parts are resolved by family and validated by numbers.

    Args:
        model: `AutoModelForCausalLM` of a supported family (Llama, Qwen2/3, Mistral, Gemma 2/3, GPT-2).
        tokenizer: its tokenizer, if texts are to be used.
        alpha: blend weights in [0, 1]: a number (the default is the paper's mean), one per layer [layer], or
            [layer, d_model].
        choices: what the paper leaves open.
        name: how listings and errors call it; None takes the family's.
        kind: another kind of stream, instead of `alpha` (`sst_interp.models.kinds`).

    Raises:
        SSTError: something else than a causal LM; unsupported family (with the missing point), non-finite
            weights, alpha outside [0, 1].
    """
    backbone = Backbone(model)
    kind = LayerBlend(alpha) if kind is None else kind  # pyright: ignore[reportArgumentType]
    return StateStreamModel(backbone, kind, tokenizer, choices, name or backbone.family)


def attach_looped(
    model: nn.Module, tokenizer: Any = None, choices: Choices | None = None, name: str | None = None
) -> StateStreamModel:
    """Loop any Hugging Face causal LM in memory over its depth; the arguments are those of `attach`.

    `choices.blend` says how an iteration is read: `convex` in place of the embedding, `additive` on top.

    Raises:
        SSTError: an unsupported family, or a choice that does not apply.
    """
    return attach(model, tokenizer, choices=choices, name=name, kind=Looped())


def attach_lrt(
    model: nn.Module,
    tokenizer: Any = None,
    source: int | None = None,
    pathway: Pathway = "residual",
    gamma: float | Sequence[float] | Tensor = 0.0,
    projections: Projections = "shared",
    choices: Choices | None = None,
    name: str | None = None,
) -> StateStreamModel:
    """Attach a latent memory to any Hugging Face causal LM in memory. With the defaults it changes nothing.

    Args:
        model, tokenizer, choices, name: as for `attach`. GPT-2 has the residual pathway only.
        source: the layer whose output is the memory, from 0; None for the last after the final norm.
        pathway: where layers read it: `residual`, `kv` or `both`.
        gamma: residual scalars, one number or one per layer.
        projections: of the key/value pathway: one pair for all layers, or one per layer.

    Raises:
        SSTError: unsupported family or pathway, unknown source layer, gamma of the wrong shape.
    """
    backbone = Backbone(model)
    start = gamma if isinstance(gamma, int | float) else 0.0
    kind = build_memory(MemoryDesign(source, pathway, start, projections), backbone)
    if not isinstance(gamma, int | float):
        given = as_weights("gamma", gamma, torch.float64, backbone.device)
        if kind.gamma is None or given.shape != kind.gamma.shape or not bool(torch.isfinite(given).all()):
            raise SSTError(
                f"gamma has shape {list(given.shape)}: it must be a finite number for each of "
                f"{backbone.n_layers} layers of a residual pathway",
                "for example gamma=0.1",
            )
        kind = replace(kind, gamma=given.to(kind.gamma))
    return StateStreamModel(backbone, kind, tokenizer, choices, name or backbone.family)
