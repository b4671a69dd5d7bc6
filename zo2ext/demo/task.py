"""The demo's fine-tuning task: does the writer of a review recommend the thing?

A prompt is a review and a question, and the model's next word is the answer:

    the soup was delightful . we drove there on friday . would you recommend it ? yes

The loss is the language model's at the answer, over the full vocabulary. An answer is right if it
is more likely than the other one. The splits share no review, and "test" uses only words of praise
and blame that do not occur in "train".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zo2ext.demo import corpus

MODEL_DIR = Path(__file__).parent / "model"
SIZES = {"train": 1024, "dev": 256, "test": 512}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Example:
    """A review as token ids: the prompt, then the answer as the last token."""

    review: corpus.Review
    input_ids: tuple[int, ...]


def load_model_and_tokenizer(
    directory: Path = MODEL_DIR,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the packaged language model, in float32 and in evaluation mode, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)


def prompt(text: str) -> str:
    """Return the text that the model continues with an answer."""
    return f"{text} {corpus.QUESTION}"


def answer_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the token id of each mood's answer."""
    vocabulary = tokenizer.get_vocab()
    return {mood: vocabulary[word] for mood, word in corpus.ANSWERS.items()}


def reviews(split: str) -> list[corpus.Review]:
    """Return the reviews of "train", "dev" or "test": the same on every machine, all different."""
    if split == "test":
        return corpus.reviews(SIZES["test"], seed=2, part="unseen")
    both = corpus.reviews(SIZES["train"] + SIZES["dev"], seed=1, part="seen")
    return both[: SIZES["train"]] if split == "train" else both[SIZES["train"] :]


def examples(split: str, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Return the tokenized examples of a split."""
    return [encode(review, tokenizer) for review in reviews(split)]


def encode(review: corpus.Review, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Tokenize a review with the question and its answer."""
    ids = tokenizer(prompt(review.text))["input_ids"]
    return Example(review, (*ids, answer_ids(tokenizer)[review.mood]))


def collate(batch: Sequence[Example]) -> Batch:
    """Return examples as a batch, padded on the right, with a label at the answer only."""
    width = max(len(example.input_ids) for example in batch)
    input_ids = torch.zeros(len(batch), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, example in enumerate(batch):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        attention_mask[row, :length] = 1
        labels[row, length - 1] = example.input_ids[-1]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def batches(dataset: Sequence[Example], size: int, seed: int) -> Iterator[Batch]:
    """Yield batches forever, in a new random order in every pass over the data."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(dataset), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield collate([dataset[i] for i in order[start : start + size]])


def loss_closure(model: PreTrainedModel, batch: Batch) -> Callable[[], torch.Tensor]:
    """Return a function that computes the loss of a batch."""
    return lambda: model(**batch).loss


class Judge:
    """Compares a model's answers with the right ones.

    Args:
        model: The packaged model, offloaded or not.
        tokenizer: Tokenizer of the model.
        device: Device of the model's inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device | str = "cpu",
    ) -> None:
        self._model, self._ids, self._device = model, answer_ids(tokenizer), device

    def __call__(self, dataset: Sequence[Example]) -> float:
        """Return the share of `dataset` whose right answer is more likely than the wrong one."""
        is_good = torch.tensor([example.review.mood == "good" for example in dataset])
        return ((self.margins(dataset) > 0) == is_good).float().mean().item()

    @torch.no_grad()
    def margins(self, dataset: Sequence[Example]) -> torch.Tensor:
        """Return log p("yes") - log p("no") of each example, on the CPU."""
        parts = []
        for start in range(0, len(dataset), 256):
            batch = collate(dataset[start : start + 256])
            last = batch["attention_mask"].sum(1) - 2  # position that predicts the answer
            inputs = {k: batch[k].to(self._device) for k in ("input_ids", "attention_mask")}
            logits = self._model(**inputs).logits.cpu()
            at_answer = logits[torch.arange(len(last)), last]
            parts.append(at_answer[:, self._ids["good"]] - at_answer[:, self._ids["bad"]])
        return torch.cat(parts)
