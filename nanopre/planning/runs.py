"""Measured training runs as points (parameters, tokens, loss): what they are, and where they are read from."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import StatisticsError, median

import numpy as np

from nanopre import UserError, config as configs, cost
from nanopre.distributed import padded_vocabulary
from nanopre.planning import preview
from nanopre.plugins import nearest
from nanopre.tokenizer import Tokenizer

NEEDED = ("params", "tokens", "loss")


@dataclass
class Runs:
    """Points of training runs, one an entry of each array. All numbers are float64: 6 N D overflows int64."""

    params: np.ndarray  # N, embeddings among them
    tokens: np.ndarray  # D, seen so far
    loss: np.ndarray  # nats a token
    flops: np.ndarray | None = None  # C; left out or nan: 6 N D
    run: np.ndarray | None = None  # a label; points of one label are one training curve; left out: each point is a run
    unique_tokens: np.ndarray | None = None  # at most D: what of the tokens was not seen before; left out or nan: D
    embedding_params: np.ndarray | None = None  # of N: outside of the blocks; nan where it is not known, as those below
    d_model: np.ndarray | None = None
    n_layers: np.ndarray | None = None
    batch_size: np.ndarray | None = None  # tokens of a step

    def __post_init__(self):
        count = len(self.params)
        self.run = np.asarray(np.arange(count) if self.run is None else self.run)
        for field in dataclasses.fields(self):
            if field.name != "run":
                value = getattr(self, field.name)
                value = np.full(count, np.nan) if value is None else np.asarray(value, np.float64)
                setattr(self, field.name, value)
        self.flops = np.where(np.isnan(self.flops), 6 * self.params * self.tokens, self.flops)
        self.unique_tokens = np.fmin(self.unique_tokens, self.tokens)

    def __len__(self) -> int:
        return len(self.params)

    def __getitem__(self, index) -> Runs:
        """The points of a mask or of an array of indices."""
        return Runs(**{field.name: getattr(self, field.name)[index] for field in dataclasses.fields(self)})

    @staticmethod
    def concatenate(parts: Sequence[Runs]) -> Runs:
        names = [field.name for field in dataclasses.fields(Runs)]
        return Runs(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def cut(self, label: object, flops: np.ndarray) -> Runs:
        """One run's curve at these FLOPs: loss and tokens on straight lines between its points in logarithms; nan outside."""
        curve = self[self.run == label]
        curve = curve[np.argsort(curve.flops, kind="stable")]

        def at(column: np.ndarray) -> np.ndarray:
            # A curve of one point is at its own FLOPs, whatever their last digit.
            x, y = np.log(curve.flops), np.log(column)
            inside = (np.log(flops) >= x[0] - 1e-9) & (np.log(flops) <= x[-1] + 1e-9)
            return np.where(inside, np.exp(np.interp(np.log(flops), x, y)), np.nan)

        count = len(flops)
        return Runs(np.full(count, curve.params[0]), at(curve.tokens), at(curve.loss), flops, np.full(count, label))

    def without_embeddings(self) -> Runs:
        """The same with N and 6 N D that leave the embeddings out. Raises UserError where they are not known."""
        if np.isnan(self.embedding_params).any():
            raise UserError("embedding_params: not known of every point, so embeddings can't be left out of the parameters.")
        return dataclasses.replace(self, params=self.params - self.embedding_params, flops=None)

    def last(self) -> Runs:
        """The last point of each run."""
        order = np.argsort(self.tokens, kind="stable")
        return self[np.sort([order[self.run[order] == label][-1] for label in np.unique(self.run)])]

    def need(self, points: int, sizes: int, what: str) -> None:
        """Raises UserError for fewer points, or fewer sizes of model, than a law needs."""
        if len(self) < points:
            raise UserError(f"{what} needs at least {points} points; the runs have {len(self)}.")
        if (found := len(np.unique(self.params))) < sizes:
            raise UserError(f"{what} needs models of at least {sizes} sizes; the runs have {found}.")

    def need_spread(self, column: str, what: str) -> None:
        """Raises UserError where all points have one value."""
        if len(found := np.unique(getattr(self, column))) < 2:
            raise UserError(f"{what} needs more than one value of {column}; of all points it is {found[0]:g}.")


Record = tuple[str, dict[str, object]]  # where it stands, as messages name it; and its values


def read_runs(paths: Sequence[str | Path], columns: Mapping[str, str] | None = None, metric: str = "val_loss") -> Runs:
    """The points of folders that train.py made, and of .csv and .jsonl files with the columns params, tokens, loss and
    any other of `Runs`.

    columns: how files call what nanopre calls by its own names, as {"params": "N"}.
    metric: which number of a run folder's log.jsonl is the loss.
    Raises UserError, one sentence with the file, line and column.
    """
    columns = dict(columns or {})
    known = [field.name for field in dataclasses.fields(Runs)]
    for name in columns:
        if name not in known:
            raise UserError(f"--column {name}={columns[name]}: there is no column {name}; {nearest(name, known)}")
    if not paths:
        raise UserError("there are no runs; name folders of runs, or .csv or .jsonl files.")
    values: dict[str, list] = {name: [] for name in known}
    files = (path.parent if path.name == "log.jsonl" else path for path in map(Path, paths))
    for path in dict.fromkeys(files):  # one that is named twice does not count twice
        records = _read_folder(path, metric) if path.is_dir() else _read_file(path, columns)
        for i, (where, record) in enumerate(records):
            for name in known:
                if name == "run":
                    values[name].append(f"{path}:{record[name] if record.get(name) not in (None, '') else i}")
                else:
                    column, zero = columns.get(name, name), name == "embedding_params"
                    values[name].append(_number(record.get(name), where, column, name in NEEDED, zero))
            if (embeddings := values["embedding_params"][-1]) >= (params := values["params"][-1]):
                raise UserError(f"{where}: embedding_params is {embeddings:g}; it must be below params, {params:g}.")
    if not values["params"]:
        raise UserError(f"{', '.join(map(str, paths))}: there is no point in it.")
    return Runs(**{name: np.array(column) for name, column in values.items()})


def _number(value: object, where: str, column: str, needed: bool = True, zero: bool = False) -> float:
    """A number above zero, or with `zero` not below; nan where there is none and none is needed."""
    if value in (None, "") and not needed:
        return math.nan
    try:
        if isinstance(value, bool):  # of which Python would make 0 or 1
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {column} is {value!r}; it must be a number.") from None
    if not 0 < number < math.inf and not (zero and number == 0):
        raise UserError(f"{where}: {column} is {value}; it must be above zero and finite.")
    return number


def _read_file(path: Path, columns: dict[str, str]) -> Iterator[Record]:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder.")
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"{path}: neither a run's folder nor a .csv or .jsonl file.")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = _csv_rows(file) if path.suffix == ".csv" else _json_rows(file, path)
            for line, row in rows:
                for name in (*NEEDED, *columns):
                    if (column := columns.get(name, name)) not in row:
                        hint = nearest(column, list(row))
                        raise UserError(f"{path}, line {line}: there is no column {column}; {hint} (--column {name}=...)")
                yield f"{path}, line {line}", {**row, **{name: row[column] for name, column in columns.items()}}
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}).") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table of text ({error}).") from None


def _csv_rows(file) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(file, skipinitialspace=True)
    for row in reader:
        yield reader.line_num, {key: value for key, value in row.items() if key is not None}


def _json_rows(file, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error.msg}).") from None
            if not isinstance(row, dict):
                raise UserError(f'{path}, line {number}: not an object like {{"params": 1e6, "tokens": 1e8, "loss": 4.2}}.')
            yield number, row


def _read_folder(path: Path, metric: str) -> Iterator[Record]:
    """A run that train.py made: sizes from config.toml and tokenizer.json, curves from log.jsonl."""
    log = path / "log.jsonl"
    for file in (log, path / "config.toml", path / "tokenizer.json"):
        if not file.is_file():
            inside = next(path.glob("*/log.jsonl"), None)
            hint = f"; of those in it say {path}/*" if inside else ""
            raise UserError(f"{path}: not a run's folder (it has no {file.name}){hint}.")
    sizes = run_sizes(path)
    tokens: dict[int, tuple[float, float]] = {}  # by step: an evaluation's line has none
    found, seen = 0, set()
    for line, row in read_log(log):
        seen |= row.keys()
        where, step = f"{log}, line {line}", row["step"]
        if "tokens" in row:
            total, epoch = (_number(row.get(key, 1.0), where, key) for key in ("tokens", "epoch"))
            tokens[step] = total, total / max(1.0, epoch)
        if metric in row and step in tokens and not _is_lost(row[metric]):
            found += 1
            seen_tokens, unique = tokens[step]
            point = {"tokens": seen_tokens, "unique_tokens": unique, "loss": row[metric], "run": path.name}
            yield where, {**sizes, **point}
    if not found:
        raise UserError(f"{log}: no line has {metric}; {nearest(metric, [name for name in seen if 'loss' in name])}")


def read_log(log: Path) -> Iterator[tuple[int, dict]]:
    """(number, record) of each line of a run's log.jsonl. Raises UserError for what train.py does not write."""
    try:
        with open(log, encoding="utf-8") as file:
            # A run that is under way, or was killed, may have written half of its last line.
            for number, row in _json_rows((line for line in file if line.endswith("\n")), log):
                if not isinstance(row.get("step"), int):
                    raise UserError(f"{log}, line {number}: has no step; it is none of a run that train.py made.")
                yield number, row
    except OSError as error:
        raise UserError(f"{log}: can't be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{log}: not a log of text ({error}).") from None


def last_loss(log: Path) -> float | None:
    """The last validation loss of a run's log.jsonl; None where there is none, or it is not finite."""
    line, loss = 0, math.nan
    for number, row in read_log(log):
        line, loss = (number, row["val_loss"]) if "val_loss" in row else (line, loss)
    return None if _is_lost(loss) else _number(loss, f"{log}, line {line}", "val_loss")


def _is_lost(value: object) -> bool:
    """A loss of a model that is lost, which log.jsonl has as NaN or Infinity."""
    return isinstance(value, float) and not math.isfinite(value)


def measured_seconds(run: Path) -> tuple[float, float | None]:
    """(seconds a step, MFU if it was noted) of a run: medians over the later half of its log.jsonl. Raises UserError."""
    log = run / "log.jsonl"
    steps = [row for _, row in read_log(log) if "tokens_per_second" in row]
    later = steps[len(steps) // 2 :]
    try:
        speed = median(row["tokens_per_second"] for row in later)
        per_step = later[-1]["tokens"] / later[-1]["step"]
        return per_step / speed, median([row["mfu"] for row in later]) if "mfu" in later[-1] else None
    except (TypeError, KeyError, ArithmeticError, IndexError, StatisticsError) as error:
        raise UserError(f"{log}: no steps to calibrate with ({error}).") from None


def run_sizes(path: Path) -> dict[str, float]:
    """What a run's config says of its size: `params`, `embedding_params`, `d_model`, `n_layers`, `batch_size` (tokens).

    params: of the whole model, with what its objective adds. embedding_params: what of them is not in the blocks, the
        output projection too (Kaplan et al., 2020, section 2.1).
    """
    config, _ = configs.load(path / "config.toml")
    n_vocab = Tokenizer.load(path / "tokenizer.json").n_vocab
    model = preview.shape(config, padded_vocabulary(n_vocab))
    params = sum(p.numel() for p in model.parameters())
    return {
        "params": params,
        "embedding_params": params - cost.parameters(model.config)["blocks"],
        "d_model": model.config.d_model,
        "n_layers": model.config.n_layers + model.config.n_decoder_layers,
        "batch_size": config.train.batch_size * config.train.seq_len,
    }
