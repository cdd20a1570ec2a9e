"""How the studies group and show their numbers: Markdown tables by column, lines with bars for intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sst_interp.analyses.plots import BLUE, GREEN, GREY, ORANGE, SKY, VERMILLION
from sst_interp.analyses.statistics.bootstrap import questions_words
from sst_interp.tables import markdown

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, SKY, GREY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
POSITION = "position in the text, first of its bin (0-based; log scale from 1)"

Cell = Callable[[Mapping[Any, Any]], Any]
"""A row -> what its cell shows."""


class Across(NamedTuple):
    """A column of a Markdown table for each value of a column of the rows."""

    column: str
    cell: Cell


def groups_of(rows: pd.DataFrame, by: Sequence[str], sort: bool = True) -> Any:
    """(values of `by`, rows) of each group; all rows together where `by` is empty."""
    return rows.groupby([*by], sort=sort) if len(by) else [((), rows)]


def finite(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows whose numbers in some columns are all finite."""
    known = np.isfinite(rows[[*columns]].to_numpy(dtype=float)).all(axis=1)
    return rows.iloc[np.flatnonzero(known)]


def number(name: str, form: str) -> Cell:
    """A number, or nothing where it is missing."""
    return lambda row: f"{row[name]:{form}}" if math.isfinite(row[name]) else ""


def interval(name: str, form: str = ".2g") -> Cell:
    """`0.41 [0.36, 0.47]`, from the columns `name`, `name_low` and `name_high`."""
    return lambda row: spread(row, name, form)


def spread(row: Mapping[Any, Any] | pd.Series, name: str, form: str = ".2g") -> str:
    """A number with its interval; without one the number alone, and nothing where that is missing."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if not math.isfinite(value):
        return ""
    return f"{value:{form}}" + (f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else "")


def table(rows: pd.DataFrame, columns: Mapping[str, str | Cell | Across]) -> str:
    """`lines_of` as Markdown."""
    return markdown(lines_of(rows, columns))


def lines_of(rows: pd.DataFrame, columns: Mapping[str, str | Cell | Across]) -> list[dict[str, Any]]:
    """The lines of a Markdown table, each as heading -> cell.

    `columns` are heading -> a column of the rows, or what makes a cell of a row. One of them may be `Across`,
    with a place for the value in its heading (`{} passes`): rows that agree in the columns before it become
    one line, which has the first row's cells in the columns after it.
    """
    records, heads, by, wide = rows.to_dict("records"), [], [], None
    for head, of in columns.items():
        if isinstance(of, Across):
            wide, by = (head, of), list(heads)
            heads += [head.format(value) for value in dict.fromkeys(row[of.column] for row in records)]
        else:
            heads.append(head)
    lines: dict[Any, dict[str, Any]] = {}
    for n, row in enumerate(records):
        cells = {
            head: row[of] if isinstance(of, str) else of(row)
            for head, of in columns.items()
            if not isinstance(of, Across)
        }
        line = lines.setdefault(
            tuple(cells[head] for head in by) if wide else n, dict.fromkeys(heads, "") | cells
        )
        if wide:
            head, of = wide
            line[head.format(row[of.column])] = of.cell(row)
    return list(lines.values())


def add_series(
    figure: go.Figure, x: str, y: str, named: Mapping[str, pd.DataFrame], joined: bool = True
) -> None:
    """A line with bars for the 95% intervals per entry; errors of exactly 0 have no place on a log axis."""
    for (name, own), colour, symbol in zip(named.items(), cycle(COLOURS), cycle(SYMBOLS), strict=False):
        own = own[own[y] > 0].sort_values(x)
        values, low, high = (own[c].to_numpy(dtype=float) for c in (y, f"{y}_low", f"{y}_high"))
        figure.add_scatter(
            x=own[x], y=values, mode="lines+markers" if joined and len(own) > 1 else "markers", name=name,
            line={"color": colour, "width": 2}, marker={"color": colour, "symbol": symbol, "size": 8},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                "array": np.nan_to_num(high - values), "arrayminus": np.nan_to_num(values - low),
            },
            customdata=np.stack([low, high], axis=1),
            hovertemplate=f"{name}<br>%{{x:.3g}}: %{{y:.2g}} [%{{customdata[0]:.2g}}, %{{customdata[1]:.2g}}]"
            "<extra></extra>",
        )  # fmt: skip
    legend = 14 * -(-len(named) // 2)
    figure.update_layout(margin={"t": 95 + legend}, height=400 + legend)


def logarithmic(figure: go.Figure) -> go.Figure:
    """The figure on two log axes."""
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log", exponentformat="power")
    return figure


def questions_of(rows: pd.DataFrame) -> str:
    """How many questions the rows are of, and what the bars are."""
    low, high = int(rows["questions"].min()), int(rows["questions"].max())
    words = questions_words(high) if low == high else f"{low} to {questions_words(high)}"
    return f"{words}; bars: 95%, questions resampled"
