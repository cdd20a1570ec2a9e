"""inspect_ai runs the model: its own evaluator, models in memory and by name."""

import asyncio
from importlib.metadata import entry_points

import pytest
import tiny
import torch
from tiny_capture import WORDS, save_model, tiny_llama, word_tokenizer

from sst_interp.models.halting import Convergence
from sst_interp.models.model import StateStreamModel, attach

pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")

from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolInfo

import sst_interp.bridges.inspect_ai as bridge

PROMPTS = [" ".join(WORDS[7 * i : 7 * i + 3 + i % 4]) for i in range(9)]
NEW = 6


@pytest.fixture(scope="module")
def model():
    return attach(tiny_llama(), word_tokenizer(), 0.3, name="tiny")


def provider(model, **how):
    return get_model("sst-interp/tiny", loaded=model, memoize=False, **how)


def ask(api, prompts=PROMPTS, **config):
    """The outputs of prompts that are asked at the same time."""

    async def all_of_them():
        options = GenerateConfig(**({"max_tokens": NEW} | config))
        return await asyncio.gather(*(api.generate(prompt, config=options) for prompt in prompts))

    return asyncio.run(all_of_them())


def texts(outputs):
    return [output.completion for output in outputs]


def alone(model, **how):
    return [model.generate([p], max_new_tokens=NEW, **how).texts[0] for p in PROMPTS]


def test_inspect_finds_it_by_itself():
    (found,) = entry_points(group="inspect_ai", name="sst_interp")
    assert found.load() is bridge


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_samples_that_are_asked_together_are_written_as_alone(model, monkeypatch, batch_size):
    expected = alone(model, iterations=3)
    batches, real = [], StateStreamModel.generate

    def seen(self, prompts, **how):
        batches.append(len(prompts))
        return real(self, prompts, **how)

    monkeypatch.setattr(StateStreamModel, "generate", seen)
    api = provider(model, iterations=3, batch_size=batch_size)
    for _ in range(2):  # a provider outlives an event loop
        assert texts(ask(api)) == expected
    assert sum(batches) == 2 * len(PROMPTS)
    assert max(batches) == min(batch_size, len(PROMPTS))
    assert not api.api.waiting
    assert len(set(expected)) > 5


def test_options_are_kept_apart_in_a_batch(model):
    """Prompts of another budget or stop string go into another batch."""
    api = provider(model, iterations=2)
    whole = alone(model, iterations=2)
    stop = whole[0].split()[2]

    async def mixed():
        configs = [{"max_tokens": NEW}, {"max_tokens": 2}, {"max_tokens": NEW, "stop_seqs": [stop]}]
        return await asyncio.gather(
            *(api.generate(PROMPTS[0], config=GenerateConfig(**configs[i % 3])) for i in range(6))
        )

    out = asyncio.run(mixed())
    short = model.generate([PROMPTS[0]], iterations=2, max_new_tokens=2).texts[0]
    assert texts(out) == [whole[0], short, whole[0].split(stop)[0]] * 2
    assert [o.stop_reason for o in out] == ["max_tokens", "max_tokens", "stop"] * 2
    assert (out[1].usage.input_tokens, out[1].usage.output_tokens) == (len(PROMPTS[0].split()), 2)


def test_hidden_states_are_those_of_the_replay(model):
    api = provider(model, iterations=3, hidden_layers="0,2", hidden_iterations=[1, 3])
    outputs = ask(api)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = model.encode(prompt)
        new = model.generate([ids], iterations=3, max_new_tokens=NEW).tokens[0]
        replay = model.replay([ids + new[:-1]], iterations=3, start=len(ids) - 1, logits=False)
        expected = replay.resid_post[0][:, [0, 2]][:, :, [0, 2]].float()
        states = torch.tensor(output.metadata["hidden_states"])
        assert states.shape == (len(new), 2, 2, 32)
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
        assert output.metadata["hidden_layers"] == [0, 2]
        assert output.metadata["hidden_iterations"] == [1, 3]


def test_a_policy_picks_a_depth_per_sample(model):
    how = {"halting": "convergence", "threshold": 0.2, "deepest": 4}
    outputs = ask(provider(model, hidden_layers="all", **how))
    own = [model.generate([p], depth=Convergence(0.2, 4), max_new_tokens=NEW) for p in PROMPTS]
    depths = [out.iterations[0] for out in own]
    assert [o.metadata["iterations"] for o in outputs] == depths
    assert texts(outputs) == [out.texts[0] for out in own]
    assert len(set(depths)) > 1, "the policy picks one depth for all: choose another threshold"
    for output, depth in zip(outputs, depths, strict=True):
        assert {len(layer) for place in output.metadata["hidden_states"] for layer in place} == {depth}
        assert output.metadata["hidden_iterations"] == list(range(1, depth + 1))


def test_a_conversation_goes_through_the_template(model):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role == 'user' and 'quorvex1' or 'quorvex2' }} {{ m.content }} "
        "{% endfor %}"
        "{% if add_generation_prompt %}quorvex2{% endif %}"
    )
    own = attach(model.backbone.model, tokenizer, 0.3)
    turns = [ChatMessageUser(content=WORDS[5]), ChatMessageAssistant(content=WORDS[6])]
    asked = [*turns, ChatMessageUser(content=WORDS[7])]
    (output,) = ask(provider(own, iterations=2), [asked])
    read = f"quorvex1 {WORDS[5]} quorvex2 {WORDS[6]} quorvex1 {WORDS[7]} quorvex2"
    assert output.completion == own.generate([read], iterations=2, max_new_tokens=NEW).texts[0]
    (output,) = ask(provider(own, iterations=2), [[*asked, ChatMessageAssistant(content=WORDS[8])]])
    begun = f"{read.removesuffix('quorvex2')}quorvex2 {WORDS[8]}"  # the answer's first word is given
    assert output.completion == own.generate([begun], iterations=2, max_new_tokens=NEW).texts[0]
    picture = ContentImage(image="data:image/png;base64,AAAA")
    with pytest.raises(PrerequisiteError) as told:
        ask(provider(own), [[ChatMessageUser(content=[picture])]])
    assert "more than text" in told.value.message
    (output,) = ask(provider(model, iterations=2), [asked])  # no template: lines of the roles
    lines = f"user: {WORDS[5]}\nassistant: {WORDS[6]}\nuser: {WORDS[7]}\n"
    assert output.completion == model.generate([lines], iterations=2, max_new_tokens=NEW).texts[0]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"iterations": 0}, "iterations"),
        ({"halting": "entropy"}, "needs a threshold"),
        ({"hidden_layers": "3"}, "hidden_layers"),
        ({"hidden_layers": "0", "hidden_iterations": 2}, "hidden_iterations"),
        ({"batch_size": 0}, "batch_size"),
        ({"device_map": "auto"}, "unknown option 'device_map'"),
    ],
)
def test_what_cannot_be_is_one_line(model, how, says):
    with pytest.raises(PrerequisiteError) as told:
        provider(model, **how)
    assert says in told.value.message


@pytest.mark.parametrize("option", [{"num_choices": 2}, {"logprobs": True}, {"frequency_penalty": 0.5}])
def test_an_option_that_generation_lacks_is_refused(model, option):
    with pytest.raises(PrerequisiteError) as told:
        ask(provider(model), PROMPTS[:2], **option)
    assert f"{next(iter(option))} is not supported" in told.value.message
    with pytest.raises(PrerequisiteError, match="is not supported"):
        provider(model, config=GenerateConfig(**option))


def test_tools_and_long_prompts_are_refused(model):
    api = provider(model)
    with pytest.raises(PrerequisiteError) as told:
        asyncio.run(api.generate(PROMPTS[0], tools=[ToolInfo(name="add", description="adds")]))
    assert "tools" in told.value.message
    with pytest.raises(PrerequisiteError) as told:
        ask(api, [" ".join(WORDS[:130])])
    assert "the context is 128" in told.value.message
    with pytest.raises(PrerequisiteError):
        provider(attach(tiny.tiny("llama")))


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_sampled_text_is_that_of_its_seed(model, batch_size):
    api = provider(model, iterations=2, batch_size=batch_size)
    how = {"iterations": 2, "temperature": 1.5, "top_k": 20}
    outputs = ask(api, temperature=1.5, top_k=20, seed=7)
    assert texts(outputs) == alone(model, seed=7, **how)
    assert texts(outputs) != alone(model, iterations=2)
    repeated = ask(api, PROMPTS[:1] * 4, temperature=1.5, top_k=20)  # without a seed each draws its own
    seeds = [output.metadata["seed"] for output in repeated]
    assert len(set(seeds)) == 4
    assert len(set(texts(repeated))) > 1
    for output, seed in zip(repeated, seeds, strict=True):
        again = model.generate([PROMPTS[0]], max_new_tokens=NEW, seed=seed, **how).texts[0]
        assert output.completion == again


def test_temperature_zero_is_greedy(model):
    outputs = ask(provider(model, iterations=3), temperature=0.0)
    assert texts(outputs) == alone(model, iterations=3)
    assert "seed" not in outputs[0].metadata


def test_a_whole_evaluation_of_a_saved_model(tmp_path):
    folder = save_model(tmp_path / "model", torch.float64)
    samples = [Sample(input=p, target=WORDS[0]) for p in PROMPTS]
    (log,) = evaluate(
        Task(dataset=samples, scorer=includes(), config=GenerateConfig(max_tokens=NEW)),
        model=f"sst-interp/{folder}",
        model_args={"iterations": 3, "alpha": 0.3, "dtype": "float64", "hidden_layers": 1},
        log_dir=str(tmp_path / "logs"),
        display="none",
    )
    assert log.status == "success", log.error
    own = attach(tiny_llama(), word_tokenizer(), 0.3)
    by_input = {sample.input: sample.output for sample in log.samples}
    assert [by_input[p].completion for p in PROMPTS] == alone(own, iterations=3)
    assert all(output.metadata["iterations"] == 3 for output in by_input.values())
    assert len(by_input[PROMPTS[0]].metadata["hidden_states"][0][0]) == 3
