"""Examples to fine-tune on: records with named columns of text, as .jsonl and .tsv files have them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nanopre.tokenizer import Tokenizer


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
