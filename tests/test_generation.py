"""Greedy generation: the same as replaying its own text, at every depth and in every batch."""

import pytest
import torch
from tiny import FAMILIES, prompts, tiny

from sst_interp.errors import SSTError
from sst_interp.models.model import attach


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy_on_its_own_replay(family):
    model = attach(tiny(family), alpha=0.1)
    prompt, seen = prompts()[0], []
    out = model.generate([prompt], iterations=3, max_new_tokens=9, stop_tokens=[], observe=seen.append)
    text = prompt + out.tokens[0]
    replayed = model.replay([text[:-1]], 3, start=len(prompt) - 1, tolerance=1e-13)
    assert replayed.logits[0, :, -1].argmax(-1).tolist() == out.tokens[0]
    recorded = torch.stack([torch.stack([i.resid_post[:, 0] for i in s.iterations], 1) for s in seen])
    truth = replayed.resid_post[0]
    assert ((recorded - truth).norm() / truth.norm()).item() < 1e-9


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_zero_alpha_generates_what_transformers_generates(family):
    hf = tiny(family)
    prompt = prompts()[0]
    theirs = hf.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = attach(hf, alpha=0.0).generate([prompt], iterations=2, max_new_tokens=12, stop_tokens=[])
    assert ours.tokens[0] == theirs[0, len(prompt) :].tolist()


def test_a_batch_of_mixed_lengths_and_depths_is_each_prompt_alone():
    model = attach(tiny("llama"), alpha=0.2)
    depths = [1, 4, 2]
    together = model.generate(prompts(), depths, 10, stop_tokens=[])
    for prompt, depth, tokens in zip(prompts(), depths, together.tokens, strict=True):
        assert model.generate([prompt], depth, 10, stop_tokens=[]).tokens[0] == tokens
    flat = model.generate(prompts(), 4, 10, stop_tokens=[])
    assert flat.tokens[1] == together.tokens[1]


def test_stop_tokens_end_a_text():
    model = attach(tiny("llama"), alpha=0.1)
    free = model.generate(prompts(), 2, 10, stop_tokens=[])
    stop = free.tokens[0][3]
    out = model.generate(prompts(), 2, 10, stop_tokens=[stop])
    for full, cut, stopped in zip(free.tokens, out.tokens, out.stopped, strict=True):
        if stop in full:
            assert cut == full[: full.index(stop) + 1]
            assert stopped
        else:
            assert cut == full
            assert not stopped


def test_generate_refuses_nonsense():
    model = attach(tiny("llama"))
    with pytest.raises(SSTError, match="iterations = 0 is not a whole number from 1 to 127"):
        model.generate([[5]], iterations=0)
    with pytest.raises(SSTError, match="depths for"):
        model.generate([[5]], iterations=[1, 2])
    with pytest.raises(SSTError, match="exceed the context"):
        model.generate([[5] * 100], max_new_tokens=60)
    with pytest.raises(SSTError, match="no tokenizer"):
        model.generate(["text"])
