"""A study: a question, tables that resume, and findings written as Markdown.

A study is a class with `@register_study`. It names its question, its tables and its findings; `run` measures
what is missing. `TrainingStudy` is the common case: one small model trained in several ways, over seeds.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import pandas as pd

from sst_interp import paths
from sst_interp.analyses.result import Result
from sst_interp.errors import SSTError, Untestable, unknown_name
from sst_interp.experiments.studies.fit import Arm, Training, step_times
from sst_interp.experiments.table import Table, same_plan
from sst_interp.files import check_place
from sst_interp.tables import NOT_YET

Progress = Callable[[str, int, int], Any]
"""(what is measured, done, in all)."""


class Finding(NamedTuple):
    """What a study makes of its tables."""

    name: str
    """Its verdict is called `NAME verdict`."""
    find: Callable[[Mapping[str, pd.DataFrame]], Result]
    """From the study's tables. Raises Untestable where they do not allow it."""
    written: Mapping[str, Callable[[Any], str]]
    """Name of a table -> the result as that Markdown table."""


class Study(ABC):
    """A question, the tables that answer it, and how they are measured."""

    name: ClassVar[str]
    """On the command line: `sst-interp study run NAME`."""
    question: ClassVar[str]
    page: ClassVar[str]
    """The document that shows it."""
    options: ClassVar[tuple[str, ...]] = ()
    """Options of the command line that `run` takes: model, questions, verify, sizes, seeds, steps, text."""
    tables: ClassVar[Mapping[str, Table]]
    findings: ClassVar[tuple[Finding, ...]]

    @abstractmethod
    def run(self, folder: str | Path, *, progress: Progress | None = None) -> dict[str, pd.DataFrame]:
        """Measure what the folder's tables lack, and return the tables."""

    def read(self, folder: str | Path) -> dict[str, pd.DataFrame]:
        """The tables by name; an empty one where there is none yet. Raises SSTError if one is damaged."""
        return {name: table.read(folder) for name, table in self.tables.items()}

    def measured(self, folder: str | Path) -> bool:
        """Whether a folder holds any of its tables."""
        return any((Path(folder) / table.file).is_file() for table in self.tables.values())

    def results(self, folder: str | Path) -> dict[str, Result | Untestable]:
        """Every finding by name, or why there is none."""
        rows, results = self.read(folder), {}
        for finding in self.findings:
            try:
                results[finding.name] = finding.find(rows)
            except Untestable as why:
                results[finding.name] = why
        return results

    @property
    def command(self) -> str:
        """What measures it."""
        return f"sst-interp study run {self.name}" + (" MODEL" if "model" in self.options else "")

    def names(self) -> list[str]:
        """Of everything that `show` writes."""
        return [name for f in self.findings for name in (*f.written, f"{f.name} verdict")]

    def show(self, folder: str | Path) -> dict[str, str]:
        """Every table and verdict as Markdown, by name; those that are not measured yet say what to type."""
        shown, measured = {}, self.measured(folder)
        for finding, result in zip(self.findings, self.results(folder).values(), strict=True):
            if not isinstance(result, Untestable):
                shown |= {name: write(result) for name, write in finding.written.items()}
                verdict = result.verdict
            else:
                shown |= dict.fromkeys(finding.written, NOT_YET)
                why = f"Not testable: {result.message}."
                verdict = why if measured else f"{NOT_YET} `{self.command}` measures it."
            shown[f"{finding.name} verdict"] = verdict
        return shown

    def folder(self, studies: Path | None = None) -> Path:
        """The folder asked for; else the working folder's, if it has a table of this study; else the shipped.

        Raises SSTError if the folder asked for is not there.
        """
        if studies is None:
            own = paths.studies_dir()
            return own if self.measured(own) else paths.shipped("studies")
        if not studies.is_dir():
            raise SSTError(f"{studies} is not a folder of studies", f"`{self.command}` makes one")
        return studies


class Job(NamedTuple):
    """One training of a study."""

    seed: int
    arm: Arm
    setting: Any = None
    """What the study varies besides: a blend, a number of layers."""


class TrainingStudy(Study):
    """The same small model trained in several ways, for several seeds.

    All arms of a seed start from the same weights and see the same data in the same order, so that
    differences are taken within a seed. A plan decides all results, but for seeds and arms; `rounds` are of
    the timing. What is None is the study's own.
    """

    options: ClassVar[tuple[str, ...]] = ("seeds", "steps")
    plan_file: ClassVar[str]
    main: ClassVar[str] = "losses"
    """The table that says which trainings are done: it is written last."""
    new_plan: ClassVar[type[Any]]
    """A dataclass; with its defaults it is the study's own plan."""
    default_arms: ClassVar[tuple[Arm, ...]]
    default_rounds: ClassVar[int] = 0

    def __init__(
        self, plan: Any = None, arms: Sequence[Arm] | None = None, rounds: int | None = None
    ) -> None:
        self.plan = self.new_plan() if plan is None else plan
        self.arms = self.default_arms if arms is None else tuple(arms)
        self.rounds = self.default_rounds if rounds is None else rounds

    def jobs(self, seeds: Sequence[int]) -> list[Job]:
        """Every training, in order."""
        return [Job(seed, arm) for seed in seeds for arm in self.arms]

    def about(self, job: Job) -> dict[str, Any]:
        """The columns that name a training in the main table."""
        return {"seed": job.seed, "arm": job.arm.name}

    @abstractmethod
    def begin(self, job: Job) -> Training:
        """A training before its first step."""

    @abstractmethod
    def measure(self, job: Job, training: Training, after_step: Callable[[], Any]) -> dict[str, pd.DataFrame]:
        """Take all steps of a training, and return its rows by table, the main one last."""

    def missing(self, folder: str | Path, seeds: Sequence[int]) -> list[Job]:
        """Trainings that are not in the table."""
        jobs = self.jobs(seeds)
        lacks = self.tables[self.main].missing(folder, [self.about(job) for job in jobs])
        return [job for job, lack in zip(jobs, lacks, strict=True) if lack]

    def run(
        self,
        folder: str | Path,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        steps: int | None = None,
        progress: Progress | None = None,
    ) -> dict[str, pd.DataFrame]:
        """Train what is missing, and return the tables.

        Args:
            seeds: each has its own start and its own data, shared by all arms.
            steps: of the shortest training; None for the plan's.
            progress: called after every step with the position passes done and in all.

        Raises:
            SSTError: the folder holds the study of another plan.
        """
        plan = self.plan if steps is None else replace(self.plan, steps=steps)
        return type(self)(plan, self.arms, self.rounds).train(folder, seeds, progress)

    def train(
        self, folder: str | Path, seeds: Sequence[int], progress: Progress | None = None
    ) -> dict[str, pd.DataFrame]:
        """`run` with this very plan."""
        folder = Path(folder)
        check_place(folder, "give another --out")
        same_plan(folder / self.plan_file, self.plan)
        missing, done = self.missing(folder, seeds), 0
        total = sum(self.passes(job) for job in missing)
        for job in missing:
            words = ", ".join(f"{key} {value}" for key, value in self.about(job).items())

            def after_step(job: Job = job, words: str = words) -> None:
                nonlocal done
                done += job.arm.passes
                if progress is not None:
                    progress(words, round(done), total)

            for name, rows in self.measure(job, self.begin(job), after_step).items():
                self.tables[name].put(folder, rows)
        if self.rounds and "times" in self.tables and not (folder / self.tables["times"].file).is_file():
            trainings = [self.begin(Job(0, arm, self.jobs([0])[0].setting)) for arm in self.arms]
            self.tables["times"].put(folder, step_times(trainings, self.rounds))
        return self.read(folder)

    def passes(self, job: Job) -> int:
        """Position passes of a training, in steps of a baseline."""
        return round(self.plan.steps * job.arm.longer * job.arm.passes)


_STUDIES: dict[str, type[Study]] = {}
S = TypeVar("S", bound=type[Study])


def register_study(study: S) -> S:
    """Make a study known by its name. A decorator."""
    _STUDIES[study.name] = study
    return study


def studies() -> dict[str, type[Study]]:
    """Every study by name, those of all modules of this package."""
    package = importlib.import_module("sst_interp.experiments.studies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_STUDIES.items()))


def find_study(name: str) -> Study:
    """The study of a name, with its own plan. Raises SSTError with the nearest names if there is none."""
    known = studies()
    if name not in known:
        raise unknown_name("study", name, known, "sst-interp study list")
    return known[name]()
