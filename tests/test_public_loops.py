"""Public models that loop by themselves: the published forward pass, bit for bit or by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny import COMMON, prompts, relative
from tiny_capture import recipe_for, word_tokenizer, write_questions
from transformers import AutoModelForCausalLM, DoryConfig, DynamicCache, HrmTextConfig

import sst_interp as sst
from sst_interp.bridges import for_harness
from sst_interp.errors import SSTError
from sst_interp.findings.of_run import ledger_of
from sst_interp.models.checkpoint import save_checkpoint
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import Record
from sst_interp.models.kinds.dory import Dory
from sst_interp.models.kinds.huginn import HuginnModel
from sst_interp.models.kinds.ouro import OuroModel
from sst_interp.models.model import attach, attach_looped, attach_lrt
from sst_interp.runs.capture import capture

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


OURO = {
    "model_type": "ouro", "architectures": ["OuroForCausalLM"], "vocab_size": 160, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "total_ut_steps": 3, "max_position_embeddings": 128,
    "layer_types": ["full_attention"] * 3, "early_exit_threshold": 1.0, "eos_token_id": 2,
    "sliding_window": None,
    "auto_map": {"AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"},
}  # fmt: skip
HUGINN = {
    "model_type": "huginn_raven", "architectures": ["RavenForCausalLM"], "vocab_size": 160, "n_embd": 32,
    "intermediate_size": 48, "n_heads": 4, "n_layers": 4, "block_size": 128, "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 2, "n_layers_in_coda": 1, "mean_recurrence": 3, "norm_eps": 1e-6,
    "rope_base": 50000, "qk_bias": True, "bias": False, "injection_type": "linear", "tie_embeddings": True,
    "auto_map": {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"},
}  # fmt: skip


def ouro():
    return seeded(OuroModel(dict(OURO)))


def huginn():
    return seeded(HuginnModel(dict(HUGINN)))


MODELS = {"ouro": ouro, "huginn": huginn, "dory": dory, "hrm_text": hrm}


NATIVE = ("dory", "hrm_text")


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
def test_it_is_transformers_own_model_at_its_own_depth(name):
    hf, tokens = MODELS[name](), torch.tensor([prompts()[0]])
    model = attach_looped(hf)
    assert (model.kind.name, model.choices.kv) == (name, "each")
    theirs = hf(tokens, use_cache=False).logits
    done = model.replay(tokens, model.kind.depth)
    assert torch.equal(model.backbone.unembed(done.resid_post[:, :, -1, -1].contiguous()), theirs)
    assert relative(model.replay(tokens, model.kind.depth - 1).logits[:, :, -1], theirs) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE)
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
        if name != "huginn":  # whose own forward pass takes a first state
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
    monkeypatch.setattr(Dory, "first_state", lambda self, p, e, choices: e * (1 + 1e-4))
    with pytest.raises(SSTError, match="does not give the model's own logits"):
        attach_looped(dory())


def rms(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attention_by_hand(q, k, v):
    """Causal softmax attention [position, head, d_head], head by head and query by query."""
    out = torch.zeros_like(q)
    for t in range(len(q)):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            weights = (k[: t + 1, g] @ q[t, h] / math.sqrt(q.shape[-1])).softmax(0)
            out[t, h] = weights @ v[: t + 1, g]
    return out.flatten(1)


def angles(n, d_head, base):
    return torch.arange(n)[:, None].double() / base ** (torch.arange(0, d_head, 2).double() / d_head)


def ouro_by_hand(w, tokens, passes):
    """arXiv 2510.25741, from the checkpoint's tensors alone: hidden states after each pass, normed."""
    x, out = w["model.embed_tokens.weight"][tokens], []
    a = angles(len(tokens), 8, 10000.0)
    cos, sin = (torch.cat([f(a), f(a)], -1)[:, None] for f in (torch.cos, torch.sin))

    def turn(y):
        return y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin

    for _ in range(passes):
        for layer in range(3):
            p = {k.split(f"layers.{layer}.")[1]: v for k, v in w.items() if f"layers.{layer}." in k}
            h = rms(x, p["input_layernorm.weight"])
            q, k, v = ((h @ p[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, 8)) for n in "qkv")
            h = attention_by_hand(turn(q), turn(k), v) @ p["self_attn.o_proj.weight"].T
            x = x + rms(h, p["input_layernorm_2.weight"])
            h = rms(x, p["post_attention_layernorm.weight"])
            gate = h @ p["mlp.gate_proj.weight"].T
            h = (gate * gate.sigmoid() * (h @ p["mlp.up_proj.weight"].T)) @ p["mlp.down_proj.weight"].T
            x = x + rms(h, p["post_attention_layernorm_2.weight"])
        x = rms(x, w["model.norm.weight"])
        out.append(x)
    return out


def huginn_by_hand(w, tokens, steps, s):
    """arXiv 2502.05171, from the checkpoint's tensors alone: logits after each iteration."""
    a = angles(len(tokens), 8, 50000.0)
    turn = torch.polar(torch.ones_like(a), a)[:, None]

    def rotated(y):
        return torch.view_as_real(
            torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn
        ).flatten(-2)

    def block(name, x):
        p = {k.removeprefix(f"transformer.{name}."): v for k, v in w.items() if f".{name}." in k}
        h = rms(x, p["norm_1.weight"]) @ p["attn.Wqkv.weight"].T
        q, k, v = (part.unflatten(-1, (4, 8)) for part in h.chunk(3, -1))
        q, k = rotated(q + p["attn.qk_bias"][0]), rotated(k + p["attn.qk_bias"][1])
        x = rms(attention_by_hand(q, k, v) @ p["attn.proj.weight"].T + x, p["norm_2.weight"])
        one, two = (rms(x, p["norm_3.weight"]) @ p["mlp.fc.weight"].T).chunk(2, -1)
        return rms((one * one.sigmoid() * two) @ p["mlp.proj.weight"].T + x, p["norm_4.weight"])

    embedding, norm, out = w["transformer.wte.weight"], w["transformer.ln_f.weight"], []
    e = block("prelude.0", embedding[tokens] * math.sqrt(32))
    for _ in range(steps):
        s = torch.cat([s, e], -1) @ w["transformer.adapter.weight"].T
        s = block("core_block.1", block("core_block.0", s))
        out.append(rms(block("coda.0", rms(s, norm)), norm) @ embedding.T)
    return out


def stored(folder, model, config, **tensors):
    """A model folder as it is published: config.json, safetensors in two files, a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        k: v.clone().contiguous()
        for k, v in model.state_dict().items()
        if k != "lm_head.weight" or tensors == {}
    }
    names = sorted(weights)
    save_file({k: weights[k] for k in names[::2]} | tensors, folder / "model-00001-of-00002.safetensors")
    save_file({k: weights[k] for k in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    word_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_ouro_is_its_published_equations(tmp_path):
    hf, tokens = ouro(), torch.tensor(prompts()[0])
    folder = stored(tmp_path / "Ouro-tiny", hf, OURO)
    model = sst.load(folder, dtype="float64")
    assert (model.kind.name, model.kind.depth, model.choices.kv) == ("ouro", 3, "each")
    w = dict(hf.state_dict())
    states = ouro_by_hand(w, tokens, 3)
    for method in ("parallel", "sequential"):
        done = model.replay(tokens[None], 3, method)
        for i, h in enumerate(states):
            assert relative(done.logits[0, :, i], h @ w["lm_head.weight"].T) < SINGLE
    gate = [
        torch.sigmoid(h @ w["model.early_exit_gate.weight"][0] + w["model.early_exit_gate.bias"])
        for h in states
    ]
    p = model.kind.exit_probabilities(model.backbone, done.resid_post[0, :, -1])
    by_hand = torch.stack([gate[0], (1 - gate[0]) * gate[1], (1 - gate[0]) * (1 - gate[1])], -1)
    assert relative(p, by_hand) < SINGLE
    assert torch.allclose(p.sum(-1), torch.ones_like(p[:, 0]))
    with pytest.raises(SSTError, match="without an exit gate"):
        replace(model.kind, gate=None).exit_probabilities(model.backbone, done.resid_post[0, :, -1])


@torch.no_grad()
def test_huginn_is_its_published_equations(tmp_path):
    hf, tokens = huginn(), torch.tensor(prompts()[0])
    folder = stored(tmp_path / "huginn-tiny", hf, HUGINN, freqs_cis=torch.zeros(1, 128, 1, 4, 2))
    w = dict(hf.state_dict())
    for initial in ("zeros", "noise"):
        model = sst.load(folder, dtype="float64")
        assert (model.kind.name, model.kind.depth, model.kind.core) == ("huginn", 3, (1, 3))
        model.kind = replace(model.kind, initial=initial)
        first = torch.zeros(len(tokens), 32, dtype=torch.float64)
        if initial == "noise":  # what the core's first layer reads, less what the prelude puts in
            record = Record(["resid_pre", "resid_post"])
            model.generate([tokens[:1].tolist()], 1, 1, stop_tokens=[], edit=record)
            read, e = record["resid_pre"][0, 0, 1, 0], record["resid_post"][0, 0, 0, 0]
            adapter = w["transformer.adapter.weight"]
            drawn = torch.linalg.lstsq(adapter[:, :32], (read - adapter[:, 32:] @ e)[:, None]).solution[:, 0]
            std = math.sqrt(2 / 5)
            assert 0.6 * std < drawn.std() < 1.4 * std
            assert drawn.abs().max() < 3 * std + 1e-6
            tokens, first = tokens[:1], drawn[None]
        for i, logits in enumerate(huginn_by_hand(w, tokens, 4, first)):
            assert relative(model.replay(tokens[None], 4).logits[0, :, i], logits) < 1e-4


@pytest.mark.parametrize(("make", "config"), [(ouro, OURO), (huginn, HUGINN)], ids=["ouro", "huginn"])
def test_a_folder_that_is_not_whole_is_refused_in_one_line(tmp_path, make, config):
    folder = stored(tmp_path / "tiny", make(), config)
    kind = {"ouro": "ouro", "huginn_raven": "huginn"}[config["model_type"]]
    assert sst.load(folder, dtype="float32", kind=kind).kind.name == kind
    assert sst.load(folder, dtype="float32", kind="looped").generate([[5, 6, 7]], 2, 2).tokens
    for how in ({"kind": "sst"}, {"alpha": 0.1}):
        with pytest.raises(SSTError, match="loops by itself") as error:
            sst.load(folder, dtype="float32", **how)
        assert "\n" not in error.value.message
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    save_file({"model.extra": torch.zeros(2)}, folder / "model-00003.safetensors")
    with pytest.raises(SSTError, match=r"no place for: model\.extra"):
        sst.load(folder, dtype="float32")
    (folder / "model-00003.safetensors").unlink()
    second.unlink()
    with pytest.raises(SSTError, match="lacks"):
        sst.load(folder, dtype="float32")
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SSTError, match="cannot be loaded"):
        sst.load(folder, dtype="float32")
    second.write_bytes(whole)
    odd = {"ouro": {"layer_types": ["sliding_attention"] * 3}, "huginn": {"injection_type": "add"}}[kind]
    (folder / "config.json").write_text(json.dumps(config | odd))
    with pytest.raises(SSTError, match="published"):
        sst.load(folder, dtype="float32")


@pytest.mark.parametrize(("make", "config"), [(ouro, OURO), (huginn, HUGINN)], ids=["ouro", "huginn"])
def test_it_is_captured_saved_and_seen_as_any_model(tmp_path, make, config):
    folder = stored(tmp_path / "tiny", make(), config)
    csv = write_questions(tmp_path / "words.csv", 3)
    recipe = recipe_for(
        csv, questions=3, max_new_tokens=3, checkpoint=str(folder), dtype="float32", controls=1
    )
    run = capture(recipe, None, tmp_path / "own", progress=False)
    model = sst.load(folder, dtype="float32")
    assert run.kind == model.kind.name
    assert run.manifest["provenance"]["choices"]["kv"] == "each"
    assert sorted(set(run.pairs["layer"])) == list(model.kind.iterated(model.backbone.n_layers))
    assert not ledger_of(run, resamples=50).failed
    saved = save_checkpoint(model, tmp_path / "saved", str(folder))
    again = sst.load(saved, dtype="float32")
    assert (again.kind.digest(), again.choices) == (model.kind.digest(), model.choices)
    assert torch.equal(again.replay([[5, 6, 7]], 3).logits, model.replay([[5, 6, 7]], 3).logits)
    with torch.no_grad():
        traced = model.nnsight(2)
        with traced.trace([5, 6, 7]):
            y = traced.iteration[2].layers[1].resid_post.output.save()  # of position 0
        first = model.replay([[5, 6, 7]], 2).resid_post[0, 0, 1, 1]
    assert relative(y[0, 0], first) < SINGLE


@torch.no_grad()
def test_the_exit_gate_halts_where_it_has_stopped_with_probability_q():
    model, rows = attach_looped(ouro()), prompts()
    kind = model.kind
    gate = 3 * kind.gate / kind.gate[:-1].norm()
    model.kind = kind.with_weights({"gate": gate})
    seen = torch.stack([model.replay([row], 3).resid_post[0, -1, -1] for row in rows])
    stopped = model.kind.exit_probabilities(model.backbone, seen).cumsum(-1)
    every = set()
    for q in (0.2, 0.5, 0.8, 1.0):
        policy = model.exit_gate(q)
        assert policy.deepest == kind.depth == 3
        out = model.generate(rows, max_new_tokens=4, stop_tokens=[], depth=policy)
        by_hand = [next((i for i in (1, 2) if row[i - 1] >= q), 3) for row in stopped.tolist()]
        assert out.iterations == by_hand
        assert out.tokens == model.generate(rows, by_hand, 4, stop_tokens=[]).tokens
        every |= set(by_hand)
    assert len(every) > 1
    assert for_harness(model, halting="exit_gate", threshold=0.8, deepest=2)[1] == model.exit_gate(0.8, 2)
    assert max(model.generate(rows, max_new_tokens=1, depth=model.exit_gate(1.0, 2)).iterations) == 2
    for wrong in (0, 1.5, "half", True):
        with pytest.raises(SSTError, match="is not a probability above 0"):
            model.exit_gate(wrong)
    other = attach_looped(dory())
    with pytest.raises(SSTError, match="without an exit gate"):
        other.exit_gate()
    with pytest.raises(SSTError, match="another model's"):
        other.generate(rows, depth=model.exit_gate())
