"""Prompt and response: rows by hand, what is scored, what the model is asked, and a task that is learnt."""

from __future__ import annotations

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
SFT = REGISTRY.get("objective", "sft", "test")
BYTES = bytes_tokenizer()
EOT, PAD = BYTES.eot, BYTES.pad


def ids(text: str) -> list[int]:
    return BYTES.encode(text).tolist()


def make():
    model = REGISTRY.get("model", "llama", "test")(d_model=64, n_layers=2, n_heads=4)
    model = model.build(-(-BYTES.n_vocab // 64) * 64, 16)
    initialise(model, 1)
    return model


def test_rows_by_hand():
    objective = SFT(template="{q}=", response="a")
    assert objective.columns() == ["q", "a"]
    split = Examples({"q": ["1+1", "10000+1", "x"], "a": ["2", "10001", "123456789"]}, BYTES)
    batch = objective.batch(split, np.arange(4), 8, None)
    assert batch["tokens"][0].tolist() == [EOT, *ids("1+1=2"), EOT, PAD]
    assert batch["targets"][0].tolist() == [IGNORE] * 4 + [*ids("2"), EOT, IGNORE, IGNORE]
    # A long prompt loses its front; of a response that alone is too long the back goes, and with it the prompt.
    assert batch["tokens"][1].tolist() == [EOT, *ids("1=10001")]
    assert batch["targets"][1].tolist() == [IGNORE] * 2 + [*ids("10001"), EOT]
    assert batch["tokens"][2].tolist() == [EOT, *ids("1234567")]
    assert batch["targets"][2].tolist() == [*ids("1234567"), EOT]
    assert (batch["targets"][3] == IGNORE).all()  # past the end
    assert objective.counts(batch, BYTES) == {"loss": 2 + 6 + 8}


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


@pytest.mark.parametrize("template", ["no column", "{a}{b}"])
def test_a_template_without_one_column_is_refused(template):
    with pytest.raises(ValueError, match="must name one column"):
        SFT(template=template)


def test_the_loss_is_that_of_full_logits():
    objective = SFT()
    split = Examples({"prompt": ["ab", "cde"], "response": ["x", "yz"]}, BYTES)
    model = make()
    arrays = objective.batch(split, np.arange(3), 12, None)
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    part, count = model(**batch, loss=objective.loss)["loss"], objective.counts(arrays, BYTES)
    past = {key: tensor[2:] for key, tensor in batch.items()}
    assert model(**past, loss=objective.loss)["loss"] == 0  # as a rank may have a batch without any target
    expected = F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE)
    assert count == {"loss": 5}  # x, y, z and two ends
    assert abs(objective.report({"loss": part.item()}, count)["loss"] - expected.item()) < 1e-5


@pytest.mark.parametrize("seq_len", [4, 7, 8, 12, 40])
def test_a_model_is_asked_as_it_was_trained(monkeypatch, seq_len):
    """Where responses have one length, the decoder starts from what stands before them in training, and has as many
    tokens to make."""
    asked = []

    def generate(model, start, max_tokens, **options):
        asked.append((start, max_tokens))
        return iter(ids("yes") if len(asked) == 1 else ids("yes or no"))

    monkeypatch.setitem(SFT.answer.__globals__, "generate", generate)
    objective, n = SFT(eval_examples=2), min(4, seq_len)
    split = Examples({"prompt": ["a", "bcdefghijk", "unasked"], "response": ["yes", "yes", "yes"]}, BYTES)
    assert objective.evaluate(None, split, seq_len) == {"exact_match": 0.5, "f1": pytest.approx(0.75)}
    batch = objective.batch(split, np.arange(2), seq_len, None)
    starts = [row[: np.flatnonzero(targets != IGNORE)[0] + 1].tolist() for row, targets in zip(*batch.values(), strict=True)]
    assert asked == [(start, n) for start in starts]
    assert SFT(eval_examples=0).evaluate(None, split, seq_len) == {}


def test_a_task_that_can_be_learnt_is_learnt():
    """The last letter of three, in capitals; decoded greedily on examples that were not trained on."""
    draw, letters = random.Random(0), "abcdefgh"
    prompts = ["".join(draw.choices(letters, k=3)) for _ in range(400)]
    responses = [prompt[-1].upper() for prompt in prompts]
    objective = SFT()
    train, val = (
        Examples({"prompt": prompts[part], "response": responses[part]}, BYTES) for part in (slice(350), slice(350, 400))
    )
    model = make()
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


def test_a_whole_run(tiny, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i}+{j}", "response": i + j} for i in range(9) for j in range(9)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train.main([*tiny, "--objective.name=sft", "--objective.template={prompt}=", "--objective.eval_examples=3",
                f"--data.corpus={file}", "--train.samples=1"])  # fmt: skip
    _, evaluations = read_log(tmp_path / "runs" / "tiny")
    assert {"val_loss", "val_exact_match", "val_f1"} <= set(evaluations[-1])
    capsys.readouterr()
    sample.main([str(tmp_path / "runs" / "tiny"), "--prompt", "1+2\n", "--tokens", "3", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert isinstance(result["text"], str) and len(result["text"]) <= 3
    with pytest.raises(UserError, match="there is nothing to put into the template"):
        sample.main([str(tmp_path / "runs" / "tiny")])
