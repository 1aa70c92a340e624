"""The documents of a corpus, read as a stream: of a dataset plugin, or of text, .jsonl and .parquet files."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nanopre import UserError, config as configs
from nanopre.plugins import Registry, nearest

DOCUMENT_BYTES = 2**16  # a longer text file is cut into documents of about this size

Document = tuple[str, str | None]  # text, and "train" or "val" where the source brings its own split


class Source:
    """The documents that `data.corpus` names: of a dataset plugin, or of files."""

    def __init__(self, corpus: str | list[str] | dict, key: str, config: configs.Config, registry: Registry):
        self.key, self.text_key = key, config.data.text_key
        self.name = corpus["name"] if isinstance(corpus, dict) else ", ".join([corpus] if isinstance(corpus, str) else corpus)
        self.dataset, self.files = None, []
        if isinstance(corpus, str) and corpus in registry.offers("dataset"):
            corpus = {"name": corpus}
        if isinstance(corpus, dict):
            self.dataset = configs.build_plugin(registry, "dataset", corpus, key)
            return
        for pattern in [corpus] if isinstance(corpus, str) else corpus:
            found = sorted(path for path in glob.glob(str(pattern), recursive=True) if os.path.isfile(path))
            if not found:
                names = list(registry.offers("dataset"))
                if os.path.isdir(pattern):
                    raise UserError(f'{key}: "{pattern}" is a folder; name its files, as in "{os.path.join(pattern, "*")}".')
                raise UserError(f'{key}: no file matches "{pattern}", and no dataset has this name; {nearest(pattern, names)}')
            self.files += found

    def documents(self) -> Iterator[Document]:
        if self.dataset is None:
            for file in self.files:
                for text in read_file(file, self.text_key):
                    yield text, None
            return
        documents = self.dataset.documents()
        if not isinstance(documents, Iterable):
            raise UserError(f"{self.key}: the dataset {self.name} gave {documents!r}; it must give documents one by one.")
        for document in documents:
            match document:
                case str():
                    yield check_characters(document, f"{self.key}: the dataset {self.name}"), None
                case (str(), None | "train" | "val"):
                    yield check_characters(document[0], f"{self.key}: the dataset {self.name}"), document[1]
                case _:
                    right = 'a document is a text, or (text, "train" or "val")'
                    raise UserError(f"{self.key}: the dataset {self.name} gave {repr(document)[:80]}; {right}.")

    def fingerprint(self, cache: Path) -> str:
        """A hash of the documents' content."""
        if self.dataset is not None:
            return digest(type(self.dataset).__name__, self.dataset.fingerprint())
        return digest(self.text_key, DOCUMENT_BYTES, [hash_file(Path(file), cache) for file in self.files])


def hash_file(file: Path, cache: Path) -> str:
    """sha256 of a file's content, remembered for as long as its size and time of change stay."""
    stat = file.stat()
    key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    memory = cache / "hashes.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut off: it only saves time
        known = {}
    if key not in known:
        with open(file, "rb") as stream:
            digest = hashlib.sha256()
            while piece := stream.read(2**24):
                digest.update(piece)
        known[key] = digest.hexdigest()
        if os.access(cache, os.W_OK):
            with tempfile.NamedTemporaryFile("w", dir=cache, delete=False, encoding="utf-8") as temporary:
                json.dump(known, temporary)
            os.replace(temporary.name, memory)
    return known[key]


def read_file(file: str, text_key: str) -> Iterator[str]:
    """The documents of a text, .jsonl or .parquet file; .gz and .xz of the first two are unpacked on the way."""
    name = file.removesuffix(".gz").removesuffix(".xz")
    if name.endswith(".parquet"):
        yield from _read_parquet(file, text_key)
        return
    with unpacked(file) as stream:
        yield from _read_jsonl(file, stream, text_key) if name.endswith((".jsonl", ".ndjson")) else _read_text(file, stream)


@contextmanager
def unpacked(file: str) -> Iterator[BinaryIO]:
    """The bytes of a file, of .gz and .xz of what is packed in it. An error on the way is a UserError with its name."""
    unpack = gzip.open if file.endswith(".gz") else lzma.open if file.endswith(".xz") else open
    try:
        with unpack(file, "rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: the compressed file is damaged ({error}).") from None
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror}).") from None


def _read_text(file: str, stream: BinaryIO) -> Iterator[str]:
    """A file of less than twice DOCUMENT_BYTES is a document. A longer one is cut at blank lines, else at line ends, else
    at characters, so that a text of any length streams and can be split by document."""
    rest, begin = b"", 0  # what is not a document yet, and where in the text that begins

    def decoded(text: bytes) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 ({error.reason}, at byte {begin + error.start:,}).") from None

    while piece := stream.read(DOCUMENT_BYTES):
        rest += piece
        if len(rest) >= 2 * DOCUMENT_BYTES:
            cut = rest.rfind(b"\n\n", 1, DOCUMENT_BYTES) + 2
            cut = cut if cut > 1 else rest.rfind(b"\n", 0, DOCUMENT_BYTES) + 1
            if cut < 1:
                cut = DOCUMENT_BYTES
                while rest[cut] & 0xC0 == 0x80 and cut > DOCUMENT_BYTES - 4:  # within a character
                    cut -= 1
            yield decoded(rest[:cut])
            rest, begin = rest[cut:], begin + cut
    if rest:
        yield decoded(rest)


def read_json_lines(file: str, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(number of the line from 1 on, its value) of each line that is not empty."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except UnicodeDecodeError:
            raise UserError(f"{file}:{number}: not UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not a line of JSON ({error}).") from None


def _read_jsonl(file: str, stream, text_key: str) -> Iterator[str]:
    for number, record in read_json_lines(file, stream):
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            keys = [key for key, value in record.items() if isinstance(value, str)] if isinstance(record, dict) else []
            hint = nearest(text_key, keys).replace("choose from", "there are") if keys else "it has no key with a text."
            raise UserError(f'{file}:{number}: has no text at the key data.text_key = "{text_key}"; {hint}')
        yield check_characters(record[text_key], f"{file}:{number}")


def check_characters(text: str, where: str) -> str:
    """The text. Raises UserError where it has what UTF-8 can't write, as "\\ud800" in JSON gives it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the text has half of a surrogate pair, which is no character.") from None
    return text


def _read_parquet(file: str, text_key: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{file}: reading .parquet needs pyarrow; pip install 'nanopre[parquet]'.") from None
    try:
        table = parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            hint = nearest(text_key, table.schema_arrow.names)
            raise UserError(f'{file}: has no column data.text_key = "{text_key}"; {hint}')
        if (kind := str(table.schema_arrow.field(text_key).type)) not in ("string", "large_string"):
            raise UserError(f'{file}: the column data.text_key = "{text_key}" is {kind}; it must be a string.')
        for batch in table.iter_batches(batch_size=256, columns=[text_key]):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read as .parquet ({str(error).splitlines()[0]}).") from None


def digest(*keys: Any) -> str:
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
