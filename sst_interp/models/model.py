"""A language model with a state stream: attach one to a backbone, replay tokens through it, generate.

model = sst.load("smollm2-135m", alpha=0.027)
model.replay(tokens, iterations=4).resid_post    # [question, position, layer, iteration, d_model]
model.generate(["Why is the sky blue?"], iterations=4).texts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sst_interp.errors import SSTError, upstairs
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import (
    Choices,
    as_weights,
    check_choices,
    check_iterations,
    several,
    shown,
)
from sst_interp.models.generation import (
    Endings,
    Generation,
    Observe,
    Piece,
    Sampling,
    generate,
    generate_at_depths,
    read_prompts,
    stream_pieces,
)
from sst_interp.models.halting import Depth, ExitGate, depths_of
from sst_interp.models.hooks import Edit
from sst_interp.models.kinds.looped import Range, loop_of, native_kind
from sst_interp.models.kinds.lrt import MemoryDesign, Pathway, Projections, build_memory
from sst_interp.models.kinds.sst import PAPER_ALPHA, LayerBlend
from sst_interp.models.likelihood import LogLikelihood, loglikelihood
from sst_interp.models.prompts import Prompt, Prompts, check_stop, ids_of, in_time, listed, only
from sst_interp.models.session import Session
from sst_interp.models.solvers import Replay, prefill, replay
from sst_interp.models.solvers.sequential import Certificate
from sst_interp.models.stream import Kind, Recurrence, Stream


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
        return self._tokenize(prompt) if isinstance(prompt, str) else ids_of(prompt)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text inside a conversation: no special tokens are added."""
        return self._tokenize(text, add_special_tokens=False)

    def encode_pair(self, context: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
        """Token ids of a context and of a text that continues it.

        The continuation's are those of the two together after as many as the context has alone, and white
        space at the context's end belongs to the continuation: lm-evaluation-harness splits them so.
        """
        if not isinstance(context, str) or not isinstance(continuation, str):
            after = self.encode_plain(continuation) if isinstance(continuation, str) else ids_of(continuation)
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
        return [*self.encode_plain(self.render([*turns, {"role": "user", "content": message}])), *begun]

    def render(self, turns: Sequence[dict[str, str]]) -> str:
        """A conversation in the tokenizer's chat template, up to where the next reply begins."""
        return in_time(
            lambda: self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
            f"the chat template of {self.name}",
        )

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
        depth: Sequence[int] | None = None,
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
            depth: instead of `iterations`, a depth for each position from `start` on (questions of one
                length, visited one by one). A position that runs less often repeats its last iteration.

        Raises:
            SSTError: iterations below 1, unknown method, empty or too long input.
        """
        tokens, pad = self.batch(token_ids)
        return replay(
            self, tokens, pad, iterations, method, start=start, groups=groups, sweeps=sweeps,
            tolerance=tolerance, logits=logits, check=check, depth=depth,
        )  # fmt: skip

    def generate(
        self,
        prompts: Prompts,
        iterations: int | Sequence[int] = 1,
        max_new_tokens: int = 64,
        stop_tokens: Sequence[int] | None = None,
        observe: Observe | None = None,
        progress: Callable[[int], Any] | None = None,
        depth: Depth = None,
        edit: Edit | None = None,
        stop: str | Sequence[str] = (),
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Generation:
        """Generate from prompts of different lengths: greedily, or sampled.

        Args:
            prompts: one or several: texts, read as they are, or ids (`model.chat(text)` gives a chat turn).
            iterations: depth of every generated position; one number, or one per prompt.
            max_new_tokens: token budget per prompt.
            stop_tokens: ids that end a text (kept as its last token); None takes the model's own.
            observe: called with each generated position's `Step`: every iteration's layer outputs and logits.
            progress: called with the number of positions done.
            depth: instead of `iterations`: a policy that picks each prompt's depth at position 0
                (`sst_interp.models.halting`, or a trained probe); `EachPosition(policy)`; a list with the
                depth of each generated position, whose last one stays, or such a list per prompt; a number.
            edit: called at every site of every layer, iteration and generated position, and may change what
                it is given (`sst_interp.models.hooks`). The prompt is read without it.
            stop: strings that end a text, which stops before the first of them. (Its tokens run up to the one
                that completed the string.)
            temperature, top_p, top_k, seed: see `sst_interp.models.generation.Sampling`. Left out, or at
                temperature 0, the most likely token is taken.

        Raises:
            SSTError: iterations below 1, an empty prompt, prompt and budget longer than the context, a probe
                of another model, or an edit that returns another kind of tensor or is never called.
        """
        tokens, pad = self.batch(prompts)
        ends, drawn = self.endings(stop_tokens, stop), self.sampling(temperature, top_p, top_k, seed)
        depths = depths_of(self, iterations, depth, len(pad))
        out = generate(
            self, tokens, pad, depths, max_new_tokens, ends, observe, progress, edit, sampling=drawn
        )
        return self.with_texts(out, ends)

    def stream(
        self,
        prompts: Prompts,
        iterations: int | Sequence[int] = 1,
        max_new_tokens: int = 64,
        depth: Depth = None,
        **how: Any,
    ) -> Iterator[Piece]:
        """Every token as it is written: row, position, token, text and depth.

        Args:
            how: `stop_tokens`, `stop`, `temperature`, `top_p`, `top_k`, `seed`; the others, too, are as for
                `generate`, and so are the errors.
        """
        tokens, pad = self.batch(prompts)
        ends, depths = self.endings(**how), depths_of(self, iterations, depth, len(pad))
        with torch.no_grad():
            lanes = read_prompts(self, tokens, pad, depths, max_new_tokens, ends, self.sampling(**how))
        return stream_pieces(self, lanes, max_new_tokens)

    def start(self, prompt: Prompt = ()) -> Session:
        """A conversation that goes on from its stream: `session.send(...)`, `session.chat(...)`.

        Args:
            prompt: what stands before the first thing that is sent: text or ids.
        """
        return Session(self, prompt)

    def exit_gate(self, q: float = 0.5, deepest: int = 0) -> ExitGate:
        """The model's own trained exit gate (Ouro) as `depth=` of `generate`.

        Args:
            q: the probability of having stopped at which a question halts.
            deepest: 0 for the depth that the model was trained with.

        Raises:
            SSTError: a model without a gate, a q outside (0, 1].
        """
        return ExitGate(self, q, deepest)

    def endings(self, stop_tokens: Any = None, stop: Any = (), **_sampling: Any) -> Endings:
        """What ends a text. Raises SSTError for what is neither ids nor strings."""
        strings = (stop,) if isinstance(stop, str) else tuple(stop if isinstance(stop, Sequence) else (stop,))
        if not all(isinstance(string, str) and string for string in strings):
            raise SSTError(f"stop = {shown(stop)} is no text or list of texts", 'for example stop = ["\\n"]')
        if strings and self.tokenizer is None:
            raise SSTError("this model has no tokenizer, so no string can end a text", "give stop_tokens")
        ids = self.stop_tokens if stop_tokens is None else check_stop(stop_tokens)
        return Endings(ids, strings, self.tokenizer)

    def sampling(
        self,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int | None = None,
        seed: int | Sequence[int] = 0,
        **_endings: Any,
    ) -> Sampling | None:
        """How tokens are drawn; None: greedily."""
        return Sampling.of(temperature, top_p, top_k, seed)

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
        ends = self.endings()
        by_depth = generate_at_depths(self, tokens, pad, depths, max_new_tokens, ends, progress)
        return {depth: self.with_texts(out, ends) for depth, out in by_depth.items()}

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
        depths: Any = iterations if several(iterations) else [iterations]
        if isinstance(continuations, str):
            raise SSTError("continuations are one text", 'give a list, for example [" blue", " green"]')
        context = only(context)
        pairs = [self.encode_pair(context, continuation) for continuation in continuations]
        after = [ids for _, ids in pairs]
        tokens, pad = self.batch([pairs[0][0] if pairs else self.encode(context)])
        out = loglikelihood(self, tokens, pad, [after], check_iterations(depths))
        return (
            out
            if several(iterations)
            else LogLikelihood(out.sums[0], out.terms[0], out.lengths, out.greedy[0])
        )

    def with_texts(self, out: Generation, stop: Endings) -> Generation:
        """The generation with its tokens as texts, each up to the string that ended it."""
        if self.tokenizer is not None:
            texts = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in out.tokens)
            out.texts = [stop.cut(text) for text in texts]
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
        model: `AutoModelForCausalLM` of a supported family (`sst_interp.models.families.SUPPORTED`).
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
    model: nn.Module,
    tokenizer: Any = None,
    choices: Choices | None = None,
    name: str | None = None,
    prelude: Range | None = None,
    core: Range | None = None,
    coda: Range | None = None,
    **loop: Any,
) -> StateStreamModel:
    """Loop any Hugging Face causal LM in memory over its depth. One that loops by itself is taken as it does.

    Args:
        model, tokenizer, choices, name: as for `attach`.
        prelude, core, coda: layers, as (first, one after the last), that run once, again and again, and after
            the loop; what is left out fills the rest. Without any of them the whole stack is the core.
        loop: fields of `sst_interp.models.kinds.looped.Looped`: `inject`, `initial`, `norm`, `damping` ...

    Raises:
        SSTError: an unsupported family, or a range, setting or choice that does not apply.
    """
    backbone = Backbone(model)
    given = {"prelude": prelude, "core": core, "coda": coda} | loop
    if backbone.loops and all(value is None for value in given.values()):
        kind, own = native_kind(backbone)
        choices = choices or own
    else:
        kind = loop_of(backbone.n_layers, given)
    return StateStreamModel(backbone, kind, tokenizer, choices, name or backbone.family)


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
