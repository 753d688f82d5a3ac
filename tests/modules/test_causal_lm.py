"""Completions: what is learned, and that it is counted by token, whatever the batches."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopa_lightning import (
    DePT,
    InstanceEncoderSpec,
    LoPALightningModule,
    NoPrompt,
    PretrainedSpec,
    PromptTuning,
)
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules import CausalLMModule
from tests.modules.helpers import COMPLETIONS as ROWS
from tests.modules.helpers import LoPATiny, causal, completions, trainer

Tiny = Callable[[str], str]


def losses_by_hand(model: CausalLMModule, row: dict[str, str], plain: Any, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Loss and likeliest token of every completion token, by transformers alone on one text."""
    prompt = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
    answer = torch.tensor([[*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        mean = plain.base_model(input_ids=prompt).last_hidden_state.mean(1)
        instance = mean / mean.square().mean(1, keepdim=True).sqrt()
        soft = model.net.prompt_encoder(instance)
        read, learned = plain.get_input_embeddings()(prompt), plain.get_input_embeddings()(answer)
        if (offset := model.net.prompt_encoder.token_offset()) is not None:  # to the prompt alone
            count = min(len(offset), prompt.shape[1])
            read[:, :count] += offset[:count]
        parts = [read, soft, learned] if model.placement == "after" else [soft, read, learned]
        logits = plain(inputs_embeds=torch.cat(parts, 1)).logits[0, -answer.shape[1] - 1 : -1]
    return F.cross_entropy(logits, answer[0], reduction="none"), logits.argmax(-1) == answer[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_completion_token_counts_once_and_nothing_else(
    tiny: Tiny, tmp_path: Path, kind: str, padding_side: Any, placement: str
) -> None:
    model, data = causal(tiny(kind), placement=placement), completions(tmp_path, padding_side=padding_side)
    run = trainer(tmp_path)
    run.fit(model, data)
    (logged,) = run.validate(model, data, verbose=False)
    model.eval()
    plain, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny(kind)).eval(),
        AutoTokenizer.from_pretrained(tiny(kind)),
    )
    found = [losses_by_hand(model, row, plain, tokenizer) for row in ROWS]
    losses, hits = (torch.cat(parts) for parts in zip(*found))
    assert len(losses) > 60
    assert logged["val/loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert logged["val/perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    assert logged["val/token_accuracy"] == pytest.approx(float(hits.float().mean()))
    assert logged["val/score"] == pytest.approx(-logged["val/loss"])


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("max_length", [2, 64])
def test_an_offset_is_added_to_the_prompt_alone_as_where_it_generates(
    tiny: Tiny, tmp_path: Path, max_length: int, padding_side: Any
) -> None:
    """So that a completion is learned on what is generated from."""
    dept = functools.partial(DePT, num_virtual_tokens=3, max_length=max_length, rank=2)
    model = causal(tiny("llama"), prompt_encoder=dept, generation={"max_new_tokens": 5}, exact_match="all")
    model.learned = True  # as if
    model.configure_model()
    torch.nn.init.normal_(model.net.prompt_encoder.offset_b)
    plain = AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    data = completions(tmp_path, padding_side=padding_side)
    (logged,) = trainer(tmp_path, callbacks=[]).validate(model, data, verbose=False)
    losses = torch.cat([losses_by_hand(model, row, plain, tokenizer)[0] for row in ROWS])
    assert logged["val/loss"] == pytest.approx(float(losses.mean()), abs=1e-5)

    prompt = "the film was"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    embedding = plain.get_input_embeddings()
    with torch.no_grad():
        embedded = embedding(ids)
        count = min(max_length, ids.shape[1])
        embedded[:, :count] += model.net.prompt_encoder.token_offset()[:count]
        embedded = torch.cat([model.net.prompt_encoder(None), embedded], 1)
        written: list[int] = []
        while len(written) < 5 and tokenizer.eos_token_id not in written:
            written.append(int(plain(inputs_embeds=embedded).logits[0, -1].argmax()))
            embedded = torch.cat([embedded, embedding(torch.tensor([written[-1:]]))], 1)
    assert model.generate([prompt]) == [[tokenizer.decode(written, skip_special_tokens=True)]]


def test_completions_of_another_model_are_not_gone_on_from(tiny: Tiny, tmp_path: Path) -> None:
    """Also where nothing is trained, so that only the frozen models tell the two apart."""

    def identity(backbone: str, **kwargs: Any) -> str:
        seed_everything(1)
        options: dict[str, Any] = {"prompt_encoder": NoPrompt, **kwargs}
        model = CausalLMModule(backbone=PretrainedSpec(backbone, dtype=options.pop("dtype", "auto")), **options)
        model.configure_model()
        return json.dumps(model.prediction_identity(), sort_keys=True)

    other = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    other.lm_head.weight.data *= 1.01
    for name, model in (("same", AutoModelForCausalLM.from_pretrained(tiny("llama"))), ("other", other)):
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / name)
    assert identity(tiny("llama")) == identity(str(tmp_path / "same")) != identity(str(tmp_path / "other"))
    assert len({identity(tiny("llama"), dtype=dtype) for dtype in ("float32", "bfloat16")}) == 2
    own = [InstanceEncoderSpec(tiny(kind)) for kind in ("bert_base", "bert_base", "bert")]
    first, again, another = (identity(tiny("llama"), prompt_encoder=LoPATiny, instance_encoder=each) for each in own)
    assert first == again != another


METHODS: dict[str, dict[str, Any]] = {
    "lopa": {},
    "prompt_tuning": {"prompt_encoder": functools.partial(PromptTuning, num_virtual_tokens=3)},
    "dept": {"prompt_encoder": functools.partial(DePT, num_virtual_tokens=3, max_length=8, rank=2)},
    "every_layer": {"placement": "every_layer"},
    "after": {"placement": "after"},
    "lora": {"prompt_encoder": NoPrompt, "adapter": {"peft_type": "LORA", "r": 2}},
    "full": {"prompt_encoder": NoPrompt, "train_backbone": True},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_writes_the_same_once_loaded(tiny: Tiny, tmp_path: Path, method: str) -> None:
    seed_everything(1)
    rows = [{"prompt": "the film was", "completion": " great"}] * 8
    adam = functools.partial(torch.optim.AdamW, lr=3e-2)
    model = causal(tiny("llama"), generation={"max_new_tokens": 6}, optimizer=adam, **METHODS[method])
    data = completions(tmp_path, rows, batch_size=8)
    quiet: dict[str, Any] = {"callbacks": [], "enable_checkpointing": False, "num_sanity_val_steps": 0}
    (before,) = trainer(tmp_path, **quiet).validate(model, data, verbose=False)
    run = trainer(tmp_path, epochs=10, **quiet)
    run.fit(model, data)
    assert run.callback_metrics["val/loss"] < 0.8 * before["val/loss"]
    written = model.generate(["the film was", "It"])
    run.save_checkpoint(tmp_path / "kept.ckpt")
    again = LoPALightningModule.load_from_checkpoint(tmp_path / "kept.ckpt")
    assert type(again) is CausalLMModule
    assert again.generate(["the film was", "It"]) == written
    if method == "full":
        assert written[0] == [" great"]  # and the end token ended it


def test_after_a_prompt_a_batch_must_say_where_its_completion_begins(tiny: Tiny) -> None:
    model = causal(tiny("llama"), placement="after")
    model.configure_model()
    ids = torch.ones(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": ids}
    states = model.net.backbone(torch.randn(1, 3, 32), batch)
    with pytest.raises(LoPAError, match=r"'after' a batch must have prompt_position, .* has input_ids, .*, labels$"):
        model.net.readout(states, model.net.backbone, batch)


def test_an_instance_encoder_of_its_own_reads_the_prompt_alone(tiny: Tiny, tmp_path: Path) -> None:
    model = causal(tiny("llama"), instance_encoder=InstanceEncoderSpec(tiny("bert_base")))
    data = completions(tmp_path)
    trainer(tmp_path, fast_dev_run=True).fit(model, data)
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert_base"))
    for batch in data.val_dataloader()[0]:
        for row, index in enumerate(batch["index"].tolist()):
            own = batch["instance_input_ids"][row][batch["instance_attention_mask"][row] == 1]
            assert own.tolist() == tokenizer(ROWS[index]["prompt"])["input_ids"]


def test_matches_of_an_evaluation_that_was_cut_short_are_not_counted(tiny: Tiny, tmp_path: Path) -> None:
    model = causal(tiny("llama"), exact_match="all", generation={"max_new_tokens": 2})
    model.learned = True  # as if
    data, run = completions(tmp_path), functools.partial(trainer, tmp_path, callbacks=[])
    (wanted,) = run().validate(model, data, verbose=False)
    model.matched.update(torch.ones(99))
    (found,) = run().validate(model, data, verbose=False)
    assert found == wanted


@pytest.mark.parametrize("asked", ["all", 5])
def test_exact_match_is_the_share_of_completions_that_greedy_generation_gets_right(
    tiny: Tiny, tmp_path: Path, asked: Any
) -> None:
    """A row's completion is what the untrained model writes, of every third row something else."""
    sampling = {"max_new_tokens": 5, "do_sample": True, "temperature": 3.0}
    model = causal(tiny("llama"), exact_match=asked, generation=sampling, num_samples=2)
    model.learned = True  # as if
    prompts = [row["prompt"] for row in ROWS]
    texts = model.generate(prompts, {"do_sample": False}, num_samples=1, batch_size=1)
    rows = [
        {"prompt": prompt, "completion": "another one" if i % 3 == 1 else f" {text}\n"}
        for i, (prompt, (text,)) in enumerate(zip(prompts, texts))
    ]
    data = completions(tmp_path, rows, eval_batch_size=4)
    run = trainer(tmp_path, enable_checkpointing=False, callbacks=[])
    (logged,) = run.validate(model, data, verbose=False)
    count = len(ROWS) if asked == "all" else asked
    assert logged["val/exact_match"] == pytest.approx(len([i for i in range(count) if i % 3 != 1]) / count)
    run.fit(model, data)  # the metric starts anew, and lives through another kind of loop
    assert 0 <= run.callback_metrics["val/exact_match"] <= 1


def test_exact_match_is_off_unless_asked_for(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CausalLMModule, "complete", lambda *_: pytest.fail("something was generated"))
    (logged,) = trainer(tmp_path).validate(causal(tiny("llama")), completions(tmp_path), verbose=False)
    assert set(logged) == {"val/loss", "val/perplexity", "val/token_accuracy", "val/score"}


@pytest.mark.parametrize("asked", [-1, 0.5, "some"])
def test_exact_match_is_a_number_of_rows_or_all(tiny: Tiny, asked: Any) -> None:
    with pytest.raises(LoPAError, match=f"exact_match must be a number of rows, or all; got {asked!r}"):
        causal(tiny("llama"), exact_match=asked)


def test_exact_match_needs_to_know_the_completions(tiny: Tiny, tmp_path: Path) -> None:
    data = completions(tmp_path)
    model = causal(tiny("llama"), exact_match="all")
    data.connect(model.input_spec)
    data.setup("validate")
    with pytest.raises(LoPAError, match="exact_match needs a data module that knows the completions"):
        trainer(tmp_path).validate(model, data.val_dataloader(), verbose=False)
