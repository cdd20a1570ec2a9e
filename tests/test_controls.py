"""The controls of a capture against what the model does when asked in another way.

The anchors: a true change put in as a nudge is the pass it was taken from, and a nudge is as long as it.
"""

import dataclasses
import importlib

import numpy as np
import pytest
import tiny
import tiny_run
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_capture import DEPTHS, NEW, interrupt, recipe_for, tiny_llama, word_tokenizer, write_questions

from sst_interp.analyses.contrast import Contrast
from sst_interp.analyses.precedence import precedence
from sst_interp.models.choices import Choices
from sst_interp.models.measures import compare_outputs, cosine, read_out, relative_l2
from sst_interp.models.model import attach
from sst_interp.models.solvers.sequential import advance
from sst_interp.questions import load_questions
from sst_interp.runs.controls import Controls, in_float32, spread
from sst_interp.runs.perturbations import SEEDS, perturbation_rows, perturbations_of, read_alone
from sst_interp.runs.recorder import SIGNIFICANT_BITS, significant
from sst_interp.runs.schema import TABLES

capture_module = importlib.import_module("sst_interp.runs.capture")
capture = capture_module.capture

ALPHA = 0.3
CHOSEN = [0, 1, 3]
"""Three of five, evenly spread."""
ROUNDING = 2.0 ** -(SIGNIFICANT_BITS - 1)
CHANGE = ["argmax_changed", "replaced", "winner_rank", "kl"]
FAMILY_CHOICES = [
    Choices(),
    Choices(kv="first"),
    Choices(carry="ffn_output"),
    Choices(blend="additive"),
    Choices(prompt="blend_off"),
    Choices(prompt="two_pass"),
]


def _other_than_default(choices):
    return [str(v) for k, v in choices.to_dict().items() if v != getattr(Choices(), k)] or ["defaults"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "words.csv")


@pytest.fixture(scope="module")
def model():
    """Its texts end at different positions: any of twenty-one tokens ends one."""
    made = attach(tiny_llama(), word_tokenizer(), ALPHA, name="tiny")
    made.backbone.model.generation_config.eos_token_id = [2, *range(40, 60)]
    return made


@pytest.fixture(scope="module")
def run(csv, model, tmp_path_factory):
    recipe = recipe_for(csv, controls=len(CHOSEN), keep="all")
    return capture(recipe, model, tmp_path_factory.mktemp("runs") / "own", progress=False)


@pytest.fixture(scope="module")
def texts(csv, model, run):
    """{question: (prompt, the tokens that depth 1 wrote)}."""
    questions = load_questions(str(csv), instruction="").questions
    steps = run.steps[(run.steps["depth"] == 1) & (run.steps["text"] == "own")]
    return {
        q: (model.chat(questions[q].prompt), rows["token"].tolist()) for q, rows in steps.groupby("question")
    }


def replay(model, prompt, text, depth):
    """(logits [position, iteration, vocab], states [position, layer, iteration, d_model])."""
    seen = model.replay([prompt + text[:-1]], iterations=depth, start=len(prompt) - 1, tolerance=1e-13)
    return seen.logits[0], seen.resid_post[0]


def nudges(run, **where):
    rows = run.nudges
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows.reset_index(drop=True)


def close(found, expected):
    """Equal but for the rounding of the tables."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return np.allclose(found, expected, rtol=2 * ROUNDING, atol=1e-12)


# Which questions, which rows


def test_the_questions_are_spread_and_their_positions_are_those_of_depth_1s_text(run, texts):
    lengths = {q: len(text) for q, (_, text) in texts.items()}
    assert len(set(lengths.values())) > 1, "otherwise the end of a text is not seen"
    assert sorted(run.noise["question"].unique()) == sorted(run.nudges["question"].unique()) == CHOSEN
    for q in CHOSEN:
        noise = run.noise[run.noise["question"] == q]
        keys = noise.groupby(["kind", "depth", "position", "layer"], observed=True).size()
        assert (keys == 1).all()
        assert len(keys) == 2 * 2 * lengths[q] * 3
        assert set(noise["depth"]) == {1, DEPTHS[-1]}
        assert set(noise["position"]) == set(range(lengths[q]))
        rows = run.nudges[run.nudges["question"] == q]
        elsewhere = min(SEEDS, lengths[q] - 1)
        per_change = 1 + SEEDS + elsewhere
        changes = 2 * (len(DEPTHS) - 1) + 2  # output: every b of both comparisons; stream: the deepest
        assert len(rows) == lengths[q] * changes * per_change
        assert (rows["a"] == 1).all()
        assert set(rows["comparison"].unique()) == {"teacher_forced", "within"}


@given(st.integers(0, 40), st.integers(1, 40))
def test_spread_is_even(n, of):
    chosen = sorted(spread(n, of))
    assert len(chosen) == min(n, of)
    assert set(chosen) <= set(range(of))
    gaps = np.diff([*chosen, of + (chosen[0] if chosen else 0)])
    assert len(gaps) <= 1 or gaps.max() - gaps.min() <= 1


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(FLOATS, FLOATS)
def test_rounding_is_small_monotone_and_done_once(x, y):
    a, b = significant(np.array([x, y]))
    assert abs(a - x) <= ROUNDING / 2 * abs(x)
    assert significant(np.array([a]))[0] == a
    assert (x <= y) <= (a <= b)
    assert list(significant(np.array([0.0, np.inf]))) == [0, np.inf]
    assert np.isnan(significant(np.array([np.nan]))[0])


# The noise floor


def test_noise_is_against_the_captured_states(run):
    """Its norm_a is that of `pairs`, at depth 1 and at the deepest."""
    pairs = run.pairs[(run.pairs["comparison"] == "teacher_forced") & (run.pairs["b"] == DEPTHS[-1])]
    pairs = pairs.set_index(["question", "position", "layer"])
    for depth, norm in ((1, "norm_a"), (DEPTHS[-1], "norm_b")):
        for kind in ("batch", "fp32"):
            rows = run.noise[(run.noise["kind"] == kind) & (run.noise["depth"] == depth)]
            at = list(rows[["question", "position", "layer"]].itertuples(index=False, name=None))
            assert close(rows["norm_a"], pairs.loc[at, norm])


def test_in_float64_another_batch_shape_is_no_difference_and_float32_is_its_rounding(run):
    batch, single = (run.noise[run.noise["kind"] == kind] for kind in ("batch", "fp32"))
    assert batch["relative_l2"].max() < 1e-13
    assert single["relative_l2"].min() > 1e-9
    assert single["relative_l2"].max() < 1e-5
    assert (single["cosine"] > 1 - 1e-6).all()


def test_float32_rows_are_the_model_in_float32(run, model, texts):
    twin = in_float32(model)
    single = attach(twin.backbone.model, model.tokenizer, twin.alpha)
    assert model.backbone.dtype == torch.float64, "the model itself stays what it is"
    for depth in (1, DEPTHS[-1]):
        for q in CHOSEN:
            prompt, text = texts[q]
            _, states = replay(single, prompt, text, depth)
            rows = run.noise[(run.noise["question"] == q) & (run.noise["kind"] == "fp32")]
            norms = rows[rows["depth"] == depth]["norm_b"].to_numpy().reshape(len(text), 3)
            assert close(norms, states[:, :, -1].norm(dim=-1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_low_precision_has_a_floor(csv, tmp_path, dtype):
    model = attach(tiny_llama(getattr(torch, dtype)), word_tokenizer(), ALPHA)
    run = capture(recipe_for(csv, dtype=dtype, controls=2), model, tmp_path / "own", progress=False)
    kinds = run.noise.groupby("kind", observed=True)["relative_l2"].median()
    if dtype == "float32":
        assert list(kinds.index) == ["batch"]
        assert kinds["batch"] < 1e-6
    else:
        assert 2**-12 < kinds["fp32"] < 2**-4
        assert 0 <= kinds["batch"] < 2**-4
        roundings = run.noise[run.noise["kind"] == "fp32"]["bf16_ratio"].median()
        assert 0.1 < roundings < 10


# Nudges


def test_a_true_change_of_the_output_is_what_the_run_says_of_teacher_forced(run):
    outputs = run.outputs[run.outputs["comparison"] == "teacher_forced"].set_index(
        ["question", "position", "b"]
    )
    rows = nudges(run, comparison="teacher_forced", site="output", direction="true")
    assert set(rows["b"]) == set(DEPTHS[1:])
    at = list(rows[["question", "position", "b"]].itertuples(index=False, name=None))
    for column in CHANGE:
        assert np.allclose(
            rows[column].astype(float), outputs.loc[at, column].astype(float), rtol=1e-3, atol=1e-9
        )
    pairs = run.pairs[(run.pairs["comparison"] == "teacher_forced") & (run.pairs["layer"] == 2)]
    pairs = pairs.set_index(["question", "position", "b"]).loc[at]
    assert close(np.concatenate(rows["cosine"].to_list()), pairs["cosine"])
    assert close(np.concatenate(rows["relative_l2"].to_list()), pairs["relative_l2"])
    assert close(rows["size"], pairs["relative_l2"])


def test_within_true_changes_are_the_iterations_at_both_sites(run, model, texts):
    deepest = DEPTHS[-1]
    for q in CHOSEN:
        logits, states = replay(model, *texts[q], deepest)
        for b in range(2, deepest + 1):
            change = compare_outputs(read_out(logits[:, 0]), read_out(logits[:, b - 1]))
            for site in ("output", "stream") if b == deepest else ("output",):
                rows = nudges(run, question=q, comparison="within", site=site, direction="true", b=b)
                assert rows["position"].tolist() == list(range(len(logits)))
                for column, expected in change._asdict().items():
                    assert np.allclose(rows[column].astype(float), expected.double(), rtol=1e-3, atol=1e-9)
        a, b = states[:, :, 0], states[:, :, -1]
        stream = nudges(run, question=q, comparison="within", site="stream", direction="true")
        assert close(np.stack(stream["cosine"].to_list()), cosine(a, b))
        assert close(np.stack(stream["relative_l2"].to_list()), relative_l2(a, b))


def test_replayed_stream_is_depth_1s_pass_handed_the_deep_state(run, model, texts):
    """Done again by hand: depth 1 up to the position, its state replaced, one more token."""
    deepest = DEPTHS[-1]
    for q in CHOSEN[:2]:
        prompt, text = texts[q]
        tokens = torch.tensor([prompt + text])
        streams = [model.new_stream(torch.tensor([0]), tokens.shape[1]) for _ in range(2)]
        for stream in streams:
            model.prefill(stream, tokens[:, : len(prompt) - 1])
        one, deep = streams
        rows = nudges(run, question=q, comparison="teacher_forced", site="stream", direction="true")
        for position, row in zip(range(len(text)), rows.itertuples(), strict=True):
            token = tokens[:, one.column]
            own = one.state.clone()
            with torch.no_grad():
                [seen] = advance(model, one, token, 1)
                after = one.state.clone()
                thought = advance(model, deep, token, deepest)
                one.state, one.column = thought[deepest - 2].resid_post.clone(), one.column - 1
                [handed] = advance(model, one, token, 1)
                one.state, one.column = own, one.column - 1
                advance(model, one, token, 1)  # depth 1 goes on as it was
            assert torch.equal(one.state, after)
            assert row.position == position
            a, b = seen.resid_post[:, 0], handed.resid_post[:, 0]
            assert close(row.relative_l2, relative_l2(a, b))
            logits = model.backbone.unembed(torch.stack([a[-1], b[-1]]))
            change = compare_outputs(*(read_out(x[None]) for x in logits.detach()))
            assert row.argmax_changed == bool(change.argmax_changed)
            assert row.kl == pytest.approx(float(change.kl), rel=1e-3, abs=1e-9)


def test_replayed_stream_is_depth_b_only_where_the_cache_is_the_same(run):
    """At position 0 the cache is the prompt's; later it is deeper at depth b."""
    stream = nudges(run, comparison="teacher_forced", site="stream", direction="true")
    output = nudges(run, comparison="teacher_forced", site="output", direction="true", b=DEPTHS[-1])
    first = stream["position"] == 0
    assert np.allclose(stream["kl"][first], output["kl"][first], rtol=1e-3)
    assert not np.allclose(stream["kl"][~first], output["kl"][~first], rtol=1e-2)


def test_nudges_are_as_large_as_the_true_change_and_point_elsewhere(run):
    for comparison in ("teacher_forced", "within"):
        for b in DEPTHS[1:]:
            rows = nudges(run, comparison=comparison, site="output", b=b)
            rows["moved"] = np.concatenate(rows["relative_l2"].to_list())
            assert close(rows["moved"], rows["size"])
            spread_of = rows.groupby(["question", "position"])["moved"].agg(lambda v: v.max() / v.min() - 1)
            assert (spread_of < 2 * ROUNDING).all()
            cosines = np.concatenate(rows["cosine"].to_list())
            assert len(np.unique(cosines)) > len(rows) / 2
    sizes = nudges(run, site="stream").groupby(["question", "comparison", "position"], observed=True)["size"]
    assert (sizes.nunique() == 1).all()


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(0, 3))
def test_every_nudge_has_the_norms_of_the_change(positions, key):
    change = torch.randn(3, positions, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(key))
    change[1, 0] = 0
    found = list(perturbations_of(change, (key,)))
    assert [(n.direction, n.seed) for n in found] == [
        *(("random", k) for k in range(SEEDS)),
        *(("elsewhere", k) for k in range(min(SEEDS, positions - 1))),
    ]
    unit = torch.nn.functional.normalize(change, dim=-1)
    for nudge in found:
        norms = nudge.n.norm(dim=-1)
        assert torch.allclose(norms[:, nudge.there], change.norm(dim=-1)[:, nudge.there])
        if nudge.direction == "elsewhere":
            towards = torch.nn.functional.normalize(nudge.n, dim=-1)
            alike = torch.einsum("lpd,lqd->lpq", towards, unit)
            where = alike[0].argmax(dim=1)
            assert torch.allclose(alike[0].max(dim=1).values, torch.ones(positions, dtype=torch.float64))
            assert (where != torch.arange(positions)).all()
            assert (
                nudge.there.sum() == positions - 1
            )  # the one that would point where nothing changed is none
    again = list(perturbations_of(change, (key,)))
    assert all(torch.equal(a.n, b.n) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0].n, next(perturbations_of(change, (key, "other"))).n)


def test_random_directions_are_isotropic():
    change = torch.ones(2, 50, 400, dtype=torch.float64)
    for nudge in perturbations_of(change, (0,)):
        along = torch.nn.functional.cosine_similarity(nudge.n, change, dim=-1)
        if nudge.direction == "random":
            assert along.mean().abs() < 4 / np.sqrt(100 * 400)
            assert along.std().item() == pytest.approx(400**-0.5, rel=0.3)


def test_where_nothing_changes_a_nudge_changes_nothing(csv, tmp_path):
    """Without a blend depth 4 is depth 1: nudges have no length."""
    model = attach(tiny_llama(), word_tokenizer(), 0.0)
    run = capture(recipe_for(csv, controls=2), model, tmp_path / "own", progress=False)
    within = run.nudges[(run.nudges["comparison"] == "within") & (run.nudges["site"] == "output")]
    assert (within["size"] < 1e-12).all()
    assert not within["argmax_changed"].any()
    assert (np.concatenate(within["relative_l2"].to_list()) < 1e-12).all()
    stream = run.nudges[run.nudges["site"] == "stream"]
    assert (stream["size"] > 0).all(), "another state is handed in"
    assert not stream["argmax_changed"].any(), "and not looked at"
    assert (np.concatenate(stream["relative_l2"].to_list()) == 0).all()


@pytest.mark.parametrize("choices", FAMILY_CHOICES, ids=lambda c: " ".join(_other_than_default(c)))
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_true_state_handed_in_gives_the_iteration_for_all_choices(family, choices):
    """At positions that are handed a state at all, also behind a sliding window."""
    model = attach(tiny.tiny(family), None, 0.2, choices)
    prompt, text, depth = tiny.prompts()[0], [5, 9, 33, 70, 8, 21, 4], 3
    alone = read_alone(model, prompt, text, (1, 2, depth))
    logits, states = replay(model, prompt, text, depth)
    assert relative_l2(states[:, :, -1], alone.resid_post[depth]).max() < 1e-9
    pieces = [p for p in perturbation_rows(model, alone, 0, 0) if set(p["direction"]) == {"true"}]
    [piece] = [p for p in pieces if set(p["site"]) == {"stream"} and set(p["comparison"]) == {"within"}]
    first = 1 if choices.prompt == "blend_off" else 0
    assert piece["position"].tolist() == list(range(first, len(text)))
    change = compare_outputs(read_out(logits[first:, 0]), read_out(logits[first:, -1]))
    assert np.allclose(piece["kl"], change.kl, rtol=1e-6, atol=1e-12)
    assert piece["argmax_changed"].tolist() == change.argmax_changed.tolist()
    expected = relative_l2(states[first:, :, 0], states[first:, :, -1])
    assert np.allclose(piece["relative_l2"], expected, rtol=1e-6, atol=1e-9)


def test_reading_alone_leaves_the_model_and_its_own_stream_as_they_were(model):
    """Nudged passes store nothing: what stands in the cache is what the reading left there."""
    alone = read_alone(model, [5, 6, 7, 8], [9, 10, 11], (1, 3))
    before = [k.clone() for k in alone.reading.stream.kv.keys], alone.reading.stream.state.clone()
    first = list(perturbation_rows(model, alone, 0, 0))
    assert all(map(torch.equal, alone.reading.stream.kv.keys, before[0]))
    assert torch.equal(alone.reading.stream.state, before[1])
    for a, b in zip(first, perturbation_rows(model, alone, 0, 0), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_one_position_has_nowhere_else_to_take_a_direction_from(model):
    alone = read_alone(model, [5, 6, 7, 8], [9], (1, 2))
    pieces = list(perturbation_rows(model, alone, 0, 0))
    assert {d for p in pieces for d in p["direction"]} == {"true", "random"}


def test_one_depth_has_a_floor_and_nothing_to_nudge(csv, model, tmp_path):
    run = capture(recipe_for(csv, depths=(1,), controls=2), model, tmp_path / "own", progress=False)
    assert set(run.noise["depth"]) == {1}
    assert run.nudges.empty
    assert list(run.nudges.columns) == TABLES["nudges"].names


def test_precedence_reads_them(run):
    outputs = run.outputs[(run.outputs["comparison"] == "teacher_forced") & (run.outputs["b"] == DEPTHS[-1])]
    pairs = run.pairs[(run.pairs["comparison"] == "teacher_forced") & (run.pairs["b"] == DEPTHS[-1])]
    lowest = pairs.groupby(["question", "position"])["cosine"].min()
    threshold = float(lowest.median())
    found = precedence(Contrast.of(run, "teacher_forced", threshold=threshold))
    rows = found.beside_perturbations.set_index(["site", "direction", "where"])
    at = list(outputs[["question", "position"]].itertuples(index=False, name=None))
    shifted = (lowest.loc[at] < threshold).to_numpy()
    chosen = outputs["question"].isin(CHOSEN).to_numpy()
    for where, mask in (("shifted", shifted), ("stable", ~shifted)):
        assert rows["positions"]["output", "true", where] == np.sum(chosen & mask) > 0
        share = outputs["argmax_changed"].to_numpy()[chosen & mask].mean()
        assert rows["changed"]["output", "true", where] == pytest.approx(share)
    assert len(precedence(Contrast.of(run, "within", threshold=0.9)).beside_perturbations)


# As the rest of a run


def test_controls_change_nothing_else(run, csv, model, tmp_path):
    without = capture(recipe_for(csv, keep="all"), model, tmp_path / "own", progress=False)
    assert without.noise.empty
    assert without.nudges.empty
    for table in ("questions", "steps", "outputs", "pairs"):
        assert without.table(table).equals(run.table(table))


def test_controls_do_not_depend_on_the_batches(run, csv, model, tmp_path):
    """In one batch three questions of different length are read in float32 side by side."""
    other = capture(recipe_for(csv, controls=3, batch_size=5), model, tmp_path / "own", progress=False)
    for name in ("question", "comparison", "position", "b", "site", "direction", "seed", "argmax_changed"):
        assert other.nudges[name].equals(run.nudges[name])
    assert close(other.nudges["kl"], run.nudges["kl"])
    for name in ("question", "kind", "depth", "position", "layer"):
        assert other.noise[name].equals(run.noise[name])
    for name in ("norm_a", "norm_b"):
        assert close(other.noise[name], run.noise[name])


def test_the_recipes_seed_decides_the_directions(model):
    alone = read_alone(model, [5, 6, 7, 8], [9, 10, 11], (1, 3))

    def kl(question, seed, direction):
        pieces = perturbation_rows(model, alone, question, seed)
        return np.concatenate([p["kl"] for p in pieces if p["direction"][0] == direction])

    assert np.array_equal(kl(0, 0, "random"), kl(0, 0, "random"))
    assert not np.array_equal(kl(0, 0, "random"), kl(0, 1, "random"))
    assert not np.array_equal(kl(0, 0, "random"), kl(1, 0, "random"))
    assert np.array_equal(kl(0, 0, "true"), kl(1, 1, "true"))


@pytest.mark.parametrize(("name", "call"), [("perturbation_rows", 2), ("in_float32", 0)])
def test_killed_within_the_controls_and_resumed_is_uninterrupted(run, csv, model, tmp_path, name, call):
    recipe = recipe_for(csv, controls=len(CHOSEN), keep="all")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, importlib.import_module("sst_interp.runs.controls"), name, call)
        with pytest.raises(KeyboardInterrupt):
            capture(recipe, model, tmp_path / "own", progress=False)
    capture(recipe, model, tmp_path / "own", progress=False)
    assert tiny_run.contents(tmp_path / "own") == tiny_run.contents(run.folder)


def test_more_controls_are_another_run(run, csv, model):
    with pytest.raises(Exception, match="controls = 3; the recipe now says 4"):
        capture(recipe_for(csv, controls=4, keep="all"), model, run.folder, progress=False)


def test_controls_of_restricted_questions_name_no_token(csv, model, tmp_path, monkeypatch):
    real = capture_module.questions_of

    def restricted(*args, **kwargs):
        return dataclasses.replace(real(*args, **kwargs), restricted=True)

    monkeypatch.setattr(capture_module, "questions_of", restricted)
    run = capture(recipe_for(csv, controls=5), model, tmp_path / "own", progress=False)
    assert run.nudges["question"].nunique() == 5
    for table in (run.noise, run.nudges):
        whole = {c for c in table.columns if table[c].dtype.kind in "iu"}
        assert whole <= {
            "question",
            "depth",
            "position",
            "layer",
            "a",
            "b",
            "seed",
            "replaced",
            "winner_rank",
        }
    for file in (tmp_path / "own").rglob("*.parquet"):
        assert b"quorvex" not in file.read_bytes()


def test_the_bar_ends_where_it_said(csv, model, tmp_path, capsys):
    capture(recipe_for(csv, controls=2), model, tmp_path / "own", progress=True)
    total = (3 + 2) * NEW
    assert f"{total}/{total}" in capsys.readouterr().err


def test_a_batch_without_controlled_questions_is_not_watched(model, csv):
    controls = Controls(model, recipe_for(csv, controls=2), 5)
    assert controls.chosen == {0, 2}
    assert controls.watch(0, [1, 3]) is None
    assert controls.watch(0, [3, 2]).questions == [2]
    assert Controls(model, recipe_for(csv), 5).chosen == frozenset()
