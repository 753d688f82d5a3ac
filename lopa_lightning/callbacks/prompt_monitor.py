"""Shows a prompt encoder in TensorBoard while it learns, and warns where something should be changed."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from lopa_lightning.backbones.sharding import gathered, whole
from lopa_lightning.callbacks.advice import Advice, of_gate, of_norms
from lopa_lightning.callbacks.checkpoints import best_checkpoint
from lopa_lightning.callbacks.image_monitor import ImageMonitor
from lopa_lightning.prompts.base import Vocabulary

_NEAREST = 5
_ROWS_AT_ONCE = 8192  # of the embedding table
_SAMPLE = 1000  # embeddings that stand for all
_PIXELS = 16  # of a cell of the cosine matrix


class PromptMonitor(Callback):
    """Logs rates, gradient norms, throughput, and pictures of the soft prompt.

    Every ``log_every_n_steps``: learning rate and gradient norm of each trained group, samples and
    tokens per second. After every epoch: the share of padding in what the backbone read. At every
    validation: histograms of the prompt encoder's diagnostics (LoPA's gate), norms and cosine matrix of
    the shared virtual tokens, and the vocabulary's words nearest to them; of images what
    :class:`~lopa_lightning.callbacks.image_monitor.ImageMonitor` draws. At the end: hyperparameters with the best
    score.

    It warns, once of each: at a validation of a saturated gate and of virtual tokens far longer or shorter than
    embeddings, at the steps that are logged of a group whose gradient stays 0.

    Args:
        enabled: False to log none of it.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._samples = 0
        self._tokens: Tensor | int = 0
        self._since = 0.0
        self._measured = 0
        self._instance: Tensor | None = None
        self._embeddings: Tensor | None = None
        self._advice = Advice()
        self._images = ImageMonitor(self._advice)

    @property
    def state_key(self) -> str:
        """Returns a key that does not depend on the arguments: there is one monitor."""
        return "PromptMonitor"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock."""
        self._restart()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Draws the soft prompt, and restarts the clock: validation is not training time."""
        if self.enabled and not trainer.sanity_checking and not trainer.fast_dev_run:
            logger = self._logger(trainer)
            if logger is not None:
                with torch.no_grad():
                    self._images.draw(trainer, pl_module, logger.experiment)
            with torch.no_grad(), gathered(pl_module.net):
                if trainer.state.fn == TrainerFn.FITTING:
                    self._advise(pl_module.net)
                if logger is not None:
                    self._draw(logger.experiment, pl_module.net, trainer.global_step)
        self._instance = None
        self._restart()

    def _restart(self) -> None:
        self._samples, self._tokens, self._since = 0, 0, time.perf_counter()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Logs each group's learning rate and gradient norm."""
        if not self._is_logging_step(trainer):
            return
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            norm = whole(torch.nn.utils.get_total_norm(gradients))
            self._advice.look_at_gradient(group["name"], norm, trainer.global_step)
            pl_module.log_dict({f"lr/{group['name']}": group["lr"], f"gradient_norm/{group['name']}": norm})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts samples and tokens, and logs their rates."""
        if not self.enabled:
            return
        self._samples += len(batch["index"])
        self._tokens = self._tokens + pl_module.net.backbone.count_tokens(batch)  # no wait for the device here
        if self._is_logging_step(trainer, done=1) and trainer.global_step != self._measured:
            self._measured = trainer.global_step  # once, however many batches one step accumulates
            tokens, seconds = int(self._tokens), time.perf_counter() - self._since
            rates = {"samples": self._samples / seconds, "tokens": tokens / seconds}
            pl_module.log_dict({f"per_second/{k}": v * trainer.world_size for k, v in rates.items()})
            self._restart()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs the share of padding, virtual tokens counted, where the loader knows it."""
        share = getattr(trainer.train_dataloader, "padding_share", None)
        if self.enabled and share is not None:
            pl_module.log("train/padding", share(), sync_dist=True)

    def _is_logging_step(self, trainer: Any, done: int = 0) -> bool:
        every = trainer.log_every_n_steps  # 0 for never
        is_asked = self.enabled and trainer.logger is not None and every > 0
        return is_asked and (trainer.global_step + 1 - done) % every == 0

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keeps the first batch's instance vectors, and a few images."""
        if self.enabled and batch_idx == 0 and dataloader_idx == 0 and outputs is not None:
            self._instance = outputs["instance"]
        if dataloader_idx == 0 and self._draws(trainer):
            self._images.keep(trainer, pl_module, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the confusion matrix of images, which the module is about to reset."""
        if self._draws(trainer):
            self._images.count(pl_module)

    def _draws(self, trainer: Any) -> bool:
        return not trainer.sanity_checking and self._logger(trainer) is not None

    def _advise(self, net: Any) -> None:
        """Warns of a soft prompt that is not as it should be."""
        encoder = net.prompt_encoder
        if not encoder.num_virtual_tokens or (self._instance is None and encoder.uses_instance):
            return
        if (gate := encoder.diagnostics(self._instance).get("gate")) is not None:
            self._advice.give("gate", of_gate(gate))
        vocabulary = net.backbone.vocabulary() if self._embeddings is None else None
        if isinstance(vocabulary, Vocabulary) and vocabulary.table is not None:
            ids = torch.as_tensor(vocabulary.ordinary_ids)
            self._embeddings = vocabulary.embed(ids[:: max(1, len(ids) // _SAMPLE)])
        if self._embeddings is not None:
            self._advice.give("norms", of_norms(encoder(self._instance), self._embeddings))

    @rank_zero_only
    def _draw(self, board: Any, net: Any, step: int) -> None:
        """Shows the soft prompt in TensorBoard."""
        encoder, vocabulary = net.prompt_encoder, net.backbone.vocabulary()
        if self._instance is not None or not encoder.uses_instance:
            for name, values in encoder.diagnostics(self._instance).items():
                board.add_histogram(f"prompt/{name}", values.float().cpu(), step)
        if (shared := encoder.shared_virtual_tokens()) is None:
            return
        shared = shared.float()
        norms = shared.norm(dim=-1)
        board.add_histogram("prompt/norms", norms.cpu(), step)
        board.add_scalar("prompt/mean_norm", norms.mean(), step)
        board.add_image("prompt/cosines", cosine_picture(shared), step)
        if isinstance(vocabulary, Vocabulary) and vocabulary.table is not None:
            rows = [f"| {index} | {words} |" for index, words in enumerate(nearest_words(shared, vocabulary))]
            table = "\n".join(["| virtual token | nearest words |", "|-|-|", *rows])
            board.add_text("prompt/nearest_words", table, step)

    @rank_zero_only
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Logs the hyperparameters with the best score that a checkpoint was kept for."""
        logger, checkpoint = self._logger(trainer), best_checkpoint(trainer)
        score = getattr(checkpoint, "best_model_score", None)
        if logger is not None and checkpoint is not None and score is not None:
            logger.log_hyperparams(pl_module.hparams_initial, {f"best/{checkpoint.monitor}": float(score)})

    def _logger(self, trainer: Any) -> TensorBoardLogger | None:
        if not self.enabled or trainer.fast_dev_run:
            return None
        return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def cosine_picture(virtual_tokens: Tensor) -> Tensor:
    """Draws the cosines between virtual tokens: red is 1, white 0, blue -1.

    Args:
        virtual_tokens: ``[m, d]``.

    Returns:
        ``[3, 16 m, 16 m]``, between 0 and 1.

    Example:
        >>> cosine_picture(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))[:, 0, [0, -1]].T  # red, white
        tensor([[1., 0., 0.],
                [1., 1., 1.]])
    """
    unit = F.normalize(virtual_tokens, dim=-1)
    cosine = (unit @ unit.T).clamp(-1, 1)
    red, blue = (1 + cosine).clamp(max=1), (1 - cosine).clamp(max=1)
    picture = torch.stack([red, torch.minimum(red, blue), blue])
    return picture.repeat_interleave(_PIXELS, 1).repeat_interleave(_PIXELS, 2).cpu()


def nearest_words(virtual_tokens: Tensor, vocabulary: Vocabulary) -> list[str]:
    """Returns the words nearest to virtual tokens by cosine, one line for each virtual token.

    Args:
        virtual_tokens: ``[m, d]``.
        vocabulary: With its table.
    """
    assert vocabulary.table is not None
    unit = F.normalize(virtual_tokens, dim=-1)
    # In parts: a float32 copy of a large table would be larger than all that is trained.
    parts = (part.float() for part in torch.split(vocabulary.table, _ROWS_AT_ONCE))
    cosine = torch.cat([unit @ part.T / part.norm(dim=-1).clamp(min=1e-12) for part in parts], dim=-1)
    top = cosine.topk(_NEAREST)
    return [
        ", ".join(f"`{vocabulary.decode([index]).strip()}` {value:.2f}" for index, value in zip(ids, values))
        for ids, values in zip(top.indices.tolist(), top.values.tolist())
    ]
