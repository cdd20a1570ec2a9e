"""Tasks whose latent state is known: finite automata that a model runs in its head.

A sequence is `symbols`, an equals sign, and the state spelled out in one token or more:

    s3        t 0 r t t = 2 3 1 .

| task | state | symbols beside 0, which changes nothing |
| --- | --- | --- |
| `s3` | a permutation of 3 | a transposition, a 3-cycle |
| `a5` | an even permutation of 5: no shallow circuit composes them (Barrington 1989) | a 3-cycle, a 5-cycle |
| `modular` | a number modulo 7 | add 1, 2 or 3 |
| `pointer` | a node of 12 | follow the red or the blue edge; some edges lead back to their node |
| `stack` | up to 3 of two letters | push a, push b, pop; a full stack takes no more |

At every symbol the label is the state after it; from the equals sign on, the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sst_interp.errors import SSTError

POINTER_NODES, LOOPS = 12, 3
"""Nodes of `pointer`, and how many edges of each colour lead back to their own node."""
CAPACITY = 3
"""Of the stack."""


class Machine(NamedTuple):
    """An automaton. States are numbered; state 0 is the first."""

    symbols: tuple[str, ...]
    """What can be read; `0` changes nothing."""
    after: Int[Tensor, "state symbol"]
    """The state after a symbol."""
    spelled: tuple[str, ...]
    """Every state in words of one character each."""


def _group(generators: Sequence[tuple[int, ...]], names: Sequence[str], even: bool) -> Machine:
    n = len(generators[0])
    inversions = lambda p: sum(p[i] > p[j] for i in range(n) for j in range(i + 1, n))  # noqa: E731
    elements = [p for p in permutations(range(n)) if not even or inversions(p) % 2 == 0]
    index = {p: k for k, p in enumerate(elements)}
    moves = [tuple(range(n)), *generators]
    after = [[index[tuple(p[m] for m in move)] for move in moves] for p in elements]
    spelled = tuple("".join(str(1 + i) for i in p) for p in elements)
    return Machine(("0", *names), torch.tensor(after), spelled)


def _modular() -> Machine:
    after = [[(s + k) % 7 for k in range(4)] for s in range(7)]
    return Machine(("0", "a", "b", "c"), torch.tensor(after), tuple("0123456"))


def _pointer() -> Machine:
    generator = torch.Generator().manual_seed(0)
    edges = [torch.arange(POINTER_NODES)]
    for _ in range(2):
        edge = torch.randint(0, POINTER_NODES, (POINTER_NODES,), generator=generator)
        stay = torch.randperm(POINTER_NODES, generator=generator)[:LOOPS]
        edge[stay] = stay
        edges.append(edge)
    return Machine(("0", "r", "b"), torch.stack(edges, 1), tuple("ABCDEFGHIJKL"))


def _stack() -> Machine:
    contents = ["".join(word) for n in range(CAPACITY + 1) for word in product("ab", repeat=n)]
    index = {word: k for k, word in enumerate(contents)}
    push = lambda word, letter: word if len(word) == CAPACITY else letter + word  # noqa: E731
    after = [[index[to] for to in (w, push(w, "a"), push(w, "b"), w[1:])] for w in contents]
    spelled = tuple(word.ljust(CAPACITY, "-") for word in contents)
    return Machine(("0", "x", "y", "p"), torch.tensor(after), spelled)


MACHINES: dict[str, Callable[[], Machine]] = {
    "s3": lambda: _group([(1, 0, 2), (1, 2, 0)], ("t", "r"), even=False),
    "a5": lambda: _group([(1, 2, 0, 3, 4), (1, 2, 3, 4, 0)], ("u", "v"), even=True),
    "modular": _modular,
    "pointer": _pointer,
    "stack": _stack,
}


class Traced(NamedTuple):
    """Sequences, what is to be said at every position, and the states behind them."""

    tokens: Int[Tensor, "row position"]
    labels: Int[Tensor, "row position"]
    states: Int[Tensor, "row symbol"]
    """The state after every symbol."""
    moved: Bool[Tensor, "row symbol"]
    """Whether the symbol changed the state."""


@dataclass(frozen=True)
class Automaton:
    """One of `MACHINES` as a task of tokens.

    The vocabulary is the symbols, `=`, the characters of the spelled states, `.`, and a token per state,
    which is a label only.

    Raises:
        SSTError: an unknown name, or fewer than 2 symbols a sequence.
    """

    name: str
    shortest: int = 4
    """Fewest symbols of a sequence in training ..."""
    longest: int = 16
    """... and the most."""
    idle: float = 0.3
    """Share of symbols that are `0`."""

    def __post_init__(self) -> None:
        if self.name not in MACHINES or not 2 <= self.shortest <= self.longest:
            raise SSTError(f"no automaton {self.name!r} of {self.shortest} to {self.longest} symbols",
                           f"one of {', '.join(MACHINES)}, from 2 symbols up")  # fmt: skip

    @cached_property
    def machine(self) -> Machine:
        """States, symbols and transitions."""
        return MACHINES[self.name]()

    @cached_property
    def words(self) -> list[str]:
        """Every token as text."""
        machine = self.machine
        letters = sorted(set("".join(machine.spelled)) - set(machine.symbols))
        return [*machine.symbols, "=", ".", *letters, *(f"<{k}>" for k in range(len(machine.spelled)))]

    @property
    def first_state(self) -> int:
        """The token that stands for state 0."""
        return len(self.words) - len(self.machine.spelled)

    @property
    def spelling(self) -> int:
        """Tokens of a spelled state, the full stop included."""
        return len(self.machine.spelled[0]) + 1

    def spell(self, states: Int[Tensor, " row"]) -> Int[Tensor, "row character"]:
        """The tokens of spelled states, each with its full stop."""
        of = {word: k for k, word in enumerate(self.words)}
        table = torch.tensor([[of[c] for c in f"{word}."] for word in self.machine.spelled])
        return table[states]

    def draw(self, sequences: int, seed: int, length: int | None = None) -> Traced:
        """Some sequences of one length, the same for the same seed; None draws the length."""
        generator = torch.Generator().manual_seed(seed)
        drawn = int(torch.randint(self.shortest, self.longest + 1, (1,), generator=generator))
        n, machine = length or drawn, self.machine
        active = torch.randint(1, len(machine.symbols), (sequences, n), generator=generator)
        symbols = torch.where(torch.rand(sequences, n, generator=generator) < self.idle, 0, active)
        before, states = torch.zeros(sequences, dtype=torch.long), []
        for t in range(n):
            states.append(machine.after[before if t == 0 else states[-1], symbols[:, t]])
        trace = torch.stack(states, 1)
        moved = trace != torch.cat([before[:, None], trace[:, :-1]], 1)
        answer = self.spell(trace[:, -1])
        equals = torch.full((sequences, 1), len(machine.symbols))
        tokens = torch.cat([symbols, equals, answer[:, :-1]], 1)
        labels = torch.cat([self.first_state + trace, answer], 1)
        return Traced(tokens, labels, trace, moved)
