"""The timetable of a pipeline: what each rank does in which order, when, what is idle and what is held meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from nanopre import UserError

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "zero_bubble": "InterleavedZeroBubble",
}
"""torch.distributed.pipelining's names of the schedules (Huang et al., 2019; Narayanan et al., 2019, 2021; Qi et al., 2024)."""

SEVERAL_STAGES = ("interleaved_1f1b", "zero_bubble")
"""Those that give each rank two or more stages: stage s is on rank s % ranks."""

DURATIONS = {"F": 1, "B": 2, "I": 1, "W": 1}
"""Of a forward pass, a backward pass, and its two halves, the gradients of a stage's inputs and those of its weights."""


class Action(NamedTuple):
    kind: str  # a key of DURATIONS
    stage: int
    microbatch: int


class Slot(NamedTuple):
    """An action with its time, in the units of DURATIONS."""

    action: Action
    start: int
    end: int


def actions(schedule: str, ranks: int, microbatches: int, stages_per_rank: int = 2) -> list[list[Action]]:
    """Each rank's actions in the order in which torch.distributed.pipelining runs them. stages_per_rank: of those schedules
    that have several."""
    if schedule in SEVERAL_STAGES:
        orders = get_schedule_ops(SCHEDULES[schedule], ranks, microbatches, stages_per_rank)
        return [
            [Action(a.computation_type.value, a.stage_index, a.microbatch_index) for a in order if a is not None]
            for order in orders
        ]
    # torch keeps no table of GPipe and 1F1B that is right on every rank; these are what their loops do.
    result = []
    for rank in range(ranks):
        forward, backward = ([Action(kind, rank, m) for m in range(microbatches)] for kind in "FB")
        ahead = microbatches if schedule == "gpipe" else min(microbatches, ranks - rank)  # forwards before the first backward
        order = forward[:ahead]
        for m in range(microbatches):
            order += [backward[m], *forward[ahead + m : ahead + m + 1]]
        result.append(order)
    return result


def simulate(orders: list[list[Action]]) -> list[list[Slot]]:
    """When each rank does what, if it starts an action as soon as its own last one and those that it needs are done: sending
    takes no time. Raises ValueError for orders in which ranks wait for each other for ever."""
    done: dict[Action, int] = {}
    n_stages = 1 + max(action.stage for order in orders for action in order)
    times: list[list[Slot]] = [[] for _ in orders]
    left = sum(map(len, orders))
    while left:
        before = left
        for order, slots in zip(orders, times, strict=True):
            for action in order[len(slots) :]:
                needed = needs(action, n_stages, orders)
                if not all(a in done for a in needed):
                    break
                start = max([slots[-1].end if slots else 0, *(done[a] for a in needed)])
                slots.append(Slot(action, start, start + DURATIONS[action.kind]))
                done[action] = slots[-1].end
                left -= 1
        if left == before:
            raise ValueError("the ranks wait for each other")
    return times


def needs(action: Action, n_stages: int, orders: list[list[Action]]) -> list[Action]:
    """What must be done before an action can be."""
    kind, stage, m = action
    if kind == "F":
        return [Action("F", stage - 1, m)] if stage else []
    if kind == "W":
        return [Action("I", stage, m)]
    later = [Action(other, stage + 1, m) for other in "BI" if stage + 1 < n_stages]
    return [Action("F", stage, m), *(a for a in later if a in orders[a.stage % len(orders)])]


def bubble(times: list[list[Slot]]) -> float:
    """The part of all ranks' time in which they wait."""
    end = max(slot.end for slots in times for slot in slots)
    busy = sum(slot.end - slot.start for slots in times for slot in slots)
    return 1 - busy / (end * len(times))


def held(times: list[list[Slot]]) -> list[int]:
    """For each rank, of how many (micro-batch, stage) at most it holds the activations: from the forward to the end of the
    backward pass."""
    result = []
    for slots in times:
        now = most = 0
        for slot in slots:
            now += {"F": 1, "B": 0, "I": 0, "W": 0}[slot.action.kind]
            most = max(most, now)
            now -= slot.action.kind in "BW"
        result.append(most)
    return result


def most_held(schedule: str, ranks: int, microbatches: int, stages_per_rank: int, rank: int) -> int:
    """What `held` finds for a rank, without a timetable. 1F1B: Narayanan et al., 2021a, section 2.2; interleaved: 2021b,
    section 2.2, where a rank warms up with so many forward passes."""
    match schedule:
        case "gpipe":
            return microbatches
        case "1f1b":
            return min(microbatches, ranks - rank)
        case "interleaved_1f1b":
            return min(microbatches * stages_per_rank, 2 * (ranks - rank - 1) + (stages_per_rank - 1) * ranks + 1)
        case "zero_bubble":
            return ranks * stages_per_rank


def idle(schedule: str, ranks: int, microbatches: int, stages_per_rank: int) -> float:
    """How long a rank waits, by the time that it works: (p - 1) / (v m) (Narayanan et al., 2021b, section 2.2). Zero-bubble
    schedules wait for forward passes alone, a third of that, as the other halves of backward passes fill the rest."""
    of_work = (ranks - 1) / (stages_per_rank * microbatches)
    return of_work / 3 if schedule == "zero_bubble" else of_work


def share_out(blocks: list[float], head: float, n_stages: int) -> list[range]:
    """The blocks in `n_stages` runs, so that the costliest run, the head with the last, costs least; of ways that are alike,
    the one whose first runs are shortest."""
    n = len(blocks)
    until = np.concatenate(([0.0], np.cumsum(blocks)))
    runs = np.where(np.tri(n + 1, dtype=bool), np.inf, until - until[:, None])  # [first, end]: the cost of a run
    costs = [runs[:, n] + head]  # [stages - 1][first]: of the costliest run, of the blocks from `first` on
    for _ in range(n_stages - 1):
        costs.append(np.maximum(runs, costs[-1]).min(axis=1))
    ends = [0]
    for rest in costs[-2::-1]:
        ends.append(int(np.maximum(runs[ends[-1]], rest).argmin()))
    return [range(first, end) for first, end in zip(ends, [*ends[1:], n], strict=True)]


def draw(times: list[list[Slot]]) -> str:
    """A line a rank, two characters a unit of time: the kind of action and the micro-batch (from the tenth on, its last
    digit); small letters for a rank's second, fourth ... stage."""
    lines = []
    for rank, slots in enumerate(times):
        line = ""
        for action, start, end in slots:
            letter = action.kind.lower() if action.stage // len(times) % 2 else action.kind
            line = line.ljust(2 * start, "·") + f"{letter}{action.microbatch % 10}" * (end - start)
        lines.append(f"rank {rank}  {line}")
    width = max(map(len, lines))
    return "\n".join(line.ljust(width, "·") for line in lines)


COLOURS = {"F": "#4c78a8", "B": "#f58518", "I": "#e45756", "W": "#72b7b2"}


def picture(times: list[list[Slot]], file: str | Path, title: str) -> None:
    """The same as a PNG: a bar an action, with its micro-batch; paler for a rank's later stages."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    end = max(slot.end for slots in times for slot in slots)
    n_stages = 1 + max(slot.action.stage for slots in times for slot in slots)
    figure = Figure(figsize=(min(40.0, 2 + 0.22 * end), 1.2 + 0.4 * len(times)), layout="constrained")
    axes = figure.subplots()
    for rank, slots in enumerate(times):
        for (kind, stage, m), start, stop in slots:
            alpha = 1 - 0.6 * (stage // len(times)) / max(1, n_stages // len(times))
            axes.barh(rank, stop - start, left=start, color=COLOURS[kind], alpha=alpha, edgecolor="white", linewidth=0.8)
            axes.text((start + stop) / 2, rank, str(m), ha="center", va="center", fontsize=7)
    axes.set(yticks=range(len(times)), yticklabels=[f"rank {rank}" for rank in range(len(times))], xlim=(0, end))
    axes.set(xlabel="time, a forward pass of a stage = 1", title=title)
    axes.invert_yaxis()
    names = {"F": "forward", "B": "backward", "I": "for inputs", "W": "for weights"}
    used = {slot.action.kind for slots in times for slot in slots}
    handles = [Patch(color=COLOURS[kind], label=names[kind]) for kind in names if kind in used]
    figure.legend(handles=handles, ncols=4, loc="outside lower center", frameon=False)
    try:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(str(file))
    except OSError as error:
        raise UserError(f"{file}: can't be written ({error.strerror}).") from None
