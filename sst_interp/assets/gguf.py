"""A Llama GGUF file as an ordinary Hugging Face folder: weights, config, tokenizer with its chat template.

Done here and not with transformers' `gguf_file=`, for three reasons. That path needs `accelerate`; its
inside was rewritten between 5.x releases, and a converted folder should not depend on which one the
user has; and it has no split rule for the pre-tokenizer `smollm`, so it falls back to GPT-2's, which
tokenizes whitespace in front of a digit otherwise than the model was trained (83 of the 7,473 GSM8K
training examples come out different). The weights are equal to transformers' bit for bit.

Knows nothing about wheels, caches or downloads: those are `sst_interp.assets.wheels`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sst_interp.errors import SSTError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

WEIGHT_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF tensor -> Hugging Face module; `blk.L.` in front becomes `model.layers.L.`."""


def convert(gguf: Path, folder: Path, progress: Callable[[Any], Any] = iter) -> None:
    """Write `model.safetensors` (float32), `config.json`, `generation_config.json` and the tokenizer.

    The weights stay float32: a Q4_1 weight is d * q + m with two float16 numbers and a 4-bit one, and
    79% of SmolLM2's do not fit in bfloat16 (42% not in float16). Load with `dtype=` to round them.

    Args:
        gguf: the file; architecture `llama`, tokenizer `gpt2` with pre-tokenizer `smollm`.
        folder: an existing folder to write in.
        progress: wraps the iteration over tensors (`tqdm`).

    Raises:
        SSTError: another architecture or tokenizer.
        OSError, SafetensorError: the disk is full or not writable.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    from transformers import GenerationConfig

    reader = GGUFReader(gguf)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    kinds = tuple(meta.get(k) for k in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kinds != ("llama", "gpt2", "smollm"):
        raise SSTError(
            f"{gguf.name} is a {'/'.join(map(str, kinds))} model; only llama/gpt2/smollm can be converted",
            "convert it with its own tools and pass the Hugging Face folder",
        )
    tensors = dict(weights(progress(reader.tensors), meta["llama.attention.head_count"]))
    config = llama_config(meta, tied="lm_head.weight" not in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600: of no use in a shared cache
    config.save_pretrained(folder)
    special = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    tokenizer(meta).save_pretrained(folder)


def weights(tensors: Any, n_heads: int) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face name and float32 array `[out, in]` of every tensor.

    llama.cpp stores the rows of a query or key head for rotary pairs (2i, 2i+1), Hugging Face for
    (i, i + d_head/2): the rows of each head are put back in that order.
    """
    from gguf import dequantize

    d_head = None
    for tensor in tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if match is None or match[2] not in WEIGHT_NAMES:
            raise SSTError(f"GGUF tensor {tensor.name!r} has no place in a Llama model")
        layer, part = match.groups()
        if part in ("attn_q", "attn_k"):
            d_head = d_head or tensor.shape[0] // n_heads
            pairs = array.reshape(-1, d_head // 2, 2, array.shape[-1])
            array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
        prefix = f"model.layers.{layer}." if layer else ""
        yield f"{prefix}{WEIGHT_NAMES[part]}.weight", np.ascontiguousarray(array)


def llama_config(meta: dict[str, Any], tied: bool) -> LlamaConfig:
    """The config the metadata describes."""
    from transformers import LlamaConfig

    heads = meta["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.embedding_length"] // heads,
        max_position_embeddings=meta["llama.context_length"],
        # float32 in the file: 9.999999747e-06 is 1e-05
        rms_norm_eps=float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(meta["llama.rope.freq_base"])},
        tie_word_embeddings=tied,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )


def tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer in the metadata, with the `smollm` split: every digit by itself.

    The vocabulary lacks 21 of the 256 bytes, as the original's does: such characters (some rare
    scripts) are dropped when encoded.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        named = [token for token, k in zip(tokens, kinds, strict=True) if k == kind]
        add([AddedToken(token, normalized=False, special=kind == CONTROL) for token in named])
    special = {
        f"{name}_token": tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    fast.chat_template = meta["tokenizer.chat_template"]
    return fast
