"""A backbone: a pretrained decoder LM taken apart at the points the stream needs, and checked.

It knows nothing about the stream. A layer is two branches that each read the residual and add to it; between
them is TransformerLens' `resid_mid`, where the blend goes in:

    m = x + attention_branch(x)
    y = m + ffn_branch(m)

Families differ in the names of their norms and in where they norm (`families`). So the parts are looked up by
name and then *validated by numbers*: put together again without a blend, they must give the model's own layer
outputs and logits bit for bit, or the model is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sst_interp.errors import SSTError
from sst_interp.models.cache import KeyValues
from sst_interp.models.choices import shown
from sst_interp.models.families import (
    FULL,
    LOOPS,
    SLIDING,
    Layer,
    blocks_of,
    embed,
    final_norm_of,
    take_apart,
    unsupported,
)
from sst_interp.models.placement import hash_of_weights


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
        blocks = blocks_of(self.family, decoder)
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            kinds = [SLIDING if getattr(self.config, "sliding_window", None) else FULL] * len(blocks)
        if unknown := set(kinds) - {FULL, SLIDING}:
            raise unsupported(self.family, f"layers of kind {', '.join(sorted(unknown))}")
        self.layers: list[Layer] = [take_apart(self.family, b, k) for b, k in zip(blocks, kinds, strict=True)]
        self.window: int | None = getattr(self.config, "sliding_window", None)
        self.final_norm: nn.Module = final_norm_of(self.family, decoder)
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
    def loops(self) -> bool:
        """Whether the model runs layers several times by itself: `Kind.fit` then checks how."""
        return self.family in LOOPS

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
        """What the first layer reads [row, position, d_model]."""
        return embed(self.family, self.decoder, tokens, position_ids)

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
        """Raise SSTError unless the parts, put together again, give the model's own outputs bit for bit.

        Of a model that loops by itself each layer is checked alone, on what it is given first.
        """
        tokens = self.sample_tokens()
        n = tokens.shape[1]
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        hooks = [
            block.register_forward_hook(_keep_in(calls), with_kwargs=True)
            for block, calls in zip(blocks_of(self.family, self.decoder), seen, strict=True)
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
            view = kv.view(slice(0, n), n, "write").at(index)
            given, output = seen[index][0]
            x = given if self.loops else x
            try:
                branch = layer.attention_branch(x, rotary[layer.kind], self._causal(n), None)
                through_store = layer.attention_branch(x, rotary[layer.kind], self._causal(n), view)
                if layer.parallel:
                    x = layer.ffn_branch(x) + branch + x
                else:
                    m = layer.add_attention(x, branch)
                    x = layer.add_ffn(m, layer.ffn_branch(m))
            except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                raise unsupported(
                    self.family, f"layer {index} cannot be called in parts ({error})"
                ) from error
            if kv.keys[index] is None or not torch.allclose(branch, through_store, rtol=1e-2, atol=1e-3):
                raise unsupported(
                    self.family, f"attention of layer {index} does not keep its keys in a cache"
                )
            if not torch.equal(x, output):
                off = (x - output).abs().max().item()
                raise unsupported(
                    self.family,
                    f"resid_mid + FFN branch is not the output of layer {index} "
                    f"(largest difference {off:.3g}), so there is a residual, scale or branch that the "
                    "blend would miss",
                )
        if not self.loops and not torch.equal(self.unembed(x), theirs):
            raise unsupported(self.family, "the logits are more than unembed(final_norm(last layer))")

    def sample_tokens(self) -> Int[Tensor, "2 position"]:
        """Two short texts to validate on: no longer than the context or the sliding window."""
        n = min(8, self.max_length or 8, self.window or 8)
        return (torch.arange(2 * n, device=self.device).view(2, n) * 37 + 11) % self.config.vocab_size

    def _causal(self, n: int) -> Tensor | None:
        # sdpa takes its causal path without a mask, as the model itself does; others need one.
        if self.config._attn_implementation == "sdpa":
            return None
        blocked = torch.ones(n, n, dtype=torch.bool, device=self.device).triu(1)
        return torch.zeros(1, 1, n, n, dtype=self.dtype, device=self.device).masked_fill(
            blocked, torch.finfo(self.dtype).min
        )


def _keep_in(calls: list[tuple[Tensor, Tensor]]) -> Any:
    """A hook that keeps what a layer is given and what it returns."""

    def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        given = args[0] if args else named["hidden_states"]
        calls.append((given, out[0] if isinstance(out, tuple) else out))

    return hook


def content_hash(model: nn.Module) -> str:
    """sha256 of every weight's name, shape and values, rounded to bfloat16: it is the same in every dtype.

    Of a model that `sst.load` quantised: of its unquantised weights.
    """
    own: str | None = getattr(model, "source_hash", None)
    return own or hash_of_weights(model.state_dict())


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
