"""Instance vectors on the disk: what they are, when they are made, and when again."""

from __future__ import annotations

import functools
import json
import logging
import multiprocessing
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from lopa_lightning import checkpoint as ckpt
from lopa_lightning.backbones.pretrained import PretrainedSpec, load_model
from lopa_lightning.errors import LoPAError
from lopa_lightning.instances.encoder import InstanceEncoder, InstanceEncoderSpec
from lopa_lightning.instances.vectors import StoredVectors, VectorCache
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


def files(folder: Path, ending: str = "npy") -> set[Path]:
    return set(folder.rglob(f"*.{ending}"))


def one_by_one(folder: str, pooling: str, texts: list[str] = ROWS) -> np.ndarray:
    """Plain transformers, a text at a time."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append({"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.amax(0)}[pooling])
    return torch.stack(vectors).numpy()


@pytest.mark.parametrize("kind", ["bert_base", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_each_row_has_the_vector_of_its_text_alone(tiny: Tiny, kept: Path, kind: str, pooling: str) -> None:
    stored = cache(tiny(kind), pooling=pooling).stored(rows(tiny(kind)), "x", CPU)
    found = stored.at(range(len(ROWS)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, one_by_one(tiny(kind), pooling), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(np.load(*files(kept)), found)  # any reader of .npy reads them
    np.testing.assert_array_equal(stored.at([3, 0]), found[[3, 0]])


def test_the_two_texts_of_a_pair_are_told_apart(tiny: Tiny, kept: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("bert_base"))
    encoded = tokenizer(TEXTS, TEXTS[::-1])
    data = Dataset.from_dict({f"instance_{name}": encoded[name] for name in ("token_type_ids", "input_ids")})
    found = cache(tiny("bert_base")).stored(data, "x", CPU).at(range(len(TEXTS)))
    model = AutoModel.from_pretrained(tiny("bert_base")).eval()
    for row, pair in enumerate(zip(TEXTS, TEXTS[::-1])):
        with torch.no_grad():
            hidden = model(**tokenizer(*pair, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(found[row], hidden.mean(0), rtol=0, atol=2e-6)


def test_an_encoder_in_bfloat16_gives_its_own_numbers_in_float32(tiny: Tiny, kept: Path) -> None:
    folder = tiny("bert_base")
    source = PretrainedSpec(folder, dtype="bfloat16")
    spec = InstanceEncoderSpec(folder, "cls", normalize=False, dtype="bfloat16")
    encoder = InstanceEncoder(functools.partial(load_model, source, "encoder"), spec, TEXT)
    stored = VectorCache(source, encoder, ckpt.fingerprint).stored(rows(folder), "x", CPU)
    model, tokenizer = load_model(source, "encoder"), AutoTokenizer.from_pretrained(folder)
    alone = tokenizer(max(TEXTS, key=lambda text: len(tokenizer(text)["input_ids"])), return_tensors="pt")
    with torch.no_grad():
        wanted = model(**alone).last_hidden_state[0, 0]
    found = stored.at([max(range(len(TEXTS)), key=lambda row: len(tokenizer(TEXTS[row])["input_ids"]))])
    assert wanted.dtype == torch.bfloat16
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], torch.from_numpy(found[0]).bfloat16().float())
    np.testing.assert_allclose(found[0], wanted.float(), rtol=0.02, atol=0.02)
    cache(folder, pooling="cls").stored(rows(folder), "x", CPU)
    assert len(files(kept)) == 2


def test_batches_are_of_like_length_and_hold_each_text_once(
    tiny: Tiny, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopa_lightning.instances.vectors._TOKENS", 24)
    shapes, made = [], cache(tiny("bert_base"))
    made.encoder.register_forward_hook(
        lambda module, args, result: shapes.append(
            (tuple(args[0]["instance_input_ids"].shape), args[0]["instance_attention_mask"])
        )
    )
    texts = ["it was good", *TEXTS, "it was good", "Yes , it was"] * 3
    lengths = sorted(map(len, AutoTokenizer.from_pretrained(tiny("bert_base"))(sorted(set(texts)))["input_ids"]))
    found = made.stored(rows(tiny("bert_base"), texts), "x", CPU)
    assert sorted(int(n) for _, mask in shapes for n in mask.sum(1)) == lengths
    assert [width for (_, width), _ in shapes] == sorted((width for (_, width), _ in shapes), reverse=True)
    assert all(count * width <= 24 or count == 1 for (count, width), _ in shapes)
    np.testing.assert_allclose(found.at(range(33)), one_by_one(tiny("bert_base"), "mean", texts), rtol=0, atol=2e-6)


def test_the_second_time_no_weight_is_read(tiny: Tiny, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    data, first = rows(tiny("bert_base")), cache(tiny("bert_base"), calls)
    wanted, facts = first.stored(data, "x", CPU).at(range(len(ROWS))), first.facts()
    assert calls == [len(TEXTS)]
    assert not first.encoder._unregistered
    assert facts == ckpt.fingerprint(load_model(PretrainedSpec(tiny("bert_base")), "encoder"))

    def fail(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tests.instances.test_vectors.load_model", fail)
    again = cache(tiny("bert_base"))
    np.testing.assert_array_equal(again.stored(data, "x", CPU).at(range(len(ROWS))), wanted)
    assert again.facts() == facts
    # In another order of columns, from another source, with other columns beside: the tokens alone count.
    other = Dataset.from_list([{"labels": 0, **row} for row in data]).select(range(len(ROWS)))
    np.testing.assert_array_equal(again.stored(other, "y", CPU).at(range(len(ROWS))), wanted)
    assert len(files(kept)) == 1


def test_vectors_that_are_not_there_are_not_made_where_none_are_wanted(tiny: Tiny, kept: Path) -> None:
    data, made = rows(tiny("bert_base")), cache(tiny("bert_base"))
    assert made.stored(data, "x", CPU, make=False) is None
    assert not files(kept)
    wanted = made.stored(data, "x", CPU)
    assert made.stored(data, "x", CPU, make=False).path == wanted.path


def test_whatever_a_vector_depends_on_makes_another_file(tiny: Tiny, kept: Path, tmp_path: Path) -> None:
    folder = save_tiny("bert_base", tmp_path / "encoder")
    variants: list[tuple[dict[str, Any], Dataset]] = [
        ({}, rows(folder)),
        ({"pooling": "max"}, rows(folder)),
        ({"normalize": True}, rows(folder)),
        ({}, rows(folder, max_length=4)),
        ({}, rows(folder, ROWS[::-1])),
        ({}, rows(folder, [*ROWS[:-1], "a terrible story , badly"])),
        ({}, rows(folder, ROWS[:-1])),
    ]
    for count, (options, data) in enumerate(variants, 1):
        cache(folder, **options).stored(data, "x", CPU)
        assert len(files(kept)) == count
    stored = {name: np.load(path) for name, path in enumerate(sorted(files(kept)))}
    assert len({values.tobytes() for values in stored.values()}) == len(variants)


def test_other_weights_in_the_same_folder_make_other_vectors(tiny: Tiny, kept: Path, tmp_path: Path) -> None:
    folder = save_tiny("bert_base", tmp_path / "encoder")
    data, weights = rows(folder), Path(folder, "model.safetensors")
    before = cache(folder).stored(data, "x", CPU).at(range(len(ROWS)))
    stat, tensors = weights.stat(), load_file(weights)
    name = "encoder.layer.1.output.LayerNorm.bias"
    tensors[name][7] += 1.0  # one number of one tensor, the size as before
    save_file(tensors, weights, {"format": "pt"})
    assert weights.stat().st_size == stat.st_size
    after = cache(folder).stored(data, "x", CPU).at(range(len(ROWS)))
    np.testing.assert_allclose(after, one_by_one(folder, "mean"), rtol=0, atol=2e-6)
    assert np.abs(after - before).max() > 0.5
    # All weights others, and a clock that does not tell: as files of container images are.
    os.utime(weights, ns=(0, 0))
    cache(folder).stored(data, "x", CPU)
    save_file({name: value * 1.01 for name, value in tensors.items()}, weights, {"format": "pt"})
    os.utime(weights, ns=(0, 0))
    scaled = cache(folder).stored(data, "x", CPU).at(range(len(ROWS)))
    np.testing.assert_allclose(scaled, one_by_one(folder, "mean"), rtol=0, atol=2e-6)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)


def other_shape(path: Path) -> None:
    values = np.load(path)
    np.save(path, values[:-1])
    record = json.loads(path.with_suffix(".json").read_text())
    stat = path.stat()
    path.with_suffix(".json").write_text(json.dumps({**record, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}))


DAMAGES = {
    "cut": (cut, "bytes, not"),
    "overwritten": (overwrite, "has other content than was written"),
    "of other rows": (other_shape, r"has the shape \(10, 32\), for 11 rows"),
    "no record": (lambda path: path.with_suffix(".json").unlink(), "has no record"),
    "a broken record": (lambda path: path.with_suffix(".json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew_and_said(
    tiny: Tiny, kept: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    data, made = rows(tiny("bert_base")), cache(tiny("bert_base"), calls)
    wanted = made.stored(data, "x", CPU).at(range(len(ROWS)))
    (path,) = files(kept)
    do, said = DAMAGES[damage]
    do(path)
    with caplog.at_level(logging.WARNING):
        found = made.stored(data, "the train set", CPU)
    np.testing.assert_array_equal(found.at(range(len(ROWS))), wanted)
    assert calls == [len(TEXTS)] * 2
    (record,) = caplog.records
    assert record.getMessage().startswith(f"instance vectors of the train set are rebuilt: {path} ")
    assert re.search(said, record.getMessage())
    made.stored(data, "x", CPU)
    assert calls == [len(TEXTS)] * 2


def test_a_file_with_another_time_and_the_same_content_is_used(tiny: Tiny, kept: Path) -> None:
    calls: list[int] = []
    data, made = rows(tiny("bert_base")), cache(tiny("bert_base"), calls)
    made.stored(data, "x", CPU)
    (path,) = files(kept)
    os.utime(path, (1, 1))
    made.stored(data, "x", CPU)
    assert calls == [len(TEXTS)]
    assert json.loads(path.with_suffix(".json").read_text())["mtime_ns"] == 10**9


def test_what_a_killed_process_left_is_cleared(tiny: Tiny, kept: Path) -> None:
    data, made = rows(tiny("bert_base")), cache(tiny("bert_base"))
    (path,) = {made.stored(data, "x", CPU).path}
    left = path.with_name(f".{path.name}.abcd")
    left.write_bytes(b"half")
    path.unlink()
    made.stored(data, "x", CPU)
    assert path.is_file()
    assert not left.exists()


def test_a_place_that_cannot_be_written_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "taken")
    with pytest.raises(LoPAError, match=r"instance vectors of the val set cannot be kept at .*cache: false"):
        cache(tiny("bert_base")).stored(rows(tiny("bert_base")), "the val set", CPU)


def make_in_process(folder: str, place: str, go: Any, results: Any) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(place)
    torch.set_num_threads(1)
    calls: list[int] = []
    made = cache(folder, calls)
    data = rows(folder)
    go.wait()
    found = made.stored(data, "x", CPU)
    results.put((sum(calls), found.at(range(len(ROWS))).tobytes()))


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


def test_workers_are_sent_a_path_and_no_vectors(tmp_path: Path) -> None:
    values = np.arange(200_000, dtype=np.float32).reshape(1000, 200)
    np.save(tmp_path / "x.npy", values)
    sent = pickle.dumps(StoredVectors(tmp_path / "x.npy"))
    assert len(sent) < 500
    received = pickle.loads(sent)
    assert len(received) == 1000
    np.testing.assert_array_equal(received.at([999, 0]), values[[999, 0]])
