"""What we are measured against: plain loops; the same text tokens, batch size and optimizer, and no dropout."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lopa_lightning import LoPA
from lopa_lightning.data.completion import CompletionDataModule
from lopa_lightning.data.text import TextDataModule
from lopa_lightning.instances.encoder import pool
from lopa_lightning.task import IGNORED
from tests.benchmarks.cases import MINILM, Case, Places
from tests.benchmarks.training import Batch

_INSTANCE_TOKENS = 512


@dataclass(frozen=True)
class Example:
    """A training example as it was taken from a batch of ours.

    Attributes:
        input_ids: ``[T]``, without padding.
        labels: ``[T]``, or a class index ``[]``.
        texts: What an instance encoder reads: one text, or a pair.
    """

    input_ids: Tensor
    labels: Tensor
    texts: tuple[str, ...]


def examples_in(batches: Sequence[Batch], data: TextDataModule, split: str = "train") -> list[Example]:
    """The examples of batches.

    Args:
        batches: Of one of the data module's loaders.
        data: Has their texts.
        split: Which they are of.
    """
    rows = data.load_split(split, "train" if split == "train" else "val")
    found = []
    for batch in batches:
        for ids, mask, labels, index in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels", "index"))):
            if isinstance(data, CompletionDataModule):
                texts: tuple[str, ...] = (data.layout("train")(rows[int(index)]).instance,)
            else:
                texts = tuple(rows[int(index)][column] for column in data.template.columns)
            real = mask == 1
            found.append(Example(ids[real], labels[real] if labels.dim() else labels, texts))
    return found


class PlainLoop(ABC):
    """An epoch in shuffled batches: forward, backward, AdamW.

    Args:
        case: Backbone and sizes.
        places: Where models are.
    """

    def __init__(self, case: Case, places: Places) -> None:
        torch.manual_seed(0)
        self.case = case
        self.backbone = self._load(places.model(case.backbone))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(places.model(case.backbone))
        self.model = self.build(places)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)

    def _load(self, name: str) -> Any:
        if self.case.is_causal:
            return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2, dtype=torch.float32, **off)

    @abstractmethod
    def build(self, places: Places) -> nn.Module:
        """The model, of which what is to be trained wants gradients."""

    @abstractmethod
    def loss(self, examples: Sequence[Example]) -> Tensor:
        """The loss of a batch."""

    def pretrained(self) -> list[nn.Module]:
        """The models whose weights were loaded."""
        return [self.backbone]

    def epoch(self, examples: Sequence[Example], number: int) -> None:
        """Trains on all examples.

        Args:
            examples: In any order.
            number: Of the epoch, which decides the order.
        """
        order = random.Random(number).sample(range(len(examples)), len(examples))
        for start in range(0, len(order), self.case.batch_size):
            loss: Any = self.loss([examples[place] for place in order[start : start + self.case.batch_size]])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def padded(self, examples: Sequence[Example], width: int | None = None) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` of a batch, padded on the right.

        Args:
            examples: Of the batch.
            width: To pad to; None for the longest.
        """
        ids = _padded([each.input_ids for each in examples], self.tokenizer.pad_token_id or 0, width)
        mask = _padded([torch.ones_like(each.input_ids) for each in examples], 0, width)
        labels = [each.labels for each in examples]
        wide = _padded(labels, IGNORED, width) if labels[0].dim() else torch.stack(labels)
        return {"input_ids": ids, "attention_mask": mask, "labels": wide}


class PromptTuning(PlainLoop):
    """Prompt tuning by PEFT, padded to the longest of a batch, as many virtual tokens."""

    def build(self, places: Places) -> nn.Module:
        from peft import PromptTuningConfig, get_peft_model

        kind = "CAUSAL_LM" if self.case.is_causal else "SEQ_CLS"
        config = PromptTuningConfig(task_type=kind, num_virtual_tokens=self.case.num_virtual_tokens)
        return get_peft_model(self.backbone, config).train()

    def loss(self, examples: Sequence[Example]) -> Tensor:
        found: Tensor = self.model(**self.padded(examples)).loss
        return found


class LoRA(PlainLoop):
    """LoRA of rank 8 on query and value by PEFT, padded to the longest of a batch."""

    def build(self, places: Places) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        kind, targets = ("CAUSAL_LM", ["q_proj", "v_proj"]) if self.case.is_causal else ("SEQ_CLS", ["query", "value"])
        return get_peft_model(self.backbone, LoraConfig(task_type=kind, r=8, target_modules=targets)).train()

    def loss(self, examples: Sequence[Example]) -> Tensor:
        found: Tensor = self.model(**self.padded(examples)).loss
        return found


class Released(PlainLoop):
    """LoPA as its paper's code was released: fixed padding, the encoder at every step on 512 places, all logits."""

    def build(self, places: Places) -> nn.Module:
        name = places.model(MINILM)
        self.encoder: Any = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        self.encoder_tokenizer: Any = AutoTokenizer.from_pretrained(name)
        self.backbone.requires_grad_(False)
        if not self.case.is_causal:
            self.backbone.classifier.requires_grad_(True)
        config = self.backbone.config
        made = LoPA(config.hidden_size, self.encoder.config.hidden_size, self.case.num_virtual_tokens, self.case.rank)
        return nn.ModuleDict({"prompt_encoder": made, "backbone": self.backbone}).train()

    def pretrained(self) -> list[nn.Module]:
        return [self.backbone, self.encoder]

    def loss(self, examples: Sequence[Example]) -> Tensor:
        m, room = self.case.num_virtual_tokens, self.backbone.config.max_position_embeddings
        batch = self.padded(examples, min(self.case.max_length, room - m))
        with torch.no_grad():
            read = self._instance(examples)
            vectors = pool(self.encoder(**read).last_hidden_state, read["attention_mask"], "mean")
        prompts = self.model["prompt_encoder"](vectors)  # type: ignore[index]
        embedded = self.backbone.get_input_embeddings()(batch["input_ids"])
        mask, labels = batch["attention_mask"], batch["labels"]
        mask = torch.cat([mask.new_ones(len(mask), m), mask], dim=1)
        if labels.dim() > 1:
            labels = torch.cat([labels.new_full((len(labels), m), IGNORED), labels], dim=1)
        embeddings = torch.cat([prompts, embedded], dim=1)
        found: Tensor = self.backbone(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss
        return found

    def _instance(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        texts = [list(column) for column in zip(*(each.texts for each in examples))]
        width = min(_INSTANCE_TOKENS, self.encoder.config.max_position_embeddings)
        options = {"padding": "max_length", "truncation": True, "max_length": width, "return_tensors": "pt"}
        return dict(self.encoder_tokenizer(*texts, **options))


PEERS: dict[str, type[PlainLoop]] = {"prompt_tuning": PromptTuning, "lora": LoRA, "released": Released}


def _padded(rows: Sequence[Tensor], value: int, width: int | None) -> Tensor:
    ids = pad_sequence(list(rows), batch_first=True, padding_value=value)
    return ids if width is None else nn.functional.pad(ids, (0, width - ids.shape[1]), value=value)
