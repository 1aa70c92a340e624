"""Text to text: rows by hand, their loss, what is decoded, and a task that is learnt."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_log
from hypothesis import given, settings, strategies as st

import sample
import train
from nanopre import UserError
from nanopre.distributed import initialise
from nanopre.examples import Examples
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins
from nanopre.tokenizer import bytes_tokenizer

REGISTRY = load_plugins()
Seq2Seq = REGISTRY.get("objective", "seq2seq", "test")
BYTES = bytes_tokenizer()
EOT, PAD = BYTES.eot, BYTES.pad


def ids(text: str) -> list[int]:
    return BYTES.encode(text).tolist()


def make():
    model = REGISTRY.get("model", "t5", "test")(d_model=64, n_layers=1, n_heads=4, d_head=16)
    model = model.build(-(-BYTES.n_vocab // 64) * 64, 16)
    initialise(model, 1)
    return model


def test_a_row():
    objective = Seq2Seq(template="add {a} to {b}", target="sum", max_target=4)
    assert objective.columns() == ["a", "b", "sum"]
    split = Examples({"a": ["1", "{b}"], "b": ["2", "0" * 30], "sum": ["3", "12345"]}, BYTES)
    batch = objective.batch(split, np.arange(3), 16, None)
    assert batch["tokens"][0].tolist() == [*ids("add 1 to 2"), EOT] + [PAD] * 5
    assert batch["visible"].tolist() == [11, 16, 11]
    assert batch["decoder_tokens"][0].tolist() == [PAD, *ids("3"), PAD, PAD]
    assert batch["targets"][0].tolist() == [*ids("3"), EOT, IGNORE, IGNORE]
    # What is too long loses its back, and still ends; braces in a text are text.
    assert batch["tokens"][1].tolist() == [*ids("add {b} to 0000"), EOT]
    assert batch["targets"][1].tolist() == [*ids("123"), EOT]
    assert (batch["targets"][2] == IGNORE).all()  # past the end
    assert objective.counts(batch, BYTES) == {"loss": 2 + 4}


@given(
    st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=6),
    st.integers(2, 20),
    st.integers(0, 20),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_source_and_target_are_found_in_the_rows_again(pairs, max_target, more, seed):
    objective = Seq2Seq(max_target=max_target)
    split = Examples({"source": [s for s, _ in pairs], "target": [t for _, t in pairs]}, BYTES)
    seq_len, n = max_target + more, len(pairs)
    expected = [(ids(s)[: seq_len - 1] + [EOT], ids(t)[: max_target - 1] + [EOT]) for s, t in pairs]
    rows = np.arange(n, 2 * n)
    for batch in (objective.batch(split, np.arange(n), seq_len, None), objective.batch(split, rows, seq_len, seed)):
        found = []
        for i in range(n):
            source, target = batch["tokens"][i].tolist(), batch["targets"][i].tolist()
            written = [token for token in target if token != IGNORE]
            assert target == written + [IGNORE] * (max_target - len(written))
            assert batch["decoder_tokens"][i, : len(written)].tolist() == [PAD, *written[:-1]]
            assert set(source[batch["visible"][i] :]) <= {PAD}
            found.append((source[: batch["visible"][i]], written))
        assert sorted(found) == sorted(expected)
    one_by_one = [objective.batch(split, rows[i : i + 1], seq_len, seed) for i in range(n)]
    for name, array in batch.items():
        assert (np.concatenate([row[name] for row in one_by_one]) == array).all()


@pytest.mark.parametrize("options, message", [
    (dict(template="no column"), "must name a column"), (dict(max_target=1), "max_target = 1 must be at least 2"),
    (dict(round_target=-0.2), "round_target = -0.2 must be at least 0"),
])  # fmt: skip
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Seq2Seq(**options)


def test_scores_are_rounded_as_in_t5():
    objective = Seq2Seq(template="{s}", target="score", round_target=0.2)
    scores = [f"{tenths / 10:g}" for tenths in range(10, 51)]  # as SICK writes them: "4.5", "5"
    train, val = (Examples({"s": scores, "score": part}, BYTES) for part in (scores, scores[::-1]))
    objective.prepare(train, val)
    # Raffel et al. (2020), section 2.4, and their code: the nearest multiple of 0.2 with one decimal.
    expected = [f"{round(5 * float(score)) / 5:.1f}" for score in scores]
    assert (train.columns["score"], val.columns["score"]) == (expected, expected[::-1]) and len(set(expected)) == 21
    assert train.columns["s"] == scores  # the source is not touched


@pytest.mark.parametrize("target", ["good", "", "nan", "1,5"])
def test_a_score_that_is_no_number_is_refused(target):
    objective, split = Seq2Seq(target="score", round_target=0.2), Examples({"source": ["a"], "score": [target]}, BYTES)
    with pytest.raises(UserError, match=f'the column "score" has "{target}", which is no number'):
        objective.prepare(split, split)


def test_a_target_longer_than_the_model_is_refused():
    split = Examples({"source": ["a"], "target": ["b"]}, BYTES)
    with pytest.raises(UserError, match="objective.max_target = 17 is more than train.seq_len = 16"):
        Seq2Seq(max_target=17).batch(split, np.arange(1), 16, None)


def test_the_loss_is_that_of_full_logits():
    objective = Seq2Seq(max_target=5)
    split = Examples({"source": ["ab", "cde"], "target": ["x", "yz"]}, BYTES)
    model = make()
    arrays = objective.batch(split, np.arange(3), 12, None)
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    part, count = model(**batch, loss=objective.loss)["loss"], objective.counts(arrays, BYTES)
    past = {key: tensor[2:] for key, tensor in batch.items()}
    assert model(**past, loss=objective.loss)["loss"] == 0  # as a rank may have a batch without any target
    targets = batch.pop("targets")
    expected = F.cross_entropy(model(**batch).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    assert count == {"loss": 5}  # x, y, z and two ends
    assert abs(objective.report({"loss": part.item()}, count)["loss"] - expected.item()) < 1e-5


def test_a_model_is_asked_as_it_was_trained(monkeypatch):
    """The encoder reads, and the decoder starts from, what they do in training, for as many tokens."""
    asked = []

    def generate(model, start, source, max_tokens, stop, temperature, **options):
        asked.append((source, start, max_tokens))
        assert temperature == 0 and stop == EOT
        return iter(ids("yes") if len(asked) == 1 else ids("yes or no"))

    monkeypatch.setattr("nanopre.generate.generate", generate)
    objective, model = Seq2Seq(template="q: {source}", max_target=6, eval_examples=2), make()
    split = Examples({"source": ["a", "b" * 20, "unasked"], "target": ["yes", "yes", "yes"]}, BYTES)
    assert objective.evaluate(model, split, 16) == {"exact_match": 0.5, "f1": pytest.approx(0.75)}
    batch = objective.batch(split, np.arange(2), 16, None)
    sources = [row[:n].tolist() for row, n in zip(batch["tokens"], batch["visible"], strict=True)]
    assert asked == [(source, row[:1].tolist(), 6) for source, row in zip(sources, batch["decoder_tokens"], strict=True)]


def test_without_examples_nothing_is_decoded():
    split = Examples({"source": ["a"], "target": ["b"]}, BYTES)
    assert Seq2Seq(eval_examples=0).evaluate(None, split, 16) == {}


def test_a_task_that_can_be_learnt_is_learnt():
    """The source's three letters in capitals; decoded greedily on sources that were not trained on."""
    sources = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
    random.Random(0).shuffle(sources)
    targets = [source.upper() for source in sources]
    objective = Seq2Seq(max_target=4)
    train, val = (Examples({"source": sources[part], "target": targets[part]}, BYTES) for part in (slice(450), slice(450, 512)))
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 200)
    before = objective.evaluate(model, val, 16)
    for step in range(200):
        arrays = objective.batch(train, np.arange(32) + 32 * step, 16, seed=1)
        parts = model(**{key: torch.from_numpy(array) for key, array in arrays.items()}, loss=objective.loss)
        (parts["loss"] / objective.counts(arrays, BYTES)["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = objective.evaluate(model, val, 16)
    assert before["exact_match"] < 0.3
    assert after["exact_match"] > 0.9 and after["f1"] >= after["exact_match"]


def test_a_whole_run(tiny, tmp_path, capsys):
    file = tmp_path / "pairs.tsv"
    file.write_text("a\tb\tsum\n" + "".join(f"{i}\t{j}\t{i + j}\n" for i in range(9) for j in range(9)))
    train.main([*tiny, "--model.name=t5", "--objective.name=seq2seq", "--objective.template={a} and {b}",
                "--objective.target=sum", "--objective.max_target=8", "--objective.eval_examples=3",
                f"--data.corpus={file}"])  # fmt: skip
    _, evaluations = read_log(tmp_path / "runs" / "tiny")
    assert {"val_loss", "val_exact_match", "val_f1"} <= set(evaluations[-1])
    capsys.readouterr()
    sample.main([str(tmp_path / "runs" / "tiny"), "--prompt", "1\t2", "--temperature", "0", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["source"] == "1 and 2" and isinstance(result["text"], str)
    with pytest.raises(UserError, match="the prompt must be 2 texts: a <tab> b."):
        sample.main([str(tmp_path / "runs" / "tiny"), "--prompt", "1"])
