"""What a person can get wrong in a call: every entry refuses it in one line, or does what was meant."""

import threading
import warnings

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny
from tiny_capture import tiny_llama, word_tokenizer
from torch import nn

import sst_interp as sst
from sst_interp.bridges.nnsight import StateStreamNNsight
from sst_interp.errors import SSTError
from sst_interp.models import prompts as prompts_module
from sst_interp.models.backbone import Backbone
from sst_interp.models.choices import MAX_DEPTH, Choices
from sst_interp.models.halting import Convergence, Flat
from sst_interp.models.hooks import at
from sst_interp.models.model import StateStreamModel, attach, attach_lrt
from sst_interp.training.data import Example
from sst_interp.training.evaluation import answer_losses, answers, letters

ROW = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def model():
    return attach(tiny("llama"), alpha=0.3)


def one_line(call):
    """The message of the SSTError that a call ends in: one short line with a hint."""
    with pytest.raises(SSTError) as told:
        call()
    assert "\n" not in told.value.message
    assert len(told.value.message) < 320
    assert told.value.hint
    return told.value.message


# -- token ids --------------------------------------------------------------------------------------------


SHAPES = {
    "list": ROW,
    "tuple": tuple(ROW),
    "list of lists": [ROW],
    "1-D tensor": torch.tensor(ROW),
    "2-D tensor": torch.tensor([ROW]),
    "int32 tensor": torch.tensor(ROW, dtype=torch.int32),
    "1-D array": np.array(ROW),
    "2-D array": np.array([ROW], dtype=np.uint8),
    "list of arrays": [np.array(ROW)],
    "list of tensors": [torch.tensor(ROW)],
    "list of numpy numbers": [np.int64(t) for t in ROW],
    "list of 0-d tensors": list(torch.tensor(ROW)),
}


@pytest.mark.parametrize("given", SHAPES.values(), ids=SHAPES.keys())
def test_token_ids_mean_the_same_whatever_they_come_in(model, given):
    assert torch.equal(model.replay(given, 2).logits, model.replay([ROW], 2).logits)
    assert model.generate(given, 2, 3).tokens == model.generate([ROW], 2, 3).tokens
    assert model.generate_at_depths(given, [2], 3)[2].tokens == model.generate([ROW], 2, 3).tokens


def test_one_text_is_one_prompt():
    words = attach(tiny_llama(), word_tokenizer(), alpha=0.3)
    assert words.generate("sun moon", 2, 3).tokens == words.generate(["sun moon"], 2, 3).tokens


NO_IDS = {
    "floats": torch.tensor([ROW]).float(),
    "bools": torch.tensor([[True, False]]),
    "complex": torch.tensor([[1j]]),
    "0-d": torch.tensor(5),
    "3-D": torch.tensor([[ROW]]),
    "meta": torch.tensor([ROW], device="meta"),
    "float array": np.array([ROW], dtype=float),
    "array of objects": np.array(["a", None], dtype=object),
    "list of floats": [[5.0, 6.0]],
    "list with a bool": [[5, True]],
    "list with None": [[5, None]],
    "list with a dictionary": [{"input_ids": ROW}],
    "nested too deeply": [[ROW]],
    "None": None,
    "a number": 5,
    "a dictionary": {"input_ids": ROW},
    "a generator": (t for t in ROW),
    "a set": {5, 6},
    "bytes": b"sun",
    "empty": [],
    "an empty prompt": [[]],
    "an empty tensor": torch.zeros(0, dtype=torch.long),
    "negative": [[5, -1]],
    "outside the vocabulary": [[5, 97]],
    "numpy bools": [[np.bool_(True)]],
}


@pytest.mark.parametrize("entry", ["replay", "generate", "generate_at_depths", "run_with_cache"])
@pytest.mark.parametrize("given", NO_IDS.values(), ids=NO_IDS.keys())
def test_what_is_no_ids_is_one_line(model, entry, given):
    how = ([1], 2) if entry == "generate_at_depths" else ()
    one_line(lambda: getattr(model, entry)(given, *how))


def test_an_error_shows_no_text_of_a_prompt(model):
    """It may be restricted."""
    for given in ({"question": "a secret"}, [["a secret"]], [{"question": "a secret"}]):
        assert "secret" not in one_line(lambda given=given: model.replay(given))


# -- whole numbers ----------------------------------------------------------------------------------------


NOT_WHOLE = [0, -1, True, False, 2.0, 2.5, "2", None, float("nan"), 10**6, [2, 2], np.bool_(True), 1j]


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_iterations_are_whole_numbers(model, value):
    message = one_line(lambda: model.replay([ROW], value))
    assert "iterations = " in message
    if not isinstance(value, list):
        assert f"to {MAX_DEPTH}" in one_line(lambda: model.generate([ROW], value, 2))
        assert f"to {MAX_DEPTH}" in one_line(lambda: Flat(value))
        if value is not None:
            one_line(lambda: model.generate([ROW], depth=value))
    one_line(lambda: model.generate([ROW], [value], 2))
    one_line(lambda: model.generate_at_depths([ROW], [value], 2))
    one_line(lambda: StateStreamNNsight(model, value))
    one_line(lambda: model.run_with_cache([ROW], value))
    one_line(lambda: answer_losses(model, [Example("a", tuple(ROW), 2)], iterations=value))


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_any_whole_number_will_do(model, value):
    assert torch.equal(model.replay([ROW], value).logits, model.replay([ROW], 2).logits)
    wanted = model.generate([ROW], 2, 2)
    for found in (
        model.generate([ROW], value, value),
        model.generate([ROW], [value], 2),
        model.generate([ROW], depth=value, max_new_tokens=2),
        model.generate_at_depths([ROW], [value], value)[2],
    ):
        assert (found.tokens, found.iterations) == (wanted.tokens, [2])
        assert type(found.iterations[0]) is int
    sparse = model.replay([ROW], 2, start=value, check=value, groups=value, sweeps=value)
    assert torch.equal(sparse.logits, model.replay([ROW], 2, start=2, check=2, groups=2, sweeps=2).logits)
    assert len(StateStreamNNsight(model, value).iteration) == 2


@pytest.mark.parametrize("name", ["start", "groups", "sweeps", "check"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "1", [1], 10**9], ids=repr)
def test_numbers_of_a_replay(model, name, value):
    if name in ("groups", "check") and value == 10**9:  # as many as there are
        model.replay([ROW], **{name: value})
    else:
        assert one_line(lambda: model.replay([ROW], **{name: value})).startswith(f"{name} = ")


@pytest.mark.parametrize("value", [0, -1, 2.5, "2", None, True, [2]], ids=repr)
def test_budgets_are_whole_numbers(model, value):
    for call in (
        lambda: model.generate([ROW], max_new_tokens=value),
        lambda: model.generate_at_depths([ROW], [1], value),
    ):
        assert one_line(call).startswith("max_new_tokens = ")


@pytest.mark.parametrize("value", [[], (), 2, "12", None], ids=repr)
def test_depths_are_a_list(model, value):
    assert "depths" in one_line(lambda: model.generate_at_depths([ROW], value, 2))
    for measure in (answers, letters):
        assert "depths" in one_line(lambda measure=measure: measure(model, [], value))


@pytest.mark.parametrize("value", [2, "2", [1.5], [True], [-1], [None]], ids=repr)
def test_stop_tokens_are_ids(model, value):
    assert "stop" in one_line(lambda: model.generate([ROW], stop_tokens=value))


@pytest.mark.parametrize("name", ["observe", "progress", "edit"])
def test_what_is_called_can_be_called(model, name):
    assert one_line(lambda: model.generate([ROW], **{name: 5})).startswith(f"{name} = 5")


@pytest.mark.parametrize("where", [{"layer": True}, {"position": "0"}, {"iteration": 1.0}, {"layer": [None]}])
def test_places_of_an_edit_are_whole_numbers(where):
    one_line(lambda: at(lambda tensor, **_: None, **where))


@pytest.mark.parametrize("threshold", [float("nan"), "0.1", None, True])
def test_a_threshold_is_a_number(threshold):
    assert one_line(lambda: Convergence(threshold)).startswith("threshold = ")


# -- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), True, "1e-5", -1e-9, 1.0, 1j, [1e-5]], ids=repr
)
@pytest.mark.parametrize("how", [{}, {"groups": 2}], ids=["layerwise", "sweeps"])
def test_a_tolerance_that_would_pass_anything_is_refused(model, value, how):
    assert one_line(lambda: model.replay([ROW], tolerance=value, **how)).startswith("tolerance = ")


@pytest.mark.parametrize("value", [1e-3, np.float32(1e-3), 0])
def test_a_converged_certificate_is_within_its_tolerance(model, value):
    certificate = model.replay([ROW * 3], tolerance=value, groups=2).certificate
    assert certificate.converged
    assert certificate.residual <= value
    assert certificate.logit_error < max(float(value), 1e-9)


NO_ALPHA = ["0.1", None, 1j, torch.tensor([1j]), torch.zeros(3, 32, device="meta"), [[0.1], [0.1, 0.2]],
            {"alpha": 0.1}, True, -0.1, 1.5, float("nan"), [0.1, 0.2], torch.zeros(3, 31)]  # fmt: skip


@pytest.mark.parametrize("value", NO_ALPHA, ids=lambda v: repr(v)[:20])
def test_alpha_is_numbers(value):
    assert "alpha" in one_line(lambda: attach(tiny("llama"), alpha=value))


@pytest.mark.parametrize("value", ["0.1", 1j, [1j, 1j, 1j], True, float("nan"), [0.1, 0.2], None])
def test_gamma_is_numbers(value):
    assert "gamma" in one_line(lambda: attach_lrt(tiny("llama"), gamma=value))


def test_alpha_is_taken_as_exactly_as_it_is_given():
    found = attach(tiny("llama"), alpha=[0.1, 0.2, 0.3]).alpha
    assert found[:, 0].tolist() == [
        0.1,
        0.2,
        0.3,
    ]  # never rounded to float32 on the way


# -- models -----------------------------------------------------------------------------------------------


NO_MODELS = {
    "None": lambda: None,
    "a number": lambda: 5,
    "a name": lambda: "smollm2-135m",
    "a linear layer": lambda: nn.Linear(2, 2),
    "a config": lambda: FAMILIES["llama"](),
    "a decoder": lambda: tiny("llama").model,
    "a model with a stream": lambda: attach(tiny("llama")),
    "a class": lambda: StateStreamModel,
    "without values": lambda: tiny("llama").to("meta"),
}


@pytest.mark.parametrize("made", NO_MODELS.values(), ids=NO_MODELS.keys())
@pytest.mark.parametrize("how", [sst.attach, sst.attach_lrt, sst.attach_looped])
def test_only_a_causal_language_model_is_attached_to(made, how):
    one_line(lambda: how(made()))


def test_a_model_of_two_dtypes_is_one_line():
    mixed = tiny("llama", torch.float32)
    mixed.model.layers[1].mlp.double()
    assert "does not run" in one_line(lambda: attach(mixed))


@pytest.mark.parametrize("choices", [{"prompt": "blend_off"}, "blend_off", 5, []], ids=repr)
def test_choices_are_choices(choices):
    message = one_line(lambda: attach(tiny("llama"), choices=choices))
    assert message.startswith("choices = ")
    assert attach(tiny("llama"), choices=None).choices == Choices()


# -- a model that was changed after it was attached ---------------------------------------------------------


ENTRIES = {
    "replay": lambda m: m.replay([ROW]).logits,
    "sequential": lambda m: m.replay([ROW], method="sequential").logits,
    "generate": lambda m: m.generate([ROW], 2, 3).tokens,
    "depths": lambda m: m.generate_at_depths([ROW], [1, 2], 3)[2].tokens,
    "losses": lambda m: answer_losses(m, [Example("a", tuple(ROW), 2)]),
}


def with_dropout(family):
    dropout = {"attn_pdrop": 0.1} if family == "gpt2" else {"attention_dropout": 0.1}
    hf = tiny(family)
    again = type(hf)._from_config(type(hf.config)(**(hf.config.to_dict() | dropout))).double()
    again.load_state_dict(hf.state_dict())
    return again


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("call", ENTRIES.values(), ids=ENTRIES.keys())
def test_dropout_in_training_mode_is_refused(family, call):
    hf = with_dropout(family)
    model = attach(hf, alpha=0.3)
    before = call(model)
    hf.train()
    assert "drops out 10%" in one_line(lambda: call(model))
    hf.eval()
    assert repr(call(model)) == repr(before)


def test_training_mode_without_dropout_changes_nothing(model):
    before = model.replay([ROW]).logits
    model.backbone.model.train()
    try:
        assert torch.equal(model.replay([ROW]).logits, before)
    finally:
        model.backbone.model.eval()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("call", [*ENTRIES.values()][:4], ids=[*ENTRIES][:4])
def test_weights_that_are_no_numbers_any_more_are_named(call, alpha, bad):
    hf = tiny("llama")
    model = attach(hf, alpha=alpha)
    hf.model.layers[1].mlp.up_proj.weight.data.fill_(bad)
    assert "layers.1.mlp.up_proj.weight has non-finite values" in one_line(lambda: call(model))


def test_the_hash_of_a_backbone_is_that_of_its_weights_now():
    hf = tiny("llama")
    backbone = Backbone(hf)
    before = backbone.content_hash
    with torch.no_grad():
        hf.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    edited = backbone.content_hash
    hf.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1  # which no version counter of torch sees
    assert len({before, edited, backbone.content_hash}) == 3


# -- transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_deprecated_is_called(family):
    with warnings.catch_warnings(action="error", category=FutureWarning):
        model = attach(tiny(family), alpha=0.1)
        model.generate([ROW, ROW[:2]], 2, 4)
        model.replay([ROW], 2)


class OldNames(nn.Module):
    """An attention as it was before transformers 5.24: its cache has the other name, and only that."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None):
        return self.attention(
            hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            cache=past_key_values,
        )  # fmt: skip


def test_the_cache_goes_by_either_name():
    old = tiny("llama")
    wanted = attach(tiny("llama"), alpha=0.1).generate([ROW], 2, 6).tokens
    model = attach(old, alpha=0.1)
    for index, layer in enumerate(model.backbone.layers):
        assert layer.cache_argument == "cache"
        model.backbone.layers[index] = type(layer)(
            **{**vars_of(layer), "attention": OldNames(layer.attention)}
        )
        assert model.backbone.layers[index].cache_argument == "past_key_values"
    assert model.generate([ROW], 2, 6).tokens == wanted


def vars_of(layer):
    return {name: getattr(layer, name) for name in type(layer).__dataclass_fields__}


# -- TransformerLens --------------------------------------------------------------------------------------


def test_options_that_a_recurrence_has_not_are_one_line(model):
    assert "no gradients" in one_line(lambda: model.run_with_cache([ROW], incl_bwd=True))
    assert "no gradients" in one_line(lambda: model.bridge().run_with_cache([ROW], incl_bwd=True))
    assert "stop_at_layer" in one_line(lambda: model.run_with_cache([ROW], stop_at_layer=1))
    assert len(model.run_with_cache([ROW], 2, incl_bwd=False)[1]) == 2


# -- chat templates ---------------------------------------------------------------------------------------


TEMPLATES = {
    "raises": "{{ raise_exception('x') }}",
    "undefined": "{{ nothing.at.all }}",
    "no template": "{% if %}",
    "hangs": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_template_that_fails_or_hangs_is_one_line(monkeypatch, template):
    monkeypatch.setattr(prompts_module, "TEMPLATE_SECONDS", 0.5)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    words = attach(tiny_llama(), tokenizer)
    running = set(threading.enumerate())
    message = one_line(lambda: words.chat("sun"))
    assert message.startswith("the chat template of llama ")
    for thread in set(threading.enumerate()) - running:
        thread.join(5)
        assert not thread.is_alive()  # it does not go on in the background


def test_a_chat_template_that_works_is_what_the_tokenizer_gives():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} moon{% endfor %}"
    words = attach(tiny_llama(), tokenizer)
    assert words.chat("sun") == words.encode_plain("sun moon")
