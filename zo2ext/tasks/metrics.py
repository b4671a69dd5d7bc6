"""Metrics of answers: accuracy, and F1 and exact match of free text.

F1 and exact match are those of SQuAD (Rajpurkar et al., arXiv:1606.05250): over words, ignoring
case, punctuation and articles, and the best over all right answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_ANSWER = ("no answer", "CANNOTANSWER")  # the right answer to an unanswerable question


def normalize(text: str) -> str:
    """Return `text` in lower case, without punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """Return 1 if `predicted` equals one of `answers` after normalization, otherwise 0."""
    return float(normalize(predicted) in {normalize(answer) for answer in answers})


def f1(predicted: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, the best over `answers`."""
    if answers[0] in _NO_ANSWER:
        return exact_match(predicted, answers[:1])
    return max(_overlap(normalize(predicted).split(), normalize(a).split()) for a in answers)


def accuracy(predicted: int, correct: Sequence[int]) -> float:
    """Return 1 if the index `predicted` is in `correct`, otherwise 0."""
    return float(predicted in correct)


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return sum(values) / len(values)


def _overlap(predicted: list[str], answer: list[str]) -> float:
    common = (Counter(predicted) & Counter(answer)).total()
    return 2 * common / (len(predicted) + len(answer)) if common else 0.0
