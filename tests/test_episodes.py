"""Episodes: a pure function of (seed, split, task, draw), whoever draws them and in whatever order."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD

from metaseg.algos import Algorithm, Fomaml, FomamlStar, Joint, Reptile
from metaseg.data.episodes import (
    EvaluationEpisodes,
    From,
    TrainingEpisodes,
    check_counts,
    choose_tasks,
    episode_loader,
    sample_episode,
)
from metaseg.data.source import DataError, Split, UInt8
from metaseg.episode import Batch, Episode
from metaseg.update import Update

IMAGES, SIZE = 14, 16
SPLIT_TASKS: dict[str, list[str]] = {
    "train": ["ant", "bee", "cat"],
    "val": ["dog"],
    "test": ["eel", "fox", "gnu", "hen", "ibis", "jay"],
}
TASKS = [task for tasks in SPLIT_TASKS.values() for task in tasks]


class Fake:
    """Images of texture whose first channel is the number of their task, the second that of the image."""

    name, image_size = "fake", SIZE

    def __init__(self, splits: dict[str, list[str]] = SPLIT_TASKS, few: str = "") -> None:
        self.splits, self.few = splits, few

    def names(self, split: Split) -> list[str]:
        return self.splits[split]

    def count(self, task: str) -> int:
        return 9 if task == self.few else IMAGES

    def load(self, task: str, which: Sequence[int]) -> tuple[UInt8, UInt8]:
        images = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)[list(which)]
        images[..., 0] = TASKS.index(task)
        images[..., 1] = np.array(which)[:, None, None]
        return images, images[..., 2] // 128


def update(**changes: Any) -> Update:
    return Update(**{"optimizer": SGD, "lr": 0.1, "steps": 3, "augment": 0.5, **changes})


def episodes(**changes: Any) -> EvaluationEpisodes:
    options: dict[str, Any] = {"source": Fake(), "split": "test", "tasks": SPLIT_TASKS["test"], "update": update()}
    return EvaluationEpisodes(**{**options, "shots": 5, "queries": 4, "draws": 3, "seed": 0, **changes})


def numbers(batch: Batch) -> list[int]:
    """Which images of the task; only true without augmentation."""
    return batch.images[:, 1, 0, 0].tolist()


def bytes_of(*batches: Batch) -> bytes:
    return b"".join(part.contiguous().numpy().tobytes() for b in batches for part in (b.images, b.masks))


def drawn(episode: Episode) -> bytes:
    return bytes_of(episode.support, episode.query)


def everything(episode: Episode) -> tuple[str, int, bytes]:
    return episode.task, episode.seed, bytes_of(episode.support, episode.query, *episode.batches)


# Support and query


def test_support_and_query_are_distinct_images_of_the_task() -> None:
    for episode in episodes(draws=30):
        support, query = numbers(episode.support), numbers(episode.query)
        assert (len(support), len(query)) == (5, 4)
        assert len({*support, *query}) == 9
        shown = torch.cat([episode.support.images, episode.query.images])[:, 0]
        assert set(shown.flatten().tolist()) == {TASKS.index(episode.task)}


def test_every_image_may_be_drawn_for_either() -> None:
    """The original always trained on the first n records of a task."""
    all_ = list(episodes(draws=40))
    assert {n for episode in all_ for n in numbers(episode.support)} == set(range(IMAGES))
    assert {n for episode in all_ for n in numbers(episode.query)} == set(range(IMAGES))


def test_masks_stay_with_their_images() -> None:
    for episode in episodes():
        for batch in (episode.support, episode.query):
            assert torch.equal(batch.masks, batch.images[:, 2] // 128)


def test_all_images_of_a_task_can_be_used_at_once() -> None:
    (episode,) = episodes(tasks=["eel"], draws=1, shots=10, queries=4)
    assert sorted(numbers(episode.support) + numbers(episode.query)) == list(range(IMAGES))


def test_a_training_episode_needs_no_query() -> None:
    episode = sample_episode(Fake(), "ant", IMAGES, 0, 1, np.random.default_rng(0))
    assert (len(episode.support), len(episode.query), episode.seed) == (IMAGES, 0, 1)


# A pure function


def test_items_are_draws_of_all_tasks_in_turn() -> None:
    assert len(episodes()) == 18
    assert [episode.task for episode in (episodes()[i] for i in range(18))] == SPLIT_TASKS["test"] * 3


def test_episodes_do_not_depend_on_what_was_drawn_before() -> None:
    one, other = episodes(), episodes()
    forwards = [everything(one[i]) for i in range(len(one))]
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002  # the global state is what must not matter
    torch.manual_seed(5)
    backwards = [everything(other[i]) for i in reversed(range(len(other)))]
    assert forwards == backwards[::-1]


def test_an_episode_does_not_depend_on_the_other_tasks() -> None:
    few = episodes(tasks=["fox", "jay"])
    assert everything(few[0]) == everything(episodes()[1])
    assert everything(few[3]) == everything(episodes()[11])  # draw 1 of jay


def test_draws_seeds_splits_and_tasks_differ() -> None:
    def order(episode: Episode) -> tuple[int, ...]:
        return (*numbers(episode.support), *numbers(episode.query))

    first = episodes()
    found = [order(first[0]), order(first[1]), order(first[6]), order(first[12])]
    found += [order(episodes(seed=1)[0]), order(episodes(split="val")[0])]
    assert len(set(found)) == len(found)
    assert len({first[i].seed for i in range(18)}) == 18


def test_the_update_procedure_changes_only_the_minibatches() -> None:
    base = episodes()
    for changes in ({"augment": 0.0}, {"steps": 1}, {"batch_size": 3}, {"lr": 9.0}, {"adapts": "head"}):
        other = episodes(update=update(**changes))
        assert [drawn(other[i]) for i in range(18)] == [drawn(base[i]) for i in range(18)]
        assert [other[i].seed for i in range(18)] == [base[i].seed for i in range(18)]
    assert len(episodes(update=update(steps=7, batch_size=3))[0].batches) == 7


def test_minibatches_are_of_the_support_alone() -> None:
    for episode in episodes(update=update(augment=0.0)):
        for batch in episode.batches:
            assert set(numbers(batch)) <= set(numbers(episode.support))


# Loader workers


@pytest.fixture(scope="module")
def loaded() -> dict[int, list[Episode]]:
    """All episodes by number of worker processes, augmented, the same images in each draw of a task."""
    return {n: [e for few in episode_loader(episodes(), n, batch_size=2) for e in few] for n in (0, 2)}


def test_workers_draw_the_same_episodes_in_the_same_order(loaded: dict[int, list[Episode]]) -> None:
    expected = [everything(episode) for episode in (episodes()[i] for i in range(18))]
    assert [everything(episode) for episode in loaded[0]] == expected
    assert [everything(episode) for episode in loaded[2]] == expected


class Same(EvaluationEpisodes):
    """One support set in all episodes, so that only augmentation can make them differ."""

    def __getitem__(self, index: int) -> Episode:
        episode = super().__getitem__(index)
        images, masks = self.source.load("eel", [0])
        rng = np.random.default_rng([episode.seed, 1])
        return Episode("same", 0, episode.support, episode.query, self.update.minibatches(Batch.from_numpy(images, masks), rng))


def test_augmentation_differs_between_items_of_two_workers(loaded: dict[int, list[Episode]]) -> None:
    """Workers that share a random state would augment alike; each of these has one image, eight times, augmented."""
    options = {"update": update(augment=1.0, steps=1), "shots": 1, "queries": 1}
    one = [e for few in episode_loader(Same(**arguments(**options)), 2) for e in few]
    again = [e for few in episode_loader(Same(**arguments(**options)), 2) for e in few]
    assert len({bytes_of(*episode.batches) for episode in one}) == 18
    assert [bytes_of(*episode.batches) for episode in one] == [bytes_of(*episode.batches) for episode in again]
