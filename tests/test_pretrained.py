"""A model with a stream in transformers' clothes: the same tokens and logits as in its own."""

import pytest
import torch
from tiny import prompts, relative, tiny
from tiny_capture import tiny_llama, word_tokenizer
from tiny_kinds import models
from transformers import pipeline

from sst_interp.bridges.pretrained import as_pretrained
from sst_interp.errors import SSTError
from sst_interp.models.model import attach


def left_padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", list(models()))
@pytest.mark.parametrize("depth", [1, 3])
def test_it_writes_what_the_model_writes(kind, depth):
    model = models()[kind]
    ours = model.generate(prompts(), depth, 7, stop_tokens=[]).tokens
    mine, asked = as_pretrained(model, depth), left_padded(prompts())
    theirs = mine.generate(**asked, max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert theirs[:, asked["input_ids"].shape[1] :].tolist() == ours


def test_a_call_is_a_replay_of_every_position():
    model = attach(tiny("llama"), alpha=0.2)
    asked = left_padded(prompts())
    logits = as_pretrained(model, 3)(**asked).logits
    for row, prompt in zip(logits, prompts(), strict=True):
        whole = model.replay([prompt], 3, tolerance=1e-13)
        assert whole.logits is not None
        alone = whole.logits[0, :, -1]
        assert relative(row[-len(prompt) :], alone) < 1e-6


def test_a_pipeline_runs_it():
    model = attach(tiny_llama(), word_tokenizer(), alpha=0.2)
    mine = as_pretrained(model, 2)
    out = pipeline("text-generation", model=mine, tokenizer=model.tokenizer)(
        "sun moon", max_new_tokens=5, do_sample=False, return_full_text=False, eos_token_id=None
    )
    ours = model.generate(["sun moon"], 2, 5, stop_tokens=[])
    assert ours.texts is not None
    assert out[0]["generated_text"].split() == ours.texts[0].split()


def test_sampling_is_transformers_own():
    mine, asked = as_pretrained(attach(tiny("llama"), alpha=0.2), 2), left_padded(prompts())
    how = {
        "max_new_tokens": 6,
        "do_sample": True,
        "eos_token_id": None,
        "pad_token_id": 0,
        "temperature": 2.0,
    }
    torch.manual_seed(0)
    first = mine.generate(**asked, **how)
    torch.manual_seed(0)
    assert torch.equal(mine.generate(**asked, **how), first)
    torch.manual_seed(1)
    assert not torch.equal(mine.generate(**asked, **how), first)


def test_what_it_cannot_do_is_one_line():
    model = attach(tiny("llama"), alpha=0.2)
    mine, asked = as_pretrained(model, 2), left_padded(prompts())
    with pytest.raises(SSTError, match="beam search"):
        mine.generate(**asked, num_beams=2)
    with pytest.raises(SSTError, match="padding on the right"):
        mine(asked["input_ids"], asked["attention_mask"].flip(1))
    with pytest.raises(SSTError):
        as_pretrained(model, 0)
