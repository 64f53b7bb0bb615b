"""The table of features is what it says: every test that it names is there, and every row has all columns."""

import re
from pathlib import Path

import pytest

from fusedrnn.cell.activations import ACTIVATIONS
from fusedrnn.spec import OPTIONS

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "features.md"
TEXT = PAGE.read_text(encoding="utf-8")
LINKS = sorted(set(re.findall(r"\[([^\]]+)\]\((\.\./tests/[^)]+)\)", TEXT)))
TABLES = [re.findall(r"^\|.*\|$", part, re.MULTILINE) for part in TEXT.split("\n## ")[1:]]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("name", "target"), LINKS, ids=[name for name, _ in LINKS])
def test_every_test_named_is_there(name, target):
    file, _, function = name.partition("::")
    path = PAGE.parent / target
    assert path.stem == file
    assert path.is_file(), f"{target} is not there"
    source = path.read_text(encoding="utf-8")
    found = re.findall(r"^ *(?:def|class) ([Tt]est\w+)", source, re.MULTILINE)
    assert found or file == "conformance"
    assert function in found or not function, f"{function} is not in {target}"


def test_rows_have_the_same_number_of_columns():
    assert len(TABLES) >= 6
    header = TABLES[0][0]
    for table in TABLES:
        assert table[0] == header
        for line in table:
            assert len(cells(line)) == len(cells(header)) == 13, line


def test_no_cell_is_empty():
    for table in TABLES:
        assert cells(table[0])[0] == ""
        for line in table[2:]:
            assert all(cells(line)), line


def test_what_there_is_has_a_test_and_what_is_not_has_none():
    for table in TABLES:
        for line in table[2:]:
            feature, ours, shown, *_ = cells(line)
            assert (shown == "-") == (ours == "no"), feature


def test_notes_are_there_and_used():
    noted = re.findall(r"^\[\^(\w+)\]: ", TEXT, re.MULTILINE)
    used = re.findall(r"\[\^(\w+)\](?!:)", TEXT)
    assert sorted(noted) == sorted(set(used))
    assert len(noted) == len(set(noted))


def test_every_option_of_a_spec_has_a_row():
    """By a word of its row: a new option must be told here too."""
    words = {
        "projection_size": "Projection", "state_clip_min": "Cell state clipped", "reset_after": "reset before",
        "peepholes": "Peepholes", "coupled_gates": "coupled", "gate_clip": "Pre-activations clipped",
        "activations": "Choice of the functions", "bias": "No bias", "reverse": "reverse direction alone",
        "compute": "bfloat16", "residual": "Residual",
    }  # fmt: skip
    features = [cells(line)[0] for table in TABLES for line in table[2:]]
    for option in OPTIONS:
        assert any(words[option] in feature for feature in features), option
    assert len(ACTIVATIONS) == 11 and "The eleven that ONNX names" in TEXT
