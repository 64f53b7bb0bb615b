"""The data of benchmarks: text, parameters, the user's array."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from bench_rows import SMALL
from fusedrnn.bench.data import load, parameters, text, text_input, workload
from fusedrnn.spec import DTYPES
from fusedrnn.testing.cases import CASES


def test_the_input_is_one_character_of_text_a_step():
    x = text_input(40, 3, 8, "float32")
    assert x.shape == (40, 3, 8) and x.dtype == np.float32
    assert np.array_equal(x, text_input(40, 3, 8, "float32"))
    starts = [n * len(text()) // 3 for n in range(3)]
    letters = [[text()[start + t] for start in starts] for t in range(40)]
    embedded: dict[str, np.ndarray] = {}
    for t, n in np.ndindex(40, 3):
        assert np.array_equal(embedded.setdefault(letters[t][n], x[t, n]), x[t, n])
    assert len({tuple(row) for row in embedded.values()}) == len(embedded) > 10


def test_the_text_is_english():
    words = text().lower().split()
    assert len(words) > 10_000
    assert {"the", "is", "python"} <= set(words)


def test_text_wraps_around_at_its_end():
    tail = text_input(2, len(text()), 1, "float64")
    assert np.array_equal(tail[1, -1], tail[0, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_are_uniform_and_repeatable(dtype):
    spec = CASES["small"].spec("lstm", dtype)
    params = parameters(spec)
    assert params.shape == (spec.layout.size,) and params.dtype == dtype
    assert np.array_equal(params, parameters(spec))
    bound = 1 / np.sqrt(spec.hidden_size)
    assert 0.99 * bound < params.max() <= bound and -bound <= params.min() < -0.99 * bound


def test_the_users_data_is_read(tmp_path):
    x = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    np.save(tmp_path / "x.npy", x)
    assert np.array_equal(load(tmp_path / "x.npy", "float32"), x)
    case = CASES["tiny"].at(*x.shape)
    assert workload(case, "gru", "float32", x).x.dtype == np.float32
    assert case.spec("gru").input_size == 4


def test_data_that_overflows_is_rejected(tmp_path):
    np.save(tmp_path / "x.npy", np.full((1, 1, 1), -1e300))
    assert load(tmp_path / "x.npy", "float64") == -1e300
    with pytest.raises(ValueError, match=r"x.npy holds values that float32 does not have; the largest is 1e\+300"):
        load(tmp_path / "x.npy", "float32")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4)), "shape (3, 4)"),
        (np.zeros((3, 0, 4)), "shape (3, 0, 4)"),
        (np.zeros((1, 1, 1), complex), "complex128"),
        (np.full((1, 1, 1), np.nan), "NaN"),
        (np.full((1, 1, 1), np.inf), "infinity"),
        (np.array([[["a"]]]), "<U1"),
        (np.array([[[None]]]), "not a whole .npy file"),
    ],
)
def test_unsuitable_data_is_rejected_with_its_file(tmp_path, array, message):
    path = tmp_path / "x.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(ValueError) as raised:
        load(path, "float32")
    assert message in str(raised.value) and "(T, N, I)" in str(raised.value) and str(path) in str(raised.value)


def test_a_missing_or_invalid_file_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "nowhere.npy", "float32")
    (tmp_path / "x.npy").write_text("1 2 3")
    with pytest.raises(ValueError, match=r"not a whole \.npy file"):
        load(tmp_path / "x.npy", "float32")
    with pytest.raises(ValueError, match=r"more than fits the memory"):
        load(file_with_header(tmp_path, "'descr': '<f4', 'shape': (1000000, 1000000, 1000)}"), "float32")


@pytest.mark.parametrize(
    "fields",
    [
        "'descr': '<f4', 'shape': (1, 1, 1",
        "'descr': (), 'shape': (1, 1, 1)}",
        "'descr': '<f4', 1: (1, 1, 1)}",
        f"'descr': '<f4', 'shape': ({2**70}, 1, 1)}}",
    ],
    ids=["TokenError", "IndexError", "TypeError", "OverflowError"],
)
def test_a_damaged_header_is_rejected(tmp_path, fields):
    with pytest.raises(ValueError, match=r"x\.npy is not a whole \.npy file of numbers"):
        load(file_with_header(tmp_path, fields), "float32")


def file_with_header(folder, fields):
    header = f"{{'fortran_order': False, {fields}".ljust(117) + "\n"
    (folder / "x.npy").write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode())
    return folder / "x.npy"


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradients_are_the_same_in_both_dtypes(dtype):
    work = workload(SMALL, "lstm", dtype)
    batch, exact = work.batch(4), work.exact().batch(4)
    assert batch.x.shape == (4, 3, 5) and batch.dy.shape == (4, 3, 14)
    assert [state.shape for state in (*batch.states, *batch.dstates)] == [(4, 3, 7)] * 4
    assert not any(state.any() for state in batch.states)
    for gradient, exact_gradient in zip((batch.dy, *batch.dstates), (exact.dy, *exact.dstates), strict=True):
        assert gradient.dtype == dtype and exact_gradient.dtype == np.float64
        assert np.array_equal(gradient, exact_gradient)
        assert 0.8 < np.abs(gradient).max() * np.sqrt(12) <= 1.0
