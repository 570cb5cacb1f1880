"""Episodes as a pure function of (seed, split, index): any loader worker draws the same ones, in any order."""

from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike
from torch.utils.data import DataLoader, Dataset, Sampler

from metaseg.data.source import Split, TaskSource
from metaseg.episode import Batch, Episode
from metaseg.errors import DataError
from metaseg.seeding import derive_seed, generator
from metaseg.update import Update


def sample_episode(
    source: TaskSource, task: str, shots: int, queries: int, seed: int, rng: np.random.Generator
) -> Episode:
    """Draw `shots` support and `queries` query images of a task, all different; `rng` chooses them.

    The query comes first out of the shuffled images: of one rng, more shots add to the support of fewer, and the query
    stays as it is, as learning curves need it.
    """
    which = rng.permutation(source.count(task))[: queries + shots].tolist()
    drawn = Batch.from_numpy(*source.load(task, which))
    return Episode(task, seed, support=drawn[queries:], query=drawn[:queries])


def check_counts(tasks: Sequence[str], counts: ArrayLike, needed: int, keys: Sequence[str]) -> None:
    """Refuse tasks with too few images for an episode.

    Args:
        tasks: to look at.
        counts: images of each.
        needed: images of an episode.
        keys: what the config calls the numbers that `needed` comes from, for the message.

    Raises:
        DataError: naming the tasks.
    """
    counts = np.asarray(counts)
    short = np.flatnonzero(counts < needed)
    if len(short):
        named = [f"{tasks[i]} ({counts[i]})" for i in short[:10]]
        raise DataError(
            f"an episode needs {needed} different images of its class (support + query), but {len(short)} classes have "
            f"fewer: {', '.join(named)}{' …' if len(short) > 10 else ''}. Lower "
            f"{' or '.join(keys)}, give these classes more images (emoji: dataset.images_per_class), or leave them out "
            "(folders: dataset.min_images)."
        )


def choose_tasks(source: TaskSource, split: Split, number: int | None, seed: int) -> list[str]:
    """A fixed sample of the split's tasks, sorted by name; all of them for None or if there are fewer."""
    names = source.names(split)
    if number is None or number >= len(names):
        return list(names)
    chosen = generator(seed, split, "tasks").choice(len(names), number, replace=False)
    return sorted(names[i] for i in chosen)


class EvaluationEpisodes(Dataset[Episode]):
    """The same episodes for every method: (seed, split, task, draw) says which images.

    ω decides what is made of the support, and nothing else.

    Item i is draw i // len(tasks) of task i % len(tasks).

    Args:
        source: the data set.
        split: whose tasks.
        tasks: their names.
        update: ω, whose mini-batches of the support are drawn with the episode.
        shots: support images, ≥ 1.
        queries: query images, ≥ 1.
        draws: episodes a task, ≥ 1.
        seed: of the draw.
        keys: what the config calls shots and queries, for messages.

    Raises:
        DataError: if there is no task, or one has fewer than shots + queries images.
    """

    def __init__(
        self,
        source: TaskSource,
        split: Split,
        tasks: Sequence[str],
        update: Update,
        *,
        shots: int,
        queries: int,
        draws: int,
        seed: int,
        keys: Sequence[str] = ("evaluate.shots", "evaluate.queries"),
    ) -> None:
        if not tasks:
            raise DataError(f"the {split} split has no task; put at least one class into it")
        check_counts(tasks, [source.count(task) for task in tasks], shots + queries, keys)
        self.source, self.split, self.tasks, self.update = source, split, tasks, update
        self.shots, self.queries, self.draws, self.seed = shots, queries, draws, seed

    def __len__(self) -> int:
        return len(self.tasks) * self.draws

    def __getitem__(self, index: int) -> Episode:
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        draw, number = divmod(index, len(self.tasks))
        task = self.tasks[number]
        key = (self.seed, self.split, task, draw)
        episode = sample_episode(self.source, task, self.shots, self.queries, derive_seed(*key), generator(*key))
        return self.update.prepare(episode, *key)


class TrainingEpisodes(Dataset[Episode]):
    """Episode `index` of a run, drawn by the algorithm; as many as there are meta-steps × meta-batch."""

    def __init__(self, draw: Callable[[int], Episode], length: int) -> None:
        self.draw, self.length = draw, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Episode:
        if not 0 <= index < len(self):
            raise IndexError(f"episode {index} of {len(self)}")
        return self.draw(index)


class MetaBatches(Sampler[int]):
    """Episodes of meta-batch after meta-batch, of each those in `places`.

    It begins with number `start()`, asked for when the iteration begins, and ends before number `end`: a resumed run
    goes on where it was.
    """

    def __init__(self, start: Callable[[], int], end: int, meta_batch: int, places: Sequence[int]) -> None:
        self.start, self.end = start, end
        self.meta_batch, self.places = meta_batch, places

    def __iter__(self) -> Iterator[int]:
        for number in range(self.start(), self.end):
            yield from (number * self.meta_batch + place for place in self.places)

    def __len__(self) -> int:
        return self.end * len(self.places)  # Lightning counts a resumed epoch's earlier batches itself


def episode_loader(
    episodes: Dataset[Episode],
    workers: int,
    *,
    batch_size: int = 1,
    sampler: Sampler[int] | None = None,
    pin_memory: bool = False,
) -> DataLoader[list[Episode]]:
    """A loader of lists of `batch_size` episodes, prefetched by worker processes."""
    return DataLoader(  # collate_fn makes lists of what the data set has one by one
        episodes,  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=list,
        pin_memory=pin_memory,
        worker_init_fn=one_thread,
    )


def one_thread(worker: int) -> None:
    """Have OpenCV compute in the worker's own thread; torch's loader sees to torch's."""
    cv2.setNumThreads(0)
