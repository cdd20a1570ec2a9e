"""`sst-interp compare`: kinds of models on the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sst_interp.commands.common import JsonFlag, Resamples, Seed, given_path
from sst_interp.errors import Untestable
from sst_interp.guarded import check_output
from sst_interp.printing import print_table, say, write_text

if TYPE_CHECKING:
    from sst_interp.experiments.contraction import KindsContraction
    from sst_interp.experiments.kinds import Kinds, KindsAnswers


def compare(
    runs: Annotated[
        str,
        typer.Option("--runs", "-r", help="Captured runs by name, with commas; the first is the reference."),
    ],
    contraction: Annotated[
        int,
        typer.Option(min=0, help="Also load the models and measure sweeps on so many questions' text."),
    ] = 0,
    as_json: JsonFlag = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", parser=given_path, metavar="FILE", help="Also write a page with the figures."),
    ] = None,
    document: Annotated[
        Path | None, typer.Option(help="Also fill the tables in a Markdown file (docs/kinds.md).")
    ] = None,
    resamples: Resamples = 2000,
    seed: Seed = 0,
) -> None:
    """Kinds of models beside one another: how much does depth change the state of each?

    The runs must be of the same questions, depths and budget. Every comparison is on its own.

    Examples:
        sst-interp compare --runs kinds-backbone,kinds-sst,kinds-looped

        sst-interp compare --runs kinds-backbone,kinds-sst --contraction 8 --json
    """
    from sst_interp.documents import check_document, fill, markdown
    from sst_interp.experiments.contraction import check_texts, contraction_of
    from sst_interp.experiments.kinds import answers_of, compare_runs
    from sst_interp.report.result_page import result_page

    names = [name.strip() for name in runs.split(",") if name.strip()]
    if html is not None:
        check_output(html)
    if document is not None:
        check_document(document)
    if contraction:
        check_texts(names, contraction)
    asked: dict[str, Callable[[], Kinds | KindsAnswers | KindsContraction]] = {
        "shares": lambda: compare_runs(names, resamples, seed),
        "answers": lambda: answers_of(names, resamples, seed),
    }
    if contraction:
        asked["contraction"] = lambda: contraction_of(names, contraction, resamples, seed)
    results, missing = {}, {}
    for name, measure in asked.items():
        try:
            results[name] = measure()
        except Untestable as error:
            missing[name] = f"not testable: {error.message}."
    if html is not None:
        write_text(html, result_page(f"{', '.join(names)}: kinds", list(results.values())))
    if document is not None:
        tables = {name: markdown(result.shown) for name, result in results.items()}
        verdicts = {name: result.verdict for name, result in results.items()} | missing
        fill(document, tables | {f"{name} verdict": words for name, words in verdicts.items()}, others=True)
    if as_json:
        shown = {name: result.to_dict() for name, result in results.items()}
        print(json.dumps(shown | {name: {"verdict": words} for name, words in missing.items()}, indent=2))
        return
    for result in results.values():
        print_table(result.shown)
        say(f"\n{result.verdict}\n")
    for name, words in missing.items():
        say(f"{name}: {words}")
    if html is not None:
        say(f"page: {html}")
