"""A cached call does what a checked call does: primed ops are compared with fresh ops, argument by argument.

An op is primed with calls of one kind until they run from its cache. Then one argument at a time is perturbed: the
outcome, bits or error, must be that of an op that has never been called, and so must that of the next call like those
before.
"""

import numpy as np
import pytest

import fusedrnn
from fusedrnn import RNNOp, RNNSpec, frozen
from problems import bits

T, N, I, H = 3, 2, 5, 7
# A cell of two states and one of one; the number of threads decides who runs the call, not what is compared.
CASES = [("lstm", 1), ("lstm", 2), ("gru", 2)]
PRIMING = 3  # a checked call, a checked call that is then cached, a cached call


class Sub(np.ndarray):
    pass


class Pair(list):
    """A sequence that is not a tuple."""


# What an array may be replaced by: arrays of the same shape and dtype, or almost.
ARRAYS = {
    "None": lambda a: None,
    "number": lambda a: 3.0,
    "list": lambda a: a.tolist(),
    "string": lambda a: "write",
    "tuple": lambda a: (a,),
    "copy": lambda a: a.copy(),
    "subclass": lambda a: a.view(Sub),
    "masked": lambda a: np.ma.masked_array(a),
    "other float": lambda a: a.astype(np.float64 if a.dtype == np.float32 else np.float32),
    "other bytes": lambda a: a.astype(a.dtype.newbyteorder()),
    "integers": lambda a: np.zeros(a.shape, np.int32),
    "objects": lambda a: a.astype(object),
    "read-only": lambda a: _read_only(a),
    "unaligned": lambda a: _unaligned(a),
    "first axis shorter": lambda a: a[:-1].copy(),
    "first axis longer": lambda a: np.concatenate([a, a]),
    "last axis shorter": lambda a: a[..., :-1].copy(),
    "last axis empty": lambda a: a[..., :0].copy(),
    "axis more": lambda a: a[None].copy(),
    "axis less": lambda a: a[0].copy(),
    "flat": lambda a: a.ravel().copy(),
    "reversed": lambda a: a[::-1],
    "last axis reversed": lambda a: a[..., ::-1],
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "wide rows": lambda a: _wide(a),
    "column order": lambda a: np.asfortranarray(a),
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "overlapping rows": lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (0, *a.strides[1:])),
    "infinite": lambda a: np.full_like(a, np.inf),
    "NaN": lambda a: np.full_like(a, np.nan),
}


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def _unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    other = memory[1:].view(array.dtype).reshape(array.shape)
    other[...] = array
    return other


def _wide(array):
    other = np.full((*array.shape[:-1], array.shape[-1] + 3), 9, array.dtype)
    other[..., : array.shape[-1]] = array
    return other[..., : array.shape[-1]]


# What a tuple of arrays may be replaced by.
TUPLES = {
    "None": lambda arrays: None,
    "nothing": lambda arrays: (),
    "list": list,
    "sequence": Pair,
    "iterator": iter,
    "array": lambda arrays: np.stack([np.resize(array, (1, N, H)) for array in arrays if array is not None] or [1.0]),
    "string": lambda arrays: "hc"[: len(arrays)],
    "dict": lambda arrays: dict(enumerate(arrays)),
    "one more": lambda arrays: (*arrays, arrays[0]),
    "one less": lambda arrays: arrays[:-1],
    "Nones": lambda arrays: (None,) * len(arrays),
    "first twice": lambda arrays: (arrays[0],) * len(arrays),
}
REQUESTS = {
    "write": "write",
    "add": "add",
    "null": "null",
    "x null": {"x": "null"},
    "params add": {"params": "add"},
    "states null": {"states": "null", "x": "add"},
    "empty": {},
    "unknown": "read",
    "unknown key": {"y": "write"},
    "number": 1,
    "None": None,
    "bad value": {"x": None},
    "array": np.array(["write"]),
}


def problem(mode, dtype="float32"):
    spec = RNNSpec(mode, I, H, 2, dtype=dtype)
    rng = np.random.default_rng(4)

    def random(*shape):
        return rng.standard_normal(shape).astype(dtype)

    states = tuple(random(*shape) for shape in spec.state_shape(N))
    dstates = tuple(random(*shape) for shape in spec.state_shape(N))
    return spec, random(T, N, I), random(spec.layout.size), states, random(T, N, H), dstates


def forward_calls(mode):
    """Kinds of calls to prime an op with, in inference and in training."""
    spec, x, params, states, *_ = problem(mode)
    out = np.zeros((T, N, H), np.float32)
    for training in (False, True):
        plain = {"x": x, "params": params, "states": None, "training": training, "out": None}
        yield spec, plain
        yield spec, {**plain, "states": states}
        yield spec, {**plain, "states": states, "out": out, "params": frozen(params)}
        yield spec, {**plain, "x": _wide(x), "out": _wide(out)}


def backward_calls(mode):
    spec, x, params, states, dy, dstates = problem(mode)

    def buffers():
        return [np.ones_like(x), np.ones_like(params), tuple(np.ones_like(state) for state in states)]

    for request in ("write", "add", {"params": "add"}, {"x": "null"}, {"states": "null", "params": "null"}, "null"):
        plain = {"dy": dy, "dstates": None, "grad_req": request, "out": None}
        parsed = dict.fromkeys(("x", "params", "states"), request) if isinstance(request, str) else request
        kinds = [parsed.get(name, "write") for name in ("x", "params", "states")]
        some = [None if kind == "null" else buffer for kind, buffer in zip(kinds, buffers(), strict=True)]
        needed = [buffer if kind == "add" else None for kind, buffer in zip(kinds, buffers(), strict=True)]
        yield spec, {**plain, "out": needed}
        yield spec, {**plain, "dy": None, "dstates": dstates, "out": some}
        yield spec, {**plain, "dstates": (None, *dstates[1:]), "out": needed}


def perturbed(arguments):
    """The arguments with one of them changed, by the name of the change."""
    for name, value in arguments.items():
        if name == "grad_req":
            yield from ((f"{name}: {label}", {**arguments, name: other}) for label, other in REQUESTS.items())
        elif name == "training":
            for other in (not value, int(value), None, np.bool_(value), "yes"):
                yield f"{name}: {other!r}", {**arguments, name: other}
        elif isinstance(value, (tuple, list)):
            for label, change in TUPLES.items():
                yield f"{name}: {label}", {**arguments, name: change(tuple(value))}
            for index, entry in enumerate(value):
                for label, other in _changed(entry):
                    replaced = [*value]
                    replaced[index] = other
                    yield f"{name}[{index}]: {label}", {**arguments, name: type(value)(replaced)}
        else:
            yield from ((f"{name}: {label}", {**arguments, name: other}) for label, other in _changed(value))
    yield from _shared(arguments)


def _changed(value):
    if isinstance(value, np.ndarray):
        # A copy: views of the array itself would share memory with what other calls read.
        yield from ((label, change(value.copy())) for label, change in ARRAYS.items())
    elif isinstance(value, tuple):
        yield from ((label, change(value)) for label, change in TUPLES.items())
        for index, entry in enumerate(value):
            for label, other in _changed(entry):
                yield f"[{index}] {label}", (*value[:index], other, *value[index + 1 :])
    else:
        yield "array", np.ones((T, N, H), np.float32)
        yield "empty tuple", ()
        yield "None in a tuple", (None,)
        yield "number", 0


def _shared(arguments):
    """Buffers that share memory with what is read, and with each other."""
    out = arguments.get("out")
    if isinstance(out, np.ndarray):
        memory = np.zeros(2 * max(out.size, arguments["x"].size), np.float32)
        x = memory[: arguments["x"].size].reshape(arguments["x"].shape)
        x[...] = arguments["x"]
        yield "x and out overlap", {**arguments, "x": x, "out": memory[: out.size].reshape(out.shape)}
    if isinstance(out, list):
        dx, dparams, dstates = out
        if dstates is not None:
            yield "states twice", {**arguments, "out": [dx, dparams, (dstates[0],) * len(dstates)]}
            yield "dstates in place", {**arguments, "dstates": dstates}
        if dparams is not None and dx is not None:
            memory = np.ones(dparams.size + dx.size, np.float32)
            shared = [memory[: dx.size].reshape(dx.shape), memory[: dparams.size], dstates]
            yield "dx and dparams overlap", {**arguments, "out": shared}


def arrays_of(value):
    """All arrays in nested tuples and lists."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from arrays_of(entry)


def copied(value):
    """Copies of all arrays."""
    return [array.copy() for array in arrays_of(value)]


def outcome(op, method, arguments, reserve):
    """The result of a call, bits or error. Afterwards the buffers hold what they held before."""
    into = list(arrays_of(arguments.get("out")))
    before = copied(into)
    for array in into:
        if array.flags.writeable and array.dtype.kind == "f" and method == "forward":
            array[...] = np.nan  # so that an element that is not written shows
    junk = [np.full(size, 1e6, np.float32) for size in (T * N * I, T * N * H, op.spec.layout.size, 2 * N * H)]
    del junk  # so that adding to new memory shows
    try:
        result = op.forward(**arguments)[:2] if method == "forward" else op.backward(reserve=reserve, **arguments)
        return [None if array is None else bits(array).tolist() for array in _flat(result)]
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    finally:
        for array, content in zip(into, before, strict=True):
            if array.flags.writeable:
                array[...] = content


def _flat(result):
    for entry in result:
        if isinstance(entry, tuple):
            yield from entry
        else:
            yield entry


def reserve_of(op, mode):
    _, x, params, states, *_ = problem(mode)
    return op.forward(x, params, states, training=True)[2]


def check(mode, method, spec, arguments, changes):
    """Compare perturbed calls of a primed op with those of a fresh op, then repeat the call that primed it."""
    fresh_op = RNNOp(spec)
    fresh_reserve = reserve_of(fresh_op, mode) if method == "backward" else None
    op = RNNOp(spec)
    reserve = reserve_of(op, mode) if method == "backward" else None

    def fresh(these):
        fresh_op._call_cache = type(fresh_op._call_cache)()  # drops the cached calls and keeps the compiled code
        return outcome(fresh_op, method, these, fresh_reserve)

    reference = fresh(arguments)
    assert isinstance(reference, list), reference
    cached = 0
    for label, these in changes:
        for _ in range(PRIMING):
            assert outcome(op, method, arguments, reserve) == reference, f"before {label}"
        cached += any(getattr(op._call_cache, kind) is not None for kind in ("inference", "training", "backward"))
        expected = fresh(these)
        assert outcome(op, method, these, reserve) == expected, label
        assert outcome(op, method, these, reserve) == expected, f"{label}, again"
        assert outcome(op, method, arguments, reserve) == reference, f"after {label}"
    return cached


@pytest.mark.parametrize(("mode", "threads"), CASES)
def test_forward(mode, threads):
    with fusedrnn.thread_limits(threads):
        cached = sum(check(mode, "forward", spec, these, perturbed(these)) for spec, these in forward_calls(mode))
    assert cached > 100


@pytest.mark.parametrize(("mode", "threads"), CASES)
def test_backward(mode, threads):
    with fusedrnn.thread_limits(threads):
        cached = sum(check(mode, "backward", spec, these, perturbed(these)) for spec, these in backward_calls(mode))
    assert cached > 100


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_calls_of_all_kinds_in_any_order(mode, seed):
    """Calls of every kind on one op, perturbed or not: none depends on the calls before it."""
    rng = np.random.default_rng(seed)
    kinds = [("forward", these) for _, these in forward_calls(mode)]
    kinds += [("backward", these) for _, these in backward_calls(mode)]
    calls = [(method, label, other) for method, these in kinds for label, other in (("", these), *perturbed(these))]
    spec = problem(mode)[0]
    op, fresh_op = RNNOp(spec), RNNOp(spec)
    reserve, fresh_reserve = reserve_of(op, mode), reserve_of(fresh_op, mode)
    for number in rng.integers(len(calls), size=150):
        method, label, these = calls[number]
        for _ in range(rng.integers(1, 5)):
            fresh_op._call_cache = type(fresh_op._call_cache)()
            expected = outcome(fresh_op, method, these, fresh_reserve)
            assert outcome(op, method, these, reserve) == expected, f"{method} {label}"
