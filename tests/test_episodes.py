"""Episodes: a pure function of (seed, split, task, draw), whoever draws them and in whatever order."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD

from metaseg.algos import Algorithm, Fomaml, FomamlStar, Joint, Reptile
from metaseg.data.episodes import (
    EvaluationEpisodes,
    MetaBatches,
    TrainingEpisodes,
    check_counts,
    choose_tasks,
    episode_loader,
    sample_episode,
)
from metaseg.data.source import Split, UInt8
from metaseg.episode import Batch, Episode
from metaseg.errors import DataError
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


def items(of: EvaluationEpisodes) -> list[Episode]:
    return [of[i] for i in range(len(of))]


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
    for episode in items(episodes(draws=30)):
        support, query = numbers(episode.support), numbers(episode.query)
        assert (len(support), len(query)) == (5, 4)
        assert len({*support, *query}) == 9
        shown = torch.cat([episode.support.images, episode.query.images])[:, 0]
        assert set(shown.flatten().tolist()) == {TASKS.index(episode.task)}


def test_every_image_may_be_drawn_for_either() -> None:
    """The original always trained on the first n records of a task."""
    all_ = items(episodes(draws=40))
    assert {n for episode in all_ for n in numbers(episode.support)} == set(range(IMAGES))
    assert {n for episode in all_ for n in numbers(episode.query)} == set(range(IMAGES))


def test_more_shots_add_to_the_support_and_leave_the_query() -> None:
    for few, many in zip(items(episodes(shots=3)), items(episodes(shots=8)), strict=True):
        assert numbers(few.query) == numbers(many.query)
        assert numbers(few.support) == numbers(many.support)[:3]


def test_masks_stay_with_their_images() -> None:
    for episode in items(episodes()):
        for batch in (episode.support, episode.query):
            assert torch.equal(batch.masks, batch.images[:, 2] // 128)


def test_all_images_of_a_task_can_be_used_at_once() -> None:
    (episode,) = items(episodes(tasks=["eel"], draws=1, shots=10, queries=4))
    assert sorted(numbers(episode.support) + numbers(episode.query)) == list(range(IMAGES))


def test_a_training_episode_needs_no_query() -> None:
    episode = sample_episode(Fake(), "ant", IMAGES, 0, 1, np.random.default_rng(0))
    assert (len(episode.support), len(episode.query), episode.seed) == (IMAGES, 0, 1)


# A pure function


def test_items_are_draws_of_all_tasks_in_turn() -> None:
    assert len(episodes()) == 18
    assert [episode.task for episode in items(episodes())] == SPLIT_TASKS["test"] * 3


def test_episodes_do_not_depend_on_what_was_drawn_before() -> None:
    one, other = episodes(), episodes()
    forwards = [everything(episode) for episode in items(one)]
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
    for episode in items(episodes(update=update(augment=0.0))):
        for batch in episode.batches:
            assert set(numbers(batch)) <= set(numbers(episode.support))


# Loader workers


@pytest.fixture(scope="module")
def loaded() -> dict[int, list[Episode]]:
    """All episodes, by the number of worker processes."""
    return {workers: load(episodes(), workers) for workers in (0, 2)}


def load(data: Any, workers: int, **options: Any) -> list[Episode]:
    return [episode for few in episode_loader(data, workers, batch_size=2, **options) for episode in few]


def test_workers_draw_the_same_episodes_in_the_same_order(loaded: dict[int, list[Episode]]) -> None:
    expected = [everything(episode) for episode in items(episodes())]
    assert [everything(episode) for episode in loaded[0]] == expected
    assert [everything(episode) for episode in loaded[2]] == expected


class Alike(Fake):
    """All images are the same one, so that nothing but augmentation can make mini-batches differ."""

    def load(self, task: str, which: Sequence[int]) -> tuple[UInt8, UInt8]:
        return super().load("ant", [0] * len(which))


def test_augmentation_differs_across_workers_and_repeats_under_the_seed() -> None:
    """Workers with a random state of their own, copied from the parent, would augment alike."""
    draw = partial(Reptile(shots=5).episode, Alike(), update(augment=1.0, steps=1), 0)
    first, again = (load(TrainingEpisodes(draw, 12), 2) for _ in range(2))
    seen = [bytes_of(*episode.batches) for episode in first]
    assert len(set(seen)) == 12
    assert [bytes_of(*episode.batches) for episode in again] == seen
    other = partial(Reptile(shots=5).episode, Alike(), update(augment=1.0, steps=1), 1)
    assert not {bytes_of(*episode.batches) for episode in load(TrainingEpisodes(other, 12), 0)} & set(seen)


def test_a_resumed_run_goes_on_where_it_was() -> None:
    draw = partial(Reptile(shots=5).episode, Fake(), update(), 0)
    whole = load(TrainingEpisodes(draw, 12), 0)
    start = 0
    sampler = MetaBatches(lambda: start, 6, meta_batch=2, places=range(2))
    start = 4  # asked for when the iteration begins
    rest = load(TrainingEpisodes(draw, 12), 0, sampler=sampler)
    assert [everything(episode) for episode in rest] == [everything(episode) for episode in whole[8:]]


# Choice of tasks


def test_chosen_tasks_are_fixed_sorted_and_of_the_split() -> None:
    names = [f"class {i:03}" for i in range(200)]
    source = Fake({"train": names, "val": names, "test": names})
    chosen = choose_tasks(source, "test", 20, seed=0)
    assert chosen == choose_tasks(source, "test", 20, seed=0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 20
    assert set(chosen) <= set(names)
    assert all(type(name) is str for name in chosen)
    assert chosen != choose_tasks(source, "test", 20, seed=1)
    assert chosen != choose_tasks(source, "val", 20, seed=0)
    assert chosen[-1] > "class 100"  # not the first ones


@pytest.mark.parametrize("number", [None, 6, 1000])
def test_all_tasks_where_there_are_no_more(number: int | None) -> None:
    assert choose_tasks(Fake(), "test", number, seed=0) == SPLIT_TASKS["test"]


# Impossible requests


def test_too_few_images_name_the_class_and_the_cure() -> None:
    with pytest.raises(
        DataError,
        match=r"needs 10 different images .* 1 classes have fewer: hen \(9\)\. Lower evaluate.shots or evaluate.quer",
    ) as e:
        episodes(source=Fake(few="hen"), shots=6, queries=4)
    assert "give these classes more images" in str(e.value)
    with pytest.raises(DataError, match="Lower curves.k or curves.queries, give"):
        episodes(source=Fake(few="hen"), shots=6, queries=4, keys=["curves.k", "curves.queries"])
    with pytest.raises(DataError, match="Lower algo.method.shots, give"):
        Reptile(shots=10).check(Fake(splits={**SPLIT_TASKS, "train": ["hen"]}, few="hen"), update())
    episodes(source=Fake(few="hen"), shots=5, queries=4)


def test_a_long_list_of_classes_is_cut() -> None:
    names = [f"class{i}" for i in range(12)]
    with pytest.raises(DataError, match=r"12 classes have fewer: class0 \(14\), .*class9 \(14\) …"):
        check_counts(names, [14] * 12, 15, ["evaluate.shots"])


def test_an_empty_split() -> None:
    with pytest.raises(DataError, match="the val split has no task; put at least one class into it"):
        episodes(split="val", tasks=[])


# Training episodes

ALGORITHMS = [Reptile(shots=6), Fomaml(shots=6), FomamlStar(shots=10, tail=5), Joint()]


def by_name(algo: Algorithm) -> str:
    return type(algo).__name__


@pytest.mark.parametrize("algo", ALGORITHMS, ids=by_name)
def test_training_episodes_depend_on_seed_and_index_alone(algo: Algorithm) -> None:
    forwards = [everything(algo.episode(Fake(), update(), 0, i)) for i in range(12)]
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    backwards = [everything(algo.episode(Fake(), update(), 0, i)) for i in reversed(range(12))]
    assert forwards == backwards[::-1]
    other_seed = [everything(algo.episode(Fake(), update(), 1, i)) for i in range(12)]
    assert len({found for _, _, found in forwards + other_seed}) == 24
    assert len({seed for _, seed, _ in forwards + other_seed}) == 24


@pytest.mark.parametrize("algo", ALGORITHMS, ids=by_name)
def test_training_sees_all_training_tasks_and_no_other(algo: Algorithm) -> None:
    """The original's training watched the test tasks, and took a task's first records only."""
    tasks, images = set(), set()
    for i in range(60):
        episode = algo.episode(Fake(), update(augment=0.0), 0, i)
        for batch in (episode.support, *episode.batches):
            tasks |= set(batch.images[:, 0, 0, 0].tolist())
            images |= set(numbers(batch))
    assert tasks == {TASKS.index(task) for task in SPLIT_TASKS["train"]}
    assert images == set(range(IMAGES))


@pytest.mark.parametrize("algo", [Reptile(shots=6), Fomaml(shots=6)], ids=by_name)
def test_all_shots_are_support(algo: Algorithm) -> None:
    episode = algo.episode(Fake(), update(augment=0.0, steps=3, batch_size=8), 0, 0)
    assert len(set(numbers(episode.support))) == 6
    assert {n for batch in episode.batches for n in numbers(batch)} == set(numbers(episode.support))
    assert [len(batch) for batch in episode.batches] == [8, 8, 8]


def test_the_tail_of_fomaml_star_is_disjoint() -> None:
    heads = set()
    for i in range(40):
        episode = FomamlStar(shots=10, tail=4).episode(Fake(), update(augment=0.0, steps=5, batch_size=8), 0, i)
        *earlier, last = episode.batches
        assert [len(batch) for batch in episode.batches] == [8, 8, 8, 8, 4]
        head, tail = {n for batch in earlier for n in numbers(batch)}, set(numbers(last))
        assert (len(head), len(tail)) == (6, 4)
        assert head | tail == set(numbers(episode.support))
        heads.add(frozenset(head))
    assert len(heads) > 30  # the split is random


def test_a_mixed_batch_has_the_batch_size_and_each_class_once_if_they_suffice() -> None:
    (batch,) = Joint().episode(Fake(), update(augment=0.0, steps=1, batch_size=3), 0, 0).batches
    assert sorted(batch.images[:, 0, 0, 0].tolist()) == [0, 1, 2]
    (batch,) = Joint().episode(Fake(), update(augment=0.0, steps=1, batch_size=20), 0, 0).batches
    assert len(batch) == 20
    assert torch.equal(batch.masks, batch.images[:, 2] // 128)


def test_there_are_as_many_as_there_are() -> None:
    some = episodes()
    assert sum(1 for _ in some) == len(some)
    for index in (-1, len(some)):
        with pytest.raises(IndexError, match=f"episode {index} of {len(some)}"):
            some[index]
