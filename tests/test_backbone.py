"""Taking a backbone apart: what is put together again must be the model itself."""

import pytest
import torch
from tiny import COMMON, FAMILIES, NEWER, PARALLEL, prompts, relative, tiny
from transformers import AutoModelForCausalLM, GraniteConfig

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import Record, at
from sst_interp.models.model import attach, attach_looped, attach_lrt


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_reassemble_to_the_model(family, attention):
    backbone = Backbone(tiny(family, attention=attention))  # validate() runs inside
    assert backbone.n_layers == 3
    assert backbone.d_model == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_is_wrong_is_noticed(family, monkeypatch):
    """Validation is not decoration: a branch that is off by one ulp-sized term is refused on load."""
    from sst_interp.models import families as module

    original = module.Layer.ffn_branch
    monkeypatch.setattr(module.Layer, "ffn_branch", lambda self, m: original(self, m) * (1 + 1e-12))
    with pytest.raises(SSTError, match="layer 0"):
        Backbone(tiny(family))


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (PARALLEL["gpt_neox"](), "in parallel"),
        (PARALLEL["phi"](), "in parallel"),
        (GraniteConfig(**COMMON, residual_multiplier=0.5), "layer 0"),
    ],
    ids=["gpt_neox", "phi", "granite"],
)
def test_other_families_are_refused_by_the_missing_point(config, missing):
    model = AutoModelForCausalLM.from_config(config).double()
    with pytest.raises(SSTError, match=missing) as caught:
        attach(model, alpha=0.1)
    assert config.model_type in caught.value.message
    assert "supported:" in str(caught.value)


def test_nonfinite_weights_are_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(SSTError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        attach(model)


def test_content_hash_tells_weights_apart():
    a, b, c = tiny("llama", seed=0), tiny("llama", seed=0), tiny("llama", seed=1)
    assert Backbone(a).content_hash == Backbone(b).content_hash != Backbone(c).content_hash
    with torch.no_grad():
        b.model.norm.weight[0] += 0.01
    assert Backbone(a).content_hash != Backbone(b).content_hash
    c = tiny("llama", seed=0, dtype=torch.float32)
    assert Backbone(c).content_hash == Backbone(c.bfloat16()).content_hash  # the same in another dtype


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), [0.1, 0.2], torch.full((3, 5), 0.1)])
def test_alpha_is_checked(alpha):
    with pytest.raises(SSTError, match="alpha"):
        attach(tiny("llama"), alpha=alpha)


@pytest.mark.parametrize("alpha", [0.05, [0.01, 0.05, 0.1], torch.full((3, 32), 0.02)])
def test_alpha_shapes(alpha):
    assert attach(tiny("llama"), alpha=alpha).alpha.shape == (3, 32)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", [*NEWER, *PARALLEL])
def test_parts_of_newer_families_reassemble_to_the_model(family, attention):
    assert Backbone(tiny(family, attention=attention)).n_layers == 3


@torch.no_grad()
@pytest.mark.parametrize("family", [*NEWER, *PARALLEL])
def test_what_can_be_attached_to_newer_families_is_the_backbone_where_it_is_off(family):
    hf, rows = tiny(family), prompts()
    tokens = torch.tensor([rows[0]])
    theirs = hf(tokens, use_cache=False).logits
    makers = [lambda: attach_lrt(hf), lambda: attach_looped(hf, core=(1, 2))]
    makers += [lambda: attach(hf, alpha=0)] if family in NEWER else []
    for make in makers:
        last = make().replay(tokens).resid_post[:, :, -1, 0].contiguous()
        assert torch.equal(make().backbone.unembed(last), theirs)


@torch.no_grad()
@pytest.mark.parametrize("kv", ["last", "first"])
@pytest.mark.parametrize("family", [*NEWER, *PARALLEL])
def test_parallel_equals_sequential_on_newer_families(family, kv):
    rows = prompts()
    models = [attach_lrt(tiny(family), gamma=0.05, choices=Choices(kv=kv))]
    models += [attach_looped(tiny(family), choices=Choices(kv=way), core=(1, 3)) for way in (kv, "each")]
    models += [attach(tiny(family), alpha=0.05, choices=Choices(kv=kv))] if family in NEWER else []
    for model in models:
        together = model.replay(rows, 2)
        for k, row in enumerate(rows):
            alone = model.replay([row], 2, "sequential").resid_post[0]
            assert relative(together.resid_post[k, : len(row)], alone) < 1e-6, model.kind


@torch.no_grad()
@pytest.mark.parametrize("family", PARALLEL)
def test_where_branches_run_in_parallel_there_is_no_residual_between_them(family):
    record = Record(["attn_out", "mlp_out", "resid_pre", "resid_post"])
    model = attach_looped(tiny(family))
    model.generate([prompts()[0]], 2, 2, stop_tokens=[], edit=record)
    summed = record["resid_pre"] + record["attn_out"] + record["mlp_out"]
    assert relative(summed, record["resid_post"]) < 1e-12
    with pytest.raises(SSTError, match="never called"):
        model.generate([prompts()[0]], 2, 2, edit=at(lambda t, **_: t, site="resid_mid"))
    with pytest.raises(SSTError, match="in parallel"):
        attach(tiny(family), alpha=0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["olmo2", "glm4", "nanochat"])
def test_transformer_lens_sees_newer_families(family):
    model, tokens = attach(tiny(family, torch.float32), alpha=0.1), [[5, 6, 7, 8]]
    logits, caches = model.run_with_cache(tokens, iterations=2)
    assert relative(logits[-1], model.replay(tokens, 2).logits[:, :, -1]) < 1e-5
    resid_post = model.replay(tokens, 2).resid_post[:, :, 1, 0]
    assert relative(caches[0]["blocks.1.hook_resid_post"], resid_post) < 1e-5
