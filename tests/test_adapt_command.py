"""`python -m metaseg.adapt`: what it leaves, what it leaves alone, and what it says."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from test_pictures import png_of_size
from test_practice import ABOUT, SIZE, labelled

import metaseg
from metaseg.adapt.__main__ import main, read_words
from metaseg.config import config_dir
from metaseg.export import main as export
from metaseg.ship import shipped_path

Command = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with `support/` of three labelled images and `query/` of two; brackets and commas in its name."""
    root = tmp_path / "Fotos (2024), neu"
    images, masks = labelled(5)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        folder = root / ("support" if i < 3 else "query")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.jpg")
        if i < 3:
            Image.fromarray(mask).save(folder / f"{i}.png")
    return root


@pytest.fixture
def command(theta: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command on `place` and gives what it printed; further words go before the usual ones of their key."""

    def run(*words: str, fails: bool = False) -> str:
        usual = {"init": theta, "support": place / "support", "query": place / "query", "out": place / "out"}
        given = {word.partition("=")[0] for word in words}
        monkeypatch.setattr(
            sys, "argv", ["", *(f"{k}={v}" for k, v in usual.items() if k not in given), "device=cpu", *words]
        )
        if fails:
            with pytest.raises(SystemExit) as left:
                main()
            assert left.value.code not in (0, None)
            return f"{capsys.readouterr().err}{left.value.code}"
        main()
        return capsys.readouterr().err

    return run


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def record(place: Path) -> dict:
    return json.loads((place / "out" / "adaptation.json").read_text())


# What it leaves


def test_it_leaves_masks_overlays_a_page_a_record_and_the_model(command: Command, place: Path, theta: Path) -> None:
    said = command()
    out = place / "out"
    assert files(out) == {
        *("adaptation.json", "adapted.safetensors", "card.md", "index.html"),
        *("masks/3.png", "masks/4.png", "overlays/3.jpg", "overlays/4.jpg"),
    }
    support = [Image.open(place / "support" / f"{i}.jpg") for i in range(3)]
    masks = [Image.open(place / "support" / f"{i}.png") for i in range(3)]
    adapted = metaseg.load(theta, device="cpu").adapt(support, masks)
    for name in ("3", "4"):
        expected = adapted.predict(Image.open(place / "query" / f"{name}.jpg"))
        mask = np.asarray(Image.open(out / "masks" / f"{name}.png"))
        np.testing.assert_array_equal(mask, 255 * expected)  # at the image's own size, 40×56
        assert mask.dtype == np.uint8
    assert metaseg.load(out / "adapted.safetensors", device="cpu").about == adapted.about

    found = record(place)
    assert found["support"] == ["0.jpg", "1.jpg", "2.jpg"]
    assert (found["steps"], found["support_loss"]) == (2, list(adapted.losses))
    assert (found["about"]["update"], found["about"]["image_size"]) == (ABOUT.update, SIZE)
    assert (found["faults"], found["leave_one_out"], found["held_out_iou"]) == ([], None, [])
    assert set(found["predicted"]) == {"3.jpg", "4.jpg"}
    assert set(found["files"]) == files(out)
    assert found["seconds"]["all"] >= found["seconds"]["adapting"] > 0
    assert "adapted to 3 labelled images at 32², 2 steps: support loss" in said
    assert "2 images predicted" in said


def test_probabilities_a_quality_estimate_and_flips_on_request(command: Command, place: Path) -> None:
    said = command("soft=true", "leave_one_out=true", "flips=true", "update.steps=1")
    model = metaseg.load(place / "out" / "adapted.safetensors", device="cpu")
    soft = np.asarray(Image.open(place / "out" / "probabilities" / "3.png"))
    expected = model.predict(Image.open(place / "query" / "3.jpg"), soft=True, flips=True)
    np.testing.assert_allclose(soft / 65535, expected, atol=1e-5)
    found = record(place)
    estimate = found["leave_one_out"]
    assert set(estimate["by_image"]) == {"0.jpg", "1.jpg", "2.jpg"}
    assert estimate["iou"] == pytest.approx(np.mean(list(estimate["by_image"].values())))
    assert f"IoU to expect: {100 * estimate['iou']:.1f} %" in said
    assert found["about"]["update"] == {**ABOUT.update, "steps": 1}
    assert found["command"]["update"] == {"steps": 1}


def test_large_images_in_tiles(command: Command, place: Path) -> None:
    image, mask = np.zeros((3 * SIZE, 4 * SIZE, 3), np.uint8), np.zeros((3 * SIZE, 4 * SIZE), np.uint8)
    image[5:9, 5:9], mask[5:9, 5:9] = 255, 1  # one window with it, one without
    Image.fromarray(image).save(place / "support" / "large.jpg")
    Image.fromarray(mask).save(place / "support" / "large.png")
    command("tile=true", "leave_one_out=true", "update.steps=1")
    model = metaseg.load(place / "out" / "adapted.safetensors", device="cpu")
    expected = model.predict(Image.open(place / "query" / "3.jpg"), tile=True)
    np.testing.assert_array_equal(np.asarray(Image.open(place / "out" / "masks" / "3.png")) // 255, expected)
    assert model.about.shots == 4
    command("support=null", f"init={place / 'out' / 'adapted.safetensors'}", f"out={place / 'more'}")  # in tiles again
    assert (place / "more" / "masks" / "3.png").read_bytes() == (place / "out" / "masks" / "3.png").read_bytes()
    command(f"init={place / 'out' / 'adapted.safetensors'}", f"out={place / 'again'}", "update.steps=1")
    assert metaseg.load(place / "again" / "adapted.safetensors", device="cpu").about.tile
    with pytest.raises(SystemExit, match="predicts in tiles, which the graph would not"):
        export([str(place / "out" / "adapted.safetensors"), str(place / "model.pt")])


def test_the_page_needs_only_its_folder_and_shows_names_as_text(command: Command, place: Path) -> None:
    name = '<b>"a#1" & 100%?.jpg'
    (place / "query" / "3.jpg").rename(place / "query" / name)
    command()
    page = (place / "out" / "index.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&quot;a#1&quot; &amp; 100%?.jpg" in page
    for link in re.findall(r'(?:src|href)="([^"]*)"', page):
        parts = urlparse(link)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
        assert (place / "out" / unquote(parts.path)).is_file()


def test_images_of_one_stem_have_a_mask_each(command: Command, place: Path) -> None:
    images = place / "query" / "apart" / "images"
    images.mkdir(parents=True)
    names = ("a.jpg", "a.png", "a.webp", "a.jpg.png")  # the last is what the first's mask will be called
    for name in names:
        Image.open(place / "query" / "3.jpg").save(images / name)
    command(f"query={images.parent}")
    assert {name for name in files(place / "out") if "masks" in name} == {f"masks/{name}.png" for name in names}


def test_an_adapted_model_predicts_without_a_support(command: Command, place: Path, theta: Path) -> None:
    command()
    command(f"init={place / 'out' / 'adapted.safetensors'}", "support=", f"out={place / 'more'}")
    for name in ("3.png", "4.png"):
        assert (place / "more" / "masks" / name).read_bytes() == (place / "out" / "masks" / name).read_bytes()
    assert "adapted.safetensors" not in files(place / "more")
    said = command("support=", fails=True)
    assert "init.safetensors is not adapted to anything yet: give support=DIR of labelled images" in said


def test_one_labelled_image_is_enough_but_for_the_estimate(command: Command, place: Path) -> None:
    for i in (1, 2):
        (place / "support" / f"{i}.png").unlink()
    assert "no estimate, for it needs two labelled images" in command("leave_one_out=true")
    assert (record(place)["support"], record(place)["leave_one_out"]) == (["0.jpg"], None)


def test_without_a_query_it_only_adapts(command: Command, place: Path) -> None:
    command("query=")
    assert files(place / "out") == {"adaptation.json", "adapted.safetensors", "card.md", "index.html"}
    assert "adapted from 3 labelled images" in (place / "out" / "card.md").read_text()


def test_one_folder_with_a_few_masks_gives_masks_for_the_rest(command: Command, place: Path) -> None:
    for path in (place / "query").iterdir():
        path.rename(place / "support" / path.name)
    said = command(f"query={place / 'support'}")
    assert set(record(place)["predicted"]) == {"3.jpg", "4.jpg"}
    assert record(place)["faults"] == []
    assert "left out" not in said


def test_ten_images_and_more_have_a_held_out_curve(command: Command, place: Path) -> None:
    for i, (image, mask) in enumerate(zip(*labelled(10), strict=True)):
        Image.fromarray(image).save(place / "support" / f"{i}.jpg")
        Image.fromarray(mask).save(place / "support" / f"{i}.png")
    said = command("update=sgd_early_stopping", "update.steps=4", "update.stopping.every=2", "update.batch_size=2")
    assert [step for step, _ in record(place)["held_out_iou"]] == [2, 4]
    assert record(place)["about"]["update"]["stopping"]["patience"] == 50
    assert "steps chosen on a held-out share of them: IoU" in said


# What it leaves alone


def test_again_into_the_same_folder_replaces_its_own_files_alone(command: Command, place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    command()
    before = (place / "out" / "adapted.safetensors").read_bytes()
    (place / "query" / "3.jpg").unlink()
    command("update.lr=0.2")
    assert (place / "out" / "notes.txt").read_text() == "mine"
    assert (place / "out" / "adapted.safetensors").read_bytes() != before
    assert "masks/3.png" not in files(place / "out")  # it would pass for this run's
    assert set(record(place)["predicted"]) == {"4.jpg"}


def test_a_run_that_was_interrupted_is_run_again(
    command: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("metaseg.adapt.output.overlay", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command()
    assert "masks/3.png" in files(place / "out")
    command()
    assert set(record(place)["predicted"]) == {"3.jpg", "4.jpg"}


@pytest.mark.parametrize("name", ["masks/3.png", "index.html", "adaptation.json", "overlays/4.jpg"])
def test_a_file_of_somebody_elses_is_never_overwritten(command: Command, place: Path, name: str) -> None:
    file = place / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert f"{name} is there and not from an earlier run of this command; choose a new folder" in command(fails=True)
    assert files(place / "out") == {name}
    assert file.read_text() == "{}"


# What it says


def test_every_broken_file_is_named_and_the_sound_ones_are_used(command: Command, place: Path) -> None:
    support, query = place / "support", place / "query"
    image, mask = (part[0] for part in labelled(1))
    (support / "text.jpg").write_text("no image")
    Image.fromarray(mask).save(support / "text.png")
    Image.fromarray(image).save(support / "bare.jpg")
    Image.fromarray(image).save(support / "broken.jpg")
    (support / "broken.png").write_text("no mask")
    for stem, wrong in {"empty": mask * 0, "turned": mask.T.copy()}.items():
        Image.fromarray(image).save(support / f"{stem}.jpg")
        Image.fromarray(wrong).save(support / f"{stem}.png")
    png_of_size(query / "huge.png", 10_000, 10_000)
    (query / "cut.jpg").write_bytes((query / "3.jpg").read_bytes()[:300])
    Image.fromarray(image).convert("CMYK").save(query / "cmyk.jpg")
    Image.fromarray(image).convert("RGBA").save(query / "alpha.png")
    Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(query / "sixteen.png")
    Image.fromarray(image).save(query / "3.png")

    said = command()
    found = record(place)
    assert found["support"] == ["0.jpg", "1.jpg", "2.jpg"]
    assert set(found["predicted"]) == {"3.jpg", "4.jpg", "cmyk.jpg", "alpha.png", "sixteen.png"}
    assert {(fault["in"], fault["path"], fault["kind"]) for fault in found["faults"]} == {
        ("support", "text.jpg", "unreadable file"),
        ("support", "broken.png", "unreadable file"),
        ("support", "bare.jpg", "image without a mask"),
        ("support", "empty.png", "mask without an object"),
        ("support", "turned.png", "mask of another size than its image"),
        ("query", "huge.png", "image of too many pixels"),
        ("query", "cut.jpg", "unreadable file"),
        ("query", "3.png", "taken for a mask"),
    }
    for fault in found["faults"]:
        assert fault["cure"] in said
        assert fault["path"] in said
    assert "mask 40×56, image 56×40" in said


def test_it_fails_only_if_nothing_can_be_done(command: Command, place: Path) -> None:
    for path in (place / "query").iterdir():
        path.write_text("no image")
    said = command()  # there is a model to show for it
    assert "none of the 2 images in query=" in said
    assert "2 × unreadable file (export it again" in said
    model = f"init={place / 'out' / 'adapted.safetensors'}"
    assert "none of the 2 images in query=" in command(model, "support=", f"out={place / 'more'}", fails=True)
    for path in (place / "support").glob("*.png"):
        Image.new("L", (56, 40)).save(path)
    said = command(fails=True)
    assert re.search(r"metaseg: nothing in support=.* can be used:\n3 × mask without an object \(draw", said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("suport=x",), "metaseg: there is no key 'suport'; did you mean support"),
        (("update.step=3",), "there is no key 'update.step'; did you mean update.steps"),
        (("update=sgdd",), "sgd_early_stopping"),
        (("+tiles=true",), "'+tiles=true' is no key=value: --help lists the keys"),
        (("photos",), "'photos' is no key=value: --help lists the keys"),
        (("--tile",), "'--tile' is no key=value"),
        (("tile=yes",), "tile=yes: give true or false"),
        (("seed=a",), "seed=a: give a whole number"),
        (("init=",), "no initialisation is given, and"),
        (("out=",), "out has no value: give out=PATH, a folder for the results"),
        (("support=", "query="), "nothing to do: give support=DIR to adapt, query=DIR to predict, or both"),
        (("init=nowhere",), "nowhere: there is no such file; give the init.safetensors of a run"),
        (("support=nowhere",), "nowhere: there is no such folder"),
        (("query=nowhere",), "query=nowhere: there is no such file or folder"),
        (("update.lr=-1",), "update.lr=-1: give a number above 0"),
        (("update.lr=0",), "update.lr=0: give a number above 0"),
        (("update.lr=1e30",), "the adaptation diverged"),
        (("image_size=50",), "image_size=50: give a multiple of 16"),
        (("device=warp",), "device=warp cannot be used here"),
        (("device=meta",), "device=meta cannot be used here"),
    ],
)
def test_words_that_cannot_work_leave_nothing_behind(
    command: Command, place: Path, words: tuple[str, ...], said: str
) -> None:
    before = sorted(place.rglob("*"))
    assert said in command(*words, fails=True)
    assert sorted(place.rglob("*")) == before


def test_a_query_without_images(command: Command, place: Path) -> None:
    (place / "none").mkdir()
    assert "none holds no images: give a folder of JPEG" in command(f"query={place / 'none'}", fails=True)


@pytest.mark.parametrize("out", ["support", "query", "support/masks", "query/images"])
def test_predictions_never_come_among_the_users_own_files(command: Command, place: Path, out: str) -> None:
    before = files(place)
    assert "holds images or masks of yours" in command(f"out={place / out}", fails=True)
    assert files(place) == before


def test_an_earlier_runs_predictions_do_not_pass_for_this_ones(command: Command, place: Path) -> None:
    command("soft=true")
    record_of = json.loads((place / "out" / "adaptation.json").read_text())
    (place / "own.txt").write_text("not ours to remove")
    record_of["files"] += ["../own.txt", "masks/../../own.txt", str(place / "own.txt")]
    (place / "out" / "adaptation.json").write_text(json.dumps(record_of))
    (place / "query" / "3.jpg").write_text("broken since")
    (place / "query" / "4.jpg").unlink()
    Image.new("RGB", (9, 9)).save(place / "query" / "5.png")
    command()
    left = {"masks/5.png", "overlays/5.jpg", "adaptation.json", "adapted.safetensors", "card.md", "index.html"}
    assert files(place / "out") == left
    assert (place / "own.txt").is_file()


def test_a_category_is_taken_as_it_is() -> None:
    for name in ("1", "true", "dog's (big)", "dog,cat"):
        assert read_words([f"category={name}", "init=i", "support=s", "out=o"]).config.category == name


def test_names_that_are_no_utf_8_and_results_that_cannot_be_written(command: Command, place: Path) -> None:
    odd = os.fsdecode(b"\xff.jpg")
    (place / "query" / "3.jpg").rename(place / "query" / odd)
    long = "x" * 250  # two of one stem become LONG.jpg.png, which is too long for a file
    for suffix in ("jpg", "bmp"):
        Image.new("RGB", (9, 9)).save(place / "query" / f"{long}.{suffix}")
    said = command()
    assert set(record(place)["predicted"]) == {odd, "4.jpg"}
    assert "2 × result not written (shorten the image's name" in said
    assert (place / "out" / "masks" / os.fsdecode(b"\xff.png")).is_file()
    assert "%FF.png" in (place / "out" / "index.html").read_text()


def test_all_images_labelled_already(command: Command, place: Path) -> None:
    assert "nothing to predict: all images in query=" in command(f"query={place / 'support'}")


def test_an_out_that_cannot_be_a_folder(command: Command, place: Path) -> None:
    (place / "file").write_text("")
    for out in ("file", "file/out", "long" * 99):
        assert re.search("out=.* cannot be made.*: choose another folder", command(f"out={place / out}", fails=True))


def test_help_lists_every_key_with_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["metaseg-adapt", "--help"])
    main()
    told = capsys.readouterr().out
    assert "python -m metaseg.adapt support=labelled query=photos out=masks" in told
    for key in OmegaConf.load(config_dir() / "adapt.yaml"):
        assert key == "defaults" or re.search(rf"^{key}: .* # \w+", told, re.MULTILINE)
    for key in OmegaConf.load(config_dir() / "update" / "sgd.yaml"):
        assert key == "_target_" or re.search(rf"^  {key}:", told, re.MULTILINE)


def test_without_init_it_starts_from_the_shipped_one(
    command: Command, theta: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METASEG_CACHE", str(tmp_path / "cache"))
    shipped_path().parent.mkdir(parents=True)
    shipped_path().write_bytes(theta.read_bytes())
    command("init=null")
    assert record(place)["command"]["init"] == str(shipped_path())
