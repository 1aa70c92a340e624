"""Write a run's folder and its checkpoints, at once or in the background, so that nothing that stops a run costs one.

A checkpoint is written under a temporary name and renamed when it is whole and on the disk; `latest` moves last, and only
then are older ones removed. So at every moment there is a whole checkpoint, whatever stops the process or the machine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from nanopre import UserError, checkpoint, config as configs
from nanopre.tokenizer import Tokenizer


def create_run(run_dir: Path, config: configs.Config, tokenizer: Tokenizer) -> None:
    """Make the run's folder with what every checkpoint in it needs: the resolved config and the tokenizer."""
    try:
        (run_dir / "checkpoints").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out_dir: the run's folder {run_dir} can't be made ({error.strerror}).") from None
    write_config(run_dir, config)
    tokenizer.save(run_dir / "tokenizer.json")


def write_config(run_dir: Path, config: configs.Config) -> None:
    """Save the resolved config with the run: when it begins, and when it goes on with other values."""
    try:
        (run_dir / "config.toml.tmp").write_text(configs.to_toml(config), encoding="utf-8")
        _sync(run_dir / "config.toml.tmp")
        os.replace(run_dir / "config.toml.tmp", run_dir / "config.toml")
    except OSError as error:
        raise UserError(f"{run_dir / 'config.toml'}: can't be written ({error.strerror}).") from None


def free_name(out_dir: Path, name: str) -> str:
    """The first of name, name-2, name-3, ... that no run has taken."""
    number, free = 1, name
    while os.path.exists(out_dir / free):
        number += 1
        free = f"{name}-{number}"
    return free


def save(run_dir: Path, step: int, parts: Sequence[nn.Module], optimizers: Sequence, info: dict) -> Path:
    """Write checkpoints/step_<step> and point `latest` at it. Called on every rank, with the parts of the model that are
    there. Returns the folder."""
    return begin(run_dir, step, parts, optimizers, info).finish()


def begin(
    run_dir: Path, step: int, parts: Sequence[nn.Module], optimizers: Sequence, info: dict, background: bool = False
) -> Saving:
    """Write a checkpoint's files under a temporary name; `finish` gives it its own. In the background, files are written
    from a copy while training goes on."""
    saving = Saving(step, info, Path(run_dir) / "checkpoints" / f"step_{step:08d}")
    with saving.errors():
        if saving.is_first:
            shutil.rmtree(saving.temporary, ignore_errors=True)
            saving.temporary.mkdir(parents=True)
        _barrier()
        weights, states = checkpoint.state_of(parts, optimizers)
        state, options = {"model": weights, "optimizer": states}, {"no_dist": not dist.is_initialized()}
        if background:
            options["process_group"] = _background_group(dist.group.WORLD) if dist.is_initialized() else None
            saving.future = dcp.async_save(state, checkpoint_id=saving.temporary, **options)
        else:
            dcp.save(state, checkpoint_id=saving.temporary, **options)
    return saving


@cache
def _background_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All ranks again: what the background thread sends must not meet what the training sends. `world` is the cache's key:
    other processes, other groups."""
    return dist.new_group(backend="gloo")


@dataclass
class Saving:
    """A checkpoint that is being written."""

    step: int
    info: dict
    final: Path
    future: Future | None = None  # of the files, where they are written in the background

    @property
    def temporary(self) -> Path:
        return self.final.with_suffix(".tmp")

    @property
    def is_first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    def is_written(self) -> bool:
        return self.future is None or self.future.done()

    def finish(self) -> Path:
        """Wait for the files, and give the checkpoint its name. Called on every rank. Returns the folder."""
        with self.errors():
            if self.future:
                self.future.result()
            _barrier()
            if self.is_first:
                text = json.dumps({"step": self.step, **self.info, "files": checkpoint.checksums(self.temporary)}, indent=1)
                (self.temporary / "info.json").write_text(text, encoding="utf-8")
                _sync(self.temporary / "info.json", self.temporary)  # DCP has done so with its own files
                shutil.rmtree(self.final, ignore_errors=True)  # of an earlier run from the same checkpoint
                self.temporary.rename(self.final)
                _sync(self.final.parent)
                point(self.final, "latest")
        _barrier()
        return self.final

    @contextmanager
    def errors(self):
        try:
            yield
        except (OSError, dist.checkpoint.api.CheckpointException) as error:
            raise UserError(f"{self.temporary}: can't be written ({checkpoint.reason(error)}).") from error


class Saver:
    """Saves a run's checkpoints, one at a time, in the background if that is configured; removes old ones.

    on_saved(step=..., path=...) is called when a checkpoint is whole and in place. All methods are called on every rank.
    """

    def __init__(self, run_dir: Path, options: configs.Checkpoint, on_saved: Callable):
        self.run_dir, self.options, self.on_saved = run_dir, options, on_saved
        self.saving: Saving | None = None
        self.is_best = False

    def save(self, step: int, parts: Sequence[nn.Module], optimizers: Sequence, info: dict, is_best: bool) -> None:
        self.finish()
        self.saving = begin(self.run_dir, step, parts, optimizers, info, self.options.async_save)
        self.is_best = is_best
        if not self.options.async_save:
            self.finish()

    def is_written(self) -> bool:
        """Whether `finish` would give this rank nothing to wait for, and something to do."""
        return self.saving is not None and self.saving.is_written()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and give it its name."""
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        path = saving.finish()
        if saving.is_first:
            if self.is_best:
                point(path, "best")
            prune(self.run_dir, self.options.keep_last)
        self.on_saved(step=saving.step, path=path)


def point(saved: Path, name: str) -> None:
    """Let `latest` or `best` name this checkpoint, in one atomic move."""
    folder = saved.parent
    (folder / f"{name}.tmp").write_text(saved.name + "\n", encoding="utf-8")
    _sync(folder / f"{name}.tmp")
    os.replace(folder / f"{name}.tmp", folder / name)
    _sync(folder)


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those that `latest` and `best` name, and what was left of saves
    that were interrupted. Not called while a checkpoint is being written."""
    for unfinished in (Path(run_dir) / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(unfinished)
    keep = {checkpoint.pointed(run_dir, name) for name in ("latest", "best")}
    for saved in checkpoint.find(run_dir)[:-keep_last]:
        if saved not in keep:
            shutil.rmtree(saved)


def _sync(*paths: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk, so that no power cut undoes what comes before."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
