"""Writes a checkpoint as a folder to share: a bundle, or an adapter of PEFT."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lopa_lightning import __version__, bundle_file
from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.backbones.text_spec import TextSpec
from lopa_lightning.bundle_file import FORMAT_VERSION, BundleConfig, PromptFacts
from lopa_lightning.command_line.parser import Options, UsageError
from lopa_lightning.errors import LoPAError, shown
from lopa_lightning.files import check_new
from lopa_lightning.instances.vectors import commit_of
from lopa_lightning.modules import CausalLMModule, ClassificationModule, ImageClassificationModule, LoPALightningModule
from lopa_lightning.modules.checkpoint_loading import checked, rebuilt
from lopa_lightning.modules.predict import batches, check_rows, row_encoder
from lopa_lightning.plain import without_defaults
from lopa_lightning.serving.bundle import Bundle, check_repo_id, tokenizer_facts
from lopa_lightning.serving.card import license_of, metrics_in, model_card, run_facts
from lopa_lightning.serving.peft_export import check_peft, write_peft
from lopa_lightning.signals import stoppable

_TEXTS = ("The film was a pleasure to watch.", "Where is the nearest station?", "def add(a, b):")
_OF_TRAINING = (
    "optimizer",
    "optimizers",
    "lr_scheduler",
    "warmup",
    "learning_rates",
    "nonfinite_loss",
    "instance_loss",
)
_TOP = 20  # first tokens of a completion whose probabilities are kept


def options() -> argparse.ArgumentParser:
    """Returns what reads the options."""
    parser = Options("export", "Writes all that a soft prompt needs into a folder.")
    parser.add_argument("checkpoint", help="the .ckpt file")
    parser.add_argument("out", help="the folder, which must not be there or be empty")
    parser.add_argument("--to", choices=["bundle", "peft"], default="bundle", help="form (default: bundle)")
    parser.add_argument("--text", action="append", help="a text of the rows to compare with; several times")
    parser.add_argument("--backbone", help="hub id to name the backbone by, in place of the checkpoint's")
    parser.add_argument("--instance_encoder", help="hub id to name the instance encoder by")
    parser.add_argument("--license", help="of what was trained, for the model card")
    parser.add_argument("--push", metavar="REPO", help="hub id of a repository that the bundle is uploaded to as well")
    parser.add_argument("--private", action="store_true", help="makes a new repository private")
    return parser


def main(args: Sequence[str]) -> None:
    """Runs ``lopa export``.

    Args:
        args: What follows on the command line.

    Raises:
        LoPAError: If the folder is not empty, or the checkpoint cannot be read or exported so.
        UsageError: If the command line is wrong.
    """
    given = options().parse_args(args)
    if given.private and not given.push:
        raise UsageError("--private goes with --push, of whose repository it is said")
    if given.push:
        check_repo_id(given.push)
    with stoppable():
        out = Path(given.out)
        check_new(out, "OUT")
        if given.to == "peft":
            if unread := [name for name in ("text", "instance_encoder", "license", "push") if getattr(given, name)]:
                raise UsageError(f"--{', --'.join(unread)} goes with --to bundle, got --to peft")
            kind: Any = LoPALightningModule
            saved, name = ckpt.read(given.checkpoint), shown(given.checkpoint)
            check_peft(checked(kind, saved, name))
            write_peft(rebuilt(kind, saved, name), out, given.backbone)
            print(f"{out} is an adapter for peft.PeftModel.from_pretrained")
            return
        names = {key: name for key in ("backbone", "instance_encoder") if (name := getattr(given, key))}
        bundle = export_bundle(given.checkpoint, given.text, names, given.license)
        bundle.save_pretrained(out)
        print(f"{out} is a bundle of {sum(tensor.nbytes for tensor in bundle.tensors.values()) / 1e6:.1f} MB")
        if given.push:
            print(f"uploaded: {bundle.push_to_hub(given.push, private=given.private or None)}")


def export_bundle(
    checkpoint: str | Path,
    texts: Sequence[Any] | None = None,
    names: Mapping[str, str] | None = None,
    license: str | None = None,
) -> Bundle:
    """Makes a bundle of a checkpoint.

    Args:
        checkpoint: The ``.ckpt`` file.
        texts: Rows to compare with elsewhere, as ``predict`` takes them; by default three sentences.
        names: Hub ids of ``backbone`` and ``instance_encoder``, where others find them.
        license: Of what was trained, for the model card.

    Raises:
        LoPAError: If the checkpoint cannot be loaded, or is no task on texts or images.
    """
    module = LoPALightningModule.load_from_checkpoint(checkpoint)
    saved = ckpt.read(checkpoint)
    reads_images = isinstance(module, ImageClassificationModule)
    is_known = reads_images or isinstance(module.input_spec, TextSpec)
    if not isinstance(module, CausalLMModule | ClassificationModule) or not is_known:
        raise LoPAError(f"{type(module).__name__} is no task on texts or images, of which bundles are made")
    if reads_images and texts is not None:
        raise LoPAError("--text goes with a model of texts, and this one reads images")
    if (names or {}).keys() - _sources(module).keys():
        raise LoPAError("--instance_encoder: the instance encoder is the backbone, or there is none")
    state = {name: value for name, value in module.state_dict().items() if not name.startswith(ckpt.OF_TRAINING)}
    tensors = {name: value.detach().cpu() for name, value in state.items()}
    again = Path(checkpoint) if bundle_file.is_bundle(Path(checkpoint)) else None
    metrics = metrics_in(saved) if again is None else bundle_file.read(again)[0].metrics
    bundle = Bundle(_config(module, names or {}, metrics), tensors, "", [])
    rows, prompts, unserved = _rows(module, texts), None, None
    try:
        bundle.check_prompts()
        prompts = torch.cat([each for _, each in rows])
        bundle.check_served()
    except LoPAError as error:
        unserved = str(error)
        acts = "module.predict" if reads_images else "module.predict and generate"
        rank_zero_warn(f"the bundle is for {acts}, not for a server: {error}")
    if module.backbone_spec.quantization is not None and unserved is None:
        rank_zero_warn("the backbone was quantised in training: a server must quantise it alike, or answers otherwise")
    models = {}
    for key, spec in _sources(module).items():
        name = (names or {}).get(key, spec.name)
        models[key] = name, license_of(spec)
        if name == spec.name and Path(spec.location()).is_dir() and not name.startswith("package:"):
            rank_zero_warn(f"the bundle names a folder of this machine: {name}; --{key} gives its hub id")
    if module._net().prompt_encoder.uses_instance:
        models.setdefault("instance_encoder", models["backbone"])
    about = unserved, prompts is not None, reads_images
    card = model_card(bundle.config, models, *about, run_facts(Path(checkpoint)), license)
    images = example_images() if reads_images else None
    return dataclasses.replace(bundle, card=card, rows=[row for row, _ in rows], prompts=prompts, images=images)


def _sources(module: CausalLMModule | ClassificationModule) -> dict[str, PretrainedSpec]:
    """Returns the frozen models: the backbone, and the instance encoder where it is another one."""
    sources = {"backbone": module.backbone_spec}
    if module._net().prompt_encoder.uses_instance and not module.instance_spec.is_backbone:
        sources["instance_encoder"] = module.instance_spec.pretrained()
    return sources


def _config(
    module: CausalLMModule | ClassificationModule, names: Mapping[str, str], metrics: dict[str, float]
) -> BundleConfig:
    net, spec, builder = module._net(), module.input_spec, module.builder
    backbone = net.backbone
    arguments, identity = without_defaults(type(module), module.hparams), copy.deepcopy(module._identity)
    arguments = {key: copy.deepcopy(value) for key, value in arguments.items() if key not in _OF_TRAINING}
    made_by = arguments.pop("_class_path")
    for key, source in _sources(module).items():
        if not isinstance(arguments.get(key), dict) or not isinstance(identity.get(key), dict):
            continue
        if key in names:
            arguments[key]["name"] = identity[key]["name"] = names[key]
        elif (commit := commit_of(source)) is not None:  # a branch may move
            arguments[key]["revision"] = identity[key]["revision"] = commit
    tokenizers = dict.fromkeys(("backbone", "instance_encoder"))
    if isinstance(spec, TextSpec):
        tokenizers = {"backbone": spec.tokenizer, "instance_encoder": spec.instance_tokenizer}
    answer: dict[str, Any] = {"objective": module.task_identity()["objective"]}
    if isinstance(module, ClassificationModule):
        task = module.required_task()
        answer |= {"labels": task.labels}
        if module.objective != "head" and task.words is not None:
            answer |= {"words": task.words, "word_ids": module.word_ids(task.words)}
    return BundleConfig(
        FORMAT_VERSION,
        f"lopa-lightning {__version__}",
        {"class_path": made_by, "init_args": arguments},
        PromptFacts(
            net.prompt_encoder.num_virtual_tokens,
            backbone.prompt_dim,
            builder.instance_dim(backbone),
            module.placement,
            str(next(backbone.model.get_input_embeddings().parameters()).dtype).removeprefix("torch."),
            backbone.prompt_layers,
        ),
        identity,
        {key: None if each is None else tokenizer_facts(each) for key, each in tokenizers.items()},
        answer,
        metrics,
    )


@torch.no_grad()
def _rows(
    module: CausalLMModule | ClassificationModule, texts: Sequence[Any] | None
) -> list[tuple[dict[str, Any], Tensor]]:
    """Rows with the module's answers, and their soft prompts ``[1, m, d]``; one at a time: nothing is padded.

    Of images they have the number.
    """
    net, found = module._net(), []
    if isinstance(module, ImageClassificationModule):
        for number, image in enumerate(example_images().numpy()):
            (batch,) = module.image_batches([image], 1)
            (record,) = module.predict(image)
            found.append(({"input": {"image": number}, **record}, net.soft_prompt(batch)[0].cpu()))
        return found
    if isinstance(module, CausalLMModule):
        check_rows({"text": list(texts or _TEXTS)})
        for text in texts or _TEXTS:
            batch, likeliest = _first_tokens(module, text)
            found.append(({"input": text, "first_tokens": likeliest}, net.soft_prompt(batch)[0].cpu()))
        return found
    encoder, columns = row_encoder(module, [] if texts is None else list(texts))
    if texts is None:
        columns = {name: list(_TEXTS) for name in columns}
    for values in zip(*columns.values()):
        row = {name: [value] for name, value in zip(columns, values)}
        (batch,) = batches(module, encoder, row, 0, 1)
        (record,) = module.predict(dict(zip(columns, values)))
        found.append(({"input": dict(zip(columns, values)), **record}, net.soft_prompt(batch)[0].cpu()))
    return found


def example_images() -> Tensor:
    """Returns images to compare with, patterns of waves in uint8 ``[3, 48, 64, 3]``: no form that a model reads."""
    image, row, column, channel = np.ogrid[1:4, :48, :64, 1:4]
    waves = np.sin(column / (2 + image * channel)) * np.cos(row / (5 + channel) + image)
    return torch.from_numpy(np.uint8(127.5 + 127 * waves))


def _first_tokens(module: CausalLMModule, text: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A text as a batch, and the likeliest tokens that follow it."""
    net, spec = module._net(), module.input_spec
    backbone = net.backbone
    assert isinstance(backbone, TextBackbone)
    ids, position = (torch.tensor(each, device=module.device) for each in spec.prompt_ids([text]))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_position": position}
    batch |= spec.instance_batch([text], module.device)
    states = backbone(net.soft_prompt(batch)[0], batch, net.prompt_encoder.token_offset())
    every = torch.arange(len(backbone.embedding_weight), device=ids.device)
    values, tokens = backbone.label_log_probabilities(states.hidden[:, -1], every)[0].topk(min(_TOP, len(every)))
    return batch, {"ids": tokens.tolist(), "log_probabilities": values.tolist()}
