"""What the ranks send each other: measured by a third party's strategy, and equal to the formulas of docs/parallel.md."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from nanopre import config as configs

B, T, C, L, F = 8, 32, 32, 4, 64  # rows, tokens, d_model, blocks, d_ff


def run(folder: str, model: str, parallel: dict, micro: int) -> None:
    import train

    table = {
        "out_dir": f"{folder}/runs",
        "name": "run",
        "plugins": [str(ROOT / "tests" / "traffic_plugin" / "traffic.py")],
        "model": {"name": model, "n_layers": L, "d_model": C, "n_heads": 4, "d_ff": F},
        "data": {"corpus": str(ROOT / "README.md"), "cache_dir": f"{folder}/cache", "val_fraction": 0.0},
        "tokenizer": {"name": "bytes"},
        "train": {
            "steps": 2, "batch_size": B, "micro_batch_size": micro, "seq_len": T, "samples": 0, "device": "cpu",
            "precision": "float32",
        },
        "parallel": {**parallel, "traffic": {}},
        "loggers": {"jsonl": {}},
    }  # fmt: skip
    train.train(*configs.from_dict(table, "test"))


V = 384  # 361 tokens of bytes, padded
TOKENS = 4 * V * C  # bytes of the embedding, which is also the output projection,
ENDS = TOKENS + 4 * (T * C + 2 * C)  # with positions and the last norm,
VECTORS = 4 * L * (C + C + 4 * C)  # of a block's vectors that no column has: biases after a sum, and norms,
BLOCKS = 4 * L * (4 * C * C + 3 * C + 2 * C * F + F) + VECTORS  # and of all
STREAM = 4 * B * T * C  # bytes of a stream
TARGETS = 4 * B * T  # and of a number for each target
LAYERS = 2 * 2 * L * STREAM  # attention and MLP of each block, forward and backward
SPLIT = {"held": TOKENS // 2 + (ENDS - TOKENS) + (BLOCKS - VECTORS) // 2 + VECTORS}

# What each of two ranks sends in a step, and the bytes of the parameters that it holds.
EXPECTED = {
    "ddp": ({"ddp": {}}, 0, {"allreduce": ENDS + BLOCKS, "held": ENDS + BLOCKS}),
    "ddp, 4 micro-batches": ({"ddp": {}}, 1, {"allreduce": ENDS + BLOCKS, "held": ENDS + BLOCKS}),  # once a step
    "fsdp": (
        {"fsdp": {}},
        0,
        {"allgather": ENDS + 2 * BLOCKS, "reducescatter": ENDS + BLOCKS, "held": (ENDS + BLOCKS) // 2},
    ),
    "fsdp, reshard_after_forward = false": (
        {"fsdp": {"reshard_after_forward": False}},
        0,
        {"allgather": ENDS + BLOCKS, "reducescatter": ENDS + BLOCKS, "held": (ENDS + BLOCKS) // 2},
    ),
    # The embedding's sum, the cross-entropy's gradient, and its three numbers a target.
    "tensor": ({"tensor": {}}, 0, {"allreduce": LAYERS + 2 * STREAM + 3 * TARGETS, **SPLIT}),
    # The head gathers the stream, and so does the embedding in the backward pass; norms' gradients are summed.
    "tensor, sequence_parallel": (
        {"tensor": {"sequence_parallel": True}},
        0,
        {
            "allgather": LAYERS + 2 * STREAM,
            "reducescatter": LAYERS,
            "allreduce": 2 * STREAM + 3 * TARGETS + 4 * L * 2 * 2 * C,
            **SPLIT,
        },
    ),
    # Forward from the first rank, back from the second; and the gradient of the embedding that both have.
    "pipeline, 4 micro-batches": ({"pipeline": {"microbatches": 4}}, 0, {"send": STREAM, "allreduce": TOKENS}),
}


@pytest.mark.parametrize("layout", EXPECTED)
def test_ranks_send_and_hold_what_the_formulas_say(layout, ranks, tmp_path):
    parallel, micro, expected = EXPECTED[layout]
    results = ranks.run(2, run, str(tmp_path), "gpt2", parallel, micro)
    assert all(error is None for _, _, error in results), results
    held = []
    for rank in (0, 1):
        _, step = (tmp_path / "runs" / "run" / f"traffic-{rank}.jsonl").read_text().splitlines()
        measured = json.loads(step)
        held.append(measured["held"])
        assert {kind: n for kind, n in measured.items() if kind in expected} == expected
        assert measured.keys() <= expected.keys() | {"held", "broadcast"}  # DDP's broadcast is of its buckets' sizes
    if "pipeline" in parallel:
        assert sum(held) == ENDS + BLOCKS + TOKENS  # of which both have a copy
    # And the document tells the same numbers.
    document = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    (row,) = (line for line in document.splitlines() if line.startswith(f"| {layout} |"))
    sent = ", ".join(f"{kind} {n:,}" for kind, n in expected.items() if kind != "held")
    assert row == f"| {layout} | {sent} | {' and '.join(f'{n:,}' for n in dict.fromkeys(held))} |"
