import base64
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from synthetic import Planted, synthetic_run

from sst_interp.analyses import Result, all_comparisons, basin_shifts
from sst_interp.analyses.figures import empty_figure
from sst_interp.choices import Choices
from sst_interp.errors import SSTError
from sst_interp.report import render_report, write_report
from sst_interp.report.escaping import script_json, visible
from sst_interp.report.heatmaps import maps_data

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


@pytest.fixture(scope="module")
def run():
    return synthetic_run(seed=1, **SMALL)


@pytest.fixture(scope="module")
def results(run):
    return all_comparisons(run.pairs, resamples=200)


@pytest.fixture(scope="module")
def page(run, results):
    return render_report(run, results)


def embedded(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_everything_is_in_the_file_and_only_two_scripts_may_run(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r'(src|href)="(?!#|data:,)', outside)


def test_the_same_run_gives_the_same_bytes(run, results, page, tmp_path):
    path = write_report(run, tmp_path / "new folder" / "report.html", results)
    assert path.read_bytes() == page.encode()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_every_verdict_choice_and_share_is_on_the_page(results, page):
    text = page.replace("&#39;", "'")
    for result in results.values():
        assert result.verdict in text
        assert result.share.text(percent=True) in text
    for name in Choices().to_dict():
        assert f'<th scope="row">{name}</th>' in text
    assert "2.13.0" in text
    assert 'checkpoint = "tiny-random"' in text.replace("&#34;", '"')


def test_the_name_of_the_machine_is_not_on_the_page(results):
    run = synthetic_run(seed=1, **SMALL)
    run.manifest = {"sessions": [{"host": "secret-machine", "started": "2026-01-01"}], "state": "complete"}
    page = render_report(run, results)
    assert "2026-01-01" in page
    assert "secret-machine" not in page


def test_headings_are_in_order(page):
    levels = [int(h) for h in re.findall(r"<h([1-6])", re.sub(r"<script.*?</script>", "", page, flags=re.S))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))


def test_hostile_text_is_text():
    run = synthetic_run(name="<script>alert(1)</script>", ids=HOSTILE, seed=1, **SMALL)
    run.manifest = {"<b>key</b>": {"x\u202e": ["</script>", "\0", "lone \udc80 surrogate"]}}
    run.recipe.checkpoint = '"><svg onload=alert(1)>'
    page = render_report(run)
    assert "<h1><bdi>&lt;script&gt;alert(1)&lt;/script&gt;</bdi></h1>" in page
    assert page.count("<script") == 3
    assert "<svg" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    body = re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    for character in "\0\a\u202e\u2028\udc80":
        assert character not in body
    assert embedded(page)["maps"]["questions"][3] == "3: right\\u202eto left"


def test_escapes():
    assert visible("a\0b\u202ec\nd") == "a\\u0000b\\u202ec\\u000ad"
    assert visible("a\nb", lines=True) == "a\nb"
    assert visible("déjà vu 北京 ±") == "déjà vu 北京 ±"
    text = script_json({"x": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"x": "</script><!-- & \u2028"}


def test_the_quantised_map_is_the_data():
    run = synthetic_run(seed=1, **SMALL)
    run.pairs = run.pairs[~((run.pairs["question"] == 2) & (run.pairs["position"] >= 4))]
    result = basin_shifts(run.pairs, "replayed", resamples=50)
    data = maps_data(run.pairs, [result], {})["maps"][0]
    cells = np.frombuffer(base64.b64decode(data["overlap"]), dtype=np.uint8).reshape(8, 4, 6)
    low, high = data["v"]
    overlap = 1 + data["resolution"] - np.exp(low + (cells.astype(float) - 1) / 254 * (high - low))
    assert (cells[2, :, 4:] == 0).all()
    for row in run.pairs[run.pairs["comparison"] == "replayed"].itertuples():
        got = overlap[row.question, row.layer, row.position]
        assert got == pytest.approx(row.cosine, abs=0.02 * (1.001 - row.cosine) + 1e-6)


def test_a_large_run_embeds_the_first_questions_and_says_so(run, results):
    data = maps_data(run.pairs, list(results.values()), {}, largest=6 * 24 * 3)
    assert len(data["questions"]) == 3
    assert data["left_out"] == 5


def test_a_full_size_run_stays_small():
    run = synthetic_run(questions=198, positions=64, layers=30, comparisons=("replayed",), seed=1)
    result = basin_shifts(run.pairs, "replayed", resamples=50)
    three = 3 * len(script_json(maps_data(run.pairs, [result], {}, largest=10**9)))
    assert three < 3.5e6


def test_what_cannot_be_tested_is_said():
    page = render_report(synthetic_run(comparisons=("replayed",), questions=3, positions=4, layers=2))
    assert "not testable: no pairs of comparison &#39;free&#39; in this run." in page
    assert "too few questions (3" in page
    empty = synthetic_run(comparisons=(), questions=3)
    assert "No comparison of this run has pairs to draw." in render_report(empty)


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


def test_any_other_result_gets_a_section(run, results):
    page = render_report(run, {**results, "probe & co": Other()})
    assert "<bdi>probe &amp; co</bdi></h2>" in page
    assert "an &lt;em&gt;other&lt;/em&gt; verdict" in page
    assert "&lt;i&gt;x&lt;/i&gt;" in page


def test_a_path_that_cannot_be_written_is_a_plain_error(run, results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SSTError, match="cannot write the report"):
        write_report(run, tmp_path / "file" / "report.html", results)


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


@pytest.mark.browser
def test_the_report_works_offline_in_a_browser_and_runs_nothing_hostile(browser, tmp_path):
    run = synthetic_run(
        name=HOSTILE[0], ids=HOSTILE, seed=1, planted=Planted(stable_layers=1), **(SMALL | {"layers": 6})
    )
    path = write_report(run, tmp_path / "report.html")
    page = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark").new_page()
    trouble, requests = [], []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    watch = "'securitypolicyviolation', e => console.error('CSP ' + e.violatedDirective)"
    page.add_init_script(f"document.addEventListener({watch})")
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.wait_for_selector("#question-map .heatmaplayer image", state="attached")

    def drawn():
        return page.evaluate("JSON.stringify(document.getElementById('question-map').data[0].z)")

    def words():
        return page.inner_text("#question-words")

    first = drawn(), words()
    page.get_by_label("Question", exact=True).select_option(index=3)
    second = drawn(), words()
    assert first[0] != second[0]
    assert "right\\u202eto left" in second[1]
    page.get_by_label("Next question").press("Enter")
    assert "nul\\u0000" in words()
    page.get_by_label("Show").select_option("norm_ratio")
    assert drawn() != second[0]
    page.get_by_label("Comparison", exact=True).select_option("free")
    assert "differ from position 3 on" in words()
    assert page.locator(".plot .main-svg").count() >= 2 * 16
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert HOSTILE[0] in page.inner_text("h1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert trouble == []
    assert [u for u in requests if not u.startswith(("file:", "data:", "blob:"))] == []
