"""Tasks: what models are asked, how answers are scored and judged, and whole runs."""

from __future__ import annotations

import json
import re
import shutil
import string
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import zo2ext
from zo2ext.commands import main as cli
from zo2ext.commands.arguments import EvalTaskArguments, Objective, TrainTaskArguments
from zo2ext.commands.task import evaluate_task, train_task
from zo2ext.demo.task import REVIEWS as REVIEWS
from zo2ext.tasks import TASKS, Example, Kind, Sizes, get_task, metrics, readers
from zo2ext.tasks.encoding import Encoded, Encoder, Text
from zo2ext.tasks.questions import TaskQuestions
from zo2ext.tasks.scoring import Answerer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Row as in the data; prompt; candidates that continue it; those that are right.
GOLDEN: dict[str, tuple[dict[str, Any], str, list[str], list[int]]] = {
    "reviews": (
        {"text": "the soup was delightful .", "mood": "good"},
        "the soup was delightful . would you recommend it ?",
        [" no", " yes"],
        [1],
    ),
    "sst2": (
        {"sentence": "a gripping film ", "label": 1},
        "a gripping film It was",
        [" terrible", " great"],
        [1],
    ),
    "sst5": (
        {"text": " so so", "label": 2},
        "so so It was",
        [" terrible", " bad", " okay", " good", " great"],
        [2],
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        ["Yes", "No"],
        [0],
    ),
    "cb": (
        {"premise": "I doubt it.", "hypothesis": "it is so", "label": 1},
        'Suppose I doubt it. Can we infer that "it is so"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        [1],
    ),
    "boolq": (
        {"passage": "Ice floats.", "question": "does ice sink", "answer": False},
        "Ice floats. Does ice sink?\n",
        ["No", "Yes"],
        [0],
    ),
    "wsc": (
        {"text": "Mark told Pete that He left.", "span1_text": "Mark", "span2_text": "He"}
        | {"label": 1},
        "Mark told Pete that He left.\nIn the previous sentence, does the pronoun "
        '"he" refer to Mark? Yes or No?\n',
        ["No", "Yes"],
        [1],
    ),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank loan.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "A river bank.\nA bank loan.\n",
        ["No", "Yes"],
        [0],
    ),
    "multirc": (
        {"paragraph": "Ann ran.", "question": "Who ran?", "answer": "Ann", "label": 1},
        'Ann ran.\nQuestion: Who ran?\nI found this answer "Ann". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        [1],
    ),
    "copa": (
        {"premise": "The man fell. ", "question": "cause", "label": 1}
        | {"choice1": "I pushed him.", "choice2": "The floor was wet."},
        "The man fell because",
        [" I pushed him.", " the floor was wet."],
        [1],
    ),
    "record": (
        {
            "passage": "Ann met Bob.\n@highlight\nThey spoke.",
            "query": "@placeholder spoke to Bob",
            "entities": ["Bob", "Ann", "Ann M."],
            "answers": ["Ann", "Ann M."],
        },
        "Ann met Bob.\n- They spoke.\n-",
        [" Bob spoke to Bob", " Ann spoke to Bob", " Ann M. spoke to Bob"],
        [1, 2],
    ),
    "squad": (
        {"title": "Ice", "context": "Ice is cold.", "question": " What is ice? "}
        | {"answers": {"text": ["cold", "very cold"], "answer_start": [7, 7]}},
        "Title: Ice\nContext: Ice is cold.\nQuestion: What is ice?\nAnswer:",
        [" cold\n"],
        [0],
    ),
    "drop": (
        {"passage": "Two goals, then one.", "question": "How many?"}
        | {"answers_spans": {"spans": ["3", "three"], "types": ["number", "span"]}},
        "Passage: Two goals, then one.\nQuestion: How many?\nAnswer:",
        [" 3\n"],
        [0],
    ),
    "trec": (
        {"text": "Where is Peru ?", "coarse_label": 4, "fine_label": 32},
        "Question: Where is Peru ?\nAnswer Type:",
        [" Expression", " Entity", " Description", " Human", " Location", " Number"],
        [4],
    ),
    "agnews": (
        {"text": "Shares fell.", "label": 2},
        "Article: Shares fell.\nAnswer:",
        [" World", " Sports", " Business", " Technology"],
        [2],
    ),
    "mnli": (
        {"premise": "He ran.", "hypothesis": "He moved.", "label": 1},
        'Suppose He ran. Can we infer that "He moved."? Yes, No, or Maybe?\n',
        ["Yes", "Maybe", "No"],
        [1],
    ),
    "snli": (
        {"premise": "He ran.", "hypothesis": "He slept.", "label": 2},
        'Suppose He ran. Can we infer that "He slept."? Yes, No, or Maybe?\n',
        ["Yes", "Maybe", "No"],
        [2],
    ),
}


# -- the table


def test_every_task_has_a_golden_example() -> None:
    assert set(GOLDEN) == set(TASKS)


@pytest.mark.parametrize("name", GOLDEN)
def test_prompt_and_candidates(name: str) -> None:
    row, prompt, candidates, correct = GOLDEN[name]
    example = TASKS[name].example(row)
    assert example.prompt == prompt
    assert list(example.candidates) == candidates
    assert list(example.correct) == correct


@pytest.mark.parametrize("name", [name for name in TASKS if name != "reviews"])
def test_sizes_and_metric_are_mezos(name: str) -> None:
    task = TASKS[name]
    small = name in ("cb", "copa", "wsc")
    assert task.sizes == Sizes(1000, 100 if small else 500, 1000)
    assert task.metric == ("f1" if name in ("squad", "drop") else "accuracy")


def test_all_answers_of_free_text_count() -> None:
    assert TASKS["squad"].example(GOLDEN["squad"][0]).answers == ("cold", "very cold")


@pytest.mark.parametrize("label", [1, "1", 1.0, "1.0", "positive", "Positive ", True])
def test_a_class_is_named_by_index_or_name(label: Any) -> None:
    assert TASKS["sst2"].example({"sentence": "x", "label": label}).correct == (1,)


@pytest.mark.parametrize("name", ["SST-2", "sst2", "Sst 2"])
def test_names_are_read_loosely(name: str) -> None:
    assert get_task(name) is TASKS["sst2"]


def test_braces_in_data_are_text() -> None:
    example = TASKS["sst2"].example({"sentence": "{label} {", "label": 0})
    assert example.prompt == "{label} { It was"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sst2", {"label": 2}, r"row 1 of here has label 2; expected 0 or 'negative', 1 or"),
        ("sst2", {"label": 0.5}, "has label 0.5; expected 0 or"),
        ("sst2", {"label": "nan"}, "has label 'nan'; expected 0 or"),
        ("rte", {"label": "maybe"}, "'maybe'; expected 0 or 'entailment', 1 or 'not_entailment'"),
        ("rte", {"premise": None}, "has premise None, which is not text"),
        ("rte", {"hypothesis": ...}, "lacks hypothesis; it has premise, label"),
        ("copa", {"choice2": ...}, "lacks choice2"),
        ("copa", {"label": 2}, "has label 2; expected 0 to 1"),
        ("copa", {"question": "why"}, "'why'; expected 'cause' or 'effect'"),
        ("record", {"answers": ["Eve"]}, "'Eve', which is none of its candidates: 'Bob', 'Ann'"),
        ("record", {"entities": []}, "has no candidates"),
        ("squad", {"answers": {"text": []}}, r"answers.text \[\]; expected at least one answer"),
        ("squad", {"answers": "cold"}, "expected a mapping with 'text'"),
    ],
)
def test_rows_that_do_not_fit_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    row = {**GOLDEN[name][0], **change}
    row = {column: value for column, value in row.items() if value is not ...}
    with pytest.raises(ValueError, match=message) as refusal:
        TASKS[name].examples([row], "here")
    assert f"task {name}: row 1 of here" in str(refusal.value)


def test_unknown_task_lists_all() -> None:
    with pytest.raises(ValueError, match="there is no task 'imdb'; tasks are sst2, sst5, rte"):
        get_task("imdb")


# -- readers


@pytest.mark.parametrize(
    ("name", "file", "count", "first"),
    [
        ("sst2", "train.txt", 6920, "a stirring , funny and finally transporting re-imagining"),
        ("sst2", "dev.txt", 872, "one long string of cliches . It was"),
        ("sst2", "test.txt", 1821, "no movement , no yuks , not much of anything . It was"),
        ("trec", "train.txt", 5452, "Question: How did serfdom develop in and then leave Russia ?"),
        ("trec", "test.txt", 500, "Question: How far is it from Denver to Aspen ?"),
        ("rte", "train.jsonl", 2490, "No Weapons of Mass Destruction Found in Iraq Yet.\nDoes"),
        ("rte", "val.jsonl", 277, "Dana Reeve, the widow of the actor Christopher Reeve, has"),
        ("cb", "train.jsonl", 250, "Suppose It was a complex language. Not written down but"),
        ("cb", "val.jsonl", 56, "Suppose Valence the void-brain, Valence the virtuous valet."),
    ],
)
def test_real_files(test_data: Path, name: str, file: str, count: int, first: str) -> None:
    rows = readers.read_file(TASKS[name], test_data / name / file)
    examples, left_out = TASKS[name].examples(rows, file)
    assert len(rows) == len(examples) == count
    assert left_out == 0
    assert examples[0].prompt.startswith(first)


def test_folder_gives_training_and_validation(task_data: Path) -> None:
    splits = readers.from_folder(TASKS["sst2"], task_data / "sst2")
    assert {name: len(split.rows) for name, split in splits.items()} == {"train": 200, "test": 60}


def test_sample_is_a_function_of_the_seed(task_data: Path) -> None:
    folder = str(task_data / "trec")
    one, again, other = (
        readers.load(TASKS["trec"], folder, Sizes(8, 4, 6), seed) for seed in (1, 1, 2)
    )
    assert one == again
    assert one.train != other.train
    assert (len(one.train), len(one.dev), len(one.test)) == (8, 4, 6)
    assert not {e.prompt for e in one.train} & {e.prompt for e in one.dev}
    assert one.notes == ()


def test_too_few_examples_are_all_used_and_said(task_data: Path) -> None:
    task = TASKS["cb"]
    data = readers.load(task, str(task_data / "cb"), task.sizes, 0)
    assert (len(data.train), len(data.dev), len(data.test)) == (150, 100, 56)
    assert (
        "has 250 of the requested 1000 + 100 examples: 150 are used to train on and 100 as"
        in data.notes[0]
    )
    assert "has 56 of the requested 1000 examples" in data.notes[1]


def test_one_example_is_not_enough(tmp_path: Path) -> None:
    for name, count in (("train.jsonl", 1), ("dev.jsonl", 2)):
        write_rows(tmp_path, name, [GOLDEN["sst2"][0]] * count)
    with pytest.raises(ValueError, match=r"train\.jsonl has 1 example; at least 2 are needed"):
        readers.load(TASKS["sst2"], str(tmp_path), Sizes(), 0)


@pytest.mark.parametrize("label", [None, float("nan"), -1, -1.0, "-1", "-1.0"])
@pytest.mark.parametrize("name", ["sst2", "copa"])
def test_labels_that_are_none_are_left_out(name: str, label: Any) -> None:
    row = GOLDEN[name][0]
    assert len(TASKS[name].examples([row, {**row, "label": label}], "here")[0]) == 1
    answer = {**GOLDEN["drop"][0], "answers_spans": {"spans": ["-1"]}}
    assert TASKS["drop"].examples([answer], "here")[1] == 0, "an answer, not a missing one"


def test_halves_of_characters_become_replacement_characters(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "train.jsonl").write_text('{"sentence": "a\\ud83d b\u2028c", "label": 1}\n')
    (row,) = readers.read_file(TASKS["sst2"], tmp_path / "train.jsonl")
    encoder = Encoder(tokenizer, TASKS["sst2"], 100)
    broken, whole = (
        encoder.encode(TASKS["sst2"].example(r))
        for r in (row, {**row, "sentence": "a\ufffd b\u2028c"})
    )
    assert broken.prompt == whole.prompt


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_rows_without_a_label_are_left_out_and_counted(tmp_path: Path) -> None:
    row = GOLDEN["snli"][0]
    rows = [row, {**row, "label": -1}, row, row]
    for name in ("train.jsonl", "dev.jsonl"):
        write_rows(tmp_path, name, rows)
    data = readers.load(TASKS["snli"], str(tmp_path), Sizes(2, 1, 3), 0)
    assert (len(data.train), len(data.dev), len(data.test)) == (2, 1, 3)
    assert TASKS["snli"].examples(rows, "here")[1] == 1


def test_rows_beyond_the_sample_are_not_looked_at() -> None:
    rows = [GOLDEN["sst2"][0], {"sentence": "broken"}]
    assert len(TASKS["sst2"].examples(rows, "here", [0, 1], 1)[0]) == 1
    with pytest.raises(ValueError, match="row 2 of here lacks label"):
        TASKS["sst2"].examples(rows, "here", [0, 1], 2)
    with pytest.raises(ValueError, match="here has 1 rows, none with a label"):
        TASKS["snli"].examples([{**GOLDEN["snli"][0], "label": -1}], "here")


@pytest.mark.parametrize(
    ("task", "files", "message"),
    [
        ("rte", {}, r"lacks train.jsonl for task rte; it has nothing"),
        ("rte", {"train.csv": "x"}, r"lacks train.jsonl for task rte; it has train.csv"),
        ("sst2", {"train.txt": "1 a\n"}, r"lacks validation.txt or validation.jsonl or val.txt"),
        ("sst2", {"train.txt": "good film\n"}, r"line 1 of .*train.txt is 'good film'; expected"),
        ("trec", {"train.txt": "LOC Where ?\n"}, "expected COARSE:fine, a space and a question"),
        ("rte", {"train.jsonl": "{\n"}, "line 1 of .*train.jsonl is not JSON"),
        ("rte", {"train.jsonl": "[1]\n"}, "expected a JSON object"),
        ("rte", {"train.jsonl": "\n\n"}, r"train.jsonl has no rows"),
        ("sst2", {"train.txt": b"1 \xff\n"}, "train.txt is not UTF-8"),
    ],
)
def test_files_that_cannot_be_understood(
    tmp_path: Path, task: str, files: dict[str, str | bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        readers.load(TASKS[task], str(tmp_path), Sizes(), 0)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data .*nowhere' is not a directory"):
        readers.load(TASKS["rte"], str(tmp_path / "nowhere"), Sizes(), 0)


def test_the_hub_needs_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"aps/super_glue/rte.* needs the package datasets"):
        readers.from_hub(TASKS["rte"])


def test_the_hub_is_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(path: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
            asked.append((path, config, options["split"], options["revision"]))
            return [GOLDEN["mnli"][0]]

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    splits = readers.from_hub(TASKS["mnli"])
    assert asked == [
        ("nyu-mll/glue", "mnli", "train", None),
        ("nyu-mll/glue", "mnli", "validation_matched", None),
    ]
    assert splits["test"].rows == [GOLDEN["mnli"][0]]


# -- token ids


def char_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character, and one before every text."""
    letters = string.ascii_letters + string.digits + string.punctuation + " \n"
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *letters])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return char_tokenizer()


def small_gpt2() -> GPT2LMHeadModel:
    """With learned positions, so that wrong ones change what it says."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=99, n_positions=400, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    )
    config.bos_token_id, config.eos_token_id = 0, 1
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return small_gpt2()


def test_few_shot_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    task = TASKS["sst2"]
    shots = [
        task.example({"sentence": "fine", "label": 1}),
        task.example({"sentence": "poor", "label": 0}),
    ]
    encoded = Encoder(tokenizer, task, 400).encode(
        task.example({"sentence": "odd", "label": 0}), shots
    )
    text = "fine It was great\n\npoor It was terrible\n\nodd It was"
    assert tokenizer.decode(encoded.prompt.ids) == f"<s>{text}"
    assert [tokenizer.decode(c.ids) for c in encoded.candidates] == [
        f"<s>{text} terrible",
        f"<s>{text} great",
    ]
    assert [c.answer for c in encoded.candidates] == [len(" terrible"), len(" great")]
    assert not encoded.truncated


def test_shots_of_free_text_end_with_their_answer() -> None:
    example = TASKS["drop"].example(GOLDEN["drop"][0])
    assert example.solved == "Passage: Two goals, then one.\nQuestion: How many?\nAnswer: 3"


def test_long_prompts_lose_their_beginning(tokenizer: PreTrainedTokenizerFast) -> None:
    task = TASKS["sst2"]
    encoded = Encoder(tokenizer, task, 20).encode(
        task.example({"sentence": "a very long sentence", "label": 0})
    )
    assert encoded.truncated
    bad, good = encoded.candidates
    assert tokenizer.decode(bad.ids) == "<s>nce It was terrible"
    assert tokenizer.decode(good.ids) == "<s>ntence It was great"
    assert len(bad.ids) == len(good.ids) == 20
    assert (bad.answer, good.answer) == (9, 6)


def test_what_just_fits_is_not_truncated(tokenizer: PreTrainedTokenizerFast) -> None:
    task = TASKS["sst2"]
    example = task.example({"sentence": "ok", "label": 0})
    whole = len("<ok It was terrible")  # "<" for the token before
    assert not Encoder(tokenizer, task, whole).encode(example).truncated
    assert Encoder(tokenizer, task, whole - 1).encode(example).truncated


def test_new_tokens_have_room(tokenizer: PreTrainedTokenizerFast) -> None:
    task = TASKS["drop"]
    encoded = Encoder(tokenizer, task, 70).encode(task.example(GOLDEN["drop"][0]))
    assert encoded.truncated
    assert len(encoded.prompt.ids) == 20
    with pytest.raises(ValueError, match=r"max_length is 51 tokens.* beside 50 new tokens"):
        Encoder(tokenizer, task, 51)


def test_an_answer_must_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    task = TASKS["sst2"]
    with pytest.raises(ValueError, match="'terrible' has 9 tokens, but a text may have 10"):
        Encoder(tokenizer, task, 10).encode(task.example({"sentence": "x", "label": 0}))


# -- scoring

SENTENCES = ["ok", "a film that goes on and on", "x", "not bad at all, really", "no!"]


def answerer(model: Any, tokenizer: Any, name: str = "sst2") -> Answerer:
    return Answerer(model, tokenizer, TASKS[name], torch.device("cpu"))


def sentiments(tokenizer: Any) -> list[Encoded]:
    task = TASKS["sst2"]
    encoder = Encoder(tokenizer, task, 400)
    return [
        encoder.encode(task.example({"sentence": sentence, "label": i % 2}))
        for i, sentence in enumerate(SENTENCES)
    ]


@torch.no_grad()
def mean_log_likelihood(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Of one text, by itself, token by token, in float64."""
    ids = tokenizer(prompt + answer)["input_ids"]
    count = len(ids) - len(tokenizer(prompt)["input_ids"])
    total = 0.0
    for place in range(len(ids) - count, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
        total += float(logits[ids[place]] - logits.logsumexp(-1))
    return total / count


def test_scores_of_a_mixed_batch_are_those_of_single_texts(model: Any, tokenizer: Any) -> None:
    texts = [text for e in sentiments(tokenizer) for text in e.candidates]
    together = [part.mean().item() for part in answerer(model, tokenizer).log_likelihoods(texts)]
    alone = [
        mean_log_likelihood(model, tokenizer, f"{sentence} It was", word)
        for sentence in SENTENCES
        for word in (" terrible", " great")
    ]
    assert together == pytest.approx(alone, abs=1e-5)


class Whole(torch.nn.Module):
    """A model that has no way to compute the logits of the last tokens alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.seen = model, 0

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
        answer = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        self.seen += answer.logits.shape[1]
        return answer


def test_logits_are_computed_where_they_are_needed(model: Any, tokenizer: Any) -> None:
    texts = [text for e in sentiments(tokenizer) for text in e.candidates]
    some, whole = answerer(model, tokenizer), answerer(Whole(model), tokenizer)
    with torch.no_grad():
        for few, all_of_them in zip(
            some.log_likelihoods(texts), whole.log_likelihoods(texts), strict=True
        ):
            torch.testing.assert_close(few, all_of_them)
    assert whole.model.seen == max(len(text.ids) for text in texts)
    seen = []
    handle = model.register_forward_hook(lambda _m, _i, out: seen.append(out.logits.shape[1]))
    with torch.no_grad():
        some.log_likelihoods(texts[2:4])
    handle.remove()
    assert seen == [len(" terrible") + 1]


def test_accuracy_is_that_of_the_likeliest_candidates(model: Any, tokenizer: Any) -> None:
    hits = [
        mean_log_likelihood(model, tokenizer, f"{sentence} It was", (" terrible", " great")[i % 2])
        > mean_log_likelihood(
            model, tokenizer, f"{sentence} It was", (" great", " terrible")[i % 2]
        )
        for i, sentence in enumerate(SENTENCES)
    ]
    for batch_size in (1, 3, 100):
        found = answerer(model, tokenizer).evaluate(sentiments(tokenizer), batch_size=batch_size)
        assert found == {"accuracy": sum(hits) / len(hits)}


def test_likelihood_loss_is_the_models_on_answer_tokens_alone(model: Any, tokenizer: Any) -> None:
    examples = sentiments(tokenizer)
    right = [e.candidates[e.example.correct[0]] for e in examples]
    width = max(len(text.ids) for text in right)
    ids = torch.zeros(len(right), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, text in enumerate(right):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        labels[row, len(text.ids) - text.answer : len(text.ids)] = torch.tensor(
            text.ids[-text.answer :]
        )
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss
        found = answerer(model, tokenizer).likelihood_loss(examples)
    torch.testing.assert_close(found, expected)


def test_choice_loss(model: Any, tokenizer: Any) -> None:
    examples = sentiments(tokenizer)
    losses = []
    for i, sentence in enumerate(SENTENCES):
        scores = torch.tensor(
            [
                mean_log_likelihood(model, tokenizer, f"{sentence} It was", word)
                for word in (" terrible", " great")
            ]
        )
        losses.append(-scores.log_softmax(0)[i % 2])
    with torch.no_grad():
        found = answerer(model, tokenizer).choice_loss(examples)
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-5, rtol=0)


def test_metric_loss_is_minus_the_metric(model: Any, tokenizer: Any) -> None:
    examples = sentiments(tokenizer)
    with torch.no_grad():
        found = answerer(model, tokenizer).metric_loss(examples)
        judged = answerer(model, tokenizer).evaluate(examples, batch_size=8)
    assert found == -judged["accuracy"]


def test_candidates_may_differ_in_number(model: Any, tokenizer: Any) -> None:
    task = TASKS["record"]
    row = GOLDEN["record"][0]
    encoder = Encoder(tokenizer, task, 400)
    rows = [row, {**row, "entities": ["Ann"], "answers": ["Ann"]}]
    examples = [encoder.encode(task.example(r)) for r in rows]
    found = answerer(model, tokenizer, "record").evaluate(examples, batch_size=2)
    assert found["accuracy"] in (0.5, 1.0)
    with torch.no_grad():
        assert answerer(model, tokenizer, "record").choice_loss(examples) > 0


QUESTIONS = ["How many?", "Who won the second of the three games, and by how much?", "1?"]


def questions(tokenizer: Any) -> list[Encoded]:
    task = TASKS["drop"]
    encoder = Encoder(tokenizer, task, 400)
    row = GOLDEN["drop"][0]
    return [encoder.encode(task.example({**row, "question": q})) for q in QUESTIONS]


def test_texts_written_together_are_those_written_alone(model: Any, tokenizer: Any) -> None:
    prompts = [e.prompt for e in questions(tokenizer)]
    mine = answerer(model, tokenizer, "drop")
    with torch.no_grad():
        together = mine.written(prompts)
        assert together == [mine.written([prompt])[0] for prompt in prompts]
        assert together == [greedy(model, tokenizer, prompt.ids) for prompt in prompts]
    assert len(set(together)) > 1


def greedy(model: Any, tokenizer: Any, ids: tuple[int, ...]) -> str:
    """The likeliest token again and again, without a cache, to the end of the line."""
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    written: list[int] = []
    while len(written) < TASKS["drop"].max_new_tokens:
        written.append(int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax()))
        if written[-1] in (newline, tokenizer.eos_token_id):
            break
    return tokenizer.decode(written, skip_special_tokens=True).strip().partition("\n")[0].strip()


def test_a_tokenizer_may_lack_a_newline_and_an_end(model: Any) -> None:
    bare = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare)
    with torch.no_grad():
        assert len(answerer(model, tokenizer, "drop").written([Text((1, 0), 0)])) == 1


def test_free_text_is_judged_by_f1_and_exact_match(model: Any, tokenizer: Any) -> None:
    examples = questions(tokenizer)
    mine = answerer(model, tokenizer, "drop")
    with torch.no_grad():
        written = mine.written([e.prompt for e in examples])
    told = [
        replace(e, example=replace(e.example, answers=(text,)))
        for e, text in zip(examples, written, strict=True)
    ]
    assert mine.evaluate(examples, batch_size=2) == {"f1": 0.0, "em": 0.0}
    assert all(metrics.normalize(text) for text in written)
    assert mine.evaluate(told, batch_size=2) == {"f1": 1.0, "em": 1.0}


def test_a_metric_of_free_text_can_be_trained_on(tokenizer: Any) -> None:
    model = small_gpt2()
    examples = questions(tokenizer)
    config = zo2ext.ZOConfig(device="cpu", eps=0.05, lr=1e-3)
    with zo2ext.offload(model, config) as zo:
        mine = replace(answerer(model, tokenizer, "drop"), device=zo.device)
        first = mine.written([examples[0].prompt])[0]
        told = [replace(examples[0], example=replace(examples[0].example, answers=(first,)))]
        for _ in range(2):
            assert -1 <= zo.step(lambda: mine.metric_loss(told)) <= 0
        assert zo.skipped == 0


@pytest.mark.parametrize(
    ("loss", "eps", "lr", "gain"),
    [
        ("choice_loss", 1e-3, 1e-3, 0.15),
        ("likelihood_loss", 1e-3, 1e-3, 0.5),
        ("metric_loss", 5e-2, 3e-3, 0.1),  # steps of the metric are seen from afar only
    ],
)
def test_each_objective_learns(
    tokenizer: Any, loss: str, eps: float, lr: float, gain: float
) -> None:
    model, examples = small_gpt2(), sentiments(tokenizer)
    with zo2ext.offload(model, zo2ext.ZOConfig(device="cpu", eps=eps, lr=lr)) as zo:
        minimised = getattr(answerer(model, tokenizer), loss)
        with torch.no_grad():
            before = float(minimised(examples))
        for _ in range(40):
            zo.step(lambda: minimised(examples))
        with torch.no_grad():
            assert float(minimised(examples)) < before - gain


# -- metrics


def test_normalisation() -> None:
    assert metrics.normalize(" The  U.S.'s Answer, a test! ") == "uss answer test"


@pytest.mark.parametrize(
    ("predicted", "answers", "f1", "em"),
    [
        ("the cat", ["Cat."], 1.0, 1.0),
        ("black cat", ["cat", "a black dog"], 2 / 3, 0.0),
        ("black cat", ["dog"], 0.0, 0.0),
        ("", ["dog"], 0.0, 0.0),
        ("one two three", ["two three four five"], 4 / 7, 0.0),
        ("no no", ["no"], 2 / 3, 0.0),
        ("No answer", ["no answer"], 1.0, 1.0),
        ("no reply", ["no answer"], 0.0, 0.0),
    ],
)
def test_f1_and_exact_match(predicted: str, answers: list[str], f1: float, em: float) -> None:
    assert metrics.f1(predicted, answers) == pytest.approx(f1)
    assert metrics.exact_match(predicted, answers) == em


def test_any_right_candidate_counts() -> None:
    assert [metrics.accuracy(i, (1, 2)) for i in range(3)] == [0, 1, 1]


# -- whole runs

Small = Callable[..., dict[str, Any]]


@pytest.fixture
def small(model_folder: Path, task_data: Path) -> Small:
    """Arguments of a small run of a task, with changes."""

    def arguments(task: str, **changes: Any) -> dict[str, Any]:
        return {**defaults, "task": task, "data": str(task_data / task), **changes}

    defaults = {
        "model": str(model_folder),
        "device": "cpu",
        "train_size": 16,
        "dev_size": 6,
        "test_size": 6,
    }
    return arguments


def test_sst2_from_end_to_end(
    small: Small, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = small("sst2", steps=3, batch_size=4, eval_every=2, shots=2, keep="last")
    results = train_task(TrainTaskArguments(**arguments, out=str(out)))
    titles = ["zero-shot", "2 in context", "fine-tuned, 3 steps"]
    assert [title for title, _ in results.rows] == titles
    printed = capsys.readouterr().out
    assert "SST-2: 16 examples to train on, 6 dev, 6 test" in printed
    assert all(f"\n{title} " in printed for title in titles)

    written = json.loads((out / "results.json").read_text())
    assert list(written["results"]) == titles
    assert written["examples"] == {"train": 16, "dev": 6, "test": 6}
    assert written["results"]["zero-shot"] == results.rows[0][1]
    curve = (out / "loss.csv").read_text().splitlines()
    assert curve[0] == "step,train_loss,dev_accuracy"
    assert len(curve) == 5
    assert json.loads((out / "arguments.json").read_text())["objective"] == "choice"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")

    tuned = AutoModelForCausalLM.from_pretrained(out / "final").state_dict()
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    assert any(not torch.equal(tuned[name], before[name]) for name in tuned)
    AutoTokenizer.from_pretrained(out / "final")

    # What was saved is judged as it was when it was saved; the same command gives the same bits.
    again = evaluate_task(EvalTaskArguments(**{**small("sst2"), "model": str(out / "final")}))
    assert again.rows[0][1] == results.rows[2][1]
    other = tmp_path / "again"
    train_task(TrainTaskArguments(**arguments, out=str(other)))
    assert (other / "loss.csv").read_bytes() == (out / "loss.csv").read_bytes()
    weights = "final/model.safetensors"
    assert (other / weights).read_bytes() == (out / weights).read_bytes()


@pytest.mark.parametrize("objective", [Objective.METRIC, Objective.LOSS])
def test_objectives(small: Small, tmp_path: Path, objective: Objective) -> None:
    arguments = small("trec", steps=2, batch_size=4, test_size=2, dev_size=2)
    results = train_task(
        TrainTaskArguments(**arguments, out=str(tmp_path / "run"), objective=objective)
    )
    losses = [
        float(line.split(",")[1])
        for line in (tmp_path / "run" / "loss.csv").read_text().splitlines()[1:3]
    ]
    if objective is Objective.METRIC:
        assert all(-1 <= loss <= 0 for loss in losses)
    else:
        assert all(loss > 0 for loss in losses)
    assert results.rows[-1][0] == "fine-tuned, 2 steps"


def test_command_line(
    model_folder: Path, task_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = str(model_folder), str(task_data / "sst2")
    words = ["--task", "SST-2", "--model", model, "--data", data, "--device", "cpu"]
    few = ["--train-size=4", "--dev-size=2", "--test-size=2"]
    assert cli.main(["eval", *words, *few]) == 0
    assert "\nzero-shot " in capsys.readouterr().out
    out = str(tmp_path / "run")
    assert cli.main(["train", *words, *few, "--steps=1", "--out", out]) == 0
    assert "\nfine-tuned, 1 steps " in capsys.readouterr().out
    assert cli.main(["train", *words, *few, "--lr=1", "--out", out]) == 1
    assert "journal of another run: run.lr was 0.000119" in capsys.readouterr().err
    assert cli.main(["eval", "--task=imdb", "--model", model]) == 1
    assert "zo2ext eval: error: there is no task 'imdb'; tasks are sst2" in capsys.readouterr().err
    assert cli.main(["train", *words, "--out", out, "--text", "my.txt"]) == 2
    assert "--text and --task exclude each other" in capsys.readouterr().err


def test_an_interrupted_run_says_so(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = zo2ext.ZOEngine.step

    def interrupted(zo: zo2ext.ZOEngine, loss: Any, **options: Any) -> float:
        if zo.steps == 1:
            raise KeyboardInterrupt
        return step(zo, loss, **options)

    monkeypatch.setattr(zo2ext.ZOEngine, "step", interrupted)
    arguments = small("sst2", batch_size=2, test_size=2, dev_size=2)
    with pytest.raises(
        KeyboardInterrupt, match=r"after 1 steps; all are in .*same command continues"
    ):
        train_task(TrainTaskArguments(**arguments, out=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "final").exists()


def test_a_prompt_that_is_too_long_loses_its_left(small: Small) -> None:
    longer, shorter = (
        TaskQuestions(EvalTaskArguments(**small("cb", max_length=length)), 0)
        for length in (400, 60)
    )
    cut = 0
    for whole, part in zip(longer.asked["test"], shorter.asked["test"], strict=True):
        cut += part.truncated
        for a, b in zip(whole.candidates, part.candidates, strict=True):
            assert len(b.ids) <= 60
            assert b.ids[1:] == a.ids[len(a.ids) - len(b.ids) + 1 :], "its end is whole"
            assert b.ids[0] == a.ids[0], "what begins every text"
    assert cut > 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a film"}, "row [1-4] of .* lacks label; it has sentence"),
        ({"text": "a film", "label": 1}, "row [1-4] of .* lacks sentence; it has text, label"),
        ({"sentence": "a film", "label": "good"}, "has label 'good'; expected 0 or 'negative', 1"),
        ({"sentence": 7, "label": 1}, "has sentence 7, which is not text"),
    ],
)
def test_data_that_does_not_fit_is_refused_by_the_command(
    row: dict[str, Any],
    message: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("train.jsonl", "dev.jsonl"):
        write_rows(tmp_path / "data", name, [row] * 4)
    words = ["--task=sst2", f"--model={model_folder}", f"--data={tmp_path / 'data'}"]
    assert cli.main(["train", *words, f"--out={tmp_path / 'run'}"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_truncation_is_counted_and_said(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluate_task(
        EvalTaskArguments(**small("cb", max_length=60, test_size=3, dev_size=3))
    )
    count = results.truncated["zero-shot, test"]
    assert count > 0
    assert f"zero-shot, test: {count} of 3 prompts are too long" in capsys.readouterr().out


def test_every_example_is_used_once_a_pass(small: Small) -> None:
    run = TaskQuestions(EvalTaskArguments(**small("trec")), 0)
    for epoch in range(2):
        batches = [run.batch(4 * epoch + step, 4) for step in range(4)]
        prompts = sorted(e.example.prompt for batch in batches for e in batch)
        assert prompts == sorted(e.example.prompt for e in run.train)
    assert run.batch(0, 16) != run.batch(1, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "imdb"}, "no task 'imdb'"),
        ({"shots": -1}, "shots must be at least 0, got -1"),
        ({"shots": 17}, "shots is 17, but there are 16 training examples"),
        ({"test_size": 0}, "test_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"max_length": 513}, "max_length is 513, but model .* reads at most 512"),
        ({"data": "/nowhere"}, "data is '/nowhere', which is not a directory"),
        ({"eps": 0.0}, "eps must be a positive number"),
        (
            {"task": "drop", "objective": Objective.CHOICE},
            "objective is 'choice', but answers of task drop",
        ),
    ],
)
def test_wrong_arguments(
    small: Small, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train_task(TrainTaskArguments(**small("sst2", out=str(out)) | changes))
    assert not out.exists()


def test_a_model_of_no_use_is_refused(small: Small, model_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_folder, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    arguments = small("sst2", out=str(tmp_path / "run")) | {"model": str(broken)}
    with pytest.raises(ValueError, match="has a loss of nan before any training"):
        train_task(TrainTaskArguments(**arguments))


def test_kinds_have_what_they_need() -> None:
    for task in TASKS.values():
        assert bool(task.classes) == (task.kind is Kind.CLASSIFICATION)
        assert (task.candidates is not None) == (task.kind is Kind.CHOICE)
        assert isinstance(task.example(GOLDEN[task.name][0]), Example)
