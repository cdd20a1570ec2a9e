"""The parts of a tiny capture from a question file on: a Llama, a tokenizer with words, a recipe."""

import importlib

import numpy as np
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sst_interp.runs.recipe import Recipe

capture_module = importlib.import_module("sst_interp.runs.capture")
capture = capture_module.capture

ALPHA = 0.3
VOCABULARY = 160
"""More than 100, so that a top 100 is a choice."""
WORDS = [f"quorvex{i}" for i in range(VOCABULARY - 8)]
DEPTHS = (1, 2, 3)
NEW = 7


def tiny_llama(dtype=torch.float64, seed=0, **config):
    """As `tiny.tiny`, with a vocabulary for `word_tokenizer`."""
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(LlamaConfig(**(tiny.COMMON | {"vocab_size": VOCABULARY} | config)))
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1.0 if "embed" in name else 0.15)
    return hf.to(dtype).eval()


def word_tokenizer():
    """One token per word, for words that would be noticed anywhere."""
    known = ["<pad>", "<s>", "</s>", "<unk>", "(A)", "(B)", "(C)", "(D)", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    )


def write_questions(path, n=5, seed=0):
    """Multiple-choice questions out of `WORDS`, as a CSV; their lengths differ within a batch of two, too."""
    pick = np.random.default_rng(seed)
    lines = ["id,question,A,B,answer"]
    for i in range(n):
        a, b = pick.choice(WORDS, 2, replace=False)
        lines.append(f"q{i},{' '.join(pick.choice(WORDS, (3, 8, 5, 10, 4)[i % 5]))},{a},{b},{'AB'[i % 2]}")
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_for(csv, **changes):
    fields = {"depths": DEPTHS, "max_new_tokens": NEW, "batch_size": 2, "dtype": "float64", "instruction": ""}
    return Recipe(**({"name": "own", "checkpoint": "tiny", "dataset": str(csv)} | fields | changes))


def interrupt(monkeypatch, owner, name, call, after=False):
    """Ctrl-C in the `call`-th call (0-based) of owner.name, before or after it does its work."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call + 1:
            if after:
                real(*args, **kwargs)
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def save_model(folder, dtype=torch.float32, seed=0, **config):
    """A tiny Llama and its tokenizer as a Hugging Face folder."""
    tiny_llama(dtype, seed, **config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
