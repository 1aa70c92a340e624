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

    def paragraphs(self) -> list[tuple[str, list[dict[str, str]]]]:
        """(context, the records of its questions) of each paragraph."""
        try:
            articles = json.loads(Path(self.path).read_text(encoding="utf-8"))["data"]
            paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
            return [(p["context"], [record(p["context"], qa) for qa in p["qas"]]) for p in paragraphs]
        except OSError as error:
            raise UserError(
                f"data.corpus: the file {self.path!r} can't be read ({error.strerror}); give it as --data.corpus.path=FILE."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"data.corpus: {self.path} is not in SQuAD's format ({type(error).__name__}: {error}).") from None

    def records(self) -> Iterator[dict[str, str]]:
        for _, records in self.paragraphs():
            yield from records

    def documents(self) -> Iterator[str]:
        return (context for context, _ in self.paragraphs())

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.paragraphs()).encode()).hexdigest()


def record(context: str, qa: dict) -> dict[str, str]:
    """A question with several answers has the first of them; one without has "" and "-1"."""
    answer = qa["answers"][0] if qa["answers"] else {"text": "", "answer_start": -1}
    return {
        "question": qa["question"],
        "context": context,
        "answer": answer["text"],
        "answer_start": str(answer["answer_start"]),
    }


@hookimpl
def nanopre_datasets(register):
    register("squad", SQuAD)
