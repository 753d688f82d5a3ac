"""Soft prompts from a bundle, without the backbone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lopa_lightning import checkpoint
from lopa_lightning.backbones.image_spec import ImageKind, ImageProcessing
from lopa_lightning.backbones.text_spec import TextKind, instance_batch, instance_reading
from lopa_lightning.backbones.tokens import end_of
from lopa_lightning.data.task_rows import instance_encoding, rows_of
from lopa_lightning.data.word_rows import words_of
from lopa_lightning.errors import LoPAError, at_least
from lopa_lightning.instances.encoder import InstanceEncoder, controlled
from lopa_lightning.modules import ClassificationModule
from lopa_lightning.modules.predict import check_rows, given_rows, image_batches, image_sources
from lopa_lightning.plain import built, plain
from lopa_lightning.serving.bundle import Bundle, tokenizer_facts


class LoPAPrompter(nn.Module):
    """Makes the soft prompts of a bundle: instance encoder and prompt encoder alone. The backbone is never read.

    It is a torch module in eval mode: ``prompter.to("cuda")`` moves it. One thread at a time may call it.

    Args:
        bundle: See :class:`~lopa_lightning.serving.bundle.Bundle`.
        trust_remote_code: Whether the instance encoder may run code of its own, where the bundle says that it does.

    Raises:
        LoPAError: If its soft prompts are not all that the backbone must be given, need the backbone, or the instance
            encoder, its tokenizer or its image processor is not the bundle's.
    """

    def __init__(self, bundle: Bundle, trust_remote_code: bool = False) -> None:
        super().__init__()
        module = bundle.unloaded_module(trust_remote_code)
        bundle.check_prompts()
        kind = module.builder.kind
        if not isinstance(kind, TextKind | ImageKind):
            raise LoPAError(f"{type(module).__name__} reads another kind of input than texts and images")
        self.bundle, self.reads_images = bundle, isinstance(kind, ImageKind)
        self.task = module.required_task() if isinstance(module, ClassificationModule) else None
        self.prompt_encoder = bundle.prompt_encoder()
        self.encoder: InstanceEncoder | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.max_tokens: int | None = None
        self.processing: ImageProcessing | None = None
        if self.prompt_encoder.uses_instance:
            if isinstance(kind, ImageKind):
                self.processing = self._view(kind.encoder_processing, module.builder.encoder_spec.name)
            else:
                self.tokenizer, self.max_tokens = instance_reading(module.builder.encoder_spec)
                self._check_tokenizer(self.tokenizer)
            self.encoder, facts = module.builder.own_encoder()
            saved = {"instance_encoder": bundle.config.identity.get("instance_encoder")}
            checkpoint.check_identity(saved, {"instance_encoder": {**module.builder.encoder_identity(), **facts}})
            _load(self.encoder, bundle.part("instance_encoder"))
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        revision: str | None = None,
        *,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> LoPAPrompter:
        """Loads a prompter.

        Args:
            name: A bundle's folder, or its repository on the hub.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: See :class:`LoPAPrompter`.
            **options: See :meth:`~lopa_lightning.serving.bundle.Bundle.from_pretrained`.

        Raises:
            LoPAError: See :class:`LoPAPrompter`.
        """
        return cls(Bundle.from_pretrained(name, revision, **options), trust_remote_code)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the bundle, see :meth:`~lopa_lightning.serving.bundle.Bundle.save_pretrained`."""
        self.bundle.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the bundle, see :meth:`~lopa_lightning.serving.bundle.Bundle.push_to_hub`."""
        return self.bundle.push_to_hub(repo_id, **options)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.prompt_encoder.parameters()).device

    @torch.no_grad()
    def forward(self, inputs: Any, batch_size: int = 32) -> Tensor:
        """Makes the soft prompts of texts or images.

        Args:
            inputs: A text or a list of them: what the instance encoder reads. For a classifier, also of images, rows as
                ``predict`` takes them.
            batch_size: Texts, of like lengths, or images at a time.

        Returns:
            Z ``[B, m, d]`` in the order of the inputs, in the prompt encoder's dtype.

        Raises:
            LoPAError: If a row has not what is read, or an image is broken.
        """
        at_least(1, batch_size=batch_size)
        if self.reads_images:
            images = image_sources(inputs)
            count = len(images)
        else:
            rows = self._rows(inputs)
            count = len(next(iter(rows.values())))
        if self.encoder is None:
            shared: Tensor = self.prompt_encoder(None)
            return shared.expand(count, -1, -1).clone()
        shape = self.bundle.config.prompt
        dtype = next(self.prompt_encoder.parameters()).dtype
        found = torch.empty(count, shape.num_virtual_tokens, shape.embedding_dim, dtype=dtype, device=self.device)
        if count == 0:
            return found
        if self.processing is not None:
            for batch in image_batches(images, {"pixels": self.processing}, batch_size, self.device):
                found[batch.pop("index")] = self._prompts(self.encoder(batch))
            return found
        encoded = self._encoded(rows)
        order = sorted(range(count), key=lambda row: -len(encoded["input_ids"][row]))
        for first in range(0, count, batch_size):
            part = order[first : first + batch_size]
            chosen = {key: [values[row] for row in part] for key, values in encoded.items()}
            found[part] = self._prompts(self.vectors(chosen))
        return found

    def _rows(self, inputs: Any) -> dict[str, list[str]]:
        """The texts by column; words of a row as one text, as in training."""
        if self.task is None:
            check_rows(rows := rows_of(inputs, ["text"]))
            return rows
        rows = given_rows(self.task, inputs)
        if self.task.per_word:
            return {column: [" ".join(words_of(value)) for value in values] for column, values in rows.items()}
        return rows

    def _encoded(self, rows: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Token ids for the instance encoder, as in training; how many texts were cut is said."""
        assert self.tokenizer is not None
        if self.task is None:
            encoded = end_of(self.tokenizer, rows["text"], self.max_tokens)
        else:
            encoded = instance_encoding(self.task, self.tokenizer, self.max_tokens)(rows)
        if cut := sum(encoded.pop("truncated")):
            rank_zero_warn(f"{cut} texts were cut to {self.max_tokens} tokens for the instance encoder")
        return encoded

    def vectors(self, encoded: Mapping[str, list[list[int]]]) -> Tensor:
        """Encodes texts that are token ids already; a subclass may keep what it has encoded.

        Args:
            encoded: What the instance encoder reads, by its names.

        Returns:
            Instance vectors ``[B, e]``.
        """
        assert self.encoder is not None
        assert self.tokenizer is not None
        found: Tensor = self.encoder(instance_batch(self.tokenizer, encoded, self.device))
        return found

    def _prompts(self, vectors: Tensor) -> Tensor:
        assert self.encoder is not None
        vectors = controlled(vectors, self.encoder.spec.control)
        prompts: Tensor = self.prompt_encoder(vectors.to(next(self.prompt_encoder.parameters()).dtype))
        return prompts

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        wanted = self.bundle.config.tokenizers.get("instance_encoder")
        if wanted is None or wanted.sha256 != tokenizer_facts(tokenizer).sha256:
            raise LoPAError(
                f"the tokenizer of the instance encoder {tokenizer.name_or_path!r} is not the one that the bundle was "
                "trained with; name the revision that it was"
            )

    def _view(self, own: ImageProcessing, name: str) -> ImageProcessing:
        """What the instance encoder reads of an image, by the bundle; its own processor must be that of training."""
        task = self.bundle.config.identity.get("task")
        known = task if isinstance(task, Mapping) else {}
        key = "instance_processing" if "instance_processing" in known else "view"
        view: ImageProcessing = built(known.get(key), ImageProcessing, f"identity.task.{key}")
        expected = own if key == "instance_processing" else replace(own, resize=view.resize, crop=view.crop)
        if lines := checkpoint.differences(plain(view), plain(expected), between=("the bundle", "it")):
            raise LoPAError(
                f"the image processor of the instance encoder {name!r} is not the one that the bundle was trained "
                f"with: {checkpoint.joined(lines)}"
            )
        return view


def _load(encoder: InstanceEncoder, tensors: Mapping[str, Tensor]) -> None:
    """Loads what of an instance encoder was trained, if anything."""
    trained = {name: each for name, each in encoder.named_parameters() if each.requires_grad}
    checkpoint.check_tensors(tensors, trained)
    encoder.load_state_dict(tensors, strict=False)
