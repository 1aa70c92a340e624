"""Exact match and token F1 of a text against the right one, as SQuAD's evaluation defines them (Rajpurkar et al., 2016,
section 6.1)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, truth: str) -> float:
    return float(normalise(prediction) == normalise(truth))


def token_f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it occurs. Without any word on one
    side it is 1 if the other has none either."""
    predicted, right = normalise(prediction).split(), normalise(truth).split()
    if not predicted or not right:
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right))


def score(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """The means over (prediction, truth) pairs; none of both is 0."""
    pairs = list(pairs)
    return {
        "exact_match": sum(exact_match(*pair) for pair in pairs) / max(1, len(pairs)),
        "f1": sum(token_f1(*pair) for pair in pairs) / max(1, len(pairs)),
    }
