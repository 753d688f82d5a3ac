"""Answers for texts in Python and from the shell: those of a Trainer's predict, in the given order."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lopa_lightning import CausalLMModule, InstanceEncoderSpec, LoPALightningModule, PromptTuning, Task, Verbalizer
from lopa_lightning.cli import main
from lopa_lightning.data import CRUXEvalDataModule
from lopa_lightning.errors import LoPAError
from lopa_lightning.serving.export import export_bundle
from tests.mini_code import write_mini_cruxeval
from tests.modules.helpers import causal, completions, module, reviews, trainer, with_own_encoder

Tiny = Callable[[str], str]
TEXTS = ["the film was great", "a bad story and badly told " * 9, "the cast was good", "terrible", "better"]
PAIR = Task(["no", "yes"], verbalizer=Verbalizer(["No", "Yes"], template=["{first}", "{second} {mask}"]))


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a masked LM whose texts are cut to 20 tokens from the left."""
    folder = tmp_path_factory.mktemp("trained")
    model = module(tiny("bert"), instance_encoder=with_own_encoder(tiny("bert_base")))
    data = reviews(folder, max_length=20, truncation_side="left", instance_reads="template")
    run = trainer(folder, callbacks=[], max_steps=3, limit_val_batches=0)
    run.fit(model, data)
    run.save_checkpoint(folder / "best.ckpt")
    return folder


def by_a_trainer(model: Any, folder: Path, texts: list[str], **options: Any) -> list[dict[str, Any]]:
    """What the Trainer predicts for a file with the texts."""
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = reviews(folder, **options)
    data.data_files = {"predict": str(folder / "texts.jsonl"), "train": str(folder / "texts.jsonl")}
    data.splits = {**data.splits, "predict": "predict"}
    run = trainer(folder, callbacks=[])
    found = [row for batch in run.predict(model, data) or [] for row in model.prediction_rows(batch)]
    return [
        {key: value for key, value in row.items() if key != "index"} for row in sorted(found, key=lambda r: r["index"])
    ]


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


def test_a_loaded_module_predicts_as_a_trainer_does_with_the_data_of_training(
    trained: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    loaded = LoPALightningModule.load_from_checkpoint(trained / "best.ckpt")
    assert not any(part.training for part in loaded.modules())
    assert (loaded.task.verbalizer.max_length, loaded.task.verbalizer.truncation_side) == (20, "left")
    wanted = by_a_trainer(loaded, tmp_path, TEXTS, max_length=20, truncation_side="left", instance_reads="template")
    same(loaded.predict(TEXTS), wanted)
    assert any("1 of 5 texts were cut to 20 tokens" in str(each.message) for each in recwarn)
    same(loaded.predict(TEXTS * 3, batch_size=2), wanted * 3)
    same(loaded.predict(TEXTS[3]), wanted[3:4])
    same(loaded.predict({"text": TEXTS}), wanted)
    same(loaded.predict([{"text": TEXTS[2], "id": 7}, (TEXTS[0],)]), [wanted[2], wanted[0]])
    assert loaded.predict([]) == []
    assert not loaded.training
    # Cut elsewhere, the long text is another one.
    cut = dataclasses.replace(loaded.task.verbalizer, truncation_side="right")
    loaded.task = dataclasses.replace(loaded.task, verbalizer=cut)
    assert loaded.predict(TEXTS[1])[0]["probabilities"] != pytest.approx(wanted[1]["probabilities"], abs=1e-6)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["good", ""], "column 'text' is empty in row 1"),
        (["good", None], "column 'text' is empty in row 1"),
        ([3], "column 'text' must hold texts in row 0"),
        (("a", "b"), r"the task reads text: a row must be a text or .*got \('a', 'b'\) in row 0"),
        ([{"txt": "a"}], "row 0 .* has no text, which the task reads"),
        (7, "texts must be a text, a tuple, a mapping, or a list of them; got 7"),
    ],
)
def test_rows_that_the_task_cannot_read_are_refused_before_weights(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, texts: Any, message: str
) -> None:
    model = module(
        tiny("bert"), task=Task(["a", "b"], verbalizer=Verbalizer(["great", "bad"], template=["{text} {mask}"]))
    )
    monkeypatch.setattr(model, "configure_model", lambda: pytest.fail("weights were read"))
    with pytest.raises(LoPAError, match=message):
        model.predict(texts)


def test_a_pair_is_read_in_the_order_of_the_template_and_initial_values_do_not_answer(tiny: Tiny) -> None:
    model = module(tiny("bert"), task=PAIR, prompt_encoder=PromptTuning)
    with pytest.raises(LoPAError, match="nothing was trained or loaded, so predict would answer from initial values"):
        model.predict(("it was good", "No"))
    model.learned = True
    found = model.predict([("it was good", "No"), {"second": "No", "first": "it was good"}, ("No", "it was good")])
    same(found[:1], found[1:2])
    assert found[0]["probabilities"] != found[2]["probabilities"]
    spec, prompt = model.input_spec, model.net.prompt_encoder(None)
    ids = spec.tokenizer("it was good", "No [MASK]", return_tensors="pt")
    with torch.no_grad():
        states = model.net.backbone(prompt, ids)
        logits = model.net.backbone.model.cls(states.hidden)[0, 10 + ids["input_ids"][0].tolist().index(4)]
    words = [spec.tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
    wanted = logits[words].softmax(0).tolist()
    assert list(found[0]["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)


def test_completions_read_the_instances_that_training_read(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"the film {word}", "completion": "good", "topic": f"the cast was {word}"} for word in "ab" * 4]
    data = completions(tmp_path / "data", rows, instance_column="topic")
    options: dict[str, Any] = {
        "instance_encoder": InstanceEncoderSpec(tiny("bert_base")),
        "generation": {"max_new_tokens": 3},
    }
    trained = causal(tiny("llama"), **options)
    trainer(tmp_path).fit(trained, data)
    checkpoint = tmp_path / "last.ckpt"
    loaded = LoPALightningModule.load_from_checkpoint(checkpoint)
    assert isinstance(loaded, CausalLMModule)
    prompts, topics = [row["prompt"] for row in rows[:2]], [row["topic"] for row in rows[:2]]
    with pytest.warns(UserWarning, match="the column 'topic', and reads the prompts now: give these texts as instance"):
        loaded.generate(prompts)
    wanted = loaded.generate(prompts, instance_texts=topics)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    capsys.readouterr()
    main(["predict", "--ckpt_path", str(checkpoint), "--file", str(tmp_path / "new.jsonl")])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["completions"] for row in found] == wanted
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(checkpoint), "--text", "the film"])
    assert "the task reads prompt, topic: give a --file with these columns" in capsys.readouterr().err
    other = completions(tmp_path / "data", rows)
    read = r"the instance encoder read texts of their own, the column 'topic'; by .*instance_column .* the prompt"
    for model, path in ((causal(tiny("llama"), **options), checkpoint), (loaded, None)):
        with pytest.raises(LoPAError, match=read):
            trainer(tmp_path, callbacks=[]).test(model, other, ckpt_path=path)
    renamed = [{**row, "subject": row["topic"]} for row in rows]
    others = completions(tmp_path / "renamed", renamed, instance_column="subject")
    trainer(tmp_path, callbacks=[]).test(loaded, others, verbose=False)
    assert loaded.instance_column == "topic"
    assert export_bundle(checkpoint).config.module["init_args"]["instance_column"] == "topic"
    # A module that goes on with other data reads what that data says.
    trainer(tmp_path / "on").fit(loaded, other)
    again = LoPALightningModule.load_from_checkpoint(tmp_path / "on" / "last.ckpt")
    assert isinstance(again, CausalLMModule)
    assert again.instance_column is None
    with pytest.raises(LoPAError, match=r"the instance encoder read the prompt; by .* it would read 'topic'"):
        trainer(tmp_path, callbacks=[]).test(again, data)


def test_a_number_is_predicted_for_regression(tiny: Tiny) -> None:
    model = module(tiny("bert_base"), objective="head", task=Task([], verbalizer=Verbalizer(template=["{text}"])))
    model.configure_model()
    model.learned = True
    with torch.no_grad():
        model.net.readout.linear.bias.fill_(3.0)
        model.net.readout.linear.weight.zero_()
    assert model.predict(["a", "b"]) == [{"value": 3.0}, {"value": 3.0}]


def test_a_loaded_module_that_is_trained_on_is_in_training_mode(trained: Path, tmp_path: Path) -> None:
    loaded = LoPALightningModule.load_from_checkpoint(trained / "best.ckpt")
    run = trainer(tmp_path, callbacks=[], max_steps=1, limit_val_batches=0, enable_checkpointing=False)
    modes: list[bool] = []
    loaded.net.prompt_encoder.register_forward_hook(lambda part, *_: modes.append(part.training))
    run.fit(loaded, reviews(tmp_path, instance_reads="template"))
    assert modes == [True]
    assert not loaded.net.backbone.training


def test_a_string_to_generate_from_is_one_text(tiny: Tiny) -> None:
    model = causal(tiny("llama"), generation={"max_new_tokens": 3})
    model.learned = True
    text = "the film was great"
    assert model.generate(text) == model.generate([text])
    assert len(model.generate(text)) == 1
    assert model.generate(text, instance_texts=text) == model.generate([text], instance_texts=[text])


def test_options_of_generate_that_cannot_be_right_are_refused(tiny: Tiny) -> None:
    model = causal(tiny("llama"))  # has no weights: these come first
    for options, said in (
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),  # would answer nothing
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"stop": "ab"}, "stop must be a list, got 'ab'"),  # would be two letters
        ({"stop": ["\n", ""]}, "stop must be a list of texts that are not empty, got ''"),  # would end at once
    ):
        with pytest.raises(LoPAError, match=said):
            model.generate("the film", **options)


# From the shell


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_needs_a_checkpoint_and_texts_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = LoPALightningModule.load_from_checkpoint(trained / "best.ckpt")
    capsys.readouterr()
    ckpt = ["predict", "--ckpt_path", str(trained / "best.ckpt")]
    main([*ckpt, "--text", TEXTS[0], f"--text={TEXTS[3]}"])
    found = lines(capsys)
    assert [row.pop("input") for row in found] == [{"text": TEXTS[0]}, {"text": TEXTS[3]}]
    same(found, loaded.predict([TEXTS[0], TEXTS[3]]))

    (tmp_path / "new.csv").write_text("id,text,label\n" + "".join(f"{i},{text},good\n" for i, text in enumerate(TEXTS)))
    main([*ckpt, "--file", str(tmp_path / "new.csv"), "--output", str(tmp_path / "a" / "answers.jsonl")])
    assert lines(capsys) == []
    found = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert [row.pop("input") for row in found] == [
        {"id": i, "text": text.strip() if i == 99 else text, "label": "good"} for i, text in enumerate(TEXTS)
    ]
    same(found, loaded.predict(TEXTS))
    with pytest.raises(SystemExit):
        main([*ckpt, "--file", str(tmp_path / "new.csv"), "other.csv"])
    assert "the model reads texts: give one --file with rows, got 2" in capsys.readouterr().err


def test_the_command_reads_a_table_as_it_is_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "id;text\n1;caf\u00e9\n2;\n3;terrible\n".encode("latin-1")
    (tmp_path / "new.csv").write_bytes(table)
    predict = ["predict", "--ckpt_path", str(trained / "best.ckpt"), "--file", str(tmp_path / "new.csv")]
    for options, message in (
        ([], "set reader: {encoding: latin-1}"),
        (["--encoding", "latin-1"], "no column text; there are id;text; of a file whose columns are parted otherwise"),
        (["--encoding", "latin-1", "--sep", ";"], "new.csv: column 'text' is empty in row 2 (counted from 1)"),
    ):
        with pytest.raises(SystemExit):
            main([*predict, *options])
        assert message in capsys.readouterr().err
    with pytest.warns(UserWarning, match="1 of 3 rows were dropped: they have an empty cell"):
        main([*predict, "--encoding", "latin-1", "--sep", ";", "--drop_empty"])
    assert [row["input"] for row in lines(capsys)] == [{"id": 1, "text": "caf\u00e9"}, {"id": 3, "text": "terrible"}]
    (tmp_path / "new.csv").write_text("id;text\n2;\n")
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="1 of 1 rows were dropped"):
        main([*predict, "--sep", ";", "--drop_empty"])
    assert "new.csv: each of the 1 rows has an empty cell" in capsys.readouterr().err


def test_questions_of_a_benchmark_are_asked_for_beside_its_prompts(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_mini_cruxeval(tmp_path / "data")
    options: dict[str, Any] = {
        "instance_encoder": InstanceEncoderSpec(tiny("bert_base")),
        "generation": {"max_new_tokens": 3},
    }
    trained = causal(tiny("llama"), score_completions=False, **options)
    data = CRUXEvalDataModule(path=path, max_length=300, batch_size=2)
    trainer(tmp_path).fit(trained, data)
    checkpoint = tmp_path / "last.ckpt"
    loaded = LoPALightningModule.load_from_checkpoint(checkpoint)
    assert isinstance(loaded, CausalLMModule)
    example = data.layout("test")(data.rows("test")[0])
    wanted = loaded.generate([example.prompt], instance_texts=[example.instance])
    row = {"prompt": example.prompt, "question": example.instance}
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n")
    capsys.readouterr()
    main(["predict", "--ckpt_path", str(checkpoint), "--file", str(tmp_path / "new.jsonl")])
    assert [row["completions"] for row in lines(capsys)] == wanted
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(checkpoint), "--text", example.prompt])
    assert "the task reads prompt, question: give a --file with these columns" in capsys.readouterr().err
    whole = CRUXEvalDataModule(path=path, max_length=300, instance_reads="prompt")
    with pytest.raises(LoPAError, match=r"'question'; by data\.instance_reads it would read the prompt"):
        trainer(tmp_path, callbacks=[]).test(loaded, whole)


def test_the_command_completes(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = causal(tiny("llama"), generation={"max_new_tokens": 3}, num_samples=1)
    run = trainer(tmp_path, callbacks=[], max_steps=1, limit_val_batches=0)
    run.fit(model, completions(tmp_path / "data"))
    run.save_checkpoint(tmp_path / "last.ckpt")
    wanted = model.eval().generate(["the film", "it was"])
    capsys.readouterr()
    main(["predict", "--ckpt_path", str(tmp_path / "last.ckpt"), "--text", "the film", "--text", "it was"])
    assert lines(capsys) == [
        {"input": {"prompt": text}, "completions": texts} for text, texts in zip(["the film", "it was"], wanted)
    ]
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(tmp_path / "last.ckpt"), "--text", ""])
    assert capsys.readouterr().err == "error: column 'prompt' is empty in row 0 (counted from 0)\n"  # before weights
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(tmp_path / "last.ckpt"), "--text", "caf\udce9"])  # as of Latin-1
    assert capsys.readouterr().err == "error: column 'prompt' is not Unicode in row 0 (counted from 0)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a"], "--ckpt_path"),
        (["--ckpt_path", "x.ckpt", "--text", "a", "--file", "b"], "give --text or --file"),
        (["--ckpt_path", "x.ckpt", "--text", "a", "--sep", ";", "--drop_empty"], "--sep, --drop_empty is for a --file"),
        (["--ckpt_path", "none.ckpt", "--text", "a"], "no checkpoint at 'none.ckpt'"),
        (["--ckpt_path", "x.ckpt", "--text", "a", "--batch_size", "-1"], "batch_size must be at least 1, got -1"),
        (["--ckpt_path", "x.ckpt", "--text", "a", "--output", "/tmp"], "--output must be a file, got the folder /tmp"),
        (["--ckpt_path", "x.ckpt", "--text", "a", "--txt", "b"], "--txt"),
    ],
)
def test_a_command_that_cannot_be_right_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["predict", *arguments])
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
