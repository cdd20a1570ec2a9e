"""Items mapped over workers that have loaded something once: here, on N processes, or on a cluster, with Ray.

It knows nothing of runs. What a worker makes of an item comes back to the process that asked, which alone
writes. A worker that dies costs the item in hand; an item that fails three times is skipped and named.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from sst_interp.errors import SSTError
from sst_interp.tables import say

TRIES = 3
"""An item that has failed so often is skipped."""
POLL = 1.0
"""Seconds between two looks at what the workers do."""
NAMED = 4
"""Workers that a progress bar names."""
INHERITED = ("SST_INTERP_", "HF_HUB_OFFLINE", "HF_HOME")
"""Environment variables of this process that workers on other machines get, too."""

Item = Hashable
Work = Callable[[Any, Callable[[int], Any]], Any]
"""(item, told) -> result; `told` gets the units of progress. `about()`, if any, says what it is of."""


class Unfit(SSTError):
    """A worker cannot take part; the others go on."""


@dataclass(frozen=True)
class Fleet:
    """Which workers there are."""

    workers: int | None = None
    """How many; None: one per GPU of the cluster, or one per machine that has none."""
    address: str | None = None
    """Of a Ray cluster: `auto`, `host:port`, `ray://host:port`. None: processes of this machine."""
    gpus: float | None = None
    """GPUs of each; None: one, if there are any."""
    threads: int | None = None
    """CPU threads of each; None: OMP_NUM_THREADS, or this machine's cores divided among them."""


class Tasks:
    """The items that are still to be done, and those that failed too often."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._queue = deque(items)
        self._failures: Counter[Item] = Counter()
        self.skipped: dict[Item, str] = {}

    def __bool__(self) -> bool:
        return bool(self._queue)

    def next(self) -> Item:
        """The next item."""
        return self._queue.popleft()

    def again(self, item: Item) -> None:
        """Do an item next that nobody is to blame for, or that follows on another."""
        self._queue.appendleft(item)

    def failed(self, item: Item, reason: str) -> None:
        """Do an item once more, after all others; or skip it."""
        self._failures[item] += 1
        if self._failures[item] < TRIES:
            self._queue.append(item)
        else:
            self.skipped[item] = reason


class Alone:
    """The process that asks is the only worker. An error ends it."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def first(self) -> Any:
        """What the work says of itself."""
        return self.work.about()  # type: ignore[attr-defined]

    def run(
        self,
        items: Iterable[Item],
        done: Callable[[Any, Any], Item | None],
        bar: Any,
        name: Callable[[Any], str] = str,
        accept: Callable[[Any], Any] | None = None,
    ) -> dict[Item, str]:
        """As `Team.run`; nothing is tried twice."""
        tasks = Tasks(items)
        while tasks:
            item = tasks.next()
            bar.set_postfix_str(name(item))
            after = done(item, self.work(item, bar.update))
            if after is not None:
                tasks.again(after)
        return {}


@dataclass(eq=False)
class _Member:
    number: int
    actor: Any
    about: Any = None
    where: str = ""
    follows: list[Item] = field(default_factory=list)


class Team:
    """Workers on Ray; use it as a context manager.

    Args:
        fleet: where and how many.
        make: called once in every worker; gives its `Work`. It must be importable there.
    """

    def __init__(self, fleet: Fleet, make: Callable[[], Work]) -> None:
        self.fleet, self.make = fleet, make
        self._starting: dict[Any, _Member] = {}
        self._busy: dict[Any, tuple[_Member, Item]] = {}
        self._idle: list[_Member] = []
        self._spawned = self._died = 0
        self._refused: SSTError | None = None
        self._accept: Callable[[Any], Any] | None = None

    def __enter__(self) -> Team:
        self._ray, self._ours, self._options, count = _connected(self.fleet)
        self._stdout = redirect_stdout(sys.stderr)  # Ray tells of dead workers where results belong
        self._stdout.__enter__()
        for _ in range(count):
            self._spawn()
        return self

    def __exit__(self, *_: object) -> None:
        members = [*self._starting.values(), *(m for m, _ in self._busy.values()), *self._idle]
        for member in members:
            self._ray.kill(member.actor)
        if self._ours:
            self._ray.shutdown()
        self._stdout.__exit__(None, None, None)

    def first(self) -> Any:
        """What the first worker that is ready says of itself (`about`).

        Raises:
            SSTError: none gets ready.
        """
        while not self._idle:
            self._started(self._ray.wait(list(self._starting), timeout=POLL)[0])
            self._any_left()
        return self._idle[0].about

    def run(
        self,
        items: Iterable[Item],
        done: Callable[[Any, Any], Item | None],
        bar: Any,
        name: Callable[[Any], str] = str,
        accept: Callable[[Any], Any] | None = None,
    ) -> dict[Item, str]:
        """Do all items, in any order.

        Args:
            done: called here with an item and its result. What it returns is done next, by the same worker
                while that lives.
            bar: counts the units that workers are told of, and says who has what.
            name: an item in words.
            accept: called here with a worker's `about` before it gets an item; raises `Unfit` to refuse it.

        Returns:
            Why, of every item that failed three times.

        Raises:
            SSTError: no worker is left; whatever `done` raises.
        """
        tasks, settled = Tasks(items), bar.n
        self._accept = accept
        self._idle = [member for member in self._idle if self._fits(member)]
        while tasks or self._busy or any(member.follows for member in self._idle):
            for member in list(self._idle):
                if member.follows or tasks:
                    item = member.follows.pop() if member.follows else tasks.next()
                    self._idle.remove(member)
                    self._busy[member.actor.do.remote(item)] = member, item
            self._any_left()
            waited = [*self._busy, *self._starting]
            ready, _ = self._ray.wait(waited, timeout=POLL)
            self._started([ref for ref in ready if ref in self._starting])
            for ref in [ref for ref in ready if ref in self._busy]:
                member, item = self._busy.pop(ref)
                alive, told, result = self._result(ref)
                if isinstance(result, Unfit):
                    self._dismiss(member, result)
                    tasks.again(item)
                    continue
                if isinstance(result, Exception):
                    tasks.failed(item, _words(result))
                    if item not in tasks.skipped:
                        say(f"note: {name(item)} failed, and is tried again: {_words(result)}", sys.stderr)
                else:
                    settled += told
                    after = done(item, result)
                    member.follows += [] if after is None else [after]
                del result
                if alive:
                    self._idle.append(member)
                else:
                    for item in member.follows:
                        tasks.again(item)
                    self._ray.kill(member.actor)
                    self._spawn()
            self._show(bar, settled, name)
        return tasks.skipped

    def _spawn(self) -> None:
        fleet, self._spawned = self.fleet, self._spawned + 1
        actor = self._ray.remote(_Worker).options(**self._options).remote(fleet.threads or 1, os.getcwd())
        self._starting[actor.start.remote(self.make)] = _Member(self._spawned, actor)

    def _started(self, ready: Iterable[Any]) -> None:
        """Workers that are ready, or are not going to be."""
        for ref in ready:
            member = self._starting.pop(ref)
            _, _, result = self._result(ref)
            if isinstance(result, SSTError):
                self._dismiss(member, result)
            elif isinstance(result, Exception):
                self._died += 1
                self._ray.kill(member.actor)
                if self._died >= TRIES:
                    said = f"workers die while they start: {_words(result)}"
                    raise SSTError(said, "one worker may need more memory than there is: lower --workers")
                self._spawn()
            else:
                self._died, (member.where, member.about) = 0, result
                if self._fits(member):
                    self._idle.append(member)

    def _fits(self, member: _Member) -> bool:
        try:
            if self._accept is not None:
                self._accept(member.about)
        except Unfit as error:
            self._dismiss(member, error)
            return False
        return True

    def _dismiss(self, member: _Member, error: SSTError) -> None:
        self._refused = error
        where = f" ({member.where})" if member.where else ""
        say(f"note: worker {member.number}{where} does not take part: {error.message}", sys.stderr)
        self._ray.kill(member.actor)

    def _any_left(self) -> None:
        if not (self._idle or self._busy or self._starting):
            raise self._refused or SSTError("no worker is left", "start the same command again")

    def _result(self, ref: Any) -> tuple[bool, int, Any]:
        """(whether its worker lives, units told, what came back or the exception)."""
        errors = self._ray.exceptions
        try:
            told, result = self._ray.get(ref)
            return True, told, result
        except errors.RayTaskError as error:
            return True, 0, error.cause if isinstance(error.cause, Exception) else error
        except errors.RayError as error:
            return False, 0, error

    def _show(self, bar: Any, settled: int, name: Callable[[Any], str]) -> None:
        asked = {member.actor.status.remote(): (member, item) for member, item in self._busy.values()}
        there = self._ray.wait(list(asked), num_returns=len(asked), timeout=POLL)[0] if asked else []
        units, words = settled, []
        for ref in there:
            member, item = asked[ref]
            told = self._result(ref)[1]
            units += told
            words.append(f"{member.where} {name(item)}")
        seen(words)
        more = f", {len(words) - NAMED} more" if len(words) > NAMED else ""
        bar.n = units
        bar.set_postfix_str(", ".join(words[:NAMED]) + more)


def seen(words: list[str]) -> None:
    """Told who has what, a line per busy worker (`host:pid item`): for tests."""


class _Worker:
    """What Ray runs: two threads, one that works and one that says how far it is."""

    def __init__(self, threads: int, folder: str) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if os.path.isdir(folder):
            os.chdir(folder)  # names of files in a recipe are read from there
        self.threads, self.told = threads, 0

    def start(self, make: Callable[[], Work]) -> tuple[int, Any]:
        self.work = make()
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(self.threads)
        about = getattr(self.work, "about", lambda: None)()
        return 0, (f"{socket.gethostname()}:{os.getpid()}", about)

    def do(self, item: Any) -> tuple[int, Any]:
        self.told = 0
        result = self.work(item, self._count)
        return self.told, result

    def status(self) -> tuple[int, None]:
        return self.told, None

    def _count(self, units: int) -> None:
        self.told += units


def _words(error: Exception) -> str:
    if isinstance(error, SSTError):
        return error.message
    kind = type(error).__name__
    return "its worker died" if kind == "ActorDiedError" else f"{kind}: {_line(error)}"


def _line(error: Exception) -> str:
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), "no reason given")


def _connected(fleet: Fleet) -> tuple[Any, bool, dict[str, Any], int]:
    """Ray, whether it was started for this, the options of a worker, and how many there are."""
    if find_spec("ray") is None:
        raise SSTError("workers need Ray, which is not installed", 'pip install "sst-interp[ray]"')
    if fleet.workers is not None and fleet.workers < 1:
        raise SSTError(f"workers = {fleet.workers} is not a whole number from 1", "for example --workers 2")
    for key, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}.items():
        os.environ.setdefault(key, value)
    import ray

    ours = not ray.is_initialized()
    if ours:
        how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if fleet.address is None:
            cpus = max(fleet.workers or 1, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **how)
        else:
            _join(ray, fleet.address, how)
    there = ray.cluster_resources()
    machines = sum(node["Alive"] for node in ray.nodes())
    count = fleet.workers or int(there.get("GPU", 0)) or machines
    gpus = min(1.0, there.get("GPU", 0) / count) if fleet.gpus is None else fleet.gpus
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 2}
    if fleet.address is not None:
        variables = {k: v for k, v in os.environ.items() if k.startswith(INHERITED)}
        options["runtime_env"] = {"env_vars": variables}
    return ray, ours, options, count


def _join(ray: Any, address: str, how: dict[str, Any]) -> None:
    hint = "`ray start --head` starts a cluster, and says its address"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":  # Ray itself would wait for a minute
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError) as error:
            raise SSTError(f"no Ray cluster answers at {address}: {_line(error)}", hint) from None
    try:
        ray.init(address=address, **how)
    except Exception as error:  # other versions of Python or Ray there; nothing there; a token
        said = f"cannot join the Ray cluster at {address}: {_line(error)}"
        raise SSTError(said, f"{hint}; one that asks for a token needs RAY_AUTH_MODE=token") from error


def with_threads(fleet: Fleet) -> Fleet:
    """The fleet with its number of threads, which decides the last bits on a CPU."""
    if fleet.threads is not None:
        return fleet
    said = os.environ.get("OMP_NUM_THREADS", "")
    here = (os.cpu_count() or 1) // (fleet.workers or 1) if fleet.address is None else 1
    threads = int(said) if said.isdigit() and int(said) else max(1, here)
    return Fleet(fleet.workers, fleet.address, fleet.gpus, threads)


def staff(fleet: Fleet | None, make: Callable[[], Work]) -> Alone | Team:
    """The workers of a job: this process, or a fleet's."""
    return Alone(make()) if fleet is None else Team(with_threads(fleet), make)


class Unseen:
    """A progress bar that shows nothing."""

    n = 0

    def update(self, n: int) -> None:
        """Nothing."""

    def set_postfix_str(self, s: str) -> None:
        """Nothing."""


def each(
    fleet: Fleet | None,
    make: Callable[[], Work],
    items: Iterable[Item],
    done: Callable[[Any, Any], object],
    name: Callable[[Any], str] = str,
    accept: Callable[[Any], Any] | None = None,
) -> None:
    """Call `done`, here, with every item and its result, in any order.

    Args:
        fleet: the workers; None is this process.
        make: makes a worker's `Work`, once in each.
        name: an item in words.
        accept: as for `Team.run`.

    Raises:
        SSTError: items failed three times. All others are done.
    """
    with staff(fleet, make) as team:
        failed = team.run(items, lambda *made: done(*made) and None, Unseen(), name, accept)
    if failed:
        named = ", ".join(map(name, failed))
        said = f"three attempts failed at {named}: {next(iter(failed.values()))}"
        raise SSTError(said, "all others are kept: the same command tries once more")
