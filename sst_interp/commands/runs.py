"""`sst-interp capture`, `publish`, `runs` and `datasets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sst_interp.commands.common import FreshFlag, JsonFlag, RunOption, given_path, stopping
from sst_interp.errors import SSTError
from sst_interp.printing import bar, print_table, say


def capture(
    run: RunOption,
    keep: Annotated[
        str | None,
        typer.Option(help="Full states to keep: none, position0, shifts or all (overrides the recipe)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set a key of the recipe: questions=8, depths=1,2, choices.kv=first, name=other ...",
        ),
    ] = None,
    fresh: FreshFlag = False,
) -> None:
    """Capture a run: every question at every depth, measured while it is generated.

    A capture that was interrupted, or a run with a damaged shard, goes on with what is missing.

    Examples:
        sst-interp capture demo

        sst-interp capture my-recipe.toml --keep all

        sst-interp capture demo --set questions=8 --set depths=1,2 --set name=demo-8
    """
    from sst_interp.capture import capture as capture_run
    from sst_interp.recipe import find_recipe

    recipe = find_recipe(run, captured=not fresh)
    if settings or keep is not None:
        recipe = recipe.with_settings([*(settings or []), *([f"keep={keep}"] if keep is not None else [])])
    with stopping():
        captured = capture_run(recipe, fresh=fresh)
    say(f"captured {len(captured.questions['question'].unique())} questions in {captured.folder}")


def publish(
    run: RunOption,
    out: Annotated[
        Path,
        typer.Argument(parser=given_path, metavar="OUT", help="Folder of the copy; it must not exist yet."),
    ],
    bits: Annotated[int, typer.Option(min=4, max=24, help="Significant bits of the floats in pairs.")] = 10,
    top: Annotated[
        int | None, typer.Option(min=0, help="Likely tokens to keep of each step's 100; default: all.")
    ] = None,
    iterations: Annotated[
        str, typer.Option(help="Iterations whose states at position 0 are kept; empty for none.")
    ] = "1",
) -> None:
    """Copy a complete run, smaller: measurements that others can read, check and pass round.

    Example:
        sst-interp publish --run gpqa published/gpqa --iterations 1,4
    """
    from sst_interp.publishing import publish as publish_run
    from sst_interp.runs import open_run

    try:
        kept = tuple(int(i) for i in iterations.split(",") if i.strip())
    except ValueError:
        raise SSTError(
            f"--iterations {iterations!r} is not a list of whole numbers", "for example 1,4"
        ) from None
    original = open_run(run)
    with bar(f"publishing {original.name}", unit="batch", total=0) as shown:

        def show(done: int, of: int) -> None:
            shown.total = of
            shown.update(done - shown.n)

        copy = publish_run(original, out, bits, top, kept, show)
    say(f"published: {copy.folder}, {copy.summary()['bytes'] / 1e6:.1f} MB")


def runs(as_json: JsonFlag = False) -> None:
    """List runs and recipes: yours, and those that ship.

    Example:
        sst-interp runs --json
    """
    from sst_interp.run_kind import kind_words
    from sst_interp.runs import list_runs

    rows = list_runs()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    shown = [
        {
            "name": row["name"],
            "state": row["state"],
            "kind": kind_words(row["kind"]),
            "checkpoint": row["checkpoint"] or "",
            "dataset": row["dataset"] or "",
            "questions": row["questions"] or ("all" if row["dataset"] else ""),
            "depths": " ".join(map(str, row["depths"] or [])),
            "size": f"{row['bytes'] / 1e6:.1f} MB" if row["bytes"] else "",
            "where": row["where"],
        }
        for row in rows
    ]
    print_table(shown)


def datasets(as_json: JsonFlag = False) -> None:
    """List the datasets that recipes can name; a .csv or .jsonl path works, too.

    Example:
        sst-interp datasets
    """
    from sst_interp.questions import DATASETS

    rows = [
        {
            "name": name,
            "splits": list(known.splits),
            "licence": known.licence,
            "restricted": known.restricted,
            "about": known.about,
        }
        for name, known in DATASETS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(
            [
                row | {"splits": " ".join(row["splits"]), "restricted": "yes" if row["restricted"] else ""}
                for row in rows
            ]
        )
