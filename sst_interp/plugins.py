"""Plugins: modules from outside that register an analysis, a claim or anything else that has a registry.

    SST_INTERP_PLUGINS=mine.py sst-interp claims --run gpqa

A plugin is a file or a module that the variable names (separated as in PATH), or a module that an installed
package names under the entry-point group `sst_interp.plugins`. Each is imported once, with your rights.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from sst_interp.errors import SSTError

VARIABLE, GROUP = "SST_INTERP_PLUGINS", "sst_interp.plugins"
_LOADED: set[str] = set()


def load_plugins() -> None:
    """Import every plugin that is named and has not been imported yet.

    Raises:
        SSTError: if one cannot be imported.
    """
    for named in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        _import(named, f"mend it, or take it out of {VARIABLE}")
    for entry in entry_points(group=GROUP):
        package = entry.dist.name if entry.dist is not None else entry.name
        _import(entry.value, f"the package {package} names it: `pip uninstall {package}` takes it out")


def _import(named: str, hint: str) -> None:
    is_file = named.endswith(".py") or os.sep in named
    key = str(Path(named).expanduser().resolve()) if is_file else named
    if key in _LOADED:
        return
    try:
        _import_file(Path(key)) if is_file else importlib.import_module(named)
    except Exception as error:
        said = " ".join(str(error).split())
        message = f"the plugin {named} cannot be imported: {type(error).__name__}: {said}"
        raise SSTError(message, hint) from error
    _LOADED.add(key)


def _import_file(file: Path) -> None:
    name = f"sst_interp_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
