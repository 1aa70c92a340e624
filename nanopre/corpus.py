"""Text to tokens on disk: split it by document as it is read, tokenise it on all cores, write it once.

    cache/corpora/<key>/    {train,val}.{tokens,documents,sentences}.bin, tokenizer.json, meta.json
    cache/tokenizers/       trained tokenizers
    cache/hashes.json       content hashes of files, by path, size and time of change

The key is a hash of the texts, the tokenizer and the way to split: a changed file is another corpus. A corpus is written
under a temporary name and renamed when it is whole, and its files' checksums are verified when it is opened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from nanopre import UserError, config as configs, tokenizer as tokenizers
from nanopre.checkpoint import checksums, damage
from nanopre.data import Corpus, Split, hash64
from nanopre.plugins import Registry
from nanopre.sources import Source, digest
from nanopre.tokenizer import Tokenizer

FORMAT = 2  # of the files on disk
BATCH_BYTES = 2**20  # of text that a thread tokenises at a time
TRAINING_BYTES = 2**28  # of text from the start of the corpus that a BPE is trained on


def prepare(config: configs.Config, registry: Registry, tokenizer: Tokenizer | None = None, progress: bool = True) -> Corpus:
    """Open the configured corpus, after tokenising it where that has not been done. Raises UserError.

    tokenizer: one that is there already, in place of the configured one.
    """
    cache = open_cache(config.data.cache_dir)
    source = Source(config.data.corpus, "data.corpus", config, registry)
    val_source = None
    if config.data.val_corpus:
        val_source = Source(config.data.val_corpus, "data.val_corpus", config, registry)
    texts = [source.fingerprint(cache), val_source.fingerprint(cache) if val_source else ""]
    if tokenizer is None:
        every_text = (text for s in (source, val_source) if s for text, _ in s.documents())
        tokenizer = make_tokenizer(config.tokenizer, _first_texts(source), every_text, cache, texts, progress)
    split = None if val_source else config.data.val_fraction
    key = digest(FORMAT, texts, tokenizer.fingerprint, split)
    folder = cache / "corpora" / key
    if not (folder / "meta.json").exists():
        _write(folder, _split(source, val_source, config.data.val_fraction), tokenizer, progress, source.name)
    return open_corpus(folder)


def open_cache(path: str | Path) -> Path:
    """The folder data.cache_dir, made if need be. It may be read-only as long as all is in it."""
    return Path(path) if os.path.isdir(path) else make_folder(Path(path))


def make_folder(path: Path) -> Path:
    """The cache, or a folder in it, made if need be. Raises UserError where nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: the folder {path} can't be made ({error.strerror}).") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"data.cache_dir: the folder {path} can't be written to.")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Splitting


def _split(source: Source, val_source: Source | None, val_fraction: float) -> Iterator[tuple[str, str]]:
    """(text, "train" or "val") of every document that is not empty.

    A source's own split comes first, then val_corpus, and else the hash of a document's number: by document, never by
    window, so that no text is on both sides. Of two documents or more at least one is validated on, and one trained on.
    """
    documents = ((text, part) for text, part in source.documents() if text)
    counts = {"train": 0, "val": 0}
    held = None  # the last document waits: it may have to be the one that is missing on a side
    for number, (text, part) in enumerate(documents):
        if held:
            counts[held[1]] += 1
            yield held
        drawn = "val" if not val_source and int(hash64(number)) < val_fraction * 2**64 else "train"
        held = (text, part or drawn)
        own_split = part is not None
    if held is None:
        raise UserError(f"{source.key}: there is no text in {source.name or 'an empty list'}.")
    if not own_split and not val_source and val_fraction:
        if not any(counts.values()):
            raise UserError(
                f"{source.key}: it is one document, which can't be split into training and validation; add another, name "
                "data.val_corpus, or set data.val_fraction = 0."
            )
        missing = [part for part in counts if not counts[part]]
        held = (held[0], missing[0]) if missing else held
    yield held
    if val_source:
        empty = True
        for text, _ in val_source.documents():
            if text:
                empty = False
                yield text, "val"
        if empty:
            raise UserError(f"{val_source.key}: there is no text in it.")


SENTENCE_END = re.compile(rb"""[.!?]["')\]]*\s+(?=["'(\[]*[A-Z0-9])|\n\s*\n""")


def sentence_starts(text: bytes) -> list[int]:
    """Byte offsets at which sentences begin, but for the first: behind . ! or ? with closing quotes or brackets and
    before white space that a capital or a digit follows, and at blank lines. The white space belongs to the sentence that
    it leads."""
    starts = []
    for match in SENTENCE_END.finditer(text):
        end = match.group()
        starts.append(match.end() - len(end) + len(end.rstrip()))
    return starts


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising


def make_tokenizer(
    config: configs.Tokenizer,
    training_texts: Iterable[str],
    every_text: Iterable[str],
    cache: Path,
    fingerprints: list[str],
    progress: bool,
) -> Tokenizer:
    """The configured tokenizer. A BPE learns from the training texts, characters are those of every text; what was made
    from the texts with these fingerprints is kept in the cache."""
    if config.name == "bytes":
        return tokenizers.bytes_tokenizer()
    if config.name == "gpt2":
        return tokenizers.gpt2_tokenizer(config.path)
    vocab_size = config.vocab_size if config.name == "bpe" else 0
    file = cache / "tokenizers" / f"{digest(config.name, vocab_size, fingerprints, tokenizers.BPE_PATTERN)}.json"
    if not file.exists():
        make_folder(file.parent)
        if progress:
            print(f"making the {config.name} tokenizer ...", file=sys.stderr)
        if config.name == "chars":
            made = tokenizers.characters_tokenizer(every_text)
        else:
            made = tokenizers.bpe_tokenizer(training_texts, vocab_size)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        made.save(temporary)
        os.replace(temporary, file)
    return Tokenizer.load(file)


def _first_texts(source: Source) -> Iterator[str]:
    """The texts that a BPE is trained on: the first TRAINING_BYTES, none of them a text that is surely validated on."""
    left = TRAINING_BYTES
    for text, part in source.documents():
        if part != "val":
            yield text
            left -= len(text)
            if left < 0:
                return


def _write(folder: Path, documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, progress: bool, name: str) -> None:
    """Tokenise the documents into a folder, which appears under its name when it is whole."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=make_folder(folder.parent)))
    try:
        writers = {part: _Writer(temporary, part, tokenizer) for part in ("train", "val")}
        show = progress and sys.stderr.isatty()
        columns = [SpinnerColumn(), TextColumn("tokenising {task.description}"), TimeElapsedColumn()]
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            Progress(*columns, console=Console(stderr=True), disable=not show, transient=True) as bar,
        ):
            task = bar.add_task(name, total=None)
            running: deque = deque()  # so few batches at a time that memory stays small, however large the corpus is
            for batch in _batches(documents):
                running.append(pool.submit(_encode, batch, tokenizer))
                if len(running) > 2 * (os.cpu_count() or 1):
                    _append(writers, running.popleft().result())
                    n_bytes, n_tokens = (sum(getattr(w, a) for w in writers.values()) for a in ("n_bytes", "n_tokens"))
                    bar.update(task, description=f"{name}: {n_bytes / 1e6:,.0f} MB, {n_tokens / 1e6:,.1f}M tokens")
            while running:
                _append(writers, running.popleft().result())
        tokenizer.save(temporary / "tokenizer.json")
        meta = {"format": FORMAT, "splits": {part: writer.close() for part, writer in writers.items()}}
        meta["files"] = checksums(temporary)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if progress:
            n = {part: writer.n_tokens for part, writer in writers.items()}
            print(f"tokenised {name}: {n['train']:,} tokens to train on, {n['val']:,} to validate", file=sys.stderr)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process wrote the same corpus first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[0])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[tuple[str, str]], tokenizer: Tokenizer) -> list[tuple[str, np.ndarray, np.ndarray, int]]:
    """(part, tokens with the end of text, sentence starts in tokens, bytes of text) of each document. tiktoken works
    outside of Python's lock, so that threads use all cores."""
    encoded = []
    for text, part in batch:
        tokens, ends = tokenizer.encode_with_ends(text)
        raw = text.encode()
        # A sentence starts with the first token that begins where it does or later.
        begins = np.concatenate(([0], ends[:-1]))
        starts = np.unique(np.searchsorted(begins, [0, *sentence_starts(raw)]))
        starts = starts[starts < len(tokens)]
        encoded.append((part, np.append(tokens, np.uint32(tokenizer.eot)), starts, len(raw)))
    return encoded


def _append(writers: dict[str, _Writer], encoded: list[tuple[str, np.ndarray, np.ndarray, int]]) -> None:
    for part, *document in encoded:
        writers[part].append(*document)


class _Writer:
    """Appends documents to the three files of a split."""

    def __init__(self, folder: Path, part: str, tokenizer: Tokenizer):
        self.dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
        names = ("tokens", "documents", "sentences")
        self.files = {name: open(folder / f"{part}.{name}.bin", "wb") for name in names}
        self.n_tokens = self.n_bytes = 0

    def append(self, tokens: np.ndarray, sentences: np.ndarray, n_bytes: int) -> None:
        self.files["tokens"].write(tokens.astype(self.dtype).tobytes())
        self.files["documents"].write(np.int64(self.n_tokens).tobytes())
        self.files["sentences"].write((sentences + self.n_tokens).astype(np.int64).tobytes())
        self.n_tokens += len(tokens)
        self.n_bytes += n_bytes

    def close(self) -> dict[str, Any]:
        for name in ("documents", "sentences"):
            self.files[name].write(np.int64(self.n_tokens).tobytes())
        for file in self.files.values():
            file.close()
        return {"n_tokens": self.n_tokens, "n_bytes": self.n_bytes, "dtype": np.dtype(self.dtype).name}


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_corpus(folder: Path) -> Corpus:
    """Memory-map a tokenised corpus, after every file proved to be whole. Raises UserError that names a damaged one."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if problem := damage(folder, meta["files"]):
            raise UserError(f"{problem}; delete the folder {folder} and the corpus is tokenised anew.")
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        splits = {part: _open_split(folder, part, values, tokenizer) for part, values in meta["splits"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'meta.json'}: damaged ({error}); delete the folder and it is made anew.") from None
    return Corpus(splits["train"], splits["val"], folder.name, folder)


def _open_split(folder: Path, part: str, values: dict[str, Any], tokenizer: Tokenizer) -> Split:
    def open_array(name: str, dtype: str) -> np.ndarray:
        file = folder / f"{part}.{name}.bin"
        return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.zeros(0, dtype=dtype)

    tokens, documents = open_array("tokens", values["dtype"]), open_array("documents", "int64")
    return Split(tokens, documents, open_array("sentences", "int64"), values["n_bytes"], tokenizer)
