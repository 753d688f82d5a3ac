from __future__ import annotations

import sys

import pytest
import torch
from peft import PromptEmbedding, PromptTuningConfig
from torch import Tensor

from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts import PeftPromptTuning, PromptTuning, Vocabulary
from tests.prompts.checks import assert_follows, randomized, tokens_at_scale


def test_prompt_and_gradient_are_those_of_pefts_module() -> None:
    config = PromptTuningConfig(num_virtual_tokens=5, token_dim=8, num_transformer_submodules=1)
    theirs = PromptEmbedding(config, None).double()
    ours = randomized(PeftPromptTuning(8, 0, num_virtual_tokens=5), seed=0)

    def reference(p: dict[str, Tensor]) -> Tensor:
        weights = {"embedding.weight": p["prompt.embedding.weight"]}
        return torch.func.functional_call(theirs, weights, torch.arange(5)[None])

    assert_follows(ours, reference, lambda: ours(None))


def test_with_the_same_values_it_is_our_prompt_tuning() -> None:
    theirs, ours = randomized(PeftPromptTuning(8, 0, num_virtual_tokens=5), 0), PromptTuning(8, 0, 5).double()
    ours.load_state_dict({"shared_prompt.weight": theirs.state_dict()["prompt.embedding.weight"]})
    torch.testing.assert_close(theirs(None), ours(None), atol=0, rtol=0)
    torch.testing.assert_close(theirs.shared_virtual_tokens(), ours.shared_virtual_tokens(), atol=0, rtol=0)
    assert list(theirs.parameter_groups()) == list(ours.parameter_groups()) == ["shared_prompt"]


@pytest.mark.parametrize("init", ["vocabulary", "normal"])
def test_under_the_same_seed_it_starts_as_our_prompt_tuning(init: str, table: Tensor, vocabulary: Vocabulary) -> None:
    starts, after = [], []
    for method in (PeftPromptTuning, PromptTuning):
        torch.manual_seed(0)
        prompt = method(8, 0, num_virtual_tokens=10, init=init)
        prompt.initialize(vocabulary)
        starts.append(prompt.shared_virtual_tokens().detach())
        after.append(torch.randn(3))
    assert torch.equal(*starts)
    assert torch.equal(*after)  # what is drawn next, such as a head's weights, is the same too
    if init == "vocabulary":
        assert len(set(tokens_at_scale(starts[0], table))) == 10


def test_a_missing_peft_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LoPAError, match=r'pip install "lopa-lightning\[peft\]"'):
        PeftPromptTuning(8, 0)
