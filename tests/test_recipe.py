from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_interp import paths
from sst_interp.errors import SSTError
from sst_interp.models.choices import Choices
from sst_interp.runs.recipe import Recipe, find_recipe, known_recipes

TOML = 'checkpoint = "c"\ndataset = "d"\n'

choices = st.builds(
    Choices,
    carry=st.sampled_from(["layer_output", "ffn_output"]),
    prompt=st.sampled_from(["exact", "blend_off", "two_pass"]),
    overlap=st.sampled_from(["cosine", "relative_l2", "lens_jaccard"]),
    threshold=st.just("antimode") | st.floats(0, 1, exclude_min=True) | st.just(1),
)
words = st.text(min_size=1).filter(lambda s: s.strip() != "" and "\0" not in s)
recipes = st.builds(
    Recipe,
    name=st.from_regex(r"\A[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,30}\Z"),
    checkpoint=words,
    dataset=words,
    questions=st.none() | st.integers(1, 10**9),
    depths=st.sets(st.integers(2, 127), max_size=6).map(lambda more: (*more, 1)),
    max_new_tokens=st.integers(1, 32767),
    alpha=st.none() | st.floats(0, 1) | st.sampled_from([0, 1, -0.0, 5e-324]),
    batch_size=st.integers(1, 1000),
    dtype=st.sampled_from(["bfloat16", "float32", "float64"]),
    keep=st.sampled_from(["none", "position0", "shifts", "all"]),
    lens_tokens=st.sampled_from(["none", "position0", "all"]),
    seed=st.integers(0, 2**40),
    instruction=st.none() | st.text(),
    scoring=st.none() | st.sampled_from(["letter", "text", "roman"]),
    columns=st.none() | st.fixed_dictionaries({"question": words, "choices": st.lists(words, max_size=2)}),
    controls=st.integers(0, 10**9),
    choices=choices,
)


def recipe(**changes) -> Recipe:
    return Recipe(**({"name": "r", "checkpoint": "c", "dataset": "d"} | changes))


@settings(max_examples=40)
@given(recipes)
def test_toml_and_json_give_an_equal_recipe_with_an_equal_fingerprint(r):
    for back in (Recipe.loads(r.to_toml()), Recipe.from_dict(json.loads(json.dumps(r.to_dict())))):
        assert back == r
        assert back.fingerprint() == r.fingerprint()
        assert back.differences(r) == []


@settings(max_examples=40)
@given(recipes)
def test_depths_are_ascending_and_begin_with_the_reference(r):
    assert r.depths[0] == 1
    assert all(a < b for a, b in zip(r.depths, r.depths[1:], strict=False))


@settings(max_examples=40)
@given(recipes, recipes)
def test_fingerprints_differ_exactly_where_what_is_captured_does(a, b):
    """The name, and choices that only matter when a run is read, do not decide what is captured."""
    measured = {a.choices.overlap, b.choices.overlap} - {"cosine", "relative_l2"}
    overlap = b.choices.overlap if measured else a.choices.overlap
    read = {"comparison": a.choices.comparison, "threshold": a.choices.threshold, "overlap": overlap}
    b = dataclasses.replace(b, name=a.name, choices=dataclasses.replace(b.choices, **read))
    equal = a == b
    assert (a.fingerprint() == b.fingerprint()) == equal == (not a.differences(b))


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "x"},
        {"dataset": "x"},
        {"questions": 3},
        {"depths": (1, 2)},
        {"max_new_tokens": 3},
        {"alpha": 0.0},
        {"batch_size": 3},
        {"dtype": "float32"},
        {"keep": "all"},
        {"lens_tokens": "none"},
        {"seed": 3},
        {"instruction": ""},
        {"reply_prefix": "("},
        {"scoring": "likelihood"},
        {"columns": {"question": "Q"}},
        {"controls": 3},
        {"choices": Choices(kv="first")},
    ],
)
def test_every_field_but_the_name_is_in_the_fingerprint_and_named_as_a_difference(change):
    changed = recipe(**change)
    assert changed.fingerprint() != recipe().fingerprint()
    [(key, _, now)] = recipe().differences(changed)
    assert key == {"choices": "choices.kv"}.get(next(iter(change)), next(iter(change)))
    assert now == changed.to_dict().get(key, "first")
    assert set(change) <= {f.name for f in dataclasses.fields(Recipe)}


def test_a_recipe_without_controls_is_what_it_was_before_there_were_any():
    assert recipe().controls == 0
    assert "controls" not in recipe().to_toml()
    assert recipe(controls=0).fingerprint() == recipe().fingerprint()
    old = "77f887a86887abe619609eafdc412068"
    assert recipe().fingerprint().startswith(old)
    assert recipe(controls=2).differences(recipe()) == [("controls", 2, 0)]


def test_the_name_is_not_in_the_fingerprint():
    assert recipe(name="x").fingerprint() == recipe(name="y").fingerprint()
    assert recipe(name="x").differences(recipe(name="y")) == []


BAD = [
    ("name", ""),
    ("name", "../x"),
    ("name", ".hidden"),
    ("name", "a b"),
    ("name", "a/b"),
    ("name", "x" * 101),
    ("name", "é"),
    ("name", "x\n"),
    ("name", 3),
    ("checkpoint", ""),
    ("checkpoint", "\udcff"),
    ("dataset", None),
    ("questions", "many"),
    ("questions", 0),
    ("questions", True),
    ("questions", 2.0),
    ("depths", ()),
    ("depths", (2, 4)),
    ("depths", (1, 2, 2)),
    ("depths", (0, 1)),
    ("depths", (1, 128)),
    ("depths", (1, 2.5)),
    ("depths", (True, 2)),
    ("depths", 4),
    ("depths", "14"),
    ("max_new_tokens", 0),
    ("max_new_tokens", 32768),
    ("alpha", -0.1),
    ("alpha", 1.1),
    ("alpha", float("nan")),
    ("alpha", float("inf")),
    ("alpha", True),
    ("alpha", "0.1"),
    ("batch_size", 0),
    ("dtype", "bf16"),
    ("dtype", ["bfloat16"]),
    ("keep", "some"),
    ("seed", -1),
    ("seed", 0.5),
    ("controls", -1),
    ("controls", True),
    ("controls", 0.5),
    ("controls", "all"),
    ("instruction", 3),
    ("scoring", ""),
    ("columns", {"prompt": "Q"}),
    ("columns", "question"),
    ("choices", "exact"),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_what_cannot_be_captured_is_one_line_that_names_the_key_and_one_that_helps(key, value):
    with pytest.raises(SSTError) as error:
        recipe(**{key: value})
    assert error.value.message.startswith(f"{key} = ")
    assert "\n" not in error.value.message
    assert error.value.hint


def test_every_hint_is_itself_right(tmp_path):
    for key, value in BAD:
        with pytest.raises(SSTError) as error:
            recipe(**{key: value})
        example = error.value.hint.removeprefix("for example ")
        if key != "choices":
            lines = {"checkpoint": '"c"', "dataset": '"d"'} | {key: example.removeprefix(f"{key} = ")}
            Recipe.loads("\n".join(f"{k} = {v}" for k, v in lines.items()), default_name="x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('questions = "many"', "questions = 'many'"),
        ("question = 3", "unknown recipe key 'question'"),
        ('[choices]\nkv = "frist"', "choice kv = 'frist'"),
        ("[choices]\nkvs = 1", "unknown choice 'kvs'"),
        ("depths = 1, 2", "line 3"),
        ("depths = [1,", "end of document"),
        ("seed = " + "9" * 5000, "not valid TOML"),
        ('choices = "exact"', "choices = 'exact'"),
        ('name = "a/b"', "name = 'a/b'"),
    ],
)
def test_errors_name_the_file(tmp_path, text, says):
    path = tmp_path / "bad.toml"
    path.write_text(TOML + text)
    with pytest.raises(SSTError) as error:
        Recipe.load(path)
    assert error.value.message.startswith(f"{path}: ")
    assert says in error.value.message
    assert "\n" not in error.value.message


def test_unknown_keys_come_with_the_nearest_name(tmp_path):
    with pytest.raises(SSTError, match="max_new_tokens") as error:
        Recipe.loads(TOML + "max_new_token = 3", default_name="x")
    assert "did you mean 'max_new_tokens'" in (error.value.hint or "")


@pytest.mark.parametrize("present", ["checkpoint", "dataset"])
def test_model_and_questions_must_be_said(present):
    with pytest.raises(SSTError, match="is missing"):
        Recipe.loads(f'{present} = "x"', default_name="x")


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(SSTError, match="cannot read recipe"):
        Recipe.load(tmp_path / "none.toml")
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SSTError, match="not UTF-8"):
        Recipe.load(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_bytes(b"\xef\xbb\xbf" + TOML.encode())
    assert Recipe.load(tmp_path / "x.toml").checkpoint == "c"


def test_the_name_is_the_argument_then_the_files_own_then_its_stem(tmp_path):
    path = tmp_path / "stem.toml"
    path.write_text(TOML)
    assert Recipe.load(path).name == "stem"
    path.write_text(TOML + 'name = "own"')
    assert Recipe.load(path).name == "own"
    assert Recipe.load(path, "argument").name == "argument"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with a `runs` folder and a `shipped` one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SST_INTERP_RUNS", raising=False)
    monkeypatch.setattr(paths, "shipped", lambda kind: tmp_path / "shipped" / kind)
    return tmp_path


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TOML + f"seed = {seed}")


def test_a_runs_own_recipe_goes_before_the_users_and_that_before_the_shipped_one(here):
    order = [
        "runs/demo/run.toml",
        "runs/demo.toml",
        "shipped/recipes/demo.toml",
        "shipped/runs/demo/run.toml",
    ]
    for seed, place in reversed(list(enumerate(order))):
        write(here / place, seed)
        assert find_recipe("demo").seed == seed
        assert find_recipe("demo").name == "demo"
        assert known_recipes()["demo"].resolve() == here / place


def test_a_path_is_a_recipe(here):
    write(here / "mine.toml", 5)
    write(here / "sub/theirs/run.toml", 6)
    assert find_recipe("mine.toml").name == "mine"
    assert find_recipe("sub/theirs").name == "theirs"
    assert find_recipe(str(here / "sub/theirs/run.toml")).seed == 6
    assert known_recipes() == {}


def test_a_file_without_ending_does_not_hide_a_recipe(here):
    write(here / "shipped/recipes/demo.toml", 1)
    (here / "demo").write_text("not a recipe")
    assert find_recipe("demo").seed == 1


@pytest.mark.parametrize("name", ["dmeo", "", ".", "..", "x" * 5000, "a\0b", "é"])
def test_unknown_recipes_are_errors(here, name):
    write(here / "runs/demo.toml", 1)
    with pytest.raises(SSTError, match="unknown run") as error:
        find_recipe(name)
    assert "sst-interp runs" in (error.value.hint or "")


@pytest.mark.parametrize("name", ["none.toml", "no/where", "../x"])
def test_paths_to_nothing_are_errors(here, name):
    with pytest.raises(SSTError, match="cannot read recipe"):
        find_recipe(name)


def test_shipped_recipes_can_be_captured():
    shipped = sorted((Path(__file__).parents[1] / "data" / "recipes").glob("*.toml"))
    assert shipped
    for path in shipped:
        assert Recipe.load(path).name == path.stem
