"""sst-interp: the open instrument for language models that think in latent space.

    import sst_interp as sst

    model = sst.load("smollm2-135m", alpha=0.027)
    model.generate([model.chat("Why is the sky blue?")], iterations=4).texts
    run = sst.open_run("demo")

Everything is imported on first use, so `import sst_interp` and `sst-interp --help` are quick.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sst_interp.errors import SSTError as SSTError
    from sst_interp.experiments.lenses import open_lens as open_lens
    from sst_interp.models.choices import Choices as Choices
    from sst_interp.models.loading import load as load
    from sst_interp.models.model import StateStreamModel as StateStreamModel
    from sst_interp.models.model import attach as attach
    from sst_interp.models.model import attach_looped as attach_looped
    from sst_interp.models.model import attach_lrt as attach_lrt
    from sst_interp.runs.recipe import Recipe as Recipe
    from sst_interp.runs.store import list_runs as list_runs
    from sst_interp.runs.store import open_run as open_run

_WHERE = {
    "Choices": "models.choices",
    "SSTError": "errors",
    "load": "models.loading",
    "StateStreamModel": "models.model",
    "attach": "models.model",
    "attach_looped": "models.model",
    "attach_lrt": "models.model",
    "Recipe": "runs.recipe",
    "open_run": "runs.store",
    "list_runs": "runs.store",
    "open_lens": "experiments.lenses",
}

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _WHERE:
        raise AttributeError(f"module 'sst_interp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sst_interp.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("sst-interp")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0"
