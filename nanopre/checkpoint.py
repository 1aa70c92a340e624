"""Save, load, resume: torch.distributed.checkpoint, one format for every layout.

    runs/<name>/config.toml, tokenizer.json, log.jsonl
    runs/<name>/checkpoints/step_00000500/    DCP's files and info.json (step, config, versions, a checksum of each file)
    runs/<name>/checkpoints/latest, best      text files that name one of the folders

A checkpoint is written under a temporary name and renamed when it is whole and on the disk; `latest` moves last, and only
then are older ones removed. So at every moment there is a whole checkpoint, whatever stops the process or the machine.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from nanopre import UserError, config as configs, distributed
from nanopre.plugins import Registry
from nanopre.tokenizer import Tokenizer

# DCP warns when it runs in a single process, which here is meant.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)  # keys by parameter name: no layout shows in them


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


# ---------------------------------------------------------------------------------------------------------------------
# Whole files: a corpus on disk is proved by the same two functions


def checksums(folder: Path) -> dict[str, dict[str, int]]:
    """The size in bytes and CRC-32 of each file in the folder, by name."""
    return {file.name: _checksum(file) for file in sorted(folder.iterdir())}


def damage(folder: Path, expected: dict[str, dict[str, int]]) -> str | None:
    """The first file of `expected`, which `checksums` made, that is not whole and unchanged, and what is wrong with it."""
    for name, written in expected.items():
        if not (folder / name).is_file():
            return f"{folder / name}: missing"
        if (found := _checksum(folder / name)) != written:
            sizes = f"{found['bytes']:,} bytes, {written['bytes']:,} were written"
            return f"{folder / name}: damaged ({sizes}, the checksum differs)"
    return None


def _checksum(file: Path) -> dict[str, int]:
    crc = 0
    with open(file, "rb") as stream:
        while piece := stream.read(2**24):
            crc = zlib.crc32(piece, crc)
    return {"bytes": file.stat().st_size, "crc32": crc}


# ---------------------------------------------------------------------------------------------------------------------
# Save


def save(run_dir: Path, step: int, parts: Sequence[nn.Module], optimizers: Sequence, info: dict) -> Path:
    """Write checkpoints/step_<step> and point `latest` at it. Called on every rank, with the parts of the model that are
    there. Returns the folder."""
    return begin(run_dir, step, parts, optimizers, info).finish()


def begin(
    run_dir: Path, step: int, parts: Sequence[nn.Module], optimizers: Sequence, info: dict, background: bool = False
) -> Saving:
    """Write a checkpoint's files under a temporary name; `finish` gives it its own. In the background, files are written
    from a copy while training goes on."""
    folder = Path(run_dir) / "checkpoints"
    saving = Saving(Path(run_dir), step, info, folder / f"step_{step:08d}", folder / f"step_{step:08d}.tmp")
    with saving.errors():
        if saving.is_first:
            shutil.rmtree(saving.temporary, ignore_errors=True)
            saving.temporary.mkdir(parents=True)
        _barrier()
        weights, states = state_of(parts, optimizers)
        state, options = {"model": weights, "optimizer": states}, {"no_dist": not dist.is_initialized()}
        if background:
            options["process_group"] = _background_group(dist.group.WORLD) if dist.is_initialized() else None
            saving.future = dcp.async_save(state, checkpoint_id=saving.temporary, **options)
        else:
            dcp.save(state, checkpoint_id=saving.temporary, **options)
    return saving


@cache
def _background_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All ranks again: what the background thread sends must not meet what the training sends."""
    return dist.new_group(backend="gloo")


@dataclass
class Saving:
    """A checkpoint that is being written."""

    run_dir: Path
    step: int
    info: dict
    final: Path
    temporary: Path
    future: Future | None = None  # of the files, where they are written in the background

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
                text = json.dumps({"step": self.step, **self.info, "files": checksums(self.temporary)}, indent=1)
                (self.temporary / "info.json").write_text(text, encoding="utf-8")
                _sync(self.temporary / "info.json", self.temporary)  # DCP has done so with its own files
                shutil.rmtree(self.final, ignore_errors=True)  # of an earlier run from the same checkpoint
                self.temporary.rename(self.final)
                _sync(self.final.parent)
                point(self.run_dir, "latest", self.final)
        _barrier()
        return self.final

    @contextmanager
    def errors(self):
        try:
            yield
        except (OSError, dist.checkpoint.api.CheckpointException) as error:
            raise UserError(f"{self.temporary}: can't be written ({_reason(error)}).") from error


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
                point(self.run_dir, "best", path)
            prune(self.run_dir, self.options.keep_last)
        self.on_saved(step=saving.step, path=path)


def point(run_dir: Path, name: str, checkpoint: Path) -> None:
    """Let `latest` or `best` name this checkpoint, in one atomic move."""
    folder = Path(run_dir) / "checkpoints"
    (folder / f"{name}.tmp").write_text(checkpoint.name + "\n", encoding="utf-8")
    _sync(folder / f"{name}.tmp")
    os.replace(folder / f"{name}.tmp", folder / name)
    _sync(folder)


def prune(run_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those that `latest` and `best` name, and what was left of saves
    that were interrupted. Not called while a checkpoint is being written."""
    for unfinished in (Path(run_dir) / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(unfinished)
    keep = {pointed(run_dir, name) for name in ("latest", "best")}
    for checkpoint in find(run_dir)[:-keep_last]:
        if checkpoint not in keep:
            shutil.rmtree(checkpoint)


def _sync(*paths: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk, so that no power cut undoes what comes before."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    """The last line of what DCP says, which is the error of a rank under its traceback."""
    return str(error).strip().splitlines()[-1].strip()


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Find and load


def find(run_dir: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    return sorted(info.parent for info in Path(run_dir).glob("checkpoints/step_????????/info.json"))


def pointed(run_dir: Path, name: str) -> Path | None:
    """The checkpoint that `latest` or `best` names, if there is one."""
    pointer = Path(run_dir) / "checkpoints" / name
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return next((folder for folder in pointer.parent.glob("step_????????") if folder.name == named), None)


def locate(path: str | Path) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) of a run's folder, which means its latest checkpoint, or of one checkpoint.

    Raises UserError where there is none.
    """
    path = Path(path)
    if path.parent.name == "checkpoints" and path.name.startswith("step_"):
        run_dir, checkpoint = path.parent.parent, path
    else:
        run_dir, checkpoint = path, pointed(path, "latest")
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run; {_runs_beside(run_dir)}")
    if not (run_dir / "config.toml").is_file():
        raise UserError(f"{run_dir}: not a run's folder (it has no config.toml); {_runs_beside(run_dir)}")
    if checkpoint is None and (whole := find(run_dir)):
        raise UserError(f"{run_dir / 'checkpoints' / 'latest'}: missing or damaged; name a checkpoint instead: {whole[-1]}")
    if checkpoint is None:
        raise UserError(f"{run_dir}: this run has no checkpoint yet.")
    return run_dir, checkpoint


def _runs_beside(run_dir: Path) -> str:
    beside = [str(file.parent) for file in sorted(run_dir.parent.glob("*/config.toml"))]
    return f"there are {', '.join(beside[:8])}." if beside else f"there is no run in {run_dir.parent}/."


NEEDED = {"step": int, "files": dict}  # of info.json, with the type of each key
NEEDED_TO_GO_ON = {
    "best_val_loss": (float, int, type(None)),
    "progress": {"tokens": int, "seconds": (float, int), "skipped": int},
    "corpus": str,
}


def read_info(checkpoint: Path, needed: dict = NEEDED) -> dict:
    """What is saved beside the weights: step, config, versions, checksums. Raises UserError."""
    file = checkpoint / "info.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(checkpoint, f"{file}: missing or damaged ({error})") from None
    if key := _wrong_key(info, needed, "its table"):
        raise _refusal(checkpoint, f"{file}: damaged ({key} is missing or not what was saved)")
    return info


def _wrong_key(value: object, kind: type | tuple | dict, key: str) -> str | None:
    """The first key whose value is not of its kind: a type, several, or a table of kinds."""
    if not isinstance(kind, dict):
        return None if isinstance(value, kind) else key
    if not isinstance(value, dict):
        return key
    return next(filter(None, (_wrong_key(value.get(name), inner, name) for name, inner in kind.items())), None)


def verify(checkpoint: Path) -> dict:
    """The checkpoint's info, after every file proved to be there, whole and unchanged.

    Raises UserError that names the damaged file and the newest other checkpoint of the run that is whole.
    """
    info = read_info(checkpoint)
    try:
        problem = damage(checkpoint, info["files"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        problem = f"{checkpoint / 'info.json'}: damaged ({error})"
    if problem:
        raise _refusal(checkpoint, problem)
    return info


def _refusal(checkpoint: Path, problem: str) -> UserError:
    for other in reversed(find(checkpoint.parent.parent)):
        if other.name < checkpoint.name:
            return UserError(f"{problem}; the checkpoint before it can be used instead: {other}")
    return UserError(f"{problem}; the run has no earlier checkpoint.")


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint whose metadata, a pickle, may only hold what DCP itself writes: loading runs no foreign code."""

    def read_metadata(self):
        with open(Path(self.path) / ".metadata", "rb") as stream:
            return _Unpickler(stream).load()


class _Unpickler(pickle.Unpickler):
    SAFE = {("builtins", "set"), ("collections", "OrderedDict"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")}

    def find_class(self, module: str, name: str):
        if (module, name) in self.SAFE or module.startswith("torch.distributed.checkpoint."):
            return super().find_class(module, name)
        found = super().find_class(module, name) if module.split(".")[0] == "torch" else None
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)) or found is torch.Size:
            return found
        if module == "torch.serialization" or name in ("_get_layout", "_MEM_FORMAT_ENCODING"):
            return found
        raise UserError(f"a checkpoint's .metadata names {module}.{name}, which no checkpoint needs: do not trust it.")


def state_of(parts: Sequence[nn.Module], optimizers: Sequence) -> tuple[dict, dict]:
    """The weights and the optimizers' states of the parts, each by the parameter's name: no layout shows in them."""
    weights, states = {}, {}
    for part in parts:
        of_part, of_optimizers = get_state_dict(part, _optimizers_of(part, optimizers), options=OPTIONS)
        weights, states = weights | of_part, states | of_optimizers
    return weights, states


def _optimizers_of(part: nn.Module, optimizers: Sequence) -> list:
    own = set(map(id, part.parameters()))
    return [o for o in optimizers if any(id(p) in own for group in o.param_groups for p in group["params"])]


def load(checkpoint: Path, parts: Sequence[nn.Module], optimizers: Sequence = ()) -> dict:
    """Fill the parts of the model, and the states of the optimizers to go on with, from a checkpoint of any layout. Returns
    its info; raises UserError as verify. Called on every rank; each reads what it needs.
    """
    info = verify(checkpoint)
    if optimizers:
        read_info(checkpoint, NEEDED_TO_GO_ON)
    weights, states = state_of(parts, optimizers)
    wanted = {"model": weights, "optimizer": states} if optimizers else {"model": weights}
    try:
        dcp.load(wanted, storage_reader=_Reader(checkpoint), no_dist=not dist.is_initialized())
    except (RuntimeError, ValueError, dist.checkpoint.api.CheckpointException) as error:
        raise UserError(f"{checkpoint}: does not fit the configured model or optimizer ({_reason(error)}).") from None
    for part in parts:
        names, of_part = get_model_state_dict(part), _optimizers_of(part, optimizers)
        own = {name: weights[name] for name in names}
        groups = [group for optimizer in of_part for group in optimizer.param_groups]
        configured = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        set_state_dict(part, of_part, model_state_dict=own, optim_state_dict=states if of_part else {}, options=OPTIONS)
        groups = [group for optimizer in of_part for group in optimizer.param_groups]
        for group, options in zip(groups, configured, strict=True):  # the config's weight decay counts, not the checkpoint's
            group.update(options)
    return info


@dataclass
class OpenedRun:
    """A trained model with what belongs to it."""

    config: configs.Config
    registry: Registry
    tokenizer: Tokenizer
    model: nn.Module  # on the CPU, in eval mode
    checkpoint: Path
    info: dict


def open_run(path: str | Path) -> OpenedRun:
    """The model of a run (its latest checkpoint) or of one checkpoint's folder. Raises UserError."""
    run_dir, checkpoint = locate(path)
    config, registry = configs.load(run_dir / "config.toml", [])
    tokenizer = Tokenizer.load(run_dir / "tokenizer.json")
    model = distributed.build_model(config, tokenizer)
    info = load(checkpoint, [model])
    return OpenedRun(config, registry, tokenizer, model.eval(), checkpoint, info)


# ---------------------------------------------------------------------------------------------------------------------
# Start from another run


def read_config(path: str | Path) -> dict:
    """The resolved config of a run, or of one checkpoint's run, as a table. Raises UserError."""
    run_dir, _ = locate(path)
    return configs.to_dict(configs.load(run_dir / "config.toml")[0])


def read_tokenizer(path: str | Path) -> Tokenizer:
    return Tokenizer.load(locate(path)[0] / "tokenizer.json")


TRUNK = ("embed.", "relative.", "blocks.", "head.norm.")  # what every objective of a model shares


@torch.no_grad()
def load_weights(path: str | Path, model: nn.Module) -> str:
    """Fill the model from a run (its latest checkpoint) or one checkpoint of a model with another head; every rank calls
    it before the model is split. Returns a sentence about what was loaded.

    Weights go by name. Outputs that only the new model has, or with another width, keep their first weights, and so does
    its pooler; what only the old model has behind the trunk is left. A shorter new model takes the first of the learned
    positions. Anything else that is missing or has another shape is a UserError.
    """
    _, checkpoint = locate(path)
    verify(checkpoint)
    reader = _Reader(checkpoint)
    saved = reader.read_metadata().state_dict_metadata
    old = {name.removeprefix("model."): tuple(item.size) for name, item in saved.items() if name.startswith("model.")}
    new = dict(model.named_parameters())
    loaded, started = {}, []
    for name, parameter in new.items():
        shape, wanted = old.get(name), tuple(parameter.shape)
        if shape == wanted or shape and name == "embed.positions.weight" and shape[0] > wanted[0] and shape[1:] == wanted[1:]:
            loaded[name] = torch.empty(shape, dtype=parameter.dtype)
        elif name.startswith("head.outputs.") or shape is None and name.startswith("head.pooler."):
            started.append(name)
        elif shape is None:
            raise UserError(f"init_from: {checkpoint} has no weights for {name}, which the configured model has.")
        else:
            raise UserError(f"init_from: {name} has the shape {shape} in {checkpoint}, and {wanted} in the configured model.")
    left = sorted(set(old) - set(model.state_dict()))
    if beyond := [name for name in left if name.startswith(TRUNK)]:
        raise UserError(f"init_from: {checkpoint} has weights for {beyond[0]}, which the configured model has not.")
    dcp.load({"model": loaded}, storage_reader=reader, no_dist=True)
    for name, tensor in loaded.items():
        new[name].copy_(tensor[: len(new[name])])
    parts = (f"Starting with the weights of {checkpoint}", _named("new", started), _named("left behind", left))
    return "; ".join(filter(None, parts))


def _named(what: str, parameters: list[str]) -> str:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return f"{what}: {', '.join(modules)}" if modules else ""
