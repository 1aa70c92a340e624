"""Text to token ids and back, by tiktoken: bytes, characters, a BPE trained on the corpus, or GPT-2's; and, in models
that were imported, WordPiece and Unigram by the library that made them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from nanopre import UserError

SPECIAL_TOKENS = ["<|endoftext|>", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"<extra_id_{i}>" for i in range(100))]
"""In every vocabulary, after the ordinary tokens, so that one corpus serves every objective."""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# GPT-4's way to cut text into words, with numbers in pieces of at most two digits, which suits a small vocabulary.
BPE_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
CHARACTER_PATTERN = r"(?s:.)"


class Tokenizer:
    """A tiktoken encoding: ordinary tokens with ids 0 .. n-1, followed by SPECIAL_TOKENS. Make one with `build`."""

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.n_vocab = encoding.n_vocab
        self.eot, self.pad, self.cls, self.sep, self.mask = map(encoding.encode_single_token, SPECIAL_TOKENS[:5])
        self.sentinels = np.arange(self.mask + 1, self.n_vocab)
        self.bytes_per_token = np.zeros(self.n_vocab, dtype=np.int64)  # special tokens stand for no bytes of the text
        for token, i in self._ranks.items():
            self.bytes_per_token[i] = len(token)
        # Of a character vocabulary each token is one character, and there is no way to spell another one.
        self._alphabet = {token.decode() for token in self._ranks} if encoding.name == "chars" else None

    @classmethod
    def build(cls, name: str, pattern: str, ranks: dict[bytes, int]) -> Tokenizer:
        """`name` "chars" marks a vocabulary of characters; `pattern` cuts text into the pieces that tokens stay within."""
        specials = {special: len(ranks) + i for i, special in enumerate(SPECIAL_TOKENS)}
        return cls(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials))

    @property
    def _ranks(self) -> dict[bytes, int]:
        return self.encoding._mergeable_ranks

    def encode(self, text: str) -> np.ndarray:
        """Ids (uint32). Text that looks like a special token is plain text. Raises UserError for a character that a
        character vocabulary does not have."""
        if self._alphabet and (unknown := set(text) - self._alphabet):
            c = min(unknown)
            raise UserError(f"the character {c!r} (U+{ord(c):04X}) is not among the vocabulary's {len(self._ranks)}.")
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, where each token ends in the UTF-8 text, in bytes)."""
        ids = self.encode(text)
        return ids, np.cumsum(self.bytes_per_token[ids])

    def decode(self, ids: Iterable[int]) -> str:
        return self.token_bytes(ids).decode(errors="replace")

    def token_bytes(self, ids: Iterable[int]) -> bytes:
        return self.encoding.decode_bytes([int(i) for i in ids])

    @property
    def fingerprint(self) -> str:
        """The start of a sha256 over all that decides the ids."""
        return hashlib.sha256(json.dumps(self._table()).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write one JSON file: the pattern, the tokens in base64 in the order of their ids."""
        Path(path).write_text(json.dumps(self._table(), indent=0), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer | LibraryTokenizer:
        """The tokenizer of a file that either kind has saved. Raises UserError."""
        try:
            table = json.loads(Path(path).read_text(encoding="utf-8"))
            if "model" in table:
                return LibraryTokenizer(table, str(path))
            ranks = {base64.b64decode(token): i for i, token in enumerate(table["tokens"])}
            return cls.build(table["name"], table["pattern"], ranks)
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a tokenizer that nanopre saved ({error}).") from None

    def _table(self) -> dict:
        tokens = [base64.b64encode(token).decode() for token in sorted(self._ranks, key=self._ranks.get)]
        return {"name": self.encoding.name, "pattern": self.encoding._pat_str, "tokens": tokens}


class LibraryTokenizer:
    """WordPiece (BERT) or Unigram (T5), which tiktoken can't express, by Hugging Face's `tokenizers`. To its users it is
    a Tokenizer; a special token that the vocabulary lacks is -1, and without sentinels there are none."""

    # What each special token is called in the vocabularies of BERT, T5 and their relatives.
    NAMES = {
        "eot": ("<|endoftext|>", "</s>", "[SEP]"),
        "pad": ("[PAD]", "<pad>"),
        "cls": ("[CLS]", "<s>"),
        "sep": ("[SEP]", "</s>"),
        "mask": ("[MASK]", "<mask>"),
    }

    def __init__(self, table: dict, where: str = "tokenizer.json"):
        """`table` is the content of a tokenizer.json of that library. Raises UserError, which names `where`."""
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError(f"{where}: needs the package tokenizers; run: pip install 'nanopre[hf]'.") from None
        # Truncation and padding are a batch's, not a text's.
        self.table = {**table, "truncation": None, "padding": None}
        try:
            self._decoder = tokenizers.Tokenizer.from_str(json.dumps(self.table))
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(self._without_special_tokens()))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{where}: not a tokenizer that the package tokenizers reads ({error}).") from None
        self._encoder.encode_special_tokens = True  # which means as plain text
        vocab = self._decoder.get_vocab(with_added_tokens=True)
        self.n_vocab = max(vocab.values()) + 1
        self.eot, self.pad, self.cls, self.sep, self.mask = (
            next((vocab[name] for name in names if name in vocab), -1) for names in self.NAMES.values()
        )
        sentinels = (vocab.get(f"<extra_id_{i}>") for i in range(100))
        self.sentinels = np.array([i for i in sentinels if i is not None], dtype=np.int64)
        if self.eot < 0:
            raise UserError(f"{where}: has none of the tokens {', '.join(self.NAMES['eot'])}, which end a text.")
        special = {token["id"] for token in table["added_tokens"] if token["special"]}
        self._bytes = [b""] * self.n_vocab
        self.bytes_per_token = np.zeros(self.n_vocab, dtype=np.int64)  # special tokens stand for no bytes of the text
        for token, i in vocab.items():
            self._bytes[i] = token.encode() if i in special else self._spelling(token)
            self.bytes_per_token[i] = 0 if i in special else len(self._bytes[i])

    def _without_special_tokens(self) -> dict:
        """The table with each special token of the model's own vocabulary under a name that no text has: Unigram would
        find a </s> in a text by itself. Those beside that vocabulary stay, so that ids do not move."""
        model = self.table["model"]
        names = model["vocab"] if isinstance(model["vocab"], dict) else {name for name, _ in model["vocab"]}
        added = self.table["added_tokens"]
        hidden = {token["content"] for token in added if token["special"] and token["content"] in names}
        hidden.discard(model.get("unk_token"))

        def rename(name: str) -> str:
            return f"{name}\uffff" if name in hidden else name

        if isinstance(model["vocab"], dict):
            vocab = {rename(name): i for name, i in model["vocab"].items()}
        else:
            vocab = [[rename(name), score] for name, score in model["vocab"]]
        visible = [token for token in added if token["content"] not in hidden]
        return {**self.table, "model": {**model, "vocab": vocab}, "added_tokens": visible, "post_processor": None}

    def _spelling(self, token: str) -> bytes:
        model = self.table["model"]
        if model["type"] == "WordPiece":
            prefix = model["continuing_subword_prefix"]
            return token.removeprefix(prefix).encode() if token.startswith(prefix) else f" {token}".encode()
        if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    def encode(self, text: str) -> np.ndarray:
        """Ids (uint32), without special tokens around them. Text that looks like a special token is plain text."""
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def encode_with_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, where each token ends in the UTF-8 text, in bytes): tokens do not spell the text, so that their own
        lengths do not tell."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        sizes = [len(c.encode()) for c in text] if not text.isascii() else np.ones(len(text), dtype=np.int64)
        before = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.uint32), before[ends]

    def decode(self, ids: Iterable[int]) -> str:
        """The text, up to what the tokens do not keep: WordPiece loses spaces, and capitals where it was made so."""
        return self._decoder.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, ids: Iterable[int]) -> bytes:
        """The tokens' own bytes, one after the other: each word with a space before it, the first one too."""
        return b"".join(self._bytes[i] for i in ids)

    @property
    def fingerprint(self) -> str:
        """The start of a sha256 over all that decides the ids."""
        return hashlib.sha256(json.dumps(self.table, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the library's own format."""
        Path(path).write_text(json.dumps(self.table, ensure_ascii=False), encoding="utf-8")


def bytes_tokenizer() -> Tokenizer:
    """Each byte of the UTF-8 text is a token."""
    return Tokenizer.build("bytes", CHARACTER_PATTERN, {bytes([i]): i for i in range(256)})


def characters_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Each character of the texts is a token."""
    alphabet = sorted(set().union(*texts))
    return Tokenizer.build("chars", CHARACTER_PATTERN, {c.encode(): i for i, c in enumerate(alphabet)})


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on the texts; `vocab_size` counts the special tokens too. Fewer tokens come out where
    the texts have too few different words."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=BPE_PATTERN)
    return Tokenizer.build("bpe", BPE_PATTERN, {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()})


def gpt2_tokenizer(path: str = "") -> Tokenizer:
    """GPT-2's 50,256 tokens, from a file of its ranks (base64 token and rank a line), or by tiktoken from the network."""
    if not path:
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # whatever the network's libraries raise
            raise UserError(
                f"tokenizer: GPT-2's tokens can't be downloaded ({type(error).__name__}); "
                "set tokenizer.path to a gpt2.tiktoken file."
            ) from None
        return Tokenizer.build("gpt2", GPT2_PATTERN, encoding._mergeable_ranks)
    try:
        lines = Path(path).read_bytes().splitlines()
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in (line.split() for line in lines)}
    except OSError as error:
        raise UserError(f"tokenizer.path: {path} can't be read ({error.strerror}).") from None
    except (ValueError, binascii.Error):
        raise UserError(f"tokenizer.path: {path} is not a file of ranks (base64 token and rank a line).") from None
    if len(ranks) != 50_256:
        raise UserError(f"tokenizer.path: {path} has {len(ranks):,} tokens, GPT-2 has 50,256.")
    return Tokenizer.build("gpt2", GPT2_PATTERN, ranks)
