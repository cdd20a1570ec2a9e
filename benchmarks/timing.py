"""Paired timing: alternate the contestants in one process, report medians and the median of pair ratios.

Wall times on a shared machine drift; a ratio within a pair does not. Nothing here is a test.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def machine() -> str:
    """One line about what the numbers were measured on."""
    processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def paired(contestants: Mapping[str, Callable[[], object]], pairs: int = 5) -> dict[str, list[float]]:
    """Seconds per call, contestants in turn (A B C, A B C, ...), after one warm-up of each. A contestant that
    returns a float has timed itself.
    """
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(pairs):
        for name, run in contestants.items():
            start = time.perf_counter()
            own = run()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """Median over pairs of time(a) / time(b)."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


def show(seconds: dict[str, list[float]], per: float = 1, unit: str = "ms") -> None:
    """A line per contestant: median and range, in milliseconds per `per`."""
    for name, values in seconds.items():
        ms = [1e3 * v / per for v in values]
        print(f"  {name:42} {statistics.median(ms):9.1f} {unit}   [{min(ms):.1f}, {max(ms):.1f}]")
