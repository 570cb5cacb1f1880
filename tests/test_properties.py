"""What holds for any numbers: of the episode sampler, the checks of a configuration, and the metrics."""

import copy
import json
import math
from collections import Counter
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from test_config import composed
from test_episodes import IMAGES, SPLIT_TASKS, Fake, bytes_of, everything, numbers, update
from torch.optim import SGD

from metaseg.algos import FomamlStar
from metaseg.config import check, check_overrides, plain
from metaseg.data.episodes import EvaluationEpisodes, MetaBatches, choose_tasks, sample_episode
from metaseg.errors import ConfigError, DataError, UserError
from metaseg.evaluate import Evaluation, Score
from metaseg.losses import soft_iou
from metaseg.metrics import bootstrap_ci95, bootstrap_difference_ci95, counts, for_json, iou, mean_iou, predicted
from metaseg.seeding import derive_seed, generator
from metaseg.update import Update

fixed = settings(max_examples=60, deadline=None, derandomize=True)  # the same examples in every run
SEEDS = st.integers(0, 2**63 - 1)
TASKS = st.sampled_from(SPLIT_TASKS["test"])


# The episode sampler


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Shots and queries of a task of `IMAGES`."""
    shots = draw(st.integers(1, IMAGES - 1))
    return shots, draw(st.integers(0, IMAGES - shots))


@fixed
@given(sizes(), TASKS, SEEDS)
def test_support_and_query_are_as_many_different_images_as_asked_for(
    size: tuple[int, int], task: str, seed: int
) -> None:
    shots, queries = size
    episode = sample_episode(Fake(), task, shots, queries, seed, generator(seed))
    support, query = numbers(episode.support), numbers(episode.query)
    assert (len(support), len(query)) == (shots, queries)
    assert len({*support, *query}) == shots + queries
    assert {*support, *query} <= set(range(IMAGES))


@fixed
@given(sizes(), TASKS, SEEDS)
def test_a_larger_support_contains_the_smaller_and_the_query_stays(size: tuple[int, int], task: str, seed: int) -> None:
    shots, queries = size
    small, large = (sample_episode(Fake(), task, n, queries, seed, generator(seed)) for n in (shots, IMAGES - queries))
    assert numbers(large.support)[:shots] == numbers(small.support)
    assert numbers(large.query) == numbers(small.query)


@fixed
@given(sizes(), SEEDS, st.integers(1, 3), st.data())
def test_an_episode_depends_on_its_key_alone(size: tuple[int, int], seed: int, draws: int, data: st.DataObject) -> None:
    shots, queries = size
    assume(queries >= 1)
    made = [
        EvaluationEpisodes(Fake(), "test", tasks, update(), shots=shots, queries=queries, draws=draws, seed=seed)
        for tasks in (SPLIT_TASKS["test"], data.draw(st.permutations(SPLIT_TASKS["test"])))
    ]
    task, draw = data.draw(TASKS), data.draw(st.integers(0, draws - 1))
    torch.manual_seed(data.draw(st.integers(0, 99)))  # whatever else is random meanwhile
    np.random.seed(data.draw(st.integers(0, 99)))  # noqa: NPY002
    one, other = (of[draw * len(of.tasks) + list(of.tasks).index(task)] for of in made)
    assert everything(one) == everything(other)


@fixed
@given(st.integers(1, IMAGES), st.integers(1, 12), st.integers(1, 12), SEEDS)
def test_mini_batches_use_every_image_equally_often(shots: int, batch_size: int, steps: int, seed: int) -> None:
    support = sample_episode(Fake(), "eel", shots, 0, seed, generator(seed)).support
    omega = update(steps=steps, batch_size=batch_size, augment=0.0)
    batches = omega.minibatches(support, generator(seed, "batches"))
    assert [len(batch) for batch in batches] == [batch_size] * steps
    used = Counter(number for batch in batches for number in numbers(batch))
    assert set(used) <= set(numbers(support))
    times = [used[number] for number in numbers(support)]
    assert max(times) - min(times) <= 1
    seen = [number for batch in batches for number in numbers(batch)]
    for start in range(0, len(seen) - shots + 1, shots):  # each round is the whole support
        assert sorted(seen[start : start + shots]) == sorted(numbers(support))


@fixed
@given(st.integers(2, IMAGES), st.data(), SEEDS)
def test_the_tail_of_fomaml_star_is_disjoint_for_any_sizes(shots: int, data: st.DataObject, seed: int) -> None:
    tail = data.draw(st.integers(1, shots - 1))
    algo, omega = FomamlStar(shots, tail), update(steps=data.draw(st.integers(2, 5)), augment=0.5)
    episode = algo.episode(Fake(), omega, seed, data.draw(st.integers(0, 10**6)))
    assert bytes_of(episode.batches[-1]) == bytes_of(episode.support[-tail:])
    for batch in algo.minibatches(episode.support, update(steps=4, augment=0.0), generator(seed))[:-1]:
        assert set(numbers(batch)).isdisjoint(numbers(episode.support[-tail:]))


@fixed
@given(st.none() | st.integers(1, 12), SEEDS)
def test_chosen_tasks_are_a_sorted_sample_of_the_split(number: int | None, seed: int) -> None:
    names = SPLIT_TASKS["test"]
    chosen = choose_tasks(Fake(), "test", number, seed)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(names)
    assert len(chosen) == min(number or len(names), len(names))


@fixed
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 6), st.data())
def test_ranks_together_meet_every_episode_once(meta_batch: int, end: int, start: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, meta_batch))
    parts = [list(MetaBatches(lambda: start, end, meta_batch, range(rank, meta_batch, ranks))) for rank in range(ranks)]
    assert sorted(index for part in parts for index in part) == list(range(start * meta_batch, end * meta_batch))


@fixed
@given(st.integers(1, 40), st.integers(1, 40), SEEDS)
def test_more_images_than_the_class_has_are_refused(shots: int, queries: int, seed: int) -> None:
    def make() -> EvaluationEpisodes:
        return EvaluationEpisodes(Fake(), "test", ["eel"], update(), shots=shots, queries=queries, draws=1, seed=seed)

    if shots + queries <= IMAGES:
        assert len(make()) == 1
        return
    with pytest.raises(DataError, match=rf"needs {shots + queries} different images .* eel \({IMAGES}\)\. Lower"):
        make()


@fixed
@given(
    st.lists(st.integers(0, 2**70) | st.text(max_size=5), max_size=4), st.lists(st.integers() | st.text(), max_size=4)
)
def test_seeds_of_different_keys_differ(one: list[int | str], other: list[int | str]) -> None:
    assert 0 <= derive_seed(*one) < 2**63
    assert derive_seed(*one) == derive_seed(*one)
    assume(one != other)
    assume(not any("\0" in str(part) for part in (*one, *other)))
    assert derive_seed(*one) != derive_seed(*other)


# The checks of a configuration


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(alphabet="abc/._-:[]{}= é", max_size=8),
    st.lists(st.integers(-2, 9) | st.booleans() | st.text(alphabet="ab", max_size=2), max_size=4),
    st.dictionaries(st.sampled_from(["lr", "a", "low", "_partial_"]), st.integers(-2, 9) | st.none(), max_size=2),
)
SOUND = ("mode=fit_test", "mode=search", "algo=joint", "algo=fomaml_star", "update=sgd_early_stopping", "trainer=cpu")


@cache
def configuration(*words: str) -> DictConfig:
    return composed("trainer=cpu", *words)


def keys_of(node: Any, prefix: str = "") -> list[str]:
    """Dotted names of all values and nodes."""
    if not isinstance(node, dict):
        return []
    below = [key for name, part in node.items() for key in keys_of(part, f"{prefix}{name}.")]
    return [f"{prefix}{name}" for name in node] + below


@settings(fixed, max_examples=150)
@given(st.sampled_from(SOUND), st.data(), JUNK)
def test_any_value_of_any_key_is_accepted_or_refused_with_a_cure(words: str, data: st.DataObject, junk: Any) -> None:
    config = copy.deepcopy(configuration(words))
    key = data.draw(st.sampled_from(keys_of(plain(config))))
    with suppress(OmegaConfBaseException):  # of keys that there are not, as on the command line
        OmegaConf.update(config, key, junk)
    with suppress(UserError, OmegaConfBaseException):  # whose messages the command line prints; and nothing else
        check(config)


@fixed
@given(
    st.fixed_dictionaries(
        {
            "evaluate.shots": st.integers(1, 10**6),
            "evaluate.queries": st.integers(1, 10**6),
            "evaluate.lrs": st.none() | st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=4),
            "evaluate.rungs": st.lists(st.integers(1, 99), unique=True, max_size=5).map(sorted),
            "algo.outer.lr": st.floats(1e-30, 1e30),
            "algo.final_lr": st.floats(0, 1e30),
            "algo.inner.lr": st.floats(1e-30, 1e30),
            "algo.inner.steps": st.integers(1, 10**6),
            "update.dropout": st.floats(0, 0.99),
            "update.augment": st.floats(0, 1),
            "update.weight_decay": st.floats(0, 10),
            "update.batchnorm": st.sampled_from(["running", "support", "batch"]),
            "update.adapts": st.sampled_from(["all", "decoder", "head", "batchnorm"]),
            "dataset.image_size": st.integers(2, 40).map(lambda n: 16 * n),
            "max_dropped": st.floats(0, 1),
        }
    )
)
def test_all_values_in_range_are_accepted(values: dict[str, Any]) -> None:
    config = copy.deepcopy(configuration("mode=fit_test"))
    for key, value in values.items():
        OmegaConf.update(config, key, value, merge=False)
    check(config)


@settings(fixed, max_examples=12)  # each composes the configuration
@given(st.data())
def test_a_key_with_a_letter_too_few_or_too_many_is_refused(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(keys_of(plain(configuration()))))
    at = data.draw(st.integers(0, len(key) - 1))
    typo = data.draw(st.sampled_from([key[:at] + key[at + 1 :], key[:at] + "x" + key[at:]]))
    known = {*keys_of(plain(configuration())), *(str(group) for group in plain(configuration()))}
    assume(typo not in known and typo.replace(".", "") and not typo.startswith((".", "hydra")))
    assume(not typo.endswith(".") and ".." not in typo)
    with pytest.raises(ConfigError, match="there is no key '.*'; did you mean"):
        check_overrides([f"{typo}=1"])


# The metrics

MASKS = arrays(
    np.uint8, st.tuples(st.just(2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), elements=st.integers(0, 1)
)


@fixed
@given(MASKS)
def test_counts_are_those_of_sets_of_pixels(pair: np.ndarray) -> None:
    prediction, truth = pair
    for found, p, m in zip(counts(*map(torch.from_numpy, pair)).tolist(), prediction, truth, strict=True):
        pixels = set(np.ndindex(p.shape))
        object_p, object_m = ({at for at in pixels if mask[at]} for mask in (p, m))
        back_p, back_m = pixels - object_p, pixels - object_m
        assert found == [len(object_p & object_m), len(object_p | object_m), len(back_p & back_m), len(back_p | back_m)]


@fixed
@given(MASKS)
def test_iou_is_symmetric_between_0_and_1_and_1_for_itself(pair: np.ndarray) -> None:
    prediction, truth = map(torch.from_numpy, pair)
    value = mean_iou(counts(prediction, truth))
    assert 0 <= value <= 1
    assert value == mean_iou(counts(truth, prediction))
    assert mean_iou(counts(truth, truth)) == pytest.approx(1)
    inverted = counts(1 - prediction, 1 - truth)[:, [2, 3, 0, 1]]  # object and background change places
    assert torch.equal(inverted, counts(prediction, truth))


@fixed
@given(MASKS)
def test_soft_iou_of_hard_masks_is_iou(pair: np.ndarray) -> None:
    prediction, truth = map(torch.from_numpy, pair)
    hard = counts(prediction, truth)
    expected = torch.from_numpy(iou(hard[:, 0], hard[:, 1])).float()
    torch.testing.assert_close(soft_iou(prediction.float(), truth.float()), expected)


@fixed
@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.just(2), st.just(3), st.just(3)),
        elements=st.floats(-9, 9, width=32),
    )
)
def test_what_is_predicted_is_the_larger_channel_and_never_both(logits: np.ndarray) -> None:
    found = predicted(torch.from_numpy(logits))
    np.testing.assert_array_equal(found.numpy(), logits[:, 1] > logits[:, 0])
    assert not (found & predicted(torch.from_numpy(logits[:, ::-1].copy()))).any()


VALUES = arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1))


@settings(fixed, max_examples=25)
@given(VALUES, st.floats(-1, 1))
def test_an_interval_lies_among_the_values_and_moves_with_them(values: np.ndarray, by: float) -> None:
    low, high = bootstrap_ci95(values)
    assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9
    assert bootstrap_ci95(values + by) == pytest.approx((low + by, high + by), abs=1e-9)
    assert bootstrap_difference_ci95(values, np.zeros(1)) == pytest.approx((low, high), abs=1e-9)


@st.composite
def episode_scores(draw: st.DrawFn) -> list[Score]:
    """Of one to four tasks, as many draws each, of as many images, with any pixel counts."""
    tasks, draws, images = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))

    def score(task: int) -> Score:
        found = []
        for _ in range(images):
            union = draw(st.integers(0, 64))
            both = draw(st.integers(0, union))
            found.append([both, union, 64 - union, 64 - both])
        last = np.array(found, dtype=np.float64)
        return Score(str(task), (0, 5), np.stack([last, last]), np.zeros(2), last, 0.0)

    return [score(task) for _ in range(draws) for task in range(tasks)]


@fixed
@given(episode_scores())
def test_each_iou_is_what_it_is_named_for(scores: list[Score]) -> None:
    found = Evaluation(scores)
    by_task: dict[str, list[np.ndarray]] = {}
    for score in scores:
        by_task.setdefault(score.task, []).append(score.counts[-1])

    def ratio(both: float, either: float) -> float:
        return (both + 1e-7) / (either + 1e-7)

    per_image = [np.mean([ratio(*image[:2]) for drawn in draws for image in drawn]) for draws in by_task.values()]
    assert found.iou == pytest.approx(np.mean(per_image))
    totals = [np.sum(np.concatenate(draws), axis=0) for draws in by_task.values()]
    assert found.miou_class == pytest.approx(np.mean([ratio(*total[:2]) for total in totals]))
    everything = np.sum(totals, axis=0)
    assert found.fb_iou == pytest.approx((ratio(*everything[:2]) + ratio(*everything[2:])) / 2)
    assert all(0 <= value <= 1 + 1e-9 for value in (found.iou, found.miou_class, found.fb_iou))


@fixed
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_any_number_makes_valid_json(value: float) -> None:
    text = json.dumps(for_json(value), allow_nan=False)
    assert json.loads(text) == (value if math.isfinite(value) else None)


# The learning rate


@fixed
@given(st.floats(1e-6, 1e3), st.integers(1, 50), st.data())
def test_the_rate_of_a_step_is_the_schedules_share(lr: float, steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, steps - 1))
    assert Update(SGD, lr=lr, steps=steps).lr_at(step) == lr
    assert Update(SGD, lr=lr, steps=steps, schedule=lambda progress: progress).lr_at(step) == pytest.approx(
        lr * step / steps
    )
