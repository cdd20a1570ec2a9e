"""The state stream against its definition, in float64, for every family and choice."""

import pytest
import torch
from tiny import FAMILIES, prompts, relative, tiny

from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.models.model import attach
from sst_interp.models.solvers.sequential import advance

ALPHA = 0.3
"""Far above the paper's range: errors in who blends what show at full size."""


ROUNDING = 1e-12
"""float64, and other matrix shapes."""


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_alpha_is_the_backbone_bit_for_bit(family):
    hf = tiny(family)
    tokens = torch.tensor([prompts()[0]])
    with torch.no_grad():
        theirs = hf(tokens, use_cache=False).logits
    model = attach(hf, alpha=0.0)
    assert torch.equal(model.replay(tokens, 1).logits[:, :, 0], theirs)
    for iterations in (1, 3):  # the sweep solver goes through the blend itself
        swept = model.replay(tokens, iterations, groups=1).resid_post[:, :, -1, -1]
        assert torch.equal(model.backbone.unembed(swept.contiguous()), theirs)
    for how in ({}, {"method": "sequential"}, {"groups": 3}):  # other matrix shapes, other rounding
        assert (
            relative(model.replay(tokens, 3, **how).logits, theirs[:, :, None].expand(-1, -1, 3, -1))
            < ROUNDING
        )


def written_out_by_hand(hf, tokens, alpha, iterations):
    """A Llama state stream in the plainest possible words: loops, no cache, nothing shared with the package.
    Returns resid_post [position, layer, iteration, d_model].
    """
    c, layers = hf.config, hf.model.layers
    n_heads, n_kv, d_head = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    theta = c.rope_parameters["rope_theta"]

    def norm(x, w):
        return w * x / torch.sqrt((x * x).mean() + c.rms_norm_eps)

    def rope(v, t):
        frequency = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float32) / d_head).double()
        cos, sin = torch.cos(t * frequency.float()).double(), torch.sin(t * frequency.float()).double()
        a, b = v[..., : d_head // 2], v[..., d_head // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    keys = [{} for _ in layers]
    values = [{} for _ in layers]
    state = [None] * len(layers)
    out = torch.zeros(len(tokens), len(layers), iterations, c.hidden_size, dtype=torch.float64)
    for t, token in enumerate(tokens):
        for i in range(iterations):
            x = hf.model.embed_tokens.weight[token]
            for k, layer in enumerate(layers):
                h, w = norm(x, layer.input_layernorm.weight), layer.self_attn
                q = rope((w.q_proj.weight @ h).view(n_heads, d_head), t)
                keys[k][t] = rope((w.k_proj.weight @ h).view(n_kv, d_head), t)
                values[k][t] = (w.v_proj.weight @ h).view(n_kv, d_head)
                heads = []
                for head in range(n_heads):
                    group = head // (n_heads // n_kv)
                    scores = torch.stack([q[head] @ keys[k][u][group] for u in range(t + 1)]) / d_head**0.5
                    weights = torch.softmax(scores, 0)
                    heads.append(sum(p * values[k][u][group] for u, p in enumerate(weights)))
                m = x + w.o_proj.weight @ torch.cat(heads)
                if state[k] is not None:
                    m = (1 - alpha) * m + alpha * state[k]
                f = norm(m, layer.post_attention_layernorm.weight)
                gate, up = layer.mlp.gate_proj.weight @ f, layer.mlp.up_proj.weight @ f
                x = m + layer.mlp.down_proj.weight @ (gate * torch.sigmoid(gate) * up)
                state[k] = out[t, k, i] = x
    return out


@torch.no_grad()
def test_the_stream_equals_one_written_out_by_hand():
    hf, tokens = tiny("llama"), prompts()[0]
    hand = written_out_by_hand(hf, tokens, ALPHA, iterations=3)
    ours = attach(hf, alpha=ALPHA).replay([tokens], 3, "sequential").resid_post[0]
    assert relative(ours, hand) < 1e-7  # rotary tables are float32 in transformers
    wrong = written_out_by_hand(hf, tokens, ALPHA * 1.001, iterations=3)
    assert relative(ours, wrong) > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_blend_reaches_residual_and_ffn(family):
    """The trap of a hook on the pre-FFN norm: it would change the branch and not the residual."""
    hf = tiny(family)
    model = attach(hf, alpha=ALPHA)
    stream = model.new_stream(torch.zeros(1, dtype=torch.long), 4)
    advance(model, stream, torch.tensor([5]), 1)
    s = stream.state.clone()
    block = (getattr(model.backbone.decoder, "layers", None) or model.backbone.decoder.h)[0]
    got = advance(model, stream, torch.tensor([9]), 1)[0].resid_post[0, 0]
    layer, seen = model.backbone.layers[0], {}
    # resid_mid of layer 0 does not depend on the stream, so the backbone's own run has it
    hook = layer.norm2.register_forward_pre_hook(lambda _m, args: seen.setdefault("m", args[0]))
    hf(torch.tensor([[5, 9]]), use_cache=False)
    hook.remove()
    mixed = (1 - ALPHA) * seen["m"][0, 1] + ALPHA * s[0, 0]
    ffn = block.mlp(layer.norm2(mixed[None, None]))
    if layer.post_ffn_norm is not None:
        ffn = layer.post_ffn_norm(ffn)
    assert relative(got, mixed + ffn[0, 0]) < 1e-12


CHOICES = [
    Choices(),
    Choices(carry="ffn_output"),
    Choices(blend="additive"),
    Choices(kv="first"),
    Choices(carry="ffn_output", blend="additive", kv="first"),
]


@pytest.mark.parametrize("choices", CHOICES, ids=lambda c: f"{c.carry}-{c.blend}-{c.kv}")
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_equals_sequential(family, iterations, choices):
    model = attach(tiny(family), alpha=0.1, choices=choices)
    truth = model.replay(prompts(), iterations, "sequential")
    for how in ({}, {"groups": 1}, {"groups": 3}):
        fast = model.replay(prompts(), iterations, "parallel", tolerance=1e-13, **how)
        assert fast.certificate.converged
        assert fast.certificate.argmax_agreement == 1
        assert relative(fast.resid_post, truth.resid_post) < 1e-9, how
        assert relative(fast.logits, truth.logits) < 1e-9, how


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_k_sweeps_make_the_first_k_positions_exact(family, iterations):
    model = attach(tiny(family), alpha=ALPHA)
    tokens = [prompts()[0]]
    truth = model.replay(tokens, iterations, "sequential").resid_post
    for k in (1, 2, 5, len(tokens[0])):
        swept = model.replay(tokens, iterations, groups=1, sweeps=k).resid_post
        # Position 0 has no state before it, so with one iteration the blend-off guess is exact there already.
        exact = k + (iterations == 1)
        assert relative(swept[:, :exact], truth[:, :exact]) < ROUNDING
        if exact < len(tokens[0]):
            assert relative(swept[:, exact], truth[:, exact]) > 1e-6  # and no more than that


def test_groups_carry_states_further_per_sweep():
    model = attach(tiny("llama"), alpha=ALPHA)
    tokens = [prompts()[0]]
    truth = model.replay(tokens, 1, "sequential").resid_post
    swept = model.replay(tokens, 1, groups=4, sweeps=1).resid_post
    assert relative(swept[:, :4], truth[:, :4]) < ROUNDING
    assert relative(swept[:, 4:], truth[:, 4:]) > 1e-6


def test_the_certificate_notices_a_bad_solution():
    model = attach(tiny("llama"), alpha=ALPHA)
    bad = model.replay([prompts()[0]], 1, groups=1, sweeps=1, check=11).certificate
    assert not bad.converged
    assert bad.logit_error > 1e-3
    good = model.replay([prompts()[0]], 1, check=11).certificate
    assert good.converged
    assert good.logit_error < 1e-9
    assert good.checked == 11


@pytest.mark.parametrize("method", ["sequential", "parallel"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batching_and_padding_change_nothing(family, method):
    model = attach(tiny(family), alpha=ALPHA)
    together = model.replay(prompts(), 2, method, tolerance=1e-13)
    for row, tokens in enumerate(prompts()):
        alone = model.replay([tokens], 2, method, tolerance=1e-13)
        assert together.lengths[row] == len(tokens)
        assert relative(together.resid_post[row, : len(tokens)], alone.resid_post[0]) < 1e-10
        assert (together.resid_post[row, len(tokens) :] == 0).all()


def test_pads_hand_no_state_on():
    """A pad's own content must not matter: the same row behind other padding gives the same bits."""
    model = attach(tiny("llama"), alpha=ALPHA)
    tokens, pad = model.batch(prompts())
    for filler in (7, 50):
        tokens[1, : pad[1]] = filler
        stream = model.new_stream(pad, tokens.shape[1])
        for t in range(tokens.shape[1]):
            advance(model, stream, tokens[:, t], 2)
        if filler == 7:
            first = stream.state[:, 1].clone()
    assert torch.equal(first, stream.state[:, 1])


@pytest.mark.parametrize("kv", ["last", "first"])
def test_iterating_leaves_exactly_one_entry_per_position(kv):
    model = attach(tiny("llama"), alpha=ALPHA, choices=Choices(kv=kv))
    stream = model.new_stream(torch.zeros(1, dtype=torch.long), 8)
    for token in (5, 9, 11):
        advance(model, stream, torch.tensor([token]), 4)
    used = stream.kv.keys[0].abs().sum((0, 1, 3)) > 0
    assert used.tolist() == [True] * 3 + [False] * 5
    assert stream.column == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_split_in_two_gives_the_same_states(family):
    model = attach(tiny(family), alpha=ALPHA)
    tokens, pad = model.batch(prompts())
    whole = model.new_stream(pad, tokens.shape[1])
    model.prefill(whole, tokens)
    for cut in (1, 4, 10):
        split = model.new_stream(pad, tokens.shape[1])
        model.prefill(split, tokens[:, :cut])
        model.prefill(split, tokens[:, cut:])
        assert relative(split.state, whole.state) < 1e-9
        assert relative(split.kv.keys[2][0], whole.kv.keys[2][0]) < 1e-9


def test_prompt_choices():
    """blend_off: the backbone's own prompt, no state at position 0, one from its second iteration on."""
    hf, tokens = tiny("llama"), prompts()[0]
    off = attach(hf, alpha=ALPHA, choices=Choices(prompt="blend_off"))
    seen = []
    off.generate([tokens], iterations=2, max_new_tokens=2, stop_tokens=[], observe=seen.append)
    with torch.no_grad():
        theirs = hf(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert relative(seen[0].logits[0][0], theirs) < 1e-12
    assert relative(seen[0].logits[1][0], theirs) > 1e-4
    exact, two = (attach(hf, alpha=ALPHA, choices=Choices(prompt=p)) for p in ("exact", "two_pass"))
    a, b = [], []
    assert exact.generate([tokens], 1, 1, observe=a.append).certificate.converged
    assert two.generate([tokens], 1, 1, observe=b.append).certificate.method == "two_pass"
    assert relative(a[0].logits[0], b[0].logits[0]) > 1e-6


def test_scan_handoff_is_the_moving_average():
    from sst_interp.models.solvers.sweeps import moving_average

    y = torch.arange(1.0, 6.0).view(1, 1, 5, 1).double()  # y_0 .. y_4 with d_model 1
    incoming = torch.cat([torch.zeros(1, 1, 1, 1), y[:, :, :-1]], 2)
    has_state = torch.tensor([[False, True, True, True, True]])
    s = moving_average(incoming, torch.full((1, 1), 0.25), has_state)[0, 0, :, 0]
    expected = [0.0, 1.0, 0.75 * 2 + 0.25 * 1]
    for y_previous in (3.0, 4.0):
        expected.append(0.75 * y_previous + 0.25 * expected[-1])
    assert s.tolist() == pytest.approx(expected)


def test_replay_refuses_nonsense():
    model = attach(tiny("llama"))
    with pytest.raises(SSTError, match="iterations = 0 is not a whole number from 1 to 127"):
        model.replay([[5, 6]], iterations=0)
    with pytest.raises(SSTError, match="empty"):
        model.replay([[]])
    with pytest.raises(SSTError, match="vocabulary"):
        model.replay([[5, 97]])
    with pytest.raises(SSTError, match="context is 128"):
        model.replay([[5] * 129])
    with pytest.raises(SSTError, match="unknown method"):
        model.replay([[5]], method="fast")
