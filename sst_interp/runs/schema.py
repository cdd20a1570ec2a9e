"""The tables of docs/run-format.md as Arrow schemas, and the only way to fill one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sst_interp.models.choices import BEFORE, COMPARISONS

TEXTS = ("own", "depth1")
"""Which tokens a pass reads: the depth's own text, or the one that depth 1 wrote."""
NOISE_KINDS = ("batch", "fp32")
"""What else computed the same tokens at the same depth (`sst_interp.runs.controls`)."""
SITES = ("output", "stream")
"""Where a perturbation is put in: the last layer's output, or the stream (`perturbations`)."""
DIRECTIONS = ("true", "random", "elsewhere")
"""Where a perturbation points: as iterating does, anywhere, or as iterating does at another position."""
CATEGORIES: dict[str, tuple[str, ...]] = {
    "comparison": COMPARISONS,
    "text": TEXTS,
    "kind": NOISE_KINDS,
    "site": SITES,
    "direction": DIRECTIONS,
}
"""Columns with a fixed set of values, in the order in which they sort; one byte a row."""
OPTIONAL = frozenset({"lens_jaccard", "likelihood_margin", "choice_scores", "draw"})
"""Columns that a run may lack."""
CONTROLS = ("noise", "nudges")
"""Tables that only some questions of a run have rows in, or none: `controls` in the recipe."""
MAY_BE_EMPTY = (*CONTROLS, "lens")
"""Tables that a run may have no rows of."""
IDS = ("top100", "top5")
"""Columns of lists of token ids."""

_CATEGORY = pa.dictionary(pa.int8(), pa.string())
_CELL = {"text": _CATEGORY, "depth": pa.int8(), "position": pa.int16(), "iteration": pa.int8()}
_PAIR = {"question": pa.int32(), "comparison": _CATEGORY, "position": pa.int16()}
_AB = {"a": pa.int8(), "b": pa.int8()}
_CHANGE = {
    "argmax_changed": pa.bool_(),
    "replaced": pa.int16(),
    "winner_rank": pa.int32(),
    "kl": pa.float32(),
}
_STATES = dict.fromkeys(("cosine", "relative_l2", "norm_a", "norm_b", "bf16_ratio"), pa.float32())


def _schema(columns: Mapping[str, pa.DataType], nullable: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in columns.items()])


TABLES: dict[str, pa.Schema] = {
    "questions": _schema(
        {
            "question": pa.int32(),
            "id": pa.string(),
            "depth": pa.int8(),
            "draw": pa.int8(),
            "gold": pa.string(),
            "answer": pa.string(),
            "correct": pa.bool_(),
            "likelihood_margin": pa.float32(),
            "choice_scores": pa.list_(pa.float32()),
            "tokens": pa.int16(),
            "stopped": pa.bool_(),
            "prompt_tokens": pa.int32(),
            "prompt_sweeps": pa.int16(),
            "prompt_residual": pa.float32(),
            "prompt_logit_error": pa.float32(),
        },
        nullable=("answer",),
    ),
    "steps": _schema(
        {
            "question": pa.int32(),
            **_CELL,
            "token": pa.int32(),
            "argmax": pa.int32(),
            "entropy": pa.float32(),
            "margin": pa.float32(),
            "top100": pa.list_(pa.int32()),
        },
        nullable=("token", "argmax", "top100"),
    ),
    "outputs": _schema({**_PAIR, **_AB, "same_prefix": pa.bool_(), **_CHANGE}),
    "pairs": _schema(
        {
            **_PAIR,
            "layer": pa.int16(),
            **_AB,
            "same_prefix": pa.bool_(),
            **_STATES,
            "lens_jaccard": pa.float32(),
        }
    ),
    "lens": _schema({"question": pa.int32(), **_CELL, "top5": pa.list_(pa.int32())}),
    "noise": _schema(
        {
            "question": pa.int32(),
            "kind": _CATEGORY,
            "depth": pa.int8(),
            "position": pa.int16(),
            "layer": pa.int16(),
            **_STATES,
        }
    ),
    "nudges": _schema(
        {
            **_PAIR,
            **_AB,
            "site": _CATEGORY,
            "direction": _CATEGORY,
            "seed": pa.int8(),
            **_CHANGE,
            "size": pa.float32(),
            "cosine": pa.list_(pa.float32()),
            "relative_l2": pa.list_(pa.float32()),
        }
    ),
}

KEYS: dict[str, list[str]] = {
    "questions": ["question", "depth"],
    "steps": ["question", "text", "depth", "position", "iteration"],
    "outputs": ["question", "comparison", "position", "a", "b"],
    "pairs": ["question", "comparison", "position", "layer", "a", "b"],
    "lens": ["question", "text", "depth", "position", "iteration"],
    "noise": ["question", "kind", "depth", "position", "layer"],
    "nudges": ["question", "comparison", "position", "a", "b", "site", "direction", "seed"],
}
"""The columns that name a row. A table is read back sorted by them."""


def to_table(name: str, columns: Mapping[str, Any]) -> pa.Table:
    """The Arrow table `name` from `columns`, in the schema's order and types.

    Args:
        columns: an array or list [row] each; a column of lists may be an array [row, entry].

    Raises:
        ValueError: a column is missing or surplus, lengths differ, a value does not fit its type (40,000 in
            an int16, 0.5 in an int32, an unknown comparison), or there is a null where there must be none.
    """
    if name not in TABLES:
        raise ValueError(f"no table {name!r}: there are {', '.join(TABLES)}")
    schema = TABLES[name]
    missing = [c for c in schema.names if c not in columns and c not in OPTIONAL]
    surplus = [c for c in columns if c not in schema.names]
    if missing or surplus:
        raise ValueError(f"table {name!r}: missing columns {missing}, surplus columns {surplus}")
    schema = pa.schema([f for f in schema if f.name in columns])
    arrays = [_array(name, field, columns[field.name]) for field in schema]
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(f"table {name!r}: lengths {dict(zip(schema.names, map(len, arrays), strict=True))}")
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(table: str, field: pa.Field, values: Any) -> pa.Array:
    try:
        if field.name in CATEGORIES:
            array = _categories(values, CATEGORIES[field.name])
        elif pa.types.is_integer(field.type) or pa.types.is_list(field.type):
            if isinstance(values, np.ndarray) and values.ndim == 2:
                values = list(values)
            array = pa.array(values).cast(field.type)  # a list given its type at once would truncate 0.5
        else:
            array = pa.array(values, type=field.type)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise ValueError(f"table {table!r}, column {field.name!r}: {error}") from error
    if array.null_count and not field.nullable:
        raise ValueError(f"table {table!r}, column {field.name!r}: {array.null_count} nulls, must have none")
    return array


def _categories(values: Any, known: tuple[str, ...]) -> pa.Array:
    codes = pd.Categorical(values, categories=list(known)).codes
    if (codes < 0).any():
        raise ValueError(f"values other than {', '.join(known)}")
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), pa.array(known, pa.string()))


def write_parquet(table: pa.Table, path: Path, small: bool = False) -> None:
    """Write a shard, the same bytes for the same table. `small` takes 20 times as long, for rounded floats.

    Measured on 126,720 plausible rows of `pairs`: 2.54 MB with pyarrow's defaults and zstd, 1.69 MB without
    dictionaries for the floats, 1.58 MB with byte_stream_split as well, except for the norms: they repeat
    (one norm_a for every b), which zstd sees only where their bytes stay together (1.87 MB with all split).
    Of 168,960 rows rounded to 10 bits: 6.59 bytes a row, 5.72 if `small`, norms in a dictionary.
    """
    lists = {f.name: f"{f.name}.list.element" for f in table.schema if pa.types.is_list(f.type)}
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    repeating = [c for c in table.column_names if c not in floats and c not in lists]
    split = [c for c in floats if not c.startswith("norm_")]
    split += [path for name, path in lists.items() if name not in IDS]
    ids = [path for name, path in lists.items() if name in IDS]
    repeating += [c for c in floats if small and c.startswith("norm_")]
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19 if small else None,
        use_dictionary=[*ids, *repeating],  # pyright: ignore[reportArgumentType]
        use_byte_stream_split=split,  # pyright: ignore[reportArgumentType]
        row_group_size=1 << 17,
    )


def to_frame(table: pa.Table) -> pd.DataFrame:
    """The table as pandas, in today's names: `CATEGORIES` categorical, integers that may be null `Int32`."""
    integers = [f.name for f in table.schema if f.nullable and pa.types.is_integer(f.type)]
    nullable = {c: table[c].to_pandas(types_mapper={pa.int32(): pd.Int32Dtype()}.get) for c in integers}
    order, table = table.column_names, table.drop_columns(integers)
    frame = table.to_pandas(split_blocks=True)
    for column in CATEGORIES.keys() & set(order):
        known, was = list(CATEGORIES[column]), frame[column].cat
        place = [known.index(BEFORE.get(name, name)) for name in map(str, was.categories)]
        codes = np.array([*place, -1], np.int8)[was.codes]
        frame[column] = pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(known))
    return frame.assign(**nullable)[order] if nullable else frame


def empty_table(name: str) -> pd.DataFrame:
    """A table without rows, with the columns that every run has."""
    columns = [c for c in TABLES[name].names if c not in OPTIONAL]
    return to_frame(TABLES[name].empty_table().select(columns))
