"""Sentence polarity: 10,662 sentences of film reviews, half of them positive."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanopre import UserError, hookimpl

HOME = "https://www.cs.cornell.edu/people/pabo/movie-review-data/"


@dataclass
class SentencePolarity:
    """Film-review sentences with the labels "positive" and "negative" (Pang and Lee, 2005), or the sentences as text."""

    path: str = ""  # the folder of rt-polarity.pos and rt-polarity.neg

    def lines(self, name: str) -> list[str]:
        file = Path(self.path) / name
        try:
            return [line.strip() for line in file.read_text(encoding="latin-1").split("\n") if line.strip()]
        except OSError as error:
            raise UserError(
                f"data.corpus: {file} can't be read ({error.strerror}); get rt-polaritydata from {HOME} and give its folder as "
                "--data.corpus.path=FOLDER."
            ) from None

    def records(self) -> Iterator[dict[str, str]]:
        for label, name in (("positive", "rt-polarity.pos"), ("negative", "rt-polarity.neg")):
            for sentence in self.lines(name):
                yield {"sentence": sentence, "label": label}

    def documents(self) -> Iterator[str]:
        return (record["sentence"] for record in self.records())

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self.documents()).encode()).hexdigest()


@hookimpl
def nanopre_datasets(register):
    register("sentence_polarity", SentencePolarity)
