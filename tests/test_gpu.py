"""On a GPU (a pretended one: `pretend_gpu`) everything stays on its device and gives the CPU's numbers."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny
import tiny_kinds
import torch
from pretend_gpu import DEVICE, GPU
from tiny_capture import recipe_for, tiny_llama, write_questions
from tiny_training import answer_batch, loss_and_gradients

from sst_interp.models.model import attach, attach_lrt
from sst_interp.models.solvers.layerwise import solve_layerwise
from sst_interp.runs.recorder import Recorder, RolloutDecoder


def same(build):
    """`build` gives the same numbers of CPU weights and of the same on the GPU."""
    with GPU():
        for here, there in zip(build(torch.device("cpu")), build(DEVICE), strict=True):
            assert there.device == DEVICE
            torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", tiny.FAMILIES | tiny.NEWER | tiny.PARALLEL)
def test_every_family_generates_and_replays_there(family):
    """Two depths in one batch, with padding, longer than the sliding windows."""

    def run(device):
        hf = tiny.tiny(family).to(device)
        model = attach_lrt(hf) if family in tiny.PARALLEL else attach(hf, alpha=0.2)
        text = model.generate(tiny.prompts(2, 8), iterations=[1, 2], max_new_tokens=2, stop_tokens=[])
        replay = model.replay(tiny.prompts(1, 7), iterations=2, check=1)
        return torch.tensor(text.tokens, device=device), replay.resid_post, replay.logits

    same(run)


@pytest.mark.parametrize("kind", tiny_kinds.WORDS)
def test_every_kind_is_captured_there_with_its_controls(kind, tmp_path, monkeypatch):
    csv = write_questions(tmp_path / "words.csv", 3)
    runs = {}
    for device, where in {"cpu": torch.device("cpu"), "gpu": DEVICE}.items():
        monkeypatch.setattr(tiny_kinds, "tiny_llama", lambda where=where: tiny_llama().to(where))
        with GPU():
            runs[device] = tiny_kinds.capture_kinds(
                tmp_path / device, csv=csv, only=(kind,), max_new_tokens=3, keep="all", controls=1
            )[kind]
    for table in ("questions", "steps", "pairs", "outputs", "noise", "nudges"):
        here, there = (getattr(runs[device], table) for device in ("cpu", "gpu"))
        atol = 1e-3 if table == "noise" else 1e-9  # its float32 twin rounds by the kernel
        pd.testing.assert_frame_equal(here, there, rtol=1e-6, atol=atol, check_like=True)


METHODS = ("two_pass", "multi_refine", "interleaved", "chunked", "exact", "sequential")


def train_there(method):
    def run(device):
        model = attach(tiny.tiny("llama").to(device), alpha=0.1)
        model.alpha = model.alpha.requires_grad_()
        return loss_and_gradients(model, answer_batch().to(device), method, 1, 2, 4)

    same(run)


def test_every_method_trains_there():
    """In a process of its own: torch counts its devices at the first backward pass."""
    words = f"import test_gpu; [test_gpu.train_there(method) for method in {METHODS}]"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", words], cwd=Path(__file__).parent, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_gpu_refuses_what_a_gpu_refuses():
    with GPU() as gpu:
        there, here = torch.arange(4, device=DEVICE), torch.arange(4)
        for wrong in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there]):
            with pytest.raises(RuntimeError, match="one device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with gpu.counting():
            assert int(there.sum()) == 6
            assert there[there > 2].tolist() == [3]
        assert gpu.names["aten.sum"] == 1
        assert gpu.syncs == 3  # the number, the mask's size, the list
        with gpu.counting():
            torch.tensor([1], device=DEVICE)
        assert gpu.syncs == 1  # a copy there waits, too
    with pytest.raises(RuntimeError, match="outside"):
        there + 1


@pytest.mark.parametrize("depths", [(1,), (1, 2, 4), (1, 9)])
def test_a_capture_waits_once_per_position(depths):
    """Whatever its depths: twice the positions, and every one more costs one wait."""
    with GPU() as gpu:
        model = attach(tiny_llama().to(DEVICE), alpha=0.2)
        stream = model.new_stream(torch.tensor([0, 2], device=DEVICE), 20)
        tokens = torch.full((2, 6), 9, device=DEVICE)
        model.prefill(stream, tokens[:, :-1])
        stop = torch.tensor([2], device=DEVICE)
        decoder = RolloutDecoder(model, stream, tokens[:, -1], depths, stop)
        recorder = Recorder([0, 1], recipe_for("none.csv", depths=depths, keep="all"), restricted=False)
        for position in range(4):
            with gpu.counting():
                recorder.see(position, decoder.step(), decoder)
                decoder.finish_step()
            spooled = sum(n for line, n in gpu.lines.items() if line.startswith("runs/states.py"))
            assert position == 0 or gpu.syncs - spooled == 1, gpu.lines  # CUDA does not wait for those


def test_an_exact_solution_waits_twice_per_layer_and_sweep():
    with GPU() as gpu:
        model = attach(tiny.tiny("llama").to(DEVICE), alpha=0.2)
        stream = model.new_stream(torch.zeros(1, dtype=torch.long, device=DEVICE), 9)
        with gpu.counting():
            solution = solve_layerwise(model, stream, torch.full((1, 9), 7, device=DEVICE), iterations=2)
    sweeps = 3 * solution.certificate.mean_sweeps
    assert gpu.syncs <= 2 * sweeps + 3 + 1, gpu.lines  # each layer once finds nothing left to do
