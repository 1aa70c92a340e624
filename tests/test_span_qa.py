"""Extractive answers: windows cover, spans are exact, answers are parts of the context, and a task is learnt."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from conftest import SHARED, read_log
from hypothesis import given, settings, strategies as st

import sample
import train
from nanopre import UserError
from nanopre.distributed import initialise
from nanopre.examples import Examples
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins
from nanopre.tokenizer import bpe_tokenizer, bytes_tokenizer

REGISTRY = load_plugins()
SpanQA = REGISTRY.get("objective", "span_qa", "test")
BYTES = bytes_tokenizer()
XQUAD = SHARED / "finetune" / "xquad.en.json"


def examples(records: list[tuple[str, str, str, str]], tokenizer=BYTES) -> Examples:
    return Examples(dict(zip(SpanQA().columns(), map(list, zip(*records, strict=True)), strict=True)), tokenizer)


def test_rows_by_hand():
    split = examples([("why", "abcdefghij", "efg", "4"), ("who", "xyz", "", "-1")])
    objective = SpanQA(doc_stride=3)
    # [CLS] w h y [SEP] + 5 of the context + [SEP]: windows from 0, 3 and 5 on... by a stride of 3 up to the end.
    batch = objective.batch(split, np.arange(5), 11, None)
    assert objective.rows_per_epoch(split, 11) == 4
    cls, sep, pad = BYTES.cls, BYTES.sep, BYTES.pad

    def row(question, window):
        tokens = [cls, *question.encode(), sep, *window.encode(), sep]
        return tokens + [pad] * (11 - len(tokens))

    assert batch["tokens"][:4].tolist() == [row("why", "abcde"), row("why", "defgh"), row("why", "ghij"), row("who", "xyz")]
    assert batch["segments"][2].tolist() == [0] * 5 + [1] * 5 + [0]
    assert batch["visible"].tolist()[:4] == [11, 11, 10, 9]
    # "efg" lies whole in the second window alone: at "defgh"[1:4], behind the five tokens before it.
    assert batch["starts"].tolist() == [0, 6, 0, 0, IGNORE] and batch["ends"].tolist() == [0, 8, 0, 0, IGNORE]


def test_a_long_question_loses_its_back():
    batch = SpanQA(max_question=2).batch(examples([("why", "xyz", "y", "1")]), np.arange(1), 10, None)
    cls, sep, pad = BYTES.cls, BYTES.sep, BYTES.pad
    assert batch["tokens"].tolist() == [[cls, *b"wh", sep, *b"xyz", sep, pad, pad]]
    assert batch["starts"].tolist() == batch["ends"].tolist() == [5]


def make():
    model = REGISTRY.get("model", "bert", "test")(d_model=32, n_layers=2, n_heads=2, positions="rope").build(384, 32)
    model = SpanQA().adapt(model)
    initialise(model, 1)
    return model


def test_the_loss_is_the_mean_of_both_ends():
    objective, model = SpanQA(doc_stride=3), make()
    assert not any(384 in weight.shape for weight in model.head.parameters())  # no projection to the vocabulary
    split = examples([("why", "abcdefghij", "efg", "4"), ("who", "xyz", "", "-1")])
    arrays = objective.batch(split, np.arange(6), 11, None)  # four windows, and two rows past the end
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    with torch.no_grad():
        sums = {key: part.item() for key, part in model(**batch, loss=objective.loss).items()}
        logits = model(**batch, loss=lambda head, h, _: {"span": head.output("span", h)})["span"][:4].log_softmax(dim=1)
        past = model(**{key: tensor[4:] for key, tensor in batch.items()}, loss=objective.loss)
    places = {name: batch[name][:4] for name in ("starts", "ends")}
    both = sum(-logits[torch.arange(4), at, side] for side, at in enumerate(places.values())) / 2
    report = objective.report(sums, objective.counts(arrays, BYTES))
    assert report["loss"] == pytest.approx(both.mean().item(), abs=1e-5)
    assert past["loss"] == past["right"] == 0  # as a rank may have a batch without any target


def test_a_window_is_right_where_both_ends_are():
    class Head:
        def output(self, name, h):
            return h

    h = torch.zeros(4, 5, 2)
    h[[0, 1, 2, 3], [1, 1, 2, 1], 0] = h[[0, 1, 2, 3], [3, 4, 3, 3], 1] = 1  # starts and ends
    batch = {"starts": torch.tensor([1, 1, 1, IGNORE]), "ends": torch.tensor([3, 3, 3, IGNORE])}
    objective = SpanQA()
    sums = {key: part.item() for key, part in objective.loss(Head(), h, batch).items()}
    counts = objective.counts({key: tensor.numpy() for key, tensor in batch.items()}, BYTES)
    assert objective.report(sums, counts)["accuracy"] == pytest.approx(1 / 3)


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=5), st.text(max_size=60), st.integers(0, 60), st.integers(1, 8)),
             min_size=1, max_size=4),
    st.integers(1, 20),
    st.integers(24, 50),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_windows_cover_each_context_and_hold_the_answer_where_it_is_whole(records, stride, seq_len):
    rows = []
    for question, context, start, length in records:
        answer = context[start : start + length]
        rows.append((question, context, answer, str(start) if answer else ""))
    split, objective = examples(rows), SpanQA(doc_stride=stride)
    n = objective.rows_per_epoch(split, seq_len)
    batch, windows = objective.batch(split, np.arange(n), seq_len, None), objective.windows(split, seq_len)
    for i, (question, context, answer, start) in enumerate(rows):
        raw, q = context.encode(), len(question.encode())
        covered, held = np.zeros(len(raw), dtype=bool), []
        for row in np.flatnonzero(windows.example == i):
            first, length = windows.first[row], windows.length[row]
            assert bytes(batch["tokens"][row][q + 2 : q + 2 + length].tolist()) == raw[first : first + length]
            covered[first : first + length] = True
            s, e = batch["starts"][row], batch["ends"][row]
            if s:
                held.append(bytes(batch["tokens"][row][s : e + 1].tolist()).decode())
            else:
                begin = len((context[: int(start)] + answer[: len(answer) - len(answer.lstrip())]).encode()) if answer else 0
                end = begin + len(answer.strip().encode())
                assert e == 0 and not (answer.strip() and first <= begin and end <= first + length)
        assert covered.all() and all(text == answer.strip() for text in held)
    trained = [objective.batch(split, np.arange(n) + n * e, seq_len, 3)["tokens"] for e in (0, 1)]
    for epoch in trained:  # each window once an epoch
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, batch["tokens"].tolist()))


@pytest.mark.skipif(not XQUAD.exists(), reason="XQuAD (shared/data/finetune) is not here")
def test_gold_answers_of_xquad_are_found_again():
    """By pieces of a BPE, whose edges may lie within an answer's first or last word: the first token is the one in which
    the answer begins, the last the one in which it ends, and most are exact."""
    records = list(REGISTRY.get("dataset", "squad", "test")(path=str(XQUAD)).records())
    assert len(records) == 1190
    tokenizer = bpe_tokenizer([record["context"] for record in records], 2048)
    objective = SpanQA(doc_stride=64)
    split = examples([tuple(record[name] for name in objective.columns()) for record in records], tokenizer)
    windows = objective.windows(split, 160)
    exact = 0
    for i, record in enumerate(records):
        edges, raw = np.concatenate(([0], windows.ends[i])), record["context"].encode()
        first, last = windows.answer_first[i], windows.answer_last[i]
        answer = record["answer"].encode()
        begin = len(record["context"][: int(record["answer_start"])].encode())
        assert edges[first] <= begin < edges[first + 1]
        assert edges[last] < begin + len(answer) <= edges[last + 1]
        exact += raw[edges[first] : edges[last + 1]].strip() == answer
    assert exact / len(records) > 0.9
    batch = objective.batch(split, np.arange(len(windows.example)), 160, None)
    answered = set(windows.example[batch["starts"] > 0])
    assert len(answered) / len(records) > 0.99  # an answer longer than the overlap may fall between two windows
    short = SpanQA().windows(split, 96)  # of which one stride of the default would leave no overlap
    answered = set(short.example[short.rows(np.arange(len(short.example)))["starts"] > 0])
    assert len(answered) / len(records) > 0.99


@pytest.mark.parametrize("answer, start", [(" cat ", 1), ("cat ", 2), (" cat", 1), ("cat", 2)])
def test_white_space_around_an_answer_does_not_take_its_neighbour_in(answer, start):
    """" sat", with its space, is one token."""
    tokenizer = bpe_tokenizer(["a cat sat"] * 3, 2048)
    windows = SpanQA().windows(examples([("q", "a cat sat", answer, str(start))], tokenizer), 32)
    assert windows.ends[0].tolist() == [1, 5, 9]
    assert (windows.answer_first.item(), windows.answer_last.item()) == (1, 1)


def test_white_space_is_no_answer():
    batch = SpanQA().batch(examples([("q", "a   cat", "  ", "1")]), np.arange(1), 32, None)
    assert batch["starts"].tolist() == batch["ends"].tolist() == [0]


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match='answer_start: the context of "q" does not have the answer "cat" at character 2.'):
        SpanQA().batch(examples([("q", "a dog", "cat", "2")]), np.arange(1), 32, None)
    with pytest.raises(UserError, match="train.seq_len = 8 leaves no room for a context beside a question of 5 tokens"):
        SpanQA().batch(examples([("which", "a dog", "dog", "2")]), np.arange(1), 8, None)


class Scores:
    """A model that scores what it is told: of token t of a context, start[t] and end[t]; [CLS] as `null`."""

    def __init__(self, start, end, null, offset):
        self.start, self.end, self.null, self.offset = start, end, null, offset
        self.weight = torch.zeros(1)

    def parameters(self):
        return iter([self.weight])

    def __call__(self, tokens, visible, loss, **_):
        spans = torch.full((*tokens.shape, 2), 50.0)  # outside of the passage all is tempting
        for row in range(len(tokens)):
            spans[row, 0] = self.null / 2
            for place in range(self.offset, int(visible[row]) - 1):
                t = int(tokens[row, place]) - 97
                spans[row, place, 0], spans[row, place, 1] = self.start[t], self.end[t]
        return {"span": spans}


@pytest.mark.parametrize("start, end, null, answer", [
    ({2: 5}, {4: 5}, 0, "cde"),
    ({4: 5}, {2: 5}, 0, "c"),  # an end before the start is none: the best that is left is one end with a neutral other
    ({2: 5}, {4: 5}, 11, ""),
    ({0: 5}, {9: 5}, 0, None),  # 10 tokens are more than max_answer
])  # fmt: skip
def test_answers_are_the_best_spans_of_the_passage(start, end, null, answer):
    full = [np.array([side.get(t, 0.0) for t in range(10)]) for side in (start, end)]
    model = Scores(*full, null, offset=5)
    objective = SpanQA(doc_stride=3, max_answer=4)
    (result,) = objective.answers(model, examples([("why", "abcdefghij", "", "-1")]), 11)
    if answer is None:
        assert len(result["answer"]) <= 4 and result["score"] == pytest.approx(5)
    elif answer == "c":
        assert result["score"] == pytest.approx(5)
    else:
        assert result["answer"] == answer
        assert result["score"] == pytest.approx(10 - null)


@pytest.mark.parametrize("seed", range(10))
def test_answers_are_those_of_the_originals_loop(seed):
    """run_squad.py: every window's every span, if the window is the one that gives its start most context."""
    draw = np.random.default_rng(seed)
    made = []

    class Random(Scores):
        def __call__(self, tokens, **_):
            made.append(draw.normal(size=(*tokens.shape, 2)).astype(np.float32))
            return {"span": torch.from_numpy(made[-1])}

    contexts = ["".join(draw.choice(list("abcdefgh"), size=n)) for n in draw.integers(1, 40, size=60)]
    split = examples([("why", context, "", "-1") for context in contexts])
    objective = SpanQA(doc_stride=int(draw.integers(1, 6)), max_answer=int(draw.integers(1, 8)), null_threshold=-2.0)
    results = objective.answers(Random(None, None, None, 5), split, 13)
    logits, windows = np.concatenate(made), objective.windows(split, 13)
    for i, (context, result) in enumerate(zip(contexts, results, strict=True)):
        rows = np.flatnonzero(windows.example == i)

        def context_of(row, token):
            left, right = token - windows.first[row], windows.first[row] + windows.length[row] - 1 - token
            return min(left, right) + 0.01 * windows.length[row] if min(left, right) >= 0 else -1

        spans = []
        for row in rows:
            place = 5 - windows.first[row]
            tokens = range(windows.first[row], windows.first[row] + windows.length[row])
            for s in tokens:
                if row != max(rows, key=lambda other: context_of(other, s)):
                    continue
                for e in tokens:
                    if s <= e < s + objective.max_answer:
                        spans.append((logits[row, place + s, 0] + logits[row, place + e, 1], s, e))
        best, s, e = max(spans)
        score = best - min(logits[row, 0].sum() for row in rows)
        assert result["score"] == pytest.approx(score, abs=1e-5)
        assert result["answer"] == ("" if -score > -2 else context[s : e + 1])
    assert any(result["answer"] for result in results) and not all(result["answer"] for result in results)


class Oracle(torch.nn.Module):
    """Points at where the answer is, in each of the windows in the order in which `answers` asks for them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, starts, ends, **_):
        spans = torch.zeros(*tokens.shape, 2)
        for side, places in enumerate((starts, ends)):
            spans[torch.arange(len(tokens)), places, side] = 1
        return {"span": spans}


@pytest.mark.skipif(not XQUAD.exists(), reason="XQuAD (shared/data/finetune) is not here")
@pytest.mark.parametrize("vocabulary", ["bytes", "bpe"])
def test_who_knows_the_tokens_answers_xquad(vocabulary):
    """From a file to answers and back: exact by bytes, and by BPE but where an answer's edge lies within a token."""
    records = list(REGISTRY.get("dataset", "squad", "test")(path=str(XQUAD)).records())[::4]
    tokenizer = BYTES if vocabulary == "bytes" else bpe_tokenizer([record["context"] for record in records], 2048)
    objective = SpanQA(doc_stride=64, max_question=256, max_answer=512, eval_examples=len(records))
    split = examples([tuple(record[name] for name in objective.columns()) for record in records], tokenizer)
    found = objective.answers(Oracle(), split, 768 if vocabulary == "bytes" else 256)
    windows, wrong = objective.windows(split, 768 if vocabulary == "bytes" else 256), 0
    for i, (record, result) in enumerate(zip(records, found, strict=True)):
        assert result["answer"] and result["answer"] in record["context"]
        if result["answer"] != record["answer"]:
            assert record["answer"] in result["answer"] and windows.ends[i][-1] > len(windows.ends[i])  # pieces, not bytes
            wrong += 1
    assert wrong == 0 if vocabulary == "bytes" else wrong < 0.02 * len(records)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_an_answer_is_a_part_of_its_context(contexts, seed):
    """Also where the tokens are bytes, and the best of them begin or end within a character."""

    class Random(Oracle):
        def forward(self, tokens, **_):
            return {"span": torch.randn(*tokens.shape, 2, generator=torch.Generator().manual_seed(seed))}

    split = examples([("why", context, "", "") for context in contexts])
    for context, result in zip(contexts, SpanQA(null_threshold=1e9).answers(Random(), split, 16), strict=True):
        assert result["answer"] in context and result["answer"] == result["answer"].strip()


def test_where_there_is_no_answer_none_is_right():
    """Whatever stands in the answer's column."""
    split = examples([("why", "a dog", "bad dog", "-1"), ("why", "a dog", "dog", "2")])
    assert SpanQA().evaluate(Oracle(), split, 32) == {"exact_match": 1, "f1": 1}


def test_a_task_that_can_be_learnt_is_learnt():
    """The answer is the word between two marks, somewhere among letters."""
    draw, records = random.Random(0), []
    for _ in range(500):
        word = "".join(draw.choices("abcdef", k=draw.randint(1, 4)))
        before, after = ("".join(draw.choices("uvwxyz", k=draw.randint(0, 8))) for _ in range(2))
        records.append(("?", f"{before}<{word}>{after}", word, str(len(before) + 1)))
    train, val = examples(records[:450]), examples(records[450:])
    objective = SpanQA()
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    before = objective.evaluate(model, val, 32)
    for step in range(200):
        arrays = objective.batch(train, np.arange(32) + 32 * step, 32, seed=1)
        parts = model(**{key: torch.from_numpy(array) for key, array in arrays.items()}, loss=objective.loss)
        (parts["loss"] / objective.counts(arrays, BYTES)["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = objective.evaluate(model.eval(), val, 32)
    assert before["exact_match"] < 0.3 and after["exact_match"] > 0.9


def test_without_examples_nothing_is_answered():
    assert SpanQA(eval_examples=0).evaluate(None, examples([("q", "a dog", "dog", "2")]), 32) == {}


@pytest.mark.parametrize("content", ["", "[1]", '{"data": 5}', '{"data": [{}]}', '{"data": [{"paragraphs": [{"qas": []}]}]}'])
def test_a_file_of_another_format_is_named(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UserError, match="data.corpus: .*other.json is not in SQuAD's format"):
        list(REGISTRY.get("dataset", "squad", "test")(path=str(tmp_path / "other.json")).records())


def test_a_whole_run(tiny, tmp_path, capsys):
    """From a file of SQuAD's format, with a question that has no answer."""
    context = "The cat sat on the mat and the dog lay by the door. " * 2
    qas = [{"question": f"Where is it, {i}?", "answers": [{"text": "mat", "answer_start": 19}] * (i > 0)} for i in range(20)]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
    train.main([*tiny, "--model.name=bert", "--objective.name=span_qa", "--objective.doc_stride=12",
                "--objective.max_question=8", "--data.corpus.name=squad", f"--data.corpus.path={file}",
                "--optimizer.lr=0.003", "--train.steps=2", "--train.eval_interval=2"])  # fmt: skip
    _, evaluations = read_log(tmp_path / "runs" / "tiny")
    assert {"val_loss", "val_accuracy", "val_exact_match", "val_f1"} <= set(evaluations[-1])
    run = str(tmp_path / "runs" / "tiny")
    capsys.readouterr()
    sample.main([run, "--prompt", f"Where?\t{context}", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["answer"] in context and result["text"] == (result["answer"] or "(no answer)")
    assert np.isfinite(result["score"])
    for prompt in ("Where?", "Where?\t "):
        with pytest.raises(UserError, match="the prompt must be two texts with a tab between them"):
            sample.main([run, "--prompt", prompt])
