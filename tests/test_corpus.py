"""Corpora: every format reads the same, nothing stale or damaged is used, and the split is by document."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, SHARED
from hypothesis import given, settings, strategies as st

from nanopre import UserError, config as configs, corpus as corpora
from nanopre.corpus import _split, sentence_starts
from nanopre.sources import DOCUMENT_BYTES, _read_text
from nanopre.tokenizer import bytes_tokenizer

SHAKESPEARE = SHARED / "text" / "tinyshakespeare.txt"
TEXTS = [f"Document {i}. It has {i} words.\n\nAnd a line é more" for i in range(40)]


def prepare(tmp_path, corpus, **sections) -> corpora.Corpus:
    data = {"corpus": corpus, "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.2, **sections.pop("data", {})}
    table = {"data": data, "tokenizer": {"name": "bytes"}, **sections}
    config, registry = configs.from_dict(table, "test.toml")
    return corpora.prepare(config, registry, progress=False)


def documents(split, tokenizer) -> list[str]:
    pieces = np.split(np.asarray(split.tokens), split.documents[1:-1])
    assert all(piece[-1] == tokenizer.eot and tokenizer.eot not in piece[:-1] for piece in pieces)
    return [tokenizer.decode(piece[:-1]) for piece in pieces]


def write_jsonl(path: Path, texts=TEXTS, key="text") -> Path:
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(texts))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz", "parquet", "txt", "txt.gz"])
def test_every_format_gives_the_same_documents(tmp_path, suffix):
    if suffix == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "t.parquet")
    elif suffix.startswith("txt"):
        for i, text in enumerate(TEXTS):
            content = text.encode() if suffix == "txt" else gzip.compress(text.encode())
            (tmp_path / f"{i:02}.{suffix}").write_bytes(content)
    else:
        write_jsonl(tmp_path / f"t.{suffix}")
    corpus = prepare(tmp_path, f"{tmp_path}/*.{suffix}")
    train, val = (documents(split, corpus.tokenizer) for split in (corpus.train, corpus.val))
    assert sorted(train + val) == sorted(TEXTS)
    assert 0 < len(val) < 20
    assert corpus.train.n_bytes + corpus.val.n_bytes == sum(len(text.encode()) for text in TEXTS)
    # The same documents in the same order make the same split, whatever they came in.
    reference = prepare(tmp_path, str(write_jsonl(tmp_path / "reference.jsonl")))
    assert np.array_equal(corpus.val.tokens, reference.val.tokens)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 60), fraction=st.sampled_from([0.0, 0.01, 0.3, 0.9]), empty=st.sets(st.integers(0, 59)))
def test_the_split_shares_out_whole_documents(n, fraction, empty):
    texts = ["" if i in empty else f"text {i}" for i in range(n)]
    full = [text for text in texts if text]

    class Source:
        key, name = "data.corpus", "the made-up texts"

        def documents(self):
            return ((text, None) for text in texts)

    if not full or (len(full) == 1 and fraction):
        with pytest.raises(UserError, match="there is no text in the made-up texts" if not full else "it is one document"):
            list(_split(Source(), None, fraction))
        return
    parts = list(_split(Source(), None, fraction))
    assert [text for text, _ in parts] == full
    names = {part for _, part in parts}
    assert names == ({"train", "val"} if fraction else {"train"})


def test_a_validation_corpus_of_its_own(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:30])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[30:])
    corpus = prepare(tmp_path, f"{tmp_path}/a.jsonl", data={"val_corpus": f"{tmp_path}/b.jsonl"})
    assert documents(corpus.train, corpus.tokenizer) == TEXTS[:30]
    assert documents(corpus.val, corpus.tokenizer) == TEXTS[30:]
    without = prepare(tmp_path, f"{tmp_path}/a.jsonl", data={"val_corpus": "", "val_fraction": 0.0})  # as a flag clears it
    assert documents(without.train, without.tokenizer) == TEXTS[:30]


@settings(max_examples=50, deadline=None)
@given(pieces=st.lists(st.sampled_from(["word ", "é" * 50, "\n", "\n\n", "漢" * 2000, "x" * 9000]), max_size=400))
def test_a_long_text_is_cut_without_loss(pieces):
    import io

    text = "".join(pieces)
    parts = list(_read_text("a.txt", io.BytesIO(text.encode())))
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) < 2 * DOCUMENT_BYTES for part in parts)


def test_sentences():
    text = 'One ends. Two, by J. b. "Three?" (Four!) 5 is five. e.g. this\n\na title\nand more'
    starts = sentence_starts(text.encode())
    pieces = [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]
    assert "".join(pieces) == text
    assert [piece.strip() for piece in pieces] == [
        "One ends.", "Two, by J. b.", '"Three?"', "(Four!)", "5 is five. e.g. this", "a title\nand more"
    ]  # fmt: skip


def test_sentences_on_disk_start_where_they_do_in_the_text(tmp_path):
    corpus = prepare(tmp_path, str(write_jsonl(tmp_path / "t.jsonl")))
    split = corpus.train
    assert split.sentences[0] == 0 and split.sentences[-1] == split.n_tokens
    assert set(split.documents) <= set(split.sentences)
    assert (np.diff(split.sentences) > 0).all()
    pieces = [corpus.tokenizer.decode(piece) for piece in np.split(np.asarray(split.tokens), split.sentences[1:-1])]
    first = documents(split, corpus.tokenizer)[0]
    assert "".join(pieces[:3]).removesuffix("<|endoftext|>") == first
    assert [piece.strip() for piece in pieces[:2]] == first.split("\n")[0].replace(". ", ".|").split("|")


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def folders(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "corpora").iterdir())


def test_it_is_tokenised_once_and_a_changed_file_or_setting_anew(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "t.jsonl")
    first = prepare(tmp_path, str(file))
    monkeypatch.setattr(corpora, "_write", lambda *_: pytest.fail("was tokenised again"))
    assert prepare(tmp_path, str(file)).fingerprint == first.fingerprint
    copy = tmp_path / "copy.jsonl"  # content counts, not the name
    copy.write_bytes(file.read_bytes())
    assert prepare(tmp_path, str(copy)).fingerprint == first.fingerprint
    monkeypatch.undo()
    stat = file.stat()
    file.write_text(file.read_text().replace("words", "WORDS"))  # the same size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = prepare(tmp_path, str(file))
    assert changed.fingerprint != first.fingerprint
    assert "WORDS" in documents(changed.train, changed.tokenizer)[0]
    other = prepare(tmp_path, str(file), tokenizer={"name": "chars"})
    fraction = prepare(tmp_path, str(file), data={"val_fraction": 0.5})
    assert len({c.fingerprint for c in (first, changed, other, fraction)}) == 4
    assert len(folders(tmp_path)) == 4


@pytest.mark.parametrize("name", ["train.tokens.bin", "val.documents.bin", "train.sentences.bin", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    corpus = prepare(tmp_path, str(write_jsonl(tmp_path / "t.jsonl")))
    file = corpus.dir / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-8] if damage == "cut" else content[:8] + bytes([content[8] ^ 1]) + content[9:])
    with pytest.raises(UserError) as error:
        prepare(tmp_path, f"{tmp_path}/t.jsonl")
    assert f"{file}: {'missing' if damage == 'gone' else 'damaged'}" in str(error.value)
    assert f"delete the folder {corpus.dir}" in str(error.value)


def test_an_interrupted_tokenisation_leaves_nothing(tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "t.jsonl")
    monkeypatch.setattr(corpora, "_encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, str(file))
    assert folders(tmp_path) == []
    monkeypatch.undo()
    assert prepare(tmp_path, str(file)).train.n_tokens


def test_two_processes_at_once(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", TEXTS * 50)
    code = f"""
from nanopre import config, corpus
table = {{"data": {{"corpus": "{tmp_path}/t.jsonl", "cache_dir": "{tmp_path}/cache"}}, "tokenizer": {{"vocab_size": 400}}}}
print(corpus.prepare(*config.from_dict(table, "t.toml"), progress=False).train.n_tokens)
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len(set(outputs)) == 1 and int(outputs[0]) > 10_000
    assert len(folders(tmp_path)) == 1


def test_every_vocabulary_is_stored_in_the_smallest_type(tmp_path):
    corpus = prepare(tmp_path, str(write_jsonl(tmp_path / "t.jsonl")), tokenizer={"name": "bpe", "vocab_size": 380})
    assert corpus.train.tokens.dtype == np.uint16
    assert corpus.tokenizer.n_vocab == 380
    assert sorted(documents(corpus.train, corpus.tokenizer) + documents(corpus.val, corpus.tokenizer)) == sorted(TEXTS)
    big = bytes_tokenizer()
    big.n_vocab = 70_000
    corpora._write(tmp_path / "big", [("text", "train"), ("more", "val")], big, False, "")
    opened = corpora.open_corpus(tmp_path / "big")
    assert opened.train.tokens.dtype == np.uint32
    assert opened.train.tokens.tolist() == [*b"text", 256]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def bad_files(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "keyless.jsonl").write_text('{"body": "a", "n": 1}\n')
    (tmp_path / "number.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:40])
    (tmp_path / "not.jsonl.xz").write_bytes(b"plain")
    (tmp_path / "not.parquet").write_bytes(b"plain")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "one.txt").write_text("one document")
    (tmp_path / "bytes.txt").write_bytes(b"\x80" * 300_000)
    (tmp_path / "late.txt.gz").write_bytes(gzip.compress(b"a line\n" * 50_000 + b"\xff" + b"a line\n" * 50_000))
    (tmp_path / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "number.parquet")


@pytest.mark.parametrize(
    "corpus, message",
    [
        ("latin.txt", r"latin\.txt: not UTF-8 \(unexpected end of data, at byte 3\)\."),
        ("broken.jsonl", r"broken\.jsonl:2: not a line of JSON"),
        ("keyless.jsonl", r'keyless\.jsonl:1: has no text at the key data.text_key = "text"; there are body'),
        ("number.jsonl", r"number\.jsonl:1: has no text .* it has no key with a text"),
        ("cut.jsonl.gz", r"cut\.jsonl\.gz: the compressed file is damaged"),
        ("not.jsonl.xz", r"not\.jsonl\.xz: the compressed file is damaged"),
        ("not.parquet", r"not\.parquet: can't be read as \.parquet"),
        ("bytes.txt", r"bytes\.txt: not UTF-8 \(invalid start byte, at byte 0\)\."),
        ("late.txt.gz", r"late\.txt\.gz: not UTF-8 \(invalid start byte, at byte 350,000\)\."),
        ("surrogate.jsonl", r"surrogate\.jsonl:1: the text has half of a surrogate pair"),
        ("deep.jsonl", r"deep\.jsonl:1: not a line of JSON"),
        ("number.parquet", r'number\.parquet: the column data.text_key = "text" is int64; it must be a string.'),
        ("", r'data.corpus: ".*" is a folder; name its files, as in ".*\*"'),
        ("empty.txt", "data.corpus: there is no text in .*empty.txt"),
        ("one.txt", "data.corpus: it is one document, which can't be split"),
        ("nothing*.txt", r'data.corpus: no file matches ".*nothing\*.txt"'),
    ],
)
def test_a_mistake_in_the_corpus_is_one_sentence(tmp_path, corpus, message):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path, str(tmp_path / corpus))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache" / "corpora").exists() or folders(tmp_path) == []


@pytest.mark.parametrize(
    "documents, message",
    [
        (["text", 5], "gave 5; a document is a text, or"),
        (["text", ("text", "test")], "gave .'text', 'test'.; a document is"),
        (["text", ("text", "val", 3)], "gave .'text', 'val', 3.; a document is"),
        (["text", None], "gave None; a document is"),
        (["text", "\ud800"], "odd: the text has half of a surrogate pair"),
        (["text", ("\ud800", "val")], "odd: the text has half of a surrogate pair"),
        (None, "gave None; it must give documents one by one"),
    ],
)
def test_a_dataset_gives_texts_or_a_text_and_its_part(tmp_path, documents, message):
    (tmp_path / "odd.py").write_text(
        "from dataclasses import dataclass\nfrom nanopre import hookimpl\n"
        '@dataclass\nclass Odd:\n    """Odd."""\n'
        f"    def documents(self):\n        return {documents!r}\n"
        "    def fingerprint(self):\n        return '1'\n"
        "@hookimpl\ndef nanopre_datasets(register):\n    register('odd', Odd)\n"
    )
    config, registry = configs.from_dict(
        {"plugins": [str(tmp_path / "odd.py")], "data": {"corpus": "odd", "cache_dir": str(tmp_path / "cache")},
         "tokenizer": {"name": "bytes"}}, "test")  # fmt: skip
    with pytest.raises(UserError, match=f"data.corpus: the dataset .*{message}"):
        corpora.prepare(config, registry, progress=False)


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    config, registry = configs.from_dict({"data": {"cache_dir": str(tmp_path / "file")}}, "test")
    with pytest.raises(UserError, match="data.cache_dir: the folder .*file can't be made .File exists."):
        corpora.prepare(config, registry, progress=False)


def forbid(*folders: Path):
    """In place of os.access and Path.mkdir: these folders are read-only, as no folder is to root."""
    def access(path, mode):
        return not (mode & os.W_OK and Path(path) in folders)

    def mkdir(path, *_, original=Path.mkdir, **options):
        if path.parent in folders and not path.exists():
            raise PermissionError(13, "Permission denied", str(path))
        original(path, *_, **options)

    return access, mkdir


@pytest.mark.parametrize(
    "name, there, problem",
    [
        ("bytes", "", "cache/corpora can't be made .Permission denied."),
        ("bytes", "corpora", "cache/corpora can't be written to"),
        ("chars", "", "cache/tokenizers can't be made .Permission denied."),
        ("chars", "tokenizers", "cache/tokenizers can't be written to"),
    ],
)
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, name, there, problem):
    write_jsonl(tmp_path / "a.jsonl")
    cache = tmp_path / "cache"
    (cache / there).mkdir(parents=True)
    access, mkdir = forbid(cache, cache / there)
    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(UserError, match=f"data.cache_dir: the folder .*{problem}"):
        prepare(tmp_path, f"{tmp_path}/a.jsonl", tokenizer={"name": name})


def test_a_read_only_cache_serves_what_is_in_it(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl")
    written = prepare(tmp_path, f"{tmp_path}/a.jsonl")
    (tmp_path / "cache" / "hashes.json").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert prepare(tmp_path, f"{tmp_path}/a.jsonl").fingerprint == written.fingerprint
    assert not (tmp_path / "cache" / "hashes.json").exists()


def test_a_misspelt_dataset_gets_the_nearest_name(tmp_path):
    with pytest.raises(UserError, match="did you mean stdlib"):
        prepare(tmp_path, "stdlb")


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


def test_stdlib_is_the_interpreters_modules_without_its_tests(tmp_path):
    _, registry = configs.from_dict({}, "test.toml")
    dataset = registry.get("dataset", "stdlib", "test")()
    names = [file.name for file in dataset.files()]
    parts = {part for file in dataset.files() for part in file.parts}
    assert {"argparse.py", "ast.py", "threading.py"} <= set(names)
    assert not parts & {"test", "tests", "idlelib", "site-packages", "turtledemo"}
    texts = list(dataset.documents())
    assert len(texts) == len(names) > 400
    import argparse

    assert Path(argparse.__file__).read_text(encoding="utf-8") in texts
    assert dataset.fingerprint() == dataset.fingerprint()


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare (shared/data/text) is not here")
def test_shakespeare_from_a_copy_splits_as_nanogpt_does(tmp_path):
    corpus = prepare(tmp_path, {"name": "shakespeare", "path": str(SHAKESPEARE)}, tokenizer={"name": "chars"})
    text = SHAKESPEARE.read_text()
    # nanoGPT's prepare.py reports 1,003,854 and 111,540 characters; each document ends in a token of its own.
    assert (corpus.train.n_tokens - 1, corpus.val.n_tokens - 1) == (1_003_854, 111_540)
    assert corpus.tokenizer.n_vocab == 65 + 105
    assert documents(corpus.val, corpus.tokenizer) == [text[1_003_854:]]
    # BERT's and T5's objectives draw from sentences.
    assert len(corpus.train.sentences) > 10_000


def test_shakespeare_without_a_network_or_with_another_text_says_so(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    options = {"name": "shakespeare", "path": str(tmp_path / "new" / "input.txt")}
    message = r"can't be downloaded from https://.*no route to host.*--data.corpus.path=FILE"
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path, options)
    assert "\n" not in str(error.value)
    (tmp_path / "other.txt").write_text("To be")
    with pytest.raises(UserError, match="other.txt is not tinyshakespeare"):
        prepare(tmp_path, {**options, "path": str(tmp_path / "other.txt")})
    with pytest.raises(UserError, match="can't be read or written .Is a directory."):
        prepare(tmp_path, {**options, "path": str(tmp_path)})


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare (shared/data/text) is not here")
def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    class Response:
        content = SHAKESPEARE.read_bytes()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self):
            return self.content

    _, registry = configs.from_dict({}, "test.toml")
    dataset = registry.get("dataset", "shakespeare", "test")(path=str(tmp_path / "new" / "input.txt"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response())
    first = list(dataset.documents())
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("downloaded again"))
    assert list(dataset.documents()) == first
    Response.content = b"a login page"
    (tmp_path / "new" / "input.txt").unlink()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response())
    with pytest.raises(UserError, match="is not tinyshakespeare"):
        list(dataset.documents())


@pytest.mark.slow
def test_memory_stays_small_while_a_large_corpus_is_tokenised(tmp_path):
    """300 MB of text, in one file: the process's peak is far below the text and does not grow with it."""
    digest = hashlib.sha256()
    with open(tmp_path / "big.txt", "w") as stream:
        for i in range(300):
            digest.update(bytes([i % 256]))
            words = [digest.hexdigest()[j : j + 5] for j in range(0, 60, 5)]
            stream.writelines(" ".join(words[(k + i) % 12] for k in range(12)) + f" {k}\n" for k in range(1_000_000 // 80))
    size = (tmp_path / "big.txt").stat().st_size

    def peak(corpus: str) -> int:
        code = f"""
import resource
from nanopre import config, corpus
table = {{"data": {{"corpus": "{tmp_path}/{corpus}", "cache_dir": "{tmp_path}/cache"}}, "tokenizer": {{"name": "bytes"}}}}
made = corpus.prepare(*config.from_dict(table, "t.toml"), progress=False)
print(made.train.n_tokens + made.val.n_tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
        assert result.returncode == 0, result.stderr
        n_tokens, kilobytes = map(int, result.stdout.split())
        assert n_tokens > (tmp_path / corpus).stat().st_size
        return kilobytes * 1024

    (tmp_path / "small.txt").write_bytes((tmp_path / "big.txt").read_bytes()[: size // 10])
    small, large = peak("small.txt"), peak("big.txt")
    assert large < 1e9
    assert large - small < 0.2 * size
