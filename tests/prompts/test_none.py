from __future__ import annotations

import torch

from lopa_lightning.prompts import NoPrompt


def test_nothing_is_given_and_nothing_trained() -> None:
    none = NoPrompt(8, 4)
    assert none.num_virtual_tokens == 0
    assert not NoPrompt.uses_instance
    for instance in (None, torch.randn(3, 4)):
        assert none(instance).shape == (1, 0, 8)
    assert list(none.parameters()) == list(none.state_dict()) == []
    assert none.parameter_groups() == none.diagnostics(None) == {}
    assert none.shared_virtual_tokens() is None


def test_the_empty_prompt_goes_where_the_module_goes() -> None:
    assert NoPrompt(8, 4).to(torch.bfloat16)(None).dtype == torch.bfloat16
    assert NoPrompt(8, 4).to("meta")(None).device.type == "meta"
