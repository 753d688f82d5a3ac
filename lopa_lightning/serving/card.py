"""The model card of a bundle."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import ModelCardData

from lopa_lightning.backbones.injection import CHAT_PLACEMENTS
from lopa_lightning.backbones.pretrained import PretrainedSpec
from lopa_lightning.bundle_file import BundleConfig
from lopa_lightning.plain import built

LIBRARY = "lopa-lightning"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_SERVED = "A vLLM server of the backbone takes the soft prompts: `vllm serve {name} --enable-prompt-embeds`. {how}"
_IN_CHATS = "`LoPAClient` of LoPA Lightning puts them into chat messages."
_QUANTISED = " The backbone was quantised in training: the server must quantise it alike, or it answers otherwise."
_WHOLE = "`LoPAClient` of LoPA Lightning sends them with the embeddings of the whole text to its `/v1/completions`."
_BODY = """# A soft prompt for {backbone}

{what}

- Backbone, which stays as it is: {backbone}. Licence: {backbone_license}.
- Instance encoder: {encoder}.
- Placement `{placement}`, {m} virtual tokens of width {d}.
{facts}

## How to use

```python
{python}
```

## How to serve

{serving}

`parity.json` and `parity.safetensors` hold a few rows with their soft prompts and answers, to check that they are the
same elsewhere. Made with {made_with}.
"""


def model_card(
    config: BundleConfig,
    models: Mapping[str, tuple[str, str]],
    unserved: str | None,
    makes_prompts: bool,
    reads_images: bool,
    run: Mapping[str, Any],
    license: str | None = None,
) -> str:
    """Writes a model card.

    Args:
        config: The bundle's.
        models: Name and licence of ``backbone``, and of ``instance_encoder`` where there is one.
        unserved: Why no inference server can answer with it; None where one can.
        makes_prompts: Whether a prompter makes soft prompts of it.
        reads_images: Whether its task is one on images.
        run: ``data``, the name of the data set, and ``dataset``, its hub id, where they are known.
        license: Of what was trained; None if it is not said.
    """
    backbone, backbone_license = models["backbone"]
    body = _BODY.format(
        backbone=f"`{backbone}`",
        backbone_license=backbone_license,
        what=_what(config),
        encoder="`{}`. Licence: {}".format(*models["instance_encoder"]) if "instance_encoder" in models else "none",
        placement=config.prompt.placement,
        m=config.prompt.num_virtual_tokens,
        d=_width(config),
        facts=_facts(config, run),
        python=_python(config, makes_prompts, "photo.jpg" if reads_images else "a text"),
        serving=_serving(config, backbone, unserved),
        made_with=config.made_with,
    )
    return f"---\n{_metadata(config, backbone, reads_images, run, license).to_yaml()}\n---\n\n{body}"


def _serving(config: BundleConfig, backbone: str, unserved: str | None) -> str:
    if unserved:
        return f"Not by an inference server: {unserved}."
    how = _IN_CHATS if config.prompt.placement in CHAT_PLACEMENTS else _WHOLE
    return _SERVED.format(name=backbone, how=how) + (_QUANTISED if config.identity.get("quantization") else "")


def _metadata(
    config: BundleConfig, backbone: str, reads_images: bool, run: Mapping[str, Any], license: str | None
) -> ModelCardData:
    classifies = "image-classification" if reads_images else "text-classification"
    base: dict[str, Any] = {"base_model": backbone, "base_model_relation": "adapter"} if _is_hub_id(backbone) else {}
    return ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="text-generation" if _completes(config) else classifies,
        tags=["soft-prompt", "prompt-tuning", "lopa"],
        datasets=[run["dataset"]] if run.get("dataset") else None,
        license=license,
        **base,
    )


def _what(config: BundleConfig) -> str:
    method, labels = config.identity.get("prompt_encoder"), config.answer.get("labels")
    name = method.get("class_path") if isinstance(method, Mapping) else None
    return f"Made by `{name}` of LoPA Lightning" + (f", for the labels {', '.join(labels)}." if labels else ".")


def _width(config: BundleConfig) -> str:
    facts = config.prompt
    layers = f" in each of {facts.layers} layers" if facts.layers > 1 else ""
    return f"{facts.embedding_dim // facts.layers}{layers}"


def _facts(config: BundleConfig, run: Mapping[str, Any]) -> str:
    metrics = [f"  - `{name}`: {value:.4f}" for name, value in config.metrics.items()]
    lines = [f"- Data: {run.get('data', 'not known')}."]
    return "\n".join([*lines, "- Best validation of the run:" if metrics else "- Metrics: not known.", *metrics])


def _python(config: BundleConfig, makes_prompts: bool, example: str) -> str:
    act = "generate" if _completes(config) else "predict"
    lines = [f"from lopa_lightning import Bundle{', LoPAPrompter' if makes_prompts else ''}", ""]
    if makes_prompts:
        lines += [f'prompts = LoPAPrompter.from_pretrained("THIS")(["{example}"])  # [1, m, d], without the backbone']
    return "\n".join([*lines, f'answers = Bundle.from_pretrained("THIS").module().{act}(["{example}"])  # with it'])


def _completes(config: BundleConfig) -> bool:
    return config.answer.get("objective") == "completion"


def license_of(spec: PretrainedSpec) -> str:
    """Returns the licence that a model's own card names, read from its folder, the hub or its cache."""
    with contextlib.suppress(Exception):  # no card, no network, or a card without a licence
        location = spec.location()
        path = (
            Path(location, "README.md")
            if os.path.isdir(location)
            else huggingface_hub.hf_hub_download(location, "README.md", revision=spec.revision)
        )
        front = Path(path).read_text(encoding="utf-8").split("---")[1]
        said = yaml.safe_load(front)
        if found := said.get("license_name") or said.get("license"):
            return str(found)
    return "unknown, its card names none or is not at hand"


def run_facts(path: Path) -> dict[str, Any]:
    """Returns what is known of the data that a checkpoint was trained on: from the configuration in its run's folder.

    Args:
        path: The checkpoint.
    """
    for folder in (path.parent, path.parent.parent):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, LookupError):
            data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
            options = data.get("init_args") or {}
            name = str(data["class_path"]).rpartition(".")[2]
            source = str(options.get("path") or "")
            task = options.get("task") or options.get("name")
            hub = source if _is_hub_id(source) else None
            said = [f"`{each}`" for each in (hub, task) if each]
            return {"data": ", ".join([f"`{name}`", *said]), "dataset": hub}
    return {}


def metrics_in(saved: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of the run's best validation, as far as a checkpoint knows them.

    Raises:
        LoPAError: If they are no numbers.
    """
    summary = saved.get("callbacks", {}).get("FitSummary")
    best = built(summary.get("best") if isinstance(summary, Mapping) else None, dict[str, float] | None, "best") or {}
    return {name: value for name, value in best.items() if math.isfinite(value)}  # as a correlation need not be


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not os.path.exists(name)
