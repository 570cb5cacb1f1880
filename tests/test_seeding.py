"""Seeds are a pure function of their key, equal on every machine and release."""

import itertools

import numpy as np
import pytest
import torch

from metaseg.seeding import derive_seed, generator, torch_seed


def test_seeds_never_change() -> None:
    """The first eight bytes that `printf 'int:0\\0str:train\\0int:7' | sha256sum` prints, last byte first, halved."""
    assert derive_seed(0, "train", 7) == int.from_bytes(bytes.fromhex("d44f9288fe292206")[::-1], "big") // 2
    assert derive_seed("a") == int.from_bytes(bytes.fromhex("980410da9522db17")[::-1], "big") // 2


def test_other_keys_give_other_seeds() -> None:
    keys = [(), (1,), ("1",), (1, 1), ("1", "1"), ("11",), (11,), (1, "1"), ("1", 1), ("a", "b"), ("ab",), ("b", "a")]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert len({derive_seed(seed, "train", index) for seed in range(30) for index in range(30)}) == 900


def test_seeds_are_valid_for_torch_and_numpy() -> None:
    seeds = [derive_seed("range", i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all 63 bits are used


def test_generators_repeat_under_their_key() -> None:
    draws = [generator(*key).random(4) for key in [(0, "x"), (0, "x"), (0, "y"), (1, "x")]]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert all((a != b).all() for a, b in itertools.combinations(draws[1:], 2))


def test_torch_seed_gives_the_state_back() -> None:
    before = torch.get_rng_state()
    with torch_seed(3):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_seed_gives_the_state_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), torch_seed(3):
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_seed_decides_what_is_drawn() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.rand(1)  # what was drawn before must not matter
        with torch_seed(seed):
            return torch.rand(8)

    expected = torch.rand(8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(3), expected)
    assert torch.equal(draw(3), expected)
    assert not torch.equal(draw(4), expected)


def test_numpys_integers_are_integers() -> None:
    assert derive_seed(np.int64(3), "train") == derive_seed(3, "train")
