"""`sst.load` from local folders: what comes back is what was saved, and what must be refused is."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_capture import save_model, tiny_llama

from sst_interp import paths
from sst_interp.assets import ASSET_MODELS
from sst_interp.errors import SSTError
from sst_interp.models.checkpoint import CONFIG, WEIGHTS, save_checkpoint
from sst_interp.models.choices import Choices
from sst_interp.models.kinds.sst import PAPER_ALPHA
from sst_interp.models.loading import load
from sst_interp.models.model import attach

THEIRS = Choices(carry="ffn_output", blend="additive", kv="first", initial_guess="scan")
"""Choices none of which is the default."""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture
def checkpoint(backbone, tmp_path):
    """A checkpoint of `backbone` with random blend weights and unusual choices."""
    alpha = torch.rand(3, 32, generator=torch.Generator().manual_seed(0)) / 10
    model = load(backbone, alpha, THEIRS, dtype="float32")
    return save_checkpoint(model, tmp_path / "checkpoint", str(backbone))


def weights(model):
    return model.backbone.model.state_dict()


def test_a_local_folder_is_loaded_as_it_is(backbone):
    model = load(backbone, dtype="float32")
    for name, tensor in tiny_llama(torch.float32).state_dict().items():
        assert torch.equal(weights(model)[name], tensor), name
    assert model.name == str(backbone)
    assert model.alpha.shape == (3, 32)
    assert model.kind.off  # no blend that nobody asked for
    assert "no blend: the plain backbone" in repr(model)
    assert model.choices == Choices()
    assert model.encode("quorvex3 quorvex5") == [11, 13]
    assert load(str(backbone), alpha=0.0, dtype="float32").alpha.max() == 0


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_dtypes_by_name_and_as_torch_calls_them(backbone, name):
    assert load(backbone, dtype=name).backbone.dtype == getattr(torch, name)
    assert load(backbone, dtype=getattr(torch, name)).backbone.dtype == getattr(torch, name)


def test_bfloat16_is_the_default(backbone):
    assert load(backbone).backbone.dtype == torch.bfloat16


def test_an_unknown_dtype_names_the_nearest(backbone):
    with pytest.raises(SSTError, match="unknown dtype 'bfloat32'") as error:
        load(backbone, dtype="bfloat32")
    assert "'float32'" in error.value.hint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_checkpoint_comes_back(checkpoint, backbone, dtype):
    saved = load_file(checkpoint / WEIGHTS)["alpha"]
    model = load(checkpoint, dtype=dtype)
    assert torch.equal(model.alpha.float(), saved)
    assert saved.unique().numel() == 96
    assert model.choices == THEIRS
    assert model.name == str(checkpoint)
    again = save_checkpoint(model, checkpoint.parent / "again", str(backbone))
    assert torch.equal(load_file(again / WEIGHTS)["alpha"].float(), saved)
    assert (
        json.loads((again / CONFIG).read_text())["backbone"]
        == json.loads((checkpoint / CONFIG).read_text())["backbone"]
    )


def test_a_checkpoint_behaves_as_the_model_it_was_saved_from(checkpoint, backbone):
    trained = load(checkpoint, dtype="float32")
    by_hand = attach(tiny_llama(torch.float32), None, load_file(checkpoint / WEIGHTS)["alpha"], THEIRS)
    tokens = [[5, 9, 100, 42, 77]]
    assert torch.equal(trained.replay(tokens, 2).logits, by_hand.replay(tokens, 2).logits)
    plain = load(backbone, dtype="float32")
    assert not torch.equal(trained.replay(tokens, 2).logits, plain.replay(tokens, 2).logits)


def test_a_checkpoint_is_found_among_the_shipped(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "shipped", lambda kind: tmp_path / kind)
    shutil.copytree(checkpoint, tmp_path / "checkpoints" / "sst-tiny")
    assert load("sst-tiny", dtype="float32").choices == THEIRS
    with pytest.raises(SSTError, match="unknown model 'sst-tinny'") as error:
        load("sst-tinny")
    assert "'sst-tiny'" in error.value.hint


def test_blend_weights_can_be_replaced_but_trained_choices_cannot(checkpoint):
    assert load(checkpoint, alpha=0.05, dtype="float32").alpha.unique().tolist() == pytest.approx([0.05])
    ours = Choices(prompt="two_pass", threshold=0.9)
    model = load(checkpoint, choices=ours, dtype="float32")
    for field in ("carry", "blend", "kv", "initial_guess"):
        assert getattr(model.choices, field) == getattr(THEIRS, field)
    assert (model.choices.prompt, model.choices.threshold) == ("two_pass", 0.9)


@pytest.mark.parametrize("changes", [{"carry": "ffn_output"}, {"blend": "additive"}, {"kv": "first"}])
def test_a_choice_a_checkpoint_was_not_trained_with_is_refused(backbone, tmp_path, changes):
    plain = save_checkpoint(load(backbone, dtype="float32"), tmp_path / "plain", str(backbone))
    ((field, value),) = changes.items()
    with pytest.raises(SSTError, match=f"trained with {field} = .* not '{value}'"):
        load(plain, choices=Choices(**changes), dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_backbone_is_refused_in_any_dtype(checkpoint, tmp_path, dtype):
    other = save_model(tmp_path / "other", seed=1)
    config = json.loads((checkpoint / CONFIG).read_text())
    config["backbone"]["name"] = str(other)
    (checkpoint / CONFIG).write_text(json.dumps(config))
    with pytest.raises(SSTError, match="belongs to another backbone"):
        load(checkpoint, dtype=dtype)


def test_one_changed_weight_is_another_backbone(checkpoint, backbone, tmp_path):
    other = shutil.copytree(backbone, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(n for n in tensors if "down_proj" in n)
    tensors[name][3, 7] *= 1.02  # more than a rounding to bfloat16 can hide
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / CONFIG).read_text())
    config["backbone"]["name"] = str(other)
    (checkpoint / CONFIG).write_text(json.dumps(config))
    with pytest.raises(SSTError, match="belongs to another backbone"):
        load(checkpoint, dtype="float32")


def broken_json(folder):
    (folder / CONFIG).write_text('{"format": 1, "choi')


def not_a_record(folder):
    (folder / CONFIG).write_text("[]")


def no_backbone(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["backbone"]
    (folder / CONFIG).write_text(json.dumps(config))


def half_a_backbone(folder):
    config = json.loads((folder / CONFIG).read_text())
    config["backbone"] = {"name": config["backbone"]["name"]}
    (folder / CONFIG).write_text(json.dumps(config))


def not_text(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00{")


def unknown_choice(folder):
    config = json.loads((folder / CONFIG).read_text())
    config["choices"]["carry"] = "everything"
    (folder / CONFIG).write_text(json.dumps(config))


def truncated_weights(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def empty_weights(folder):
    (folder / WEIGHTS).write_bytes(b"")


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def other_tensors(folder):
    save_file({"beta": torch.zeros(3, 32)}, folder / WEIGHTS)


def wrong_shape(folder):
    save_file({"alpha": torch.full((2, 32), 0.1)}, folder / WEIGHTS)


def alpha_above_one(folder):
    save_file({"alpha": torch.full((3, 32), 1.5)}, folder / WEIGHTS)


def alpha_nan(folder):
    save_file({"alpha": torch.full((3, 32), float("nan"))}, folder / WEIGHTS)


DAMAGE = [
    broken_json, not_a_record, no_backbone, half_a_backbone, not_text, unknown_choice, truncated_weights,
    empty_weights, no_weights, other_tensors, wrong_shape, alpha_above_one, alpha_nan,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_an_error_to_act_on(checkpoint, damage):
    damage(checkpoint)
    with pytest.raises(SSTError) as error:
        load(checkpoint, dtype="float32")
    assert error.value.hint


@pytest.mark.parametrize(
    ("wrong", "near"), [("smollm2-135", "smollm2-135m"), ("smolm2-135m", "smollm2-135m")]
)
def test_unknown_names_name_the_nearest(wrong, near):
    assert near in ASSET_MODELS
    with pytest.raises(SSTError, match=f"unknown model '{wrong}'") as error:
        load(wrong)
    assert repr(near) in error.value.hint


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SSTError, match="neither a model nor a checkpoint") as error:
        load(tmp_path / "empty")
    assert "config.json" in error.value.hint
    with pytest.raises(SSTError, match="unknown model"):
        load(tmp_path / "absent")


def test_a_hub_name_without_a_network(monkeypatch):
    """conftest puts the hub offline: this is what a user behind a wall sees."""
    with pytest.raises(SSTError, match="'nobody/nothing-at-all' cannot be loaded") as error:
        load("nobody/nothing-at-all")
    assert "\n" not in error.value.message
    assert "hf auth login" in error.value.hint


def test_pickled_weights_are_refused_unread(tmp_path, backbone):
    """A pickle runs code when it is read. This one would leave a trace."""
    folder = tmp_path / "pickled"
    shutil.copytree(backbone, folder)
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "was-run"

    class Trap:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    torch.save(tiny_llama(torch.float32).state_dict() | {"trap": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(SSTError, match="cannot be loaded") as error:
        load(folder)
    assert "safetensors" in str(error.value)
    assert not trace.exists()


def test_code_from_a_repository_does_not_run_unasked(tmp_path, backbone):
    folder = tmp_path / "custom"
    shutil.copytree(backbone, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    trace = tmp_path / "was-run"
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')\n")
    with pytest.raises(SSTError, match="cannot be loaded") as error:
        load(folder)
    assert "trust_remote_code" in error.value.hint
    assert not trace.exists()


def truncated_backbone(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 7)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config_is_not_json(folder):
    (folder / "config.json").write_text("{")


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


BACKBONE_DAMAGE = [truncated_backbone, missing_tensor, other_shape, config_is_not_json, no_tokenizer]


@pytest.mark.parametrize("damage", BACKBONE_DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_backbone_is_an_error_to_act_on(tmp_path, backbone, damage):
    """A tensor that is missing would otherwise be random, and the run look like a result."""
    folder = shutil.copytree(backbone, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(SSTError) as error:
        load(folder, dtype="float32")
    assert error.value.hint


def test_a_backbone_has_a_blend_only_if_one_is_named(backbone):
    plain, blended = load(backbone, dtype="float32"), load(backbone, PAPER_ALPHA, dtype="float32")
    tokens = [[5, 9, 100, 42, 77]]
    own = tiny_llama(torch.float32)(torch.tensor(tokens)).logits
    torch.testing.assert_close(plain.replay(tokens, 3).logits[:, :, 2], own, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(blended.replay(tokens, 3).logits[:, :, 2], own, atol=1e-3)
    assert "no blend: the plain backbone" in repr(plain)
    assert "alpha 0.027 to 0.027" in repr(blended)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "ImportError"),
        ({"num_hidden_layers": 2}, "9 weights that its config.json has no place for: model.layers.2."),
        ({"rope_scaling": {"rope_type": "unheard-of", "factor": 2.0}}, ""),
        ({"hidden_act": "unheard-of"}, "KeyError"),
        ({"vocab_size": "many"}, ""),
        ({"model_type": "unheard-of"}, ""),
        ({"layer_types": ["unheard-of"] * 3}, ""),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_one_line(tmp_path, backbone, config, message, capfd):
    """Whatever transformers raises; and layers that would be cut off are named."""
    folder = shutil.copytree(backbone, tmp_path / "changed")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | config))
    with pytest.raises(SSTError, match=message) as error:
        load(folder, dtype="float32")
    assert "\n" not in error.value.message
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


def test_a_surplus_weight_is_refused(tmp_path, backbone):
    folder = shutil.copytree(backbone, tmp_path / "surplus")
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.extra.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SSTError, match=r"1 weights .* no place for: model\.layers\.0\.extra\.weight"):
        load(folder, dtype="float32")


@pytest.mark.parametrize(
    "how",
    [
        {"name": 5},
        {"dtype": 5},
        {"device": "nowhere"},
        {"kind": "ssst"},
        {"choices": {}},
        {"alpha": "x"},
    ],
    ids=str,
)
def test_bad_arguments_are_one_line(backbone, how):
    with pytest.raises(SSTError) as error:
        load(**{"name": backbone, "dtype": "float32"} | how)
    assert "\n" not in error.value.message
    assert error.value.hint


def another_format(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"format": 99}))


def kind_of_no_kind(folder):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"kind": ["sst"]}))


def deeply_nested(folder):
    (folder / CONFIG).write_text("[" * 100_000)


def complex_alpha(folder):
    save_file({"alpha": torch.full((3, 32), 0.1, dtype=torch.complex64)}, folder / WEIGHTS)


def anothers_adapters(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [another_format, kind_of_no_kind, deeply_nested, complex_alpha, anothers_adapters],
    ids=lambda f: f.__name__,
)
def test_a_checkpoint_that_says_something_else_is_one_line(checkpoint, damage):
    damage(checkpoint)
    with pytest.raises(SSTError) as error:
        load(checkpoint, dtype="float32")
    assert "\n" not in error.value.message


def test_a_checkpoint_without_adapters_that_is_saved_over_one_with_them_has_none(checkpoint, backbone):
    anothers_adapters(checkpoint)
    save_checkpoint(load(backbone, 0.1, dtype="float32"), checkpoint, str(backbone))
    assert load(checkpoint, dtype="float32").alpha.unique().tolist() == pytest.approx([0.1])
