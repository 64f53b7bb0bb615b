"""The flat vector of matrices in other orders: the machine code against JAX's own operations, and its derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from fusedrnn import RNNSpec
from fusedrnn.jax import param_arrays, rnn
from fusedrnn.jax.array_layout import ArrayLayout, Piece
from fusedrnn.jax.param_arrays import ParamArrays, flatten, unflatten
from jax_versions import enable_x64

# The columns of two matrices in three parts, in another order, and those of a vector: sizes around those of squares.
SIZES = [(1, 1), (3, 7), (8, 8), (16, 16), (17, 33), (40, 15), (65, 100)]


def problem(rows, columns, dtype):
    rng = np.random.default_rng(rows)
    shapes = (rows, 3 * columns), (columns, 3 * rows), (3 * columns,)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    sizes = columns, rows, columns
    pieces = [Piece(array, part * sizes[array], sizes[array]) for array in (1, 0, 2) for part in (2, 0, 1)]
    return arrays, ArrayLayout(shapes, tuple(pieces))


def expected_of(arrays, layout):
    return np.concatenate([arrays[p.array][..., p.column : p.column + p.columns].T.ravel() for p in layout.pieces])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_and_back(size, dtype):
    with enable_x64(dtype == "float64"):
        arrays, layout = problem(*size, dtype)
        for wrap in (jax.jit, lambda run: run):
            flat = wrap(lambda *arrays: flatten(arrays, layout))(*arrays)
            np.testing.assert_array_equal(flat, expected_of(arrays, layout))
            back = wrap(lambda flat: unflatten(flat, layout))(flat)
            for array, own in zip(arrays, back, strict=True):
                np.testing.assert_array_equal(own, array)


def test_bits_of_values_that_are_no_numbers():
    array = np.array([[0x7FA00001, 0xFFC00002], [0x7F800000, 0x80000000]] * 16, np.uint32)
    layout = ArrayLayout((array.shape,), (Piece(0, 0, 2),))
    flat = jax.jit(lambda array: flatten([array], layout))(jnp.asarray(array.view("f4")))
    np.testing.assert_array_equal(np.asarray(flat).view("u4"), array.T.ravel())


def test_derivatives():
    arrays, layout = problem(5, 18, "float32")
    plain = partial(param_arrays._flatten_anywhere, layout=layout)

    def gradients(flat):
        return jax.grad(lambda own: (flat(*own) ** 3).sum())

    def second(flat):
        return jax.grad(lambda own: sum((array**2).sum() for array in gradients(flat)(own)))

    for transform in (gradients, second):
        actual, expected = (jax.jit(transform(flat))(arrays) for flat in (lambda *own: flatten(own, layout), plain))
        for array, other in zip(actual, expected, strict=True):
            np.testing.assert_allclose(array, other, rtol=1e-5)


def test_derivatives_of_some():
    arrays, layout = problem(5, 18, "float32")

    def flat(array):
        return flatten([array, *arrays[1:]], layout)

    tangent = np.ones_like(arrays[0])
    others = [np.zeros_like(array) for array in arrays[1:]]
    np.testing.assert_array_equal(jax.jvp(flat, (arrays[0],), (tangent,))[1], expected_of([tangent, *others], layout))
    np.testing.assert_array_equal(jax.grad(lambda array: flat(array).sum())(arrays[0]), tangent)


def test_mapped():
    arrays, layout = problem(5, 18, "float32")
    many = [np.stack([array, 2 * array]) for array in arrays]
    flat = jax.vmap(lambda *arrays: flatten(arrays, layout))(*many)
    np.testing.assert_array_equal(flat, np.stack([factor * expected_of(arrays, layout) for factor in (1, 2)]))
    gradients = jax.vmap(jax.grad(lambda array: (flatten([array, *arrays[1:]], layout) ** 2).sum()))(many[0])
    np.testing.assert_allclose(gradients, 2 * many[0], rtol=1e-6)


def test_another_process_needs_no_call_of_the_first(monkeypatch):
    from fusedrnn.jax import calls

    arrays, layout = problem(6, 21, "float32")
    checks = [export.DisabledSafetyCheck.custom_call("fusedrnn_call")]
    run = jax.jit(lambda *arrays: flatten(arrays, layout))
    exported = export.export(run, disabled_checks=checks)(*arrays)
    again = export.deserialize(exported.serialize())
    monkeypatch.setattr(calls, "_known", {})
    np.testing.assert_array_equal(again.call(*arrays), expected_of(arrays, layout))


@pytest.mark.parametrize("steps", [2, 40])
@pytest.mark.parametrize("mode", ["lstm", "gru"])
def test_calls_on_arrays_have_the_bits_of_calls_on_the_vector(mode, steps):
    """Of more parameter vectors than are kept, twice each; the first ones change while another call has their place."""
    spec = RNNSpec(mode, 3, 5, bidirectional=True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((steps, 4, 3)), jnp.float32)
    order = [spec.layout.entry(0, direction, kind) for direction in (1, 0) for kind in spec.layout.kinds]
    numbers = {entry.name: number for number, entry in enumerate(order)}
    pieces = [Piece(numbers[entry.name], 0, entry.shape[0]) for entry in spec.layout]

    def loss(x, params):
        y, final = rnn(spec, params, x)
        return (y**2).sum(), (y, final)

    @jax.jit
    def on_arrays(x, arrays):
        return jax.value_and_grad(lambda x, own: loss(x, ParamArrays.of(own, pieces)), (0, 1), has_aux=True)(x, arrays)

    on_vector = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    for seed in (*range(6), *range(6)):
        flat = np.random.default_rng(seed).uniform(-0.5, 0.5, spec.layout.size).astype("f4")
        values = spec.layout.unpack(flat)
        arrays = tuple(np.ascontiguousarray(values[entry.name].T) for entry in order)
        actual, (dx, parts) = on_arrays(x, arrays)
        expected, (dx_expected, dflat) = on_vector(x, flat)
        gradients = spec.layout.unpack(np.asarray(dflat))
        parts_expected = [gradients[entry.name].T for entry in order]
        pairs = zip(*map(jax.tree.leaves, ((actual, dx, parts), (expected, dx_expected, parts_expected))), strict=True)
        for array, other in pairs:
            np.testing.assert_array_equal(array, other)


def test_more_arrays_than_a_call_takes():
    spec = RNNSpec("rnn_tanh", 3, 5)
    vectors = [jnp.ones(1) for _ in range(spec.layout.size)]
    params = ParamArrays.of(vectors, [Piece(number, 0, 1) for number in range(len(vectors))])
    with pytest.raises(Exception, match="at most 32 arrays; there are 50"):
        rnn(spec, params, jnp.ones((2, 1, 3)))


def test_arrays_of_another_network():
    """They are refused, as the kernels would read beyond their end."""
    spec = RNNSpec("rnn_tanh", 3, 5)
    whole, array = Piece(0, 0, 50), jnp.ones(50)
    cases = [
        (ParamArrays.of([array[1:]], [Piece(0, 0, 49)]), ValueError, "must have 50 elements; got 49"),
        (ParamArrays((array[1:],), ArrayLayout(((50,),), (whole,))), ValueError, r"the shapes .*; got \(\(49,\),\)"),
        (ParamArrays.of([array.astype(jnp.float16)], [whole]), TypeError, "must have dtype float32; got float16"),
        (ParamArrays((array[1:],), None), ValueError, r"params must have shape \(50\); got \(49,\)"),
    ]
    for params, kind, message in cases:
        with pytest.raises(kind, match=message):
            rnn(spec, params, jnp.ones((2, 1, 3)))


@pytest.mark.parametrize("count", [63, 64])
def test_as_many_arrays_as_a_vector_is_made_of(count):
    layout = ArrayLayout(((1,),) * count, tuple(Piece(number, 0, 1) for number in range(count)))
    vectors = [jnp.full(1, number, jnp.float32) for number in range(count)]
    if count == 63:
        np.testing.assert_array_equal(flatten(vectors, layout), np.arange(63))
    else:
        with pytest.raises(Exception, match="made of more than 63 arrays"):
            flatten(vectors, layout)
