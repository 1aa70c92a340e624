"""The pipeline's timetable: in order, complete, with the bubble and the memory of the theory, and what really runs."""

from __future__ import annotations

import os
import re
from unittest import mock

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings, strategies as st
from torch.distributed.pipelining import PipelineStage

from nanopre import config as configs
from nanopre.timetable import (
    DURATIONS,
    SCHEDULES,
    SEVERAL_STAGES,
    Action,
    actions,
    bubble,
    draw,
    held,
    idle,
    most_held,
    needs,
    simulate,
)


@given(schedule=st.sampled_from(list(SCHEDULES)), p=st.integers(2, 5), rounds=st.integers(1, 4), v=st.integers(2, 3))
@settings(deadline=None, max_examples=60)
def test_everything_is_done_once_and_nothing_before_what_it_needs(schedule, p, rounds, v):
    v = v if schedule in SEVERAL_STAGES else 1
    orders = actions(schedule, p, rounds * p, v)
    for rank, order in enumerate(orders):
        assert len(set(order)) == len(order)
        assert {(a.stage, a.microbatch) for a in order} == {(s, m) for s in range(rank, v * p, p) for m in range(rounds * p)}
        for stage, m in {(a.stage, a.microbatch) for a in order}:
            assert sorted(a.kind for a in order if a[1:] == (stage, m)) in (["B", "F"], ["F", "I", "W"])
    times = simulate(orders)
    ends = {slot.action: slot.end for slots in times for slot in slots}
    for order, slots in zip(orders, times, strict=True):
        assert [slot.action for slot in slots] == order
        for before, slot in zip([None, *slots], slots, strict=False):
            assert slot.end - slot.start == DURATIONS[slot.action.kind]
            assert before is None or before.end <= slot.start
            assert all(ends[a] <= slot.start for a in needs(slot.action, v * p, orders))


@given(schedule=st.sampled_from(["gpipe", "1f1b", "interleaved_1f1b"]), p=st.integers(2, 6), rounds=st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_the_bubble_is_that_of_the_theory(schedule, p, rounds):
    """(p - 1) / (v m + p - 1): Narayanan et al., 2021, section 2.2, as a part of the whole time."""
    m, v = rounds * p, 2 if schedule == "interleaved_1f1b" else 1
    assert bubble(simulate(actions(schedule, p, m, v))) == pytest.approx((p - 1) / (v * m + p - 1))


def test_a_zero_bubble_schedule_waits_less_than_any_other():
    part = {schedule: bubble(simulate(actions(schedule, 4, 8))) for schedule in SCHEDULES}
    assert part["zero_bubble"] == pytest.approx(0.0588, abs=1e-4) and part["zero_bubble"] < min(
        value for schedule, value in part.items() if schedule != "zero_bubble"
    )


@given(p=st.integers(2, 6), m=st.integers(1, 12))
@settings(deadline=None, max_examples=30)
def test_what_a_rank_holds_is_that_of_the_theory(p, m):
    """GPipe holds every micro-batch, 1F1B no more than there are stages from a rank's own to the last one."""
    assert held(simulate(actions("gpipe", p, m))) == [m] * p
    assert held(simulate(actions("1f1b", p, m))) == [min(m, p - rank) for rank in range(p)]


@given(schedule=st.sampled_from(list(SCHEDULES)), p=st.integers(2, 5), rounds=st.integers(1, 4), v=st.integers(2, 3))
@settings(deadline=None, max_examples=40)
def test_the_closed_forms_are_those_of_the_timetables(schedule, p, rounds, v):
    m, v = rounds * p, v if schedule in SEVERAL_STAGES else 1
    times = simulate(actions(schedule, p, m, v))
    assert [most_held(schedule, p, m, v, rank) for rank in range(p)] == held(times)
    waiting = idle(schedule, p, m, v)  # by the time that a rank works
    assert bubble(times) == pytest.approx(waiting / (1 + waiting))


def test_orders_that_can_not_be_are_refused():
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]])


def test_the_document_shows_what_the_code_draws():
    text = (ROOT / "docs" / "parallel.md").read_text(encoding="utf-8")
    for schedule in SCHEDULES:
        times = simulate(actions(schedule, 4, 8))
        (shown,) = re.findall(rf"`{schedule}`: idle ([\d.]+)%, holds ([\d, ]+)\n\n```\n(.*?)\n```", text, flags=re.DOTALL)
        assert shown == (f"{100 * bubble(times):.1f}", ", ".join(map(str, held(times))), draw(times))


# What runs.


def record(folder: str, schedule: str) -> tuple[list[Action], int, int]:
    """The rank's actions in one step, how many micro-batches' graphs it held at most, and the most bytes they saved."""
    import train

    table = {
        "out_dir": folder,
        "model": {"name": "gpt2", "n_layers": 8, "d_model": 32, "n_heads": 2, "d_ff": 64},
        "data": {"corpus": str(ROOT / "README.md"), "cache_dir": f"{folder}/cache", "val_fraction": 0.0},
        "tokenizer": {"name": "bytes"},
        "train": {"steps": 1, "batch_size": 16, "seq_len": 32, "samples": 0, "device": "cpu", "precision": "float32"},
        "parallel": {"pipeline": {"degree": int(os.environ["WORLD_SIZE"]), "schedule": schedule, "microbatches": 8}},
        "loggers": {"jsonl": {}},
    }
    done, alive, saved = [], set(), {"now": 0, "most": 0}
    held_at_most = 0
    forward, backward, weight = (
        getattr(PipelineStage, f"{name}_one_chunk") for name in ("forward", "backward", "backward_weight")
    )

    class Kept:
        """A tensor that a backward pass needs, counted until the graph lets go of it."""

        def __init__(self, tensor):
            self.tensor, self.bytes = tensor, 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
            saved["now"] += self.bytes
            saved["most"] = max(saved["most"], saved["now"])

        def __del__(self):
            saved["now"] -= self.bytes

    def forward_one_chunk(self, m, *arguments, **options):
        nonlocal held_at_most
        done.append(Action("F", self.stage_index, m))
        alive.add((self.stage_index, m))
        held_at_most = max(held_at_most, len(alive))
        return forward(self, m, *arguments, **options)

    def backward_one_chunk(self, m, loss=None, full_backward=True, **options):
        done.append(Action("B" if full_backward else "I", self.stage_index, m))
        result = backward(self, m, loss=loss, full_backward=full_backward, **options)
        alive.discard((self.stage_index, m) if full_backward else None)
        return result

    def backward_weight_one_chunk(self, m, **options):
        done.append(Action("W", self.stage_index, m))
        result = weight(self, m, **options)
        alive.discard((self.stage_index, m))
        return result

    with (
        mock.patch.object(PipelineStage, "forward_one_chunk", forward_one_chunk),
        mock.patch.object(PipelineStage, "backward_one_chunk", backward_one_chunk),
        mock.patch.object(PipelineStage, "backward_weight_one_chunk", backward_weight_one_chunk),
        torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor),
    ):
        train.train(*configs.from_dict(table, "test"))
    return done, held_at_most, saved["most"]


@pytest.mark.parametrize("ranks_of_it", [2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_runs_is_the_timetable(schedule, ranks_of_it, ranks, tmp_path):
    results = ranks.run(ranks_of_it, record, str(tmp_path), schedule)
    for rank, (result, _, error) in enumerate(results):
        assert error is None, error
        orders = actions(schedule, ranks_of_it, 8)
        assert result[0] == orders[rank]
        assert result[1] == held(simulate(orders))[rank]


def test_1f1b_holds_as_many_bytes_less_than_gpipe_as_the_theory_says(ranks, tmp_path):
    """At 8 micro-batches and 4 ranks a middle stage holds 8 in one, and 3 and 2 in the other."""
    bytes_held = {}
    for schedule in ("gpipe", "1f1b"):
        (tmp_path / schedule).mkdir()
        results = ranks.run(4, record, str(tmp_path / schedule), schedule)
        assert all(error is None for _, _, error in results)
        bytes_held[schedule] = [result[2] for result, _, _ in results]
    for rank in (1, 2):  # the ends also hold what embeddings and losses need
        ratio = bytes_held["1f1b"][rank] / bytes_held["gpipe"][rank]
        assert ratio == pytest.approx((4 - rank) / 8, rel=0.02)
