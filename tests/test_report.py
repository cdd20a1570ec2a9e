import base64
import gzip
import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic_run
from synthetic_outputs import outputs_table, steps_table

from sst_interp.analyses import Result
from sst_interp.analyses.plots import empty_figure
from sst_interp.errors import SSTError
from sst_interp.findings.ledger import claims
from sst_interp.findings.report.explorer import Threshold, explorer_data
from sst_interp.findings.report.packing import (
    DISTANCE,
    OUTPUT,
    SIZE,
    Places,
    Vocabulary,
    implied_l2,
    lens_arrays,
    pack,
)
from sst_interp.findings.report.page import render_report, script_json, visible, write_report
from sst_interp.findings.report.question import question_view
from sst_interp.findings.report.sections import split_verdict
from sst_interp.models.choices import COMPARISONS, Choices

SMALL = {"questions": 8, "positions": 6, "layers": 4}
HOSTILE = [
    "<script>window.hacked = 1</script>",
    '"\'><img src=x onerror="window.hacked = 2">',
    "</script><script>window.hacked = 3</script>",
    "right\u202eto left",
    "nul\0 and bell\a",
    "line\u2028separator",
    "{{ 7 * 7 }}",
    "a very long record id " * 20,
]
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
]  # fmt: skip


THRESHOLDS = {c: Threshold(0.95, "given", 1, 4) for c in COMPARISONS}


def full_run(**options):
    """A synthetic run with outputs and steps."""
    run = synthetic_run(seed=1, **(SMALL | options))
    if len(run.pairs):
        run.outputs = outputs_table(run.pairs)
        run.steps = steps_table(run.outputs)
    return run


def with_tokens(run):
    """The run with made-up token ids in it; token 3 is hostile."""
    rng = np.random.default_rng(0)
    run.steps["top100"] = [rng.permutation(120)[:100].astype("int32") for _ in range(len(run.steps))]
    run.steps["token"] = [int(row[0]) for row in run.steps["top100"]]
    run.steps["argmax"] = run.steps["token"]
    run.manifest = {"provenance": {"restricted": False}}
    return run


def with_lens(run, positions):
    """The run, with tokens, and a made-up logit lens at `positions`; token 0 is hostile and leads layer 0."""
    run = with_tokens(run)
    rng = np.random.default_rng(1)
    run.lens = run.steps[run.steps["position"].isin(positions)].drop(columns=["token", "argmax", "top100"])
    tops = [np.array([rng.permutation(120)[:5] for _ in range(4)]) for _ in range(len(run.lens))]
    for top in tops:
        top[0, 0] = 0
    run.lens["top5"] = [top.ravel().astype("int32") for top in tops]
    return run


def lens_of(run, question, position, n):
    """[layer, 5] token ids of a state of `within`."""
    rows = run.lens[(run.lens["question"] == question) & (run.lens["position"] == position)]
    rows = rows[(rows["text"] == "own") & (rows["depth"] == 4) & (rows["iteration"] == n)]
    return rows["top5"].iloc[0].reshape(4, 5)


class Tokenizer:
    """Token i is `HOSTILE[i]`, or its number."""

    def batch_decode(self, ids, skip_special_tokens):
        return [HOSTILE[i] if i < len(HOSTILE) else f" word{i}" for (i,) in ids]


@pytest.fixture(scope="module")
def run():
    return full_run()


@pytest.fixture(scope="module")
def ledger(run):
    return claims(run, resamples=50)


@pytest.fixture(scope="module")
def brief(ledger):
    """The ledger with two analyses only: drawing figures is most of the time."""
    kept = ("basin_shifts.teacher_forced", "basin_shifts.free_running", "token_replacement.teacher_forced")
    return replace(ledger, results={name: ledger.results[name] for name in kept}, missing={})


@pytest.fixture(scope="module")
def page(run, ledger):
    return render_report(run, ledger)


def unpack(block):
    """What `pack` was given, flat: the page's `unpack.js` in Python."""
    data, found, start = gzip.decompress(base64.b64decode(block["gz"])), {}, 0
    for name, length, size in block["arrays"]:
        planes = np.frombuffer(data, np.uint8, length * size, start).reshape(size, length)
        found[name] = np.ascontiguousarray(planes.T).view(f"<u{size}").ravel()
        start += length * size
    return found


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def inflated(text):
    return gzip.decompress(base64.b64decode(text)).decode()


def without_scripts(page):
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_everything_is_in_the_file_and_only_two_scripts_may_run(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    scripts = [*re.findall(r"<script>(.*?)</script>", page, re.S), inflated(embedded(page)["plotly"])]
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    sources = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"script-src {sources};" in policy
    assert not re.search(r'(src|href)="(?!#|data:,)', without_scripts(page))


def test_the_same_run_gives_the_same_bytes(run, ledger, page, tmp_path):
    path = write_report(run, tmp_path / "new folder" / "report.html", ledger)
    assert path.read_bytes() == page.encode()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_every_claim_verdict_control_choice_and_missing_analysis_is_on_the_page(ledger, page):
    text = page.replace("&#39;", "'").replace("&#34;", '"').replace("&gt;", ">").replace("&lt;", "<")
    for row in ledger.rows:
        for words in (
            row.claim.words,
            row.claim.paper,
            row.claim.rule,
            row.finding.here,
            row.finding.control,
        ):
            assert visible(words) in text
    assert len(re.findall('class="chip', text)) >= len(ledger.rows)
    for result in ledger.results.values():
        first, rest = split_verdict(result.verdict)
        assert first in text
        assert rest in text
    for why in ledger.missing.values():
        assert why in text
    for name in Choices().to_dict():
        assert f'<th scope="row">{name}</th>' in text
    assert "2.13.0" in text
    assert 'checkpoint = "tiny-random"' in text


def test_comparisons_go_by_their_words(page):
    text = without_scripts(page)
    words = {"teacher_forced": "teacher-forced", "within": "within", "free_running": "free-running"}
    assert dict(re.findall(r'data-comparison="(\w+)"[^>]*>([^<]+)<', text)) == words
    assert set(re.findall(r'data-label="([^"]+)"', text)) == {"paper", "this run", "grade"}
    shown = {c["comparison"]: c["words"] for c in embedded(page)["explorer"]["comparisons"]}
    assert shown == words


def test_a_verdict_is_split_after_its_first_sentence():
    assert split_verdict("14.2% [1, 2] fell below 0.99. The rest, of C1.") == (
        "14.2% [1, 2] fell below 0.99.",
        "The rest, of C1.",
    )
    assert split_verdict("one sentence, with 0.5 in it.") == ("one sentence, with 0.5 in it.", "")


def test_downloads_are_the_tables(ledger, page):
    tables = json.loads(inflated(embedded(page)["tables"]))
    texts = {table["name"]: table["text"] for table in tables.values()}
    assert texts["claims"] == ledger.table.to_csv(index=False)
    for key, result in ledger.results.items():
        assert texts[key.replace(".", "-")] == result.table.to_csv(index=False)


def test_the_name_of_the_machine_is_not_on_the_page(run, brief):
    session = {"host": "secret-machine", "started": "2026-01-01"}
    page = render_report(replace(run, manifest={"sessions": [session], "state": "complete"}), brief)
    assert "2026-01-01" in page
    assert "secret-machine" not in page


def test_headings_are_in_order(page):
    levels = [int(h) for h in re.findall(r"<h([1-6])", re.sub(r"<script.*?</script>", "", page, flags=re.S))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_hostile_text_is_text(brief):
    run = with_tokens(full_run(name="<script>alert(1)</script>", ids=HOSTILE))
    run.manifest |= {"<b>key</b>": {"x\u202e": ["</script>", "\0", "lone \udc80 surrogate"]}}
    run.recipe.checkpoint = '"><svg onload=alert(1)>'
    page = render_report(run, brief, Tokenizer())
    assert "<h1><bdi>&lt;script&gt;alert(1)&lt;/script&gt;</bdi></h1>" in page
    assert page.count("<script") == 2
    assert "<svg" not in without_scripts(page)
    body = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    for character in "\0\a\u202e\u2028\udc80":
        assert character not in body
    shown = embedded(page)["explorer"]
    assert shown["questions"][3]["id"] == "right\\u202eto left"
    assert shown["tokens"]["texts"][shown["tokens"]["ids"].index(3)] == "right\\u202eto left"


def test_a_restricted_run_shows_no_tokens_whatever_its_tables_hold(brief):
    run = with_lens(full_run(), [0])
    for manifest in ({"provenance": {"restricted": True}}, {}):
        data = embedded(render_report(replace(run, manifest=manifest), brief, Tokenizer()))["explorer"]
        assert data["tokens"] is None
        names = [name for c in data["comparisons"] for name, _, _ in c["block"]["arrays"]]
        assert not [n for n in names if n.startswith(("top", "token", "entered", "left", "lens"))]


def test_escapes():
    assert visible("a\0b\u202ec\nd") == "a\\u0000b\\u202ec\\u000ad"
    assert visible("a\nb", lines=True) == "a\nb"
    assert visible("déjà vu 北京 ±") == "déjà vu 北京 ±"
    text = script_json({"x": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"x": "</script><!-- & \u2028"}


@pytest.mark.parametrize("decimals", [DISTANCE, SIZE, OUTPUT])
def test_a_code_is_the_number_rounded_to_its_digits(decimals):
    rng = np.random.default_rng(0)
    numbers = 10 ** rng.uniform(decimals.low, decimals.high - 0.01, 2000)
    rounded = [float(f"{x:.{decimals.digits}g}") for x in numbers]
    assert decimals.numbers(decimals.codes(numbers)).tolist() == rounded
    edge = decimals.numbers(decimals.codes(np.array([np.nan, 0, -1, 10.0**decimals.low, 1e30])))
    assert np.isnan(edge[0])
    assert edge[1:].tolist() == [0, 0, 10.0**decimals.low, decimals.values[-1]]


def test_unpack_undoes_pack():
    arrays = {
        "a": np.arange(5, dtype=np.uint8),
        "b": np.array([0, 1, 255, 256, 65535], dtype=np.uint16),
        "none": np.zeros(0, dtype=np.uint16),
        "c": np.array([2**32 - 1, 7], dtype=np.uint32),
    }
    found = unpack(pack(arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].tolist() == array.tolist()


def test_the_explorers_cells_are_the_tables_rows_rounded():
    run = full_run()
    run.pairs = run.pairs[~((run.pairs["question"] == 2) & (run.pairs["position"] >= 4))]
    data = explorer_data(run, THRESHOLDS)
    for shown in data["comparisons"]:
        arrays = {name: array.astype(np.int64) for name, array in unpack(shown["block"]).items()}
        cosine, norm_a = arrays["cosine.1.4"], arrays["norm.1"]
        norm_b = (arrays["norm.4"] + norm_a) % 65536
        relative = (arrays["relative_l2.1.4"] + implied_l2(cosine, norm_a, norm_b)) % 65536
        lengths = shown["lengths"]
        assert lengths == [6, 6, 4, *[6] * 5]
        rows = run.pairs[run.pairs["comparison"] == shown["comparison"]]
        for row in rows.itertuples():
            at = 4 * sum(lengths[: row.question]) + row.layer * lengths[row.question] + row.position
            assert DISTANCE.numbers(cosine[at]) == pytest.approx(float(f"{1 - float(row.cosine):.2g}"))
            assert DISTANCE.numbers(relative[at]) == pytest.approx(float(f"{row.relative_l2:.2g}"))
            assert SIZE.numbers(norm_b[at]) == pytest.approx(float(f"{row.norm_b:.2g}"))
        below = rows[rows["cosine"] < 0.95].groupby("question").size().reindex(range(8), fill_value=0)
        assert [n for n, _ in shown["shifted"]] == below.tolist()
        lowest = rows.loc[rows["cosine"].idxmin()]
        assert shown["lowest"][0] == [lowest["question"], lowest["position"], lowest["layer"]]


def test_a_large_run_embeds_the_first_questions_and_says_so(run):
    whole = len(json.dumps(explorer_data(run, THRESHOLDS)))
    for largest in (whole - 1, whole // 2):
        data = explorer_data(run, THRESHOLDS, largest=largest)
        kept = len(data["questions"])
        assert 1 < kept < 8
        assert len(json.dumps(data)) <= largest
        assert data["left_out"] == 8 - kept
        assert [c["lengths"] for c in data["comparisons"]] == [[6] * kept] * 3
    assert len(explorer_data(run, THRESHOLDS, largest=1)["questions"]) == 1


def test_tokens_that_entered_and_left_are_those_of_the_two_lists():
    run = with_tokens(full_run(comparisons=("within",)))
    data = explorer_data(run, THRESHOLDS, Tokenizer())
    arrays, ids = unpack(data["comparisons"][0]["block"]), [None, *data["tokens"]["ids"]]
    steps = run.steps[(run.steps["text"] == "own") & (run.steps["depth"] == 4)]
    at = (steps["question"] == 5) & (steps["position"] == 2)
    before, after = (steps[at & (steps["iteration"] == i)]["top100"].iloc[0].tolist() for i in (1, 4))
    place = 5 * 6 + 2
    assert [ids[k] for k in arrays["top.4"].reshape(-1, 10)[place]] == after[:10]
    entered = [(ids[t], r - 1) for t, r in zip(*_moved(arrays, "entered", place), strict=True)]
    assert entered == [(t, k) for k, t in enumerate(after) if t not in before][:8]
    left = [(ids[t], r - 1) for t, r in zip(*_moved(arrays, "left", place), strict=True)]
    assert left == [(t, k) for k, t in enumerate(before) if t not in after][:8]


def unchained(arrays, names):
    """Arrays that were stored as differences to the one before."""
    return dict(zip(names, np.cumsum([arrays[n] for n in names], axis=0, dtype=np.uint32), strict=True))


def test_the_explorers_lens_is_the_tables():
    run = with_lens(full_run(), [0, 3])
    data = explorer_data(run, THRESHOLDS, Tokenizer())
    ids = np.array([-1, *data["tokens"]["ids"]])
    [shown] = [c for c in data["comparisons"] if c["comparison"] == "within"]
    arrays = unpack(shown["block"])
    lens = unchained(arrays, ["lens.1", "lens.4"])
    for question in range(8):
        for position in range(6):
            row = int(arrays["lens_row"][6 * question + position])
            assert (row > 0) == (position in (0, 3))
            for n in (1, 4) if row else ():
                there = ids[lens[f"lens.{n}"].reshape(-1, 4, 5)[row - 2]]
                assert (there == lens_of(run, question, position, n)).all()


def test_position_0_of_every_question_goes_before_the_rest_of_any():
    run = with_lens(full_run(), range(6))
    pairs = run.pairs[run.pairs["comparison"] == "within"]
    places = Places(np.arange(8), np.full(8, 6), np.arange(4))
    assert len(pairs) == 8 * 6 * 4
    passes = {1: run.lens[(run.lens["text"] == "own") & (run.lens["depth"] == 1)]}
    rows = lens_arrays(passes, places, Vocabulary(), largest=10 * 4 * 5)["lens_row"].reshape(8, 6)
    assert sorted(rows[rows >= 2].tolist()) == list(range(2, 12))
    assert (rows[:, 0] >= 2).all()
    assert (rows[0, :3] >= 2).all()
    assert (rows[1:, 1:] == 1).all()


def _moved(arrays, which, place):
    return (arrays[f"{which}{part}.1.4"].reshape(-1, 8)[place].tolist() for part in ("", "_rank"))


def test_a_full_size_run_stays_small():
    run = synthetic_run(questions=33, positions=64, layers=30, comparisons=("teacher_forced",), seed=1)
    shown = script_json(explorer_data(run, THRESHOLDS))
    # Made-up norms are independent noise; those of a real run cost half (measured: 2.5 bytes a row in all).
    assert len(shown) / len(run.pairs) < 3.8


def test_a_question_by_index_or_id_shows_itself_only(run, tmp_path):
    view = question_view(run, "record-3", threshold=0.95)
    assert (view.question, view.id) == (3, "record-3")
    assert view.table["question"].unique().tolist() == [3]
    overlap = view.map("within").overlap
    row = view.table[(view.table["comparison"] == "within") & (view.table["position"] == 2)].iloc[1]
    assert overlap.loc[2, 1] == pytest.approx(row["cosine"])
    assert view.figure().data[0].z.shape == (4, 6)
    assert "record-4" not in view.html
    assert view.write(tmp_path / "q.html").read_text() == view.html
    frame = view._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!doctype html')
    assert 'sandbox="allow-scripts"' in frame
    for wrong in ("record-33", 99):
        with pytest.raises(SSTError, match=f"no question {wrong}|unknown question|{wrong}"):
            question_view(run, wrong)


def test_what_cannot_be_tested_is_said():
    few = full_run(comparisons=("teacher_forced",), questions=3, positions=4, layers=2)
    page = render_report(few, claims(few, resamples=20))
    assert "Not testable in free-running: the run has no pairs of comparison &#39;free_running&#39;." in page
    assert page.count('<span data-panel="free_running">Not testable in this comparison.</span>') == 3
    empty = synthetic_run(comparisons=(), questions=3)
    data = embedded(render_report(empty, claims(empty, resamples=20)))
    assert data["explorer"]["comparisons"] == []


@dataclass(frozen=True)
class Other(Result):
    @property
    def table(self):
        return pd.DataFrame({"<i>x</i>": ["<b>"], "y": [float("nan")]})

    @property
    def verdict(self):
        return "an <em>other</em> verdict"

    def figure(self):
        return empty_figure("Other", "nothing to see")


def test_any_other_result_gets_a_section(run, brief):
    page = render_report(run, replace(brief, results={**brief.results, "probe & co": Other()}))
    assert "<bdi>Other</bdi></h2>" in page
    assert "an &lt;em&gt;other&lt;/em&gt; verdict" in page
    assert "&lt;i&gt;x&lt;/i&gt;" in page


def test_a_path_that_cannot_be_written_is_a_plain_error(run, brief, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SSTError, match="cannot write"):
        write_report(run, tmp_path / "file" / "report.html", brief)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("SST_INTERP_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("no Chromium: set SST_INTERP_CHROMIUM to its path, or install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page)
    return path


@pytest.fixture
def opened(browser):
    """Opens a file as a reader would; afterwards nothing may have gone wrong or been fetched."""
    trouble, requests, contexts = [], [], []

    def open_page(path, **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        page = context.new_page()
        contexts.append(context)
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        watch = "'securitypolicyviolation', e => console.error('CSP ' + e.violatedDirective)"
        page.add_init_script(f"document.addEventListener({watch})")
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []
    assert [u for u in requests if not u.startswith(("file:", "data:", "blob:"))] == []


def cells_of(page, table):
    """The rows of one of the explorer's tables, as texts."""
    return page.eval_on_selector_all(
        f"#ex-table-{table} tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.innerText))"
    )


def expected_cell(run, question, comparison, position, layer):
    rows = run.pairs[(run.pairs["question"] == question) & (run.pairs["comparison"] == comparison)]
    row = rows[(rows["position"] == position) & (rows["layer"] == layer)].iloc[0]
    far = float(f"{1 - float(row['cosine']):.2g}")
    return far, float(f"{row['relative_l2']:.2g}"), [float(f"{row[c]:.2g}") for c in ("norm_a", "norm_b")]


@pytest.mark.browser
def test_a_clicked_cell_says_what_the_tables_say_and_keys_move(opened, run, written):
    page = opened(written)
    page.get_by_label("Question", exact=True).select_option(index=5)
    page.locator("#ex-comparison").select_option("within")
    page.locator("#ex-summary", has_text="within").wait_for()
    here = page.evaluate(
        "() => { const m = document.getElementById('ex-map'); m.scrollIntoView(); return m.cells; }"
    )
    x, y = (2 + 0.5) / 6 * here["w"] + here["x"], here["y"] + here["h"] * (1 - (1 + 0.5) / 4)
    page.locator("#ex-map").click(position={"x": x, "y": y})

    def is_at(position, layer):
        assert page.inner_text("#ex-where").startswith(f"Position {position}, layer {layer}: overlap")
        far, relative, norms = expected_cell(run, 5, "within", position, layer)
        [[pair, overlap, _, l2, sizes]] = cells_of(page, "cell")
        assert pair == "iteration 1 → 4"
        assert float(overlap) == pytest.approx(1 - far, abs=1e-9)
        assert float(l2) == relative
        assert [float(n) for n in sizes.split(" → ")] == norms

    is_at(2, 1)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    is_at(3, 2)
    page.keyboard.press("Home")
    is_at(0, 2)
    page.keyboard.press("End")
    is_at(5, 2)
    rows = run.pairs[(run.pairs["question"] == 5) & (run.pairs["comparison"] == "within")]
    each = rows.loc[rows.groupby("position")["cosine"].idxmin()].sort_values("cosine")
    ranked = list(zip(each["position"].tolist(), each["layer"].tolist(), strict=True))
    lowest = each.iloc[ranked.index((5, 2)) + 1 if (5, 2) in ranked else 0]
    page.keyboard.press("n")
    is_at(int(lowest["position"]), int(lowest["layer"]))
    output = run.outputs[(run.outputs["question"] == 5) & (run.outputs["comparison"] == "within")]
    output = output[output["position"] == lowest["position"]].iloc[0]
    [[_, changed, rank, replaced, kl]] = cells_of(page, "output")
    assert (changed == "yes", int(rank), int(replaced)) == tuple(
        output[["argmax_changed", "winner_rank", "replaced"]]
    )
    assert float(kl) == float(f"{output['kl']:.3g}")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "ex-detail"
    page.keyboard.press("Escape")
    page.keyboard.press("PageDown")
    assert "Question 6: record-6" in page.inner_text("#ex-summary")


@pytest.mark.browser
def test_the_download_is_the_table_and_the_switch_changes_every_section(opened, ledger, written):
    page = opened(written)
    with page.expect_download() as download:
        page.locator("button.csv[data-table=ledger]").click()
    pd.testing.assert_frame_equal(
        pd.read_csv(download.value.path()), pd.read_csv(io.StringIO(ledger.table.to_csv(index=False)))
    )
    assert download.value.suggested_filename == "claims.csv"
    assert page.locator(".claim-details:visible").count() == 0
    page.locator(".claim-more").first.press("Enter")
    assert page.locator(".claim-details:visible").count() == 1
    page.locator("#story .switch button", has_text="free-running").click()
    shown = page.locator("#a0 .panel:visible .verdict p").first.inner_text()
    assert shown == split_verdict(ledger.results["basin_shifts.free_running"].verdict)[0]
    page.locator("#story-1 .main-svg").first.wait_for()


@pytest.mark.browser
def test_nothing_hostile_runs_on_a_dark_phone(opened, brief, tmp_path):
    run = with_tokens(full_run(name=HOSTILE[0], ids=HOSTILE))
    path = write_report(run, tmp_path / "report.html", brief, Tokenizer())
    page = opened(path, viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.get_by_label("Question", exact=True).select_option(index=3)
    assert "right\\u202eto left" in page.inner_text("#ex-summary")
    page.get_by_label("Next question").press("Enter")
    assert "nul\\u0000" in page.inner_text("#ex-summary")
    assert page.locator("#ex-table-tokens tbody tr").count() == 10
    page.emulate_media(color_scheme="light")
    assert page.evaluate("window.hacked") is None
    assert HOSTILE[0] in page.inner_text("h1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.browser
def test_a_clicked_cell_says_what_its_own_layer_would(opened, tmp_path):
    run = with_lens(full_run(), [0])
    page = opened(question_view(run, 2, tokenizer=Tokenizer()).write(tmp_path / "question.html"))
    page.locator("#ex-comparison").select_option("within")
    page.locator("#ex-summary", has_text="within").wait_for()
    seen = {}
    for layer in (0, 2):
        here = page.evaluate(
            "() => { const m = document.getElementById('ex-map'); m.scrollIntoView(); return m.cells; }"
        )
        x, y = 0.5 / 6 * here["w"] + here["x"], here["y"] + here["h"] * (1 - (layer + 0.5) / 4)
        page.locator("#ex-map").click(position={"x": x, "y": y})
        assert page.inner_text("#ex-where").startswith(f"Position 0, layer {layer}: overlap")
        assert f"Logit lens of layer {layer}" in page.inner_text("#ex-table-lens caption")
        assert "output" in page.inner_text("#ex-table-tokens caption")
        seen[layer] = cells_of(page, "lens")
        ids = page.eval_on_selector_all(
            "#ex-table-lens .token", "all => all.map(t => Number(t.title.slice(3)))"
        )
        expected = np.stack([lens_of(run, 2, 0, n)[layer] for n in (1, 4)], 1)
        assert ids == expected.ravel().tolist()
    assert seen[0] != seen[2]
    assert seen[0][0] == ["0", *[HOSTILE[0].replace(" ", "\u2423")] * 2]
    assert page.evaluate("window.hacked") is None
    page.locator("#ex-map").press("ArrowRight")
    assert 'lens_tokens = "all" in the recipe' in page.inner_text("#ex-lens")
    assert page.locator("#ex-table-tokens tbody tr").count() == 10
    older = opened(question_view(with_tokens(full_run()), 2).write(tmp_path / "older.html"))
    assert "was not recorded in this run" in older.inner_text("#ex-lens")


@pytest.mark.browser
def test_a_question_by_itself_works_in_a_page_and_in_a_frame(opened, run, tmp_path):
    view = question_view(run, 2)
    page = opened(view.write(tmp_path / "question.html"))
    assert "record-2" in page.inner_text("#ex-summary")
    frame = tmp_path / "notebook.html"
    frame.write_text(f"<!doctype html><html data-ready=yes><body>{view._repr_html_()}</body></html>")
    inside = opened(frame).frame_locator("iframe").locator("#ex-where")
    inside.wait_for()
    assert inside.inner_text().startswith("Position ")
