from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PromptEmbedding, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from lopa_lightning.backbones.pretrained import PretrainedSpec, load_model
from lopa_lightning.backbones.text import TextBackbone
from lopa_lightning.errors import LoPAError
from lopa_lightning.prompts import PromptTuning, Vocabulary
from tests.prompts.checks import assert_follows, randomized
from tests.tiny import run

LOGITS = 1e-6  # in float64; rotary angles are in float32 whatever the model's dtype


def test_every_instance_is_given_the_same_learned_prompt() -> None:
    tuning = PromptTuning(8, 4, num_virtual_tokens=5, init="normal")
    assert not PromptTuning.uses_instance
    weight = tuning.shared_virtual_tokens()
    for instance in (None, torch.randn(3, 4)):
        torch.testing.assert_close(tuning(instance), weight.reshape(1, 5, 8), atol=0, rtol=0)
    assert tuning.diagnostics(None) == {}


def test_gradient_of_the_prompt_sums_over_the_batch() -> None:
    tuning = PromptTuning(8, 4, num_virtual_tokens=5, init="normal")
    upstream = torch.randn(3, 5, 8)
    (tuning(None) * upstream).sum().backward()
    torch.testing.assert_close(tuning.shared_virtual_tokens().grad, upstream[0] + upstream[1] + upstream[2])


def test_it_is_the_papers_formula() -> None:
    """Z = P_e, equation 2: the learned prompt itself."""
    tuning = randomized(PromptTuning(8, 4, num_virtual_tokens=5, init="normal"), seed=0)
    assert_follows(tuning, lambda parameters: parameters["shared_prompt.weight"][None], lambda: tuning(None))


def test_prompt_and_gradient_are_those_of_pefts_module() -> None:
    config = PromptTuningConfig(num_virtual_tokens=5, token_dim=8, num_transformer_submodules=1)
    theirs = PromptEmbedding(config, None).double()
    ours = randomized(PromptTuning(8, 0, num_virtual_tokens=5), seed=0)

    def reference(p: dict[str, Tensor]) -> Tensor:
        weights = {"embedding.weight": p["shared_prompt.weight"]}
        return torch.func.functional_call(theirs, weights, torch.arange(5)[None])

    assert_follows(ours, reference, lambda: ours(None))


def test_normal_values_and_what_is_drawn_next_are_those_of_pefts_module() -> None:
    torch.manual_seed(0)
    config = PromptTuningConfig(num_virtual_tokens=10, token_dim=8, num_transformer_submodules=1)
    theirs, after = PromptEmbedding(config, None), torch.randn(3)
    torch.manual_seed(0)
    ours = PromptTuning(8, 0, num_virtual_tokens=10, init="normal")
    assert torch.equal(ours.shared_virtual_tokens(), theirs.embedding.weight)
    assert torch.equal(torch.randn(3), after)


def test_the_published_count() -> None:
    assert sum(p.numel() for p in PromptTuning(1024, 1024, num_virtual_tokens=10).parameters()) == 10_240  # 0.01 M


def test_the_prompt_is_all_that_is_trained() -> None:
    tuning = PromptTuning(8, 4, num_virtual_tokens=5)
    groups = tuning.parameter_groups()
    assert list(groups) == ["shared_prompt"]
    assert [id(p) for p in groups["shared_prompt"]] == [id(p) for p in tuning.parameters()]
    assert [(name, tuple(p.shape)) for name, p in tuning.named_parameters()] == [("shared_prompt.weight", (5, 8))]


def test_vocabulary_values_are_embeddings_of_distinct_ordinary_tokens() -> None:
    table = torch.randn(30, 8)
    vocabulary = Vocabulary(table.__getitem__, range(5, 30), lambda text: [], str)
    tuning = PromptTuning(8, 4, num_virtual_tokens=10)
    tuning.initialize(vocabulary)
    same = (tuning.shared_virtual_tokens()[:, None] == table[None]).all(-1)
    assert same.sum(1).tolist() == [1] * 10
    assert same[:, :5].sum() == 0
    assert same.sum(0).max() == 1


def test_text_values_are_the_texts_embeddings() -> None:
    table = torch.randn(30, 8)
    vocabulary = Vocabulary(table.__getitem__, range(5, 30), lambda text: [int(word) for word in text.split()], str)
    tuning = PromptTuning(8, 4, num_virtual_tokens=3, init="text", init_text="7 9")
    tuning.initialize(vocabulary)
    torch.testing.assert_close(tuning.shared_virtual_tokens().data, table[[7, 9, 7]], atol=0, rtol=0)


@pytest.mark.parametrize("options", [{"num_virtual_tokens": 0}, {"init": "zeros"}, {"init": "text"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(LoPAError):
        PromptTuning(8, 4, **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_are_those_of_pefts_prompt_tuning(kind: str, tiny: Callable[[str], str]) -> None:
    m, lengths = 4, [9, 3, 6]
    torch.manual_seed(0)
    tuning = PromptTuning(32, 0, num_virtual_tokens=m, init="normal", init_std=0.3).double()
    backbone = TextBackbone(load_model(PretrainedSpec(tiny(kind)), "causal_lm").double())

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=m, prompt_tuning_init="RANDOM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny(kind)), config).double().eval()
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(tuning.shared_virtual_tokens())

    words = backbone.model.config.vocab_size
    input_ids = torch.randint(1, words, (len(lengths), max(lengths)))
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        expected = theirs(input_ids=input_ids, attention_mask=attention_mask).logits[:, m:]
        states = run(backbone, tuning(None), input_ids, attention_mask)
        ours = backbone.label_logits(states.hidden[states.content_mask == 1], torch.arange(words))
    torch.testing.assert_close(ours, expected[attention_mask == 1], atol=LOGITS, rtol=LOGITS)
