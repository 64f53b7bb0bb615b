"""Dropout's masks: the published numbers, the definition element by element, statistics, and splits."""

from itertools import combinations

import numpy as np
import pytest

from fusedrnn import dropout

ONES = 0xFFFFFFFF


def words(*numbers):
    return [np.array([number], np.uint32) for number in numbers]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_has_the_published_answers(counter, key, expected):
    """The known answers that Random123 publishes for philox4x32-10."""
    actual = dropout.philox(words(*counter), key)
    assert all(word.dtype == np.uint32 for word in actual)
    assert tuple(int(word[0]) for word in actual) == expected


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
def test_mask_follows_the_definition(seed):
    steps, batch, size, layer, p = 3, 4, 11, 2, 0.4
    expected = np.empty((steps, batch, size), bool)
    for t, n, j in np.ndindex(expected.shape):
        block = dropout.philox(words(j // 4, n, t, layer), (seed % 2**32, seed // 2**32))
        expected[t, n, j] = int(block[j % 4][0]) >= round(p * 2**32)
    actual = dropout.mask(seed, p, layer, steps, batch, size)
    assert actual.dtype == np.bool_
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("smaller", [(5, 6, 13), (2, 6, 16), (5, 1, 16), (1, 1, 1), (0, 6, 16), (5, 0, 16)])
def test_smaller_mask_is_a_part_of_a_larger_one(smaller):
    whole = dropout.mask(3, 0.5, 1, 5, 6, 16)
    part = dropout.mask(3, 0.5, 1, *smaller)
    assert part.shape == smaller
    np.testing.assert_array_equal(part, whole[tuple(slice(size) for size in smaller)])


@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 0.5, 0.9])
def test_mask_has_the_rate_everywhere(p):
    mask = dropout.mask(11, p, 0, 50, 40, 90)
    deviation = np.sqrt(p * (1 - p) / mask.size)
    assert abs(1 - p - mask.mean()) <= 5 * deviation
    # The rate does not depend on the word of a block, the sequence or the step.
    for axis in range(3):
        others = tuple(set(range(3)) - {axis})
        means = mask.mean(axis=others)
        assert np.abs(means - (1 - p)).max() <= 5 * deviation * np.sqrt(mask.shape[axis])


def assert_independent(masks, p):
    """Any two masks agree as often as independent ones do."""
    expected = p * p + (1 - p) * (1 - p)
    deviation = np.sqrt(expected * (1 - expected) / masks[0].size)
    for first, second in combinations(masks, 2):
        assert abs((first == second).mean() - expected) <= 5 * deviation


def test_layers_and_seeds_are_independent():
    seeds = (0, 1, 2, 2**32, 2**32 + 1, 2**63)
    assert_independent([dropout.mask(seed, 0.3, layer, 20, 30, 40) for seed in seeds for layer in (0, 1)], 0.3)


def test_elements_are_independent():
    mask = dropout.mask(4, 0.3, 0, 60, 60, 60)
    for axis in range(3):
        for distance in (1, 2, 4):
            order = np.moveaxis(mask, axis, 0)
            assert_independent([order[distance:], order[:-distance]], 0.3)
    # An element is independent of the one with two of its indices exchanged.
    i, j = np.triu_indices(60, 1)
    for order in (mask, np.moveaxis(mask, 0, 2), np.moveaxis(mask, 1, 2)):
        assert_independent([order[i, j], order[j, i]], 0.3)


def test_threshold():
    assert dropout.threshold(0.0) == 0
    assert dropout.threshold(0.5) == 2**31
    assert dropout.threshold(0.1) == round(0.1 * 2**32) == 429496730
    assert dropout.threshold(np.nextafter(1.0, 0.0)) == 2**32 - 1


def test_word_at_the_threshold_is_not_dropped():
    word = int(dropout.philox(words(0, 0, 0, 0), (5, 0))[0][0])
    assert dropout.mask(5, word / 2**32, 0, 1, 1, 1).all()
    assert not dropout.mask(5, (word + 1) / 2**32, 0, 1, 1, 1).any()


def test_nothing_is_dropped_without_dropout():
    assert dropout.mask(1, 0.0, 0, 9, 8, 7).all()


def test_scale_keeps_the_expected_value():
    assert dropout.scale(0.0) == 1.0
    assert dropout.scale(0.75) == 4.0


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=rf"seed must be from 0 to 2\*\*64 - 1; got {seed}"):
        dropout.mask(seed, 0.5, 0, 1, 1, 1)


def test_seed_may_be_a_numpy_integer():
    expected = dropout.mask(2**63 + 1, 0.5, 0, 4, 4, 4)
    np.testing.assert_array_equal(dropout.mask(np.uint64(2**63 + 1), 0.5, 0, 4, 4, 4), expected)
