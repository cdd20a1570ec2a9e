"""The depth-looped model: Hugging Face's own stack run again, and no state from position to position."""

import json

import pytest
import torch
from tiny import FAMILIES, prompts, relative, tiny
from tiny_capture import save_model
from transformers import DynamicCache

import sst_interp as sst
from sst_interp.errors import SSTError
from sst_interp.models.checkpoint import save_checkpoint
from sst_interp.models.choices import Choices
from sst_interp.models.hooks import Record, at
from sst_interp.models.model import attach, attach_looped
from sst_interp.models.solvers.sequential import advance
from sst_interp.models.stream import Kind, Reading, run_layer

ROUNDING = 1e-12
"""float64, and other matrix shapes."""
BLENDS = ["convex", "additive"]


def looped(family="llama", blend="convex", **choices):
    return attach_looped(tiny(family), choices=Choices(blend=blend, **choices))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_at_depth_1_it_is_the_backbone_bit_for_bit(family):
    hf, tokens = tiny(family), torch.tensor([prompts()[0]])
    theirs = hf(tokens, use_cache=False).logits
    for blend in BLENDS:
        model = attach_looped(hf, choices=Choices(blend=blend))
        found = model.replay(tokens)
        last = found.resid_post[:, :, -1, 0].contiguous()
        assert torch.equal(model.backbone.unembed(last), theirs)
        assert found.certificate.converged
        assert found.certificate.residual == 0  # nothing crosses positions: there is nothing to solve
        assert relative(model.replay(tokens, 1, "sequential").logits[:, :, 0], theirs) < ROUNDING
        assert not model.kind.off
        assert relative(model.replay(tokens, 2).logits[:, :, 1], theirs) > 1e-2


def by_hugging_face(hf, tokens, iterations, blend):
    """Its own forward, position by position, with its own cache: [position, iteration, d_model], before the
    final norm. Between iterations the entry that the last one wrote is cut off the cache.
    """
    cache, out, caught = DynamicCache(config=hf.config), [], []
    handle = hf.model.layers[-1].register_forward_hook(
        lambda _m, _a, y: caught.append(y[0] if isinstance(y, tuple) else y)
    )
    try:
        for token in tokens:
            e = x = hf.get_input_embeddings()(torch.tensor([[token]]))
            for i in range(iterations):
                if i > 0:
                    cache.crop(-1)
                hf.model(inputs_embeds=x, past_key_values=cache, use_cache=True)
                y = caught.pop()
                out.append(y[0, 0])
                x = y if blend == "convex" else e + y
    finally:
        handle.remove()
    return torch.stack(out).view(len(tokens), iterations, -1)


@torch.no_grad()
@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_it_is_hugging_faces_stack_run_again(family, blend):
    hf, tokens = tiny(family), prompts()[0]
    model = attach_looped(hf, choices=Choices(blend=blend))
    theirs = by_hugging_face(hf, tokens, 3, blend)
    for method in ("sequential", "parallel"):
        ours = model.replay([tokens], 3, method).resid_post[0, :, -1]
        assert relative(ours, theirs) < 1e-9
    other = by_hugging_face(hf, tokens, 3, "additive" if blend == "convex" else "convex")
    assert relative(ours[:, 0], other[:, 0]) > 1e-3  # by the entries that earlier positions leave behind
    assert relative(ours[:, 2], other[:, 2]) > 1e-2


@torch.no_grad()
def test_no_state_goes_from_position_to_position():
    model, tokens = looped(), prompts()[0]
    clean, disturbed = (model.new_stream(torch.zeros(1, dtype=torch.long), len(tokens)) for _ in "ab")
    for token in tokens:
        disturbed.state.normal_(0, 100)
        ours, theirs = (advance(model, s, torch.tensor([token]), 3) for s in (clean, disturbed))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.resid_post, b.resid_post)
    texts = [
        looped(prompt=prompt).generate([tokens], 3, 6, stop_tokens=[]).tokens
        for prompt in ("exact", "blend_off", "two_pass")
    ]
    assert texts[0] == texts[1] == texts[2]  # a prompt is read at depth 1: by the backbone


@torch.no_grad()
@pytest.mark.parametrize("kv", ["last", "first"])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_parallel_equals_sequential(family, iterations, kv):
    """Left padding included."""
    rows = prompts()
    for blend in BLENDS:
        model = looped(family, blend, kv=kv)
        hand = [model.replay([row], iterations, "sequential") for row in rows]
        for how in ({}, {"groups": 1}, {"groups": 3}):
            found = model.replay(rows, iterations, **how)
            assert found.certificate.converged
            assert not how or found.certificate.method == "sweeps"
            for k, row in enumerate(hand):
                assert relative(found.resid_post[k, : len(rows[k])], row.resid_post[0]) < 1e-9
        assert found.certificate.logit_error < 1e-9


@torch.no_grad()
def test_after_k_sweeps_the_first_k_positions_are_exact():
    model, tokens = looped(), prompts()[0]
    hand = model.replay([tokens], 3, "sequential").resid_post
    worse = []
    for k in range(1, len(tokens) + 1):
        found = model.replay([tokens], 3, sweeps=k).resid_post
        assert relative(found[:, :k], hand[:, :k]) < 1e-9
        worse.append(relative(found, hand))
    assert worse[0] > 1e-3  # what crosses is keys and values: one sweep is not enough
    assert worse[-1] < 1e-9


@torch.no_grad()
def test_reading_goes_on_where_it_stopped_and_a_batch_is_its_rows():
    model, rows = looped(), prompts()
    alone = [model.generate([row], 3, 6, stop_tokens=[]).tokens[0] for row in rows]
    assert model.generate(rows, 3, 6, stop_tokens=[]).tokens == alone
    mixed = model.generate(rows, [3, 1, 2], 6, stop_tokens=[]).tokens
    assert mixed[0] == alone[0]
    assert mixed[1] == model.generate([rows[1]], 1, 6, stop_tokens=[]).tokens[0]
    later = model.replay([rows[0]], 2, start=4).resid_post
    stream = model.new_stream(torch.zeros(1, dtype=torch.long), 11)
    model.prefill(stream, torch.tensor([rows[0][:4]]))
    for t in range(4, len(rows[0])):
        two = advance(model, stream, torch.tensor([rows[0][t]]), 2)
        assert relative(two[1].resid_post[:, 0], later[0, t - 4, :, 1]) < 1e-9


@torch.no_grad()
def test_an_edit_sees_and_changes_what_an_iteration_reads():
    model, prompt = looped(), prompts()[0]
    record = Record(["stream_state", "resid_pre", "resid_post"])
    model.generate([prompt], 3, 3, stop_tokens=[], edit=record)
    assert {key[1:2] + key[3:] for key in record.kept if key[0] == "stream_state"} == {(0, 2), (0, 3)}
    for position in range(3):
        for i in (2, 3):
            before = record.kept["resid_post", 2, position, i - 1]
            assert torch.equal(record.kept["stream_state", 0, position, i], before)
            assert torch.equal(record.kept["resid_pre", 0, position, i], before)  # in place of the embedding

    changed = Record(["resid_post"])

    def double(tensor, **where):
        changed(tensor, **where)
        return 2 * tensor if where["site"] == "stream_state" and where["iteration"] == 2 else None

    model.generate([prompt], 3, 1, stop_tokens=[], edit=double)
    ours, theirs = record["resid_post"][:, :1], changed["resid_post"]
    assert torch.equal(ours[..., 0, :], theirs[..., 0, :])
    assert relative(theirs[..., 1, :], ours[..., 1, :]) > 1e-3
    with pytest.raises(SSTError, match="the edit was never called"):
        model.generate([prompt], 3, 1, edit=at(double, site="stream_state", iteration=1))


@torch.no_grad()
@pytest.mark.parametrize("blend", BLENDS)
def test_a_checkpoint_says_its_kind(tmp_path, blend):
    backbone = save_model(tmp_path / "tiny")
    model = sst.load(backbone, dtype="float32", kind="looped", choices=Choices(blend=blend))
    folder = save_checkpoint(model, tmp_path / "looped", str(backbone))
    assert json.loads((folder / "stream.json").read_text())["kind"] == "looped"
    tokens = [[5, 6, 7, 8, 9, 5, 6]]
    for kind in (None, "looped"):
        loaded = sst.load(folder, dtype="float32", kind=kind)
        assert loaded.kind.like(model.kind)
        assert loaded.kind.digest() == model.kind.digest()
        assert torch.equal(loaded.replay(tokens, 3).logits, model.replay(tokens, 3).logits)
    assert "looped" in repr(loaded)


def test_another_kind_is_refused_in_one_line(tmp_path):
    backbone = save_model(tmp_path / "tiny")
    plain = sst.load(backbone, dtype="float32")
    loop = attach_looped(plain.backbone.model)
    assert loop.kind.digest() != plain.kind.digest()
    folders = {
        "State Stream Transformer": save_checkpoint(plain, tmp_path / "sst", str(backbone)),
        "depth-looped model": save_checkpoint(loop, tmp_path / "looped", str(backbone)),
    }
    for (name, folder), kind in zip(folders.items(), ("looped", "sst"), strict=True):
        for wanted in (kind, "lrt"):
            with pytest.raises(SSTError, match=f"is a {name}, not a ") as error:
                sst.load(folder, dtype="float32", kind=wanted)
            assert "\n" not in error.value.message
    for how in ({"name": backbone, "kind": "looped"}, {"name": folders["depth-looped model"]}):
        with pytest.raises(SSTError, match=r"depth-looped model( has no alpha|, not a State)"):
            sst.load(**how, alpha=0.1, dtype="float32")
    for choice in ({"carry": "ffn_output"}, {"initial_guess": "scan"}):
        with pytest.raises(SSTError, match="about states of single layers"):
            attach_looped(plain.backbone.model, choices=Choices(**choice))
    with pytest.raises(SSTError, match="a depth-looped model has no alpha"):
        _ = loop.alpha


class CoreLoop(Kind):
    """A loop over a part of the stack: from iteration 2 on only the layers from the second one up run."""

    words, first = "core-looped model", 1

    def slots(self, backbone):
        return backbone.n_layers

    def weights(self):
        return {}

    def with_weights(self, weights):
        return self

    def has_state(self, columns, origin, iteration):
        return super().has_state(columns, origin, iteration) & (iteration > 1)

    def reading(self, choices, state, has_state, visit):
        return Reading()

    def next_state(self, backbone, choices, resid_post, ffn):
        return resid_post

    @property
    def off(self):
        return False

    def run(self, model, p):
        if p.iteration == 1:
            return super().run(model, p)
        at, x, outputs = p.inputs(model.backbone), p.state[-1], list(p.state[: self.first])
        for index in range(self.first, model.backbone.n_layers):
            x, _ = run_layer(model.backbone.layers[index], index, x, at, Reading(), p.visit)
            outputs.append(x)
        resid_post = torch.stack(outputs)
        return resid_post, resid_post


@torch.no_grad()
@pytest.mark.parametrize("kv", ["last", "first"])
def test_a_kind_can_loop_over_a_part_of_the_stack(kv):
    hf, rows = tiny("llama"), prompts()
    model = attach(hf, kind=CoreLoop(), choices=Choices(kv=kv))
    ours = model.replay(rows, 3)
    assert relative(ours.resid_post, model.replay(rows, 3, "sequential").resid_post) < ROUNDING
    assert torch.equal(ours.resid_post[:, :, 0, 0], ours.resid_post[:, :, 0, 2])
    if kv == "last":
        x = ours.resid_post[:1, :1, -1, 0]  # a first token attends to itself alone: each layer can run alone
        for layer in hf.model.layers[1:]:
            x = layer(x, position_embeddings=hf.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long)))
        assert relative(ours.resid_post[0, 0, -1, 1], x.flatten()) < ROUNDING
    record = Record(["resid_pre"])
    model.generate(rows[:1], 2, 2, edit=record)
    assert {key[1] for key in record.kept if key[3] == 1} == {0, 1, 2}
    assert {key[1] for key in record.kept if key[3] == 2} == {1, 2}
