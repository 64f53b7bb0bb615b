"""The catalogue as the guide lists it."""

import re
from pathlib import Path

from fusedrnn import cells

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "cells.md"


def listed():
    """Each cell of the guide's table: its states and its products, which a row gives once or for each cell."""
    section = GUIDE.read_text(encoding="utf-8").split("\n## The catalogue\n")[1].split("\n## ")[0]
    for line in re.findall(r"^\| `.*\|$", section, re.MULTILINE):
        names, states, products = line.strip("| ").split(" | ")[:3]
        groups = [re.findall(r"`(\w+)`", group) for group in re.sub(r"`[^`]*with_\w+[^`]*`", "", names).split(";")]
        flat = [name for group in groups for name in group]
        for name in flat:
            yield name, states.split("; "), products.split("; ")


def test_the_guide_lists_every_cell():
    assert sorted(name for name, _, _ in listed()) == sorted(cells.__all__)


def test_states_and_products():
    for name, states, products in listed():
        cell = getattr(cells, name)
        assert ", ".join(cell.states) in states, name
        assert str(len(cell.traced.products) or "none") in products, name
