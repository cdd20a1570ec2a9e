"""`sst-interp lens`: what does a state say before the last layer of the last iteration?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sst_interp.cli.common import JsonFlag, Resamples, RunOption, Seed, place, print_json, progress, takes_run
from sst_interp.errors import SSTError
from sst_interp.tables import print_table, say, write_text


@takes_run
def lens(
    run: RunOption,
    fit: Annotated[int, typer.Option(min=1, help="Fit on the prompts of so many questions.")] = 16,
    held_out: Annotated[int, typer.Option(min=2, help="Read those of so many others.")] = 16,
    tuned: Annotated[bool, typer.Option("--tuned", help="Also train a tuned lens.")] = False,
    out: Annotated[Path, place("FOLDER", "Where the lenses go.", "--out", "-o")] = Path("lenses"),
    html: Annotated[Path | None, place("FILE", "Also write a page with the figures.", "--html")] = None,
    as_json: JsonFlag = False,
    resamples: Resamples = 2000,
    seed: Seed = 0,
) -> None:
    """Fit a Jacobian lens per (layer, iteration) at position 0, and read other questions by it.

    A fit costs d_model / 32 batched backward passes through one token per 8 questions.

    Example:
        sst-interp lens --run demo --fit 16 --tuned --out lenses
    """
    from sst_interp.experiments.lenses import jacobian_lens, logit_lens, read_outs, tuned_lens
    from sst_interp.experiments.origin import origin_of
    from sst_interp.experiments.patching.run import written_tokens
    from sst_interp.files import check_output, check_place
    from sst_interp.findings.report.page import result_page
    from sst_interp.runs.provenance import prompt_tokens
    from sst_interp.runs.store import open_run

    check_place(out)
    if html is not None:
        check_output(html)
    opened = open_run(run)
    known = [int(q) for q in sorted(opened.questions["question"].unique())]
    if fit + held_out > len(known):
        raise SSTError(
            f"{fit} questions to fit on and {held_out} others are more than the run's {len(known)}",
            "give a smaller --fit or --held-out",
        )
    first = {q: written_tokens(opened, q, 1)[0] for q in known[: fit + held_out]}
    model, asked = origin_of(opened)
    depth = max(opened.recipe.depths)
    texts = [[*prompt_tokens(model, asked[q], opened.recipe.reply_prefix), int(t)] for q, t in first.items()]
    fitted = [text[:-1] for text in texts[:fit]]
    with progress("fitting", "text", fit) as show:
        made = [jacobian_lens(model, fitted, depth, lambda done: show(done, fit))]
    made += [tuned_lens(model, fitted, depth)] if tuned else []
    out.mkdir(parents=True, exist_ok=True)
    for one in made:
        one.save(out / f"{one.name}.safetensors")
    result = read_outs(model, texts[fit:], [logit_lens(model, depth), *made], resamples, seed)
    if html is not None:
        write_text(html, result_page(f"{run}: lenses", [result]))
    if as_json:
        return print_json(result.to_dict())
    rows = result.table.round(4).to_dict("records")
    print_table([{str(name): str(value) for name, value in row.items()} for row in rows])
    say(f"\n{result.verdict}\n")
    say(f"lenses: {out}")
