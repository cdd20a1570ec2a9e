"""Synthetic `outputs`, `steps` and `questions` with the columns of docs/run-format.md, and known answers.

They go with a `pairs` table of `synthetic.pairs_table`. Each table has its own stream of random numbers for a
seed, or two tables of one seed would go together. Nothing here needs a model.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from synthetic import PAIR_TYPES

OUTPUT_TYPES = {
    "question": "int32",
    "comparison": "str",
    "position": "int16",
    "a": "int8",
    "b": "int8",
    "same_prefix": "bool",
    "argmax_changed": "bool",
    "replaced": "int16",
    "winner_rank": "int32",
    "kl": "float32",
}
KEYS = ["question", "comparison", "position", "a", "b"]


def outputs_table(
    pairs: pd.DataFrame,
    threshold: float = 0.95,
    replaced: tuple[int, int] = (54, 1),
    changed: tuple[float, float] = (0.6, 0.1),
    ranks: tuple[int, int] = (40, 2),
    kl: tuple[float, float] = (1.0, 1e-4),
    seed: int = 0,
) -> pd.DataFrame:
    """An `outputs` table in which each effect is (where some layer shifted, where none did).

    Tokens replaced scatter by at most 3 around `replaced`; a share `changed` has a new winner, from ranks 1
    to `ranks`; KL is log-normal around `kl`.
    """
    rng = np.random.default_rng([seed, 1])
    below = (pairs["cosine"] < threshold).groupby([pairs[c] for c in KEYS], observed=True).any()
    same = pairs.groupby(KEYS, observed=True)["same_prefix"].first()
    moved, n = below.to_numpy(), len(below)

    def planted(effect: tuple[float, float]) -> np.ndarray:
        return np.where(moved, *effect)

    winner = rng.random(n) < planted(changed)
    table = below.index.to_frame(index=False).assign(
        same_prefix=same.to_numpy(),
        argmax_changed=winner,
        replaced=np.clip(planted(replaced) + rng.integers(-3, 4, n), 0, 100),
        winner_rank=np.where(winner, rng.integers(1, planted(ranks).astype(int) + 1), 0),
        kl=planted(kl) * np.exp(0.3 * rng.normal(size=n)),
    )
    return table.astype(OUTPUT_TYPES)


def steps_table(
    outputs: pd.DataFrame,
    depths: tuple[int, ...] = (1, 4),
    entropy: dict[tuple[str, int, int], float] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """A `steps` table for the positions of an `outputs` table, without token ids (as a restricted run).

    `entropy` plants a value by (text, depth, iteration); elsewhere it is about 2 nats. Margins are about 1.
    """
    rng = np.random.default_rng([seed, 2])
    places = outputs[["question", "position"]].drop_duplicates().reset_index(drop=True)
    passes = [("own", d, i) for d in depths for i in range(1, d + 1)]
    passes += [("depth1", d, i) for d in depths if d > 1 for i in range(1, d + 1)]
    tables = []
    for text, depth, iteration in passes:
        level = (entropy or {}).get((text, depth, iteration), 2.0)
        tables.append(
            places.assign(
                text=text,
                depth=depth,
                iteration=iteration,
                entropy=level + 0.01 * rng.normal(size=len(places)),
                margin=np.exp(0.5 * rng.normal(size=len(places))),
            )
        )
    types = {"question": "int32", "position": "int16", "text": "str", "depth": "int8", "iteration": "int8"}
    table = pd.concat(tables).astype(types | {"entropy": "float32", "margin": "float32"})
    order = ["question", "text", "depth", "position", "iteration"]
    return table.sort_values(order, kind="stable").reset_index(drop=True)[[*order, "entropy", "margin"]]


def parting_run(
    questions: int = 60,
    positions: int = 20,
    layers: int = 4,
    hazard: float = 0.15,
    foretold: float = 0.0,
    after: float = 0.3,
    base: float = 0.05,
    depth: int = 4,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """`outputs`, `pairs` and `steps` of a run whose texts part, in teacher-forced and free-running.

    Args:
        questions: how many; likewise `positions` and `layers`.
        hazard: chance that the texts part at a position, given that they have not before.
        foretold: 0: overlaps know nothing of it. Otherwise 1 - overlap is multiplied by exp(foretold) where
            the texts part.
        after: share of (position, layer) pairs that shift in free-running once the texts differ.
        base: share that shifts in teacher-forced, and in free-running before that.
        depth: the deeper one.
        seed: of everything.
    """
    rng = np.random.default_rng([seed, 3])
    shape = questions, positions, layers
    parts = rng.random((questions, positions)) < hazard
    first = np.where(parts.any(1), parts.argmax(1), positions)
    at = np.arange(positions)[None]
    here, later = at == first[:, None], at > first[:, None]

    def far(share: float) -> np.ndarray:
        stable = 0.003 * np.exp(0.5 * rng.normal(size=shape))
        return np.where(rng.random(shape) < share, 0.3 * np.exp(0.2 * rng.normal(size=shape)), stable)

    replayed = far(base) * np.exp(foretold * here[..., None])
    free = np.where(later[..., None], far(after), replayed)
    q, p, layer = (part.ravel() for part in np.indices(shape))
    keys = {"question": q, "position": p, "layer": layer, "a": 1, "b": depth}
    fillers = dict.fromkeys(("relative_l2", "norm_a", "norm_b", "bf16_ratio"), 1.0)
    same = np.repeat(~later, layers, axis=1).reshape(shape)
    tables = [
        pd.DataFrame(keys | fillers).assign(comparison=c, cosine=1 - u.ravel(), same_prefix=s.ravel())
        for c, u, s in (("teacher_forced", replayed, np.ones(shape, bool)), ("free_running", free, same))
    ]
    pairs = pd.concat(tables)[list(PAIR_TYPES)].astype(PAIR_TYPES).reset_index(drop=True)
    outputs = outputs_table(pairs, seed=seed)
    known = {"teacher_forced": here, "free_running": here | later}
    changed = np.concatenate([known[c].ravel() for c in ("teacher_forced", "free_running")])
    outputs = outputs.sort_values(["comparison", "question", "position"], ascending=[False, True, True])
    outputs = outputs.assign(argmax_changed=changed, winner_rank=changed.astype(int))
    return outputs.sort_values(KEYS).astype(OUTPUT_TYPES), pairs, steps_table(outputs, (1, depth), seed=seed)


def questions_table(
    correct: np.ndarray,
    depths: tuple[int, ...] = (1, 2, 3, 4),
    choices: int = 4,
    seed: int = 0,
) -> pd.DataFrame:
    """A `questions` table with this pattern of right answers, bool [question, depth].

    Wrong answers are drawn from the other letters, each depth by itself.
    """
    rng = np.random.default_rng([seed, 4])
    correct = np.asarray(correct, dtype=bool)
    n, k = correct.shape
    gold = rng.integers(0, choices, (n, 1))
    answer = np.where(correct, gold, (gold + rng.integers(1, choices, (n, k))) % choices)
    letters = np.array(list("ABCDEFGHIJ"))
    return pd.DataFrame(
        {
            "question": np.repeat(np.arange(n), k).astype("int32"),
            "id": np.repeat([f"record-{i}" for i in range(n)], k),
            "depth": np.tile(np.array(depths, dtype="int8"), n),
            "gold": np.repeat(letters[gold[:, 0]], k),
            "answer": letters[answer].ravel().astype(object),
            "correct": correct.ravel(),
            "tokens": 16,
            "stopped": True,
        }
    )
