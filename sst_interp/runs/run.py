"""One captured run: its tables as pandas, its states as tensors, and only what the manifest lists."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from safetensors import safe_open

from sst_interp.errors import SSTError, unknown_name, upstairs
from sst_interp.files import unreadable
from sst_interp.models.choices import BEFORE, COMPARISONS, whole
from sst_interp.runs import manifest
from sst_interp.runs.export import export_run
from sst_interp.runs.provenance import RunKind, run_kind
from sst_interp.runs.recipe import Recipe
from sst_interp.runs.schema import CATEGORIES, KEYS, MAY_BE_EMPTY, OPTIONAL, TABLES, to_frame


def _table(name: str, about: str) -> cached_property[pd.DataFrame]:
    def read(run: Run) -> pd.DataFrame:
        return run.table(name)

    read.__doc__ = about
    return cached_property(read)


@dataclass(eq=False, repr=False)
class Run:
    """A captured run, as far as it has been captured. Its tables are cached: treat them as read-only."""

    name: str
    """The name of its folder."""
    folder: Path
    recipe: Recipe
    manifest: dict[str, Any]
    """Provenance, sessions and shards (docs/run-format.md)."""
    verify: bool = True
    """Whether a shard's sha256 is checked when it is first read."""
    _verified: set[str] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        """Whether every batch has been captured."""
        return self.manifest["state"] == "complete"

    questions = _table("questions", "A row per (question, depth).")
    steps = _table("steps", "A row per (question, text, depth, position, iteration).")
    outputs = _table("outputs", "A row per (question, comparison, position, a, b).")
    pairs = _table("pairs", "A row per (question, comparison, position, layer, a, b): large, see `table`.")
    lens = _table("lens", "A row per (question, text, depth, position, iteration) with a logit lens, if any.")
    noise = _table("noise", "A row per (question, kind, depth, position, layer); empty without controls.")
    nudges = _table("nudges", "A row per norm-matched perturbation; empty without controls.")

    def table(
        self, name: str, columns: Sequence[str] | None = None, comparison: str | None = None
    ) -> pd.DataFrame:
        """A table, or only some `columns` and one `comparison` of it, sorted by its key columns.

        Raises:
            SSTError: there is no such table, column or comparison, or a shard is damaged.
        """
        if name not in TABLES:
            raise unknown_name("table", name, TABLES)
        shards = [str(self._checked(file)) for file in self._whole(name).values()]
        nothing_to_compare = name in ("outputs", "pairs") and len(self.recipe.depths) == 1
        if not shards and (nothing_to_compare or name in MAY_BE_EMPTY):
            wanted = columns if columns is not None else [c for c in TABLES[name].names if c not in OPTIONAL]
            return to_frame(TABLES[name].empty_table().select(list(wanted)))
        if not shards:
            raise SSTError(f"run {self.name} has no table {name}", self._again)
        try:
            dataset = ds.dataset(shards, format="parquet")
            rows = dataset.count_rows()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise unreadable(self.folder / name, error, self._again) from None
        said = sum(entry["rows"] for entry in self._entries(name))
        if rows != said or any(c not in dataset.schema.names for c in KEYS[name]):
            said = f"run {self.name}: table {name} is not the one that its manifest lists"
            raise SSTError(said, self._again)
        present, where = dataset.schema.names, None
        for column in columns or ():
            if column not in present:
                raise unknown_name(f"column of {name}", column, present)
        if comparison is not None:
            known = COMPARISONS if "comparison" in present else ()
            if comparison not in known:
                raise unknown_name(f"comparison in {name}", comparison, known)
            names = [comparison, *(old for old, new in BEFORE.items() if new == comparison)]
            where = ds.field("comparison").isin(names)
        wanted = list(columns) if columns is not None else present
        columns = list(dict.fromkeys([*wanted, *KEYS[name]]))
        read = dataset.to_table(columns, filter=where, batch_readahead=2, fragment_readahead=1)  # memory
        order = _order(read, KEYS[name])
        frame = to_frame(read.select(wanted))
        del read
        pa.default_memory_pool().release_unused()
        return frame if order is None else frame.take(order).reset_index(drop=True)

    def dataset(self, name: str, columns: Sequence[str] | None = None, comparison: str | None = None) -> Any:
        """A table as a Hugging Face `datasets.Dataset`: the rows of `table`, with the same arguments.

            run.dataset("pairs", comparison="within").filter(lambda row: row["cosine"] < 0.9)

        Raises:
            SSTError: as `table`; the package `datasets` cannot be imported.
        """
        frame = self.table(name, columns, comparison)
        try:
            from datasets import Dataset
        except ImportError as error:
            raise SSTError(f"`datasets` cannot be imported: {error}", "pip install datasets") from error
        return Dataset(pa.Table.from_pandas(frame, preserve_index=False).unify_dictionaries())

    def columns(self, name: str) -> list[str]:
        """The columns of a table; none where the run has no row of it."""
        shards = [str(self._checked(file)) for file in self._listed(name).values()]
        return ds.dataset(shards, format="parquet").schema.names if shards else []

    def sql(self, query: str) -> pd.DataFrame:
        """The answer to a SELECT over the run's tables, each a view of its shards, in DuckDB's SQL.

            run.sql("select layer, avg(cosine) from pairs where comparison = 'within' group by layer")

        Raises:
            SSTError: the query is wrong, asks for a file, or does anything but select; a shard is damaged.
        """
        import duckdb

        shards = {name: [self._checked(f).resolve() for f in self._whole(name).values()] for name in TABLES}
        names = {name: ", ".join(map(_quoted, files)) for name, files in shards.items()}
        today = "".join(f" when {_quoted(old)} then {_quoted(new)}" for old, new in BEFORE.items())
        with duckdb.connect(config={"python_enable_replacements": False}) as tables:
            try:
                tables.execute(f"set allowed_paths = [{', '.join(filter(None, names.values()))}]")
                tables.execute("set enable_external_access = false; set lock_configuration = true")
                for name, files in names.items():
                    if not files:
                        tables.register(name, TABLES[name].empty_table())
                        continue
                    renamed = f"case comparison{today} else comparison end as comparison"
                    every = f"* replace ({renamed})" if "comparison" in TABLES[name].names else "*"
                    tables.execute(f"create view {name} as select {every} from read_parquet([{files}])")
                statements = tables.extract_statements(query)
                if [s.type for s in statements] != [duckdb.StatementType.SELECT]:
                    raise SSTError("a query is one SELECT", 'for example "select count(*) from pairs"')
                return tables.execute(statements[0]).df()
            except duckdb.Error as error:
                said = " ".join(str(error).partition("\n\n")[0].split())
                hint = f"there are {', '.join(TABLES)}; `describe pairs` lists the columns of one"
                raise SSTError(f"the query cannot be answered: {said}", hint) from None

    @property
    def kept_iterations(self) -> tuple[int, ...]:
        """The iterations (1-based) whose states at position 0 are kept; a published copy has only some."""
        if self.recipe.keep == "none":
            return ()
        published = self.manifest.get("published")
        whole = range(1, max(self.recipe.depths) + 1)
        return tuple(whole) if published is None else tuple(published["iterations"])

    @property
    def kept_layers(self) -> tuple[int, ...]:
        """The layers (0-based) whose states are kept: what stands at each place of their layer axis."""
        layers = self.recipe.keep_layers
        return tuple(range(self.manifest["provenance"]["n_layers"])) if layers is None else layers

    @property
    def kept_positions(self) -> tuple[int, ...]:
        """The positions whose states are kept: what stands at each place of their position axis."""
        if self.recipe.keep != "all":
            return (0,)
        return self.recipe.keep_positions or tuple(range(self.recipe.max_new_tokens))

    def state(self, question: int, iteration: int) -> torch.Tensor:
        """The hidden states [layer, d_model] of one iteration (1-based) at position 0, in the run's dtype.

        Raises:
            SSTError: the run does not keep that iteration.
        """
        iteration = whole("iteration", iteration, 1)
        if iteration not in (kept := self.kept_iterations):
            has = ", ".join(map(str, kept)) or "none"
            said = f"run {self.name} keeps no states of iteration {iteration}"
            raise SSTError(said, f"at position 0 it has {has}")
        return self.states(question)[:, iteration - 1]

    def states(
        self, question: int, position: int | None = 0, depth: int | None = None, text: str = "own"
    ) -> torch.Tensor:
        """Kept hidden states [layer, iteration, d_model], in the run's dtype: index i is iteration i + 1.

        The axes have what the recipe keeps: `kept_layers`, and up to the end of the text `kept_positions`.

        Args:
            position: None gives every position, [position, layer, iteration, d_model].
            depth: the deepest when left out.
            text: whose tokens were read, `own` or `depth1`.

        In a published copy, iterations that it left out are NaN, and the last one kept ends the axis.

        Raises:
            SSTError: the run did not keep them.
        """
        keep, deepest = self.recipe.keep, max(self.recipe.depths)
        depth = deepest if depth is None else whole("depth", depth, 1)
        question = whole("question", question, 0)
        if position is not None and type(position) is not int:
            position = whole("position", position, 0)
        if keep != "all" and (keep == "none" or (position, depth, text) != (0, deepest, "own")):
            only = f"states at position 0 of depth {deepest}'s own text only"
            has = "no states" if keep == "none" else only
            raise SSTError(
                f"run {self.name} has {has}, not position {position} of depth {depth} on text {text!r}",
                f"`sst-interp capture --run {self.name} --keep all --fresh` records every state",
            )
        key = f"q{question}.{text}.d{depth}" if keep == "all" else f"q{question}.position0"
        if question not in self._batch_of:
            said = f"run {self.name} has no question {question}"
            raise SSTError(said, f"it has {len(self._batch_of)}, from 0")
        file = self._listed("states").get(self._batch_of[question])
        if file is None:
            raise SSTError(f"run {self.name} has no states of question {question}", self._again)
        with safe_open(str(self._checked(file)), framework="pt") as tensors:
            if key not in tensors.keys():  # noqa: SIM118 (not a dict)
                kept = [k for k in tensors.keys() if k.startswith(f"q{question}.")]  # noqa: SIM118
                raise unknown_name(f"states in run {self.name}", key, kept)
            if keep != "all" or position is None:
                return self._by_number(tensors.get_tensor(key), file)
            part = tensors.get_slice(key)
            there = self.kept_positions[: part.get_shape()[0]]
            if position not in there:
                has = f"positions {there[0]} to {there[-1]}" if there else "none that is kept"
                raise SSTError(
                    f"question {question} has no position {position} at depth {depth}",
                    f"its {text!r} text there has {has}",
                )
            place = there.index(position)
            return part[place : place + 1][0]

    def export(self, folder: str | Path, **how: Any) -> Path:
        """Write kept states for other tools, [row, position, layer, iteration, d_model] in safetensors.

        A row is a question. The layout, and how it is read, stand in `sst_interp.runs.export`.

        Args:
            folder: a new one, or that of the same export, which then goes on.
            how: `rows`, `positions`, `layers`, `iterations` (from 1): numbers, a slice, or None for all that
                the run kept; `depth` and `text`, as for `states`; `rows_per_shard`.

        Raises:
            SSTError: the run did not keep them; numbers that are not there; other states in the folder.
        """
        return export_run(self, folder, **how)

    def caches(self, question: int, **how: Any) -> list[Any]:
        """A TransformerLens `ActivationCache` per iteration (`sst_interp.bridges.run_caches`)."""
        return upstairs("bridges:run_caches")(self, question, **how)

    def cache(self, question: int, iteration: int = 1, **how: Any) -> Any:
        """The cache of one iteration; see `caches`."""
        return upstairs("bridges:run_cache")(self, question, iteration, **how)

    def check(self) -> None:
        """Check every listed shard now, before it is read. Raises SSTError for a damaged one."""
        for batch in manifest.batches(self.manifest):
            for file in self.manifest["shards"][str(batch)]:
                self._checked(file)
        for name in TABLES:
            self._whole(name)

    def question(self, question: int | str, threshold: float | None = None) -> Any:
        """The explorer of one question, by index or record id (`sst_interp.findings.report.question`).

        Raises:
            SSTError: the run has no such question.
        """
        return upstairs("findings.report.question:question_view")(self, question, threshold)

    @property
    def kind(self) -> RunKind | None:
        """The kind of its model (`sst_interp.runs.provenance.run_kind`); None if that is not known."""
        return run_kind(self.recipe, self.manifest["provenance"])

    def summary(self) -> dict[str, Any]:
        """What it is and how far it has got, as `list_runs` says it; JSON-ready."""
        done, of = len(self.manifest["shards"]), self.manifest["n_batches"]
        partial = f"partial {done} of {of or '?'}" if done else "not captured"
        return {
            "name": self.name,
            "state": "complete" if self.complete else partial,
            "kind": self.kind,
            "checkpoint": self.recipe.checkpoint,
            "dataset": self.recipe.dataset,
            "questions": self.recipe.questions,
            "depths": list(self.recipe.depths),
            "bytes": sum(e["bytes"] for files in self.manifest["shards"].values() for e in files.values()),
            "where": str(self.folder),
        }

    def __repr__(self) -> str:
        return f"<Run {self.name}: {', '.join(f'{k} {v}' for k, v in self.summary().items() if k != 'name')}>"

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
            for key, value in self.summary().items()
        )
        return f"<table>{''.join(rows)}</table>"

    @property
    def _again(self) -> str:
        return f"`sst-interp capture --run {self.name}` captures what is missing"

    def _listed(self, table: str) -> dict[int, str]:
        """{batch: shard} of a table, by batch."""
        shards = self.manifest["shards"]
        files = {batch: manifest.shard(table, batch) for batch in manifest.batches(self.manifest)}
        return {batch: file for batch, file in files.items() if file in shards[str(batch)]}

    def _entries(self, table: str) -> list[dict[str, Any]]:
        """What the manifest says of each shard of a table."""
        return [self.manifest["shards"][str(batch)][file] for batch, file in self._listed(table).items()]

    def _whole(self, table: str) -> dict[int, str]:
        """`_listed`, if every batch has the table or none. Raises SSTError otherwise."""
        listed = self._listed(table)
        if listed and table not in MAY_BE_EMPTY:
            for batch in manifest.batches(self.manifest):
                if batch not in listed:
                    raise SSTError(f"run {self.name}: batch {batch} has no {table}", self._again)
        return listed

    def _by_number(self, kept: torch.Tensor, file: str) -> torch.Tensor:
        """States with every iteration at the place of its own number, where a copy keeps only some."""
        published = self.manifest.get("published")
        if published is None or kept.dim() != 3:
            return kept
        numbers = published["iterations"]
        if kept.shape[1] != len(numbers):
            raise SSTError(f"run {self.name}: {file} has {kept.shape[1]} iterations, not {len(numbers)}")
        if numbers == list(range(1, len(numbers) + 1)):
            return kept
        whole = kept.new_full((kept.shape[0], max(numbers), kept.shape[2]), float("nan"))
        for place, number in enumerate(numbers):
            whole[:, number - 1] = kept[:, place]
        return whole

    def _checked(self, file: str) -> Path:
        if self.verify and file not in self._verified:
            entry = self.manifest["shards"][str(int(Path(file).stem))][file]
            # States may be a terabyte: one that is as old and as long as it was is read as it is.
            trusted = manifest.written(self.folder) if file.startswith("states/") else 0
            if problem := manifest.damage(self.folder, file, entry, trusted):
                raise SSTError(
                    f"run {self.name}: {file} is damaged ({problem})",
                    f"`sst-interp capture --run {self.name}` captures only that part again",
                )
            self._verified.add(file)
        return self.folder / file

    @cached_property
    def _batch_of(self) -> dict[int, int]:
        """{question: the batch it is in}."""
        shards = {batch: self._checked(file) for batch, file in self._listed("questions").items()}
        read = {b: ds.dataset(str(path)).to_table(columns=["question"]) for b, path in shards.items()}
        return {question: b for b, table in read.items() for question in table["question"].to_pylist()}


def _quoted(text: object) -> str:
    """A SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def _order(table: pa.Table, keys: list[str]) -> np.ndarray | None:
    """The order that sorts rows by `keys`; None where they are sorted already, as they nearly always are."""
    frame = to_frame(table.select(keys))
    columns = [frame[k].cat.codes.to_numpy() if k in CATEGORIES else frame[k].to_numpy() for k in keys]
    equal = np.ones(max(len(frame) - 1, 0), dtype=bool)
    for column in columns:
        if (equal & (column[1:] < column[:-1])).any():
            return np.lexsort(columns[::-1])
        equal &= column[1:] == column[:-1]
    return None
