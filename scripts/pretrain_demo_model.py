"""Train the small language model in zo2ext/demo/model from scratch.

    python scripts/pretrain_demo_model.py

A Llama with three layers is trained on the text of zo2ext/demo/corpus.py for three minutes on one
core, with ordinary backpropagation and AdamW. Its tokens are the words of the grammar. Seeded:
the same machine and version of torch produce the same model; others may round differently.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zo2ext.demo import corpus
from zo2ext.demo.task import MODEL_DIR, REVIEWS

SPECIAL = ("<pad>", "<s>", "<unk>")  # tokens 0, 1, 2
WINDOW = 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of the grammar; <s> begins a text."""
    tokens = [*SPECIAL, *corpus.vocabulary()]
    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=128,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """Return a Llama with random weights, tied embeddings and a vocabulary of a multiple of 16."""
    config = LlamaConfig(
        vocab_size=(len(tokenizer) + 15) // 16 * 16,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 16,
        max_position_embeddings=128,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def rectangle(texts: list[list[int]]) -> torch.Tensor:  # [len(texts), WINDOW]
    """Return the first WINDOW tokens of every text, padded on the right with -100."""
    rows = torch.full((len(texts), WINDOW), -100)
    for row, ids in zip(rows, texts, strict=True):
        row[: len(ids)] = torch.tensor(ids[:WINDOW])
    return rows


def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss per token. Padding comes last, so no token attends to it."""
    return model(input_ids=rows.clamp(min=0), labels=rows).loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model directory")
    parser.add_argument("--paragraphs", type=int, default=corpus.PARAGRAPHS, help="number of them")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; may change last bits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = make_tokenizer()
    text = list(corpus.paragraphs(args.paragraphs, corpus.SEED))
    rows = rectangle(tokenizer(text)["input_ids"])
    held_out = min(256, len(rows) // 2)
    train, valid = rows[:-held_out], rows[-held_out:]
    model = make_model(tokenizer, args.hidden, args.layers)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(text)} paragraphs of {len(tokenizer)} words, {count} parameters", flush=True)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.steps, pct_start=0.05
    )
    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        loss = mean_loss(model, train[torch.randint(len(train), (args.batch_size,))])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == args.steps:
            with torch.no_grad():
                held = mean_loss(model, valid).item()
            seconds = time.perf_counter() - start
            print(f"step {step}: validation loss {held:.3f}, {seconds:.0f} s", flush=True)

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"accuracy before fine-tuning: zo2ext eval --task {REVIEWS.name} --model {args.out}")


if __name__ == "__main__":
    main()
