"""Decoders from scratch: what is held out, what is counted, under which evaluation; in-context recall."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tiny_studies import POSITIONS, RECALL, TEXT, some_text
from torch.nn.functional import cross_entropy

from sst_interp.errors import SSTError
from sst_interp.experiments.studies import decoders
from sst_interp.experiments.studies.decoders import (
    BASELINE,
    BOTH,
    DECODER_ARMS,
    LONGER,
    LOOPED,
    QUIET,
    RESIDUAL,
    SST,
    Decoder,
    Pretraining,
    RecallStudy,
    decoder_training,
)
from sst_interp.experiments.studies.fit import (
    OWN,
    SEQUENTIAL,
    ZERO,
    Arm,
    Schedule,
    Training,
    evaluations,
    label_loss,
    loss_of,
    score_tokens,
)
from sst_interp.experiments.studies.flipflop import LRT_ARMS, STREAM_ARMS
from sst_interp.experiments.studies.study import Job
from sst_interp.experiments.studies.tasks import (
    SEPARATOR,
    Labelled,
    Recall,
    Text,
    build_corpus,
    bytes_of_symbols,
    every_next,
    learn_vocabulary,
    read_text,
    text_of,
)
from sst_interp.models.solvers import solve_exactly
from sst_interp.training.objective import last_layer, run_passes, training_loss
from sst_interp.training.recipe import EVERY_PASS


def some_corpus():
    return build_corpus(some_text(), 280, POSITIONS, 12, 0.2)


def a_training(arm: Arm, steps: int = 2) -> Training:
    corpus = some_corpus()
    weights = TEXT.decoder.weights(len(corpus.n_bytes), POSITIONS, 0)
    return decoder_training(TEXT.decoder, weights, arm, lambda k: corpus.draw(4, k), steps)


@pytest.mark.parametrize(
    "arm", [*DECODER_ARMS, Arm("S=3", Schedule("interleaved", groups=3), "residual")], ids=lambda a: a.name
)
def test_a_training_counts_the_passes_that_its_schedule_computes(arm):
    training = a_training(arm)
    tokens = training.draw(0).tokens
    passes = run_passes(training.model, tokens, *arm.schedule)
    assert sum(len(p.at) for p in passes) == arm.passes * POSITIONS
    training.finish()
    assert training.position_passes == arm.passes * tokens.numel() * training.done


PASSES = [arm for arm in dict.fromkeys([*STREAM_ARMS, *LRT_ARMS]) if arm.schedule.method != "exact"]


@pytest.mark.parametrize("arm", PASSES, ids=lambda a: a.name)
def test_every_schedule_says_how_many_passes_it_takes(arm):
    training = a_training(BOTH)
    passes = run_passes(training.model, training.draw(0).tokens, *arm.schedule)
    assert sum(len(p.at) for p in passes) == arm.passes * POSITIONS


@pytest.mark.parametrize("arm", [*DECODER_ARMS[:5], *LRT_ARMS[3:6]], ids=lambda a: a.name)
def test_the_loss_is_the_one_that_the_train_command_minimises(arm):
    training = a_training(replace(arm, pathway="both", gamma=0.5))
    batch, how = training.draw(0), arm.schedule
    recipe = replace(
        TEXT.decoder.recipe(BASELINE),
        method=how.method,
        sweeps=how.sweeps,
        groups=how.groups,
        chunk=how.chunk,
    )
    ours, theirs = loss_of(training.model, batch, how), training_loss(training.model, batch, recipe)
    assert torch.equal(ours, theirs)
    labels = Labelled(batch.tokens, batch.tokens.roll(-1, dims=1))  # the last label is asked here, too
    assert float(loss_of(training.model, labels, how).detach()) == pytest.approx(float(theirs), rel=0.2)
    refined = label_loss(training.model, labels, last_layer(training.model, batch, *how))
    same = torch.isclose(loss_of(training.model, labels, how), refined, rtol=1e-6)
    assert bool(same) == (how.method not in EVERY_PASS)


def test_the_longer_baseline_costs_what_the_memory_costs():
    cost = {arm.name: a_training(arm) for arm in (BASELINE, BOTH, LONGER)}
    for training in cost.values():
        training.finish()
    passes = {name: training.position_passes for name, training in cost.items()}
    assert passes[LONGER.name] == passes[BOTH.name] == 2 * passes[BASELINE.name]
    assert cost[LONGER.name].done == 2 * cost[BOTH.name].done


def test_every_arm_starts_from_the_same_weights_and_reads_the_same_windows():
    trainings = [a_training(arm) for arm in DECODER_ARMS]
    first = trainings[0]
    for other in trainings[1:]:
        assert torch.equal(first.draw(1).tokens, other.draw(1).tokens)
        for name, value in first.masters.adapters.items():
            assert torch.equal(value, other.masters.adapters[name])
    assert float(trainings[1].model.kind.weights()["gamma"][0]) == pytest.approx(0.1)


def test_a_memory_held_at_zero_trains_as_the_baseline():
    """All passes then say the same: nothing but the memory sets the arms apart.

    An odd number of positions, so that both groups have as many targets and weigh the same.
    """
    decoder = replace(TEXT.decoder, memory_learning_rate=1e-12)
    corpus = build_corpus(some_text(), 280, POSITIONS + 1, 12, 0.2)
    weights = decoder.weights(len(corpus.n_bytes), POSITIONS + 1, 0)
    quiet, plain = (
        decoder_training(decoder, weights, arm, lambda k: corpus.draw(4, k), 3) for arm in (QUIET, BASELINE)
    )
    for _ in range(3):
        assert quiet.step() == pytest.approx(plain.step(), abs=1e-4)


@pytest.mark.parametrize("arm", [BOTH, RESIDUAL], ids=lambda a: a.name)
def test_the_loss_that_counts_is_sequential_and_never_that_of_a_zero_memory(arm):
    """Public code scores with a memory of zeros by mistake: the definition must differ from it."""
    training = a_training(arm, steps=3)
    training.finish()
    model, batch = training.model, every_next(some_corpus().held_out)
    how = evaluations(arm)
    nats, _ = score_tokens(model, batch, how[SEQUENTIAL])
    rows = len(batch.tokens)
    with torch.no_grad():
        stream = model.new_stream(torch.zeros(rows, dtype=torch.long), POSITIONS)
        exact = solve_exactly(model, stream, batch.tokens, tolerance=0.0).last[:, :, 0]
        logits = model.backbone.unembed(exact[:, :-1])
    truth = cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    assert torch.allclose(nats, truth, atol=1e-4)
    zero, _ = score_tokens(model, batch, how[ZERO])
    assert torch.allclose(zero[:, 0], nats[:, 0], atol=1e-5)  # no position before the first: no memory
    assert float((zero - nats)[:, 1:].abs().max()) > 1e-2
    own, _ = score_tokens(model, batch, how[OWN])
    assert not torch.allclose(own, nats, atol=1e-4)


def test_training_lowers_the_loss_of_what_it_is_shown():
    for arm in (BASELINE, BOTH):
        training = a_training(arm, steps=25)
        batch = training.draw(0)
        training.draw = lambda _k, b=batch: b
        first = training.step()
        while training.done < 25:
            last = training.step()
        assert last < first - 0.5


def test_a_document_is_held_out_whole_and_however_its_title_is_written():
    passages = [f"passage {k} of it" for k in range(3)]
    query = "{} -- {}\nQuestion: is it?\n A. yes\n B. no\nAnswer:"
    boolq = {str(k): {"query": query.format("Old  Harvard", p)} for k, p in enumerate(passages[:2])}
    squad = {"s": {"query": f"Title: Old_harvard\nBackground: {passages[2]}\nQuestion: what?\nAnswer:"}}
    found = text_of({"boolq/mc_5shot": boolq, "squad/bpb_5shot": squad})
    assert [set(d.passages) for d in found.documents] == [set(passages)]
    with pytest.raises(SSTError, match="no title and passage"):
        text_of({"boolq/mc_5shot": {"7": {"query": "Question: what?"}}})
    text = some_text(40)
    training, held_out = text.split(0.2)
    assert len(held_out) == 8
    assert {d.name for d in training}.isdisjoint(d.name for d in held_out)
    mixed = Text(tuple(random.Random(1).sample(text.documents, 40)))
    assert {d.name for d in mixed.split(0.2)[1]} == {d.name for d in held_out}


def test_no_held_out_text_is_trained_on_and_no_window_leaves_its_passage():
    text = some_text()
    corpus = build_corpus(text, 280, POSITIONS, 1000, 0.2)
    training, held_out = text.split(0.2)
    tokenizer = learn_vocabulary(training, 280)
    passages = {
        name: [tokenizer.encode(p).ids for d in documents for p in d.passages]
        for name, documents in (("training", training), ("held out", held_out))
    }

    def inside(window: list[int], of: str) -> bool:
        return any(window == ids[k : k + POSITIONS] for ids in passages[of] for k in range(len(ids)))

    assert all(inside(w, "held out") and not inside(w, "training") for w in corpus.held_out.tolist())
    windows = torch.cat([corpus.draw(64, k).tokens for k in range(6)]).tolist()
    assert all(inside(w, "training") for w in windows)
    every = corpus.tokens[corpus.starts[:, None] + torch.arange(POSITIONS)].tolist()
    assert len(every) == sum(max(0, len(ids) - POSITIONS + 1) for ids in passages["training"])
    assert all(inside(w, "training") for w in every)


def test_symbols_count_the_bytes_of_the_text():
    text = some_text()
    tokenizer = learn_vocabulary(list(text.documents), 280)
    n_bytes = some_corpus().n_bytes
    passage = text.documents[0].passages[0] + " ☃ 例"
    again = build_corpus(text, 280, POSITIONS, 12, 0.2)
    assert torch.equal(n_bytes, again.n_bytes)
    ids = torch.tensor(tokenizer.encode(passage).ids)
    assert int(bytes_of_symbols(tokenizer)[ids].sum()) == len(passage.encode())


def test_windows_are_from_as_many_documents_as_can_be():
    corpus = build_corpus(some_text(), 280, POSITIONS, 4, 0.2)
    assert len(corpus.held_out) == corpus.held_out_documents == 4


def test_held_out_tokens_are_all_counted(tmp_path):
    rows = Pretraining(TEXT, (BASELINE, BOTH), rounds=0).run(tmp_path, seeds=[0], text=some_text())["losses"]
    assert (rows.groupby(["arm", "evaluated"])["tokens"].sum() == 12 * (POSITIONS - 1)).all()
    assert rows.groupby("arm")["evaluated"].nunique().to_dict() == {"LRT, both": 3, "baseline": 1}


def test_another_text_is_another_study(tmp_path):
    study = Pretraining(TEXT, (BASELINE,), rounds=0)
    study.run(tmp_path, seeds=[0], text=some_text())
    with pytest.raises(SSTError, match="holds a study with text"):
        study.run(tmp_path, seeds=[0], text=some_text(seed=1))


def test_variants_of_the_memory_come_last():
    jobs = [job.arm for job in Pretraining().jobs([0, 1])]
    assert jobs[:6] == [BASELINE, BOTH, LONGER] * 2
    assert set(jobs[6:]) == {RESIDUAL, QUIET, SST, LOOPED}


def test_bad_input_is_one_clear_line(tmp_path):
    empty, binary, short = (tmp_path / name for name in ("empty.txt", "binary.txt", "short.txt"))
    empty.write_text(f"\n{SEPARATOR}\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    short.write_text(f"\n{SEPARATOR}\n".join(f"text {k}" for k in range(12)))
    with pytest.raises(SSTError, match="is empty"):
        read_text(empty)
    with pytest.raises(SSTError, match="not UTF-8"):
        read_text(binary)
    with pytest.raises(SSTError, match="cannot read"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(SSTError, match="too short: no training passage has 12 tokens"):
        Pretraining(TEXT).run(tmp_path / "out", text=read_text(short))
    with pytest.raises(SSTError, match=r"1 document\(s\)"):
        Pretraining(TEXT).run(tmp_path / "out", text=Text(some_text().documents[:1]))
    wide = Arm("wide", Schedule("interleaved", groups=13), "both")
    with pytest.raises(SSTError, match="13 interleaved groups do not fit into 12 positions"):
        Pretraining(TEXT, (wide,)).run(tmp_path / "out", text=some_text())
    with pytest.raises(SSTError, match="at least 256 symbols"):
        Pretraining(replace(TEXT, vocabulary=100)).run(tmp_path / "out", text=some_text())
    with pytest.raises(SSTError, match="d_model 18"):
        Decoder(d_model=18, heads=4)
    assert not (tmp_path / "out").exists()


def test_a_text_file_is_cut_into_documents_at_its_separators(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(f"one\ntwo\n{SEPARATOR}\nthree\n{SEPARATOR}\none\ntwo\n")
    assert [d.passages for d in read_text(path).documents] == [("one\ntwo",), ("three",)]


@pytest.mark.parametrize("filler", [False, True])
def test_every_key_is_asked_once_and_the_next_token_is_its_value(filler):
    task, n = Recall(), 8
    batch = task.draw(50, 3, n, filler)
    body = batch.tokens[:, int(filler) :]
    assert (batch.tokens[:, 0] == task.vocabulary - 1).all() == filler
    for row, answer in zip(body.tolist(), batch.answer[:, int(filler) :].tolist(), strict=True):
        shown = dict(zip(row[: 2 * n : 2], row[1 : 2 * n : 2], strict=True))
        asked = [t for t, a in enumerate(answer) if a]
        assert len(shown) == len(asked) == n
        assert {row[t] for t in asked} == set(shown)
        assert all(row[t + 1] == shown[row[t]] for t in asked)
        assert max(shown) < task.symbols <= min(shown.values())
    assert batch.answer.sum() == 50 * n


def test_sequences_are_drawn_anew_and_all_sizes_come_up():
    task = Recall(pairs=(2, 4))
    assert torch.equal(task.draw(4, 1).tokens, task.draw(4, 1).tokens)
    assert not torch.equal(task.draw(4, 1, 2, False).tokens, task.draw(4, 2, 2, False).tokens)
    lengths = {task.draw(1, k).tokens.shape[1] for k in range(60)}
    assert lengths == {8, 9, 16, 17}
    assert max(lengths) == task.positions
    pairs = task.draw(4000, 5, 2, False).tokens[:, :2]
    table = torch.zeros(16, 16).index_put_(tuple(pairs.T - torch.tensor([[0], [16]])), torch.ones(4000), True)
    assert table.min() > 0  # no key has a value of its own


def test_impossible_numbers_of_pairs_are_refused():
    for pairs in ((), (0,), (5,)):
        with pytest.raises(SSTError, match="cannot be drawn"):
            Recall(pairs=pairs, symbols=4)


def test_answers_are_counted_where_a_key_is_asked(monkeypatch):
    seen = []

    def all_right(_model, batch, _schedule):
        seen.append((int(batch.answer.sum(dim=1)[0]), batch.tokens.shape[1]))
        asked = batch.answer[:, :-1]
        return torch.where(asked, 0.5, torch.nan), torch.where(asked, 1.0, torch.nan)

    monkeypatch.setattr(decoders, "score_tokens", all_right)
    study, job = RecallStudy(RECALL), Job(0, BOTH, 1)
    rows = study.measure(job, study.begin(job), lambda: None)["accuracy"]
    assert (rows["right"] == rows["answers"]).all()
    assert (rows["answers"] == RECALL.held_out * rows["pairs"]).all()
    assert (rows["loss"] == rows["answers"] / 2).all()
    assert set(seen) == {(n, 4 * n + filler) for n in RECALL.task.pairs for filler in (0, 1)}
    assert set(rows["evaluated"]) == {"sequential", "zero memory", "own"}
