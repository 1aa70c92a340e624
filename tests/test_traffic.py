"""What the ranks send each other: measured by a third party's strategy, and equal to the formulas of docs/parallel.md."""

from __future__ import annotations

import json
from pathlib import Path

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


def measured(ranks, folder: Path, model: str, parallel: dict, micro: int = 0) -> list[dict[str, int]]:
    """Each rank's bytes in the second step, by kind of message."""
    results = ranks.run(2, run, str(folder), model, parallel, micro)
    assert all(error is None for _, _, error in results), results
    lines = [(folder / "runs" / "run" / f"traffic-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    return [{kind: n for kind, n in json.loads(step).items() if kind != "broadcast"} for _, step in lines]


V = 384  # 361 tokens of bytes, padded
ENDS = 4 * (V * C + T * C + 2 * C)  # bytes of embeddings, which are also the output projection, and the last norm,
BLOCKS = 4 * L * (4 * (C * C + C) + 2 * C * F + F + C + 4 * C)  # and of GPT-2's blocks
STREAM = 4 * B * T * C  # bytes of a stream
TARGETS = 4 * B * T  # and of a number for each target
LAYERS = 2 * 2 * L * STREAM  # attention and MLP of each block, forward and backward


@pytest.mark.parametrize(
    "parallel, micro, expected",
    [
        ({"ddp": {}}, 0, {"allreduce": ENDS + BLOCKS}),
        ({"ddp": {}}, 2, {"allreduce": ENDS + BLOCKS}),  # once a step, not once in each of two micro-batches
        ({"fsdp": {}}, 0, {"allgather": ENDS + 2 * BLOCKS, "reducescatter": ENDS + BLOCKS}),
        ({"fsdp": {"reshard_after_forward": False}}, 0, {"allgather": ENDS + BLOCKS, "reducescatter": ENDS + BLOCKS}),
        # The embedding's sum, the cross-entropy's gradient, and its three numbers a target.
        ({"tensor": {}}, 0, {"allreduce": LAYERS + 2 * STREAM + 3 * TARGETS}),
        # The head gathers the stream, and so does the embedding in the backward pass; norms' gradients are summed.
        (
            {"tensor": {"sequence_parallel": True}},
            0,
            {
                "allgather": LAYERS + 2 * STREAM,
                "reducescatter": LAYERS,
                "allreduce": 2 * STREAM + 3 * TARGETS + 4 * L * 2 * 2 * C,
            },
        ),
        # Forward from the first rank, back from the second; and the gradient of the embedding that both have.
        ({"pipeline": {"microbatches": 4}}, 0, {"send": STREAM, "allreduce": 4 * V * C}),
    ],
)
def test_ranks_send_what_the_formulas_say(parallel, micro, expected, ranks, tmp_path):
    assert measured(ranks, tmp_path, "gpt2", parallel, micro) == [expected, expected]
