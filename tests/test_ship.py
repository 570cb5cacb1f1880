"""The shipped initialisation: the best on validation is kept, and nothing sound is replaced by anything that is not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_card import ABOUT, RESULTS, part

import metaseg
from metaseg.errors import ConfigError, DataError, WeightsError
from metaseg.initialisation import read_about, save_initialisation
from metaseg.models import EfficientLab
from metaseg.ship import main, ship, shipped, shipped_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METASEG_CACHE", str(tmp_path / "cache"))


def run(folder: Path, seed: int, val_iou: float, **changed: Any) -> Path:
    """A finished run's folder, with a θ that says its seed."""
    folder.mkdir(parents=True)
    drawn = {"seed": 0, "queries": 7, "draws": 2, "image_size": 64}
    results = {
        **RESULTS,
        "seed": seed,
        "val": part(val_iou, 8),
        "splits_sha256": "5" * 64,
        "episodes": drawn,
        **changed,
    }
    (folder / "results.json").write_text(json.dumps(results))
    about = replace(ABOUT, seed=seed, meta_steps=results["meta_steps"])
    save_initialisation(torch.nn.Linear(1, 1), about, folder / "init.safetensors")
    return folder


def test_the_best_on_validation_is_kept_with_its_card(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", 1, 0.4), run(tmp_path / "b", 2, 0.6), run(tmp_path / "c", 3, 0.5)]
    untrained = run(tmp_path / "d", 4, 0.9, meta_steps=0)
    assert ship([untrained, *runs]) == runs[1]
    assert shipped() == shipped_path() == tmp_path / "cache" / "shipped" / "init.safetensors"
    assert read_about(shipped()).seed == 2
    card = shipped().with_name("card.md").read_text()
    assert "| val | 8 | 60.0 |" in card
    assert "Good for drawn objects" in card
    assert "Not tried on photographs" in card
    assert sorted(path.name for path in shipped().parent.iterdir()) == ["card.md", "init.safetensors"]


def test_load_takes_it_unless_told_another(tmp_path: Path) -> None:
    shipped_path().parent.mkdir(parents=True)
    model = {"_target_": "metaseg.models.EfficientLab", "backbone": "tf_efficientnet_lite0", "rsd": [16]}
    net = EfficientLab("tf_efficientnet_lite0", rsd=(16,))
    save_initialisation(net, replace(ABOUT, model=model), shipped_path())
    save_initialisation(net, replace(ABOUT, model=model, seed=8), tmp_path / "mine.safetensors")
    assert metaseg.load().about.seed == ABOUT.seed
    assert metaseg.load(tmp_path / "mine.safetensors").about.seed == 8


def test_without_one_the_message_says_how_to_get_one() -> None:
    with pytest.raises(WeightsError, match=r"`make demo` builds it; or give a run's init\.safetensors"):
        metaseg.load()


def test_what_cannot_be_shipped_leaves_the_old_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run(tmp_path / "a", 1, 0.4))])
    assert "is what people's own images start from now" in capsys.readouterr().out
    broken = run(tmp_path / "b", 2, 0.6)
    (broken / "init.safetensors").write_bytes(b"broken")
    elsewhere = run(tmp_path / "c", 3, 0.6, shots=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    for runs, error, said in [
        ([tmp_path / "other"], DataError, "holds no finished run"),
        ([broken], WeightsError, "is no initialisation that metaseg wrote"),
        ([tmp_path / "a", elsewhere], ConfigError, "validated on different episodes"),
        ([tmp_path / "a", tmp_path / "nowhere"], DataError, "holds no finished run"),
        ([run(tmp_path / "d", 4, 0.9, meta_steps=0)], ConfigError, "none of these runs has meta-trained"),
        ([run(tmp_path / "e", 5, 0.9, val=None)], ConfigError, "none of these runs has meta-trained"),
    ]:
        with pytest.raises(error, match=said):
            ship(runs)
    with pytest.raises(SystemExit, match="metaseg: .* holds no finished run"):
        main([str(tmp_path / "nowhere")])
    assert read_about(shipped()).seed == 1
