"""Prompts and completions: which tokens are labels, what is cut, what is left out, and that it is said."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lopa_lightning.data import CompletionDataModule
from lopa_lightning.errors import LoPAError
from lopa_lightning.task import IGNORED
from tests.data.conftest import SpecOf, TokenizerOf
from tests.data.helpers import write

ROWS = [
    {"prompt": "the film was", "completion": " great"},
    {"prompt": "It was a terrible story , badly told , but the cast", "completion": " was good"},
    {"prompt": "Yes", "completion": ""},
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prepared(spec: Any, rows: list[dict[str, Any]], stage: str = "test", ending: str = "jsonl", **options: Any) -> Any:
    files: Any = {split: write(f"{split}.{ending}", rows) for split in ("train", "validation", "test")}
    data = CompletionDataModule(data_files=files, **{"batch_size": 1, "eval_batch_size": 1, **options})
    data.connect(spec)
    data.setup(stage)
    return data


def rows_of(data: Any, role: str = "test") -> list[dict[str, list[int]]]:
    loaders = {"test": data.test_dataloader, "val": data.val_dataloader, "predict": data.predict_dataloader}
    batches = sorted(loaders[role]()[0], key=lambda batch: int(batch["index"]))
    return [{key: values[0].tolist() for key, values in batch.items()} for batch in batches]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_the_completion_and_its_end_are_labels_and_nothing_else(
    text_spec: SpecOf, tokenizer: TokenizerOf, ending: str
) -> None:
    tokens = tokenizer("llama")
    rows = ROWS[:2] if ending == "csv" else ROWS  # an empty cell is a missing one
    found = rows_of(prepared(text_spec("llama", "causal_lm"), rows, ending=ending))
    for row, (read, end) in zip(rows, ((item, tokens.eos_token_id) for item in found)):
        prompt, answer = (tokens.encode(row[key], add_special_tokens=False) for key in ("prompt", "completion"))
        assert read["input_ids"] == [*prompt, *answer, end]
        assert read["labels"] == [IGNORED] * len(prompt) + [*answer, end]


def test_a_prompt_too_long_is_cut_from_the_left_and_a_completion_never(
    text_spec: SpecOf, tokenizer: TokenizerOf
) -> None:
    tokens, spec = tokenizer("llama"), text_spec("llama", "causal_lm", max_tokens=6)
    rows = [*ROWS[:2], {"prompt": "No", "completion": " , it was bad and terrible , badly told , it was"}]
    with pytest.warns(UserWarning, match="were") as said:
        kept = rows_of(prepared(spec, rows, "fit"), "val")
    messages = [str(warning.message) for warning in said]
    assert "val (validation): 1 of 3 rows were left out: their completion alone is longer than 6 tokens" in messages
    assert "train (train): 1 of 3 rows were left out: their completion alone is longer than 6 tokens" in messages
    assert "val (validation): 1 of 3 prompts were cut from the left to fit 6 tokens with their completion" in messages
    assert [row["index"] for row in kept] == [0, 1]
    for row, read in zip(rows, kept):
        answer = [*tokens.encode(row["completion"], add_special_tokens=False), tokens.eos_token_id]
        prompt = tokens.encode(row["prompt"], add_special_tokens=False)
        assert read["input_ids"] == [*prompt, *answer][-6:]
        assert read["input_ids"][-len(answer) :] == answer


def test_a_test_keeps_a_row_whose_completion_does_not_fit_without_its_loss(text_spec: SpecOf) -> None:
    rows = [*ROWS[:1], {"prompt": "No", "completion": " , it was bad and terrible , badly told , it was"}]
    with pytest.warns(UserWarning, match="test \\(test\\): 1 of 2 rows have no loss"):
        found = rows_of(prepared(text_spec("llama", "causal_lm", max_tokens=6), rows))
    assert set(found[1]["labels"]) == {IGNORED}
    assert len(found) == 2


def test_predict_reads_prompts_alone(text_spec: SpecOf, tokenizer: TokenizerOf) -> None:
    data = prepared(text_spec("llama", "causal_lm"), [{"prompt": row["prompt"]} for row in ROWS], "predict")
    found = rows_of(data, "predict")
    assert all("labels" not in row for row in found)
    assert [tokenizer("llama").decode(row["input_ids"]) for row in found] == [row["prompt"] for row in ROWS]


def test_a_batch_pads_labels_like_its_ids(text_spec: SpecOf) -> None:
    for side in ("left", "right"):
        data = prepared(text_spec("llama", "causal_lm"), ROWS, batch_size=3, eval_batch_size=3, padding_side=side)
        (batch,) = data.test_dataloader()[0]
        assert batch["labels"].shape == batch["input_ids"].shape
        own = batch["labels"] != IGNORED
        assert torch.equal(batch["labels"][own], batch["input_ids"][own])
        assert not (own & (batch["attention_mask"] == 0)).any()
        assert own.sum(1).tolist() == [int((labels != IGNORED).sum()) for labels in batch["labels"]]


def test_what_looks_like_a_special_token_in_a_text_is_text(text_spec: SpecOf, tokenizer: TokenizerOf) -> None:
    rows = [{"prompt": "the <|endoftext|> was", "completion": " <|endoftext|> great"}]
    (found,) = rows_of(prepared(text_spec("llama", "causal_lm"), rows))
    assert found["input_ids"].count(tokenizer("llama").eos_token_id) == 1
    assert tokenizer("llama").decode(found["input_ids"][:-1]) == "the <|endoftext|> was <|endoftext|> great"


def test_the_instance_is_the_prompt_or_its_own_column_cut_from_the_left(
    text_spec: SpecOf, tokenizer: TokenizerOf
) -> None:
    bert = tokenizer("bert")
    rows = [{**row, "topic": "the cast was good and the film was great"} for row in ROWS]
    for column, limit in ((None, None), ("topic", 5)):
        spec = text_spec("llama", "causal_lm", instance="bert", instance_max_tokens=limit)
        before = bert.backend_tokenizer.to_str()
        found = rows_of(prepared(spec, rows, instance_column=column))
        for row, read in zip(rows, found):
            whole = bert(row[column or "prompt"])["input_ids"]
            assert read["instance_input_ids"] == (whole if limit is None else [whole[0], *whole[-limit + 1 :]])
        assert bert.backend_tokenizer.to_str() == before
        assert bert.truncation_side == "right"


def test_a_chat_goes_through_the_tokenizers_template_and_its_last_answer_is_learned(
    text_spec: SpecOf, tokenizer: TokenizerOf
) -> None:
    tokens = tokenizer("chat")
    chat = [
        {"role": "user", "content": "It was"},
        {"role": "assistant", "content": "great"},
        {"role": "user", "content": "and the cast"},
        {"role": "assistant", "content": "was good"},
    ]
    data = prepared(text_spec("chat", "causal_lm"), [{"messages": chat}], messages_column="messages")
    (found,) = rows_of(data)
    learned = [label for label in found["labels"] if label != IGNORED]
    assert tokens.decode(learned) == "was good<|endoftext|>"
    asked = "<|user|>It was<|assistant|>great<|endoftext|><|user|>and the cast<|assistant|>"
    assert tokens.decode(found["input_ids"][: -len(learned)]) == asked
    assert data.example("test", 0).instance == "and the cast"
    # What is generated has no end token, and is compared with the answer as it stands in the chat.
    assert data.exact_matches("test", [0, 0], ["was good\n", "was"]) == [True, False]


CHATS = [
    [{"role": "user", "content": "the film was"}, {"role": "assistant", "content": "great"}],
    [
        {"role": "system", "content": "Yes No"},
        {"role": "user", "content": "It was"},
        {"role": "assistant", "content": "good"},
        {"role": "user", "content": "and the cast"},
        {"role": "assistant", "content": "was good"},
    ],
]
LAID_OUT = {  # what stands before the soft prompt, after it, and the answer
    "system": [
        ("<|system|>", "<|user|>the film was<|assistant|>", "great"),
        (
            "<|system|>Yes No\n",
            "<|user|>It was<|assistant|>good<|endoftext|><|user|>and the cast<|assistant|>",
            "was good",
        ),
    ],
    "user": [
        ("<|user|>", "\nthe film was<|assistant|>", "great"),
        (
            "<|system|>Yes No<|user|>It was<|assistant|>good<|endoftext|><|user|>",
            "\nand the cast<|assistant|>",
            "was good",
        ),
    ],
}


@pytest.fixture
def chat_spec(text_spec: SpecOf) -> Any:
    """What a module with the soft prompt in a chat asks for."""
    return lambda placement, limit=None: dataclasses.replace(
        text_spec("chat", "causal_lm", max_tokens=limit, instance="bert"), placement=placement
    )


@pytest.mark.parametrize("placement", LAID_OUT)
def test_chats_are_read_around_a_soft_prompt(placement: str, chat_spec: Any, tokenizer: TokenizerOf) -> None:
    rows = [{"messages": chat} for chat in CHATS]
    found = rows_of(prepared(chat_spec(placement), rows, messages_column="messages", padding_side="left"))
    for read, parts in zip(found, LAID_OUT[placement]):
        before, after, answer = (tokenizer("chat")(text)["input_ids"] for text in parts)
        learned = [*answer, tokenizer("chat").eos_token_id]
        assert read["input_ids"] == [*before, *after, *learned]
        assert read["labels"] == [IGNORED] * len([*before, *after]) + learned
        assert read["prompt_position"] == len(before)
    assert [tokenizer("bert").decode(read["instance_input_ids"], True) for read in found] == [
        "the film was",
        "and the cast",
    ]


@pytest.mark.parametrize("limit", [None, 6])
def test_after_a_prompt_the_soft_prompt_stands_before_the_completion(
    limit: int | None, text_spec: SpecOf, tokenizer: TokenizerOf
) -> None:
    spec = dataclasses.replace(text_spec("llama", "causal_lm", max_tokens=limit), placement="after")
    rows = [{"prompt": "a very long story about the film was", "completion": " great"}]
    prompt, answer = (tokenizer("llama")(text)["input_ids"] for text in rows[0].values())
    answer = [*answer, tokenizer("llama").eos_token_id]
    for stage, role in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        (read,) = rows_of(prepared(spec, rows, stage), role)
        completed = [] if stage == "predict" else answer
        kept = prompt if limit is None else prompt[len(completed) - limit :]
        assert read["input_ids"] == [*kept, *completed]
        assert read["prompt_position"] == len(kept)


def test_a_prompt_and_its_completion_are_a_chat_around_a_soft_prompt(chat_spec: Any) -> None:
    chats = [{"messages": CHATS[0]}]
    pairs = [{"prompt": "the film was", "completion": "great"}]
    for stage, role in (("test", "test"), ("predict", "predict"), ("validate", "val")):
        (wanted,) = rows_of(prepared(chat_spec("system"), chats, stage, messages_column="messages"), role)
        assert rows_of(prepared(chat_spec("system"), pairs, stage), role) == [wanted]
        assert ("labels" in wanted) == (stage != "predict")


def test_a_chat_around_a_soft_prompt_is_never_cut(chat_spec: Any, tokenizer: TokenizerOf) -> None:
    lengths = [len(tokenizer("chat")("".join(parts))["input_ids"]) + 1 for parts in LAID_OUT["system"]]
    rows, options = [{"messages": chat} for chat in CHATS], {"messages_column": "messages"}
    with pytest.warns(UserWarning, match="1 of 2 rows were left out: their chat, which is not cut, is longer than"):
        (kept,) = rows_of(prepared(chat_spec("system", lengths[0] + 1), rows, "validate", **options), "val")
    assert kept["index"] == 0
    for stage in ("test", "predict"):
        with pytest.raises(LoPAError, match=r"row 2 .*a chat has \d+ tokens, room for \d+, .*'system' it is not cut"):
            prepared(chat_spec("system", lengths[0] + 1), rows, stage, **options)


def test_a_row_that_has_no_place_for_a_soft_prompt_is_named(chat_spec: Any) -> None:
    rows = [{"prompt": "x", "completion": "y"}, {"prompt": "a <prompt_embeds>", "completion": "y"}]
    with pytest.raises(
        LoPAError, match=r"val \(validation\): row 2 \(counted from 1\): a text must not contain <prompt_embeds>"
    ):
        prepared(chat_spec("user"), rows, "validate")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "x"}], {}, "no column completion"),
        ([{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": None}], {}, "row 2 .* has no completion"),
        ([{"prompt": " ", "completion": "y"}], {}, "column 'prompt' is empty in row 1"),
        ([{"prompt": "x", "completion": "y"}], {"prompt_column": "question"}, "no column question"),
        ([{"messages": []}], {"messages_column": "messages"}, "has no chat template"),
        ([{"prompt": "x", "completion": "y " * 99}], {"max_length": 5}, "none of the 1 rows fits; raise max_length"),
    ],
)
def test_rows_that_cannot_be_learned_are_named(
    text_spec: SpecOf, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoPAError, match=message):
        prepared(text_spec("llama", "causal_lm"), rows, "validate", **options)


def test_an_exact_match_is_a_completion_of_the_rows_own(text_spec: SpecOf) -> None:
    data = prepared(text_spec("llama", "causal_lm"), ROWS)
    records = data.score([1, 0], [["was good\n", "was"], [" great", "great film"]])
    assert [(record["index"], record["sample"], record["passed"]) for record in records] == [
        *((1, 0, True), (1, 1, False), (0, 0, True), (0, 1, False))
    ]
    assert json.dumps(records)
