"""A bundle of images answers as the checkpoint it was made of does, and makes prompts where a prompt is all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lopa_lightning import Bundle, LoPALightningModule, LoPAPrompter
from lopa_lightning.cli import main
from lopa_lightning.errors import LoPAError
from lopa_lightning.serving.export import export_bundle
from tests.serving.helpers import IMAGE_KINDS, image_checkpoint, image_home
from tests.tiny_images import LAYERS, WIDTH

Trained = Callable[[str], tuple[Any, Path, Bundle]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Trains a kind of module once; returns it, its checkpoint and its bundle. Models are named from this folder."""
    home, known = image_home(tmp_path_factory.mktemp("images")), {}

    def of(kind: str) -> tuple[Any, Path, Bundle]:
        if kind not in known:
            torch.manual_seed(0)
            model, path = image_checkpoint(kind, home)
            known[kind] = model, path, export_bundle(path)
        return known[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield of


def same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for row, other in zip(found, wanted, strict=True):
        assert row["label"] == other["label"]
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_it_answers_as_the_module_does(kind: str, trained: Trained, tmp_path: Path) -> None:
    model, _, exported = trained(kind)
    exported.save_pretrained(tmp_path / "bundle")
    bundle = Bundle.from_pretrained(tmp_path / "bundle")
    loaded, photos = bundle.module(), sorted(Path("images", "test").rglob("*.png"))
    same(loaded.predict(photos), model.predict(photos))
    assert (loaded.processing.resize, loaded.processing.crop) == (13, True)  # the view of training
    assert bundle.images.shape == (3, 48, 64, 3)
    assert [row["input"] for row in bundle.rows] == [{"image": 0}, {"image": 1}, {"image": 2}]
    assert bundle.rows[0]["probabilities"] != pytest.approx(bundle.rows[1]["probabilities"], abs=1e-3)
    same(loaded.predict(list(bundle.images.numpy())), bundle.rows)
    with pytest.raises(LoPAError, match=r"no inference server takes virtual tokens among an image's patches"):
        bundle.check_served()
    facts, layers = bundle.config.prompt, LAYERS if IMAGE_KINDS[kind].get("placement") else 1
    assert (facts.layers, facts.embedding_dim, facts.dtype) == (layers, layers * WIDTH, "float32")
    instance, own = torch.randn(2, WIDTH), bundle.prompt_encoder()
    assert torch.equal(own(instance), loaded.net.prompt_encoder(instance))


@pytest.mark.parametrize("kind", ["vpt shallow", "lopa", "lopa, same pixels"])
def test_prompts_are_the_modules_and_the_backbone_need_not_be_there(
    kind: str, trained: Trained, tmp_path: Path
) -> None:
    model, _, exported = trained(kind)
    exported.save_pretrained(tmp_path / "bundle")
    config = tmp_path / "bundle" / "config.json"
    config.write_text(config.read_text().replace('"name": "vit"', '"name": "no/such"'))
    prompter = LoPAPrompter.from_pretrained(tmp_path / "bundle")
    photos = [*prompter.bundle.images.numpy(), *sorted(Path("images", "test", "eel").iterdir())]
    with torch.no_grad():
        every = [batch for photo in photos for batch in model.image_batches([photo], 1)]
        wanted = torch.cat([model.net.soft_prompt(batch)[0] for batch in every])
    found = prompter(photos, batch_size=3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[:3], prompter.bundle.prompts, rtol=0, atol=1e-6)
    torch.testing.assert_close(prompter(photos[4]), wanted[4:5], rtol=0, atol=1e-6)
    assert ((found[0] - found[1]).abs().max() > 1e-3) == (kind != "vpt shallow")
    assert prompter([]).shape == (0, 3, WIDTH)
    with pytest.raises(LoPAError, match=r"^image 'none.png' cannot be read: No such file"):
        prompter("none.png")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("vpt deep", "placement every_layer is virtual tokens for each layer, and no soft prompt; load_from_"),
        ("lopa deep", "placement every_layer is virtual tokens for each layer, and no soft prompt"),
        ("lopa of the backbone", r"the instance encoder is the backbone 'vit' itself, .*\.name: facebook/dinov2-small"),
        ("linear probe", "the bundle has no soft prompt"),
    ],
)
def test_a_bundle_whose_prompt_is_not_all_is_refused_in_a_line(kind: str, message: str, trained: Trained) -> None:
    bundle = trained(kind)[2]
    assert bundle.prompts is None
    with pytest.raises(LoPAError, match=message):
        LoPAPrompter(bundle)


@pytest.mark.parametrize("kind", ["lopa", "lopa, same pixels"])
def test_an_encoder_with_another_image_processor_is_refused(kind: str, trained: Trained) -> None:
    bundle, name = trained(kind)[2], IMAGE_KINDS[kind]["reads"]["name"]
    settings = Path(name, "preprocessor_config.json")
    before = settings.read_text()
    settings.write_text(before.replace("0.25", "0.5"))
    try:
        with pytest.raises(LoPAError, match=f"of the instance encoder '{name}' is not .* std: the bundle has .* it "):
            LoPAPrompter(bundle)
    finally:
        settings.write_text(before)


@pytest.mark.slow
def test_the_commands_go_on_from_it(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model, path, bundle = trained("vpt deep")
    out = tmp_path / "bundle"
    main(["export", str(path), str(out), "--backbone", "me/vit"])
    assert any("the bundle is for module.predict, not for a server: " in str(each.message) for each in recwarn)
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "image-classification"
    for said in (
        f"3 virtual tokens of width {WIDTH} in each of {LAYERS} layers",
        '.predict(["photo.jpg"])',
        "for the labels cat, dog, eel",
        "Not by an inference server: placement every_layer",
    ):
        assert said in body, said
    assert "LoPAPrompter" not in body
    assert json.loads((out / "config.json").read_text())["module"]["init_args"]["backbone"]["name"] == "me/vit"
    with pytest.raises(SystemExit):
        main(["export", str(path), str(tmp_path / "none"), "--text", "a"])
    assert "--text goes with a model of texts, and this one reads images" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        main(["serve", "--upstream", "http://localhost:1", "--port", "0", "--bundle", f"x={out}"])
    assert "--bundle x: " in capsys.readouterr().err

    named = tmp_path / "named"
    bundle.save_pretrained(named)
    Path("images", "test", ".hidden.png").touch()
    Path("images", "test", "notes.csv").touch()
    photos = [str(each) for each in sorted(Path("images", "test").rglob("*/*.png"))]
    capsys.readouterr()
    for files in (["images/test"], photos, ["images/test/cat", "images/test/dog", "--file", "images/test/eel"]):
        main(["predict", "--ckpt_path", str(named), "--batch_size", "5", "--file", *files])
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["input"] for row in found] == photos
        same(found, model.predict(photos))
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(named), "--file", photos[0], str(out)])
    assert f"folder '{out}' has no image of the formats AVIF, " in capsys.readouterr().err
    assert isinstance(LoPALightningModule.load_from_checkpoint(named), type(model))
