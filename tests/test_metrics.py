"""Exact match and F1 against cases worked out by hand from SQuAD's definition."""

import pytest

from nanopre.metrics import exact_match, normalise, score, token_f1


@pytest.mark.parametrize(
    "prediction, truth, exact, f1",
    [
        ("the Cat", "cat", 1, 1),  # articles and case
        ("A  cat, an owl!", "cat owl", 1, 1),  # punctuation and white space
        ("theory", "ory", 0, 0),  # an article is a word of its own
        ("cat dog", "cat", 0, 2 / 3),  # precision 1/2, recall 1
        ("cat cat dog", "cat owl owl", 0, 1 / 3),  # a repeated word is common as often as both have it: 1 of 3 and 3
        ("", "", 1, 1),
        ("the", "", 1, 1),
        ("", "cat", 0, 0),
        ("U.S.", "us", 1, 1),  # punctuation goes without a space in its place
    ],
)
def test_scores_follow_the_definition(prediction, truth, exact, f1):
    assert exact_match(prediction, truth) == exact
    assert token_f1(prediction, truth) == pytest.approx(f1)
    assert token_f1(truth, prediction) == pytest.approx(f1)


def test_means_are_over_pairs():
    assert score([("a cat", "cat"), ("dog", "cat owl")]) == {"exact_match": 0.5, "f1": 0.5}
    assert score([]) == {"exact_match": 0, "f1": 0}
    assert normalise("The  quick, brown FOX.") == "quick brown fox"
