"""Tiny random-weight models of every supported family: a second or less to build, every code path real."""

from __future__ import annotations

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    Olmo2Config,
    Olmo3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import eager_mask

from sst_interp.models.model import attach_lrt

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def float64_eager(module, query, key, value, attention_mask, scaling, softcap=None, **_):
    """Gemma 2 needs eager attention (soft cap), and transformers' takes its softmax in float32, which hides
    anything below 1e-8. The same in the tensors' own precision.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores + attention_mask, dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("float64_eager", float64_eager)
AttentionMaskInterface.register("float64_eager", eager_mask)

FAMILIES = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=6),
    "gemma2": lambda: Gemma2Config(**COMMON, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        n_inner=48,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


NEWER = {
    "olmo2": lambda: Olmo2Config(**COMMON),
    "olmo3": lambda: Olmo3Config(**COMMON, sliding_window=6),
    "exaone4": lambda: Exaone4Config(**COMMON, sliding_window=6, sliding_window_pattern=2),
    "glm4": lambda: Glm4Config(**COMMON),
    "nanochat": lambda: NanoChatConfig(**{k: v for k, v in COMMON.items() if k != "head_dim"}),
    "gpt_oss": lambda: GptOssConfig(**COMMON, sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
    "neox_in_turn": lambda: GPTNeoXConfig(**ONE_HEAD_EACH, use_parallel_residual=False),
}
"""Families with the same properties, tested where families differ and not in every test over families."""

ONE_HEAD_EACH = {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
PARALLEL = {
    "gpt_neox": lambda: GPTNeoXConfig(**ONE_HEAD_EACH),
    "phi": lambda: PhiConfig(**ONE_HEAD_EACH),
}
"""Attention and FFN read the same residual: there is none between them to blend into."""


def tiny(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, attention: str | None = None):
    """A Hugging Face causal LM of `family` with random weights large enough that attention matters."""
    torch.manual_seed(seed)
    config = (FAMILIES | NEWER | PARALLEL)[family]()
    kwargs = {} if attention is None else {"attn_implementation": attention}
    if family == "gemma2" and dtype == torch.float64 and attention is None:
        kwargs = {"attn_implementation": "float64_eager"}
    if family == "gpt_oss":  # the fused product of experts knows no float64
        kwargs["experts_implementation"] = "eager"
    model = AutoModelForCausalLM.from_config(config, **kwargs).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.15 if "embed" not in name and "wte" not in name else 1.0)
    return model


def prompts(rows: int = 3, longest: int = 11, seed: int = 0) -> list[list[int]]:
    """Token lists of different lengths (longest first is not assumed)."""
    g = torch.Generator().manual_seed(seed)
    lengths = [longest - 3 * (r % 3) for r in range(rows)]
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in lengths]


def relative(a, b):
    """|a - b| / |b| over everything."""
    return ((a - b).norm() / b.norm()).item()


GAMMA = (0.3, -0.2, 0.4)


def lrt(pathway="both", hf=None, seed=0, size=0.15, **how):
    """A tiny LRT with random weights in every pathway that is on."""
    model = attach_lrt(hf if hf is not None else tiny("llama"), pathway=pathway, **how)
    g = torch.Generator().manual_seed(seed)
    weights = model.kind.weights()
    drawn = {name: size * torch.randn(w.shape, generator=g, dtype=w.dtype) for name, w in weights.items()}
    if "gamma" in drawn:
        drawn["gamma"] = torch.tensor(GAMMA, dtype=torch.float64)
    model.kind = model.kind.with_weights({name: w.to(model.backbone.device) for name, w in drawn.items()})
    return model
