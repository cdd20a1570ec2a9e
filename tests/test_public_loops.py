"""Public models that loop by themselves: the published forward pass, bit for bit or by hand."""

import pytest
import torch
from tiny import COMMON, prompts, relative
from transformers import AutoModelForCausalLM, DoryConfig, DynamicCache, HrmTextConfig

from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import Record
from sst_interp.models.kinds.dory import Dory
from sst_interp.models.model import attach, attach_looped, attach_lrt

SINGLE = 1e-5
"""These models norm in float32, whatever their dtype."""


def seeded(hf, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1.0 if "embed" in name else 0.15)
            else:
                p.add_(0.1 * torch.rand_like(p) * p.abs().mean())
    return hf.double().eval()


def dory(mode="per_loop", loops=2):
    config = DoryConfig(
        **COMMON | {"num_hidden_layers": 4}, sliding_window=6, n_input_layers=1, n_output_layers=1,
        n_recurrent_loops=loops, recurrent_kv_cache_mode=mode, tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"] * 2, initializer_range=0.2,
    )  # fmt: skip
    return seeded(AutoModelForCausalLM.from_config(config))


def hrm(slow=2, fast=3):
    config = HrmTextConfig(
        **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"} | {"num_hidden_layers": 2},
        H_cycles=slow, L_cycles=fast,
    )  # fmt: skip
    return seeded(AutoModelForCausalLM.from_config(config))


MODELS = {"dory": dory, "hrm_text": hrm}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_is_transformers_own_model_at_its_own_depth(name):
    hf, tokens = MODELS[name](), torch.tensor([prompts()[0]])
    model = attach_looped(hf)
    assert (model.kind.name, model.choices.kv) == (name, "each")
    theirs = hf(tokens, use_cache=False).logits
    done = model.replay(tokens, model.kind.depth)
    assert torch.equal(model.backbone.unembed(done.resid_post[:, :, -1, -1].contiguous()), theirs)
    assert relative(model.replay(tokens, model.kind.depth - 1).logits[:, :, -1], theirs) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_every_depth_is_the_model_with_so_many_loops(name):
    tokens = torch.tensor([prompts()[0]])
    deep = attach_looped(MODELS[name]()).replay(tokens, 4)
    for loops in (1, 2, 3, 4) if name == "dory" else (1, 2):
        other = dory(loops=loops) if name == "dory" else hrm(slow=loops, fast=2)
        if name == "hrm_text":
            deep = attach_looped(other).replay(tokens, 4)
        depth = loops if name == "dory" else 2 * loops
        theirs = other(tokens, use_cache=False).logits
        assert relative(deep.logits[:, :, depth - 1], theirs) < SINGLE


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_parallel_equals_sequential_and_greedy_equals_a_fresh_prompt(name):
    rows, model = prompts(), attach_looped(MODELS[name]())
    depth = model.kind.depth
    together = model.replay(rows, depth)
    for k, row in enumerate(rows):
        alone = model.replay([row], depth, "sequential").resid_post[0]
        assert relative(together.resid_post[k, : len(row)], alone) < SINGLE
    text = model.generate([rows[0]], depth, 6, stop_tokens=[]).tokens[0]
    for step, token in enumerate(text):
        assert model.generate([rows[0] + text[:step]], depth, 1, stop_tokens=[]).tokens[0] == [token]
        theirs = model.backbone.model(torch.tensor([rows[0] + text[:step]]), use_cache=False).logits
        assert theirs[0, -1].argmax() == token


def in_pieces(hf, tokens, size):
    """transformers' logits with its own cache, `size` tokens at a time."""
    cache, out = DynamicCache(config=hf.config), []
    for start in range(0, tokens.shape[1], size):
        out.append(hf(tokens[:, start : start + size], cache=cache, use_cache=True).logits)
    return torch.cat(out, 1)


@torch.no_grad()
def test_dorys_last_loop_depends_on_how_a_text_is_cut_and_token_by_token_is_the_definition():
    tokens = torch.tensor([prompts()[0]])
    hf = dory("last_loop")
    model = attach_looped(hf)
    assert model.choices.kv == "last"
    whole, by_token = hf(tokens, use_cache=False).logits, in_pieces(hf, tokens, 1)
    assert relative(whole, by_token) > 1e-3
    assert relative(in_pieces(hf, tokens, 3), by_token) > 1e-3
    assert relative(in_pieces(hf, tokens, 3), whole) > 1e-3
    for method in ("sequential", "parallel"):
        ours = model.replay(tokens, 2, method).logits[:, :, -1]
        assert relative(ours, by_token) < SINGLE
    each = attach_looped(hf, choices=Choices(kv="each")).replay(tokens, 2).logits[:, :, -1]
    assert relative(each, whole) < SINGLE
    per_loop = dory("per_loop")
    assert relative(in_pieces(per_loop, tokens, 1), per_loop(tokens, use_cache=False).logits) < SINGLE


@torch.no_grad()
def test_hrm_text_names_both_indices_and_commits_the_slow_state_once_per_cycle():
    model, tokens = attach_looped(hrm()), torch.tensor([prompts()[0]])
    assert model.kind.name_of(4) == "iteration 4 (slow cycle 2, fast step 1)"
    assert model.kind.depth == 6
    record = Record(["resid_pre", "resid_post"])
    model.generate(tokens, 5, 1, stop_tokens=[], edit=record)
    low, high = model.backbone.decoder.L_module.final_norm, model.backbone.final_norm
    pre, post = record["resid_pre"][0, 0], record["resid_post"][0, 0]
    e = model.backbone.embed(tokens[:, -1:], torch.tensor([[10]]))[0, 0]
    for i, slow in ((1, e), (2, e), (3, high(post[3, 2])), (4, high(post[3, 2]))):
        assert relative(pre[0, i], low(post[1, i - 1]) + slow) < SINGLE


@pytest.mark.parametrize("name", MODELS)
def test_other_streams_are_refused_in_one_line(name):
    hf = MODELS[name]()
    for make in (attach, attach_lrt, lambda m: attach_looped(m, core=(0, 1))):
        with pytest.raises(SSTError, match=r"loops by itself|are not summed") as error:
            make(hf)
        assert "\n" not in error.value.message


@torch.no_grad()
def test_a_loop_that_is_not_the_models_is_noticed(monkeypatch):
    """Validation is not decoration."""
    monkeypatch.setattr(Dory, "_initial_state", lambda self, p, e, inject: e * (1 + 1e-4))
    with pytest.raises(SSTError, match="does not give the model's own logits"):
        attach_looped(dory())
