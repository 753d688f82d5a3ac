"""From rows to a batch: a plain dict of padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lopa_lightning.task import IGNORED


class Collate:
    """Pads a batch to its longest row.

    Args:
        pad_id: Backbone token at padding.
        instance_pad_id: Instance encoder token at padding.
        side: Where the backbone's padding goes.

    Example:
        >>> batch = Collate(pad_id=0)([{"input_ids": [5, 6], "index": 0}, {"input_ids": [7], "index": 1}])
        >>> batch["input_ids"], batch["attention_mask"]
        (tensor([[5, 6],
                [7, 0]]), tensor([[1, 1],
                [1, 0]]))
    """

    def __init__(self, pad_id: int, instance_pad_id: int = 0, side: Literal["left", "right"] = "right") -> None:
        self.pad_id = pad_id
        self.instance_pad_id = instance_pad_id
        self.side = side

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            rows: ``input_ids``, ``index``, and optionally ``token_type_ids``, ``instance_input_ids``,
                ``instance_token_type_ids``, ``instance``, ``labels``.

        Returns:
            ``input_ids``, ``attention_mask`` (and ``token_type_ids``) ``[B, T]``;
            ``instance_input_ids``, ``instance_attention_mask`` (and ``instance_token_type_ids``) ``[B, S]``,
            or ``instance [B, e]``;
            ``index``, ``labels`` ``[B]``; where rows have a label for each token, ``labels [B, T]`` with
            :data:`~lopa_lightning.task.IGNORED` at padding.
        """
        batch = {"index": torch.tensor([row["index"] for row in rows])}
        batch |= self._padded(rows, "input_ids", "attention_mask", self.pad_id, self.side)
        if "instance_input_ids" in rows[0]:
            batch |= self._padded(rows, "instance_input_ids", "instance_attention_mask", self.instance_pad_id, "right")
        if "instance" in rows[0]:
            batch["instance"] = torch.from_numpy(np.stack([row["instance"] for row in rows]))
        for key, side in (("token_type_ids", self.side), ("instance_token_type_ids", "right")):
            if key in rows[0]:
                batch[key] = self._padded(rows, key, "", 0, side)[key]
        if "labels" in rows[0]:
            if isinstance(rows[0]["labels"], list):
                batch["labels"] = self._padded(rows, "labels", "", IGNORED, self.side)["labels"]
            else:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch

    @staticmethod
    def _padded(
        rows: Sequence[dict[str, Any]], key: str, mask_key: str, pad_id: int, side: Literal["left", "right"]
    ) -> dict[str, Tensor]:
        width = max(len(row[key]) for row in rows)
        ids, masks = [], []
        for row in rows:
            values, gap = list(row[key]), width - len(row[key])
            padding, mask = [pad_id] * gap, [1] * len(values)
            ids.append(padding + values if side == "left" else values + padding)
            masks.append([0] * gap + mask if side == "left" else mask + [0] * gap)
        return {key: torch.tensor(ids), mask_key: torch.tensor(masks)}
