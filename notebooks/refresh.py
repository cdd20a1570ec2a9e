"""Executes notebooks and keeps what they show: every figure as its data and, beside it, as a picture.

    python notebooks/refresh.py          # all of them
    python notebooks/refresh.py 02 05    # those whose names begin so

Code hosts show the pictures, which need no script. They are drawn in Chromium (that of the report's tests)
after execution, so that executing a notebook, as the tests do, needs no browser.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
PLOTLY, PNG = "application/vnd.plotly.v1+json", "image/png"
WIDTH, SCALE = 860, 1.5
LARGEST_DATA = 120_000
"""Bytes of a figure's data; a larger figure is kept as its picture alone."""
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
DRAW = """figure => {
    const layout = {...figure.layout, paper_bgcolor: "white", plot_bgcolor: "white"};
    let height = layout.height || 420;
    const entries = figure.data.filter(trace => trace.name && trace.showlegend !== false).length;
    if (entries >= 4 && layout.showlegend !== false) {  // many entries would lie over the title
        layout.legend = {orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, xanchor: "left"};
        height += 24 * Math.ceil(entries / 2);
        layout.height = height;
        layout.margin = {...layout.margin, t: 80, b: 70 + 24 * Math.ceil(entries / 2)};
    }
    const size = {width: figure.width, height: height, scale: figure.scale};
    return Plotly.toImage({data: figure.data, layout: layout}, {format: "png", ...size});
}"""


def execute(path: Path, folder: Path, timeout: int = 600) -> NotebookNode:
    """The notebook with the outputs of running it in `folder`: no progress bars, figures as data only.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    env = os.environ | {"PLOTLY_RENDERER": "plotly_mimetype", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"SST_INTERP_RUNS": "runs", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", record_timing=False)
    client.resources = {"metadata": {"path": str(folder)}}
    client.execute(env=env)
    # Progress goes to stderr, and is no part of what is shown.
    for cell in code_cells(notebook):
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """The data of every output that is a figure."""
    for cell in code_cells(notebook):
        yield from (output.data for output in cell.outputs if PLOTLY in output.get("data", {}))


def add_pictures(notebook: NotebookNode) -> None:
    """Put a picture beside the data of every figure, and leave out data that is large."""
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    found = list(figures(notebook))
    if not found:
        return
    chromium = os.environ.get("SST_INTERP_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        sys.exit("no Chromium: set SST_INTERP_CHROMIUM to its path, or install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.add_script_tag(content=get_plotlyjs())
        for data in found:
            figure = json.loads(json.dumps(data[PLOTLY]))
            uri = page.evaluate(DRAW, figure | {"width": WIDTH, "scale": SCALE})
            data[PNG] = uri.partition(",")[2]
            data.pop("text/html", None)
            if len(json.dumps(figure)) > LARGEST_DATA:
                del data[PLOTLY]
        browser.close()


def main(names: list[str]) -> None:
    """Refresh the notebooks whose names begin with one of `names`; all of them if there are none."""
    for path in sorted(HERE.glob("*.ipynb")):
        if names and not path.name.startswith(tuple(names)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        add_pictures(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
