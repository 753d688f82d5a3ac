"""What each of two processes runs: the same fits under DDP and under FSDP2, and what each left behind."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from lopa_lightning import (
    ClassificationModule,
    ImageClassificationDataModule,
    ImageClassificationModule,
    InstanceEncoderSpec,
    PretrainedSpec,
    PromptTuning,
    Task,
)
from lopa_lightning.backbones.sharding import whole
from lopa_lightning.callbacks import PromptMonitor
from lopa_lightning.errors import LoPAError
from lopa_lightning.experiments.sizes import Step, sizes
from lopa_lightning.strategies import FSDP2Strategy
from tests.data.image_files import LABELS
from tests.modules.helpers import LoPATiny, causal, completions, reviews, trainer

ROWS = 21


class Gathered(TorchDispatchMode):
    """Counts the numbers that all-gathers bring together."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "all_gather" in str(func):
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, result)) if torch.is_tensor(leaf)]
            self.numbers += max(tensor.numel() for tensor in tensors)
        return result


class Sent(TorchDispatchMode):
    """Counts the bytes that this process sends, where every message goes around a ring of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.small = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__.replace("_", "")
        # Gathered, or made of a sum that is scattered: the larger of both tensors. A sum for all is both.
        times = {"allgatherbase": 1, "reducescatterbase": 1, "allreduce": 2}.get(name, 0)
        if func.namespace == "c10d" and times:
            leaves = torch.utils._pytree.tree_leaves(args)
            size = max(leaf.numel() * leaf.element_size() for leaf in leaves if torch.is_tensor(leaf))
            world = torch.distributed.get_world_size()
            self.bytes += times * size * (world - 1) // world
            self.small += size <= 8
        return result


class CountedStep(Callback):
    """What is sent in the second step."""

    def __init__(self) -> None:
        self.sent = Sent()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.sent.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.sent.__exit__(None, None, None)


class CountedSaves(Callback):
    """How much is gathered while one more checkpoint is made, as at the end of an epoch."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        with Gathered() as counted:
            trainer._checkpoint_connector.dump_checkpoint()
        self.numbers.append(counted.numbers)


def strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if name == "stock":
        return ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    return FSDP2Strategy()


def made(kind: str, models: dict[str, str]) -> ClassificationModule:
    """A module of each kind that is sharded in its own way."""
    options: dict[str, Any] = {
        "decoder": {"model": "llama", "objective": "causal_lm", "dtype": "bfloat16"},
        "after": {"model": "llama", "objective": "causal_lm", "placement": "after"},
        "encoder": {
            "model": "bert",
            "gradient_checkpointing": True,
            "instance_encoder": InstanceEncoderSpec(models["bert_base"], trainable=True),
            "instance_loss": 0.5,
        },
        "copy": {
            "model": "llama",
            "objective": "causal_lm",
            "placement": "after",
            "instance_encoder": InstanceEncoderSpec(
                "backbone", pooling="last", adapter={"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
            ),
            "instance_loss": 0.5,
        },
        "adapted": {
            "model": "bert",
            "instance_encoder": InstanceEncoderSpec(
                models["bert_base"], dtype="bfloat16", adapter={"peft_type": "LORA", "r": 2}
            ),
            "instance_loss": 0.5,
        },
        "head": {
            "model": "bert_base",
            "objective": "head",
            "optimizers": {"shared_prompt": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
            "instance_encoder": InstanceEncoderSpec(models["bert_base"]),  # its vectors come from the disk
        },
        "lora": {
            "model": "gpt2",
            "objective": "causal_lm",
            "adapter": {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
            "prompt_encoder": functools.partial(PromptTuning, num_virtual_tokens=3),
        },
        "image": {
            "class": ImageClassificationModule,
            "model": "vit",
            "objective": "head",
            "placement": "every_layer",
            "instance_encoder": InstanceEncoderSpec(cache=False),  # the sharded layers run twice in a step
            "prompt_encoder": functools.partial(LoPATiny, dropout=0.0),
            "task": Task(list(LABELS)),
        },
    }[kind]
    module_class = options.pop("class", ClassificationModule)
    spec = PretrainedSpec(
        models[options.pop("model")],
        dtype=options.pop("dtype", "float32"),
        gradient_checkpointing=options.pop("gradient_checkpointing", False),
    )
    defaults: dict[str, Any] = {"objective": "masked_lm", "prompt_encoder": LoPATiny}
    return module_class(
        backbone=spec, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2), **{**defaults, **options}
    )


def images(folder: Path, batch_size: int = 4) -> ImageClassificationDataModule:
    """Reads the images that were written before."""
    return ImageClassificationDataModule(path=str(folder / "images"), batch_size=batch_size)


def fit(
    kind: str, how: str, models: dict[str, str], folder: Path, epochs: int = 1, accumulated: int = 1, **options: Any
) -> dict[str, Any]:
    """Fits, validates and predicts; everything that must be the same under both strategies."""
    seed_everything(3)
    (folder / f"{kind}-{how}").mkdir(exist_ok=True)
    model, saves, step = made(kind, models), CountedSaves(), CountedStep()
    data = images(folder) if kind == "image" else reviews(folder, rows=ROWS)
    devices: dict[str, Any] = {"devices": 2, "strategy": strategy(how), "accumulate_grad_batches": accumulated}
    if kind == "image":  # processes that share the model read the shown images together
        devices["logger"] = TensorBoardLogger(folder / f"{kind}-{how}", name="", version="")
    run = trainer(folder / f"{kind}-{how}", epochs, num_sanity_val_steps=0, **devices)
    run.callbacks[:0] = [saves, step, PromptMonitor()]
    run.fit(model, data, **options)
    # The same on every process.
    once = run.global_rank == 0 and kind != "head"
    planned = sizes(model, Step(4, 12, 12, 4)).sent(how, 2) if once else 0
    sharded = [name for name, part in model.net.named_modules() if isinstance(part, FSDPModule)]
    held = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}
    (validated,) = run.validate(model, data, verbose=False)
    return {
        "state": state,
        "validated": validated,
        "sharded": sharded,
        "saves": saves.numbers,
        "sent": (step.sent.bytes, step.sent.small),
        "planned": planned,
        "sizes": (held, frozen, trained),
        "dtypes": sorted({str(p.dtype) for p in model.net.backbone.parameters()}),
        "step": run.global_step,
    }


def fit_all(folder: Path, models: dict[str, str], asked_for: set[str]) -> None:
    """Fits what is asked for: kinds of :func:`made`, and ``stock`` for Lightning's own strategy."""
    results: dict[str, Any] = {}
    for kind in ("decoder", "after", "encoder", "adapted", "copy", "lora", "image"):
        for how in ("ddp", "fsdp") if kind in asked_for else ():
            results[f"{kind}-{how}"] = fit(kind, how, models, folder)
    runs = [
        ("single.ckpt", "ddp", 2, "ddp"),
        ("ddp-2/head-ddp/last.ckpt", "ddp", 3, "ddp"),
        ("ddp-2/head-ddp/last.ckpt", "all", 3, "fsdp"),
    ]
    if "stock" in asked_for:
        runs += [("single.ckpt", "stock", 2, "stock"), ("stock-2/head-stock/last.ckpt", "stock", 3, "stock")]
    for start, name, epochs, how in runs:
        (run := folder / f"{name}-{epochs}").mkdir(exist_ok=True)
        results[f"{name}-{epochs}"] = fit("head", how, models, run, epochs, ckpt_path=folder / start)
    (folder / "accumulated").mkdir(exist_ok=True)
    for how in ("ddp", "fsdp"):
        results[f"accumulated-{how}"] = fit("head", how, models, folder / "accumulated", accumulated=2)
    results["refused"] = refused(folder, models)
    results["written"] = written(folder, models["llama"], devices=2, strategy=FSDP2Strategy())
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")


def written(folder: Path, model: str, **options: Any) -> dict[str, Any]:
    """What is predicted for each row, by sampling, and what ``generate`` writes; one process is done before the other.

    Of two processes, one finds a whole batch written already, the other a row.
    """
    seed_everything(3)
    sampled = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 8}
    module = causal(model, generation=sampled, num_samples=2, stop=["e", " "])
    module.learned = True  # as if
    data = completions(folder / "completions", batch_size=2)
    run = trainer(folder, enable_checkpointing=False, callbacks=[found_written := Written()], **options)
    run.predict(module, data)
    found = {
        i: row
        for batch in run.predict_loop.predictions
        for i, row in zip(batch["index"].tolist(), batch["completions"])
    }
    rank, world = run.global_rank, run.world_size
    texts = ["the film was", "a terrible story , badly told", "it", "Yes , it was good"]
    own = texts[rank * 4 // world : (rank + 1) * 4 // world]
    greedy = {"do_sample": False, "max_new_tokens": 8}
    return {
        "sampled": found,
        "left": found_written.left,
        "greedy": module.generate(own, greedy, num_samples=1, batch_size=1),
        "beams": module.generate(own, {"num_beams": 2, "do_sample": False, "max_new_tokens": 5}, batch_size=2),
        "uneven": uneven(module, texts[: rank + 1]) if world > 1 else "",
    }


def uneven(module: Any, texts: list[str]) -> str:
    try:
        module.generate(texts)
    except LoPAError as error:
        return str(error)
    return ""


class Written(Callback):
    """A run that was interrupted has left some rows."""

    left = 0

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.world_size > 1 and batch_idx == 0:
            rows = batch["index"].tolist()
            pl_module.written = frozenset(rows if trainer.global_rank == 1 else rows[:1])
            self.left = len(pl_module.written)


def refused(folder: Path, models: dict[str, str]) -> dict[str, str]:
    """What each strategy says of a checkpoint that lacks a tensor."""
    messages = {}
    for how in ("fsdp", "stock"):
        run = trainer(folder, devices=2, strategy=strategy(how), enable_checkpointing=False, callbacks=[])
        try:
            run.validate(made("head", models), reviews(folder, rows=ROWS), ckpt_path=folder / "lacking.ckpt")
        except LoPAError as error:
            messages[how] = str(error)
    return messages
