"""Answers of a model: its most likely candidate, or the text that it generates; in batches.

As in MeZO (arXiv:2305.17333), the score of a candidate is the mean log-likelihood of its tokens,
and text is generated greedily up to the end of the line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zo2ext.tasks import metrics
from zo2ext.tasks.encoding import Encoded, Text
from zo2ext.tasks.task import Kind, Task

Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Answerer:
    """A model that answers the examples of one task.

    Attributes:
        model: Causal language model in evaluation mode.
        tokenizer: Tokenizer of the model.
        task: Task of the examples.
        device: Device of the model's inputs.
    """

    model: Any
    tokenizer: Any
    task: Task
    device: torch.device

    # -- objectives

    def likelihood_loss(self, examples: Sequence[Encoded]) -> Tensor:
        """Return the cross-entropy of the right candidates' tokens, in nats per token."""
        right = [e.candidates[e.example.correct[0]] for e in examples]
        return -torch.cat(self.log_likelihoods(right)).mean()

    def choice_loss(self, examples: Sequence[Encoded]) -> Tensor:
        """Return the cross-entropy of the right candidate over the scores of all, in nats."""
        scores = self._scores_by_example(examples)
        losses = [
            F.cross_entropy(score, torch.tensor(e.example.correct[0], device=score.device))
            for score, e in zip(scores, examples, strict=True)
        ]
        return torch.stack(losses).mean()

    def metric_loss(self, examples: Sequence[Encoded]) -> float:
        """Return minus the task's metric; it has no gradient."""
        return -metrics.mean(self._judge(examples, self._answers(examples))[self.task.metric])

    # -- evaluation

    @torch.no_grad()
    def evaluate(
        self, examples: Sequence[Encoded], *, batch_size: int, progress: Progress = iter
    ) -> dict[str, float]:
        """Return the task's metrics over `examples`: accuracy, or F1 and exact match ("em").

        Args:
            examples: At least one example.
            batch_size: Texts per batch; an example has one per candidate.
            progress: Function that wraps the list of batches, such as a progress bar.
        """
        if self.task.kind is Kind.GENERATION:
            answers = self._in_batches(
                [e.prompt for e in examples], self.written, batch_size, progress
            )
        else:
            texts = [text for e in examples for text in e.candidates]
            scores = self._in_batches(
                texts, lambda part: self._scores(part).tolist(), batch_size, progress
            )
            counts = [len(e.candidates) for e in examples]
            answers = [int(part.argmax()) for part in torch.tensor(scores).split(counts)]
        judged = self._judge(examples, answers)
        return {name: metrics.mean(values) for name, values in judged.items()}

    def log_likelihoods(self, texts: Sequence[Text]) -> list[Tensor]:
        """Return the log-likelihood of each answer token, a tensor of shape (answer,) per text.

        Texts are padded on the right, where a causal model's other tokens do not see the padding.
        """
        width = max(len(text.ids) for text in texts)
        ids = torch.full((len(texts), width), self._pad_token)
        mask = torch.zeros_like(ids)
        rows: list[int] = []
        places: list[int] = []
        targets: list[int] = []
        for row, text in enumerate(texts):
            length = len(text.ids)
            ids[row, :length] = torch.tensor(text.ids)
            mask[row, :length] = 1
            rows += [row] * text.answer
            places += range(length - text.answer - 1, length - 1)  # each predicts the next token
            targets += text.ids[length - text.answer :]
        # With a large vocabulary, the logits of complete prompts would need most of the memory.
        fewer = {"logits_to_keep": width - min(places)} if self._can_keep_logits else {}
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            use_cache=False,
            **fewer,
        ).logits
        places = [place - (width - logits.shape[1]) for place in places]
        at_row, at_place, target = torch.tensor([rows, places, targets], device=self.device)
        predicted = logits[at_row, at_place].float()
        chosen = predicted.log_softmax(-1).gather(1, target[:, None])[:, 0]
        return list(chosen.split([text.answer for text in texts]))

    def written(self, prompts: Sequence[Text]) -> list[str]:
        """Return the text that the model generates after each prompt, up to the end of the line.

        Decoding is greedy. Prompts are padded on the left.
        """
        width = max(len(prompt.ids) for prompt in prompts)
        ids = torch.full((len(prompts), width), self._pad_token)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
        tokens = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.task.max_new_tokens,
            eos_token_id=self._stop_tokens,
            pad_token_id=self._pad_token,
        )
        texts = self.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        return [text.strip().partition("\n")[0].strip() for text in texts]

    # --

    def _answers(self, examples: Sequence[Encoded]) -> list[Any]:
        if self.task.kind is Kind.GENERATION:
            return self.written([e.prompt for e in examples])
        return [int(scores.argmax()) for scores in self._scores_by_example(examples)]

    def _judge(self, examples: Sequence[Encoded], answers: Sequence[Any]) -> dict[str, list[float]]:
        pairs = [(answer, e.example) for answer, e in zip(answers, examples, strict=True)]
        if self.task.kind is Kind.GENERATION:
            return {
                "f1": [metrics.f1(answer, example.answers) for answer, example in pairs],
                "em": [metrics.exact_match(answer, example.answers) for answer, example in pairs],
            }
        return {"accuracy": [metrics.accuracy(answer, e.correct) for answer, e in pairs]}

    def _scores(self, texts: Sequence[Text]) -> Tensor:
        return torch.stack([part.mean() for part in self.log_likelihoods(texts)])

    def _scores_by_example(self, examples: Sequence[Encoded]) -> list[Tensor]:
        scores = self._scores([text for e in examples for text in e.candidates])
        return list(scores.split([len(e.candidates) for e in examples]))

    def _in_batches(
        self,
        texts: Sequence[Text],
        answer: Callable[[Sequence[Text]], Any],
        size: int,
        progress: Progress,
    ) -> list[Any]:
        """Apply `answer` to batches of texts of similar lengths; return in the order of `texts`."""
        longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
        starts = range(0, len(texts), size)
        answers: dict[int, Any] = {}
        for batch in progress([longest_first[start : start + size] for start in starts]):
            answers.update(zip(batch, answer([texts[i] for i in batch]), strict=True))
        return [answers[i] for i in range(len(texts))]

    @property
    def _can_keep_logits(self) -> bool:
        """Whether the model can compute the logits of the last tokens only."""
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @property
    def _pad_token(self) -> int:
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def _stop_tokens(self) -> list[int] | None:
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]  # if it has one
        end = self.tokenizer.eos_token_id
        return [*newline, *([] if end is None else [end])] or None
