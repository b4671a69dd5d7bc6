"""Task of the demo: does the author of a review recommend the product?

A prompt is a review and a question, and the model's next word is the answer:

    the soup was delightful . we drove there on friday . would you recommend it ? yes

The splits share no review, and the words of praise and blame in "test" do not occur in "train".
Importing this module adds the task to `TASKS`.
"""

from __future__ import annotations

from pathlib import Path

from zo2ext.demo import corpus
from zo2ext.tasks.table import TASKS
from zo2ext.tasks.task import Row, Sizes, Task

MODEL_DIR = Path(__file__).parent / "model"
"""The packaged model, pretrained by ``scripts/pretrain_demo_model.py`` on text from `corpus`. It
has never seen the question."""


def rows() -> dict[str, list[Row]]:
    """Return the reviews: the same on every machine, and no two alike."""
    splits = {
        "train": corpus.reviews(1280, seed=1, part="seen"),
        "test": corpus.reviews(512, seed=2, part="unseen"),
    }
    return {
        split: [{"text": review.text, "mood": review.mood} for review in reviews]
        for split, reviews in splits.items()
    }


REVIEWS = TASKS["reviews"] = Task(
    title="Reviews",
    prompt=f"{{text}} {corpus.QUESTION}",
    label="mood",
    classes=tuple((mood, corpus.ANSWERS[mood]) for mood in ("bad", "good")),
    rows=rows,
    sizes=Sizes(train=1024, dev=256, test=512),
)
