"""Ranks, the process group, seeds, and parameters that start the same in every layout."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from nanopre import UserError
from nanopre.config import Config
from nanopre.model import Attention

PREPARE_TIMEOUT = timedelta(hours=24)  # how long the other ranks wait for one rank to tokenise a corpus


@dataclass
class World:
    """This process among all of them. One process without torchrun is a world of size 1 without a process group."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None  # of this attempt,
    job: dist.Store | None = None  # and of all attempts of a job that torchrun restarts

    def sum(self, values: dict[str, float | torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each number's sum over the ranks, as scalars on the device, in one collective for all of them."""
        # float64 keeps counts exact up to 2**53; MPS has none.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.stack([torch.as_tensor(v, dtype=dtype, device=self.device) for v in values.values()])
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total, strict=True))

    def first(self, key: str, make):
        """`make()` on the first rank of each machine, then on the others, which find its files in place; all return
        their own result. An error of the first is the others' too."""
        if self.size == 1:
            return make()
        key = f"{key}/{os.environ.get('GROUP_RANK', '0')}"
        if self.local_rank == 0:
            try:
                result = make()
            except BaseException as error:
                self.store.set(key, str(error) or type(error).__name__)
                raise
            self.store.set(key, "")
            return result
        self.store.wait([key], PREPARE_TIMEOUT)
        if message := self.store.get(key).decode():
            raise UserError(message)
        return make()

    def agree(self, key: str, value: str) -> str:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        if self.rank == 0:
            self.store.set(key, value)
        return self.store.get(key).decode()

    def check_same(self, facts: dict) -> None:
        """Raise UserError, on every rank, where a rank's facts, which may be tables of tables, differ from rank 0's."""
        if self.size == 1:
            return
        everyone: list = [None] * self.size
        dist.all_gather_object(everyone, facts)
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                raise UserError(f"rank {rank} differs from rank 0: {difference(theirs, everyone[0])}.")

    def remember_run(self, run_dir: Path) -> None:
        """Note the run's folder, for the case that torchrun restarts its processes (--max-restarts)."""
        if self.rank == 0 and self.job is not None:
            self.job.set("run", str(run_dir))

    def remembered_run(self) -> str | None:
        """The folder that an earlier attempt of this job has noted, on the processes of a later one."""
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not self.job.check(["run"]):
            return None
        return self.job.get("run").decode()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def difference(a: object, b: object, name: str = "") -> str:
    """The first thing in which two tables differ, in words."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in {**b, **a} if a.get(key) != b.get(key))
        return difference(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    return f"{name} is {a!r} instead of {b!r}"


def place() -> tuple[int, int, int]:
    """(RANK, LOCAL_RANK, WORLD_SIZE) of this process, as torchrun has set them; (0, 0, 1) without it. Raises UserError where
    they are set in part, or to what can't be."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 0, 1
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ.get(name, "") for name in names}
    rank, local_rank, size = (int(n) if (n := found[name]).isdecimal() else -1 for name in names[:3])
    if not (0 <= rank < size and 0 <= local_rank < size and found["MASTER_ADDR"] and found["MASTER_PORT"].isdecimal()):
        told = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"{told} in the environment: torchrun --nproc-per-node=N train.py ... sets all of these; for a single process "
            "unset WORLD_SIZE."
        )
    return rank, local_rank, size


@contextmanager
def start(device: torch.device, timeout: float = 600):
    """The World, with a process group where torchrun started several processes; the group ends with the block.

    timeout: seconds that a rank waits for another, which is all that notices a rank that hangs. A UserError is said once, and
    so is the loss of ranks; both end the process with status 2.
    """
    rank, local_rank, size = place()
    if size == 1:
        yield World(rank=0, local_rank=0, size=1, device=device)
        return
    try:
        job, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        # After torchrun restarts its workers the shared store still holds the last attempt's addresses: a prefix a try.
        store = dist.PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", job)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {rank}: the {size} ranks did not meet at {address} within {timeout:g} s (train.timeout): "
            f"{str(error).splitlines()[0]}"
        ) from None
    world = World(rank, local_rank, size, device, store, job)
    try:
        yield world
        dist.barrier()  # rank 0 may hold the store: it stays until the others are done with it
    except UserError as error:
        say_once(str(error), job)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        missing = missing_ranks(world)
        ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
        if missing:
            sentence = f"{ranks} ended, or did not answer for {timeout:g} s (train.timeout): the run stops."
            say_once(sentence, store, "missing ranks")  # of which a late rank may count fewer
        os._exit(2)  # the group can't be ended in order
    finally:
        dist.destroy_process_group()


def say_once(message: str, store: dist.Store | None = None, what: str = "") -> None:
    """Print an error: of the ranks that come upon it the first one alone.

    store: which they share; left out, before they have met, it is torchrun's, and without torchrun each rank prints.
    what: counts as the same; left out: the message.
    """
    if store is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(dist.rendezvous("env://"))
    if store is None or store.add("said/" + hashlib.sha256((what or message).encode()).hexdigest(), 1) == 1:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)


LOST_PEER = ("imed out", "closed by peer", "reset by peer", "Broken pipe", "Socket closed", "timeout")
"""Of what gloo and NCCL say when another rank is gone or silent."""


def missing_ranks(world: World) -> list[int]:
    """The ranks that do not answer now. All that are there call this at about the same time, when one of them is missed."""
    world.store.set(f"here/{world.rank}", "")
    for _ in range(20):
        time.sleep(0.25)
        missing = [rank for rank in range(world.size) if not world.store.check([f"here/{rank}"])]
        if not missing:
            break
    return missing


class StopSignal:
    """Ctrl-C and SIGTERM ask for an end after the running step; a second one ends the process at once. The end of torchrun
    asks, too: its ranks would go on where nobody sees them."""

    def __enter__(self) -> StopSignal:
        self.signalled = False
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    @property
    def asked(self) -> bool:
        return self.signalled or self.torchrun not in (None, os.getppid())

    def _ask(self, number, frame) -> None:
        self.signalled = True
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def __exit__(self, *error) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Seeds and first weights


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from any keys, the same on every machine."""
    digest = hashlib.sha256("\0".join(map(str, keys)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set torch's generators, from which dropout draws: by step, so that a resumed run drops what the whole run did, and by
    data-parallel rank, so that the ranks of a tensor group drop the same."""
    torch.manual_seed(derive_seed(seed, "step", step, rank))


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Fill each parameter from a generator of its own, keyed by (seed, name): no layout changes the first weights.

    The model's `init_std(name)` gives the standard deviation of a normal distribution; None is a norm or a bias, which
    keeps the constant that its layer started it with: 1 or 0, but for some of attention's biases.
    """
    for name, parameter in model.named_parameters():
        std = model.init_std(name)
        if std is None:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    for module in model.modules():
        if isinstance(module, Attention):
            module.start_near()


def padded_vocabulary(n_vocab: int) -> int:
    """Rows of the embedding for so many tokens: a multiple of 64, which matrix units like. No target ever names those that
    this adds."""
    return -(-n_vocab // 64) * 64


def build_model(config: Config, tokenizer) -> nn.Module:
    """The configured model, as the objective needs it, with its first weights, on the CPU. Raises UserError where the
    objective is not for this architecture."""
    model = adapted(config, config.model.build(padded_vocabulary(tokenizer.n_vocab), config.train.seq_len))
    initialise(model, config.seed)
    return model


def adapted(config: Config, model: nn.Module) -> nn.Module:
    """The model with what the objective adds to it. Raises UserError where the objective is not for this architecture."""
    fitting = getattr(config.objective, "architectures", None)
    if fitting and model.config.architecture not in fitting:
        wanted, there = (" or ".join(f"{'an' if kind[0] == 'e' else 'a'} {kind}" for kind in kinds)
                         for kinds in (fitting, [model.config.architecture]))  # fmt: skip
        hint = "; --init_from=runs/NAME starts with the model of a run" if hasattr(config.objective, "columns") else ""
        raise UserError(
            f"objective.name = {config.objective._plugin_name} is for {wanted}; model.name = {config.model._plugin_name} is "
            f"{there}{hint}."
        )
    return config.objective.adapt(model) if hasattr(config.objective, "adapt") else model
