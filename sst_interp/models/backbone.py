"""A backbone: a pretrained decoder LM taken apart at the points the stream needs, and checked.

It knows Hugging Face module names and nothing about the stream. A layer is two branches that each read the
residual and add to it; between them is TransformerLens' `resid_mid`, where the blend goes in:

    m = x + attention_branch(x)
    y = m + ffn_branch(m)

Families differ in the names of their norms and in whether a branch is normed again on its way out. So the
parts are looked up by name and then *validated by numbers*: put together again without a blend, they must
give the model's own layer outputs and logits bit for bit, or the model is refused.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sst_interp.errors import SSTError
from sst_interp.models.cache import KeyValues
from sst_interp.models.choices import shown

SUPPORTED = "Llama, Qwen2, Qwen3, Mistral, Gemma 2, Gemma 3 and GPT-2"
FULL, SLIDING = "full_attention", "sliding_attention"
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value")
"""Names of an attention module's cache over the versions of transformers, the newest first."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer as its parts. The two `post` norms exist in Gemma 2 and 3 only."""

    norm1: nn.Module
    attention: nn.Module
    post_attention_norm: nn.Module | None
    norm2: nn.Module
    ffn: nn.Module
    post_ffn_norm: nn.Module | None
    kind: str
    """`full_attention` or `sliding_attention`: which mask and rotary table the layer takes."""

    def attention_branch(self, x: Tensor, rotary: Any, mask: Tensor | None, kv: Any) -> Tensor:
        """What attention adds to the residual `x` [row, position, d_model]."""
        cache = {self.cache_argument: kv}
        out = self.attention(self.norm1(x), attention_mask=mask, position_embeddings=rotary, **cache)[0]
        return out if self.post_attention_norm is None else self.post_attention_norm(out)

    @cached_property
    def cache_argument(self) -> str:
        """What the attention calls its cache: `cache`, or, before transformers 5.24, `past_key_values`."""
        takes = inspect.signature(self.attention.forward).parameters
        return next((name for name in CACHE_ARGUMENTS if name in takes), CACHE_ARGUMENTS[0])

    def ffn_branch(self, m: Tensor) -> Tensor:
        """What the FFN adds to the post-attention residual `m` [row, position, d_model]."""
        out = self.ffn(self.norm2(m))
        return out if self.post_ffn_norm is None else self.post_ffn_norm(out)


class Backbone:
    """A Hugging Face causal LM as embed, layers, unembed.

    Args:
        model: any `AutoModelForCausalLM` of a supported family, in memory. It is put into eval mode.

    Raises:
        SSTError: something else than a causal LM, an unsupported family (the missing point is named),
            weights that are missing or not finite, or parts that do not reproduce the model's own outputs.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_other_objects(model)
        self.model: Any = model.eval()
        self.config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator]
        self.family: str = self.config.model_type
        refuse_nonfinite(model)
        decoder: Any = self.model.get_decoder()
        self.decoder = decoder
        blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
        if blocks is None:
            raise _unsupported(self.family, "no list of decoder layers (`layers` or `h`)")
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            kinds = [SLIDING if getattr(self.config, "sliding_window", None) else FULL] * len(blocks)
        if unknown := set(kinds) - {FULL, SLIDING}:
            raise _unsupported(self.family, f"layers of kind {', '.join(sorted(unknown))}")
        self.layers = [take_apart(self.family, b, k) for b, k in zip(blocks, kinds, strict=True)]
        self.window: int | None = getattr(self.config, "sliding_window", None)
        final_norm = getattr(decoder, "norm", None) or getattr(decoder, "ln_f", None)
        if final_norm is None:
            raise _unsupported(self.family, "no final norm (`norm` or `ln_f`)")
        self.final_norm: nn.Module = final_norm
        self._rotary = getattr(decoder, "rotary_emb", None)
        self._rotary_by_kind = self._rotary is not None and (
            "layer_type" in inspect.signature(self._rotary.forward).parameters
        )
        try:
            self.validate()
        except SSTError:
            raise
        except Exception as error:  # whatever the model's own code raises
            raise SSTError(
                f"the model does not run: {type(error).__name__}: {first_line(error)}",
                "its weights may be of several dtypes, or on several devices: model.to(device, dtype)",
            ) from error

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and so of every hidden state."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def max_length(self) -> int | None:
        """Context length in tokens, if the config states one."""
        return getattr(self.config, "max_position_embeddings", None)

    def embed(self, tokens: Int[Tensor, "row position"], position_ids: Int[Tensor, "row position"]) -> Tensor:
        """Token (and learned position) embeddings [row, position, d_model]."""
        if hasattr(self.decoder, "wpe"):
            return self.decoder.wte(tokens) + self.decoder.wpe(position_ids)
        return self.decoder.embed_tokens(tokens)

    def rotary(self, x: Tensor, position_ids: Int[Tensor, "row position"]) -> dict[str, Any]:
        """Rotary tables by layer kind; None where the family has none."""
        kinds = {layer.kind for layer in self.layers}
        if self._rotary is None:
            return dict.fromkeys(kinds)
        if self._rotary_by_kind:
            return {kind: self._rotary(x, position_ids, kind) for kind in kinds}
        return dict.fromkeys(kinds, self._rotary(x, position_ids))

    def unembed(self, y: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Final norm, unembedding, soft cap: the model's logits, or an earlier layer's *logit lens*."""
        logits = self.model.get_output_embeddings()(self.final_norm(y))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def content_hash(self) -> str:
        """`content_hash` of the weights as they are now: they may be edited after the model is attached."""
        return content_hash(self.model)

    def refuse_dropout(self) -> None:
        """Raise SSTError if the model was put back into training mode and a module drops out values."""
        for name, module in self.model.named_modules():
            if module.training and (rate := dropout_rate(module)):
                raise SSTError(
                    f"the model is in training mode and {name} drops out {rate:.0%} of its values, "
                    "so its states are random",
                    "call .eval() on the Hugging Face model",
                )

    @contextmanager
    def naming_weights(self) -> Iterator[None]:
        """If states overflow inside, an error names the weight that is not finite, if there is one."""
        try:
            yield
        except SSTError:
            refuse_nonfinite(self.model)
            raise

    def refuse_nonfinite(self, values: Tensor) -> None:
        """Raise SSTError if computed states or logits are not finite, because of a weight or an overflow."""
        if not bool(torch.isfinite(values).all()):
            refuse_nonfinite(self.model)
            raise SSTError(
                "the states overflow: the recurrence does not contract on this backbone",
                "use a smaller alpha, fewer iterations, or dtype float32",
            )

    @torch.no_grad()
    def validate(self) -> None:
        """Raise SSTError unless the parts, put together again, give the model's own outputs bit for bit."""
        n = min(8, self.max_length or 8, self.window or 8)
        tokens = (torch.arange(2 * n, device=self.device).view(2, n) * 37 + 11) % self.config.vocab_size
        seen: list[Tensor] = []
        blocks = getattr(self.decoder, "layers", None) or self.decoder.h
        hooks = [
            b.register_forward_hook(
                lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
            )
            for b in blocks
        ]
        try:
            theirs = self.model(tokens, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        position_ids = torch.arange(n, device=self.device).expand(2, n)
        x = self.embed(tokens, position_ids)
        rotary = self.rotary(x, position_ids)
        kv = KeyValues(self.n_layers, n)
        for index, layer in enumerate(self.layers):
            view = kv.view(slice(0, n), n, "write")
            try:
                branch = layer.attention_branch(x, rotary[layer.kind], self._causal(n), None)
                through_store = layer.attention_branch(x, rotary[layer.kind], self._causal(n), view)
                m = x + branch
                x = m + layer.ffn_branch(m)
            except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                raise _unsupported(
                    self.family, f"layer {index} cannot be called in parts ({error})"
                ) from error
            if kv.keys[index] is None or not torch.allclose(branch, through_store, rtol=1e-2, atol=1e-3):
                raise _unsupported(
                    self.family, f"attention of layer {index} does not keep its keys in a cache"
                )
            if not torch.equal(x, seen[index]):
                off = (x - seen[index]).abs().max().item()
                raise _unsupported(
                    self.family,
                    f"resid_mid + FFN branch is not the output of layer {index} "
                    f"(largest difference {off:.3g}), so there is a residual, scale or branch that the "
                    "blend would miss",
                )
        if not torch.equal(self.unembed(x), theirs):
            raise _unsupported(self.family, "the logits are more than unembed(final_norm(last layer))")

    def _causal(self, n: int) -> Tensor | None:
        # sdpa takes its causal path without a mask, as the model itself does; others need one.
        if self.config._attn_implementation == "sdpa":
            return None
        blocked = torch.ones(n, n, dtype=torch.bool, device=self.device).triu(1)
        return torch.zeros(1, 1, n, n, dtype=self.dtype, device=self.device).masked_fill(
            blocked, torch.finfo(self.dtype).min
        )


def take_apart(family: str, block: Any, kind: str) -> Layer:
    """A decoder layer's parts, by the names its family uses.

    Raises:
        SSTError: a part is missing (an encoder layer, parallel residual, norms after the branch only).
    """
    has = lambda name: getattr(block, name, None) is not None  # noqa: E731
    if has("ln_1") and has("attn") and has("ln_2") and not has("crossattention"):
        return Layer(block.ln_1, block.attn, None, block.ln_2, block.mlp, None, kind)
    if not (has("self_attn") and has("mlp")):
        raise _unsupported(family, "no `self_attn` and `mlp` branches that add to one residual in turn")
    if not has("input_layernorm"):
        raise _unsupported(family, "no norm before attention (`input_layernorm`)")
    if has("pre_feedforward_layernorm"):
        return Layer(
            block.input_layernorm,
            block.self_attn,
            getattr(block, "post_attention_layernorm", None),
            block.pre_feedforward_layernorm,
            block.mlp,
            getattr(block, "post_feedforward_layernorm", None),
            kind,
        )
    if not has("post_attention_layernorm"):
        raise _unsupported(
            family,
            "no norm between attention and FFN: the two run in parallel, so there is no post-attention "
            "residual (resid_mid)",
        )
    return Layer(
        block.input_layernorm, block.self_attn, None, block.post_attention_layernorm, block.mlp, None, kind
    )


def content_hash(model: nn.Module) -> str:
    """sha256 of every weight's name, shape and values, rounded to bfloat16: it is the same in every dtype."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        rounded = value.detach().cpu().to(torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dropout_rate(module: nn.Module) -> float:
    """The share of values that a module itself, not its children, drops out in training mode."""
    rates = [v for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]
    return max([module.p, *rates] if isinstance(module, _DropoutNd) else rates, default=0.0)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most 300 characters."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), "no reason given")


def refuse_other_objects(model: object) -> None:
    """Raise SSTError for anything but a causal LM with all its weights in memory."""
    hint = "pass what AutoModelForCausalLM.from_pretrained(...) returns"
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        if isinstance(getattr(model, "backbone", None), Backbone):
            raise SSTError(f"a {kind} has a stream already", "attach to its `.backbone.model`")
        raise SSTError(f"{shown(model)} is a {kind}, not a language model", hint)
    if not (hasattr(model, "get_decoder") and hasattr(getattr(model, "config", None), "get_text_config")):
        raise SSTError(f"a {kind} is not a Hugging Face causal LM", hint)
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise SSTError(f"a {kind} has no unembedding: it is a decoder without its language-model head", hint)
    if empty := next((name for name, weight in model.named_parameters() if weight.is_meta), None):
        raise SSTError(f"weight {empty} is on the meta device: it has no values", hint)


def refuse_nonfinite(model: nn.Module) -> None:
    """Raise SSTError if any weight is NaN or infinite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise SSTError(
                f"weight {name} has non-finite values", "load an intact copy of the model, or another dtype"
            )


def _unsupported(family: str, missing: str) -> SSTError:
    return SSTError(
        f"family {family!r} is not supported: {missing}",
        f"supported: {SUPPORTED}; docs/extending.md says how to add a family",
    )
