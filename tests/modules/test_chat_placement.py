"""Soft prompts in chats: learned, generated and saved as a plain concatenation of embeddings says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopa_lightning import LoPALightningModule
from lopa_lightning.errors import LoPAError
from lopa_lightning.modules import CausalLMModule
from tests.modules.helpers import causal, completions, module, reviews, trainer

Tiny = Callable[[str], str]

# A chat; what stands before the soft prompt and after it with placement system, and with placement user; the answer.
CASES: list[tuple[list[dict[str, str]], tuple[str, str], tuple[str, str], str]] = [
    (
        [{"role": "user", "content": "the film was"}],
        ("<|system|>", "<|user|>the film was<|assistant|>"),
        ("<|user|>", "\nthe film was<|assistant|>"),
        "great",
    ),
    (
        [{"role": "system", "content": "Yes No"}, {"role": "user", "content": "It was"}],
        ("<|system|>Yes No\n", "<|user|>It was<|assistant|>"),
        ("<|system|>Yes No<|user|>", "\nIt was<|assistant|>"),
        "terrible , badly told",
    ),
]
ROWS = [{"messages": [*chat, {"role": "assistant", "content": answer}]} for chat, *_, answer in CASES]


@pytest.fixture
def chatting(tiny: Tiny) -> str:
    """Folder of a tiny model whose tokenizer has a chat template."""
    return tiny("chat")


class ByHand:
    """transformers alone, on one text: embeddings before the soft prompt, the soft prompt, embeddings after it."""

    def __init__(self, module: CausalLMModule, folder: str, placement: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer, self.encoder = AutoTokenizer.from_pretrained(folder), module.net.prompt_encoder
        self.placement = placement

    def _embedded(self, text: str) -> Tensor:
        return self.model.get_input_embeddings()(self.tokenizer(text, return_tensors="pt")["input_ids"])

    @torch.no_grad()
    def prompted(self, case: Any) -> Tensor:
        chat, system, user, _ = case
        read = self.tokenizer(chat[-1]["content"], return_tensors="pt")
        mean = self.model.base_model(**read).last_hidden_state.mean(1)
        soft = self.encoder(mean / mean.square().mean(1, keepdim=True).sqrt())
        before, after = system if self.placement == "system" else user
        return torch.cat([self._embedded(before), soft, self._embedded(after)], 1)

    @torch.no_grad()
    def losses(self, case: Any) -> Tensor:
        prompted, answer = self.prompted(case), f"{case[-1]}{self.tokenizer.eos_token}"
        labels = self.tokenizer(answer, return_tensors="pt")["input_ids"][0]
        logits = self.model(inputs_embeds=torch.cat([prompted, self._embedded(answer)], 1)).logits[0]
        return F.cross_entropy(logits[-len(labels) - 1 : -1], labels, reduction="none")

    def generated(self, case: Any) -> list[str]:
        ids = self.model.generate(inputs_embeds=self.prompted(case), max_new_tokens=6, do_sample=False)
        return [self.tokenizer.decode(ids[0], skip_special_tokens=True)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("placement", ["system", "user"])
def test_chats_are_learned_and_answered_as_by_hand(chatting: str, tmp_path: Path, placement: str, side: Any) -> None:
    model = causal(chatting, placement=placement, generation={"max_new_tokens": 6})
    data = completions(tmp_path, ROWS * 2, messages_column="messages", padding_side=side)
    run = trainer(tmp_path, epochs=2)
    run.fit(model, data)
    (logged,) = run.validate(model, data, verbose=False)
    model.eval()
    by_hand = ByHand(model, chatting, placement)
    assert logged["val/loss"] == pytest.approx(float(torch.cat([*map(by_hand.losses, CASES)]).mean()), abs=1e-6)

    chats = [chat for chat, *_ in CASES]
    wanted = [*map(by_hand.generated, CASES)]
    assert model.generate(chats) == wanted
    assert model.generate(chats[1]) == wanted[1:]  # one chat
    assert model.generate("the film was") == wanted[:1]  # one text: a message of the user
    parts = [zip(part["index"].tolist(), part["completions"]) for part in run.predict(model, data)]
    assert sorted(row for part in parts for row in part) == [*enumerate(wanted * 2)]
    again = LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.generate(chats) == wanted


def test_a_checkpoint_belongs_to_its_chat_template(chatting: str, tmp_path: Path) -> None:
    model, data = causal(chatting, placement="system"), completions(tmp_path, ROWS, messages_column="messages")
    trainer(tmp_path, max_steps=1).fit(model, data)
    other = str(shutil.copytree(chatting, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(chatting)
    tokenizer.chat_template = tokenizer.chat_template.replace("|>", "|> ")
    tokenizer.save_pretrained(other)
    for load in (
        lambda: LoPALightningModule.load_from_checkpoint(tmp_path / "last.ckpt", backbone=causal(other).backbone_spec),
        lambda: trainer(tmp_path).validate(
            causal(other, placement="system"), data, ckpt_path=str(tmp_path / "last.ckpt")
        ),
    ):
        with pytest.raises(LoPAError, match=r"task.chat_template: the checkpoint has '\w{16}', this run '\w{16}'"):
            load()
    assert "chat_template" not in causal(chatting).known_identity()["task"]


def test_a_model_without_a_place_in_a_chat_is_refused_before_weights(chatting: str, tiny: Tiny, tmp_path: Path) -> None:
    data = completions(tmp_path)
    with pytest.raises(LoPAError, match="placement 'system' needs a backbone whose tokenizer has a chat template"):
        trainer(tmp_path).fit(causal(tiny("llama"), placement="system"), data)
    with pytest.raises(LoPAError, match=r"placement 'user' needs a causal language model .*, got objective 'masked"):
        module(tiny("roberta"), placement="user").builder.input_spec  # noqa: B018 - raises
    model = causal(chatting, placement="system", generation={"max_new_tokens": 6})
    model.learned = True
    with pytest.raises(
        LoPAError, match=r"a chat has \d+ tokens, room for 55, and with placement 'system' it is not cut"
    ):
        model.generate("the film was " * 60)
    with pytest.raises(LoPAError, match="a text must not contain <prompt_embeds>"):
        model.generate("a <prompt_embeds>")


def test_a_string_is_one_text_and_a_chat_goes_through_the_template(chatting: str) -> None:
    """With the soft prompt before all of it."""
    model = causal(chatting, generation={"max_new_tokens": 6})
    model.learned = True
    assert model.generate("the film was") == model.generate(["the film was"])
    chat = [{"role": "user", "content": "the film was"}]
    rendered = model.generate(["<|user|>the film was<|assistant|>"], instance_texts=["the film was"])
    assert model.generate(chat) == model.generate([chat]) == rendered
    assert model.generate(["the film was", chat]) == [*model.generate("the film was"), *rendered]


@pytest.mark.parametrize("placement", ["system", "user"])
def test_a_label_is_the_answers_first_word(chatting: str, tmp_path: Path, placement: str) -> None:
    """Words as an answer begins with them: without the space before a word in running text."""
    model = module(chatting, objective="causal_lm", placement=placement)
    data = reviews(tmp_path, words=["Yes", "No"])  # one token each, without a space before it too
    run = trainer(tmp_path)
    run.fit(model, data)
    rows = run.predict(model, data)
    found = {index: row for part in rows for index, row in zip(part["index"].tolist(), part["probabilities"])}
    model.eval()
    by_hand, tokens = ByHand(model, chatting, placement), AutoTokenizer.from_pretrained(chatting)
    words = [tokens(word)["input_ids"] for word in ("Yes", "No")]
    assert [len(ids) for ids in words] == [1, 1]
    assert words != [tokens(f" {word}")["input_ids"] for word in ("Yes", "No")]
    with open(tmp_path / "test.csv") as file:
        texts = [line.rsplit(",", 1)[0] for line in file.read().splitlines()[1:]]
    answers = model.predict(texts)
    for index, text in enumerate(texts[:5]):
        asked = f"{text} . It was"
        around = ("<|system|>", f"<|user|>{asked}<|assistant|>"), ("<|user|>", f"\n{asked}<|assistant|>")
        prompted = by_hand.prompted(([{"content": text}], *around, ""))
        logits = by_hand.model(inputs_embeds=prompted).logits[0, -1, [word for (word,) in words]]
        torch.testing.assert_close(found[index], logits.softmax(-1), atol=1e-5, rtol=1e-5)
        assert [*answers[index]["probabilities"].values()] == pytest.approx(found[index].tolist(), abs=1e-5)


def test_a_text_too_long_is_cut_and_its_chat_is_not(chatting: str, tmp_path: Path) -> None:
    model, data = module(chatting, objective="causal_lm", placement="system"), reviews(tmp_path, max_length=40)
    data.connect(model.input_spec)
    with pytest.warns(UserWarning, match="were cut to 40 tokens"):
        data.setup("test")
    tokens = AutoTokenizer.from_pretrained(chatting)
    for batch in data.test_dataloader()[0]:
        assert int(batch["attention_mask"].sum(1).max()) <= 40
        for ids, mask, at in zip(batch["input_ids"], batch["attention_mask"], batch["prompt_position"].tolist()):
            own = ids[mask == 1].tolist()
            assert tokens.decode(own[:at]) == "<|system|>"
            assert tokens.decode(own[at:]).startswith("<|user|>the film")
            assert tokens.decode(own[at:]).endswith(" . It was<|assistant|>")
