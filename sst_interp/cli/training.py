"""`sst-interp train` and `evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from sst_interp.cli.common import JsonFlag, given_path, stopping
from sst_interp.errors import SSTError
from sst_interp.tables import bar, print_table, say, write_text


def train(
    recipe: Annotated[str, typer.Argument(help="A training recipe: a shipped name, or a .toml file.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=given_path,
            metavar="FOLDER",
            help="The checkpoint's folder; default: checkpoints/NAME.",
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Erase what is there and train anew.")] = False,
) -> None:
    """Train a checkpoint: adapters and blend weights together, or its matched baseline.

    A training that was interrupted goes on from its last saved state when the same command is given again.

    Examples:
        sst-interp train smollm2-135m-sst

        sst-interp train my-recipe.toml --out checkpoints/mine
    """
    from sst_interp.experiments.training_results import training_curves
    from sst_interp.findings.report.page import result_page
    from sst_interp.training.card import CURVES, read_log
    from sst_interp.training.recipe import find_training_recipe
    from sst_interp.training.trainer import Training

    chosen = find_training_recipe(recipe)
    say(f"loading {chosen.backbone} and {chosen.data}", sys.stderr)
    training = Training(chosen, out, fresh)
    if training.split.too_long:
        say(
            f"note: {training.split.too_long} examples are longer than max_tokens = {chosen.max_tokens} "
            "and are left out",
            sys.stderr,
        )
    shown = bar(f"training {chosen.name}", total=training.steps, initial=training.done, unit="step")

    def show(now: Training, line: dict[str, float]) -> None:
        recent = [row for row in now.log[-20:] if "loss" in row]
        speed = sum(row["tokens"] for row in recent) / sum(row["seconds"] for row in recent)
        shown.set_postfix_str(
            f"loss {sum(r['loss'] for r in recent) / len(recent):.3f}, {speed:.0f} tokens/s"
        )
        shown.update()
        if "held_out_exact" in line:
            shown.write(f"step {now.done}: held out {line['held_out_exact']:.3f}", file=sys.stderr)

    def draw(folder: Path) -> None:
        curves = training_curves(read_log(folder), chosen.name)
        write_text(folder / CURVES, result_page(f"Training {chosen.name}", [curves]))

    with shown, stopping("the state is saved: the same command goes on from there"):
        folder = training.run(show, draw)
    curves = training_curves(read_log(folder), chosen.name)
    say(f"{curves.verdict}\ncheckpoint: {folder}\ncurves: {folder / CURVES}")


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Checkpoints or backbones; the first is the one tested.")
    ],
    depths: Annotated[str, typer.Option(help="Iteration depths.")] = "1,2,3,4",
    tasks: Annotated[str, typer.Option(help="Comma-separated; default: all.")] = "",
    questions: Annotated[int | None, typer.Option(min=1, help="At most so many per task.")] = None,
    held_out: Annotated[
        bool,
        typer.Option("--held-out", help="Also the held-out training examples (needs the training data)."),
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Write the results into the first one's model card.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            parser=given_path,
            metavar="FOLDER",
            help="Where measurements are kept; default: with the checkpoint.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Loss and accuracy by iteration depth, models side by side, with question-level intervals.

    Each (model, task, depth) is kept when it is done: an interrupted evaluation goes on from there. A
    backbone is evaluated as it is, without a blend.

    Examples:
        sst-interp evaluate smollm2-135m-sst smollm2-135m-baseline smollm2-135m

        sst-interp evaluate checkpoints/mine --tasks gsm8k --questions 50 --depths 1,4
    """
    from sst_interp.experiments.training_results import depth_scores
    from sst_interp.files import check_place
    from sst_interp.models.checkpoint import checkpoint_folder
    from sst_interp.runs.recipe import MAX_DEPTH
    from sst_interp.training.card import write_card
    from sst_interp.training.evaluation import TASKS, evaluate_by_name

    try:
        at = [int(depth) for depth in depths.split(",")]
    except ValueError:
        raise SSTError(f"--depths {depths!r} is not a list of whole numbers", "for example 1,2,3,4") from None
    if any(depth > MAX_DEPTH for depth in at):
        raise SSTError(f"depths go up to {MAX_DEPTH}, not {max(at)}", "for example --depths 1,2,3,4")
    if out is not None:
        check_place(out, "give another --out")
    wanted = [task.strip() for task in tasks.split(",")] if tasks else list(TASKS)
    own = models[0] if held_out else None
    twice = lambda name: [Path(m).name for m in models].count(Path(name).name) > 1  # noqa: E731
    with stopping("what was measured is kept: the same command goes on from there"):
        measured = {
            name if twice(name) else Path(name).name: evaluate_by_name(name, at, wanted, questions, own, out)
            for name in models
        }
    scores = depth_scores(measured, next((name for name in measured if name.endswith("baseline")), None))
    if as_json:
        print(json.dumps(scores.to_dict(), indent=2))
    else:
        print_table([{str(k): v for k, v in row.items()} for row in scores.table.to_dict("records")])
        say(f"\n{scores.verdict}")
    if card and (folder := checkpoint_folder(models[0])) is not None:
        say(f"card: {write_card(folder, scores)}", sys.stderr)
