"""A prompter makes a module's soft prompts without the backbone, and says where it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch

from lopa_lightning import Bundle, LoPAPrompter
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules.predict import batches, row_encoder
from lopa_lightning.serving import bundle as bundle_module
from lopa_lightning.serving.export import export_bundle
from tests.serving.helpers import checkpoint

Tiny = Callable[[str], str]
TEXTS = ["the film was great", "a bad story and badly told " * 9, "No", "the second half of it"]


def module_prompts(model: Any, texts: list[str]) -> torch.Tensor:
    """The module's own, one text at a time."""
    with torch.no_grad():
        if hasattr(model, "generate"):
            return torch.cat(
                [model.net.soft_prompt(model.input_spec.instance_batch([text], "cpu"))[0] for text in texts]
            )
        encoder, rows = row_encoder(model, texts)
        every = [next(batches(model, encoder, {"text": [text]}, 0, 1)) for text in rows["text"]]
        return torch.cat([model.net.soft_prompt(batch)[0] for batch in every])


KINDS = ["completion", "trained encoder", "adapted encoder"]


# What reads the prompt matters little to who makes it.
MORE = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("words", "masked", "head")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [*KINDS, "soft", "control", *MORE])
def test_prompts_are_the_modules_and_the_backbone_need_not_be_there(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny("bert" if kind == "masked" else "llama"), backbone)
    model, path = checkpoint(kind, tmp_path / "run", tiny, str(backbone))
    export_bundle(path).save_pretrained(tmp_path / "bundle")
    wanted = module_prompts(model, TEXTS)
    shutil.rmtree(backbone)
    prompter = LoPAPrompter.from_pretrained(tmp_path / "bundle")
    found = prompter(TEXTS, batch_size=2)
    assert found.shape == (4, 3, 32)
    assert prompter([]).shape == (0, 3, 32)
    torch.testing.assert_close(found, wanted.expand(4, -1, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(prompter(TEXTS[1]), found[1:2], rtol=0, atol=1e-6)
    assert not any(part.training for part in prompter.modules())
    assert not any(parameter.requires_grad for parameter in prompter.parameters())
    if kind not in ("soft", "control"):
        assert not torch.equal(found[0], found[2])
    rows = [row["input"] for row in prompter.bundle.rows]
    torch.testing.assert_close(prompter(rows), prompter.bundle.prompts, rtol=0, atol=1e-6)
    assert prompter.double()(TEXTS[:1]).dtype == torch.float64


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("backbone", "instance encoder is the backbone .* itself, .*train with a small one .*all-MiniLM-L6-v2"),
        ("every layer", "placement every_layer is keys and values in every layer, and no soft prompt"),
        ("dept", "DePT also changes the embeddings of the text"),
        ("lora", r"was changed \(adapter or train_backbone\), and no prompt says so; load_from_checkpoint"),
    ],
)
def test_a_bundle_whose_prompt_is_not_all_is_refused_in_a_line(
    kind: str, message: str, tiny: Tiny, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    _, path = checkpoint(kind, tmp_path, tiny)
    bundle = export_bundle(path)
    assert bundle.prompts is None
    assert any("is for module.predict and generate, not for a server" in str(each.message) for each in recwarn)
    with pytest.raises(LoPAError, match=message):
        LoPAPrompter(bundle)
    assert type(bundle.module()).__name__ == "CausalLMModule"


def test_what_a_server_cannot_answer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    for kind, message in {"head": "a head reads hidden states", "masked": "a masked LM is read at its mask"}.items():
        with pytest.raises(LoPAError, match=f"{message}, which no inference server sends"):
            export_bundle(checkpoint(kind, tmp_path / kind, tiny)[1]).check_served()
    export_bundle(checkpoint("completion", tmp_path / "completion", tiny)[1]).check_served()


def test_another_encoder_and_another_tokenizer_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(tiny("bert_base"), encoder)
    _, path = checkpoint(
        "completion", tmp_path / "run", lambda kind: str(encoder) if kind == "bert_base" else tiny(kind)
    )
    export_bundle(path).save_pretrained(tmp_path / "bundle")
    LoPAPrompter.from_pretrained(tmp_path / "bundle")
    tokenizer = encoder / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace('"great"', '"grand"'))
    with pytest.raises(LoPAError, match=r"the tokenizer of the instance encoder .* is not the one"):
        LoPAPrompter.from_pretrained(tmp_path / "bundle")
    tokenizer.write_text(text)
    weights = safetensors.torch.load_file(encoder / "model.safetensors")
    changed = {name: value + 1 for name, value in weights.items()}
    safetensors.torch.save_file(changed, encoder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoPAError, match=r"instance_encoder.weights: the checkpoint has"):
        LoPAPrompter.from_pretrained(tmp_path / "bundle")


def test_it_goes_to_the_hub_and_comes_back(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, asked = tmp_path / "hub", {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            pass

        def create_repo(self, repo_id: str, private: Any, exist_ok: bool) -> Any:
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: Path, revision: Any, commit_message: str) -> Any:
            shutil.copytree(folder_path, hub / repo_id)
            return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo_id}/commit/1"})

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options)
        if not (hub / repo_id).is_dir():
            raise FileNotFoundError(f"404: {repo_id}")
        return str(hub / repo_id)

    monkeypatch.setattr(bundle_module.huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(bundle_module.huggingface_hub, "snapshot_download", snapshot_download)
    prompter = LoPAPrompter(export_bundle(checkpoint("soft", tmp_path / "run", tiny)[1]))
    assert prompter.push_to_hub("me/soft", private=True) == "https://huggingface.co/me/soft/commit/1"
    again = LoPAPrompter.from_pretrained("me/soft", revision="v1")
    assert asked["revision"] == "v1"
    assert set(asked["allow_patterns"]) == {path.name for path in (hub / "me/soft").iterdir()}
    torch.testing.assert_close(again("a"), prompter("a"), rtol=0, atol=0)
    again.save_pretrained(tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == {
        p.name: p.read_bytes() for p in (hub / "me/soft").iterdir()
    }
    with pytest.raises(LoPAError, match=r"no bundle found for 'me/none', as a folder or a reachable hub id: .*404"):
        Bundle.from_pretrained("me/none")
