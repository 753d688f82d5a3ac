from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lopa_lightning.data.collate import Collate, Rows

ROWS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7], "index": 4},
    {"input_ids": [8], "index": 2},
]


def with_key(key: str, *values: Any) -> list[dict[str, Any]]:
    return [{**row, key: value} for row, value in zip(ROWS, values)]


def test_padding_goes_to_the_right() -> None:
    batch = Collate(pad_id=9, side="right")(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["index"].tolist() == [4, 2]


def test_padding_goes_to_the_left() -> None:
    batch = Collate(pad_id=9, side="left")(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_token_types_are_padded_as_the_text_is() -> None:
    rows = with_key("token_type_ids", [0, 1, 1], [1])
    assert Collate(0, side="left")(rows)["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 1]]
    assert Collate(0, side="right")(rows)["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_an_instance_is_padded_on_the_right_with_its_own_token() -> None:
    batch = Collate(pad_id=9, instance_pad_id=3, side="left")(with_key("instance_input_ids", [1], [1, 2, 2, 2]))
    assert batch["instance_input_ids"].tolist() == [[1, 3, 3, 3], [1, 2, 2, 2]]
    assert batch["instance_attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]


def test_keys_are_those_of_the_rows_and_their_masks() -> None:
    assert set(Collate(0)(ROWS)) == {"index", "input_ids", "attention_mask"}
    rows: Any = with_key("token_type_ids", [0, 0, 0], [0])
    rows = [{**row, "instance_input_ids": [1], "labels": 0} for row in rows]
    assert set(Collate(0)(rows)) == {
        *("index", "input_ids", "attention_mask", "token_type_ids", "labels"),
        *("instance_input_ids", "instance_attention_mask"),
    }


def test_classes_are_integers_and_numbers_floats() -> None:
    classes = Collate(0)(with_key("labels", 1, 0))["labels"]
    numbers = Collate(0)(with_key("labels", 1.0, 0.25))["labels"]
    assert (classes.dtype, classes.tolist()) == (torch.int64, [1, 0])
    assert (numbers.dtype, numbers.tolist()) == (torch.float32, [1.0, 0.25])


def test_ids_and_masks_are_integers() -> None:
    batch = Collate(0)(ROWS)
    assert {value.dtype for value in batch.values()} == {torch.int64}


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=6), st.booleans())
def test_the_mask_gives_back_the_rows(texts: list[list[int]], left: bool) -> None:
    batch = Collate(pad_id=0, side="left" if left else "right")([{"input_ids": t, "index": 0} for t in texts])
    shown = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    assert shown == texts
    assert batch["input_ids"].shape[1] == max(map(len, texts))


def test_a_table_of_rows_is_padded_as_rows_are() -> None:
    random = np.random.default_rng(0)
    rows = [
        {
            "input_ids": random.integers(0, 99, size).tolist(),
            "labels": random.integers(0, 99, size).tolist(),
            "instance_input_ids": random.integers(0, 99, 9 - size).tolist(),
            "index": index,
        }
        for index, size in enumerate(random.integers(1, 9, size=40))
    ]
    data = Rows(Dataset.from_list(rows).select(range(39, -1, -1)))  # of a selection rows lie in another order
    taken = [3, 17, 5, 39]
    for side in ("left", "right"):
        collate = Collate(pad_id=1, instance_pad_id=2, side=side)  # type: ignore[arg-type]
        batch, expected = collate(data[taken]), collate([rows[39 - row] for row in taken])
        assert set(batch) == set(expected)
        assert all(torch.equal(value, expected[key]) for key, value in batch.items())


def test_labels_of_tokens_are_ignored_at_padding() -> None:
    batch = Collate(pad_id=0, side="left")(with_key("labels", [-100, 6, 7], [8]))
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, 8]]
