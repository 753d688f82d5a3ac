"""Controls that take an example's own vector away: in training and evaluation, computed or from the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lopa_lightning import InstanceEncoderSpec, LoPALightningModule
from lopa_lightning.errors import LoPAError
from tests.modules.helpers import module, reviews, trainer

Tiny = Callable[[str], str]

LORA = {"peft_type": "LORA", "r": 2}


def given_to(control: str, own: list[list[float]]) -> list[list[float]]:
    """The vectors that a batch's examples get."""
    if control == "constant":
        return [[1.0] * len(vector) for vector in own]
    return [own[i - 1] for i in range(len(own))] if len(own) > 1 else [[0.0] * len(own[0])]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("control", ["shuffled", "constant"])
def test_evaluation_gives_each_example_the_controls_vector(
    tiny: Tiny, tmp_path: Path, control: str, cache: bool
) -> None:
    options: dict[str, Any] = {"objective": "head", "learning_rates": {"low_rank": 0.1}}
    spec = InstanceEncoderSpec(control=control, cache=cache)  # type: ignore[arg-type]
    run, data = trainer(tmp_path), reviews(tmp_path, rows=17)
    run.fit(module(tiny("bert_base"), instance_encoder=spec, **options), data)
    loaded = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    (validated,) = run.validate(loaded, data, verbose=False)
    losses, sizes, changes = [], [], []
    loaded.eval()
    with torch.no_grad():
        for batch in data.val_dataloader()[0]:
            assert ("instance" in batch) == cache
            own = batch["instance"] if cache else loaded.net.instance_encoder(batch)
            vectors = torch.tensor(given_to(control, own.tolist()))
            prompt = loaded.net.prompt_encoder(vectors)
            states = loaded.net.backbone(prompt, batch)
            outputs = loaded.net.readout(states, loaded.net.backbone, batch)
            torch.testing.assert_close(loaded(batch), outputs, rtol=0, atol=1e-6)
            losses.append(float(F.cross_entropy(outputs, batch["labels"], reduction="sum")))
            sizes.append(len(own))
            changes.append(float((prompt - loaded.net.prompt_encoder(own)).abs().max()))
    assert min(sizes) == 1
    assert validated["val/loss"] == pytest.approx(sum(losses) / sum(sizes), rel=1e-5)
    assert max(changes) > 1e-4
    with pytest.raises(LoPAError, match=rf"instance_encoder\.control: the checkpoint has '{control}', this run None"):
        LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt", instance_encoder=InstanceEncoderSpec())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control": "shufled"}, "instance_encoder.control must be one of shuffled, constant, got 'shufled'"),
        ({"control": "constant", "adapter": LORA}, "constant gives a trained or adapted encoder nothing to learn from"),
        ({"control": "constant", "trainable": True}, "constant gives a trained or adapted encoder nothing to learn"),
    ],
)
def test_controls_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoPAError, match=message):
        InstanceEncoderSpec(**options)
