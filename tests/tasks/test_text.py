"""Windows of a text: which tokens train, which are held out, and what a batch depends on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zo2ext.tasks.text import TextData, held_out_loss, load_text

timeless = settings(deadline=None)  # on a busy machine, any call may take long


def characters(text: str) -> list[int]:
    """A tokenizer: a token a character."""
    return [ord(c) for c in text]


def data(train: int = 100, held_out: int = 50, seq_len: int = 8) -> TextData:
    """Tokens that are all different: the held-out ones continue the training ones."""
    tokens = torch.arange(train + held_out)
    return TextData(tokens[:train], tokens[train:], seq_len)


@timeless
@given(
    seq_len=st.integers(2, 20),
    more=st.integers(0, 100),
    batch_size=st.integers(1, 9),
    step=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_batch_is_windows_of_the_training_tokens(
    seq_len: int, more: int, batch_size: int, step: int, seed: int
) -> None:
    text = data(train=seq_len + more, held_out=seq_len, seq_len=seq_len)
    batch = text.batch(step, batch_size=batch_size, seed=seed)
    assert batch.shape == (batch_size, seq_len)
    assert batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all(), "tokens of a window are neighbours"
    assert batch.min() >= 0
    assert batch.max() < seq_len + more, "a held-out token was trained on"


@timeless
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32))
def test_a_batch_is_a_function_of_seed_and_step(seed: int, step: int) -> None:
    def batch(seed: int, step: int) -> list[list[int]]:
        return data(train=10**6).batch(step, batch_size=4, seed=seed).tolist()

    torch.manual_seed(seed % 2**32)  # of no influence
    assert batch(seed, step) == batch(seed, step)
    assert batch(seed, step) != batch(seed, step + 1)
    assert batch(seed, step) != batch((seed + 1) % 2**64, step)


def test_every_window_can_be_drawn() -> None:
    starts = data(train=10, seq_len=8).batch(0, batch_size=200, seed=0)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


@timeless
@given(
    held_out=st.integers(5, 200),
    seq_len=st.integers(2, 5),
    batch_size=st.integers(1, 9),
    windows=st.integers(1, 60),
)
def test_held_out_windows_lie_side_by_side(
    held_out: int, seq_len: int, batch_size: int, windows: int
) -> None:
    text = data(train=10, held_out=held_out, seq_len=seq_len)
    batches = list(text.held_out_batches(batch_size=batch_size, windows=windows))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size
    rows = torch.cat(batches)
    assert len(rows) == min(windows, text.held_out_windows)
    starts = (rows[:, 0] - 10).tolist()
    assert rows.tolist() == [list(range(10 + s, 10 + s + seq_len)) for s in starts]
    assert all(s % seq_len == 0 for s in starts)
    gaps = {(b - a) // seq_len for a, b in pairwise(starts)}
    assert all(gap >= 1 for gap in gaps)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1, "spread evenly"


def test_the_loss_is_a_mean_over_windows_whatever_the_batches() -> None:
    text = data(held_out=8 * 7 + 3)

    def model(input_ids: Tensor, labels: Tensor, use_cache: bool) -> SimpleNamespace:
        assert torch.equal(input_ids, labels)
        assert not torch.is_grad_enabled()
        return SimpleNamespace(loss=input_ids.float().mean())

    expected = text.held_out[: 8 * 7].float().mean().item()
    for batch_size in (1, 3, 7, 100):
        loss = held_out_loss(
            model, text, batch_size=batch_size, windows=7, device=torch.device("cpu")
        )
        assert loss == pytest.approx(expected, rel=1e-6)


# -- reading


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("length", [100, 101, 105, 109, 1000])
def test_the_last_tenth_of_the_characters_is_held_out(length: int, tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + i) for i in range(length))  # three bytes a character
    loaded = load_text(written(tmp_path, text), characters, seq_len=2)
    assert loaded.train.tolist() + loaded.held_out.tolist() == characters(text)
    assert abs(len(loaded.held_out) - length / 10) <= 0.5
    assert loaded.max_token == ord(text[-1])


def test_a_byte_order_mark_is_no_token_and_lines_end_alike(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbfab\r\n" + b"c" * 17)
    assert load_text(path, characters, seq_len=2).train[:3].tolist() == characters("ab\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\t ", "is empty"),
        (b"abc\xff", "is not UTF-8: .* byte 0xff in position 3: invalid start byte"),
        ("a" * 8, "is too short: 7 tokens in its first nine tenths, but .*seq_len.* has 8"),
        ("a" * 70, "is too short: 7 tokens in its last tenth, but .*seq_len.* has 8"),
    ],
    ids=["empty", "blank", "latin", "short", "short-held-out"],
)
def test_texts_of_no_use_are_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=rf"^text '.*text\.txt' {message}"):
        load_text(path, characters, seq_len=8)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "TSV", "parquet"])
def test_tables_are_no_prose(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_text("text,label\na,1\n" * 40)
    with pytest.raises(ValueError, match=rf"is a table \(\.{ending}\); expected prose: write"):
        load_text(path, characters, seq_len=2)


def test_the_shortest_text_makes_one_window_each(tmp_path: Path) -> None:
    loaded = load_text(written(tmp_path, "a" * 80), characters, seq_len=8)
    assert loaded.held_out_windows == 1


def test_a_tokenizer_that_makes_nothing_is_met_with_the_same_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too short: 0 tokens in its first nine tenths"):
        load_text(written(tmp_path, "abc"), lambda _: [], seq_len=2)
