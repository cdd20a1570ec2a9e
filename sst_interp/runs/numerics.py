"""What decides the last bits of a batch: hardware, versions, kernels, threads."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sst_interp.models.stream import Recurrence


def numerics(model: Recurrence) -> dict[str, Any]:
    """The fingerprint of a model as it runs here: where two agree, a batch has the same bytes."""
    backbone = model.backbone
    about: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "attention": str(getattr(backbone.config, "_attn_implementation", None)),
        "compiled": str(getattr(backbone, "speed", None) or "no"),
    }
    if backbone.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(backbone.device)
        about |= {"device": torch.cuda.get_device_name(backbone.device), "capability": f"{major}.{minor}"}
        about |= {"cuda": str(torch.version.cuda), "driver": _first(Path("/proc/driver/nvidia/version"))}
        return about
    kernels = torch.backends.cpu.get_cpu_capability()
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    about |= {"device": _processor() if backbone.device.type == "cpu" else backbone.device.type}
    return about | {"kernels": f"{kernels} AMX" if amx else kernels, "threads": torch.get_num_threads()}


def digest(about: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for a fingerprint in a manifest."""
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:12]


def apart(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Where two fingerprints differ: `threads 1, now 2`."""
    keys = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    return "; ".join(f"{key} {was.get(key, 'unknown')}, now {now.get(key, 'unknown')}" for key in keys)


def _first(path: Path) -> str:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
