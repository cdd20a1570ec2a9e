"""Taking a backbone apart: what is put together again must be the model itself."""

import pytest
import torch
from tiny import COMMON, FAMILIES, tiny
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GraniteConfig, Olmo2Config, PhiConfig

from sst_interp.errors import SSTError
from sst_interp.models.backbone import Backbone
from sst_interp.models.model import attach


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_reassemble_to_the_model(family, attention):
    backbone = Backbone(tiny(family, attention=attention))  # validate() runs inside
    assert backbone.n_layers == 3
    assert backbone.d_model == 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_that_is_wrong_is_noticed(family, monkeypatch):
    """Validation is not decoration: a branch that is off by one ulp-sized term is refused on load."""
    from sst_interp.models import backbone as module

    original = module.Layer.ffn_branch
    monkeypatch.setattr(module.Layer, "ffn_branch", lambda self, m: original(self, m) * (1 + 1e-12))
    with pytest.raises(SSTError, match="layer 0"):
        Backbone(tiny(family))


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (
            GPTNeoXConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            ),
            "self_attn",
        ),
        (PhiConfig(**COMMON | {"num_key_value_heads": 4}), "in parallel"),
        (Olmo2Config(**COMMON), "no norm before attention"),
        (GraniteConfig(**COMMON, residual_multiplier=0.5), "layer 0"),
    ],
    ids=["gpt_neox", "phi", "olmo2", "granite"],
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
