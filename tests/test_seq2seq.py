"""Text to text and prompt to response: rows by hand, what is scored, and tasks that can be learnt."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from nanopre.distributed import initialise
from nanopre.examples import Examples
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins
from nanopre.tokenizer import bytes_tokenizer

REGISTRY = load_plugins()
Seq2Seq, SFT = (REGISTRY.get("objective", name, "test") for name in ("seq2seq", "sft"))
BYTES = bytes_tokenizer()
EOT, PAD = BYTES.eot, BYTES.pad
MODELS = {
    "seq2seq": ("t5", dict(d_model=64, n_layers=1, n_heads=4, d_head=16)),
    "sft": ("llama", dict(d_model=64, n_layers=2, n_heads=4)),
}


def ids(text: str) -> list[int]:
    return BYTES.encode(text).tolist()


def test_a_row_of_text_to_text():
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


@given(
    st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=6),
    st.integers(2, 30),
    st.one_of(st.none(), st.integers(0, 99)),
)
@settings(max_examples=80, deadline=None)
def test_a_response_is_scored_whole_and_a_prompt_never(pairs, seq_len, seed):
    objective = SFT(template="Q: {prompt} A:")
    split = Examples({"prompt": [p for p, _ in pairs], "response": [r for _, r in pairs]}, BYTES)
    batch = objective.batch(split, np.arange(len(pairs)), seq_len, seed)
    assert batch["tokens"].shape == batch["targets"].shape == (len(pairs), seq_len)
    rows = []
    for prompt, response in pairs:
        response_ids = ids(response)[: seq_len - 1] + [EOT]
        prompt_ids = ids(f"Q: {prompt} A:")
        room = seq_len - len(response_ids)
        rows.append((([EOT] + prompt_ids[len(prompt_ids) - min(room, len(prompt_ids)) :]), response_ids))
    found = []
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        scored = [i for i, target in enumerate(targets) if target != IGNORE]
        assert scored == list(range(scored[0], scored[-1] + 1))
        start, response = tokens[: scored[0] + 1], [targets[i] for i in scored]
        assert tokens[scored[0] + 1 : scored[-1] + 1] == response[:-1]  # each is predicted from those before it
        assert all(token == PAD for token in tokens[scored[-1] + 2 :])
        found.append((start, response))
    assert sorted(found) == sorted(rows) if seed is not None else found == rows
    past = objective.batch(split, np.arange(len(pairs), len(pairs) + 2), seq_len, None)
    assert (past["targets"] == IGNORE).all()


@pytest.mark.parametrize("options, message", [
    (dict(template="no column"), "must name a column"), (dict(max_target=1), "max_target = 1 must be at least 2"),
])  # fmt: skip
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Seq2Seq(**options)


def test_two_columns_are_too_many_for_a_prompt():
    with pytest.raises(ValueError, match="must name one column"):
        SFT(template="{a}{b}")


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_full_logits(name):
    objective = REGISTRY.get("objective", name, "test")()
    columns = {"source": ["ab", "cde"], "prompt": ["ab", "cde"], "target": ["x", "yz"], "response": ["x", "yz"]}
    split = Examples({column: columns[column] for column in objective.columns()}, BYTES)
    model = make(name)
    arrays = objective.batch(split, np.arange(2), 12, None)
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    part, count = model(**batch, loss=objective.loss)["loss"], objective.counts(arrays, BYTES)
    targets = batch.pop("targets")
    expected = F.cross_entropy(model(**batch).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    assert count == {"loss": 5}  # x, y, z and two ends
    assert abs(objective.report({"loss": part.item()}, count)["loss"] - expected.item()) < 1e-5


def make(name: str):
    kind, options = MODELS[name]
    model = REGISTRY.get("model", kind, "test")(**options).build(-(-BYTES.n_vocab // 64) * 64, 16)
    initialise(model, 1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_task_that_can_be_learnt_is_learnt(name):
    """The last letter of three, in capitals; decoded greedily on examples that were not trained on."""
    draw, letters = random.Random(0), "abcdefgh"
    sources = ["".join(draw.choices(letters, k=3)) for _ in range(400)]
    targets = [source[-1].upper() for source in sources]
    objective = REGISTRY.get("objective", name, "test")()
    read, write = objective.columns()
    train, val = (Examples({read: sources[part], write: targets[part]}, BYTES) for part in (slice(0, 350), slice(350, 400)))
    model = make(name)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    before = objective.evaluate(model, val, 16)
    for step in range(150):
        arrays = objective.batch(train, np.arange(32) + 32 * step, 16, seed=1)
        parts = model(**{key: torch.from_numpy(array) for key, array in arrays.items()}, loss=objective.loss)
        (parts["loss"] / objective.counts(arrays, BYTES)["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = objective.evaluate(model, val, 16)
    assert before["exact_match"] < 0.3
    assert after["exact_match"] > 0.9 and after["f1"] >= after["exact_match"]
