"""Questions on paragraphs, from a file in SQuAD's format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanopre import UserError, hookimpl


@dataclass
class SQuAD:
    """SQuAD 1.1 or 2.0 (Rajpurkar et al., 2016 and 2018): question, context, answer and answer_start of each question."""

    path: str = ""  # the .json file

    def articles(self) -> list[dict]:
        try:
            return json.loads(Path(self.path).read_text(encoding="utf-8"))["data"]
        except OSError as error:
            raise UserError(
                f"data.corpus: the file {self.path!r} can't be read ({error.strerror}); give it as --data.corpus.path=FILE."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"data.corpus: {self.path} is not in SQuAD's format ({type(error).__name__}: {error}).") from None

    def records(self) -> Iterator[dict[str, str]]:
        """A question with several answers has the first of them; one without has "" and "-1"."""
        for article in self.articles():
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answer = qa["answers"][0] if qa["answers"] else {"text": "", "answer_start": -1}
                    yield {
                        "question": qa["question"],
                        "context": paragraph["context"],
                        "answer": answer["text"],
                        "answer_start": str(answer["answer_start"]),
                    }

    def documents(self) -> Iterator[str]:
        return (paragraph["context"] for article in self.articles() for paragraph in article["paragraphs"])

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.articles()).encode()).hexdigest()


@hookimpl
def nanopre_datasets(register):
    register("squad", SQuAD)
