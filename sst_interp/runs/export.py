"""Hidden states for other tools: `[row, position, layer, iteration, d_model]` in safetensors, with an index.

    run.export("states", layers=[12], iterations=[1, 4])                  # of a captured run
    harvest(model, "documents.jsonl", "states", iterations=4, tokens=1_000_000)    # of plain texts

A folder holds `index.json` and shards; trainers of sparse autoencoders and probes need nothing of ours:

    for shard in json.load(open("states/index.json"))["shards"]:
        tensors = safetensors.torch.load_file(f"states/{shard['file']}")
        samples = tensors["states"][tensors["mask"]]      # [sample, layer, iteration, d_model]

`mask` [row, position] is False where a row is shorter than its shard; `rows` [row] counts from 0 over all
shards; `layers`, `iterations` and `positions` of the index say what stands at each place of an axis. A
harvest also has `tokens` [row, position], the token that was read. The same call goes on after an
interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sst_interp.errors import SSTError
from sst_interp.files import check_place, from_json, put_in_place, read_json, read_whole, replace_json, stage
from sst_interp.models.choices import MAX_DEPTH, whole
from sst_interp.models.model import Prompts, StateStreamModel, listed

FORMAT = 1
INDEX = "index.json"
AXES = ["row", "position", "layer", "iteration", "d_model"]
Choice = int | slice | Sequence[int] | Tensor | None
"""Numbers on an axis; None is all of them."""
Rows = list[tuple[dict[str, Any], Tensor, Tensor | None]]
"""(what the index says of a row, its states [position, layer, iteration, d_model], its tokens) of a shard."""


def chosen(name: str, given: Choice, there: Sequence[int]) -> list[int]:
    """The numbers of an axis that were asked for, in ascending order.

    Raises:
        SSTError: one that is not there, or none at all.
    """
    if given is None:
        return list(there)
    if isinstance(given, slice):
        picked = [number for number in there if number in range(max(there) + 1)[given]]
    else:
        several = isinstance(given, Sequence | Tensor) or getattr(given, "ndim", 0)
        numbers: Iterable[Any] = given if several and not isinstance(given, str) else [given]  # pyright: ignore
        picked = sorted({whole(name, number, 0) for number in numbers})
    for number in picked:
        if number not in there:
            raise SSTError(f"there is no {name} {number}", f"there are {there[0]} to {there[-1]}")
    if not picked:
        raise SSTError(f"no {name} is named", "leave it out to mean all of them")
    return picked


def export_run(
    run: Any,
    folder: str | Path,
    rows: Choice = None,
    positions: Choice = None,
    layers: Choice = None,
    iterations: Choice = None,
    depth: int | None = None,
    text: str = "own",
    rows_per_shard: int = 32,
) -> Path:
    """`Run.export`: a row is a question, and its index entry names it."""
    every = run.recipe.keep == "all"
    of = max(run.recipe.depths) if depth is None else whole("depth", depth, 1, MAX_DEPTH)
    questions = run.table("questions", ["question", "id"]).drop_duplicates("question")
    names = dict(zip(questions["question"].tolist(), questions["id"].tolist(), strict=True))
    picked = chosen("row", rows, list(names))

    def states(question: int) -> Tensor:
        """[position, layer, iteration, d_model]; position 0 alone, if the run keeps no other."""
        if every:
            return run.states(question, None, of, text)
        return run.states(question, 0, of, text)[None]

    first = states(picked[0])
    kept = run.kept_layers if run.recipe.keep_layers else range(first.shape[1])
    at_layers = chosen("layer", layers, kept)
    at_iterations = chosen("iteration", iterations, range(1, of + 1) if every else run.kept_iterations)
    at_positions = chosen("position", positions, run.kept_positions)
    places = {position: place for place, position in enumerate(run.kept_positions)}
    axes = {"positions": at_positions, "layers": at_layers, "iterations": at_iterations}
    source = {
        "run": run.name, "depth": of, "text": text, "questions": picked,
        "provenance": run.manifest["provenance"],
    }  # fmt: skip

    def make(wanted: list[int]) -> Rows:
        made: Rows = []
        for question in wanted:
            here = states(question)
            there = [places[p] for p in at_positions if places[p] < len(here)]
            about = {"question": question, "id": names[question]}
            made.append((about, _part(here, there, [kept.index(x) for x in at_layers], at_iterations), None))
        return made

    return _write(folder, {"source": source, **axes}, picked, make, rows_per_shard)


def harvest(
    model: StateStreamModel,
    texts: str | Path | Prompts,
    folder: str | Path,
    iterations: int = 1,
    tokens: int | None = None,
    length: int = 256,
    positions: Choice = None,
    layers: Choice = None,
    keep: Choice = None,
    rows_per_shard: int = 8,
    progress: Callable[[int, int], Any] | None = None,
) -> Path:
    """Read plain texts at a depth and write their states, in the layout of an export.

    Args:
        texts: a `.jsonl` file with a text, or an object with a `text`, per line; or texts or token ids.
        folder: for the states. What is there of the same harvest is kept.
        iterations: depth of every position.
        tokens: stop after so many; None reads all texts.
        length: tokens of each text that are read, from its start.
        positions, layers, keep: what is written; `keep` names iterations, from 1.
        rows_per_shard: texts that are read side by side, and stand in one file.
        progress: called with the number of texts done, and of all.

    Returns:
        The folder.

    Raises:
        SSTError: no texts; a folder with something else in it; numbers that are not there.
    """
    iterations = whole("iterations", iterations, 1, MAX_DEPTH)
    length = whole("length", length, 1)
    left = float("inf") if tokens is None else whole("tokens", tokens, 1)
    documents = _documents(texts)
    wanted: list[list[int]] = []
    for document in documents:
        ids = model.encode(document)[: int(min(length, left))]
        if ids:
            wanted.append(ids)
        left -= len(ids)
        if left == 0:
            break
    if not wanted:
        raise SSTError("there are no texts to read", 'for example lines of {"text": "..."}')
    at_layers = chosen("layer", layers, range(model.backbone.n_layers))
    at_iterations = chosen("iteration", keep, range(1, iterations + 1))
    at_positions = chosen("position", positions, range(length))
    axes = {"positions": at_positions, "layers": at_layers, "iterations": at_iterations}
    source = {
        "model": model.name, "backbone_hash": model.backbone.content_hash, "stream": model.kind.digest(),
        "kind": model.kind.name, "depth": iterations, "choices": repr(model.choices),
        "texts": hashlib.sha256(json.dumps(wanted).encode()).hexdigest(),
    }  # fmt: skip

    def make(numbers: list[int]) -> Rows:
        ids = [wanted[number] for number in numbers]
        read = model.replay(ids, iterations, logits=False, check=0).resid_post
        made: Rows = []
        for number, states, row in zip(numbers, read, ids, strict=True):
            there = [position for position in at_positions if position < len(row)]
            states = _part(states, there, at_layers, at_iterations)
            made.append(({"text": number}, states, torch.tensor([row[position] for position in there])))
        return made

    return _write(folder, {"source": source, **axes}, range(len(wanted)), make, rows_per_shard, progress)


def _documents(texts: str | Path | Prompts) -> Iterable[Any]:
    named = isinstance(texts, Path) or (isinstance(texts, str) and texts.endswith(".jsonl"))
    if not named:
        return listed(texts)
    path, documents = Path(texts), []  # pyright: ignore[reportArgumentType]
    for number, line in enumerate(read_whole(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = from_json(line)
        except ValueError:
            value = None
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise SSTError(f"{path}: line {number} has no text", 'write {"text": "..."} on every line')
        documents.append(text)
    return documents


def _part(states: Tensor, positions: list[int], layers: list[int], iterations: list[int]) -> Tensor:
    """Of [position, layer, iteration, d_model]; iterations count from 1."""
    return states[positions][:, layers][:, :, [number - 1 for number in iterations]].contiguous().cpu()


def _write(
    folder: str | Path,
    plan: dict[str, Any],
    rows: Sequence[int],
    make: Callable[[list[int]], Rows],
    rows_per_shard: int,
    progress: Callable[[int, int], Any] | None = None,
) -> Path:
    """Write what is missing, shard by shard; the index names a shard once it is whole."""
    folder, rows_per_shard = Path(folder), whole("rows_per_shard", rows_per_shard, 1)
    plan = json.loads(json.dumps({"format": FORMAT, "axes": AXES, "rows_per_shard": rows_per_shard} | plan))
    hint = "give another folder, or empty this one"
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, hint)
        if {key: index.get(key) for key in plan} != plan:
            raise SSTError(f"{folder} holds other states", hint)
    else:
        if folder.is_dir() and any(folder.iterdir()):
            raise SSTError(f"{folder} is not empty and has no {INDEX}", hint)
        check_place(folder, hint)
        folder.mkdir(parents=True, exist_ok=True)
        index = plan | {"complete": False, "d_model": None, "dtype": None, "shards": [], "rows": []}
    for number in range(len(index["shards"]), -(-len(rows) // rows_per_shard)):
        begin = number * rows_per_shard
        made = make(list(rows[begin : begin + rows_per_shard]))
        longest = max(len(states) for _, states, _ in made)
        like = made[0][1]
        tensors = {
            "states": like.new_zeros(len(made), longest, *like.shape[1:]),
            "mask": torch.zeros(len(made), longest, dtype=torch.bool),
            "rows": torch.arange(begin, begin + len(made)),
        }
        if made[0][2] is not None:
            tensors["tokens"] = torch.full((len(made), longest), -1)
        for at, (about, states, ids) in enumerate(made):
            tensors["states"][at, : len(states)] = states
            tensors["mask"][at, : len(states)] = True
            if ids is not None:
                tensors["tokens"][at, : len(ids)] = ids
            index["rows"].append({"row": begin + at, "positions": len(states), "shard": number} | about)
        file = folder / f"states-{number:05d}.safetensors"
        stage(file, lambda staged, tensors=tensors: save_file(tensors, staged))
        put_in_place(file)
        index["shards"].append({"file": file.name, "rows": len(made), "samples": int(tensors["mask"].sum())})
        index |= {"d_model": like.shape[-1], "dtype": str(like.dtype).removeprefix("torch.")}
        replace_json(folder / INDEX, index)
        if progress is not None:
            progress(begin + len(made), len(rows))
    index["complete"] = True
    replace_json(folder / INDEX, index)
    return folder
