"""Automata whose state is known, and the study that trains small decoders on them."""

from itertools import permutations

import pytest
import torch

from sst_interp.errors import SSTError
from sst_interp.experiments.studies.automata import CAPACITY, MACHINES, Automaton
from sst_interp.experiments.studies.decoders import Decoder
from sst_interp.experiments.studies.organisms import ARMS, Organisms, Plan


@pytest.mark.parametrize("name", MACHINES)
def test_a_sequence_says_its_state_at_every_symbol_and_spells_the_last(name):
    task = Automaton(name)
    machine, words = task.machine, task.words
    drawn = task.draw(40, seed=3, length=11)
    assert torch.equal(task.draw(40, seed=3, length=11).tokens, drawn.tokens)
    assert not torch.equal(task.draw(40, seed=4, length=11).tokens, drawn.tokens)
    for row in range(40):
        state = 0
        for t, symbol in enumerate(drawn.tokens[row, :11].tolist()):
            before, state = state, int(machine.after[state, symbol])
            assert drawn.states[row, t] == state
            assert drawn.moved[row, t] == (state != before)
            assert drawn.labels[row, t] == task.first_state + state
            assert symbol or state == before  # symbol 0 changes nothing
        text = [words[token] for token in drawn.labels[row, 11:].tolist()]
        assert "".join(text) == f"{machine.spelled[state]}."
        assert words[drawn.tokens[row, 11]] == "="
        assert drawn.tokens[row, 12:].tolist() == drawn.labels[row, 11:-1].tolist()  # it reads what it wrote
    assert len(set(words)) == len(words)
    assert drawn.labels.max() < len(words)


def test_the_machines_are_what_they_are_called():
    a5 = MACHINES["a5"]()
    assert len(a5.spelled) == 60
    assert set(MACHINES["s3"]().spelled) == {"".join(map(str, p)) for p in permutations((1, 2, 3))}
    for name in ("s3", "a5", "modular"):  # groups: every symbol permutes the states, and all are reached
        after, reached = MACHINES[name]().after, {0}
        assert all(column.unique().numel() == len(column) for column in after.T)
        for _ in range(20):
            reached |= {int(to) for state in reached for to in after[state]}
        assert len(reached) == len(after)
    stack = MACHINES["stack"]()
    state, spelled = 0, []
    for symbol in (1, 2, 2, 1, 3):  # push a, b, b, one too many, pop
        state = int(stack.after[state, symbol])
        spelled.append(stack.spelled[state].strip("-"))
    assert spelled == ["a", "ba", "bba", "bba", "ba"]
    assert len(spelled[2]) == CAPACITY


def test_what_is_no_automaton_is_one_line():
    with pytest.raises(SSTError, match="no automaton 'chess'"):
        Automaton("chess")


def test_the_study_trains_every_arm_and_goes_on_where_it_stopped(tmp_path):
    decoder = Decoder(layers=1, d_model=16, heads=2)
    plan = Plan(("s3",), decoder, steps=2, batch=4, lengths=(3, 6), held_out=8)
    study = Organisms(plan)
    rows = study.run(tmp_path, seeds=(0,))["accuracy"]
    assert set(rows["arm"]) == {arm.name for arm in ARMS}
    assert (rows.groupby("arm")["parameters"].first().drop("SST, trained exactly") > 0).all()
    assert rows["answers"].eq(8).all()
    assert study.missing(tmp_path, (0,)) == []
    assert len(study.missing(tmp_path, (0, 1))) == len(ARMS)
    shown = study.show(tmp_path)
    assert "6 symbols" in shown["organisms"]
    assert "s3" in shown["organisms verdict"]


def test_an_exactly_trained_sst_follows_a_state_that_two_passes_do_not(tmp_path):
    """In 120 steps on S3, one seed: the difference is large, and the test is of the sign."""
    plan = Plan(("s3",), Decoder(layers=2, d_model=64, learning_rate=3e-3), steps=120, lengths=(8, 16))
    arms = [arm for arm in ARMS if arm.kind == "sst"]
    rows = Organisms(plan, arms).run(tmp_path, seeds=(0,))["accuracy"]
    right = rows[rows["length"] == 8].set_index("arm")["right"] / 256
    assert right["SST, trained exactly"] > right["SST, two-pass"] + 0.2
