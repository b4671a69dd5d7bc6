"""How answers are judged: accuracy, and F1 and exact match of free text.

F1 and exact match are those of SQuAD (Rajpurkar et al., arXiv:1606.05250): over words, without
case, punctuation and articles; the best over all right answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_ANSWER = ("no answer", "CANNOTANSWER")  # what a question without an answer is answered with


def normalised(text: str) -> str:
    """`text` in lower case, without punctuation, articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1 where `predicted` is one of `answers`, once both are normalised; 0 otherwise."""
    return float(normalised(predicted) in {normalised(answer) for answer in answers})


def f1(predicted: str, answers: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words; the best over `answers`."""
    if answers[0] in _NO_ANSWER:
        return exact_match(predicted, answers[:1])
    return max(_overlap(normalised(predicted).split(), normalised(a).split()) for a in answers)


def accuracy(predicted: int, correct: Sequence[int]) -> float:
    """1 where the candidate `predicted` is among those that are right, 0 otherwise."""
    return float(predicted in correct)


def mean(values: Sequence[float]) -> float:
    """Mean of a metric over examples, at least one."""
    return sum(values) / len(values)


def _overlap(predicted: list[str], answer: list[str]) -> float:
    common = (Counter(predicted) & Counter(answer)).total()
    return 2 * common / (len(predicted) + len(answer)) if common else 0.0
