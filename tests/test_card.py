"""Cards of initialisations: the numbers of results.json, the facts of the file, and nothing where neither says it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from metaseg.card import card, read_results, write_card
from metaseg.initialisation import About, save_initialisation

UPDATE = {"_target_": "metaseg.update.Update", "lr": 0.1, "steps": 30, "batchnorm": "support"}
ABOUT = About(
    model={"_target_": "metaseg.models.EfficientLab", "backbone": "tf_efficientnet_lite0", "weights": "imagenet"},
    algo="reptile",
    dataset="emoji",
    splits_sha256="5" * 64,
    seed=3,
    meta_steps=60,
    update=UPDATE,
    seen={"train": ["emoji/a", "emoji/b"], "val": ["emoji/c"]},
    image_size=64,
)


def part(iou: float, tasks: int = 40) -> dict[str, Any]:
    numbers = {"iou_before_adaptation": iou - 0.2, "miou_class": iou + 0.01, "fb_iou": iou + 0.1}
    return {"tasks": tasks, "iou": {"mean": iou, "ci95": [iou - 0.04, iou + 0.03]}, **numbers}


RESULTS: dict[str, Any] = {
    "algo": "reptile",
    "dataset": "emoji",
    "seed": 3,
    "meta_steps": 60,
    "update": UPDATE,
    "shots": 5,
    "batchnorm": "support",
    "git_commit": "c0ffee",
    "val_iou_by_lr": {"0.1": 0.5},
    "episodes": {"queries": 7, "draws": 2, "image_size": 64},
    "train": None,
    "val": part(0.525, 8),
    "test": part(0.6048282094291849),
}


def front_matter(text: str) -> Any:
    empty, front, _ = text.split("---\n", 2)
    assert not empty
    return OmegaConf.to_container(OmegaConf.create(front))


def test_the_numbers_are_those_of_the_results() -> None:
    text = card(ABOUT, RESULTS)
    assert "| test | 40 | 60.5 | [56.5, 63.5] | 40.5 | 61.5 | 70.5 |" in text
    assert "| val | 8 | 52.5 | [48.5, 55.5] | 32.5 | 53.5 | 62.5 |" in text
    assert "| train |" not in text
    assert "On emoji at 64²: 5 support and 7 query images an episode, 2 a task, batch norm `support`" in text
    assert "IoU is 40.5 % before and 60.5 % after it, with 5 shots" in text
    assert "Choices were made on the val tasks" in text


def test_the_front_matter_is_hugging_faces() -> None:
    front = front_matter(card(ABOUT, RESULTS))
    assert (front["pipeline_tag"], front["tags"][-1]) == ("image-segmentation", "reptile")
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "emoji", "type": "emoji", "split": "test"}
    assert result["metrics"][0]["value"] == RESULTS["test"]["iou"]["mean"]
    assert "model-index" not in front_matter(card(ABOUT, None))
    assert "model-index" not in front_matter(card(ABOUT, {**RESULTS, "test": None}))


def test_the_facts_are_those_of_the_file() -> None:
    text = card(ABOUT, RESULTS)
    for fact in (
        "# reptile on emoji: an initialisation",
        "| network | EfficientLab: `backbone=tf_efficientnet_lite0` |",
        "| weights before | imagenet |",
        "| algorithm | reptile, 60 meta-steps, seed 3 |",
        "| meta-trained on | emoji (2 train classes, 1 val classes) |",
        f"| splits' SHA-256 | `{'5' * 64}` |",
        "| image size | 64² pixels |",
        "| commit | `c0ffee` |",
    ):
        assert fact in text
    omega = text.split("```yaml\n")[1].split("```")[0]
    assert OmegaConf.to_container(OmegaConf.create(omega)) == UPDATE


def test_the_licences_are_of_what_it_was_made_from() -> None:
    assert "OpenMoji (https://openmoji.org, CC BY-SA 4.0)" in card(ABOUT, None)
    assert "ImageNet weights of tf_efficientnet_lite0" in card(ABOUT, None)
    mine = card(replace(ABOUT, dataset="folder", model={**ABOUT.model, "weights": None}), None)
    assert "The licence of folder's images is not known to metaseg" in mine
    assert "CC BY" not in mine
    assert "ImageNet" not in mine


def test_an_untrained_initialisation_has_learned_from_nothing() -> None:
    text = card(replace(ABOUT, algo="finetune", meta_steps=0), {**RESULTS, "meta_steps": 0})
    assert "meta-trained on" not in text
    assert "θ learned from" not in text
    assert "OpenMoji" not in text
    assert "Choices were made" not in text


def test_a_search_and_a_transductive_policy_are_said() -> None:
    batch = {**UPDATE, "batchnorm": "batch"}
    text = card(replace(ABOUT, update=batch), {**RESULTS, "update": batch, "uho": {"trials": 40, "val_iou": 0.6666}})
    assert "ω is the best of 40 trials on val tasks; its IoU there, 66.7, flatters." in text
    assert "(transductive)" in text


def test_an_adapted_network_has_no_numbers_of_its_own() -> None:
    text = card(replace(ABOUT, shots=5), None)
    assert "# A segmentation network adapted from 5 labelled images" in text
    assert "Adapt it before use" not in text


@pytest.mark.parametrize("weights", ["/home/somebody/secret/init.safetensors", None])
def test_folders_of_this_machine_are_not_told(weights: str | None) -> None:
    text = card(replace(ABOUT, model={**ABOUT.model, "weights": weights}), RESULTS)
    assert "secret" not in text
    assert f"| weights before | {'random' if weights is None else 'init.safetensors'} |" in text


@pytest.fixture
def init(tmp_path: Path) -> Path:
    save_initialisation(torch.nn.Linear(1, 1), ABOUT, tmp_path / "init.safetensors")
    return tmp_path / "init.safetensors"


def test_it_lies_beside_the_initialisation(init: Path) -> None:
    (init.parent / "results.json").write_text(json.dumps(RESULTS))
    path = write_card(init)
    assert path == init.parent / "card.md"
    assert path.read_text() == card(ABOUT, RESULTS)
    assert write_card(init, init.parent / "model.md").read_text() == card(ABOUT, RESULTS)


@pytest.mark.parametrize(
    "change", [{"algo": "fomaml"}, {"seed": 4}, {"meta_steps": 61}, {"update": {**UPDATE, "lr": 1.0}}]
)
def test_results_of_another_run_are_not_its_numbers(init: Path, change: dict[str, Any]) -> None:
    (init.parent / "results.json").write_text(json.dumps({**RESULTS, **change}))
    assert read_results(init) is None
    assert "None: no results.json of it lies beside it." in write_card(init).read_text()


def test_results_of_the_initialisation_are_not_the_adapted_networks(init: Path) -> None:
    (init.parent / "results.json").write_text(json.dumps(RESULTS))
    adapted = init.with_name("adapted.safetensors")
    save_initialisation(torch.nn.Linear(1, 1), replace(ABOUT, shots=5), adapted)
    assert read_results(adapted) is None
    assert read_results(init) == RESULTS


def test_a_broken_results_file_is_none(init: Path) -> None:
    (init.parent / "results.json").write_text("{")
    assert read_results(init) is None


@pytest.mark.parametrize("mean", [10**400, "0.5", None, [0.5]], ids=["huge", "text", "null", "list"])
def test_results_with_a_number_that_is_none_are_not_its_numbers(init: Path, mean: Any) -> None:
    odd = {**RESULTS["test"], "iou": {**RESULTS["test"]["iou"], "mean": mean}}
    (init.parent / "results.json").write_text(json.dumps({**RESULTS, "test": odd}))
    assert "None: no results.json of it lies beside it." in write_card(init).read_text()
