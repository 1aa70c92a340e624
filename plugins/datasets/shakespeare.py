"""tinyshakespeare: 1.1 MB of Shakespeare's plays, the corpus of char-rnn and nanoGPT."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanopre import UserError, hookimpl

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class Shakespeare:
    """tinyshakespeare, downloaded once; the first 90% of the characters train, the rest validates, as in nanoGPT."""

    path: str = "cache/tinyshakespeare.txt"  # of input.txt, which is downloaded to there where it is missing

    def text(self) -> str:
        file = Path(self.path)
        try:
            content = file.read_bytes() if file.exists() else self.download(file)
        except OSError as error:
            raise UserError(f"data.corpus: {file} can't be read or written ({error.strerror}).") from None
        if (found := hashlib.sha256(content).hexdigest()) != SHA256:
            hashes = f"its sha256 is {found[:12]}..., not {SHA256[:12]}..."
            raise UserError(f"data.corpus: {file} is not tinyshakespeare ({hashes}).")
        return content.decode()

    def download(self, file: Path) -> bytes:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                content = response.read()
        except (urllib.error.URLError, TimeoutError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"data.corpus: tinyshakespeare can't be downloaded from {URL} ({reason}); where there is no network, give a "
                "copy as --data.corpus.path=FILE."
            ) from None
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, file)
        return content

    def documents(self) -> Iterator[tuple[str, str]]:
        text = self.text()
        cut = int(0.9 * len(text))
        yield text[:cut], "train"
        yield text[cut:], "val"

    def fingerprint(self) -> str:
        return SHA256


@hookimpl
def nanopre_datasets(register):
    register("shakespeare", Shakespeare)
