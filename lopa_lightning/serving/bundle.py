"""A folder with all that a soft prompt needs: what was trained, and what it belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lopa_lightning import bundle_file, checkpoint
from lopa_lightning.backbones.image_spec import ImageKind
from lopa_lightning.bundle_file import BundleConfig, TokenizerFacts, write_tensors
from lopa_lightning.errors import LoPAError, one_line, shown
from lopa_lightning.files import new_folder
from lopa_lightning.modules import LoPALightningModule
from lopa_lightning.modules.checkpoint_loading import constructed, rebuilt
from lopa_lightning.prompts.base import PromptEncoder

CARD, PARITY, PARITY_TENSORS = "README.md", "parity.json", "parity.safetensors"
FILES = (bundle_file.CONFIG, bundle_file.TENSORS, CARD, PARITY, PARITY_TENSORS)
PROMPTS, IMAGES = "prompts", "images"  # names in the last one
_PROBES = ("A café costs 12.50 €;\n\tis it   OK?", "你好 <s>[MASK]</s> <|im_start|>")


def check_repo_id(name: str) -> None:
    """Raises a LoPAError if a name cannot be that of a repository on the hub."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError as error:
        raise LoPAError(f"no repository on the hub can be called {shown(name)}: {one_line(error)}") from error


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained soft prompt to share. Read one by :meth:`from_pretrained`, make one by ``lopa export``.

    Attributes:
        config: What ``config.json`` says.
        tensors: What was trained, by the names of a checkpoint.
        card: The model card, Markdown.
        rows: To compare with elsewhere: for each, ``input`` and the module's answer: a record of ``predict``, or for
            completions ``first_tokens``: the ``ids`` of the likeliest and their ``log_probabilities``.
        images: What the rows of a task on images name by number, in uint8 ``[N, H, W, 3]``; None of another task.
        prompts: The rows' soft prompts ``[N, m, d]``; None where :meth:`check_prompts` refuses.
    """

    config: BundleConfig
    tensors: dict[str, Tensor]
    card: str
    rows: list[dict[str, Any]]
    prompts: Tensor | None = None
    images: Tensor | None = None

    # Reading and writing

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Bundle:
        """Reads and checks a bundle.

        Args:
            name: A folder, or a repository on the hub.
            revision: Branch, tag or commit on the hub.
            token: Of the hub.
            cache_dir: Where what is downloaded is kept.
            local_files_only: Whether nothing is downloaded.

        Raises:
            LoPAError: If there is none, it is no bundle, or a revision of a folder is asked for.
        """
        folder = Path(name)
        if folder.is_dir() and revision is not None:
            raise LoPAError(f"a folder has no revision: {str(name)!r} is read as it is, got revision {shown(revision)}")
        if folder.is_file():
            raise LoPAError(f"{str(name)!r} is a file, and a bundle is a folder; lopa export makes one of a checkpoint")
        if not folder.is_dir():
            try:
                found = huggingface_hub.snapshot_download(
                    str(name),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    allow_patterns=list(FILES),
                )
            except Exception as error:  # of the hub's client, the network or the name
                what = f"no bundle found for {shown(str(name))}, as a folder or a reachable hub id"
                raise LoPAError(f"{what}: {one_line(error)}") from error
            folder = Path(str(found))
        if not bundle_file.is_bundle(folder):
            raise LoPAError(f"{shown(str(name))} is no bundle: it has no {bundle_file.CONFIG}")
        config, tensors = bundle_file.read(folder)
        try:
            rows, prompts, images = _parity(folder, config)
        except LoPAError as error:
            raise LoPAError(f"{shown(str(folder))} cannot be read as a bundle: {error}") from None
        card = folder / CARD
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        return cls(config, tensors, text, rows, prompts, images)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the bundle, whole or not at all.

        Args:
            folder: Must not be there, or be empty.

        Raises:
            LoPAError: If it is there and not empty, or cannot be written to.
        """
        with new_folder(Path(folder), "the folder of a bundle") as new:
            config = dataclasses.asdict(self.config)
            (new / bundle_file.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (new / CARD).write_text(self.card, encoding="utf-8")
            (new / PARITY).write_text(json.dumps(self.rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            parity = {PROMPTS: self.prompts, IMAGES: self.images}
            there = {name: value for name, value in parity.items() if value is not None}
            for name, tensors in ((bundle_file.TENSORS, self.tensors), (PARITY_TENSORS, there)):
                write_tensors(new / name, tensors)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a LoPA bundle",
    ) -> str:
        """Uploads the bundle to a repository on the hub, which is made if it is not there.

        Args:
            repo_id: ``user/name``.
            private: Whether a new repository is private.
            token: Of the hub.
            revision: Branch to commit to.
            commit_message: The commit's.

        Returns:
            The commit's address.

        Raises:
            LoPAError: If it cannot be uploaded.
        """
        check_repo_id(repo_id)
        api = huggingface_hub.HfApi(token=token)
        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(bundle := Path(scratch, "bundle"))
            try:
                repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                commit = api.upload_folder(
                    repo_id=repo, folder_path=bundle, revision=revision, commit_message=commit_message
                )
            except Exception as error:  # of the hub's client, the network or the account
                raise LoPAError(f"the bundle cannot be uploaded to {shown(repo_id)}: {one_line(error)}") from error
        return str(commit.commit_url)

    # What can be done with it

    @cached_property
    def unloaded(self) -> LoPALightningModule:
        """The module that it was made of, for its settings: no file of a model is opened.

        Raises:
            LoPAError: If a class that it names is not imported, or a setting is not what it must be.
        """
        return self.unloaded_module()

    def unloaded_module(self, trust_remote_code: bool = False, **overrides: Any) -> LoPALightningModule:
        """Builds the module that it was made of, for its settings: no file of a model is opened.

        Args:
            trust_remote_code: Whether models may run code of their own, where the bundle says that they do.
            **overrides: Hyperparameters to use in place of the bundle's.

        Raises:
            LoPAError: If a class that it names is not imported, or a setting is not what it must be.
        """
        saved = bundle_file.as_checkpoint(self.config, self.tensors)
        try:
            return constructed(LoPALightningModule, saved, trust_remote_code, overrides)  # type: ignore[type-abstract]
        except LoPAError:
            raise
        except Exception as error:  # whatever a class makes of arguments that it was never saved with
            raise LoPAError(f"no module can be built from the bundle: {shown(error)}") from error

    def module(self, trust_remote_code: bool = False, **overrides: Any) -> LoPALightningModule:
        """Loads the module that it was made of, with its backbone, in eval mode.

        Args:
            trust_remote_code: See ``load_from_checkpoint``.
            **overrides: See ``load_from_checkpoint``.

        Raises:
            LoPAError: See ``load_from_checkpoint``.
        """
        saved = bundle_file.as_checkpoint(self.config, self.tensors)
        return rebuilt(LoPALightningModule, saved, "the bundle", trust_remote_code, overrides)  # type: ignore[type-abstract]

    def prompt_encoder(self) -> PromptEncoder:
        """Builds the trained prompt encoder, in eval mode.

        Raises:
            LoPAError: If its settings and the trained tensors do not go together.
        """
        facts, make = self.config.prompt, self.unloaded.builder.prompt_encoder
        sizes = facts.embedding_dim, facts.instance_dim, facts.layers
        trained = self.part("prompt_encoder")
        try:
            with torch.device("meta"):  # sizes are looked at before anything of such a size is built
                shapes = make(*sizes)
            checkpoint.check_tensors(trained, dict(shapes.named_parameters()))
            encoder = make(*sizes)
        except LoPAError:
            raise
        except Exception as error:  # as of sizes that no tensor can have
            raise LoPAError(f"no prompt encoder can be built from the bundle: {shown(error)}") from error
        encoder.load_state_dict(trained, strict=False)  # the names are checked; buffers are not saved
        if encoder.num_virtual_tokens != facts.num_virtual_tokens:
            said, got = facts.num_virtual_tokens, encoder.num_virtual_tokens
            raise LoPAError(f"the bundle's prompt says num_virtual_tokens {said}, and its method makes {got}")
        return encoder.requires_grad_(False).eval()

    def part(self, name: str) -> dict[str, Tensor]:
        """Returns the trained tensors of a part of the model, by their names in it.

        Args:
            name: ``prompt_encoder``, ``readout``, ``instance_encoder`` or ``backbone``.
        """
        prefix = f"net.{name}."
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    @property
    def reads_images(self) -> bool:
        """Whether its task is one on images.

        Raises:
            LoPAError: See :attr:`unloaded`.
        """
        return isinstance(self.unloaded.builder.kind, ImageKind)

    def check_prompts(self) -> None:
        """Refuses a bundle whose soft prompt is not all that the backbone must be given, or needs the backbone.

        Raises:
            LoPAError: If virtual tokens stand in every layer, the text's embeddings are changed as well, the backbone
                was changed, there is no soft prompt, or the backbone itself is the instance encoder.
        """
        module, method = self.unloaded, self.prompt_encoder()
        backbone = module.backbone_spec.name
        works = "load_from_checkpoint loads it with the backbone"
        if module.adapter is not None or module.train_backbone:
            raise LoPAError(f"{backbone!r} was changed (adapter or train_backbone), and no prompt says so; {works}")
        if method.num_virtual_tokens == 0:
            raise LoPAError(f"the bundle has no soft prompt; {works}")
        if self.config.prompt.placement == "every_layer":
            what = "virtual tokens for each layer" if self.reads_images else "keys and values in every layer"
            raise LoPAError(f"placement every_layer is {what}, and no soft prompt; {works}")
        if method.token_offset() is not None:
            name = type(method).__name__
            raise LoPAError(f"{name} also changes the embeddings of the text, and no prompt says so; {works}")
        if method.uses_instance and module.builder.encoder_spec.is_backbone:
            other = "facebook/dinov2-small" if self.reads_images else "sentence-transformers/all-MiniLM-L6-v2"
            raise LoPAError(
                f"the instance encoder is the backbone {backbone!r} itself, without which no prompt can be made; train "
                f"with a small one (instance_encoder.name: {other}) to make prompts apart from it; {works}"
            )

    def check_served(self) -> None:
        """Refuses a bundle that an inference server cannot answer with: soft prompts in, tokens out.

        Raises:
            LoPAError: As :meth:`check_prompts`, or if images are read, a head, or the mask of a masked LM.
        """
        if self.reads_images:
            raise LoPAError(
                "no inference server takes virtual tokens among an image's patches; `lopa predict --ckpt_path` and "
                "module.predict answer with it"
            )
        self.check_prompts()
        if (objective := self.config.answer.get("objective")) not in ("causal_lm", "completion"):
            what = "a head reads hidden states" if objective == "head" else "a masked LM is read at its mask"
            raise LoPAError(
                f"{what}, which no inference server sends; `lopa predict --ckpt_path` and module.predict answer with "
                "it, or train with objective: causal_lm"
            )


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> TokenizerFacts:
    """Returns which tokenizer it is: by its vocabulary and by what it does, not by how its files are written."""
    encoded = [tokenizer(text, verbose=False)["input_ids"] for text in _PROBES]
    what = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens), encoded]
    template = tokenizer.chat_template
    return TokenizerFacts(_sha256(what), None if template is None else _sha256(template))


def _sha256(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _parity(folder: Path, config: BundleConfig) -> tuple[list[dict[str, Any]], Tensor | None, Tensor | None]:
    """The rows to compare with, their prompts and images; a bundle may lack them."""
    if not (folder / PARITY).is_file():
        return [], None, None
    rows = bundle_file.read_json(folder / PARITY)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "input" in row for row in rows):
        raise LoPAError(f"its {PARITY} must be a list of rows with an input, got {shown(rows)}")
    tensors = bundle_file.read_tensors(folder / PARITY_TENSORS, pixels=[IMAGES])
    prompts, images = tensors.get(PROMPTS), tensors.get(IMAGES)
    wanted = (len(rows), config.prompt.num_virtual_tokens, config.prompt.embedding_dim)
    if prompts is not None and prompts.shape != wanted:
        raise LoPAError(f"its {PARITY_TENSORS} must have {PROMPTS} {wanted}, got {tuple(prompts.shape)}")
    if images is not None and (images.dim() != 4 or images.shape[::3] != (len(rows), 3) or 0 in images.shape):
        wanted_images = f"{IMAGES} [{len(rows)}, H, W, 3]"
        raise LoPAError(f"its {PARITY_TENSORS} must have {wanted_images}, got {tuple(images.shape)}")
    return rows, prompts, images
