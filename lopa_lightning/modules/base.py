"""Pairs a frozen backbone with a trained prompt encoder in a LightningModule."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.parsing import AttributeDict
from torch import Tensor, nn
from torch.optim import Optimizer

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.adapters import TrainedWeights
from lopa_lightning.backbones.base import Batch, InputSpec, ReadsInputs
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.backbones.sharding import data_mesh, placed_like, shard
from lopa_lightning.checkpoint_io import write_whole_checkpoints
from lopa_lightning.data.splits import SplitsDataModule
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.instances.encoder import InstanceEncoderSpec
from lopa_lightning.migrations import migrate
from lopa_lightning.modules.builder import Builder, Parts
from lopa_lightning.modules.checkpoint_loading import rebuilt
from lopa_lightning.modules.nonfinite_loss import LossGuard, OnNonfinite
from lopa_lightning.modules.optimizer_groups import OptimizerByGroup, with_rates
from lopa_lightning.modules.prompted_model import Outputs, PromptedModel
from lopa_lightning.modules.resume import ResumePoint
from lopa_lightning.modules.resume_check import check_resume
from lopa_lightning.modules.schedule import schedule
from lopa_lightning.modules.schedule_callback import Scheduling
from lopa_lightning.modules.scores import Scores
from lopa_lightning.modules.start import check_before_weights, check_with_weights, warn_of_rounding
from lopa_lightning.modules.task_hooks import TaskHooks
from lopa_lightning.modules.window import Window
from lopa_lightning.plain import class_name, plain, without_defaults
from lopa_lightning.prompts.base import PromptEncoderFactory
from lopa_lightning.prompts.lopa import LoPA
from lopa_lightning.strategies import send_trained_alone


class LoPALightningModule(TaskHooks, ReadsInputs, LightningModule):
    """Gives a frozen backbone a soft prompt for every instance.

    A new task is a subclass with :meth:`configure_readout` and :meth:`loss`, and what else it wants of
    :class:`~lopa_lightning.modules.task_hooks.TaskHooks`.

    Nothing is loaded before :meth:`configure_model`. Frozen parts have no gradient, stay in eval
    mode, and are neither in the optimizer nor in a checkpoint.

    Args:
        backbone: The frozen model.
        prompt_encoder: Makes soft prompts; a class or partial that still wants ``(embedding_dim, instance_dim)``.
        instance_encoder: The model that reads instances, frozen unless it says otherwise; by default the backbone.
        placement: Where virtual tokens go: ``before`` the text's first token, ``after_first``, ``after`` the text and
            before its answer, in ``every_layer`` (prefix tuning, P-tuning v2), or in a chat: as its ``system`` message,
            or before its ``user``'s text.
        adapter: A PEFT adapter in the backbone, as in ``adapter_config.json``, such as
            ``{peft_type: LORA, r: 8}``; a baseline.
        train_backbone: Which weights of the backbone are trained, as a baseline: ``true`` for all, ``bias`` for its
            biases, or a number k for its last k layers.
        frozen_dropout: Whether the backbone's own dropout is active in training.
        optimizer: An optimizer that still wants parameters.
        lr_scheduler: A scheduler that still wants an optimizer; stepped after each optimizer step, or after each
            validation by ``val/loss`` if it is a ``ReduceLROnPlateau``.
        warmup: Optimizer steps over which learning rates rise linearly; below 1 a share of the run as it was when it
            began: a resumed run keeps the number of steps.
        learning_rates: Learning rates by group, over the optimizer's own: ``shared_prompt`` (Z_S),
            ``low_rank`` (LoPA's heads), ``head``, ``instance_readout``, ``instance_encoder`` and ``backbone`` (all of
            it or its adapter).
        optimizers: Optimizers by group, in place of ``optimizer``, with the same group names.
        nonfinite_loss: What a training loss that is NaN or infinite does: ``stop`` the run, naming step and rows, or
            ``skip`` the optimizer step, with all batches that it accumulates, counted in ``train/skipped_steps``.

    Raises:
        LoPAError: If an argument is not what it must be, or both an adapter and the backbone are to be trained.
        TypeError: If an argument could not be stored in a checkpoint.
    """

    def __init__(
        self,
        backbone: PretrainedSpec,
        prompt_encoder: PromptEncoderFactory = LoPA,
        instance_encoder: InstanceEncoderSpec = InstanceEncoderSpec(),
        placement: str = "before",
        adapter: dict[str, Any] | None = None,
        train_backbone: TrainedWeights = False,
        frozen_dropout: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.0,
        learning_rates: dict[str, float] | None = None,
        optimizers: dict[str, OptimizerCallable] | None = None,
        nonfinite_loss: OnNonfinite = "stop",
    ) -> None:
        super().__init__()
        for option, given, kind in (
            ("backbone", backbone, PretrainedSpec),
            ("instance_encoder", instance_encoder, InstanceEncoderSpec),
        ):
            if not isinstance(given, kind):
                raise LoPAError(f"{option} must be a {kind.__name__}, such as {kind.__name__}({shown(given)})")
        if wrong := {name: rate for name, rate in (learning_rates or {}).items() if not 0 <= rate < float("inf")}:
            raise LoPAError(f"learning_rates must be at least 0 and finite, got {wrong}")
        if not 0 <= warmup < float("inf"):
            raise LoPAError(f"warmup must be a number of steps, or a share of the run below 1; got {warmup}")
        if adapter is not None and train_backbone is not False:
            raise LoPAError("give adapter or train_backbone, not both")
        self.save_hyperparameters()
        self.backbone_spec, self.instance_spec, self.make_prompt_encoder = backbone, instance_encoder, prompt_encoder
        self.placement, self.frozen_dropout = placement, frozen_dropout
        self.adapter, self.train_backbone = adapter, train_backbone
        self.learning_rates, self.group_optimizers = learning_rates or {}, optimizers or {}
        by_group = functools.partial(OptimizerByGroup, default=optimizer, others=self.group_optimizers)
        self.make_optimizer: OptimizerCallable = by_group if optimizers else optimizer
        self.make_lr_scheduler, self.warmup = lr_scheduler, warmup
        self.loss_guard = LossGuard(nonfinite_loss)
        self.window = Window()
        self.net: PromptedModel | None = None
        self._trained_names: set[str] = set()
        # Whether a step was taken or a checkpoint loaded, so that what is trained has not its initial values.
        self.learned = False
        # Whether a checkpoint may be loaded once the model is built; if not, answers can be refused before.
        self.awaits_checkpoint = True
        # The checkpoint that a command is about to load, if it says so: what does not fit is refused early.
        self.will_load: dict[str, Any] | None = None
        self.written: dict[int, list[dict[str, Any]]] = {}  # what an interrupted run has left, by row
        self.scores = nn.ModuleDict()
        self.strict_loading = False  # a checkpoint lacks the frozen weights; load_state_dict checks the rest exactly

    def save_hyperparameters(self, *args: Any, frame: types.FrameType | None = None, **kwargs: Any) -> None:
        """Keeps arguments as plain data, which a checkpoint can hold; a subclass need not call it.

        Raises:
            TypeError: If one has no plain form.
        """
        caller = inspect.currentframe()
        super().save_hyperparameters(*args, frame=frame or (caller and caller.f_back), **kwargs)
        given = {key: value for key, value in self.hparams.items() if not key.startswith("_")}
        self._hparams = AttributeDict({**plain(given), "_class_path": class_name(type(self))})
        self._hparams_initial = copy.deepcopy(self._hparams)

    def __getattr__(self, name: str) -> Any:
        """Raises an AttributeError within a property as it is: torch's would name the property in its place."""
        found = getattr(type(self), name, None)
        if isinstance(found, property | functools.cached_property):
            return found.__get__(self, type(self))
        return super().__getattr__(name)

    @functools.cached_property
    def builder(self) -> Builder:
        """Builds the parts, and knows their sizes before."""
        return Builder(
            self.input_kind(self.backbone_spec),
            self.make_prompt_encoder,
            self.instance_spec,
            self.placement,
            self.adapter,
            self.train_backbone,
            self.frozen_dropout,
        )

    @property
    def input_spec(self) -> InputSpec:
        """Returns what a data module needs to make batches for this module."""
        return self.builder.input_spec

    @property
    def data(self) -> SplitsDataModule | None:
        """Returns the Trainer's data module, if it is one of this package's."""
        found = getattr(self._trainer, "datamodule", None)  # a loader may come in its place
        return found if isinstance(found, SplitsDataModule) else None

    def setup(self, stage: str) -> None:
        """Checks what can be checked before weights are loaded; our data modules ask for it before they tokenise.

        Raises:
            LoPAError: See :func:`~lopa_lightning.modules.start.check_before_weights`.
        """
        self.window, self.loss_guard = Window(), LossGuard(self.loss_guard.action)
        if stage == "fit" and self.net is not None:
            self.train()  # which is in eval mode if it was loaded, and Lightning leaves the mode as it is
        check_before_weights(self, TrainerFn(stage).value)
        # Not in configure_model, where precision bf16-true makes new tensors in bfloat16.
        for name in [f"{kind}{suffix}" for kind in ("val", "test") for suffix in self.eval_suffixes]:
            if name not in self.scores:
                self.scores[name] = Scores(self.configure_metrics(), self.official_metrics())
        for scores in self.scores.values():
            cast(Scores, scores).reset()  # of batches that an evaluation has left which was cut short
        write_whole_checkpoints(self.trainer.strategy)

    def known_identity(self) -> dict[str, Any]:
        """Returns what a checkpoint says of frozen models, method and task, as far as that needs no weights."""
        identity = self.builder.identity()  # first: a backbone that is not there is named before its tokenizer
        return {**identity, "task": {"placement": self.placement, **self.input_spec.identity(), **self.task_identity()}}

    def configure_model(self) -> None:
        """Loads the frozen models and builds what is trained. Lightning calls it once the device is known."""
        if self.net is not None:
            return
        mesh = None if self.device_mesh is None else data_mesh(self.device_mesh)
        parts = self.builder.load(mesh)
        self._identity = {**self.known_identity(), **parts.identity}
        self.net = self._assembled(parts)
        # As it is built: what a user freezes later is still to be saved.
        self._trained_names = {f"net.{name}" for name, each in self.net.named_parameters() if each.requires_grad}
        if mesh is not None:
            shard(self.net, self.net.pretrained_models(), mesh)
        send_trained_alone(self)

    def meta_net(self) -> PromptedModel:
        """Builds the model on the ``meta`` device: no weight is read. It is not kept."""
        with torch.device("meta"):
            return self._assembled(self.builder.unloaded())

    @functools.cached_property
    def shapes(self) -> PromptedModel:
        """Returns the model on the ``meta`` device, to see what is trained and its shapes."""
        return self.meta_net()

    def is_trainable(self) -> bool:
        """Returns whether anything is to be trained, known before weights are read."""
        return any(parameter.requires_grad for parameter in self.shapes.parameters())

    def _assembled(self, parts: Parts) -> PromptedModel:
        readout = self.configure_readout(parts.backbone)
        of_instance = None
        if self.instance_loss and parts.instance_encoder is not None:
            of_instance = self.configure_instance_readout(self.builder.instance_dim(parts.backbone), parts.backbone)
        net = PromptedModel(parts.prompt_encoder, readout, parts.instance_encoder, parts.backbone, of_instance)
        return net.train()  # transformers hands models over in eval mode; what is frozen stays in it

    def _net(self) -> PromptedModel:
        if self.net is None:
            raise RuntimeError("the model is not loaded yet: call configure_model() first, or use a Trainer")
        return self.net

    def forward(self, batch: Batch) -> Tensor:
        """Returns the outputs of a batch, see :class:`~lopa_lightning.modules.prompted_model.PromptedModel`."""
        return cast(Tensor, self._net()(batch).outputs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch, weighted as it counts among the batches of its optimizer step."""
        found = self._net()(batch)
        losses, size = self.training_losses(found, batch), self.loss_weight(found.outputs, batch)
        for name, each in losses.items():
            self.log(f"train/{name}", each, prog_bar=name == "loss", batch_size=len(batch["index"]))
        loss = losses["loss"] + self.instance_loss * losses.get("instance_loss", 0.0)
        everywhere = self.loss_guard.look_at(loss, batch, batch_idx, self.trainer, size)
        return self.window.add(loss, size, everywhere, batch, batch_idx, self.trainer)

    def training_losses(self, found: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Returns ``loss``, of the answers, and where one is asked for ``instance_loss``, before it is weighted.

        Args:
            found: What the model computed, in training.
            batch: The batch.
        """
        losses = {"loss": self.loss(found.outputs, batch)}
        if found.of_instance is not None:
            losses["instance_loss"] = self.loss(found.of_instance, batch)
        return losses

    def on_after_backward(self) -> None:
        """Scales the gradient of a step's batches: before others see it, or clip it."""
        self.window.end(self.parameters(), self.trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Skips the step where a loss was NaN or infinite and that is asked for."""
        self.learned = True
        if self.loss_guard.drop_step(optimizer):
            self.log("train/skipped_steps", float(self.loss_guard.skipped))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor | None]:
        """Updates loss and metrics by a batch; returns its instance vectors for diagnostics."""
        return self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor | None]:
        """Updates loss and metrics by a batch."""
        return self._evaluate("test", batch, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Returns the predictions of a batch, with ``index`` that ties each to its row."""
        return {"index": batch["index"], **self.predict_outputs(self(batch))}

    def on_validation_start(self) -> None:
        """Checks what only weights show, on the device that they are on now."""
        check_with_weights(self)

    on_test_start = on_predict_start = on_validation_start

    def on_fit_start(self) -> None:
        """Does so, and warns of weights that training rounds."""
        check_with_weights(self)
        warn_of_rounding(self)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics."""
        self._log_metrics("test")

    def _evaluate(self, stage: str, batch: Batch, dataloader_idx: int) -> dict[str, Tensor | None]:
        outputs, instance, _ = self._net()(batch)
        scores = cast(Scores, self.scores[f"{stage}{self.eval_suffixes[dataloader_idx]}"])
        loss, weight = self.loss(outputs, batch), self.loss_weight(outputs, batch)
        scores.update(loss, weight, self.predictions(outputs), batch.get("labels"))
        return {"instance": instance}

    def _log_metrics(self, stage: str) -> None:
        for name in [f"{stage}{suffix}" for suffix in self.eval_suffixes]:
            for key, value in cast(Scores, self.scores[name]).compute().items():
                self.log(f"{name}/{key}", value, prog_bar=key == "score")

    def configure_optimizers(self) -> Any:
        """Builds one optimizer over the trained groups, with its scheduler and warm-up."""
        optimizer = self.make_optimizer(with_rates(self._net().parameter_groups(), self.learning_rates))
        return {"optimizer": optimizer, "lr_scheduler": schedule(optimizer, self.make_lr_scheduler, self.warmup)}

    def configure_callbacks(self) -> list[Callback]:
        """Returns the callbacks that a run needs to be right, also when it is resumed."""
        return [Scheduling(), ResumePoint()]

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if name in self._trained_names}

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Returns the trained tensors, and nothing else."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        return {prefix + name: state[prefix + name] for name in self._trained()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads the trained tensors.

        Args:
            state_dict: Exactly the trained tensors.
            strict: Ignored: names and shapes are always checked.
            assign: See torch.

        Raises:
            LoPAError: If names or shapes differ.
        """
        trained = self._trained()
        ckpt.check_tensors(state_dict, trained)
        placed = {name: placed_like(value, trained[name]) for name, value in state_dict.items()}
        found = super().load_state_dict(placed, strict=False, assign=assign)
        self.learned = True
        found.missing_keys.clear()  # the frozen ones, which no checkpoint holds
        return found

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = "cpu",
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Rebuilds a module from a checkpoint alone; the frozen models are loaded by the names in it.

        Args:
            checkpoint_path: The ``.ckpt`` file.
            map_location: See ``torch.load``.
            hparams_file: Ignored: a checkpoint holds its hyperparameters.
            strict: Ignored: loading is always strict.
            weights_only: Ignored: a checkpoint is always read as plain data, no code runs from it.
            trust_remote_code: Whether the frozen models may run code of their own, where the checkpoint says that
                they do. It says so of models that it names itself: only for a checkpoint that you trust.
            **kwargs: Hyperparameters to use in place of the checkpoint's, such as ``backbone`` where it
                has moved.

        Raises:
            LoPAError: If a class that the checkpoint names is not imported, or the frozen models found under
                the names in it are not its own.
        """
        saved = ckpt.read(checkpoint_path, map_location)
        return rebuilt(cls, saved, shown(str(checkpoint_path)), trust_remote_code, kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the identity of the frozen parts, and leaves out the hyperparameters that have their default.

        A subclass's own entry goes under the subclass's name; others are refused when the checkpoint is read.
        """
        checkpoint[ckpt.IDENTITY_KEY] = self._identity
        checkpoint[ckpt.HYPERPARAMETERS] = without_defaults(type(self), checkpoint[ckpt.HYPERPARAMETERS])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another backbone, encoder, method, task or optimizer."""
        migrate(checkpoint)  # which not every strategy has read by way of us
        self.learned = True
        if "state_dict" not in checkpoint:  # a strategy has loaded it by itself, and did not check it
            ckpt.check_tensors(ckpt.read(self.trainer.ckpt_path)["state_dict"], self._trained())
        ckpt.check_identity(checkpoint[ckpt.IDENTITY_KEY], self._identity)
        if self._trainer is not None and self._trainer.state.fn is not None:
            check_resume(checkpoint, self, self._trainer.state.fn.value)
