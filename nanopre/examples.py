"""Examples to fine-tune on: records with named columns of text, as .jsonl and .tsv files have them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nanopre import UserError, config as configs
from nanopre.corpus import make_tokenizer, open_cache
from nanopre.data import Corpus, hash64, permute
from nanopre.plugins import Registry, nearest
from nanopre.sources import Source, check_characters, digest, read_json_lines, unpacked
from nanopre.tokenizer import Tokenizer

Record = tuple[str, ...]  # the texts of one example, one for each column that the objective names


@dataclass
class Examples:
    """The training or the validation part of a set of examples: what a nanopre.data.Split is to running text."""

    columns: dict[str, list[str]]  # by name; as many texts in each
    tokenizer: Tokenizer
    _tokens: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def tokens(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, starts): the column's texts one after the other (int64), and where each starts, with the end of all
        (len + 1). Tokenised when first asked for."""
        if column not in self._tokens:
            texts = [self.tokenizer.encode(text) for text in self.columns[column]]
            starts = np.concatenate(([0], np.cumsum([len(text) for text in texts], dtype=np.int64)))
            self._tokens[column] = np.concatenate([*texts, np.zeros(0)]).astype(np.int64), starts
        return self._tokens[column]

    @property
    def n_tokens(self) -> int:
        return sum(len(self.tokens(column)[0]) for column in self.columns)


def prepare(config: configs.Config, registry: Registry, tokenizer: Tokenizer | None = None, progress: bool = True) -> Corpus:
    """The examples of `data.corpus`, with the columns that the objective names, as a Corpus whose splits are Examples.

    Validation is `data.val_corpus`, or the part `data.val_fraction` of the records, drawn by a hash of each one's
    content: so that a record which occurs twice is on one side only. The objective then looks at both with its `prepare`,
    where it has one. tokenizer: one that is there already, in place of the configured one. Raises UserError.
    """
    objective, cache = config.objective, open_cache(config.data.cache_dir)
    columns = objective.columns()
    train = read(Source(config.data.corpus, "data.corpus", config, registry), columns)
    if config.data.val_corpus:
        val = read(Source(config.data.val_corpus, "data.val_corpus", config, registry), columns)
    else:
        train, val = split(train, config.data.val_fraction)
    val.sort(key=digest)  # files are often sorted by class: `train.eval_tokens` shall take a fair part
    fingerprints = [digest(columns, train), digest(columns, val)]
    if tokenizer is None:
        # Each text once, or the labels would be the tokenizer's commonest words.
        training_texts = dict.fromkeys(text for record in train for text in record)
        every_text = (text for record in train + val for text in record)
        tokenizer = make_tokenizer(config.tokenizer, training_texts, every_text, cache, fingerprints, progress)
    parts = [_examples(records, columns, tokenizer) for records in (train, val)]
    if hasattr(objective, "prepare"):
        objective.prepare(*parts)
    return Corpus(*parts, fingerprint=digest(fingerprints, tokenizer.fingerprint), dir=cache)


def split(records: list[Record], val_fraction: float) -> tuple[list[Record], list[Record]]:
    """(training, validation) records, by the hash of each one's content. Of two different records or more at least one is
    on either side."""
    draws = np.array([int(digest(record), 16) / 2**64 for record in records])
    limit = val_fraction
    if val_fraction and len(np.unique(draws)) > 1:
        limit = np.clip(limit, np.nextafter(draws.min(), 1), draws.max())
    train, val = ([records[i] for i in np.flatnonzero(part)] for part in (draws >= limit, draws < limit))
    return train, val


def _examples(records: list[Record], columns: list[str], tokenizer: Tokenizer) -> Examples:
    return Examples({column: [record[i] for record in records] for i, column in enumerate(columns)}, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Rows

Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""For each row a run of tokens: an array that holds all of them, where each row's starts, and how long it is."""


def visit(rows: np.ndarray, n: int, seed: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(which of n examples each row shows, whether the row lies past the end). Each epoch shows every example once, in an
    order of its own. With seed None, evaluation: in their order, and rows from n on lie past the end."""
    epochs, index = np.divmod(np.asarray(rows, dtype=np.int64), n)
    if seed is None:
        return index, epochs > 0
    return permute(index, n, hash64(seed, 1, epochs)), np.zeros(len(rows), dtype=bool)


def constant(token: int, rows: int) -> Part:
    """The same token in every row."""
    return np.array([token]), np.zeros(rows, dtype=np.int64), np.ones(rows, dtype=np.int64)


def lay_out(parts: list[Part], width: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts one behind the other in rows (R, width) of int64, `fill` after them; and where each part ends, (R, parts)."""
    R = len(parts[0][1])
    rows, ends = np.full((R, width), fill, dtype=np.int64), np.zeros((R, len(parts) + 1), dtype=np.int64)
    for i, (tokens, starts, lengths) in enumerate(parts):
        offset = np.arange(width) - ends[:, i, None]  # (R, width)
        inside = (offset >= 0) & (offset < lengths[:, None])
        rows[inside] = tokens[(starts[:, None] + offset)[inside]]
        ends[:, i + 1] = ends[:, i] + lengths
    return rows, ends[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(source: Source, columns: list[str]) -> list[Record]:
    """The columns of every record of a dataset plugin that has records, or of .jsonl and .tsv files."""
    if source.dataset is None:
        records = [record for file in source.files for record in read_file(file, columns)]
    elif hasattr(source.dataset, "records"):
        rows = enumerate(source.dataset.records(), 1)
        records = [pick(row, columns, f"{source.key}: {source.name}", number) for number, row in rows]
    else:
        raise UserError(f"{source.key}: the dataset {source.name} is running text; the objective learns from examples.")
    if not records:
        raise UserError(f"{source.key}: there is no example in it.")
    return records


def read_file(file: str, columns: list[str]) -> Iterator[Record]:
    """The columns of each record of a .jsonl file, or of a .tsv or .txt file whose first line has their names; .gz and .xz
    are unpacked on the way. Raises UserError that names the file and the line."""
    kind = file.removesuffix(".gz").removesuffix(".xz")
    if not kind.endswith((".jsonl", ".ndjson", ".tsv", ".txt")):
        raise UserError(f"{file}: examples are read from .jsonl, and from .tsv and .txt with the columns' names in line 1.")
    with unpacked(file) as stream:
        rows = read_json_lines(file, stream) if kind.endswith((".jsonl", ".ndjson")) else _read_table(file, stream)
        for number, row in rows:
            yield pick(row, columns, file, number)


def _read_table(file: str, stream: Iterable[bytes]) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of the line, its record) of tab-separated lines, in which quotes are plain text, after a line of names."""
    names = None
    for number, line in enumerate(stream, 1):
        try:
            fields = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            raise UserError(f"{file}:{number}: not UTF-8.") from None
        if names is None:
            names = fields
        elif fields != [""]:
            if len(fields) != len(names):
                raise UserError(f"{file}:{number}: has {len(fields)} fields; line 1 names {len(names)} columns.")
            yield number, dict(zip(names, fields, strict=True))


def pick(row: object, columns: list[str], file: str, number: int) -> Record:
    """The columns of one record. Numbers and true and false, as labels often are, are texts as JSON writes them."""
    if not isinstance(row, dict):
        raise UserError(f"{file}:{number}: is not a record with named columns.")
    for column in columns:
        if column not in row:
            hint = nearest(column, list(row)).replace("choose from", "there are")
            raise UserError(f'{file}:{number}: has no column "{column}", which the objective reads; {hint}')
        if not isinstance(row[column], (str, int, float)):
            raise UserError(f'{file}:{number}: the column "{column}" is {json.dumps(row[column])[:40]}, not a text.')
        check_characters(str(row[column]), f"{file}:{number}")
    return tuple(text if isinstance(text := row[column], str) else json.dumps(text) for column in columns)
