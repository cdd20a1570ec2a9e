"""Tiny synthetic runs: two questions a batch, two layers, three dimensions, three positions."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sst_interp.files import sha256
from sst_interp.models.choices import BEFORE
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.schema import write_parquet
from sst_interp.runs.writer import RunWriter

LAYERS, D_MODEL, POSITIONS, DEPTHS = 2, 3, 3, (1, 2)
PROVENANCE = {"model_hash": "abc", "dtype": "bfloat16", "versions": {"torch": "2"}, "host": "here"}
BATCHES = [[0, 1], [2, 3], [4, 5]]
PASSES = [("own", 1), ("own", 2), ("depth1", 2)]
MEASURED = ("cosine", "relative_l2", "norm_a", "norm_b", "bf16_ratio")
COMPARED = [("teacher_forced", 1, 2), ("within", 1, 2), ("free_running", 1, 2)]
KEYS = {
    "questions": "question depth",
    "steps": "question text depth position iteration",
    "outputs": "question comparison position a b",
    "pairs": "question comparison position layer a b",
    "lens": "question text depth position iteration",
    "noise": "question kind depth position layer",
    "nudges": "question comparison position a b site direction seed",
}
CONTROLS = ("noise", "nudges")
NUDGES = [("true", 0), ("random", 0), ("random", 1), ("elsewhere", 0)]


def tiny_recipe(name: str = "tiny", **changes: Any) -> Recipe:
    fields = {"checkpoint": "c", "dataset": "d", "depths": DEPTHS, "batch_size": 2, "questions": 6}
    return Recipe(name=name, **(fields | {"controls": 6} | changes))


def rows(table: str, questions: list[int]) -> list[tuple]:
    """The keys of a table's rows, sorted."""
    places = range(POSITIONS)
    outputs = [(q, c, p, a, b) for q in questions for c, a, b in COMPARED for p in places]
    steps = [(q, t, d, p, i + 1) for q in questions for t, d in PASSES for p in places for i in range(d)]
    return {
        "questions": [(q, d) for q in questions for d in DEPTHS],
        "steps": steps,
        "lens": [key for key in steps if key[3] == 0],
        "outputs": outputs,
        "pairs": [(*row[:3], layer, *row[3:]) for row in outputs for layer in range(LAYERS)],
        "noise": [
            (q, kind, depth, p, layer)
            for q in questions
            for kind in ("batch", "fp32")
            for depth in DEPTHS
            for p in places
            for layer in range(LAYERS)
        ],
        "nudges": [
            (*row, site, direction, seed)
            for row in outputs
            if row[1] != "free_running"
            for site in ("output", "stream")
            for direction, seed in NUDGES
        ],
    }[table]


def columns(table: str, questions: list[int]) -> dict[str, Any]:
    """A table's columns; each value depends on its own row's keys only."""
    keys = rows(table, questions)
    noise = [zlib.crc32(repr(key).encode()) / 2**32 for key in keys]
    ids, coin = [int(100 * x) for x in noise], [x > 0.5 for x in noise]
    per_layer = [[x] * (1 if "output" in key else LAYERS) for x, key in zip(noise, keys, strict=True)]
    values: dict[str, dict[str, list]] = {
        "questions": {
            "id": [f"r{q}" for q, *_ in keys],
            "gold": ["A"] * len(keys),
            "answer": ["A" if x else None for x in coin],
            "correct": coin,
            "tokens": [POSITIONS] * len(keys),
            "stopped": coin,
            "prompt_tokens": ids,
            "prompt_sweeps": ids,
            "prompt_residual": noise,
            "prompt_logit_error": noise,
        },
        "steps": {
            "token": [i if x else None for i, x in zip(ids, coin, strict=True)],
            "argmax": ids,
            "entropy": noise,
            "margin": noise,
            "top100": [[i, i + 1] if x else None for i, x in zip(ids, coin, strict=True)],
        },
        "outputs": {
            "same_prefix": coin,
            "argmax_changed": coin,
            "replaced": ids,
            "winner_rank": ids,
            "kl": noise,
        },
        "pairs": {"same_prefix": coin} | dict.fromkeys(MEASURED, noise),
        "lens": {"top5": [list(range(i, i + 5 * LAYERS)) for i in ids]},
        "noise": dict.fromkeys(MEASURED, noise),
        "nudges": {
            "argmax_changed": coin,
            "replaced": ids,
            "winner_rank": ids,
            "kl": noise,
            "size": noise,
        }
        | {"cosine": per_layer, "relative_l2": per_layer},
    }
    return dict(zip(KEYS[table].split(), map(list, zip(*keys, strict=True)), strict=True)) | values[table]


def batch(
    questions: list[int], keep: str = "position0", controls: int = 6
) -> tuple[dict, dict[str, torch.Tensor]]:
    """What `RunWriter.commit` takes: every table, and the states that `keep` says. The first `controls`
    questions of a run have the controls.
    """
    tables = {table: columns(table, questions) for table in KEYS if table not in CONTROLS}
    if controlled := [q for q in questions if q < controls]:
        tables |= {table: columns(table, controlled) for table in CONTROLS}
    if keep == "none":
        return tables, {}
    if keep == "all":
        return tables, {f"q{q}.{t}.d{d}": state(q, d) for q in questions for t, d in PASSES}
    return tables, {f"q{q}.position0": state(q, DEPTHS[-1])[0] for q in questions}


def state(question: int, iterations: int) -> torch.Tensor:
    """[position, layer, iteration, d_model] that says where it is from: every entry 8 question + position."""
    entries = 8 * question + torch.arange(POSITIONS).view(-1, 1, 1, 1)
    return entries.expand(POSITIONS, LAYERS, iterations, D_MODEL).to(torch.bfloat16)


def capture(folder: Path, recipe: Recipe | None = None, batches: list[list[int]] = BATCHES) -> Path:
    """Capture what is missing, and finish: what `sst-interp capture` does, without a model."""
    recipe = recipe or tiny_recipe()
    with RunWriter.open(folder, recipe, PROVENANCE, n_batches=len(batches)) as writer:
        for number, questions in enumerate(batches):
            if number not in writer.committed:
                tables, states = batch(questions, recipe.keep, recipe.controls)
                kept = tables if len(recipe.depths) > 1 else ("questions", "steps")
                writer.commit(number, {name: tables[name] for name in kept}, states)
        writer.finish()
    return folder


def capture_small(folder: Path) -> Path:
    """A run of two batches with two tables each, and states: for what is done over and over."""
    return capture(folder, tiny_recipe(depths=(1,), controls=0), BATCHES[:2])


def contents(folder: Path) -> dict[str, Any]:
    """Everything a run consists of, by file; of the manifest, all but the sessions and what covers them."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    found: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    manifest = json.loads(found["manifest.json"])
    assert manifest.pop("sessions")
    assert manifest.pop("sha256")
    return found | {"manifest.json": manifest}


def as_version_1(folder: Path) -> None:
    """Rewrite a run as version 0.1 wrote it: other names of comparisons and choices, format 1."""
    names = {new: old for old, new in BEFORE.items()}
    contents = json.loads((folder / "manifest.json").read_text())
    contents["format"] = 1
    del contents["sha256"]
    choices = contents["recipe"]["choices"]
    choices |= {"handoff": choices.pop("initial_guess"), "comparison": names[choices["comparison"]]}
    toml = (folder / "run.toml").read_text()
    (folder / "run.toml").write_text(
        toml.replace("initial_guess", "handoff").replace("teacher_forced", "replayed")
    )
    for files in contents["shards"].values():
        for file, entry in files.items():
            if file.split("/")[0] not in ("outputs", "pairs", "nudges"):
                continue
            table = pq.read_table(folder / file)
            place = table.column_names.index("comparison")
            old = pa.array([names.get(v, v) for v in table["comparison"].to_pylist()]).dictionary_encode()
            write_parquet(table.set_column(place, "comparison", old), folder / file)
            entry |= {"bytes": (folder / file).stat().st_size, "sha256": sha256(folder / file)}
    (folder / "manifest.json").write_text(json.dumps(contents))
