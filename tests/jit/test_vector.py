"""exp, log, tanh, sigmoid and the like: at most 4 ulp over the whole range, exact at the limits, on every target."""

import ctypes
from functools import cache

import numpy as np
import pytest

from fusedrnn.cell.primitives import PRIMITIVES
from fusedrnn.jit import compiler, loader
from fusedrnn.jit.builder import Function, Module
from fusedrnn.jit.elementwise import FORMATS
from fusedrnn.jit.host import emulated
from fusedrnn.jit.target import known_targets
from fusedrnn.jit.vector import Vectors
from fusedrnn.spec import DTYPES

MAX_ULP = 4
OPERATIONS = ("tanh", "sigmoid", "relu", "expm1", "softplus", "exp", "log", "sqrt", "rsqrt")
# The oracle must be more precise than float64: on x86 long double has 64 bits of mantissa.
WIDE_ENOUGH = np.finfo(np.longdouble).nmant >= 63


def build(target, dtype):
    """A module with a function of (source, into, count of vectors) for each operation."""
    module = Module(f"vector_{dtype}")
    for name in OPERATIONS:
        f = Function(module, name, ["source", "into", "count"], exported=True)
        source, into, count = f.arguments
        v = Vectors(f, target, dtype)
        with f.loop(0, count) as index:
            result = getattr(v, name)(v.load(source + index * v.bytes, align=v.item))
            v.store(result, into + index * v.bytes, align=v.item)
        f.ret()
    return module


@cache
def compiled(target, dtype):
    """The compiled module, and its functions by name."""
    code = loader.LoadedObject("vector", target, compiler.compile_module(build(target, dtype), target))
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)
    return code, {name: kind(code.address(name)) for name in OPERATIONS}


def apply(target, dtype, name, x):
    """The operation on every element; ones fill up the last vector."""
    lanes = target.lanes(dtype)
    padded = np.ones(-(-x.size // lanes) * lanes, dtype)
    padded[: x.size] = x
    into = np.full_like(padded, np.nan)
    compiled(target, dtype)[1][name](padded.ctypes.data, into.ctypes.data, padded.size // lanes)
    return into[: x.size]


def exact(name, x):
    """The operation in long double precision."""
    wide = x.astype(np.longdouble)
    with np.errstate(all="ignore"):
        if name == "sigmoid":
            return 1 / (1 + np.exp(-wide))
        if name == "expm1":
            return np.expm1(wide)
        if name == "softplus":
            return np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide)))
        return getattr(np, name)(wide)


def ulps(actual, expected):
    """The distance in units of the last place of the exact value; inf counts as the float after the largest one."""
    form = np.finfo(actual.dtype)
    wide, largest = np.longdouble, np.longdouble(form.max)
    last = largest - np.nextafter(form.max, form.dtype.type(0))
    expected = np.minimum(expected, largest + last)
    actual = np.where(np.isinf(actual), np.copysign(largest + last, actual), actual.astype(wide))
    with np.errstate(under="ignore"):
        below = np.minimum(np.abs(expected), np.nextafter(form.max, form.dtype.type(0))).astype(form.dtype)
    unit = np.where(np.abs(expected) >= largest, last, np.spacing(below).astype(wide))
    return np.abs(actual - expected) / unit


def samples(dtype):
    """Numbers of every exponent and sign, dense where the functions bend, and the neighbours of every threshold."""
    rng = np.random.default_rng(0)
    form, size = np.finfo(dtype), np.dtype(dtype).itemsize
    every = rng.integers(0, 256, (200_000, size), np.uint8).view(dtype).ravel()
    every = every[np.isfinite(every)]
    thresholds = [0.0, form.tiny, form.smallest_subnormal, form.max, 0.25, 0.5, 1.0]
    thresholds += [FORMATS[dtype].sigmoid_is_zero, FORMATS[dtype].sigmoid_is_one, FORMATS[dtype].tanh_is_one]
    thresholds += [np.log(form.max), np.log(form.tiny), np.log(np.longdouble(form.smallest_subnormal))]
    # Where the range reduction changes to the next power of two.
    thresholds += [(n + 0.5) * np.log(2) / part for n in range(0, 1100, 7) for part in (1, 2)]
    thresholds = np.array(thresholds, dtype)
    close = np.concatenate([thresholds.view(f"i{size}") + k for k in range(-3, 4)]).view(dtype)
    close = close[np.isfinite(close)]
    ranges = [np.linspace(-limit, limit, 60_001) for limit in (1e-3, 1.0, 10.0, 40.0, 110.0, 760.0)]
    numbers = np.concatenate([every, close, -close, *ranges]).astype(dtype)
    return numbers[np.isfinite(numbers)]


@pytest.mark.skipif(not WIDE_ENOUGH, reason="long double is no wider than double here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softplus", "expm1", "exp", "log"])
def test_error_bound(name, dtype, target):
    """Every exponent. Some may be zero where they are below the smallest normal number; log takes normal numbers."""
    x = samples(dtype)
    if name == "expm1":  # its domain
        x = x[x <= 0]
    if name == "log":
        x = x[x >= np.finfo(dtype).tiny]
    actual, expected = apply(target, dtype, name, x), exact(name, x)
    flushed = (name in ("sigmoid", "softplus", "exp")) & (actual == 0) & (expected < np.finfo(dtype).tiny)
    error = np.where(flushed, 0, ulps(actual, expected))
    worst = int(np.argmax(error))
    assert error[worst] <= MAX_ULP, f"{name}({x[worst]!r}) is {float(error[worst]):.2f} ulp off"


@pytest.mark.skipif(not WIDE_ENOUGH, reason="long double is no wider than double here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
@pytest.mark.parametrize("known", known_targets(), ids=lambda known: f"{known.name}-emulated")
def test_error_bound_by_exponent(name, dtype, known):
    """Equally many numbers of each exponent where the functions are not flat, of both signs; no result exceeds one."""
    lowest, highest = -np.finfo(dtype).nmant - 3, 9 if dtype == "float64" else 6
    mantissas = 1 + np.random.default_rng(1).random(4_000)
    x = np.ldexp(mantissas, np.arange(lowest, highest)[:, None]).astype(dtype).ravel()
    x = np.concatenate([x, -x])
    actual = apply(emulated(known), dtype, name, x)
    assert np.abs(actual).max() <= 1
    assert ulps(actual, exact(name, x))[np.abs(x) < -FORMATS[dtype].sigmoid_is_zero - 2].max() <= MAX_ULP


@pytest.mark.skipif(not WIDE_ENOUGH, reason="long double is no wider than double here")
def test_error_is_counted_in_ulp():
    """An error of k ulp counts as k, also for denormals."""
    for value in (1.5, 1e-41, 3e38):
        x = np.array([value], np.float32)
        for k in (0, 1, 5):
            assert ulps(x + k * np.spacing(x), x.astype(np.longdouble)) == k
    assert ulps(np.array([np.inf], np.float32), np.array([np.longdouble(1e40)])) == 0
    assert ulps(np.array([np.finfo(np.float32).max]), np.array([np.longdouble(1e40)])) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("tanh", [0.0, -0.0, np.inf, -np.inf, 1e4, -1e4], [0.0, -0.0, 1, -1, 1, -1]),
        ("sigmoid", [0.0, -0.0, np.inf, -np.inf, 1e4, -1e4], [0.5, 0.5, 1, 0, 1, 0]),
        ("relu", [0.0, np.inf, -np.inf, 1e4, -1e4], [0, np.inf, 0, 1e4, 0]),
        ("expm1", [0.0, -np.inf, -1e4], [0, -1, -1]),
        ("softplus", [np.inf, -np.inf, 1e4, -1e4], [np.inf, 0, 1e4, 0]),
        ("exp", [0.0, -0.0, np.inf, -np.inf, 1e4, -1e4], [1, 1, np.inf, 0, np.inf, 0]),
        ("log", [1.0, 0.0, -0.0, np.inf, 1e-320], [0, -np.inf, -np.inf, np.inf, -np.inf]),
        ("sqrt", [0.0, -0.0, np.inf, 6.25], [0.0, -0.0, np.inf, 2.5]),
        ("rsqrt", [0.0, -0.0, np.inf, 6.25], [np.inf, -np.inf, 0.0, 0.4]),
    ],
)
def test_limits(name, x, expected, dtype, target):
    actual = apply(target, dtype, name, np.array(x, dtype))
    np.testing.assert_array_equal(actual, np.array(expected, dtype))
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(np.array(expected)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_nan(name, dtype, target):
    """NaN of either sign and with any payload stays NaN, and affects no other lane."""
    quiet = np.array([np.nan, -np.nan], dtype)
    payload = quiet.view(f"u{quiet.itemsize}") | np.array(12345, f"u{quiet.itemsize}")
    x = np.ones(64, dtype)
    x[3:5], x[17:19] = quiet, payload.view(dtype)
    actual = apply(target, dtype, name, x)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(x))
    assert len(set(actual[~np.isnan(x)])) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["log", "sqrt"])
def test_negative_numbers(name, dtype, target):
    assert np.isnan(apply(target, dtype, name, np.array([-1.0, -1e-30, -np.inf], dtype))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["maximum", "minimum", "larger_grad", "select_less", "select_less_equal", "abs_grad"])
def test_operations_of_pairs(name, dtype, target):
    """Ties, infinities and NaN on either side, as NumPy has them."""
    row, numbers = PRIMITIVES[name], [0.0, -1.5, 2.0, np.inf, -np.inf, np.nan, 1.0, -2.0]
    arguments = [*np.array(np.meshgrid(numbers, numbers), dtype).reshape(2, -1)]
    arguments += [np.full(arguments[0].size, value, dtype) for value in (3.0, 5.0)]
    module = Module(f"pairs_{name}")
    f = Function(module, name, ["into", "a", "b", "value", "other"], exported=True)
    v = Vectors(f, target, dtype)
    into, *sources = f.arguments
    with f.loop(0, arguments[0].nbytes, v.bytes) as offset:
        result = v.apply(name, *(v.load(source + offset, align=v.item) for source in sources[: row.arity]))
        v.store(result, into + offset, align=v.item)
    f.ret()
    code = loader.LoadedObject(module.name, target, compiler.compile_module(module, target))
    actual = np.full_like(arguments[0], np.nan)
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(code.address(name))
    run(*(array.ctypes.data for array in (actual, *arguments)))
    np.testing.assert_array_equal(actual, row.array(np, *arguments[: row.arity]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals(dtype, target):
    """tanh of a denormal is the denormal; sigmoid of it is 0.5."""
    form = np.finfo(dtype)
    x = np.array([form.smallest_subnormal * k for k in (1, 2, 3, 1000)] + [form.tiny / 2, form.tiny], dtype)
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(apply(target, dtype, "tanh", x), x)
    np.testing.assert_array_equal(apply(target, dtype, "sigmoid", x), np.full_like(x, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_odd(dtype, target):
    x = samples(dtype)
    np.testing.assert_array_equal(apply(target, dtype, "tanh", -x), -apply(target, dtype, "tanh", x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_store_masked(dtype, count, target):
    """Only the first lanes are written."""
    module = Module("store_masked")
    f = Function(module, "store", ["source", "into", "count"], exported=True)
    v = Vectors(f, target, dtype)
    source, into, lanes = f.arguments
    v.store_masked(v.load(source, align=v.item), into, lanes)
    f.ret()
    code = loader.LoadedObject("store_masked", target, compiler.compile_module(module, target))
    count = min(count, v.lanes)
    x, y = np.arange(1, v.lanes + 1, dtype=dtype), np.zeros(v.lanes, dtype)
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(code.address("store"))(x.ctypes.data, y.ctypes.data, count)
    np.testing.assert_array_equal(y, np.where(np.arange(v.lanes) < count, x, 0))
