"""Ouro / LoopLM (`ouro`, arXiv 2510.25741): the whole stack, run T times, the final norm after every pass.

With the embedding `e`, the stack F of layers with norms before and after each branch, and the final norm N:

    h(t, 0) = e(t),      h(t, i) = N(F(h(t, i-1))),      logits(t) = W h(t, T)
    lambda(t, i) = sigmoid(w . h(t, i) + b)              # the exit gate

Every (pass, layer) keeps its own keys and values. Hidden states are recorded before the norm. The gate is a
read-out (`exit_probabilities`): no pass is skipped for it.

transformers does not know the family. Weights are read from safetensors into the modules below, which have
the checkpoint's names; no code from the model's repository runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices
from sst_interp.models.families import FULL, PlainConfig, PlainModel, RMSNorm, Rotary, attend
from sst_interp.models.kinds import kind
from sst_interp.models.kinds.looped import Looped


class Attention(nn.Module):
    """Grouped-query attention with rotary embeddings, as in Llama."""

    def __init__(self, c: PlainConfig, index: int) -> None:
        super().__init__()
        self.layer_idx, self.d_head = index, c.head_dim
        wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, c.hidden_size, bias=False)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, position_embeddings: Any, cache: Any = None
    ) -> tuple[Tensor, None]:
        """[row, position, d_model], and no weights."""
        q, k, v = (p(x).unflatten(-1, (-1, self.d_head)).transpose(1, 2) for p in self.projections)
        cos, sin = (torch.cat([part, part], -1)[:, None].to(x.dtype) for part in position_embeddings)
        q, k = (y * cos + turned(y) * sin for y in (q, k))
        return self.o_proj(attend(self, q, k, v, attention_mask, cache)), None

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """To queries, keys and values."""
        return self.q_proj, self.k_proj, self.v_proj


def turned(x: Tensor) -> Tensor:
    """(-second half, first half)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, c: PlainConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[row, position, d_model]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: each branch is normed on its way in and on its way out."""

    def __init__(self, c: PlainConfig, index: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c, index), FeedForward(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.input_layernorm_2 = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm_2 = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Any) -> Tensor:
        """[row, position, d_model], causal, without a cache."""
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), None, rotary)[0])
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers, norm and gate."""

    def __init__(self, c: PlainConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.early_exit_gate = nn.Linear(c.hidden_size, 1)
        self.rotary_emb = Rotary(c.head_dim, c.rope_theta)


class OuroModel(PlainModel):
    """The published forward pass.

    Raises:
        SSTError: a config.json that asks for a sliding window, or for scaled rotary embeddings.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        config = {"num_key_value_heads": config["num_attention_heads"], "total_ut_steps": 4} | config
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
        if scaled or set(config.get("layer_types") or [FULL]) != {FULL}:
            raise SSTError(
                "this Ouro has scaled rotary embeddings or a sliding window, which the published models lack",
                "only models like ByteDance/Ouro-1.4B and -2.6B are read",
            )
        self.config = c = PlainConfig(**config)
        self.model = Decoder(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def get_decoder(self) -> Decoder:
        """Embedding, layers, norm and gate."""
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.embed_tokens

    def forward(self, tokens: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """`logits` [row, position, vocab] after `total_ut_steps` passes."""
        h = self.model.embed_tokens(tokens)
        rotary = self.model.rotary_emb(h, torch.arange(tokens.shape[1], device=tokens.device)[None])
        for _ in range(self.config.total_ut_steps):
            for block in self.model.layers:
                h = block(h, rotary)
            h = self.model.norm(h)
        return SimpleNamespace(logits=self.lm_head(h))


@kind("ouro", "looped model (Ouro)")
@dataclass(frozen=True, eq=False)
class Ouro(Looped):
    """The whole stack on its own normed output; a trained exit gate."""

    native, module = "ouro", OuroModel

    @classmethod
    def of(cls, backbone: Backbone) -> tuple[Ouro, Choices]:
        """Passes of its config.json, and the gate."""
        gate = backbone.decoder.early_exit_gate
        both = torch.cat([gate.weight.detach().flatten(), gate.bias.detach()])
        return cls(norm="final", depth=backbone.config.total_ut_steps, gate=both), Choices(kv="each")
