"""Learns completions by a causal language model token by token, and generates them."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import MetricCollection

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.base import Backbone, Batch
from lopa_lightning.backbones.chat import Chat, with_instances
from lopa_lightning.backbones.generation import check_generates, check_samples, generation_config, stop_strings
from lopa_lightning.backbones.pretrained import in_eval_mode
from lopa_lightning.backbones.sharding import check_equal, is_sharded
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.data.code.base import CodeDataModule
from lopa_lightning.data.completion import CompletionDataModule
from lopa_lightning.errors import LoPAError, at_least
from lopa_lightning.metrics.pass_at_k import PassAtK
from lopa_lightning.metrics.tokens import Perplexity, TokenAccuracy
from lopa_lightning.modules.base import LoPALightningModule
from lopa_lightning.modules.completing import completed, room_for_prompts
from lopa_lightning.modules.readouts import CompletionReadout, Readout
from lopa_lightning.modules.scores import Share
from lopa_lightning.modules.start import answering
from lopa_lightning.plain import built
from lopa_lightning.task import IGNORED, Side

_ENCODER_INPUTS = ("instance", "instance_input_ids", "instance_attention_mask", "instance_token_type_ids")


class CausalLMModule(LoPALightningModule):
    """Learns to complete prompts, and completes them.

    The loss is the mean over the labelled tokens: completions and their end tokens. In a step every token counts once,
    whatever batch and process it is on, and so it does in evaluation.

    Args:
        generation: Fields of transformers' ``GenerationConfig``, such as ``{max_new_tokens: 256, do_sample: true,
            temperature: 0.2, top_p: 0.95}``; greedy by default. The model's own defaults are not used.
        num_samples: Completions that ``predict`` and ``test`` generate for each prompt.
        stop: Strings that end a completion, which does not contain them.
        generation_seed: Of samples; a prompt's samples depend on it and on the row, not on the batch.
        start_token: Whether every text, chats apart, starts with the start token also where the tokenizer puts none.
        score_completions: Whether ``test`` also generates completions and lets the data module score them, as pass@k.
        exact_match: For how many rows of the validation set, from its first, the likeliest completion is
            generated too: ``val/exact_match`` is the share whose answer is the row's own. ``all`` for all of them.
        **kwargs: See :class:`~lopa_lightning.modules.base.LoPALightningModule`.

    Raises:
        LoPAError: If ``num_samples`` is less than 1, ``stop`` is no list of texts, or ``exact_match`` neither ``all``
            nor a number of rows.
    """

    short_name = "causal_lm"
    objective = "causal_lm"

    def __init__(
        self,
        generation: dict[str, Any] | None = None,
        num_samples: int = 1,
        stop: Sequence[str] = (),
        generation_seed: int = 0,
        score_completions: bool = True,
        exact_match: int | Literal["all"] = 0,
        start_token: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(1, num_samples=num_samples)
        if exact_match != "all" and (type(exact_match) is not int or exact_match < 0):
            raise LoPAError(f"exact_match must be a number of rows, or all; got {exact_match!r}")
        self.generation = dict(generation or {})
        self.num_samples = num_samples
        self.stop = stop_strings(stop)
        self.generation_seed = generation_seed
        self.start_token = start_token
        self.instance_column: str | None = None
        self.score_completions = score_completions
        self.exact_match = sys.maxsize if exact_match == "all" else exact_match
        self.matched, self.solved = Share(), PassAtK(sorted({1, num_samples}))

    def configure_readout(self, backbone: Backbone) -> Readout:
        """Builds what reads the losses of labelled tokens."""
        return CompletionReadout()

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns the mean over the batch's labelled tokens."""
        return outputs[:, 0].sum() / outputs[:, 1].sum().clamp(min=1)

    def loss_weight(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Returns the number of labelled tokens."""
        return outputs[:, 1].sum()

    def configure_metrics(self) -> MetricCollection:
        """Builds perplexity and token accuracy."""
        return MetricCollection({"perplexity": Perplexity(), "token_accuracy": TokenAccuracy()})

    def more_logged(self) -> list[str]:
        """Returns ``exact_match``, where it is asked for."""
        return ["exact_match"] if self.exact_match else []

    def task_identity(self) -> dict[str, Any]:
        """Returns the kind of task, and whether texts start with a start token of ours."""
        return {"objective": "completion", **({"start_token": True} if self.start_token else {})}

    @functools.cached_property
    def input_spec(self) -> TextSpec:
        """Returns what a data module needs to tokenise for this module."""
        spec = super().input_spec
        assert isinstance(spec, TextSpec)
        return dataclasses.replace(spec, start_token=self.start_token)

    def generate(
        self,
        texts: str | Chat | Sequence[str | Chat],
        generation: Mapping[str, Any] | None = None,
        num_samples: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        instance_texts: str | Sequence[str] | None = None,
        batch_size: int = 8,
    ) -> list[list[str]]:
        """Completes texts, or answers chats: instance vector, soft prompt, text.

        A text too long for the backbone is cut from the left, but not in a chat that holds the soft prompt. The samples
        of a text depend on the seed and its position in ``texts``, not on ``batch_size``. Where the backbone is
        sharded, every process must call this, with equally many texts.

        Args:
            texts: A text, a chat (a list of messages, each with ``role`` and ``content``), or a list of either. With
                placement ``system`` or ``user`` a text is one message of the user.
            generation: Fields of transformers' ``GenerationConfig``, over the module's own.
            num_samples: Completions of each text; by default the module's.
            seed: Of sampling; by default the module's.
            stop: Strings that end a completion; by default the module's.
            instance_texts: What the instance encoder reads; by default the texts, of a chat its last message. Cut from
                the left.
            batch_size: Texts at a time.

        Returns:
            ``num_samples`` completions of each text.

        Raises:
            LoPAError: If an option is not what it must be, a text is empty, a chat is none or too long with the soft
                prompt in it, there is not one instance text for each text, processes that share a backbone have not as
                many texts each, nothing was trained or loaded, or the backbone cannot generate from embeddings.
        """
        at_least(1, num_samples=num_samples, batch_size=batch_size)
        ends = None if stop is None else stop_strings(stop)
        prompts, instances = with_instances(texts, instance_texts, self.instance_column)
        check_generates(self.builder.skeleton.backbone.model)
        completions: list[list[str]] = []
        with answering(self, "generate", self.padding_sides()):
            check_equal(self._net(), len(prompts))
            for first in range(0, len(prompts), batch_size):
                part = slice(first, first + batch_size)
                ids = self.input_spec.prompt_ids(prompts[part])
                seeds = range(first, first + len(ids[0]))
                encoder = self.input_spec.instance_batch(instances[part], self.device)
                completions += self._complete(ids, encoder, seeds, generation, num_samples, seed, ends)
        return completions

    def complete(
        self, batch: Batch, generation: Mapping[str, Any] | None = None, num_samples: int | None = None
    ) -> list[list[str]]:
        """Completes a batch's prompts: what of its texts is not labelled.

        Args:
            batch: As in training; without labels where the texts are prompts alone.
            generation: As in :meth:`generate`.
            num_samples: As in :meth:`generate`.

        Returns:
            ``num_samples`` completions of each row. Where the backbone is sharded, every process must ask for them,
            also one whose batch has no row.
        """
        is_prompt = batch["attention_mask"] == 1
        if "labels" in batch:
            is_prompt &= batch["labels"] == IGNORED
        prompts = [ids[own].tolist() for ids, own in zip(batch["input_ids"], is_prompt)]
        encoder = {key: batch[key] for key in _ENCODER_INPUTS if key in batch}
        if not prompts:
            if is_sharded(self._net()):  # the others wait in every layer
                alike = {key: values.new_ones(1, *values.shape[1:]) for key, values in encoder.items()}
                self._complete(([[0, 0]], [1]), alike, [0], generation, num_samples)
            return []
        positions = batch["prompt_position"].tolist() if "prompt_position" in batch else [0] * len(prompts)
        return self._complete((prompts, positions), encoder, batch["index"].tolist(), generation, num_samples)

    def _complete(
        self,
        prompts: tuple[list[list[int]], list[int]],
        encoder: Mapping[str, Tensor],
        rows: Sequence[int],
        generation: Mapping[str, Any] | None = None,
        num_samples: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> list[list[str]]:
        with in_eval_mode(self):
            return completed(
                self._net(),
                self.input_spec,
                prompts,
                encoder,
                {**self.generation, **(generation or {})},
                self.num_samples if num_samples is None else num_samples,
                [(self.generation_seed if seed is None else seed, row) for row in rows],
                self.stop if stop is None else stop,
                self.device,
            )

    def setup(self, stage: str) -> None:
        """Checks the settings of generation, and that completions may be scored, before weights are loaded.

        Raises:
            LoPAError: If a setting is wrong, the instance encoder is to read other texts than in training, or scoring
                needs a permission that was not given.
        """
        self._take_instance_column(stage)
        super().setup(stage)
        with torch.inference_mode(False):  # what an evaluation has left that was cut short
            self.matched.reset()
            self.solved.reset()
        config = generation_config(self.generation, self.input_spec.tokenizer, None)
        check_samples(config, self.num_samples)
        scorer = self._scorer() if stage == "test" else None
        matches = bool(self.exact_match) and stage in ("fit", "validate")
        generates = stage == "predict" or matches or scorer is not None
        check_generates(self.builder.skeleton.backbone.model, generates)
        if matches and self._completions() is None:
            raise LoPAError("exact_match needs a data module that knows the completions, such as CompletionDataModule")
        if scorer is not None:
            scorer.check_scoring()
        if generates:
            room_for_prompts(self.input_spec, int(config.max_new_tokens))

    def restore(self, hparams: Mapping[str, Any]) -> None:
        """Takes the column of what the instance encoder read in training, where that was not the prompt."""
        if "instance_column" in hparams:  # earlier checkpoints do not say
            self._set_instance_column(built(hparams["instance_column"], str | None, "instance_column"))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses also a checkpoint whose instance encoder read other texts than the data's."""
        super().on_load_checkpoint(checkpoint)
        self._check_instances(checkpoint[ckpt.HYPERPARAMETERS])

    def _set_instance_column(self, column: str | None) -> None:
        self.instance_column = self.hparams["instance_column"] = column

    def _take_instance_column(self, stage: str) -> None:
        if self.will_load is not None:
            self._check_instances(self.will_load[ckpt.HYPERPARAMETERS])
        elif stage != "fit":
            self._check_instances(self.hparams)
        if stage == "fit" and (data := self._completions()) is not None:
            reads = self.builder.skeleton.prompt_encoder.uses_instance
            self._set_instance_column(data.instance_source if reads else None)

    def _check_instances(self, trained: Mapping[str, Any]) -> None:
        """Raises a LoPAError if the data's instances are the prompts, and those of training were not, or vice versa."""
        data = self._completions()
        if "instance_column" not in trained or data is None:
            return
        was, given = trained["instance_column"], data.instance_source
        if was is None and isinstance(data, CodeDataModule):  # earlier checkpoints say so of questions, too
            return
        if (was is None) != (given is None) and self.builder.skeleton.prompt_encoder.uses_instance:
            option = "instance_reads" if isinstance(data, CodeDataModule) else "instance_column"
            read = "the prompt" if was is None else f"texts of their own, the column {was!r}"
            would = "the prompt" if given is None else f"{given!r}"
            raise LoPAError(f"in training the instance encoder read {read}; by data.{option} it would read {would}")

    def padding_sides(self) -> set[Side]:
        """Says that texts to complete are padded on the left."""
        return {"left"}

    def _completions(self) -> CompletionDataModule | None:
        return self.data if isinstance(self.data, CompletionDataModule) else None

    def _scorer(self) -> CompletionDataModule | None:
        return self._completions() if self.score_completions else None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor | None]:
        """Updates loss and metrics by a batch, and by which of its completions match, where that is asked for."""
        if self.exact_match:
            kept = [row for row, index in enumerate(batch["index"].tolist()) if index < self.exact_match]
            part = _rows(batch, kept)
            texts = [text for (text,) in self.complete(part, {"do_sample": False, "num_beams": 1}, 1)]
            data = self._completions()
            matches = data.exact_matches("val", part["index"].tolist(), texts) if kept and data is not None else []
            # With nothing in it too: every process has then seen the metric.
            self.matched.update(torch.tensor(matches, dtype=torch.float, device=self.device))
        return super().validation_step(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics."""
        super().on_validation_epoch_end()
        if self.exact_match:
            self.log("val/exact_match", self.matched.compute())
            with torch.inference_mode(False):
                self.matched.reset()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Updates loss and metrics by a batch, and scores its completions: ``results``, one record for each.

        Rows in ``written`` count as they were scored, and are not generated again.
        """
        found: dict[str, Any] = {**super().test_step(batch, batch_idx, dataloader_idx)}
        if (scorer := self._scorer()) is None:
            return found
        known = [record for index in batch["index"].tolist() for record in self.written.get(index, [])]
        part = self._unwritten(batch)
        completions = self.complete(part)
        results = scorer.score(part["index"].tolist(), completions) if completions else []
        counted = [[row.get(key, False) for row in (*known, *results)] for key in ("index", "passed", "skipped")]
        self.solved.update(*(torch.tensor(column, device=self.device) for column in counted))
        return {**found, "results": results}

    def on_test_epoch_end(self) -> None:
        """Logs the metrics, and pass@k with its confidence interval."""
        super().on_test_epoch_end()
        if self._scorer() is not None:
            for name, value in self.solved.compute().items():
                self.log(f"test/{name}", value)
            self.solved.reset()

    def _unwritten(self, batch: Batch) -> Batch:
        return _rows(batch, [row for row, index in enumerate(batch["index"].tolist()) if index not in self.written])

    def prediction_identity(self) -> dict[str, Any]:
        """Returns all that the completions of a row depend on: models, trained tensors and settings of generation."""
        settings = {"generation": self.generation, "num_samples": self.num_samples, "stop": self.stop}
        parts = [self._identity[part] or {} for part in ("backbone", "instance_encoder")]
        frozen = [{key: part.get(key) for key in ("config", "weights")} for part in parts]  # wherever they lie
        how = {"quantization": self._identity["quantization"], "dtype": str(self._net().backbone.model.dtype)}
        trained = {"weights": ckpt.digest(self.state_dict()), "seed": self.generation_seed}
        return {"models": frozen, **how, **trained, **settings}

    def scoring_identity(self) -> dict[str, Any] | None:
        """Returns all that the scores of a row's completions depend on."""
        scorer = self._scorer()
        if scorer is None:
            return None
        return {**self.prediction_identity(), **scorer.scoring_identity(), "results_per_row": self.num_samples}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Returns completions of a batch, with the ``index`` of each row; rows in ``written`` are left out."""
        batch = self._unwritten(batch)
        return {"index": batch["index"], "completions": self.complete(batch)}

    def prediction_rows(self, predicted: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns records with ``index`` and ``completions``, a list of texts."""
        return [
            {"index": index, "completions": texts}
            for index, texts in zip(predicted["index"].tolist(), predicted["completions"])
        ]


def _rows(batch: Batch, kept: list[int]) -> Batch:
    return {key: values[kept] for key, values in batch.items()}
