"""Rows as training data: what is read from each format, which tokens count, what is refused."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from zo2ext.demo.task import MODEL_DIR
from zo2ext.errors import UserError
from zo2ext.tasks.row_encoder import Columns, RowEncoder
from zo2ext.tasks.rows import IGNORED, Rows, collate, encode_rows, loss_of_rows, read_rows
from zo2ext.tasks.rows import split_rows as split

CHAT = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }} .{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)
ROWS = [
    {"id": 1, "prompt": "would you recommend it ?", "completion": " yes ."},
    {"id": 2, "prompt": "would you ?", "completion": " no ."},
    {"id": 3, "prompt": "it is .", "completion": " 4"},
]
HELLO = {"role": "user", "content": "would you"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no it danced"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the copies that ``datasets`` makes in a folder that is deleted."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def plain() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture
def chat() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.chat_template = CHAT
    return tokenizer


def encoded(
    tokenizer: Any, row: dict[str, Any], *, all_tokens: bool = False, **columns: str
) -> tuple[list[str], list[str]]:
    """The tokens of `row`, and those of them that count."""
    chosen = Columns(**columns).choose(list(row), "data")
    encoder = RowEncoder(tokenizer, chosen, "data", train_on_prompt=all_tokens)
    found = encoder.encode(row, 1)
    assert found is not None
    words = np.array(tokenizer.convert_ids_to_tokens(found.ids.tolist()))
    return words.tolist(), words[found.counts].tolist()


def encode(tokenizer: Any, rows: list[dict[str, Any]], seq_len: int = 99, **options: Any) -> Rows:
    columns = Columns().choose(list(rows[0]), "data")
    encoder = RowEncoder(tokenizer, columns, "data", train_on_prompt=False)
    return encode_rows(rows, encoder, "data", seq_len=seq_len, **options)


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(
            file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t"
        )
        table.writeheader()
        table.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(path))


# -- reading


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        ("jsonl", write_json_lines),
        ("json", lambda path, rows: path.write_text(json.dumps(rows))),
        ("csv", write_table),
        ("tsv", write_table),
        ("parquet", write_parquet),
    ],
)
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_every_format_has_the_same_rows(
    ending: str, write: Callable[..., Any], folder: bool, tmp_path: Path, plain: Any
) -> None:
    place = tmp_path / "data"
    place.mkdir()
    write(place / f"train.{ending}", ROWS)
    source = place if folder else place / f"train.{ending}"
    if folder and ending in ("csv", "tsv"):
        expected = ROWS[:2]  # the cells of a folder have the types that datasets guesses
        rows, _ = read_rows(str(source), split="train[:2]")
    else:
        expected = ROWS
        rows, _ = read_rows(str(source), split="train")
    texts = [{key: row[key] for key in ("prompt", "completion")} for row in rows]
    assert texts == [{k: r[k] for k in ("prompt", "completion")} for r in expected]
    assert encode(plain, list(rows)).description == encode(plain, expected).description


def test_cells_of_a_table_are_text(tmp_path: Path) -> None:
    rows = [{"prompt": "007", "completion": "4"}, {"prompt": "1.50", "completion": "NA"}]
    write_table(tmp_path / "a.csv", rows)
    assert list(read_rows(str(tmp_path / "a.csv"), split="train")[0]) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "data .*a.jsonl' is empty"),
        ("a.json", "[]", "cannot load data .*corresponds to no data"),
        ("a.csv", "prompt,completion\n", "cannot load data .*corresponds to no data"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"line 3 of .*a.csv' has 3 cells, but the first"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": \n',
            r"cannot load data .*a.jsonl', split 'train': .*JSON",
        ),
        ("a.txt", "text", r"a file that ends in \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        (None, "", "which is neither a file nor a directory"),
    ],
)
def test_what_cannot_be_read_is_named(
    name: str | None, content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / (name or "missing.jsonl")
    if name:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(str(path), split="train")


def test_splits_are_named(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", ROWS)
    assert len(read_rows(str(tmp_path / "a.jsonl"), split="train[1:]")[0]) == 2
    with pytest.raises(UserError, match=r"a.jsonl', split 'test': ValueError"):
        read_rows(str(tmp_path / "a.jsonl"), split="test")


def test_a_data_set_on_the_hub_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*words: Any, **options: Any) -> Any:
        asked.append((words, options))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"no network \(there is no such file or folder"):
        read_rows("owner/name", split="test", subset="main")
    assert asked == [(("owner/name", "main"), {"split": "test"})]


def test_datasets_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'zo2ext\[hf\]'"):
        read_rows("a.jsonl", split="train")


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (10, 1), (25, 3), (200, 20)])
def test_the_last_tenth_is_held_out(count: int, held_out: int) -> None:
    import datasets

    train, held = split(datasets.Dataset.from_dict({"text": list(range(count))}), "data")
    assert [*train["text"], *held["text"]] == list(range(count))
    assert len(held) in (held_out, held_out - (count == 25))  # 22.5 rounds to even


def test_one_row_is_too_few() -> None:
    import datasets

    with pytest.raises(UserError, match="data has 1 row; at least 2 are needed"):
        split(datasets.Dataset.from_dict({"text": ["a"]}), "data")


# -- columns


@pytest.mark.parametrize(
    ("there", "named", "chosen"),
    [
        ("text id", {}, {"text": "text"}),
        ("prompt completion text", {}, {"prompt": "prompt", "completion": "completion"}),
        ("text messages", {}, {"messages": "messages"}),
        ("messages body", {"text": "body"}, {"text": "body"}),
        ("question completion", {"prompt": "question"}, None),
        ("q a", {"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
        ("talk", {"messages": "talk"}, {"messages": "talk"}),
    ],
)
def test_columns_are_recognized(there: str, named: dict[str, str], chosen: Any) -> None:
    expected = chosen or {"prompt": "question", "completion": "completion"}
    assert Columns(**named).choose(there.split(), "data") == expected


@pytest.mark.parametrize(
    ("there", "named", "message"),
    [
        ("a b", {}, "data has the columns a, b; expected messages, or prompt and completion, or"),
        ("a b", {"text": "c"}, "data has no column 'c'; its columns are a, b"),
        ("a b", {"prompt": "a"}, "data has no column 'completion'; its columns are a, b"),
        ("text", {"prompt": "q", "completion": "a"}, "no column 'q' and no column 'a'"),
    ],
)
def test_missing_columns_are_named(there: str, named: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Columns(**named).choose(there.split(), "data")


# -- tokens


def test_all_tokens_of_a_text_count_but_the_first(plain: Any) -> None:
    words, counted = encoded(plain, {"text": "it danced ."})
    assert words == ["<s>", "it", "danced", ".", "<s>"]
    assert counted == words[1:]
    assert counted[-1] == plain.eos_token
    again, _ = encoded(plain, {"text": "it danced .<s>"})
    assert again == words, "a text that ends in the end-of-text token gets no second one"


def test_a_row_has_the_ids_of_its_texts(plain: Any) -> None:
    found = encode(plain, ROWS[:1]).rows[0]
    assert found.ids.tolist() == plain("would you recommend it ? yes .<s>")["input_ids"]
    assert found.counts.tolist() == [False] * 6 + [True] * 3
    labels = collate([found])["labels"][0].tolist()
    assert labels == [IGNORED] * 6 + found.ids.tolist()[6:]


def test_only_completions_count(plain: Any) -> None:
    words, counted = encoded(plain, ROWS[0])
    assert words == ["<s>", *"would you recommend it ?".split(), "yes", ".", "<s>"]
    assert counted == ["yes", ".", "<s>"]
    assert encoded(plain, ROWS[0], all_tokens=True) == (words, words[1:])


@pytest.mark.parametrize("columns", [["prompt", "completion"], ["text"]])
def test_tokens_are_those_of_trl(columns: list[str], plain: Any, tmp_path: Path) -> None:
    import datasets
    from transformers import AutoModelForCausalLM

    trl = pytest.importorskip("trl")
    rows = [{"prompt": "a", "text": row["prompt"], **row} for row in ROWS]
    rows = [{column: row[column] for column in columns} for row in rows]
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL_DIR),
        trl.SFTConfig(str(tmp_path), report_to="none", use_cpu=True),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
    )
    for theirs, ours in zip(trainer.train_dataset, encode(plain, rows).rows, strict=True):
        assert ours.ids.tolist() == theirs["input_ids"]
        if "labels" in theirs:  # from TRL 1.16 on
            counts = [label != IGNORED for label in theirs["labels"]]
            assert ours.counts[1:].tolist() == counts[1:], "nothing predicts the first token"


def test_a_token_across_the_end_of_the_prompt_is_counted_and_said(plain: Any) -> None:
    rows = [{"prompt": "would yo", "completion": "u ?"}, ROWS[0]]
    found = encode(plain, rows)
    assert found.merged == 1
    assert found.rows[0].counts.tolist() == [False, False, True, True, True]


def test_only_the_assistant_counts_in_a_chat(chat: Any) -> None:
    words, counted = encoded(chat, {"messages": [HELLO, YES, HELLO, NO]})
    assert words.count("<s>") == 4
    assert counted == ["yes", ".", "no", "it", "danced", "."]
    whole = chat.apply_chat_template([HELLO, YES, HELLO, NO])["input_ids"]
    assert words == chat.convert_ids_to_tokens(whole)
    words, counted = encoded(chat, {"messages": [HELLO, YES]}, all_tokens=True)
    assert counted == words[1:]


def test_a_template_may_mark_its_answers(chat: Any) -> None:
    """Then it may also change earlier turns."""
    chat.chat_template = (
        "{{ messages | length }}{% for m in messages %}<s>{{ m.role }} {% if m.role == 'assistant' "
        "%}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %} ."
        "{% endfor %}"
    )
    words, counted = encoded(chat, {"messages": [HELLO, YES, HELLO, NO]})
    assert words.count("<s>") == 4
    assert counted == ["yes", "no", "it", "danced"]
    row = {"messages": [HELLO, YES]}
    assert encoded(chat, row, all_tokens=True)[1] == encoded(chat, row)[0][1:]


def test_prompts_and_completions_may_be_messages(chat: Any) -> None:
    row = {"prompt": [HELLO, YES, HELLO], "completion": [NO]}
    words, counted = encoded(chat, row)
    assert words == encoded(chat, {"messages": [HELLO, YES, HELLO, NO]})[0]
    assert counted == ["no", "it", "danced", "."]


def test_keys_that_a_message_lacks_are_not_shown_to_the_template(chat: Any) -> None:
    chat.chat_template = "{% for m in messages %}{{ 'it' if m.name is defined }}{% endfor %}yes"
    row = {"messages": [{**HELLO, "name": None}, YES]}
    assert encoded(chat, row, all_tokens=True)[0] == ["yes"]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, {"messages": [HELLO, YES]}, "data has messages, but the model's tokenizer has"),
        (
            None,
            {"prompt": [HELLO], "completion": [YES]},
            "tokenizer has no chat template",
        ),
        (
            "{{ messages | length }}" + CHAT,
            {"messages": [HELLO, YES]},
            "row 1 of data: the chat template changes earlier turns when later ones follow",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            {"messages": [HELLO, YES]},
            "cannot apply the chat template to row 1 of data: .*roles must alternate",
        ),
        (CHAT, {"messages": "would you"}, "row 1 of data: column 'messages' has str 'would you'"),
        (CHAT, {"messages": ["would"]}, "expected a list of messages, each with a role"),
        (CHAT, {"text": 7}, "row 1 of data: column 'text' has int '7'; expected text"),
        (
            CHAT,
            {"prompt": "it", "completion": [YES]},
            "column 'prompt' has str 'it'",
        ),
        (
            CHAT,
            {"prompt": [HELLO], "completion": "it"},
            "column 'prompt' has list",
        ),
    ],
)
def test_what_cannot_be_encoded_is_named(
    template: str | None, row: dict[str, Any], message: str, chat: Any
) -> None:
    chat.chat_template = template
    with pytest.raises(UserError, match=message):
        encoded(chat, row)


# -- length


def test_long_rows_lose_their_end_and_are_counted(plain: Any) -> None:
    found = encode(plain, ROWS, seq_len=7)
    assert [len(row.ids) for row in found.rows] == [7, 7, 6]
    assert (found.truncated, found.left_out, found.counted) == (1, 0, 1 + 3 + 2)
    found = encode(plain, ROWS, seq_len=6)  # the answer of the first row is cut off
    assert (found.truncated, found.left_out, len(found.rows)) == (2, 1, 2)


def test_rows_without_an_answer_are_left_out(plain: Any) -> None:
    empty = [{"prompt": "it", "completion": ""}, {"prompt": None, "completion": "is"}]
    found = encode(plain, [*ROWS, *empty])
    assert (len(found.rows), found.left_out) == (3, 2)
    with pytest.raises(UserError, match="data: none of 2 rows has a token to learn from"):
        encode(plain, empty)


def test_packing_joins_rows_into_windows(plain: Any) -> None:
    apart, packed = encode(plain, ROWS), encode(plain, ROWS, seq_len=8, packing=True)
    ids = np.concatenate([row.ids for row in apart.rows])
    assert np.array_equal(np.concatenate([row.ids for row in packed.rows]), ids)
    assert [len(row.ids) for row in packed.rows] == [8, 8, len(ids) - 16]
    counts = np.concatenate([row.counts for row in apart.rows])
    counts[::8] = False  # nothing comes before the first token of a window
    assert np.array_equal(np.concatenate([row.counts for row in packed.rows]), counts)
    assert (packed.truncated, packed.left_out) == (0, 0)


# -- batches


def test_a_batch_is_a_function_of_step_and_seed(plain: Any) -> None:
    rows = [{"text": "it " * (i + 1)} for i in range(10)]
    data = encode(plain, rows)

    def lengths(step: int, seed: int = 0) -> list[int]:
        return [len(row.ids) for row in data.batch(step, batch_size=4, seed=seed)]

    everything = [length for step in range(5) for length in lengths(step)]
    for epoch in (everything[:10], everything[10:]):
        assert sorted(epoch) == sorted(len(row.ids) for row in data.rows)
    assert everything[:10] != everything[10:]
    assert [lengths(3), lengths(1)] == [everything[12:16], everything[4:8]], "in any order"
    assert lengths(0) != lengths(0, seed=1)


def test_the_description_changes_with_any_token_or_label(plain: Any) -> None:
    other = [{**ROWS[0], "completion": " no ."}, *ROWS[1:]]
    moved = [{"prompt": "would you recommend it", "completion": " ? yes ."}, *ROWS[1:]]
    found = {encode(plain, rows).description for rows in (ROWS, other, moved, ROWS[:2])}
    assert len(found) == 4
    assert encode(plain, ROWS).description in found


def test_the_loss_is_a_mean_over_tokens_that_count(plain: Any) -> None:
    """Of any batch size, as padding and prompts have no share in it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()
    rows, device = encode(plain, ROWS).rows, torch.device("cpu")
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.ids.astype(np.int64))
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for place in np.flatnonzero(row.counts).tolist():
            total -= float(scores[place - 1, ids[place]])
            count += 1
    for size in (1, 2, 3):
        found = loss_of_rows(model, rows, batch_size=size, device=device)
        assert found == pytest.approx(total / count, rel=1e-5)
