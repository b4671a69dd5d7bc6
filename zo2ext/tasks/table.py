"""The tasks, one entry each: prompt, words, data.

The prompts of SST-2, RTE, CB, BoolQ, WSC, WiC, MultiRC, COPA, ReCoRD, SQuAD and DROP are MeZO's for
causal models (arXiv:2305.17333, appendix E.2). Its prompts for SST-5, TREC, MNLI and SNLI are for
masked models, with the mask before or between the sentences; here the words are the same, and the
prompt is rearranged so that the answer comes last (SST-5 like SST-2; MNLI and SNLI like CB, which
has the same words; TREC as in Zhao et al., arXiv:2102.09690). AG News, which MeZO does not have, is
as in Zhao et al.

The columns of a row have their names on the hub. docs/extending.md describes how to add a task.
"""

from __future__ import annotations

from typing import Any

from zo2ext.errors import UserError
from zo2ext.tasks.task import Hub, Kind, Row, Sizes, Task, plain

YES_LAST = (("False", "No"), ("True", "Yes"))
ENTAILMENT_3 = (("entailment", "Yes"), ("neutral", "Maybe"), ("contradiction", "No"))
SUPPOSE = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'


def _stripped(*columns: str) -> Any:
    return lambda row: {**row, **{column: row[column].strip() for column in columns}}


def _labeled_sentence(column: str) -> Any:
    """Return a reader of lines like ``1 a gripping film``."""

    def read(line: str) -> Row:
        label, space, text = line.partition(" ")
        if not space or not label.isdecimal():
            raise ValueError(f"is {line[:60]!r}; expected a label, a space and a sentence")
        return {"label": label, column: text}

    return read


def _typed_question(line: str) -> Row:
    """Read a line like ``LOC:city What is the capital of Peru ?``."""
    kind, space, text = line.partition(" ")
    coarse, colon, fine = kind.partition(":")
    if not space or not colon:
        raise ValueError(f"is {line[:60]!r}; expected COARSE:fine, a space and a question")
    return {"coarse_label": coarse, "fine_label": fine, "text": text}


def _as_question(row: Row) -> Row:
    question = row["question"]
    question = question if question.endswith("?") else question + "?"
    return {**row, "question": question[0].upper() + question[1:]}


def _conjoined(row: Row) -> Row:
    conjunctions = {"cause": "because", "effect": "so"}
    if row["question"] not in conjunctions:
        raise ValueError(f"has question {row['question']!r}; expected 'cause' or 'effect'")
    premise = row["premise"].rstrip().removesuffix(".")
    return {**row, "premise": premise, "question": conjunctions[row["question"]]}


def _mid_sentence(row: Row, choice: str) -> str:
    first, space, rest = choice.partition(" ")
    return f" {first if first == 'I' else first.lower()}{space}{rest}"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            title="SST-2",
            prompt="{sentence} It was",
            classes=(("negative", "terrible"), ("positive", "great")),
            prepare=_stripped("sentence"),
            hub=Hub("nyu-mll/glue", "sst2"),
            line=_labeled_sentence("sentence"),
        ),
        Task(
            title="SST-5",
            prompt="{text} It was",
            classes=(
                ("very negative", "terrible"),
                ("negative", "bad"),
                ("neutral", "okay"),
                ("positive", "good"),
                ("very positive", "great"),
            ),
            prepare=_stripped("text"),
            hub=Hub("SetFit/sst5"),
            line=_labeled_sentence("text"),
        ),
        Task(
            title="RTE",
            prompt='{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            classes=(("entailment", "Yes"), ("not_entailment", "No")),
            hub=Hub("aps/super_glue", "rte"),
        ),
        Task(
            title="CB",
            prompt=SUPPOSE,
            classes=(("entailment", "Yes"), ("contradiction", "No"), ("neutral", "Maybe")),
            hub=Hub("aps/super_glue", "cb"),
            sizes=Sizes(dev=100),  # of 250
        ),
        Task(
            title="BoolQ",
            prompt="{passage} {question}\n",
            label="answer",
            classes=YES_LAST,
            prepare=_as_question,
            hub=Hub("google/boolq"),
        ),
        Task(
            title="WSC",
            prompt=(
                '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to '
                "{span1_text}? Yes or No?\n"
            ),
            classes=YES_LAST,
            prepare=lambda row: {**row, "span2_text": row["span2_text"].lower()},
            hub=Hub("aps/super_glue", "wsc.fixed"),
            sizes=Sizes(dev=100),  # of 554
        ),
        Task(
            title="WiC",
            prompt=(
                'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
                "{sentence1}\n{sentence2}\n"
            ),
            classes=YES_LAST,
            hub=Hub("aps/super_glue", "wic"),
        ),
        Task(
            title="MultiRC",
            prompt=(
                '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". '
                "Is that correct? Yes or No?\n"
            ),
            classes=YES_LAST,
            hub=Hub("aps/super_glue", "multirc"),
        ),
        Task(
            title="COPA",
            kind=Kind.CHOICE,
            prompt="{premise} {question}",
            columns=("choice1", "choice2"),
            candidates=lambda row: [row["choice1"], row["choice2"]],
            continuation=_mid_sentence,
            prepare=_conjoined,
            hub=Hub("aps/super_glue", "copa"),
            sizes=Sizes(dev=100),  # of 400
        ),
        Task(
            title="ReCoRD",
            kind=Kind.CHOICE,
            prompt="{passage}\n-",
            label="answers",
            columns=("query", "entities"),
            candidates=lambda row: list(row["entities"]),
            continuation=lambda row, name: " " + row["query"].replace("@placeholder", name),
            prepare=lambda row: {**row, "passage": row["passage"].replace("@highlight\n", "- ")},
            hub=Hub("aps/super_glue", "record"),
        ),
        Task(
            title="SQuAD",
            kind=Kind.GENERATION,
            prompt="Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
            label="answers.text",
            prepare=_stripped("question"),
            hub=Hub("rajpurkar/squad"),
        ),
        Task(
            title="DROP",
            kind=Kind.GENERATION,
            prompt="Passage: {passage}\nQuestion: {question}\nAnswer:",
            label="answers_spans.spans",
            prepare=_stripped("question"),
            hub=Hub("ucinlp/drop"),
        ),
        Task(
            title="TREC",
            prompt="Question: {text}\nAnswer Type:",
            label="coarse_label",
            classes=(
                ("ABBR", "Expression"),
                ("ENTY", "Entity"),
                ("DESC", "Description"),
                ("HUM", "Human"),
                ("LOC", "Location"),
                ("NUM", "Number"),
            ),
            prepare=_stripped("text"),
            # The data set has a loading script, which `datasets` no longer runs, and this copy.
            hub=Hub("CogComp/trec", test="test", revision="refs/convert/parquet"),
            line=_typed_question,
        ),
        Task(
            title="AG News",
            prompt="Article: {text}\nAnswer:",
            classes=(
                ("World", "World"),
                ("Sports", "Sports"),
                ("Business", "Business"),
                ("Sci/Tech", "Technology"),
            ),
            prepare=_stripped("text"),
            hub=Hub("fancyzhx/ag_news", test="test"),
        ),
        Task(
            title="MNLI",
            prompt=SUPPOSE,
            classes=ENTAILMENT_3,
            hub=Hub("nyu-mll/glue", "mnli", test="validation_matched"),
        ),
        Task(
            title="SNLI",
            prompt=SUPPOSE,
            classes=ENTAILMENT_3,
            unlabeled=("-",),  # the annotators disagreed
            hub=Hub("stanfordnlp/snli"),
        ),
    )
}


def get_task(name: str) -> Task:
    """Return the task `name`, ignoring case, hyphens and spaces.

    Raises:
        UserError: There is no such task; the message lists all.
    """
    if plain(name) not in TASKS:
        raise UserError(f"there is no task {name!r}; tasks are {', '.join(TASKS)}")
    return TASKS[plain(name)]
