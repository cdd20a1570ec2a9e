"""SmolLM2-135M and real questions: that the exact arithmetic of the tiny models survives real weights."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

import sst_interp as sst

pytestmark = pytest.mark.real

NAME = "smollm2-135m"
PROMPTS = ["Why is the sky blue?", "A train leaves at noon and travels 60 miles per hour. After two hours it"]
TEXT = (
    "The state of a system is what must be known of its past to say what it will do next. A clock has one, "
    "a river has one, and so has a reader in the middle of a sentence, who expects some words and not others."
)


@pytest.fixture(scope="module")
def model():
    """Loaded by its name alone: the plain backbone."""
    return sst.load(NAME)


@pytest.fixture(scope="module")
def full_precision():
    return sst.load(NAME, alpha=0.027, dtype="float32")


def test_it_is_what_its_name_says(model):
    assert (model.name, model.backbone.family) == (NAME, "llama")
    assert (model.backbone.n_layers, model.backbone.d_model) == (30, 576)
    assert model.backbone.dtype == torch.bfloat16
    assert model.kind.off  # a blend is asked for by its alpha
    chat = model.tokenizer.decode(model.chat(PROMPTS[0]))
    assert PROMPTS[0] in chat
    assert chat.endswith("<|im_start|>assistant\n")


@torch.no_grad()
def test_peft_alone_reads_the_shipped_adapters():
    """On the plain backbone, as anyone loads LoRA adapters; without the stream, which PEFT does not know."""
    folder = Path(__file__).parents[1] / "data" / "checkpoints" / "smollm2-135m-sst"
    tokens = sst.load(NAME, dtype="float32").tokenizer(TEXT, return_tensors="pt").input_ids
    plain = sst.load(NAME, dtype="float32").backbone.model
    before = plain(tokens).logits
    theirs = PeftModel.from_pretrained(plain, folder).eval()(tokens).logits
    ours = sst.load("smollm2-135m-sst", alpha=0.0, dtype="float32").backbone.model(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=2e-3)
    assert (theirs - before).abs().max() > 1


@torch.no_grad()
@pytest.mark.parametrize(("which", "dtype"), [(0, "float32"), (1, "float32"), (1, "bfloat16")])
def test_zero_alpha_generates_what_transformers_generates(model, full_precision, which, dtype):
    """Not prompt 0 in bfloat16: its second token is an exact tie there, which transformers itself decides
    differently if it reads the prompt's last token by itself, as we do.
    """
    backbone = (model if dtype == "bfloat16" else full_precision).backbone.model
    plain = sst.attach(backbone, model.tokenizer, alpha=0.0)
    ids = plain.chat(PROMPTS[which])
    theirs = backbone.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
    )
    ours = plain.generate([ids], iterations=1, max_new_tokens=12)
    assert ours.tokens[0] == theirs[0, len(ids) :].tolist()
    assert len(ours.texts[0].split()) > 5


@pytest.mark.parametrize("iterations", [1, 2])
def test_parallel_equals_sequential(full_precision, iterations):
    tokens = full_precision.encode(TEXT)[:48]
    assert len(tokens) == 48
    parallel = full_precision.replay([tokens], iterations)
    sequential = full_precision.replay([tokens], iterations, "sequential")
    assert parallel.certificate.converged
    error = (parallel.logits - sequential.logits).norm() / sequential.logits.norm()
    assert error < 1e-5
    assert parallel.logits.shape == (1, 48, iterations, 49152)
    if iterations == 1:
        plain = sst.attach(full_precision.backbone.model, alpha=0.0).replay([tokens], 1)
        assert (plain.logits - sequential.logits).norm() / sequential.logits.norm() > 1e-2  # alpha acts


def test_basin_shifts_of_real_questions(tmp_path, monkeypatch, capsys):
    """From a recipe to a report by the command a user types."""
    recipe = {
        "checkpoint": NAME,
        "alpha": 0.027,
        "dataset": "arc-challenge",
        "questions": 2,
        "depths": [1, 2],
        "max_new_tokens": 4,
        "batch_size": 2,
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SST_INTERP_RUNS", "runs")
    Path("real.toml").write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in recipe.items()))
    monkeypatch.setattr(sys, "argv", ["sst-interp", "basin-shifts", "--run", "real.toml", "--json", "-"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("sst_interp.cli").main()
    assert not end.value.code
    results = json.loads(capsys.readouterr().out)
    run = sst.open_run("real")
    assert run.complete
    assert run.questions["question"].nunique() == 2
    assert set(run.questions["gold"]) <= set("ABCD")
    numbers = run.pairs.select_dtypes("floating")
    assert np.isfinite(numbers.to_numpy()).all()
    assert run.pairs["cosine"].between(-1, 1).all()
    assert run.pairs["layer"].nunique() == 30
    assert (run.pairs["relative_l2"] > 0).mean() > 0.9  # a second iteration changes something
    assert set(results) == {"teacher_forced", "within", "free_running"}
    assert run.states(0).shape == (30, 2, 576)
    assert Path("runs/real/report.html").stat().st_size > 1_000_000  # plotly is inside
