"""Instance vectors on the disk: what they are, when they are made, and when again; and the runs that gain by them."""

from __future__ import annotations

import functools
import logging
import math
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value
from lightning.pytorch.trainer.states import TrainerFn
from transformers import AutoModel, AutoTokenizer

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.pretrained import PretrainedSpec, load_model
from lopa_lightning.data.collate import Collate, Rows
from lopa_lightning.data.instance_vectors import reads_all, stored_vectors
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import InstanceEncoder, InstanceEncoderSpec
from lopa_lightning.instances.vectors import VectorCache
from tests.tiny import TEXT, TEXTS, save_tiny

Tiny = Callable[[str], str]

CPU = torch.device("cpu")
ROWS = [*TEXTS, TEXTS[1], TEXTS[0], TEXTS[1]]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data sets' cache of a test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def rows(folder: str, texts: list[str] = ROWS, max_length: int | None = None) -> Dataset:
    encoded = AutoTokenizer.from_pretrained(folder)(texts, truncation=max_length is not None, max_length=max_length)
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    return Dataset.from_dict({**{f"instance_{name}": encoded[name] for name in names}, "index": range(len(texts))})


def cache(folder: str, calls: list[int] | None = None, **options: Any) -> VectorCache:
    """A cache that notes how many texts each pass of the encoder reads; of vectors as they come, if nothing is said."""
    spec, source = InstanceEncoderSpec(folder, **{"normalize": False, **options}), PretrainedSpec(folder)
    encoder = InstanceEncoder(functools.partial(load_model, source, "encoder"), spec, TEXT)
    if calls is not None:
        encoder.register_forward_hook(lambda module, args, result: calls.append(len(result)))
    return VectorCache(source, encoder, ckpt.fingerprint)


def found_by(made: VectorCache, data: Dataset, what: str = "x") -> np.ndarray:
    """The vectors of all rows of a data set."""
    vectors = stored_vectors(made, data, what, CPU, Collate(0))
    assert vectors is not None
    return np.stack(vectors.at(list(range(len(data)))).to_numpy())


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("vectors.arrow"))


def one_by_one(folder: str, pooling: str, texts: list[str] = ROWS) -> np.ndarray:
    """Plain transformers, a text at a time."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.amax(0)}[pooling])
    return torch.stack(vectors).numpy()


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", ["bert_base", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_each_row_has_the_vector_of_its_text_alone(tiny: Tiny, kept: Path, kind: str, pooling: str) -> None:
    found = found_by(cache(tiny(kind), pooling=pooling), rows(tiny(kind)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, one_by_one(tiny(kind), pooling), rtol=0, atol=2e-6)
    (path,) = files(kept)
    assert len(Dataset.from_file(str(path))) == len(TEXTS)  # any reader of Arrow files reads them


def test_the_two_texts_of_a_pair_are_told_apart(tiny: Tiny, kept: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert_base"))
    encoded = tokenizer(TEXTS, TEXTS[::-1])
    data = Dataset.from_dict({f"instance_{name}": encoded[name] for name in ("token_type_ids", "input_ids")})
    found = found_by(cache(tiny("bert_base")), data)
    model = AutoModel.from_pretrained(tiny("bert_base")).eval()
    for row, pair in enumerate(zip(TEXTS, TEXTS[::-1])):
        with torch.no_grad():
            hidden = model(**tokenizer(*pair, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(found[row], hidden.mean(0), rtol=0, atol=2e-6)


def test_token_types_are_part_of_the_text(tiny: Tiny, kept: Path) -> None:
    ids = [[2, 7, 8, 3], [2, 7, 8, 3], [2, 7, 8, 3]]
    types = [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    data = Dataset.from_dict({"instance_input_ids": ids, "instance_token_type_ids": types})
    calls: list[int] = []
    found = found_by(cache(tiny("bert_base"), calls), data)
    assert calls == [2]
    np.testing.assert_array_equal(found[0], found[2])
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_an_encoder_in_bfloat16_gives_its_own_numbers_in_float32(tiny: Tiny, kept: Path) -> None:
    folder = tiny("bert_base")
    source = PretrainedSpec(folder, dtype="bfloat16")
    spec = InstanceEncoderSpec(folder, "cls", normalize=False, dtype="bfloat16")
    encoder = InstanceEncoder(functools.partial(load_model, source, "encoder"), spec, TEXT)
    vectors = found_by(VectorCache(source, encoder, ckpt.fingerprint), rows(folder))
    model, tokenizer = load_model(source, "encoder"), AutoTokenizer.from_pretrained(folder)
    alone = tokenizer(max(TEXTS, key=lambda text: len(tokenizer(text)["input_ids"])), return_tensors="pt")
    with torch.no_grad():
        wanted = model(**alone).last_hidden_state[0, 0]
    found = vectors[max(range(len(TEXTS)), key=lambda row: len(tokenizer(TEXTS[row])["input_ids"]))]
    assert wanted.dtype == torch.bfloat16
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, torch.from_numpy(found).bfloat16().float())
    np.testing.assert_allclose(found, wanted.float(), rtol=0.02, atol=0.02)
    found_by(cache(folder, pooling="cls"), rows(folder))
    assert len(files(kept)) == 2


@pytest.mark.parametrize("at_once", [1024, 5])
def test_batches_are_of_like_length_and_hold_each_text_once(
    tiny: Tiny, kept: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("lopa_lightning.data.instance_vectors._TOKENS", 24)
    monkeypatch.setattr("lopa_lightning.data.instance_vectors._ROWS", at_once)
    shapes, made = [], cache(tiny("bert_base"))
    keys = "instance_input_ids", "instance_attention_mask"
    made.encoder.register_forward_hook(
        lambda module, args, result: shapes.append((tuple(args[0][keys[0]].shape), args[0][keys[1]]))
    )
    texts = ["it was good", *TEXTS, "it was good", "Yes , it was"] * 3
    lengths = sorted(map(len, AutoTokenizer.from_pretrained(tiny("bert_base"))(sorted(set(texts)))["input_ids"]))
    found = found_by(made, rows(tiny("bert_base"), texts))
    assert sorted(int(n) for _, mask in shapes for n in mask.sum(1)) == lengths
    assert [width for (_, width), _ in shapes] == sorted((width for (_, width), _ in shapes), reverse=True)
    assert all(count * width <= 24 or count == 1 for (count, width), _ in shapes)
    np.testing.assert_allclose(found, one_by_one(tiny("bert_base"), "mean", texts), rtol=0, atol=2e-6)


def test_the_second_time_no_weight_is_read(tiny: Tiny, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    data, first = rows(tiny("bert_base")), cache(tiny("bert_base"), calls)
    wanted, facts = found_by(first, data), first.facts()
    assert calls == [len(TEXTS)]
    assert not first.encoder._unregistered

    def fail(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tests.data.test_vectors.load_model", fail)
    again = cache(tiny("bert_base"))
    np.testing.assert_array_equal(found_by(again, data), wanted)
    assert again.facts() == facts
    # In another order of columns, in other integers, with other columns beside: the tokens alone count.
    other = Dataset.from_list([{"labels": 0, **row} for row in reversed(data)]).select(range(len(ROWS))[::-1])
    other = other.cast_column("instance_input_ids", List(Value("int32")))
    np.testing.assert_array_equal(found_by(again, other), wanted)
    assert len(files(kept)) == 1


def test_vectors_that_are_not_there_are_not_made_where_none_are_wanted(tiny: Tiny, kept: Path) -> None:
    data, made = rows(tiny("bert_base")), cache(tiny("bert_base"))
    assert stored_vectors(made, data, "x", CPU, Collate(0), make=False) is None
    assert not list(kept.rglob("*"))
    found_by(made, data)
    assert stored_vectors(made, data, "x", CPU, Collate(0), make=False) is not None


def test_whatever_a_vector_depends_on_makes_another_file(tiny: Tiny, kept: Path, tmp_path: Path) -> None:
    folder = save_tiny("bert_base", tmp_path / "encoder")
    variants: list[tuple[dict[str, Any], Dataset]] = [
        ({}, rows(folder)),
        ({"pooling": "max"}, rows(folder)),
        ({"normalize": True}, rows(folder)),
        ({}, rows(folder, max_length=4)),
        ({}, rows(folder, ROWS[::-1])),
        ({}, rows(folder, [*ROWS[:-1], "a terrible story , badly"])),
        ({}, rows(folder, ROWS[:-4])),
        ({}, rows(folder).remove_columns("instance_token_type_ids")),
    ]
    for count, (options, data) in enumerate(variants, 1):
        found_by(cache(folder, **options), data)
        assert len(files(kept)) == count
    found_by(cache(folder), rows(folder, ROWS * 2))  # the same texts
    assert len(files(kept)) == len(variants)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 700)


def of_other_texts(path: Path) -> None:
    fewer = Dataset.from_dict({"instance": [[0.0]]})
    fewer.save_to_disk(path.parent / "other")
    (written,) = (path.parent / "other").glob("*.arrow")
    written.replace(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": cut,
    "overwritten": lambda path: path.write_bytes(b"\xff" * 300 + path.read_bytes()[300:]),
    "of other texts": of_other_texts,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_rebuilt_and_said(
    tiny: Tiny, kept: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    data, made = rows(tiny("bert_base")), cache(tiny("bert_base"), calls)
    wanted = found_by(made, data)
    (path,) = files(kept)
    DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(found_by(made, data, "the train set"), wanted)
    assert calls == [len(TEXTS)] * 2
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lopa_lightning")]
    assert said == [f"instance vectors of the train set are rebuilt: {path} is damaged"]
    found_by(made, data)
    assert calls == [len(TEXTS)] * 2


def test_what_a_killed_process_left_is_cleared(tiny: Tiny, kept: Path) -> None:
    data, made = rows(tiny("bert_base")), cache(tiny("bert_base"))
    found_by(made, data)
    (path,) = files(kept)
    (path.parent / "tmpabcd").write_bytes(b"half")
    path.unlink()
    found_by(made, data)
    assert {file.name for file in path.parent.iterdir()} <= {"vectors.arrow", "vectors.lock"}
    assert path.is_file()


def test_an_encoder_that_fails_leaves_no_file(tiny: Tiny, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopa_lightning.data.instance_vectors._ROWS", 3)
    made, calls = cache(tiny("bert_base")), []

    def fail_late(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    made.encoder.register_forward_hook(fail_late)
    with pytest.raises(RuntimeError, match="out of memory"):
        found_by(made, rows(tiny("bert_base")))
    assert {path.name for path in kept.rglob("*") if path.is_file()} <= {"encoder.json", "vectors.lock"}


def test_a_place_that_cannot_be_written_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "taken")
    with pytest.raises(LoPAError, match=r"instance vectors of the val set cannot be kept at .*cache: false"):
        found_by(cache(tiny("bert_base")), rows(tiny("bert_base")), "the val set")


def make_in_process(folder: str, place: str, go: Any, results: Any) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(place)
    torch.set_num_threads(1)
    calls: list[int] = []
    made = cache(folder, calls)
    data = rows(folder)
    go.wait()
    found = found_by(made, data)
    results.put((sum(calls), found.tobytes()))


def test_of_processes_at_the_same_time_one_makes_them(tiny: Tiny, kept: Path) -> None:
    context = multiprocessing.get_context("fork")
    go, results = context.Barrier(3), context.Queue()
    arguments = (tiny("bert_base"), str(kept), go, results)
    processes = [context.Process(target=make_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in found) == [0, 0, len(TEXTS)]
    assert len({values for _, values in found}) == 1
    assert len(files(kept)) == 1


def test_workers_are_sent_a_path_and_no_vectors(tiny: Tiny, kept: Path) -> None:
    data, made = rows(tiny("bert_base"), TEXTS * 50), cache(tiny("bert_base"))
    wanted = found_by(made, data)
    vectors = stored_vectors(made, data, "x", CPU, Collate(0))
    sent = pickle.dumps(vectors)
    assert len(sent) < 16 * len(data) + 3000 < wanted.nbytes / 4
    np.testing.assert_array_equal(np.stack(pickle.loads(sent).at([399, 0]).to_numpy()), wanted[[399, 0]])


def test_a_row_has_its_vector_in_place_of_the_encoder_tokens(tiny: Tiny, kept: Path) -> None:
    data, made = rows(tiny("bert_base")), cache(tiny("bert_base"))
    wanted = torch.from_numpy(found_by(made, data))
    several = Rows(data.add_column("input_ids", [[1]] * len(ROWS)), stored_vectors(made, data, "x", CPU, Collate(0)))
    assert len(several) == len(ROWS)
    batch = Collate(pad_id=0)(several.__getitems__([2, 9, 2]))
    assert set(batch) == {"input_ids", "attention_mask", "index", "instance"}
    assert batch["index"].tolist() == [2, 9, 2]
    assert torch.equal(batch["instance"], wanted[[2, 9, 2]])


@pytest.mark.parametrize(
    ("limits", "share"),
    [
        ({}, 1),
        ({"max_epochs": 3}, 3),
        ({"limit": 25}, 0.5),  # batches of 2 on each of 2 processes, of 200 rows
        ({"limit": 25, "max_epochs": 3}, 1.5),
        ({"limit": 60, "max_epochs": 3}, 3),  # there are no more than 50
        ({"limit": 0.5}, 0.5),
        ({"limit": 0.5, "max_epochs": 2}, 1),
        ({"limit": 0, "max_epochs": -1}, 0),
        ({"max_epochs": None}, math.inf),
        ({"max_epochs": -1, "max_steps": 49}, 0.98),
        ({"max_epochs": -1, "max_steps": 25, "accumulate_grad_batches": 2}, 1),
    ],
)
def test_a_run_reads_all_rows_if_its_epochs_together_do(limits: dict[str, Any], share: float) -> None:
    options = {"limit": 1.0, "max_epochs": 1, "max_steps": -1, "accumulate_grad_batches": 1, **limits}
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer: Any = SimpleNamespace(state=state, world_size=2, limit_train_batches=options.pop("limit"), **options)
    assert reads_all(trainer, "train", batch_size=2, rows=200) == (share >= 1)


@pytest.mark.parametrize(("role", "stage"), [("val", "validate"), ("test", "test"), ("predict", "predict")])
def test_rows_that_are_not_trained_on_are_read_once(role: str, stage: str) -> None:
    for limit, wanted in ((1.0, True), (0.9, False), (2, False), (3, True)):
        options = {f"limit_{role}_batches": limit, "state": SimpleNamespace(fn=TrainerFn(stage))}
        trainer: Any = SimpleNamespace(world_size=1, max_epochs=9, **options)
        assert reads_all(trainer, role, batch_size=2, rows=5) == wanted
