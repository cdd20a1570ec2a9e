"""Pretraining on text: what is held out, what is counted, and under which evaluation."""

import random
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from sst_interp.errors import SSTError
from sst_interp.exact import solve_exactly
from sst_interp.pretraining import text_study
from sst_interp.pretraining.arms import ARMS, BASELINE, BOTH, LONGER, QUIET, RESIDUAL, Arm, Decoder
from sst_interp.pretraining.commands import app
from sst_interp.pretraining.corpus import build_corpus, every_next, learn_vocabulary
from sst_interp.pretraining.evaluation import OWN, SEQUENTIAL, ZERO, evaluations, score
from sst_interp.pretraining.text import SEPARATOR, Document, Text, read_text, text_of
from sst_interp.pretraining.text_study import TextPlan, passes_left, run_text
from sst_interp.pretraining.training import Training
from sst_interp.training.schedules import run_passes

POSITIONS = 12
PLAN = TextPlan(
    decoder=Decoder(layers=2, d_model=16, heads=2, warmup=1), vocabulary=280, positions=POSITIONS,
    batch=4, steps=3, held_out=12,
)  # fmt: skip


def some_text(documents: int = 20, seed: int = 0) -> Text:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdé fg", k=4)) for _ in range(30)]
    passage = lambda: " ".join(rng.choices(words, k=30))  # noqa: E731
    return Text(tuple(Document(f"d{k}", (passage(), passage())) for k in range(documents)))


def some_corpus():
    return build_corpus(some_text(), 280, POSITIONS, 12, 0.2)


def a_training(arm: Arm, steps: int = 2) -> Training:
    corpus = some_corpus()
    weights = PLAN.decoder.weights(len(corpus.n_bytes), POSITIONS, 0)
    return Training(PLAN.decoder, weights, arm, lambda k: corpus.draw(4, k), steps)


@pytest.mark.parametrize("arm", [*ARMS, Arm("S=3", "residual", groups=3)], ids=lambda a: a.name)
def test_the_passes_of_an_arm_are_those_that_its_schedule_computes(arm):
    training = a_training(arm)
    tokens = training.draw(0).tokens
    passes = run_passes(training.model, tokens, arm.method, 1, training.recipe.groups)
    assert sum(len(p.at) for p in passes) == arm.passes * POSITIONS
    training.finish()
    assert training.position_passes == arm.passes * tokens.numel() * training.done


def test_the_longer_baseline_costs_what_the_memory_costs():
    cost = {arm.name: a_training(arm) for arm in (BASELINE, BOTH, LONGER)}
    for training in cost.values():
        training.finish()
    passes = {name: training.position_passes for name, training in cost.items()}
    assert passes[LONGER.name] == passes[BOTH.name] == 2 * passes[BASELINE.name]
    assert cost[LONGER.name].done == 2 * cost[BOTH.name].done


def test_every_arm_starts_from_the_same_weights_and_reads_the_same_windows():
    trainings = [a_training(arm) for arm in ARMS]
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
    decoder = replace(PLAN.decoder, memory_learning_rate=1e-12)
    corpus = build_corpus(some_text(), 280, POSITIONS + 1, 12, 0.2)
    weights = decoder.weights(len(corpus.n_bytes), POSITIONS + 1, 0)
    quiet, plain = (
        Training(decoder, weights, arm, lambda k: corpus.draw(4, k), 3) for arm in (QUIET, BASELINE)
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
    nats, _ = score(model, batch, how[SEQUENTIAL])
    rows = len(batch.tokens)
    with torch.no_grad():
        stream = model.new_stream(torch.zeros(rows, dtype=torch.long), POSITIONS)
        exact = solve_exactly(model, stream, batch.tokens, tolerance=0.0).last[:, :, 0]
        logits = model.backbone.unembed(exact[:, :-1])
    truth = cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    assert torch.allclose(nats, truth, atol=1e-4)
    zero, _ = score(model, batch, how[ZERO])
    assert torch.allclose(zero[:, 0], nats[:, 0], atol=1e-5)  # no position before the first: no memory
    assert float((zero - nats)[:, 1:].abs().max()) > 1e-2
    own, _ = score(model, batch, how[OWN], arm.groups)
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
    from sst_interp.pretraining.corpus import bytes_of_symbols

    ids = torch.tensor(tokenizer.encode(passage).ids)
    assert int(bytes_of_symbols(tokenizer)[ids].sum()) == len(passage.encode())


def test_windows_are_from_as_many_documents_as_can_be():
    corpus = build_corpus(some_text(), 280, POSITIONS, 4, 0.2)
    assert len(corpus.held_out) == corpus.held_out_documents == 4


class StoppedError(Exception):
    """As if the process was killed."""


def test_an_interrupted_study_goes_on_to_the_same_tables(tmp_path):
    text, arms = some_text(), (BASELINE, BOTH)
    whole = run_text(tmp_path / "whole", text, PLAN, [0, 1], arms, rounds=0)["losses"]
    seen = []

    def stop(words: str, passes: int) -> None:
        seen.append(words)
        if len(seen) == 5:  # in the second training
            raise StoppedError

    parts = tmp_path / "parts"
    total = passes_left(parts, PLAN, [0, 1], arms)
    with pytest.raises(StoppedError):
        run_text(parts, text, PLAN, [0, 1], arms, rounds=0, progress=stop)
    left = passes_left(parts, PLAN, [0, 1], arms)
    assert left == total - PLAN.steps
    taken = []
    again = run_text(parts, text, PLAN, [0, 1], arms, rounds=1, progress=lambda w, n: taken.append(n))
    assert sum(taken) == left
    assert set(again["times"]["arm"]) == {"baseline", "LRT, both"}
    a, b = (
        t.drop(columns="seconds").sort_values(["seed", "arm", "evaluated", "position"]).reset_index(drop=True)
        for t in (whole, again["losses"])
    )
    pd.testing.assert_frame_equal(a, b)
    assert passes_left(parts, PLAN, [0, 1], arms) == 0
    sums = a.groupby(["seed", "arm", "evaluated"])["tokens"].sum()
    assert (sums == 12 * (POSITIONS - 1)).all()


def test_another_plan_or_another_text_is_refused(tmp_path):
    run_text(tmp_path, some_text(), PLAN, [0], (BASELINE,), rounds=0)
    with pytest.raises(SSTError, match="steps = 3, not 4"):
        run_text(tmp_path, some_text(), replace(PLAN, steps=4), [0], (BASELINE,))
    with pytest.raises(SSTError, match="holds a study with text"):
        run_text(tmp_path, some_text(seed=1), PLAN, [0], (BASELINE,))


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
        run_text(tmp_path / "out", read_text(short), PLAN)
    with pytest.raises(SSTError, match=r"1 document\(s\)"):
        run_text(tmp_path / "out", Text(some_text().documents[:1]), PLAN)
    with pytest.raises(SSTError, match="13 interleaved groups do not fit into 12 positions"):
        run_text(tmp_path / "out", some_text(), PLAN, arms=(Arm("wide", "both", groups=13),))
    with pytest.raises(SSTError, match="at least 256 symbols"):
        run_text(tmp_path / "out", some_text(), replace(PLAN, vocabulary=100))
    with pytest.raises(SSTError, match="d_model 18"):
        Decoder(d_model=18, heads=4)
    assert not (tmp_path / "out").exists()


def test_a_text_file_is_cut_into_documents_at_its_separators(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(f"one\ntwo\n{SEPARATOR}\nthree\n{SEPARATOR}\none\ntwo\n")
    assert [d.passages for d in read_text(path).documents] == [("one\ntwo",), ("three",)]


def test_the_command_trains_on_a_file_and_shows_what_it_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_study, "TextPlan", lambda: PLAN)
    documents = [" ".join(d.passages) for d in some_text().documents]
    (tmp_path / "mine.txt").write_text(f"\n{SEPARATOR}\n".join(documents))
    ran = CliRunner().invoke(app, ["run", "--text", "mine.txt", "--seeds", "1"])
    assert ran.exit_code == 0, ran.output
    assert "LRT, both" in ran.output
    assert "(one seed)" in ran.output
    (tmp_path / "page.md").write_text("<!-- text losses -->\n<!-- end of text losses -->\n")
    done = CliRunner().invoke(app, ["document", "page.md"])
    assert done.exit_code == 0
    assert "| LRT, both | zero memory |" in (tmp_path / "page.md").read_text()
