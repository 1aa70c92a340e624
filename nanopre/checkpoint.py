"""Find, check and load a run's checkpoints: torch.distributed.checkpoint, one format for every layout.

    runs/<name>/config.toml, tokenizer.json, log.jsonl
    runs/<name>/checkpoints/step_00000500/    DCP's files and info.json (step, config, versions, a checksum of each file)
    runs/<name>/checkpoints/latest, best      text files that name one of the folders

`nanopre.saving` writes them.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._nested_dict import set_element
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
# Find and load


def find(run_dir: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    return sorted(info.parent for info in Path(run_dir).glob("checkpoints/step_????????/info.json"))


def pointed(run_dir: Path, name: str) -> Path | None:
    """The checkpoint that `latest` or `best` names, if there is one."""
    pointer = Path(run_dir) / "checkpoints" / name
    named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    return next((folder for folder in pointer.parent.glob("step_????????") if folder.name == named), None)


def run_of(path: str | Path) -> Path:
    """The run's folder of one, or of one of its checkpoints. Raises UserError where there is none."""
    path = Path(path)
    run_dir = path.parent.parent if _is_checkpoint(path) else path
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run; {_runs_beside(run_dir)}")
    if not (run_dir / "config.toml").is_file():
        raise UserError(f"{run_dir}: not a run's folder (it has no config.toml); {_runs_beside(run_dir)}")
    return run_dir


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and path.name.startswith("step_")


def locate(path: str | Path) -> tuple[Path, Path]:
    """(run folder, checkpoint folder) of a run's folder, which means its latest checkpoint, or of one checkpoint.

    Raises UserError where there is none.
    """
    run_dir = run_of(path)
    checkpoint = Path(path) if _is_checkpoint(Path(path)) else pointed(run_dir, "latest")
    if checkpoint is None and (whole := find(run_dir)):
        raise UserError(f"{run_dir / 'checkpoints' / 'latest'}: missing or damaged; name a checkpoint instead: {whole[-1]}")
    if checkpoint is None:
        raise UserError(f"{run_dir}: this run has no checkpoint yet.")
    return run_dir, checkpoint


def _runs_beside(run_dir: Path) -> str:
    beside = [str(file.parent) for file in sorted(run_dir.parent.glob("*/config.toml"))]
    more = f" and {len(beside) - 8} more" if len(beside) > 8 else ""
    return f"there are {', '.join(beside[:8])}{more}." if beside else f"there is no run in {run_dir.parent}/."


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
    """Reads a checkpoint whose metadata, a pickle, may only hold what DCP itself writes. With `_Planner`: loading a checkpoint
    runs no code of whoever made it."""

    def __init__(self, checkpoint: Path):
        super().__init__(checkpoint)
        with open(checkpoint / ".metadata", "rb") as stream:  # here, for DCP would tell of a refusal by its own traceback
            self.metadata = _Unpickler(stream).load()

    def read_metadata(self) -> dcp.metadata.Metadata:
        return self.metadata


class _Unpickler(pickle.Unpickler):
    SAFE = {
        ("builtins", "set"),
        ("collections", "OrderedDict"),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(("torch.distributed.checkpoint.metadata", name) for name in ("_MEM_FORMAT_ENCODING", *dcp.metadata.__all__)),
    }

    def find_class(self, module: str, name: str):
        if (module, name) in self.SAFE or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise UserError(f"a checkpoint's .metadata names {module}.{name}, which no checkpoint needs: do not trust it.")


class _Planner(dcp.DefaultLoadPlanner):
    """Reads what is no tensor, as an optimizer's settings, without running code, which DCP's own planner would do."""

    def load_bytes(self, read_item: dcp.planner.ReadItem, value: BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            read = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(f"a checkpoint's {name} is more than numbers and words: do not trust it.") from None
        set_element(self.original_state_dict, self.mappings[name], read)


def _read(checkpoint: Path, wanted: dict) -> None:
    """Fill the state dict `wanted`. Raises UserError where the checkpoint does not have it."""
    try:
        dcp.load(wanted, storage_reader=_Reader(checkpoint), planner=_Planner(), no_dist=not dist.is_initialized())
    except (RuntimeError, ValueError, dist.checkpoint.api.CheckpointException) as error:
        for failure, _ in getattr(error, "failures", {}).values():  # on any rank
            if isinstance(failure, UserError):
                raise failure from None
        raise UserError(f"{checkpoint}: does not fit the configured model or optimizer ({reason(error)}).") from None


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
    _read(checkpoint, wanted)
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


def reason(error: Exception) -> str:
    """The last line of what DCP says, which is the error of a rank under its traceback."""
    return str(error).strip().splitlines()[-1].strip()


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
    return configs.to_dict(configs.load(run_of(path) / "config.toml")[0])


def read_tokenizer(path: str | Path) -> Tokenizer:
    return Tokenizer.load(run_of(path) / "tokenizer.json")


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
    saved = _Reader(checkpoint).metadata.state_dict_metadata
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
    _read(checkpoint, {"model": loaded})
    for name, tensor in loaded.items():
        new[name].copy_(tensor[: len(new[name])])
    parts = (f"Starting with the weights of {checkpoint}", _named("new", started), _named("left behind", left))
    return "; ".join(filter(None, parts))


def _named(what: str, parameters: list[str]) -> str:
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return f"{what}: {', '.join(modules)}" if modules else ""
