"""`sst-interp compare`, `probe`, `patch`, `hooks`, `harvest`, `train`, `evaluate`: a model at work again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sst_interp.cli.common import (
    JsonFlag,
    RayAddress,
    Resamples,
    RunOption,
    Seed,
    Workers,
    fleet_of,
    given_path,
    place,
    print_json,
    progress,
    stopping,
    takes_placement,
    takes_run,
    whole_numbers,
)
from sst_interp.errors import SSTError, Untestable
from sst_interp.experiments.probe import RULES
from sst_interp.files import check_output, read_json
from sst_interp.tables import bar, print_table, say, write_text

if TYPE_CHECKING:
    import pandas as pd

    from sst_interp.experiments.probe.saved import Probed
    from sst_interp.findings.claims import Row


def compare(
    runs: Annotated[str, typer.Option("--runs", "-r", help="With commas; the first is the reference.")],
    contraction: Annotated[int, typer.Option(min=0, help="Also sweep so many questions' text.")] = 0,
    as_json: JsonFlag = False,
    html: Annotated[Path | None, place("FILE", "Also write a page with the figures.", "--html")] = None,
    document: Annotated[Path | None, typer.Option(help="Also fill a Markdown file's places.")] = None,
    resamples: Resamples = 2000,
    seed: Seed = 0,
) -> None:
    """Kinds of models beside one another: how much does depth change the state of each?

    The runs must be of the same questions, depths and budget. Every comparison is on its own.

    Examples:
        sst-interp compare --runs kinds-backbone,kinds-sst,kinds-looped

        sst-interp compare --runs kinds-backbone,kinds-sst --contraction 8 --json
    """
    from sst_interp.experiments.contraction import check_texts, contraction_of
    from sst_interp.experiments.kinds import answers_of, compare_runs, settling_of
    from sst_interp.findings.report.page import result_page
    from sst_interp.tables import check_document, fill, markdown

    names = [name.strip() for name in runs.split(",") if name.strip()]
    if html is not None:
        check_output(html)
    if document is not None:
        check_document(document)
    if contraction:
        check_texts(names, contraction)
    given = names, resamples, seed
    asked: dict[str, Callable[[], Any]] = {"shares": partial(compare_runs, *given)}
    asked["answers"] = partial(answers_of, *given)
    asked["settling"] = partial(settling_of, *given)
    if contraction:
        asked["contraction"] = partial(contraction_of, names, contraction, resamples, seed)
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
        return print_json(shown | {name: {"verdict": words} for name, words in missing.items()})
    for result in results.values():
        print_table(result.shown)
        say(f"\n{result.verdict}\n")
    for name, words in missing.items():
        say(f"{name}: {words}")
    if html is not None:
        say(f"page: {html}")


LABELS = "; ".join(f"{name}: {rule.definition}" for name, rule in RULES.items())
PROBE_COLUMNS = ("auc", "sensitivity", "specificity", "balanced", "brier", "probe_minus")
"""Of the table of probes: each with `_low` and `_high`."""
POLICY_COLUMNS = ("accuracy", "passes", "beyond")
COUNTS = ("broken", "mended", "conservative")


@takes_run
def probe(
    run: RunOption,
    layer: Annotated[str, typer.Option(help="Layer, 0-based; `auto`: chosen inside each fold.")] = "auto",
    label: Annotated[str, typer.Option(help=f"Questions to tell from the others. {LABELS}.")] = "must-halt",
    permutations: Annotated[int, typer.Option(min=0, help="Permutations of the labels; 0: no test.")] = 1000,
    seed: Seed = 0,
    save: Annotated[str | None, typer.Option(help="Folder for the trained probe.")] = None,
    workers: Workers = None,
    ray: RayAddress = None,
    as_json: JsonFlag = False,
) -> None:
    """Train a probe of the state at position 0, validate it, and route by it.

    The probe reads the state after the first iteration of position 0 and tells which questions must halt
    there. Layer, dimensions and penalty are chosen inside each fold; the p-value permutes the labels through
    all of that. Plain probes, always-halt, never-halt, flat depths and the oracle stand beside it.

    The run must have kept its states at position 0 (`keep = "position0"`, the default). Where the model
    guesses, right and wrong are noise: ask for `--label answer-changed`. The results of `must-halt` are kept
    for the claims ledger (C12, C13).

    Examples:
        sst-interp probe --run gpqa

        sst-interp probe --run gpqa --label answer-changed --layer 15 --permutations 200

        sst-interp probe --run arc-challenge --save probes/arc --json > probe.json
    """
    from sst_interp.experiments.probe import saved
    from sst_interp.experiments.probe.fit import Design
    from sst_interp.findings.answers import PAPER_LABEL, probe_rows
    from sst_interp.findings.of_run import keep_findings
    from sst_interp.runs.store import open_run

    opened: Any = open_run(run)
    if save is not None:
        saved.check_save(save)
    if not opened.complete:
        captured = opened.questions["question"].nunique()
        say(f"note: {opened.name} is not complete: {captured} questions so far", sys.stderr)
    with progress(f"probing {opened.name}", "permutation", permutations) as show:
        design, moved = Design(seed=seed), lambda _, done, of: show(done, of)
        fleet = fleet_of(workers, ray)
        probed = saved.probe_run(opened, label, layer, permutations, design, progress=moved, fleet=fleet)
    rows = probe_rows(probed.halting, probed.routing)
    if as_json:
        print_json(_as_dict(probed, rows))
    else:
        say(_as_text(probed, rows))
    if label == PAPER_LABEL:
        made = {"label": label, "layer": layer, "permutations": permutations, "seed": seed}
        results = {"halting": probed.halting, "routing": probed.routing}
        by_question = probed.halting.scores[["question", "score"]].itertuples(index=False)
        scores = {int(question): float(score) for question, score in by_question}
        kept = keep_findings(opened, "probe", rows, made, results, scores)
        say(f"claims C12 and C13: {kept}", sys.stderr)
    if save is not None:
        say(f"probe: {probed.probe.save(save)}", sys.stderr)


def _as_dict(probed: Probed, rows: list[Row]) -> dict[str, Any]:
    """JSON-ready: both results, the rows of the claims ledger, and the trained probe."""
    claims = [
        {
            "claim": row.claim.id,
            "in words": row.claim.words,
            "paper": row.claim.paper,
            "this run": row.finding.here,
            "supported if": row.claim.rule,
            "grade": row.grade,
            "why": row.reason,
            "control": row.finding.control,
        }
        for row in rows
    ]
    trained = {"layer": probed.probe.layer, "dims": probed.probe.dims.tolist()}
    results = {"halting": probed.halting.to_dict(), "routing": probed.routing.to_dict()}
    return results | {"claims": claims, "probe": trained}


def _as_text(probed: Probed, rows: list[Row]) -> str:
    parts = [
        _table(probed.halting.table, ("name",), PROBE_COLUMNS),
        _table(probed.halting.checks, ("name",), ("value",), ("p", "knowing_nothing")),
        _table(probed.halting.readings, ("whose", "found", "of", "against"), (), ("rate", "p")),
        probed.halting.verdict,
        _table(probed.routing.table, ("name",), POLICY_COLUMNS, COUNTS),
        probed.routing.verdict,
    ]
    for row in rows:
        parts.append(f"{row.claim.id} ({row.claim.words}): {row.finding.verdict}. {row.finding.here}")
    return "\n\n".join(parts)


def _table(
    table: pd.DataFrame, names: tuple[str, ...], intervals: tuple[str, ...], plain: tuple[str, ...] = ()
) -> str:
    """Columns as they are, or with the intervals of `name`_low and `name`_high."""
    import pandas as pd

    def words(value: float, low: float, high: float) -> str:
        if value != value:
            return ""
        return f"{value:.3g}" if low == high or low != low else f"{value:.3g} [{low:.3g}, {high:.3g}]"

    shown: dict[str, Any] = {name: table[name] for name in names}
    for name in intervals:
        ends = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
        shown[name.replace("_", " ")] = [words(*row) for row in ends]
    shown |= {name.replace("_", " "): table[name] for name in plain}
    return pd.DataFrame(shown).to_string(index=False, na_rep="", float_format="{:.3g}".format)


@takes_run
def patch(
    run: RunOption,
    questions: Annotated[int, typer.Option(min=1, help="How many; more go on from fewer.")] = 40,
    out: Annotated[
        Path | None, place("FOLDER", "Folder of the rows; default: patching/RUN.", "--out")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers patched alone, spread evenly.")] = 6,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens written after the patched position.")] = 6,
    workers: Workers = None,
    ray: RayAddress = None,
    as_json: JsonFlag = False,
) -> None:
    """Put one depth's state in the place of the other's and see whether the output follows.

    Each question is kept as it is finished: the same command goes on from there.

    Example:
        sst-interp patch --run arc-challenge --questions 40
    """
    from sst_interp.experiments.patching.finding import patching
    from sst_interp.experiments.patching.run import Plan, patch_run
    from sst_interp.findings.answers import patching_rows
    from sst_interp.findings.of_run import keep_findings
    from sst_interp.runs.store import open_run

    opened = open_run(run)
    folder = out or Path("patching") / opened.name
    kept = "what was patched is kept: the same command goes on from there"
    with progress(f"patching {opened.name}", "question", questions) as show, stopping(kept):
        plan = Plan(layers=layers, new_tokens=tokens)
        rows = patch_run(opened, folder, questions, plan, progress=show, fleet=fleet_of(workers, ray))
    result = patching(rows)
    made = {"questions": questions, "layers": layers, "tokens": tokens}
    if as_json:
        print_json(result.to_dict())
    else:
        say(result.table.to_string(index=False, float_format=lambda x: f"{x:.3g}"))
        say(f"\n{result.verdict}\n\nrows: {folder}")
    kept = keep_findings(opened, "patching", patching_rows(result), made, {"patching": result})
    say(f"claim C16: {kept}", sys.stderr)


def hooks(
    model: Annotated[str, typer.Argument(help="A checkpoint, a backbone, or a folder of either.")],
    as_json: JsonFlag = False,
) -> None:
    """List every place in a model where a value can be read or changed: hook names, sites, shapes.

    A line stands for all layers that have the point; --json has a row per layer.

    Examples:
        sst-interp hooks smollm2-135m-sst

        sst-interp hooks smollm2-135m --json
    """
    from sst_interp.bridges import hook_points
    from sst_interp.models.loading import load

    rows = hook_points(load(model))
    if as_json:
        return print_json(rows)
    layers: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        name = row["name"] or row["site"]
        shape = " x ".join(map(str, row["shape"]))
        if row["layer"] is not None:
            name = name.replace(f".{row['layer']}.", ".{layer}.", 1)
        key = name, row["site"] or "", shape, f"from {row['first_iteration']}"
        layers.setdefault(key, []).extend([] if row["layer"] is None else [row["layer"]])
    names = "name", "site", "shape", "iterations"
    print_table(
        [dict(zip(names, key, strict=True)) | {"layers": spans(numbers)} for key, numbers in layers.items()]
    )


def spans(numbers: list[int]) -> str:
    """Whole numbers in ascending order as spans: `0-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def harvest(
    model: Annotated[str, typer.Argument(help="A checkpoint, a backbone, or a folder of either.")],
    texts: Annotated[Path, typer.Argument(parser=given_path, metavar="TEXTS", help="A .jsonl of texts.")],
    out: Annotated[Path, typer.Argument(parser=given_path, metavar="OUT", help="A folder for the states.")],
    iterations: Annotated[int, typer.Option(min=1, help="Depth of every position.")] = 1,
    tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many; default: all.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens read of each text, from its start.")] = 256,
    layers: Annotated[str, typer.Option(help="With commas; default: all.")] = "",
    keep: Annotated[str, typer.Option(help="Iterations, with commas; default: all.")] = "",
) -> None:
    """Read plain texts and write the hidden states: for sparse autoencoders, probes, other tools.

    A line of TEXTS is {"text": "..."}. The same command goes on after an interruption.

    Example:
        sst-interp harvest smollm2-135m-sst texts.jsonl states --iterations 4 --layers 12 --tokens 100000
    """
    from sst_interp.models.loading import load
    from sst_interp.runs.export import harvest as harvest_texts

    at: dict[str, Any] = {"layers": whole_numbers("--layers", layers, "4,12") if layers else None}
    at["keep"] = whole_numbers("--keep", keep, "1,4") if keep else None
    if not texts.is_file():
        raise SSTError(f"{texts} is not a file", 'a line of it is {"text": "..."}')
    kept = "what was read is kept: the same command goes on from there"
    with progress("reading", "text", 0) as show, stopping(kept):
        harvest_texts(load(model), texts, out, iterations, tokens, length, progress=show, **at)
    index = read_json(out / "index.json", "give another folder")
    say(
        f"{sum(shard['samples'] for shard in index['shards'])} positions of {len(index['rows'])} texts: {out}"
    )


@takes_placement
def train(
    placed: dict[str, str],
    recipe: Annotated[str, typer.Argument(help="A training recipe: a shipped name, or a .toml file.")],
    out: Annotated[Path | None, place("FOLDER", "Default: checkpoints/NAME.", "--out", "-o")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Erase what is there and train anew.")] = False,
    log: Annotated[
        str | None, typer.Option("--log", help="Also log to tensorboard, wandb (offline) or trackio.")
    ] = None,
) -> None:
    """Train a checkpoint: adapters and blend weights together, or its matched baseline.

    A training that was interrupted goes on from its last saved state when the same command is given again.

    Examples:
        sst-interp train smollm2-135m-sst

        sst-interp train smollm2-135m-sst --log tensorboard

        sst-interp train my-recipe.toml --out checkpoints/mine
    """
    from sst_interp.experiments.training_results import training_curves
    from sst_interp.findings.report.page import result_page
    from sst_interp.training.card import CURVES, read_log
    from sst_interp.training.recipe import find_training_recipe
    from sst_interp.training.trainer import Training
    from sst_interp.training.watch import find_log, watching

    if log is not None:
        find_log(log)  # before the model is loaded
    chosen = replace(find_training_recipe(recipe), **placed)  # pyright: ignore[reportArgumentType]
    say(f"loading {chosen.backbone} and {chosen.data} {chosen.placement.resolved()}", sys.stderr)
    training = Training(chosen, out, fresh)
    if training.split.too_long:
        words = f"{training.split.too_long} examples are longer than max_tokens = {chosen.max_tokens}"
        say(f"note: {words} and are left out", sys.stderr)
    shown = bar(f"training {chosen.name}", total=training.steps, initial=training.done, unit="step")

    def show(now: Training, line: dict[str, float]) -> None:
        if watch is not None:
            watch(line)
        recent = [row for row in now.log[-20:] if "loss" in row]
        speed = sum(row["tokens"] for row in recent) / sum(row["seconds"] for row in recent)
        loss = sum(row["loss"] for row in recent) / len(recent)
        shown.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s")
        shown.update()
        if "held_out_exact" in line:
            shown.write(f"step {now.done}: held out {line['held_out_exact']:.3f}", file=sys.stderr)

    def draw(folder: Path) -> None:
        curves = training_curves(read_log(folder), chosen.name)
        write_text(folder / CURVES, result_page(f"Training {chosen.name}", [curves]))

    given = training.folder, chosen.name, chosen.to_dict(), training.done
    watched = nullcontext() if log is None else watching(log, *given)
    with shown, stopping("the state is saved: the same command goes on from there"), watched as watch:
        folder = training.run(show, draw)
    curves = training_curves(read_log(folder), chosen.name)
    say(f"{curves.verdict}\ncheckpoint: {folder}\ncurves: {folder / CURVES}")


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints or backbones; the first is tested.")],
    depths: Annotated[str, typer.Option(help="Iteration depths.")] = "1,2,3,4",
    tasks: Annotated[str, typer.Option(help="With commas; default: GSM8K, and ARC by letter.")] = "",
    questions: Annotated[int | None, typer.Option(min=1, help="At most so many per task.")] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Also held-out training examples.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write the first one's model card.")] = False,
    out: Annotated[
        Path | None, place("FOLDER", "For the measurements; default: the checkpoint's.", "--out", "-o")
    ] = None,
    workers: Workers = None,
    ray: RayAddress = None,
    as_json: JsonFlag = False,
) -> None:
    """Loss and accuracy by iteration depth, models side by side, with question-level intervals.

    Each (model, task, depth) is kept when it is done: an interrupted evaluation goes on from there. A
    backbone is evaluated as it is, without a blend.

    Examples:
        sst-interp evaluate smollm2-135m-sst smollm2-135m-baseline smollm2-135m

        sst-interp evaluate checkpoints/mine --tasks gsm8k --questions 50 --depths 1,4

        sst-interp evaluate smollm2-135m --tasks arc-easy-likelihood-per-character --questions 200
    """
    from sst_interp.experiments.training_results import depth_scores
    from sst_interp.files import check_place
    from sst_interp.models.checkpoint import checkpoint_folder
    from sst_interp.runs.recipe import MAX_DEPTH
    from sst_interp.training.card import LOG, write_card
    from sst_interp.training.evaluation import BY_DEFAULT, evaluate_by_name

    at = whole_numbers("--depths", depths, "1,2,3,4")
    if any(depth > MAX_DEPTH for depth in at):
        raise SSTError(f"depths go up to {MAX_DEPTH}, not {max(at)}", "for example --depths 1,2,3,4")
    if out is not None:
        check_place(out, "give another --out")
    wanted = [task.strip() for task in tasks.split(",")] if tasks else list(BY_DEFAULT)
    own = models[0] if held_out else None
    twice = lambda name: [Path(m).name for m in models].count(Path(name).name) > 1  # noqa: E731
    given = at, wanted, questions, own, out, fleet_of(workers, ray)
    with stopping("what was measured is kept: the same command goes on from there"):
        measured = {
            name if twice(name) else Path(name).name: evaluate_by_name(name, *given) for name in models
        }
    scores = depth_scores(measured, next((name for name in measured if name.endswith("baseline")), None))
    if as_json:
        print_json(scores.to_dict())
    else:
        print_table([{str(k): v for k, v in row.items()} for row in scores.table.to_dict("records")])
        say(f"\n{scores.verdict}")
    if card and (folder := checkpoint_folder(models[0])) is not None:
        beside = checkpoint_folder(models[1]) if len(models) > 1 else None
        trained = beside is not None and (beside / LOG).is_file()
        say(f"card: {write_card(folder, scores, beside if trained else None)}", sys.stderr)
