"""The Latent Recurrent Transformer against its definition, in float64."""

import pytest
import torch
from tiny import FAMILIES, lrt, prompts, relative, tiny

from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.model import attach_lrt
from sst_interp.models.solvers.sequential import advance

ROUNDING = 1e-12
"""float64, and other matrix shapes."""


@torch.no_grad()
@pytest.mark.parametrize("pathway", ["residual", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attached_to_a_backbone_it_changes_nothing(family, pathway):
    hf, tokens = tiny(family), torch.tensor([prompts()[0]])
    theirs = hf(tokens, use_cache=False).logits
    if family == "gpt2" and pathway == "both":
        with pytest.raises(SSTError, match="no key/value pathway"):
            attach_lrt(hf, pathway=pathway)
        return
    model = attach_lrt(hf, pathway=pathway)
    assert model.kind.off
    swept = model.replay(tokens, 3).resid_post[:, :, -1, -1]
    assert torch.equal(model.backbone.unembed(swept.contiguous()), theirs)
    one_by_one = model.replay(tokens, 2, "sequential").logits
    assert relative(one_by_one, theirs[:, :, None].expand(-1, -1, 2, -1)) < ROUNDING
    assert not any(m._forward_hooks for m in hf.modules())


def written_out_by_hand(hf, kind, tokens, iterations, memory=True):
    """A Llama LRT in the plainest possible words: loops, no cache, nothing shared with the package.
    Returns resid_post [position, layer, iteration, d_model].
    """
    c, layers, w = hf.config, hf.model.layers, kind.weights()
    n_heads, n_kv, d_head = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    theta = c.rope_parameters["rope_theta"]

    def norm(x, weight):
        return weight * x / torch.sqrt((x * x).mean() + c.rms_norm_eps)

    def rope(v, t):
        frequency = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head).double()
        cos, sin = torch.cos(t * frequency.float()).double(), torch.sin(t * frequency.float()).double()
        a, b = v[..., : d_head // 2], v[..., d_head // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def projected(module, which, k, h, m):
        plain = (module.weight @ h).view(n_kv, d_head)
        if "gates" not in w:
            return plain
        W = w["key" if which == 0 else "value"]
        back = (W[k if len(W) > 1 else 0] @ m).view(n_kv, d_head)
        gates = w["gates"][k, which]
        found = []
        for head in range(n_kv):
            local, fed = (2 / (1 + torch.exp(-(gates[i, head] @ h))) for i in (0, 1))
            found.append(local * plain[head] + fed * back[head])
        return torch.stack(found)

    keys, values = [{} for _ in layers], [{} for _ in layers]
    m = torch.zeros(c.hidden_size, dtype=torch.float64)
    out = torch.zeros(len(tokens), len(layers), iterations, c.hidden_size, dtype=torch.float64)
    for t, token in enumerate(tokens):
        for i in range(iterations):
            x = hf.model.embed_tokens.weight[token]
            for k, layer in enumerate(layers):
                if "gamma" in w:
                    x = x + w["gamma"][k] * m
                h, at = norm(x, layer.input_layernorm.weight), layer.self_attn
                q = rope((at.q_proj.weight @ h).view(n_heads, d_head), t)
                keys[k][t] = rope(projected(at.k_proj, 0, k, h, m), t)
                values[k][t] = projected(at.v_proj, 1, k, h, m)
                heads = []
                for head in range(n_heads):
                    group = head // (n_heads // n_kv)
                    scores = torch.stack([q[head] @ keys[k][u][group] for u in range(t + 1)]) / d_head**0.5
                    p = torch.softmax(scores, 0)
                    heads.append(sum(p[u] * values[k][u][group] for u in range(t + 1)))
                mid = x + at.o_proj.weight @ torch.cat(heads)
                f = norm(mid, layer.post_attention_layernorm.weight)
                gate, up = layer.mlp.gate_proj.weight @ f, layer.mlp.up_proj.weight @ f
                x = out[t, k, i] = mid + layer.mlp.down_proj.weight @ (gate * torch.sigmoid(gate) * up)
            source = norm(x, hf.model.norm.weight) if kind.source is None else out[t, kind.source, i]
            m = source if memory else m
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [
        {"pathway": "residual"},
        {"pathway": "kv"},
        {"pathway": "both", "projections": "per_layer"},
        {"pathway": "both", "source": 1},
    ],
    ids=str,
)
def test_it_equals_one_written_out_by_hand(how):
    hf, tokens = tiny("llama"), prompts()[0]
    model = lrt(hf=hf, **how)
    hand = written_out_by_hand(hf, model.kind, tokens, iterations=2)
    ours = model.replay([tokens], 2, "sequential").resid_post[0]
    assert relative(ours, hand) < 1e-6  # norms and rotary tables are float32 in transformers
    without = written_out_by_hand(hf, model.kind, tokens, iterations=2, memory=False)
    assert relative(without[0, :, 0], ours[0, :, 0]) < 1e-6  # zeros at the first position
    assert relative(without[1:], ours[1:]) > 1e-2


@torch.no_grad()
def test_generation_has_memory():
    """The slip in public code: to generate, or score, with a memory of zeros."""
    hf, prompt = tiny("llama"), prompts()[0]
    model = lrt(hf=hf)
    text = list(prompt)
    for _ in range(8):
        hand = written_out_by_hand(hf, model.kind, text, 1)[-1, -1, 0]
        text.append(int(model.backbone.unembed(hand).argmax()))
    assert model.generate([prompt], 1, 8, stop_tokens=[]).tokens[0] == text[len(prompt) :]
    zero = lrt(hf=hf, choices=Choices(prompt="blend_off"))
    stream = zero.new_stream(torch.zeros(1, dtype=torch.long), len(text))
    forgotten = []
    for token in text:
        stream.state.zero_()
        forgotten.append(advance(zero, stream, torch.tensor([token]), 1)[0].resid_post[-1])
    forgotten = model.backbone.unembed(torch.cat(forgotten))
    ours = model.replay([text]).logits[0, :, 0]
    assert relative(forgotten[:1], ours[:1]) < ROUNDING
    assert relative(forgotten[1:], ours[1:]) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("kv", ["last", "first"])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_parallel_equals_sequential(family, iterations, kv):
    """Left padding included: a pad has no memory and hands none on."""
    model = lrt(hf=tiny(family), choices=Choices(kv=kv))
    rows = prompts()
    hand = [model.replay([row], iterations, "sequential") for row in rows]
    for groups in (1, 3):
        found = model.replay(rows, iterations, groups=groups)
        assert found.certificate.converged
        assert found.certificate.method == "sweeps"
        for k, row in enumerate(hand):
            n = len(rows[k])
            assert relative(found.resid_post[k, :n], row.resid_post[0]) < 1e-9
    assert found.certificate.logit_error < 1e-9


@torch.no_grad()
def test_where_sweeps_do_not_pay_positions_are_visited_one_by_one():
    """A memory that hardly contracts: the solver gives up its sweeps, and says so."""
    tokens = [list(range(3, 60))]
    for gamma, method in ((1e-7, "sweeps"), (2.0, "sequential")):
        model = attach_lrt(tiny("llama"), gamma=gamma)
        solved = model.replay(tokens, iterations=2)
        assert solved.certificate.method == method
        assert solved.certificate.converged
        assert solved.certificate.logit_error < 1e-9
        exact = model.replay(tokens, iterations=2, method="sequential")
        assert torch.allclose(solved.resid_post, exact.resid_post, atol=1e-9)
        start = 40  # what is read on stands behind what was solved
        later = model.replay(tokens, iterations=2, start=start)
        once = model.replay([tokens[0][:start]]).resid_post
        assert torch.allclose(
            once, model.replay([tokens[0][:start]], method="sequential").resid_post, atol=1e-9
        )
        assert later.resid_post.shape[1] == len(tokens[0]) - start


def test_reading_goes_on_where_it_stopped_and_a_batch_is_its_rows():
    model, rows = lrt(), prompts()
    alone = [model.generate([row], 2, 6, stop_tokens=[]).tokens[0] for row in rows]
    assert model.generate(rows, 2, 6, stop_tokens=[]).tokens == alone
    later = model.replay([rows[0]], 2, start=4).resid_post
    stream = model.new_stream(torch.zeros(1, dtype=torch.long), 11)
    model.prefill(stream, torch.tensor([rows[0][:4]]))
    for t in range(4, len(rows[0])):
        two = advance(model, stream, torch.tensor([rows[0][t]]), 2)
        assert relative(two[1].resid_post[:, 0], later[0, t - 4, :, 1]) < 1e-9


@torch.no_grad()
def test_an_edit_sees_and_changes_what_a_layer_reads():
    from sst_interp.models.hooks import Record, at

    model, prompt = lrt(), prompts()[0]
    record = Record(["stream_state", "resid_post"])
    model.generate([prompt], 2, 3, stop_tokens=[], edit=record)
    memory = model.backbone.final_norm(record["resid_post"][:, :, -1])
    assert torch.equal(record["stream_state"][:, :, 0, 1], memory[:, :, 0])  # the newest state
    assert torch.equal(record["stream_state"][:, 1:, 2, 0], memory[:, :-1, 1])

    def double(tensor, **_):
        return 2 * tensor

    changed = Record(["resid_post"])

    def both(tensor, **where):
        changed(tensor, **where)
        return double(tensor) if where["site"] == "stream_state" and where["layer"] == 1 else None

    model.generate([prompt], 2, 1, stop_tokens=[], edit=at(both, position=0))
    before, after = record["resid_post"][:, :1], changed["resid_post"]
    assert torch.equal(before[:, :, 0, 0], after[:, :, 0, 0])
    assert relative(after[:, :, 1, 0], before[:, :, 1, 0]) > 1e-3


def test_bad_input_is_one_clear_line():
    hf = tiny("llama")
    for how, said in (
        ({"source": 3}, "source layer 3 does not exist: the model has 3 layers"),
        ({"source": True}, "does not exist"),
        ({"pathway": "values"}, "pathway = 'values' is not one of residual, kv, both"),
        ({"projections": "none"}, "projections"),
        ({"gamma": [0.1, 0.2]}, r"gamma has shape \[2\]"),
        ({"gamma": [0.1, 0.2, 0.3], "pathway": "kv"}, "residual pathway"),
        ({"gamma": float("nan")}, "not a finite number"),
        ({"choices": Choices(blend="additive")}, "blend = 'additive' is about the blend"),
    ):
        with pytest.raises(SSTError, match=said):
            attach_lrt(hf, **how)
    with pytest.raises(SSTError, match="Latent Recurrent Transformer has no alpha"):
        _ = attach_lrt(hf).alpha
