"""The entry point of `sst-interp`: small, so that Ctrl-C is one line from its first moment to its last.

A mistake that a person can put right prints one line that says what is wrong and one that says what to
type, without a traceback, and exits with code 2. Progress goes to stderr, results to stdout.
"""

from __future__ import annotations

import signal
import sys

STOPPED = 130
"""Exit code of a command that was stopped before it could say what is kept."""


def __getattr__(name: str) -> object:
    """`app`, imported when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return whole_app()


def whole_app() -> object:
    """The app with every command, in the panels of its help."""
    from sst_interp.cli import experiments, runs, studies
    from sst_interp.cli.common import app

    if app.registered_commands:
        return app
    panels = {
        "Run": (
            *(runs.basin_shifts, runs.claims, runs.report, runs.capture),
            *(runs.publish, runs.runs, runs.datasets),
        ),
        "Look": (experiments.compare, experiments.probe, experiments.patch),
        "Train": (experiments.train, experiments.evaluate),
    }
    for panel, commands in panels.items():
        for command in commands:
            app.command(rich_help_panel=panel)(command)
    app.add_typer(studies.app, name="study", rich_help_panel="Study")
    return app


def main() -> None:
    """Entry point of `sst-interp`."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    try:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody ignores it
            signal.signal(signal.SIGINT, stop)
        from sst_interp.cli.common import run

        whole_app()
        run()
    except KeyboardInterrupt:
        _stopped()
    except Exception:
        if not stopped:
            raise
        _stopped()  # a library that was being imported made another error of it
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is to leave


def _stopped() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("error: stopped\n  the same command starts again", file=sys.stderr)
    sys.exit(STOPPED)
