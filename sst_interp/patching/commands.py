"""`sst-interp patch`: is a shift the cause of the changed output?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sst_interp.commands.common import JsonFlag, given_path, stopping


def patch(
    run: Annotated[str, typer.Option("--run", "-r", help="Name of a captured run, or a path.")],
    questions: Annotated[int, typer.Option(min=1, help="How many; more go on from fewer.")] = 40,
    out: Annotated[
        Path | None, typer.Option(parser=given_path, help="Folder of the rows; default: patching/RUN.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers patched alone, spread evenly.")] = 6,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written after the patched position.")] = 6,
    as_json: JsonFlag = False,
) -> None:
    """Put one depth's state in the place of the other's and see whether the output follows.

    Each question is kept as it is finished: the same command goes on from there.

    Example:
        sst-interp patch --run arc-challenge --questions 40
    """
    from tqdm import tqdm

    from sst_interp.experiments.patching.finding import patching
    from sst_interp.experiments.patching.run import Plan, patch_run
    from sst_interp.findings.experiments import patching_rows
    from sst_interp.findings.of_run import keep_findings
    from sst_interp.runs import open_run

    opened = open_run(run)
    folder = out or Path("patching") / opened.name
    bar = tqdm(total=questions, desc=f"patching {opened.name}", unit="question", file=sys.stderr)

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar, stopping("what was patched is kept: the same command goes on from there"):
        rows = patch_run(opened, folder, questions, Plan(layers=layers, new_tokens=tokens), progress=show)
    result = patching(rows)
    made = {"questions": questions, "layers": layers, "tokens": tokens}
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print(result.table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
        print(f"\n{result.verdict}\n\nrows: {folder}")
    kept = keep_findings(opened, "patching", patching_rows(result), made, {"patching": result})
    print(f"claim C16: {kept}", file=sys.stderr)
