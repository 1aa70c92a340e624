"""The source text of the Python standard library of the running interpreter: a corpus that needs no download."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanopre import hookimpl

LEFT_OUT = {"test", "tests", "idlelib", "idle_test", "turtledemo", "_bundled", "site-packages", "dist-packages", "__pycache__"}


@dataclass
class StandardLibrary:
    """The modules of Python's standard library, without its tests: about 10 MB of source text."""

    def files(self) -> list[Path]:
        folder = Path(sysconfig.get_path("stdlib"))
        files = (file.relative_to(folder) for file in folder.rglob("*.py"))
        return [folder / file for file in sorted(files) if not LEFT_OUT.intersection(file.parts)]

    def documents(self) -> Iterator[str]:
        for file in self.files():
            yield file.read_text(encoding="utf-8", errors="replace")  # a few old modules are in Latin-1

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file in self.files():
            digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()


@hookimpl
def nanopre_datasets(register):
    register("stdlib", StandardLibrary)
