"""Structs of integers that Python writes and machine code reads."""

import pytest

from fusedrnn.jit.struct import Struct

PAIR = Struct("first", "second")


def test_values_are_in_the_order_of_memory():
    assert PAIR.values({"second": 2, "first": 1, "of another struct": 3}) == [1, 2]


def test_every_field_needs_a_value():
    with pytest.raises(KeyError, match="second"):
        PAIR.values({"first": 1})
