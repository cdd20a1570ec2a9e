"""A capture against replay: what it records is what the model does, whatever interrupts it."""

import dataclasses
import shutil
import weakref

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
from tiny_capture import (
    ALPHA,
    DEPTHS,
    NEW,
    capture,
    capture_module,
    interrupt,
    recipe_for,
    tiny_llama,
    word_tokenizer,
    write_questions,
)

from sst_interp.analyses import Contrast, all_comparisons
from sst_interp.errors import SSTError
from sst_interp.models.choices import COMPARISONS, Choices
from sst_interp.models.measures import BF16_ROUNDOFF
from sst_interp.models.model import attach
from sst_interp.questions import load_questions
from sst_interp.runs.recorder import RolloutDecoder
from sst_interp.runs.store import open_run


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """For the fixtures of this module, too: another number of threads is another rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "words.csv")


@pytest.fixture(scope="module")
def model(csv):
    """Ends its texts with a token that really occurs in them, at different positions."""
    made = attach(tiny_llama(), word_tokenizer(), ALPHA, name="tiny")
    prompts = [made.chat(q.prompt) for q in load_questions(str(csv), instruction="").questions]
    texts = [t for d in DEPTHS for t in made.generate(prompts, d, NEW, stop_tokens=[]).tokens]
    ends = {token: tuple(t.index(token) for t in texts if token in t) for t in texts for token in t}
    stop = max(ends, key=lambda token: (len(set(ends[token]) - {NEW - 1}), len(ends[token]) < len(texts)))
    assert len(set(ends[stop])) > 1
    made.backbone.model.generation_config.eos_token_id = [2, int(stop)]
    return made


@pytest.fixture(scope="module")
def run(csv, model, tmp_path_factory):
    """One uninterrupted capture in three batches, with every state kept."""
    return capture(
        recipe_for(csv, keep="all"), model, tmp_path_factory.mktemp("runs") / "own", progress=False
    )


@pytest.fixture(scope="module")
def replays(csv, model, run):
    """{(question, text, depth): (token ids, logits [position, iteration, vocab], states [position, layer,
    iteration, d_model])} from replay, one question at a time, of the texts that `steps` says were written."""
    questions = load_questions(str(csv), instruction="").questions
    first = run.steps[run.steps["iteration"] == 1]
    found = {}
    for (q, text, depth), rows in first.groupby(["question", "text", "depth"], observed=True):
        assert rows["position"].tolist() == list(range(len(rows)))
        emitted = rows["token"].tolist()
        prompt = model.chat(questions[q].prompt)
        seen = model.replay([prompt + emitted[:-1]], iterations=depth, start=len(prompt) - 1, tolerance=1e-13)
        found[q, text, depth] = emitted, seen.logits[0], seen.resid_post[0]
    return found


def cells(row):
    """The (text, depth, iteration) of a and b, as docs/run-format.md defines the comparisons."""
    if row.comparison == "within":
        return ("own", DEPTHS[-1], row.a), ("own", DEPTHS[-1], row.b)
    return ("own", 1, 1), ("own" if row.comparison == "free_running" else "depth1", row.b, row.b)


def test_prompts_and_texts_differ_in_length(run):
    """Otherwise the tests below would not see padding or the end of a text."""
    assert run.complete
    assert sorted(run.manifest["shards"]) == ["0", "1", "2"]
    lengths = run.questions.drop_duplicates("question")["prompt_tokens"].tolist()
    batches = capture_module.batches_of(lengths, 2)
    assert batches == [[0, 4], [2, 1], [3]]
    assert all(lengths[a] < lengths[b] for a, b in batches[:2])
    own = run.questions
    assert own["tokens"].nunique() > 1
    assert 0 < own["stopped"].sum() < len(own)
    assert (own["tokens"][~own["stopped"]] == NEW).all()


def test_rows_end_where_texts_end(run, model, replays):
    tokens = {(r.question, r.depth): r.tokens for r in run.questions.itertuples()}
    assert len(replays) == len(tokens) + len(tokens) * 2 // 3
    for (q, text, depth), (emitted, _, _) in replays.items():
        assert len(emitted) == tokens[q, depth if text == "own" else 1]
        assert not set(emitted[:-1]) & set(model.stop_tokens)
        if text == "depth1":
            assert emitted == replays[q, "own", 1][0]
    for row in run.questions.itertuples():
        assert row.stopped == (replays[row.question, "own", row.depth][0][-1] in model.stop_tokens)
    counts = run.outputs.groupby(["question", "comparison", "a", "b"], observed=True).size()
    for (q, comparison, a, b), n in counts.items():
        end = {
            "teacher_forced": tokens[q, 1],
            "free_running": min(tokens[q, 1], tokens[q, b]),
            "within": tokens[q, DEPTHS[-1]],
        }
        assert n == end[comparison], (q, comparison, a, b)
    assert set(counts.index.droplevel("question")) == {
        *(("teacher_forced", 1, d) for d in DEPTHS[1:]),
        *(("free_running", 1, d) for d in DEPTHS[1:]),
        *(("within", a, b) for a, b in [(1, 2), (1, 3), (2, 3)]),
    }
    assert len(counts) == 5 * 7
    assert len(run.pairs) == 3 * len(run.outputs)


def test_steps_are_the_truth(run, replays):
    for row in run.steps.itertuples():
        emitted, logits, _ = replays[row.question, row.text, row.depth]
        at = logits[row.position, row.iteration - 1]
        top = at.sort(descending=True)
        assert row.token == emitted[row.position]
        assert row.argmax == top.indices[0]
        if row.text == "own" and row.iteration == row.depth:
            assert row.token == row.argmax
        assert row.margin == pytest.approx((top.values[0] - top.values[1]).item(), abs=1e-6, rel=1e-6)
        entropy = torch.distributions.Categorical(logits=at).entropy().item()
        assert row.entropy == pytest.approx(entropy, rel=1e-6)
        assert list(row.top100) == top.indices[:100].tolist()


def test_pairs_are_the_truth(run, replays):
    got = run.pairs
    for comparison in COMPARISONS:
        truth, rows = [], got[got["comparison"] == comparison]
        for row in rows.itertuples():
            (text_a, depth_a, i), (text_b, depth_b, j) = cells(row)
            a = replays[row.question, text_a, depth_a][2][row.position, row.layer, i - 1]
            b = replays[row.question, text_b, depth_b][2][row.position, row.layer, j - 1]
            ratio = ((b - a).abs() / (BF16_ROUNDOFF * a.abs())).sort().values
            truth.append(
                [
                    (a @ b / (a @ a).sqrt() / (b @ b).sqrt()).item(),
                    ((b - a).norm() / a.norm()).item(),
                    a.norm().item(),
                    b.norm().item(),
                    ratio[(len(ratio) - 1) // 2].item(),
                ]
            )
        truth = np.array(truth)
        assert truth[:, 0].min() < 0.97, comparison  # something happens
        names = ["cosine", "relative_l2", "norm_a", "norm_b", "bf16_ratio"]
        for k, name in enumerate(names):
            scale = np.maximum(1, np.abs(truth[:, k]))
            assert (np.abs(rows[name].to_numpy(float) - truth[:, k]) / scale).max() < 1e-6, (comparison, name)


def test_outputs_are_the_truth(run, replays):
    changed = 0
    for row in run.outputs.itertuples():
        (text_a, depth_a, i), (text_b, depth_b, j) = cells(row)
        a = replays[row.question, text_a, depth_a][1][row.position, i - 1]
        b = replays[row.question, text_b, depth_b][1][row.position, j - 1]
        tops = [set(x.topk(100).indices.tolist()) for x in (a, b)]
        assert row.replaced == len(tops[0] - tops[1])
        assert row.winner_rank == a.argsort(descending=True).tolist().index(int(b.argmax()))
        assert row.argmax_changed == (int(a.argmax()) != int(b.argmax()))
        kl = (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum().item()
        assert row.kl == pytest.approx(kl, rel=1e-5, abs=1e-7)
        changed += row.argmax_changed
    assert changed


def test_same_prefix_is_that_of_the_texts(run, replays):
    for table in (run.outputs, run.pairs):
        assert table["same_prefix"][table["comparison"] != "free_running"].all()
        free = table[table["comparison"] == "free_running"]
        assert 0 < free["same_prefix"].sum() < len(free)
        for row in free.itertuples():
            one, deep = replays[row.question, "own", 1][0], replays[row.question, "own", row.b][0]
            assert row.same_prefix == (one[: row.position] == deep[: row.position])


def test_texts_that_differed_once_have_no_common_prefix_again(model):
    """Even if they write the same tokens again."""
    tokens, pad = model.batch([[5, 9], [7, 8]])
    stream = model.new_stream(pad, 8)
    model.prefill(stream, tokens[:, :-1])
    decoder = RolloutDecoder(model, stream, tokens[:, -1], (1, 2), torch.tensor([2]))
    for one, two, same in [
        ([10, 10], [10, 11], [True, False]),
        ([12, 12], [12, 12], [True, False]),
        ([13, 13], [14, 13], [False, False]),
    ]:
        decoder.emitted = {1: torch.tensor(one), 2: torch.tensor(two)}
        decoder.finish_step()
        assert decoder.same_prefix[2].tolist() == same


def test_questions_table(run, csv, model, replays):
    asked = load_questions(str(csv), instruction="").questions
    for row in run.questions.itertuples():
        assert (row.id, row.gold) == (asked[row.question].id, asked[row.question].gold)
        assert row.prompt_tokens == len(model.chat(asked[row.question].prompt))
        assert row.tokens == len(replays[row.question, "own", row.depth][0])
        assert row.correct == (row.answer == row.gold)
        assert row.prompt_residual < 1e-6
        assert row.prompt_logit_error < 1e-6


def test_a_reply_prefix_is_read_with_the_prompt_and_graded_with_the_reply(csv, model, tmp_path):
    prefix = "The answer is (B)"
    begun = capture(recipe_for(csv, reply_prefix=prefix), model, tmp_path / "begun", progress=False)
    asked = load_questions(str(csv), instruction="").questions
    for row in begun.questions.itertuples():
        prompt = [*model.chat(asked[row.question].prompt), *model.encode_plain(prefix)]
        assert row.prompt_tokens == len(prompt)
        assert row.answer == "B"
        text = model.generate([prompt], row.depth, NEW).tokens[0]
        steps = begun.steps[(begun.steps["question"] == row.question) & (begun.steps["depth"] == row.depth)]
        own = steps[(steps["text"] == "own") & (steps["iteration"] == row.depth)]
        assert own["argmax"].tolist() == text


def test_kept_states_are_replays(run, replays, csv, model, tmp_path):
    for (q, text, depth), (_, _, states) in replays.items():
        kept = run.states(q, position=None, depth=depth, text=text)
        assert kept.dtype == torch.float64
        assert kept.shape == states.shape
        assert (kept - states).norm() / states.norm() < 1e-9
    only = capture(recipe_for(csv), model, tmp_path / "own", progress=False)
    for q in range(5):
        assert torch.equal(only.states(q), run.states(q, position=0, depth=DEPTHS[-1]))


def test_shifts_are_the_pairs_below_the_threshold(csv, model, run, replays, tmp_path):
    from safetensors.torch import load_file

    capture(recipe_for(csv, keep="shifts"), model, tmp_path / "own", progress=False)
    kept = {}
    for file in sorted((tmp_path / "own" / "states").glob("*.safetensors")):
        kept |= load_file(file)
    below = run.pairs[run.pairs["cosine"] < 0.99]
    assert 0 < len(below) < len(run.pairs)
    for q in range(5):
        index = kept[f"q{q}.shifts.index"]
        assert index.dtype == torch.int32
        expected = below[below["question"] == q]
        codes = expected["comparison"].cat.codes
        keys = set(zip(codes, *(expected[c] for c in ["position", "layer", "a", "b"]), strict=True))
        assert len(index) == len(keys)
        assert {tuple(row) for row in index.tolist()} == keys
        for (c, position, layer, a, b), x, y in zip(
            index.tolist(), kept[f"q{q}.shifts.a"], kept[f"q{q}.shifts.b"], strict=True
        ):
            row = type("Row", (), {"comparison": COMPARISONS[c], "a": a, "b": b})
            for (text, depth, i), state in zip(cells(row), (x, y), strict=True):
                truth = replays[q, text, depth][2][position, layer, i - 1]
                assert (state - truth).norm() / truth.norm() < 1e-9


# Interruptions


@pytest.fixture(scope="module")
def whole(csv, model, tmp_path_factory):
    """(recipe, contents) of an uninterrupted capture that keeps everything but the states of all passes."""
    recipe = recipe_for(csv, keep="shifts")
    folder = tmp_path_factory.mktemp("whole") / "own"
    capture(recipe, model, folder, progress=False)
    return recipe, tiny_run.contents(folder)


PLACES = {
    "before": (capture_module, "capture_batch", False),
    "measured": (capture_module, "capture_batch", True),
    "committed": (capture_module.RunWriter, "commit", True),
}


@pytest.mark.parametrize(
    ("place", "batch"),
    [("before", 0), ("measured", 2), ("committed", 0), ("committed", 2)],
)
def test_killed_and_resumed_is_uninterrupted(whole, model, tmp_path, place, batch):
    owner, name, after = PLACES[place]
    recipe, expected = whole
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, owner, name, batch, after)
        with pytest.raises(KeyboardInterrupt):
            capture(recipe, model, tmp_path / "own", progress=False)
    if done := batch + (name == "commit"):  # longest first: the last batch has one question
        partial = open_run(tmp_path / "own")
        assert not partial.complete
        assert len(partial.manifest["shards"]) == done
        assert partial.pairs["question"].nunique() == 2 * done - 1
    capture(recipe, model, tmp_path / "own", progress=False)
    assert tiny_run.contents(tmp_path / "own") == expected


def test_a_killed_batch_leaves_nothing(whole, model, tmp_path):
    """In the middle of generating: at position 3 of the second batch."""
    recipe, expected = whole
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, capture_module.Recorder, "see", NEW + 3)
        with pytest.raises(KeyboardInterrupt):
            capture(recipe, model, tmp_path / "own", progress=False)
    assert sorted(p.name for p in (tmp_path / "own" / "pairs").iterdir()) == ["0002.parquet"]
    capture(recipe, model, tmp_path / "own", progress=False)
    assert tiny_run.contents(tmp_path / "own") == expected


def test_a_batch_is_forgotten_before_the_next(csv, model, tmp_path, monkeypatch):
    born = []

    class Watched(capture_module.Recorder):
        def __init__(self, *args):
            assert all(earlier() is None for earlier in born)
            super().__init__(*args)
            born.append(weakref.ref(self))

    monkeypatch.setattr(capture_module, "Recorder", Watched)
    capture(recipe_for(csv, keep="all"), model, tmp_path / "own", progress=False)
    assert len(born) == 3


def files_of(folder):
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")}


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    """(questions, recipe, folder) with a run that was killed in its second batch, and a whole one."""
    here = tmp_path_factory.mktemp("begun")
    csv = write_questions(here / "mine.csv")
    recipe = recipe_for(csv)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, capture_module, "capture_batch", 1)
        with pytest.raises(KeyboardInterrupt):
            capture(recipe, model, here / "partial", progress=False)
    capture(recipe, model, here / "complete", progress=False)
    return csv, recipe, here


@pytest.mark.parametrize("state", ["partial", "complete"])
@pytest.mark.parametrize("what", ["alpha", "alpha of one dimension", "question", "gold", "model"])
def test_resuming_with_something_else_is_refused(model, begun, what, state):
    csv, recipe, here = begun
    before, other, original = files_of(here / state), model, csv.read_text()
    if what == "alpha":
        other = attach(model.backbone.model, model.tokenizer, ALPHA + 1e-3)
    elif what == "alpha of one dimension":
        alpha = model.alpha.clone()
        alpha[1, 5] += 1e-6
        other = attach(model.backbone.model, model.tokenizer, alpha)
    elif what == "question":
        csv.write_text(original.replace("q4,quorvex", "q4,(C) quorvex"))
    elif what == "gold":
        csv.write_text(original.removesuffix("A\n") + "B\n")
    else:
        other = attach(tiny_llama(seed=1), model.tokenizer, ALPHA)
    assert other is not model or csv.read_text() != original
    try:
        with pytest.raises(SSTError, match="_hash") as refused:
            capture(recipe, other, here / state, progress=False)
    finally:
        csv.write_text(original)
    assert "--fresh" in refused.value.hint
    assert files_of(here / state) == before


def test_a_refused_run_can_still_be_finished(model, begun, tmp_path):
    _, recipe, here = begun
    shutil.copytree(here / "partial", tmp_path / "own")
    with pytest.raises(SSTError, match="alpha_hash"):
        capture(recipe, attach(model.backbone.model, model.tokenizer, 0.1), tmp_path / "own", progress=False)
    capture(recipe, model, tmp_path / "own", progress=False)
    assert tiny_run.contents(tmp_path / "own") == tiny_run.contents(here / "complete")


def test_a_model_that_is_not_the_recipes_is_refused(csv, model, tmp_path):
    for changes, said in [
        ({"dtype": "float32"}, "float64"),
        ({"alpha": 0.2}, "alpha"),
        ({"choices": Choices(carry="ffn_output")}, "carry"),
        ({"choices": Choices(prompt="two_pass")}, "prompt"),
    ]:
        with pytest.raises(SSTError, match=said):
            capture(recipe_for(csv, **changes), model, tmp_path / "own", progress=False)
    assert not (tmp_path / "own").exists()


def test_only_the_damaged_batch_is_captured_again(whole, model, tmp_path, monkeypatch):
    recipe, expected = whole
    folder = tmp_path / "own"
    capture(recipe, model, folder, progress=False)
    shard = folder / "pairs" / "0001.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(SSTError, match=r"pairs/0001\.parquet is damaged") as error:
        _ = open_run(folder).pairs
    assert "capture --run" in error.value.hint
    assert len(open_run(folder).outputs)  # the rest can be read
    calls, real = [], capture_module.capture_batch

    def counting(model, recipe, rows, *rest):
        calls.append(list(rows))
        return real(model, recipe, rows, *rest)

    monkeypatch.setattr(capture_module, "capture_batch", counting)
    capture(recipe, model, folder, progress=False)
    lengths = open_run(folder).questions.drop_duplicates("question").set_index("question")["prompt_tokens"]
    assert calls == [capture_module.batches_of(lengths.sort_index().tolist(), 2)[1]]
    assert tiny_run.contents(folder) == expected


# What is recorded on request, and what must never be


@pytest.mark.parametrize("keep", ["all", "shifts"])
def test_restricted_text_is_nowhere(csv, model, tmp_path, monkeypatch, keep):
    real = capture_module.questions_of

    def restricted(*args, **kwargs):
        return dataclasses.replace(real(*args, **kwargs), restricted=True)

    monkeypatch.setattr(capture_module, "questions_of", restricted)
    run = capture(recipe_for(csv, keep=keep), model, tmp_path / "own", progress=False)
    assert run.manifest["provenance"]["restricted"] is True
    assert run.steps[["token", "argmax", "top100"]].isna().all().all()
    assert run.steps["entropy"].notna().all()
    assert run.lens.empty
    files = [p for p in (tmp_path / "own").rglob("*") if p.is_file()]
    assert len(files) >= 5 * 3 + 2
    for file in files:
        assert b"quorvex" not in file.read_bytes(), file
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            assert "quorvex" not in str(table.to_pylist()), file
            for field in table.schema:
                if field.name in ("token", "argmax", "top100"):
                    assert table[field.name].null_count == len(table), file
                elif pa.types.is_integer(field.type):
                    assert field.name in {
                        "question", "depth", "position", "iteration", "layer", "a", "b", "tokens",
                        "prompt_tokens", "prompt_sweeps", "replaced", "winner_rank",
                    }  # fmt: skip
        elif file.suffix == ".safetensors":
            from safetensors.torch import load_file

            for name, tensor in load_file(file).items():
                assert tensor.is_floating_point() or name.endswith(".shifts.index"), name
    # The same search finds the words where they are allowed: it can fail.
    assert "quorvex" in str(restricted(recipe_for(csv)).questions[0].prompt)


def test_one_depth_has_nothing_to_compare(csv, model, tmp_path):
    run = capture(recipe_for(csv, depths=(1,)), model, tmp_path / "own", progress=False)
    assert run.complete
    assert run.pairs.empty
    assert run.outputs.empty
    assert {"question", "comparison", "position", "layer", "a", "b", "cosine"} <= set(run.pairs.columns)
    assert len(run.questions) == 5
    assert set(run.steps["text"]) == {"own"}
    assert run.states(0).shape == (3, 1, 32)
    assert all_comparisons(Contrast.of(run)) == {}


def test_lens_jaccard_is_measured_on_request(csv, run, replays, tmp_path, model):
    assert "lens_jaccard" not in run.pairs
    choices = Choices(overlap="lens_jaccard")
    lens = attach(model.backbone.model, model.tokenizer, ALPHA, choices)
    got = capture(recipe_for(csv, choices=choices), lens, tmp_path / "own", progress=False).pairs
    assert got.drop(columns="lens_jaccard").equals(run.pairs)
    with torch.no_grad():
        tops = {
            key: model.backbone.unembed(states).topk(100).indices for key, (_, _, states) in replays.items()
        }
    for row in got.itertuples():
        sets = [
            set(tops[row.question, text, depth][row.position, row.layer, i - 1].tolist())
            for text, depth, i in cells(row)
        ]
        expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert row.lens_jaccard == pytest.approx(expected, rel=1e-6)
    assert got["lens_jaccard"].nunique() > 10


@pytest.mark.parametrize(
    ("asked", "overlap"), [("position0", "cosine"), ("all", "lens_jaccard"), ("none", "lens_jaccard")]
)
def test_the_logit_lens_is_that_of_replay(csv, run, replays, tmp_path, model, asked, overlap):
    choices = Choices(overlap=overlap)
    recipe = recipe_for(csv, lens_tokens=asked, choices=choices)
    made = attach(model.backbone.model, model.tokenizer, ALPHA, choices)
    got = capture(recipe, made, tmp_path / "own", progress=False)
    assert (got.folder / "lens").exists() == (asked != "none")
    compared = {cell for row in run.pairs[run.pairs["layer"] == 0].itertuples() for cell in cells(row)}
    keys = run.steps[["text", "depth", "iteration"]].astype(object).apply(tuple, axis=1)
    wanted = keys.isin(compared) & ((run.steps["position"] == 0) | (asked == "all")) & (asked != "none")
    names = ["question", "text", "depth", "position", "iteration"]
    assert got.lens[names].equals(run.steps.loc[wanted, names].reset_index(drop=True))
    for row in got.lens.itertuples():
        _, _, states = replays[row.question, row.text, row.depth]
        with torch.no_grad():
            logits = model.backbone.unembed(states[row.position, :, row.iteration - 1])
        assert row.top5.tolist() == logits.topk(5).indices.flatten().tolist()


def test_one_depth_has_no_cells_to_look_into(csv, model, tmp_path):
    run = capture(recipe_for(csv, depths=(1,), lens_tokens="all"), model, tmp_path / "own", progress=False)
    assert run.lens.empty
    assert list(run.lens.columns) == ["question", "text", "depth", "position", "iteration", "top5"]


def test_what_the_recipe_asks_for_is_measured_with_a_model_handed_in(csv, tmp_path, model):
    """`overlap` changes what is recorded and not what the model does: the recipe decides."""
    recipe = recipe_for(csv, choices=Choices(overlap="lens_jaccard"))
    assert "lens_jaccard" in capture(recipe, model, tmp_path / "own", progress=False).pairs
