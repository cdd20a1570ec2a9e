"""The families of language models: by which names a decoder's parts are found, and how a layer adds them up.

It knows Hugging Face module names and nothing else. `backbone` puts the parts together again and checks them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sst_interp.errors import SSTError

SUPPORTED = (
    "Llama, Qwen2, Qwen3, Mistral, Gemma 2, Gemma 3, GPT-2, OLMo 2, OLMo 3, Exaone 4, GLM-4, nanochat and "
    "GPT-OSS; without a blend also GPT-NeoX (Pythia) and Phi; models that loop by themselves: Ouro, Huginn, "
    "HRM-Text and Dory"
)
FULL, SLIDING = "full_attention", "sliding_attention"
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names of an attention module's cache over the versions of transformers, the newest first."""
EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True)
class Layer:
    """One decoder layer as its parts: two branches that read a residual and add to it.

    A part that a family lacks is the identity: OLMo 2 has no norm before its branches.
    """

    norm1: nn.Module
    attention: nn.Module
    post_attention_norm: nn.Module | None
    norm2: nn.Module
    ffn: nn.Module
    post_ffn_norm: nn.Module | None
    kind: str
    """`full_attention` or `sliding_attention`: which mask and rotary table the layer takes."""
    parallel: bool = False
    """Both branches read the residual that the layer reads, so that there is none between them."""

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
        """What the FFN adds to the residual `m` [row, position, d_model] that it reads."""
        out = self.ffn(self.norm2(m))
        out = out[0] if isinstance(out, tuple) else out  # GPT-OSS: and the experts' scores
        return out if self.post_ffn_norm is None else self.post_ffn_norm(out)

    def add_attention(self, x: Tensor, branch: Tensor) -> Tensor:
        """The residual after attention."""
        return x + branch

    def add_ffn(self, m: Tensor, branch: Tensor) -> Tensor:
        """The layer's output."""
        return m + branch

    @property
    def adds_up(self) -> bool:
        """Whether there is a residual between the branches, and each adds to it: where a blend can go in."""
        return not self.parallel and type(self) is Layer


@dataclass(frozen=True)
class NormedSum(Layer):
    """Huginn: the residual is normed after each addition."""

    mid_norm: nn.Module | None = None
    out_norm: nn.Module | None = None

    def add_attention(self, x: Tensor, branch: Tensor) -> Tensor:
        """norm(branch + x)."""
        assert self.mid_norm is not None
        return self.mid_norm(branch + x)

    def add_ffn(self, m: Tensor, branch: Tensor) -> Tensor:
        """norm(branch + m)."""
        assert self.out_norm is not None
        return self.out_norm(branch + m)


@dataclass(frozen=True)
class OnTheSphere(Layer):
    """Dory (nGPT): the normed residual moves towards the branch, at a rate per dimension."""

    block: Any = None

    def add_attention(self, x: Tensor, branch: Tensor) -> Tensor:
        """H + rate * (branch - h), with h = norm(x)."""
        return self._towards(self.norm1(x), branch, self.block.lambda_1)

    def add_ffn(self, m: Tensor, branch: Tensor) -> Tensor:
        """H + rate * (branch - h), with h = norm(m)."""
        return self._towards(self.norm2(m), branch, self.block.lambda_2)

    def _towards(self, h: Tensor, branch: Tensor, weight: Tensor) -> Tensor:
        return h + (weight * self.block.lambda_scale).abs() * (branch - h)


def blocks_of(family: str, decoder: Any) -> list[Any]:
    """A decoder's layers, from the bottom; of HRM-Text those of the fast stack, then those of the slow one.

    Raises:
        SSTError: there is no list of layers.
    """
    if hasattr(decoder, "L_module"):
        return [*decoder.L_module.layers, *decoder.H_module.layers]
    if hasattr(decoder, "core_block"):
        return [*decoder.prelude, *decoder.core_block, *decoder.coda]
    blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if blocks is None:
        raise unsupported(family, "no list of decoder layers (`layers` or `h`)")
    return list(blocks)


def final_norm_of(family: str, decoder: Any) -> nn.Module:
    """The norm before the unembedding.

    Raises:
        SSTError: there is none.
    """
    owner = decoder.H_module if hasattr(decoder, "H_module") else decoder
    for name in (*FINAL_NORMS, "final_norm"):
        if getattr(owner, name, None) is not None:
            return getattr(owner, name)
    raise unsupported(family, "no final norm (`norm` or `ln_f`)")


def embed(family: str, decoder: Any, tokens: Tensor, position_ids: Tensor) -> Tensor:
    """What the first layer reads [row, position, d_model]: embeddings, some with learned positions, scaled or
    normed. The modules are looked up anew, since a bridge may have put its own in their place.
    """
    x = next(getattr(decoder, name) for name in EMBEDDINGS if hasattr(decoder, name))(tokens)
    if hasattr(decoder, "wpe"):
        x = x + decoder.wpe(position_ids)
    if (scale := getattr(decoder, "embedding_scale", None)) is not None:
        x = x * scale
    return decoder.norm(x) if family == "nanochat" else x


def take_apart(family: str, block: Any, kind: str) -> Layer:
    """A decoder layer's parts, by the names its family uses.

    Raises:
        SSTError: a part is missing (an encoder layer).
    """
    has = lambda name: getattr(block, name, None) is not None  # noqa: E731
    if has("ln_1") and has("attn") and has("ln_2") and not has("crossattention"):
        return Layer(block.ln_1, block.attn, None, block.ln_2, block.mlp, None, kind)
    if has("norm_4") and has("attn"):
        parts = (block.norm_1, block.attn, None, block.norm_3, block.mlp, None, kind)
        return NormedSum(*parts, mid_norm=block.norm_2, out_norm=block.norm_4)
    if has("attention") and has("use_parallel_residual"):
        norm, after = block.input_layernorm, block.post_attention_layernorm
        return Layer(norm, block.attention, None, after, block.mlp, None, kind, block.use_parallel_residual)
    if not (has("self_attn") and has("mlp")):
        raise unsupported(family, "no `self_attn` and `mlp` branches that add to one residual in turn")
    attention, mlp = block.self_attn, block.mlp
    if has("lambda_1") and has("lambda_2"):
        return OnTheSphere(
            block.input_layernorm, attention, block.post_attention_layernorm, block.pre_feedforward_layernorm,
            mlp, block.post_feedforward_layernorm, kind, block=block,
        )  # fmt: skip
    if not has("input_layernorm"):
        if not (has("post_attention_layernorm") and has("post_feedforward_layernorm")):
            raise unsupported(
                family, "no norm before attention (`input_layernorm`), and none after the branches"
            )
        after = (block.post_attention_layernorm, block.post_feedforward_layernorm)
        return Layer(nn.Identity(), attention, after[0], nn.Identity(), mlp, after[1], kind)
    norm1 = block.input_layernorm
    if has("input_layernorm_2"):
        after = (block.input_layernorm_2, block.post_attention_layernorm_2)
        return Layer(norm1, attention, after[0], block.post_attention_layernorm, mlp, after[1], kind)
    if has("post_self_attn_layernorm"):
        after = (block.post_self_attn_layernorm, block.post_mlp_layernorm)
        return Layer(norm1, attention, after[0], block.post_attention_layernorm, mlp, after[1], kind)
    if has("pre_feedforward_layernorm"):
        after = [getattr(block, f"post_{name}_layernorm", None) for name in ("attention", "feedforward")]
        return Layer(norm1, attention, after[0], block.pre_feedforward_layernorm, mlp, after[1], kind)
    if not has("post_attention_layernorm"):  # Phi: one norm, and two branches that read it
        return Layer(norm1, attention, None, norm1, mlp, None, kind, parallel=True)
    return Layer(norm1, attention, None, block.post_attention_layernorm, mlp, None, kind)


def unsupported(family: str, missing: str) -> SSTError:
    """The error for a family that cannot be taken apart; `missing` names the point."""
    return SSTError(
        f"family {family!r} is not supported: {missing}",
        f"supported: {SUPPORTED}; docs/extending.md says how to add a family",
    )


LOOPS = ("ouro", "huginn_raven", "hrm_text", "dory")
"""Families whose own forward pass runs layers several times: one pass through the layers is not the model."""


class PlainConfig(SimpleNamespace):
    """A config.json of a family that transformers does not know: its entries as attributes."""

    _attn_implementation = "sdpa"
    _commit_hash = None

    def get_text_config(self, decoder: bool = True) -> PlainConfig:
        """Itself."""
        return self


class PlainModel(nn.Module):
    """A language model of a family that transformers does not know, with what `Backbone` asks of any.

    A family's own model has its checkpoint's names, and a forward pass as it is published, to check
    the parts against.
    """

    config: PlainConfig
    lm_head: nn.Linear
    generation_config = None
    computed: tuple[str, ...] = ()
    """Tensors of a checkpoint that are computed anew."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def get_output_embeddings(self) -> nn.Linear:
        """The unembedding."""
        return self.lm_head

    def read(self, weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Take these weights, as they are: (names that are missing, names that have no place)."""
        weights = {name: value for name, value in weights.items() if name not in self.computed}
        missing, surplus = self.load_state_dict(weights, strict=False, assign=True)
        return self.tie(list(missing)), list(surplus)

    def tie(self, missing: list[str]) -> list[str]:
        """Of the names that are missing, those that no other weight stands for."""
        return missing


class RMSNorm(nn.Module):
    """x / rms(x) in float32, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width]."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Rotary(nn.Module):
    """Angles of rotary embeddings, one per pair of dimensions: cos and sin [row, position, d_head / 2]."""

    def __init__(self, d_head: int, base: float) -> None:
        super().__init__()
        self.d_head, self.base = d_head, base

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """In float32."""
        exponent = torch.arange(0, self.d_head, 2, dtype=torch.float32, device=x.device) / self.d_head
        angle = position_ids[..., None].float() * (1.0 / self.base**exponent)
        return angle.cos(), angle.sin()


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """Causal attention [row, position, width] of q, k, v [row, head, position, d_head], through a cache."""
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    causal = mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)
