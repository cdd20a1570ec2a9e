"""lm-evaluation-harness runs the model: its own evaluator and command, on tasks of local files."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import yaml
from tiny_capture import WORDS, save_model, tiny_llama, word_tokenizer

import sst_interp as sst
from sst_interp.errors import SSTError
from sst_interp.models.halting import Convergence
from sst_interp.models.model import attach
from sst_interp.questions.datasets import load_questions

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sst_interp.bridges.lm_eval import StateStreamLM, main

TEMPLATE = (
    "{% for m in messages %}<s> {% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}quorvex0 {% endif %}"
)


def text(n, seed):
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


PAIRS = [(text(3 + 2 * (i % 4), i // 3), " " + text(1 + i % 3, 100 + i)) for i in range(12)]
"""Contexts that several continuations share, as the choices of a question do."""


def built(alpha=0.0, dtype=torch.float64, **config):
    return attach(tiny_llama(dtype, **config), word_tokenizer(), alpha, name="tiny")


def scored(lm, pairs=PAIRS):
    asked = [request("loglikelihood", *pair) for pair in pairs]
    return lm.loglikelihood(asked, disable_tqdm=True), [r.arguments[-1]["iterations"] for r in asked]


@pytest.fixture
def task(tmp_path):
    """A folder with three tasks over one file: choices, texts, perplexity."""
    rows = [
        {"prompt": text(4 + i % 3, i), "choices": [text(1, 50 + i), text(2, 60 + i)], "gold": i % 2}
        for i in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
    }
    kinds = {
        "words_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
        },
        "words_text": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["quorvex7"], "max_gen_toks": 6, "do_sample": False, "top_p": 0.9},
        },
        "words_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{prompt}}",
        },
    }
    for name, own in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | own))
    return SimpleNamespace(
        folder=tmp_path,
        names=[*kinds],
        manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )


def test_the_harness_knows_it_by_name():
    assert get_model("sst-interp") is StateStreamLM


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_zero_alpha_scores_as_the_harness_scores_transformers(batch_size):
    model = built()
    theirs = HFLM(model.backbone.model, tokenizer=model.tokenizer, backend="causal", batch_size=4)
    ours = StateStreamLM(model, iterations=3, batch_size=batch_size)
    pairs = [
        *PAIRS,
        ("", text(4, 9)),
        ("<s> " + text(2, 8), " " + text(1, 7)),
        (text(3, 6) + " ", text(2, 5)),
    ]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    answers, depths = scored(ours, pairs)
    np.testing.assert_allclose([a for a, _ in answers], [e for e, _ in expected], rtol=1e-6)
    assert [a for _, a in answers] == [bool(e) for _, e in expected]
    assert depths == [3] * len(pairs)


def test_long_texts_are_cut_and_windowed_as_the_harness_does():
    model = built()
    theirs = HFLM(model.backbone.model, tokenizer=model.tokenizer, backend="causal", max_length=16)
    ours = StateStreamLM(model, max_length=16, batch_size=4)
    pairs = [(text(n, n), " " + text(3, n + 1)) for n in (5, 13, 14, 15, 40)]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    expected = [a for a, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    np.testing.assert_allclose([a for a, _ in scored(ours, pairs)[0]], expected, rtol=1e-6)
    rolling = [request("loglikelihood_rolling", text(n, n)) for n in (1, 15, 16, 17, 50)]
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolling, disable_tqdm=True), expected, rtol=1e-6)
    assert [r.arguments[-1]["iterations"] for r in rolling] == [1, 1, 1, [1, 1], [1] * 4]


def test_every_depth_scores_as_the_model_does():
    model = built(alpha=0.3)
    by_depth = {}
    for depth in (1, 2, 4):
        answers, depths = scored(StateStreamLM(model, iterations=depth, batch_size=5))
        own = [model.loglikelihood(c, [after], depth) for c, after in PAIRS]
        np.testing.assert_allclose([a for a, _ in answers], [float(o.sums[0]) for o in own], rtol=1e-9)
        assert [g for _, g in answers] == [bool(o.greedy[0]) for o in own]
        assert depths == [depth] * len(PAIRS)
        by_depth[depth] = [a for a, _ in answers]
    assert not np.allclose(by_depth[1], by_depth[4], rtol=1e-3)


def test_greedy_says_what_generation_would_write():
    model = built(alpha=0.3)
    written = model.generate([PAIRS[0][0]], iterations=2, max_new_tokens=3, stop_tokens=[]).texts[0]
    pairs = [(PAIRS[0][0], " " + written), (PAIRS[0][0], " " + text(3, 77))]
    answers, _ = scored(StateStreamLM(model, iterations=2), pairs)
    assert [greedy for _, greedy in answers] == [True, False]
    assert answers[0][0] > answers[1][0]


def test_a_policy_picks_a_depth_per_prompt():
    model = built(alpha=0.3)
    contexts = sorted({c for c, _ in PAIRS})
    moved = [model.generate([c], depth=Convergence(0.2, 4), max_new_tokens=1).iterations[0] for c in contexts]
    halting = {"halting": "convergence", "threshold": 0.2, "deepest": 4}
    lm = StateStreamLM(model, batch_size=4, **halting)
    answers, depths = scored(lm)
    assert depths == [moved[contexts.index(c)] for c, _ in PAIRS]
    assert len(set(depths)) > 1, "the policy picks one depth for all: choose another threshold"
    for (context, after), (answer, _), depth in zip(PAIRS, answers, depths, strict=True):
        own = float(model.loglikelihood(context, [after], depth).sums[0])
        np.testing.assert_allclose(answer, own, rtol=1e-9)
    info = lm.get_model_info()
    assert (info["iterations"], "Convergence(threshold=0.2" in info["halting"]) == (None, True)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_end_before_the_first_stop_string(batch_size):
    model = built(alpha=0.3)
    lm = StateStreamLM(model, iterations=2, batch_size=batch_size)
    prompts = [text(n, n) for n in (3, 9, 5, 7, 4)]
    whole = [model.generate([p], iterations=2, max_new_tokens=8).texts[0] for p in prompts]
    stop = whole[0].split()[3]
    asked = [request("generate_until", p, {"until": [stop], "max_gen_toks": 8}) for p in prompts]
    asked.append(request("generate_until", prompts[0], {"until": [], "max_new_tokens": 2}))
    texts = lm.generate_until(asked, disable_tqdm=True)
    assert texts[:-1] == [each.split(stop)[0] for each in whole]
    assert len(texts[0].split()) == 3
    assert texts[-1] == model.generate([prompts[0]], iterations=2, max_new_tokens=2).texts[0]
    assert [r.arguments[-1] for r in asked] == [{"iterations": 2}] * 6
    assert asked[0].args[:2] == (prompts[0], {"until": [stop], "max_gen_toks": 8})


@pytest.mark.parametrize("batch_size", [1, 4])
def test_repeats_of_a_sampled_request_differ_and_can_be_had_again(batch_size):
    lm = StateStreamLM(built(alpha=0.3), iterations=2, batch_size=batch_size)
    how = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "until": [], "max_gen_toks": 5}
    one, other = (request("generate_until", text(3, seed), how | {"seed": 11}) for seed in (1, 2))
    texts = lm.generate_until([one, one, other, one], disable_tqdm=True)
    own = {"iterations": 2, "max_new_tokens": 5, "temperature": 1.5, "top_p": 0.9}
    asked = [(1, 11), (1, 12), (2, 11), (1, 13)]
    assert texts == [lm.model.generate([text(3, n)], seed=s, **own).texts[0] for n, s in asked]
    assert len(set(texts)) > 2
    plain = {"do_sample": True, "until": [], "max_gen_toks": 5}  # at temperature 1, from seed 0
    (drawn,) = lm.generate_until([request("generate_until", text(3, 1), plain)], disable_tqdm=True)
    own = {"iterations": 2, "max_new_tokens": 5, "temperature": 1.0, "seed": 0}
    assert drawn == lm.model.generate([text(3, 1)], **own).texts[0]


def test_a_text_without_a_prompt_begins_with_the_prefix_token():
    lm = StateStreamLM(built(alpha=0.3))
    (written,) = lm.generate_until([request("generate_until", "", {"until": [], "max_gen_toks": 3})])
    assert written == lm.model.generate(["<s>"], max_new_tokens=3).texts[0]


def test_a_prompt_that_is_too_long_loses_its_beginning():
    model = built(max_position_embeddings=16)
    lm = StateStreamLM(model)
    long, end = text(30, 1), " ".join(text(30, 1).split()[-12:])
    asked = [request("generate_until", p, {"until": [], "max_gen_toks": 4}) for p in (long, end)]
    first, second = lm.generate_until(asked, disable_tqdm=True)
    assert first == second
    assert first


def test_a_chat_is_templated_without_the_turn_that_the_template_refuses():
    model = built()
    model.tokenizer.chat_template = TEMPLATE
    lm = StateStreamLM(model)
    turns = [{"role": "system", "content": WORDS[1]}, {"role": "user", "content": WORDS[2]}]
    assert lm.apply_chat_template(turns) == f"<s> {WORDS[2]} </s> quorvex0 "
    begun = [*turns, {"role": "assistant", "content": WORDS[3]}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith(WORDS[3])
    assert lm.chat_template(True) == TEMPLATE
    assert lm.tok_encode("<s> quorvex1") == model.encode_plain("<s> quorvex1")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"halting": "convergense", "threshold": 0.1}, "unknown halting policy"),
        ({"halting": "entropy"}, "needs a threshold"),
        ({"threshold": 0.1}, "without a halting policy"),
        ({"halting": "entropy", "threshold": 0.1, "iterations": 2}, "both"),
        ({"iterations": 0}, "iterations"),
        ({"batch_size": "many"}, "batch_size"),
        ({"max_length": 4000}, "max_length"),
        ({"pretrained": "gpt2"}, "unknown option 'pretrained'"),
        ({"alpha": 0.1}, "loaded already"),
    ],
)
def test_what_cannot_be_is_one_line(how, says):
    with pytest.raises(SSTError, match=says):
        StateStreamLM(built(), **how)


def test_an_option_that_generation_lacks_is_refused():
    lm = StateStreamLM(built())
    with pytest.raises(SSTError, match="num_beams is not supported"):
        lm.generate_until([request("generate_until", "quorvex1", {"until": [], "num_beams": 4})])
    with pytest.raises(SSTError, match="no tokenizer"):
        StateStreamLM(attach(tiny.tiny("llama")))


def test_a_whole_evaluation(task):
    model = built(alpha=0.3)
    lm = StateStreamLM(model, iterations=2, batch_size=3)
    model.tokenizer.chat_template = TEMPLATE
    for template in (False, True):
        out = simple_evaluate(
            lm, tasks=task.names, task_manager=task.manager, bootstrap_iters=0, apply_chat_template=template
        )
        assert set(out["results"]) == set(task.names)
        for name in task.names:
            samples = out["samples"][name]
            assert len(samples) == 5
            for sample in samples:
                assert all(given[-1] == {"iterations": 2} for given in sample["arguments"])
        asked = out["samples"]["words_choice"][0]["arguments"][0][0]
        assert asked == (f"<s> {text(4, 0)} </s> quorvex0 " if template else text(4, 0))
    assert out["config"]["checkpoint"] == "tiny"


def test_the_cache_of_answers_is_used_again(task, tmp_path, monkeypatch):
    how = {"tasks": task.names, "task_manager": task.manager, "bootstrap_iters": 0}
    how["use_cache"] = str(tmp_path / "answers")
    first = simple_evaluate(StateStreamLM(built(alpha=0.3), iterations=2), **how)
    monkeypatch.setattr(StateStreamLM, "_read", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr("sst_interp.models.model.generate", lambda *_: pytest.fail("written again"))
    again = simple_evaluate(StateStreamLM(built(alpha=0.3), iterations=2), **how)
    assert again["results"] == first["results"]


def test_the_command_evaluates_a_saved_model(task, tmp_path):
    save_model(tmp_path / "model")
    command = [sys.executable, "-m", "sst_interp.bridges.lm_eval", "--model", "sst-interp"]
    arguments = f"checkpoint={tmp_path / 'model'},alpha=0.3,iterations=3,dtype=float32"
    given = ["--tasks", "words_choice", "--include_path", str(task.folder), "--log_samples"]
    given += ["--batch_size", "2", "--output_path", str(tmp_path / "out")]
    run = subprocess.run(
        [*command, "--model_args", arguments, *given], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "words_choice" in run.stdout
    (samples,) = (tmp_path / "out").rglob("samples_words_choice*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["arguments"]["gen_args_0"]["arg_2"] for row in logged] == [{"iterations": 3}] * 5
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["config"]["iterations"] == 3


def test_an_error_of_ours_ends_the_command_in_one_line(monkeypatch, capsys):
    def wrong():
        StateStreamLM("nosuch")

    monkeypatch.setattr("sst_interp.bridges.lm_eval.cli_evaluate", wrong)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("unknown model 'nosuch'")


@pytest.mark.real
@torch.no_grad()
def test_real_weights_score_as_the_harness_scores_them():
    """At alpha 0 every depth is the backbone, to float32's rounding; 50 questions: docs/evaluating.md."""
    model = sst.load("smollm2-135m", alpha=0.0, dtype="float32")
    asked = load_questions("arc-easy", 6, scoring="likelihood").questions
    pairs = [(question.prompt, f" {choice}") for question in asked for choice in question.choices]
    theirs = HFLM(model.backbone.model, tokenizer=model.tokenizer, backend="causal", batch_size=8)
    requests = [request("loglikelihood", *pair) for pair in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for depth in (1, 2):
        answers, _ = scored(StateStreamLM(model, iterations=depth, batch_size=4), pairs)
        np.testing.assert_allclose([a for a, _ in answers], [e for e, _ in expected], rtol=1e-5)
        assert [g for _, g in answers] == [bool(g) for _, g in expected]
