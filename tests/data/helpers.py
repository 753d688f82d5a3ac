"""Writes rows as files and reads loaders back into rows, for tests to compare."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data import TextClassificationDataModule
from lopa_lightning.data.text import TextDataModule

_MASK_OF = {
    "input_ids": "attention_mask",
    "token_type_ids": "attention_mask",
    "instance_input_ids": "instance_attention_mask",
}


def write(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Writes rows in the format that the name's ending says, and returns the name."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return name


def labelled(texts: Sequence[str], labels: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of a text and a label, labels repeating."""
    return [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)]


def prepared(spec: TextSpec, stage: str = "fit", **options: Any) -> TextClassificationDataModule:
    """A data module of good and bad texts, set up for a stage."""
    data = TextClassificationDataModule(**{"labels": ["bad", "good"], **options})
    data.connect(spec)
    data.setup(stage)
    return data


def rows_of(batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """The rows of all batches, without padding and masks, in the order of their index."""
    rows = [
        {key: _value(batch, key, i) for key in batch if not key.endswith("attention_mask")}
        for batch in batches
        for i in range(len(batch["index"]))
    ]
    return sorted(rows, key=lambda row: row["index"])


def texts_of(data: TextDataModule, batches: Iterable[dict[str, Tensor]]) -> list[str]:
    """What a tokenizer of bytes has read, in the order of the index."""
    assert data.text_spec is not None
    return [data.text_spec.tokenizer.decode(row["input_ids"]) for row in rows_of(batches)]


def _value(batch: dict[str, Tensor], key: str, i: int) -> Any:
    value = batch[key][i]
    if key in _MASK_OF:
        value = value[batch[_MASK_OF[key]][i].bool()]
    return value.tolist()
