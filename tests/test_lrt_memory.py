"""A known slip in public code is to generate or score an LRT with a memory of zeros. Here none may."""

import pytest
import torch
from tiny import lrt
from tiny_capture import tiny_llama, word_tokenizer
from tiny_training import EXAMPLES

from sst_interp.models.kinds.lrt import Memory
from sst_interp.questions.item import Question
from sst_interp.training.evaluation import answer_losses, answers


@pytest.fixture(params=["residual", "kv", "both"])
def model(request):
    model = lrt(request.param, hf=tiny_llama(), size=0.4)
    model.tokenizer = word_tokenizer()
    return model


@pytest.fixture
def forget(monkeypatch):
    """Makes every pass read zeros."""
    reading = Memory.reading

    def zeros(self, choices, state, has_state, visit):
        return reading(self, choices, None, None, visit)

    return lambda: monkeypatch.setattr(Memory, "reading", zeros)


def by_hand(model, example):
    """Summed loss of an answer, one position after the other."""
    logits = model.replay([list(example.tokens)], 1, "sequential").logits[0, :, 0].log_softmax(-1)
    return -sum(float(logits[t - 1, example.tokens[t]]) for t in range(example.prompt, len(example.tokens)))


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"sweeps": 6}, {"sweeps": 1, "groups": 6}], ids=str)
def test_a_loss_is_that_of_a_model_with_its_memory(model, forget, how):
    found = answer_losses(model, EXAMPLES, batch_size=2, **how)["loss"]
    wanted = [by_hand(model, example) for example in EXAMPLES]
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    forget()
    without = answer_losses(model, EXAMPLES, batch_size=2, **how)["loss"]
    assert (without - found).abs().max() > 1e-2
    assert without.tolist() == pytest.approx([by_hand(model, e) for e in EXAMPLES], rel=1e-6)


@torch.no_grad()
def test_answers_are_those_of_a_model_with_its_memory(model, forget, monkeypatch):
    asked = [Question(str(n), "sun moon " * (n + 2), "A", "choice", 4) for n in range(4)]
    seen = []
    generate = type(model).generate_at_depths

    def watched(self, prompts, *args, **kwargs):
        found = generate(self, prompts, *args, **kwargs)
        seen.append([found[1].tokens, [self.encode(p) for p in prompts]])
        return found

    monkeypatch.setattr(type(model), "generate_at_depths", watched)
    answers(model, asked, [1], 6)
    (texts, prompts), *_ = seen
    for text, prompt in zip(texts, prompts, strict=True):  # greedy on its own sequential replay
        logits = model.replay([prompt + text], 1, "sequential").logits[0, len(prompt) - 1 : -1, 0]
        assert logits.argmax(-1).tolist() == text
    before = texts
    forget()
    answers(model, asked, [1], 6)
    assert seen[-1][0] != before
