"""Huginn (`huginn_raven`, arXiv 2502.05171): a prelude, a recurrent core, a coda.

With the prelude's output `e`, the final norm N, and a first state of noise:

    s(t, i) = core(W [s(t, i-1); e(t)]),      y(t) = coda(N(s(t, r))),      logits(t) = U N(y(t))

A layer norms the residual after each addition: m = norm_2(x + Attention(norm_1(x))), then norm_4(m +
FFN(norm_3(m))). Every (iteration, layer) keeps its own keys and values. The published model draws its first
state anew in every call; here it depends on `seed` and the position, and `initial="zeros"` does without.

transformers does not know the family. Weights are read from safetensors into the modules below, which have
the checkpoint's names; no code from the model's repository runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices
from sst_interp.models.families import PlainConfig, PlainModel, RMSNorm, Rotary, attend
from sst_interp.models.kinds import kind
from sst_interp.models.kinds.looped import Looped
from sst_interp.models.stream import Pass, Recurrence


class Attention(nn.Module):
    """One projection, a bias on queries and keys, and rotary embeddings of neighbouring pairs."""

    def __init__(self, c: PlainConfig, index: int) -> None:
        super().__init__()
        self.layer_idx, self.heads, self.d_head = index, c.n_heads, c.n_embd // c.n_heads
        self.Wqkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        if c.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.heads, self.d_head))
        self.proj = nn.Linear(c.n_embd, c.n_embd, bias=False)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None, position_embeddings: Any, cache: Any = None
    ) -> tuple[Tensor, None]:
        """[row, position, d_model], and no weights."""
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.heads, self.d_head)).unbind(2)
        if hasattr(self, "qk_bias"):
            q, k = q + self.qk_bias[0], k + self.qk_bias[1]
        cos, sin = (part[:, :, None] for part in position_embeddings)
        q, k = (_turned(y, cos, sin) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return self.proj(attend(self, q, k, v, attention_mask, cache)), None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring dimensions as the two parts of a complex number, turned; in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU with one projection in."""

    def __init__(self, c: PlainConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(c.n_embd, 2 * c.intermediate_size, bias=False)
        self.proj = nn.Linear(c.intermediate_size, c.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[row, position, d_model]."""
        a, b = self.fc(x).chunk(2, dim=-1)
        return self.proj(silu(a) * b)


class Block(nn.Module):
    """One layer: norms before each branch, and on the residual after it."""

    def __init__(self, c: PlainConfig, index: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(c, index), FeedForward(c)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (RMSNorm(c.n_embd, c.norm_eps) for _ in range(4))

    def forward(self, x: Tensor, rotary: Any) -> Tensor:
        """[row, position, d_model], causal, without a cache."""
        x = self.norm_2(self.attn(self.norm_1(x), None, rotary)[0] + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x)


class Decoder(nn.Module):
    """Embedding, prelude, adapter, core, coda and norm."""

    def __init__(self, c: PlainConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.embedding_scale = c.init_values["embed_scale"]
        counts = (c.n_layers_in_prelude, c.n_layers_in_recurrent_block, c.n_layers_in_coda)
        starts = (0, counts[0], counts[0] + counts[1])
        self.prelude, self.core_block, self.coda = (
            nn.ModuleList(Block(c, start + i) for i in range(count))
            for start, count in zip(starts, counts, strict=True)
        )
        self.adapter = nn.Linear(2 * c.n_embd, c.n_embd, bias=False)
        self.ln_f = RMSNorm(c.n_embd, c.norm_eps)
        self.rotary_emb = Rotary(c.n_embd // c.n_heads, c.rope_base)


class HuginnModel(PlainModel):
    """The published forward pass.

    Raises:
        SSTError: a config.json that asks for another injection than the published model's.
    """

    computed = ("freqs_cis",)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        usual = {
            "norm_eps": 1e-6, "rope_base": 50000.0, "qk_bias": True, "bias": False, "mean_recurrence": 32,
            "injection_type": "linear", "tie_embeddings": True, "block_size": 4096,
        }  # fmt: skip
        config = usual | {"n_heads": config.get("num_attention_heads")} | config
        width, std = config["n_embd"], math.sqrt(2 / (5 * config["n_embd"]))
        config["init_values"] = {"std": std, "embed_scale": math.sqrt(width)} | config.get("init_values", {})
        if config["injection_type"] != "linear" or config["bias"]:
            raise SSTError(
                "this Huginn has another injection than the published model, or biases",
                "only models like tomg-group-umd/huginn-0125 are read",
            )
        config |= {"hidden_size": width, "max_position_embeddings": config["block_size"]}
        config["vocab_size"] = config.get("padded_vocab_size", config["vocab_size"])
        self.config = c = PlainConfig(**config)
        self.transformer = Decoder(c)
        self.lm_head = nn.Linear(width, c.vocab_size, bias=False)
        self.tie([])

    def tie(self, missing: list[str]) -> list[str]:
        """The unembedding is the embedding."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
            missing = [name for name in missing if name != "lm_head.weight"]
        return missing

    def get_decoder(self) -> Decoder:
        """Embedding, prelude, adapter, core, coda and norm."""
        return self.transformer

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.transformer.wte

    def forward(
        self, tokens: Tensor, use_cache: bool = False, state: Tensor | None = None, steps: int = 1
    ) -> SimpleNamespace:
        """`logits` [row, position, vocab] after `steps` iterations from a state, zeros if none is given."""
        t = self.transformer
        e = t.wte(tokens) * t.embedding_scale
        rotary = t.rotary_emb(e, torch.arange(tokens.shape[1], device=tokens.device)[None])
        for block in t.prelude:
            e = block(e, rotary)
        s = torch.zeros_like(e) if state is None else state
        for _ in range(steps):
            s = t.adapter(torch.cat([s, e], dim=-1))
            for block in t.core_block:
                s = block(s, rotary)
        y = t.ln_f(s)
        for block in t.coda:
            y = block(y, rotary)
        return SimpleNamespace(logits=self.lm_head(t.ln_f(y)))


@kind("huginn", "looped model (Huginn)")
@dataclass(frozen=True, eq=False)
class Huginn(Looped):
    """A core that reads its own output and the prelude's through one projection."""

    native, module = "huginn_raven", HuginnModel

    @classmethod
    def of(cls, backbone: Backbone) -> tuple[Huginn, Choices]:
        """Ranges, iterations and noise of its config.json."""
        c = backbone.config
        first = c.n_layers_in_prelude
        loop = cls(
            (first, first + c.n_layers_in_recurrent_block), inject="concat", initial="noise",
            coda_norm="final", noise=c.init_values["std"] * c.init_values["embed_scale"],
            depth=c.mean_recurrence, adapter=backbone.decoder.adapter.weight.detach(),
        )  # fmt: skip
        return loop, Choices(kv="each")

    @property
    def checked(self) -> int:
        """Two iterations: the others are the same layers again."""
        return min(2, self.depth)

    def logits_of(self, backbone: Backbone, tokens: Tensor) -> Tensor:
        """The model's own logits from this first state."""
        model = Recurrence(backbone, self, Choices(kv="each"))
        stream = model.new_stream(torch.zeros_like(tokens[:, 0]), tokens.shape[1])
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        e = backbone.embed(tokens, columns.expand(tokens.shape))
        first = self.first_state(Pass(stream, tokens, columns, None, None, "write"), e, Choices())
        return backbone.model(tokens, state=first, steps=self.checked).logits
