"""Builds the parts of a model from specs: on the meta device from configs alone, or with weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.adapters import TrainedWeights, adapt
from lopa_lightning.backbones.base import Backbone, InputKind, InputSpec
from lopa_lightning.backbones.pretrained import (
    Family,
    PretrainedSpec,
    checked_shapes,
    hidden_size,
    load_config,
    load_model,
    meta_model,
)
from lopa_lightning.backbones.quantization import quantization_config
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import InstanceEncoder, InstanceEncoderSpec
from lopa_lightning.instances.vectors import VectorCache
from lopa_lightning.migrations import FORMAT
from lopa_lightning.plain import arguments, made_class, plain, with_arguments, without_defaults
from lopa_lightning.prompts.base import PromptEncoder, PromptEncoderFactory

SOURCE = ("name", "revision", "dtype", "attn_implementation", "trust_remote_code")  # what to load, and how


@dataclass(frozen=True)
class Parts:
    """Holds the parts of a model, except the read-out, which is the task's.

    Attributes:
        backbone: The frozen model.
        prompt_encoder: With its initial values.
        instance_encoder: None if the prompt encoder reads no instance.
        identity: What a checkpoint says of all three, see :mod:`lopa_lightning.checkpoint`; empty without weights.
    """

    backbone: Backbone
    prompt_encoder: PromptEncoder
    instance_encoder: InstanceEncoder | None
    identity: dict[str, Any]


@dataclass(frozen=True)
class Builder:
    """Builds the parts of a module. Nothing is read before it is asked for.

    Attributes:
        backbone: The frozen model.
        make_prompt_encoder: Still wants ``(embedding_dim, instance_dim)``.
        instance_encoder: The model that reads instances.
        placement: Where virtual tokens go.
        adapter: PEFT config of an adapter in the backbone; None for none.
        train_backbone: Which weights of the backbone are trained.
        dropout: Whether the backbone's own dropout is active in training.
    """

    kind: InputKind
    make_prompt_encoder: PromptEncoderFactory
    instance_encoder: InstanceEncoderSpec
    placement: str = "before"
    adapter: Mapping[str, Any] | None = None
    train_backbone: TrainedWeights = False
    dropout: bool = False

    @property
    def backbone(self) -> PretrainedSpec:
        """Returns where the backbone comes from."""
        return self.kind.spec

    @functools.cached_property
    def encoder_spec(self) -> InstanceEncoderSpec:
        """Returns the instance encoder's spec: of a copy of the backbone where either of the two is trained."""
        spec, backbone = self.instance_encoder, self.backbone
        if not spec.is_backbone or not (spec.is_trained or self.train_backbone or self.adapter is not None):
            return spec
        return dataclasses.replace(spec, **{name: getattr(backbone, name) for name in SOURCE})

    @functools.cached_property
    def instance_vectors(self) -> VectorCache | None:
        """Returns where the instance encoder's vectors are kept; None where they change or are not to be kept."""
        spec = self.encoder_spec
        if spec.is_varying or not spec.cache:
            return None
        # The backbone's own class, so that the vectors are those that it would make. It goes before the backbone comes.
        source, family = (self.backbone, self.kind.family) if spec.is_backbone else (spec.pretrained(), "encoder")
        return VectorCache(
            source, InstanceEncoder(functools.partial(_body, source, family), spec, self.kind), ckpt.fingerprint
        )

    @functools.cached_property
    def skeleton(self) -> Parts:
        """Returns the parts on the ``meta`` device, checked as far as that needs no weights.

        Raises:
            LoPAError: If the parts do not go together.
        """
        return self.unloaded(checked_shapes)

    @functools.cached_property
    def input_spec(self) -> InputSpec:
        """Returns what a data module needs to make batches for this model.

        Raises:
            LoPAError: If the input and the frozen models do not go together.
        """
        skeleton = self.skeleton
        m, reads = skeleton.prompt_encoder.num_virtual_tokens, skeleton.prompt_encoder.uses_instance
        encoder, vectors = (self.encoder_spec, self.instance_vectors) if reads else (None, None)
        return self.kind.input_spec(skeleton.backbone, m, encoder, vectors)

    def check(self) -> None:
        """Raises a LoPAError if a quantised backbone is to be changed in a way that it cannot be, or cannot be made."""
        if (how := self.backbone.quantization) is None:
            return
        if self.train_backbone:
            raise LoPAError("a quantised backbone cannot be trained; leave quantization or train_backbone out")
        if how["quant_method"] == "torchao" and self.adapter is not None:
            raise LoPAError("adapters go with quantization by bitsandbytes, not by torchao")
        quantization_config(how)  # refuses what is not installed

    def load(self, mesh: DeviceMesh | None = None) -> Parts:
        """Reads the weights and builds all parts.

        Args:
            mesh: The processes that weights are to be sharded over; None for whole ones.

        Raises:
            LoPAError: If they cannot be loaded as configured.
        """
        self.check()
        identity = self.identity()
        # Adapters and keys and values of real tokens want whole layers; these are sharded afterwards.
        direct = mesh if self.adapter is None and self.placement != "every_layer" else None
        model = load_model(self.backbone, self.kind.family, direct)
        identity["backbone"] |= ckpt.fingerprint(model)
        backbone = self._backbone(model, self.backbone.compile)
        prompt_encoder = self._prompt_encoder(backbone)
        prompt_encoder.initialize(backbone.vocabulary())
        if not prompt_encoder.uses_instance:
            return Parts(backbone, prompt_encoder, None, identity)
        spec, vectors, facts = self.encoder_spec, self.instance_vectors, {}
        if spec.is_backbone:
            encoder = InstanceEncoder(backbone.body, spec, self.kind, shared=True)
        elif vectors is not None:
            encoder, facts = vectors.encoder, vectors.facts()
        else:
            encoder, facts = self.own_encoder(mesh)
        identity["instance_encoder"] |= facts
        return Parts(backbone, prompt_encoder, encoder, identity)

    def unloaded(self, make: Callable[[PretrainedSpec, Family], PreTrainedModel] = meta_model) -> Parts:
        """Builds all parts on the ``meta`` device: no weight is read.

        Args:
            make: Builds the backbone's model.
        """
        self.kind.check()
        with torch.device("meta"):
            backbone = self._backbone(make(self.backbone, self.kind.family), compiled=False)
            prompt_encoder, spec = self._prompt_encoder(backbone), self.encoder_spec
            if not prompt_encoder.uses_instance:
                return Parts(backbone, prompt_encoder, None, {})
            if self.instance_vectors is not None and not spec.is_backbone:
                return Parts(backbone, prompt_encoder, self.instance_vectors.encoder, {})
            model = backbone.body if spec.is_backbone else meta_model(spec.pretrained(), "encoder")
            encoder = InstanceEncoder(model, spec, self.kind, shared=spec.is_backbone)
        encoder.is_checked = True  # there are no values to compare
        return Parts(backbone, prompt_encoder, encoder, {})

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint says of the frozen models and the method, as far as it is known without weights."""
        identity: dict[str, Any] = {
            "format": FORMAT,
            "backbone": {
                "name": self.backbone.name,
                "revision": self.backbone.revision,
                "config": ckpt.config_facts(load_config(self.backbone)),
            },
            "quantization": self.backbone.quantization,
            "backbone_training": self._trained_weights(),
            "prompt_encoder": with_arguments(plain(self.make_prompt_encoder), without_defaults, PromptEncoder),
            "instance_encoder": None,
        }
        if self.skeleton.prompt_encoder.uses_instance:
            identity["instance_encoder"] = self.encoder_identity()
        return identity

    def _trained_weights(self) -> Any:
        if isinstance(self.train_backbone, bool):
            return "all" if self.train_backbone else plain(self.adapter)
        return self.train_backbone if self.train_backbone == "bias" else f"last {self.train_backbone} layers"

    def encoder_identity(self) -> dict[str, Any]:
        """Returns what a checkpoint says of the instance encoder, as far as it is known without weights."""
        spec = self.encoder_spec
        keys = ("name", "revision", "pooling", "normalize", "trainable", "adapter", "control")
        facts = {key: plain(getattr(spec, key)) for key in keys}
        return facts if spec.is_backbone else {**facts, "config": ckpt.config_facts(load_config(spec.pretrained()))}

    def own_encoder(self, mesh: DeviceMesh | None = None) -> tuple[InstanceEncoder, dict[str, Any]]:
        """Loads an instance encoder with a model of its own, and says which one it is. No backbone is needed.

        Args:
            mesh: The processes that weights are to be sharded over; None for whole ones.
        """
        spec = self.encoder_spec
        model = load_model(spec.pretrained(), "encoder", mesh if spec.adapter is None else None)  # whole, as in load
        facts = ckpt.fingerprint(model)  # before an adapter comes in, so that they are the plain encoder's
        return InstanceEncoder(model, spec, self.kind), facts

    def _backbone(self, model: PreTrainedModel, compiled: bool) -> Backbone:
        if self.adapter is not None:
            adapt(model, self.adapter)
        return self.kind.backbone(
            model,
            dropout=self.dropout,
            placement=self.placement,
            trained=self.train_backbone,
            gradient_checkpointing=self.backbone.gradient_checkpointing,
            compiled=compiled,
        )

    def instance_dim(self, backbone: Backbone) -> int:
        """Returns the width e of an instance vector.

        Args:
            backbone: Which may be the encoder.
        """
        spec = self.encoder_spec
        return backbone.hidden_dim if spec.is_backbone else hidden_size(load_config(spec.pretrained()))

    def prompt_encoder(self, embedding_dim: int, instance_dim: int, layers: int = 1) -> PromptEncoder:
        """Builds the prompt encoder, with its initial values.

        Args:
            embedding_dim: Width d of a virtual token.
            instance_dim: Width e of an instance vector.
            layers: Number of the backbone's layers that a virtual token has a part of d for each.
        """
        make: Any = self.make_prompt_encoder
        made = made_class(make)
        options = {"backbone_layers": layers} if made is not None and "backbone_layers" in arguments(made) else {}
        return make(embedding_dim, instance_dim, **options)  # type: ignore[no-any-return]

    def _prompt_encoder(self, backbone: Backbone) -> PromptEncoder:
        width, layers = backbone.prompt_dim, backbone.prompt_layers
        prompt_encoder = self.prompt_encoder(width, self.instance_dim(backbone), layers)
        if not backbone.takes_offset and prompt_encoder.token_offset() is not None:
            name, where = type(prompt_encoder).__name__, f"{type(backbone).__name__}, placement {self.placement!r}"
            raise LoPAError(f"{name} changes the text's embeddings, which {where}, does not have")
        return prompt_encoder


def _body(source: PretrainedSpec, family: Family) -> PreTrainedModel:
    model = load_model(source, family)
    return model if family == "encoder" else cast(PreTrainedModel, model.base_model)
