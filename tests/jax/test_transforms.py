"""What JAX does to functions: jit, grad of any order, vmap, scan, pmap, donation, export; and calls from threads."""

import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import fusedrnn
from fusedrnn import Activation, RNNOp, RNNSpec, cells
from fusedrnn.cell import absolute, cell, clip, maximum, minimum
from fusedrnn.cell.activations import ACTIVATIONS
from fusedrnn.engines.cpu.reserve_layout import ReserveLayout
from fusedrnn.engines.cpu.tiling import Tiling
from fusedrnn.jax import composed, rnn
from fusedrnn.jax.call_table import reserve_size
from fusedrnn.jax.calls import Call
from fusedrnn.jax.primitives import rnn_p
from fusedrnn.jit import target as target_module
from jax_versions import enable_x64
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, make_problem, problem_of

SOURCE = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
SHAPE = Shape(7, 4, 5, 9, layers=2, bidirectional=True, lengths="edges")
SPEC = SHAPE.spec("lstm")


@pytest.fixture(scope="module")
def problem():
    return make_problem("lstm", SHAPE)


def test_heads_without_kernels():
    """They run as a scan of JAX's operations, forward, backward, and the derivative of backward."""
    shape = Shape(5, 3, 4, 10, lengths="edges")
    problem = problem_of(shape.spec(cells.slstm.with_heads(2)), shape)
    op = RNNOp(problem.spec, backend="reference")
    outputs = op.forward(problem.x, problem.params, problem.states, training=True, lengths=problem.lengths)
    expected = op.backward(problem.dy, problem.dstates, outputs[2])
    run = partial(rnn, problem.spec, lengths=problem.lengths)
    with pytest.warns(UserWarning, match="a multiple of 16 units .* it runs as a scan of JAX's operations"):
        results = jax.jit(run)(problem.params, problem.x, problem.states)
        assert_close(in_numpy(results), outputs, "float32", problem.spec)
        _, vjp = jax.vjp(lambda x, params, states: run(params, x, states), problem.x, problem.params, problem.states)
        gradients = vjp((jnp.asarray(problem.dy), tuple(map(jnp.asarray, problem.dstates))))
        assert_gradients(gradients, expected, problem.spec, shape)
        second = jax.grad(lambda x: jnp.sum(jax.grad(lambda x: jnp.sum(run(problem.params, x)[0]))(x) ** 2))(problem.x)
    assert np.isfinite(second).all() and np.any(second)


def in_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def assert_gradients(actual, expected, spec=SPEC, shape=SHAPE):
    """The gradients of (x, params, states) within the tolerance."""
    assert_gradients_close(in_numpy(actual), in_numpy(expected), spec.dtype, spec, shape.T, shape.N)


def loss(problem, x, params, states, resets=None, run=rnn):
    y, final = run(problem.spec, params, x, states, problem.lengths, resets)
    return (y * problem.dy).sum() + sum((a * b).sum() for a, b in zip(final, problem.dstates, strict=True))


def by_scan(spec, params, x, states=None, lengths=None, resets=None):
    """The same network as a scan of the cell's equations."""
    y, *final = composed.forward(spec, x, params, states, lengths, resets)
    return y, tuple(final)


def test_jit_has_the_bits_of_the_operator(problem):
    resets = np.random.default_rng(0).random((7, 4)) < 0.3
    resets &= ~problem.padding
    expected = RNNOp(SPEC).forward(problem.x, problem.params, problem.states, lengths=problem.lengths, resets=resets)
    run = jax.jit(partial(rnn, SPEC))
    for _ in range(3):
        y, final = run(problem.params, problem.x, problem.states, problem.lengths, resets)
        for array, other in zip((y, *final), (expected[0], *expected[1]), strict=True):
            np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("mode", ["lstm", "gru", "rnn_tanh"])
def test_resets_and_gradients_against_the_scan(mode):
    problem = make_problem(mode, SHAPE)
    resets = np.random.default_rng(1).random((7, 4)) < 0.3
    arguments = problem.x, problem.params, problem.states
    actual, expected = (
        jax.jit(jax.grad(partial(loss, problem, resets=resets, run=run), (0, 1, 2)))(*arguments)
        for run in (rnn, by_scan)
    )
    assert_gradients(actual, expected, problem.spec)


@pytest.mark.parametrize("mode", ["gru", "rnn_tanh"])
def test_derivatives_of_derivatives(mode):
    """The second one of a GRU, and the third one of a vanilla network."""
    shape = Shape(2, 2, 3, 4)
    with enable_x64():
        problem = make_problem(mode, shape, "float64")

        def squares(function):
            def of_gradients(*arguments):
                gradients = jax.grad(function, (0, 1, 2))(*arguments)
                return sum((gradient**2).sum() for gradient in jax.tree.leaves(gradients))

            return of_gradients

        def derivative(run):
            function = squares(partial(loss, problem, run=run))
            if mode == "rnn_tanh":
                function = squares(function)
            return jax.jit(jax.grad(function, (0, 1, 2)))(problem.x, problem.params, problem.states)

        actual, expected = derivative(rnn), derivative(by_scan)
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-9, atol=1e-9 * np.abs(other).max())


RANKS = {
    "lstm": replace(SPEC, residual="projection", dropout=0.5, input_dropout=0.2),
    "peepholes": RNNSpec("lstm", 5, 9, peepholes=True, projection_size=4, compute="bfloat16"),
    "parameters": RNNSpec(cells.fast_grnn, 5, 9),
    "means": RNNSpec(cells.layer_norm_gru, 5, 9),
    "masks": RNNSpec(cells.zoneout_lstm, 5, 9),
    "heads": RNNSpec(cells.flash_lstm.with_heads(2), 5, 32),
}


@pytest.mark.parametrize("name", RANKS)
def test_no_promotion_of_ranks(name):
    """Traced alone, as JAX refuses such operations there."""
    spec = RANKS[name]
    x, params, lengths = jnp.ones((7, 4, 5)), jnp.zeros(spec.layout.size), jnp.array([7, 0, 3, 1])
    resets, states = jnp.zeros((7, 4), bool), [jnp.zeros(shape) for shape in spec.state_shape(4)]

    def total(x, params, states, key=None):
        return sum(leaf.sum() for leaf in jax.tree.leaves(rnn(spec, params, x, states, lengths, resets, key=key)))

    def curvature(params, key):
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(x, params, states, key)))

    with jax.numpy_rank_promotion("raise"):
        for key in (None, jax.random.key(0)):
            jax.eval_shape(partial(total, key=key), x, params, states)
            jax.eval_shape(jax.grad(curvature), params, key)
        mapped = jax.vmap(lambda params, x: rnn(spec, params, x, None, lengths, resets.T, batch_first=True)[0])
        assert jax.eval_shape(mapped, params[None], x.swapaxes(0, 1)[None]).shape == (1, 4, 7, spec.output_size)


@cell(gates="a")
def bounded(x, recurrent, s):
    return clip(minimum(maximum(x.a, -1.0), 2.0 * x.a), -0.5, 2.0) + absolute(x.a) + 0.0 * recurrent(s.h).a


def affine(mode, count, **options):
    return RNNSpec(mode, 1, 1, bias="none", activations=(Activation("affine"),) * count, **options)


KINKS = {
    **{
        name: RNNSpec("rnn_tanh", 1, 1, bias="none", activations=(activation,))
        for name, activation in {
            **{name: Activation(name) for name, function in ACTIVATIONS.items() if function.kink},
            "hard_sigmoid": Activation("hard_sigmoid", 0.5, 0.5),
        }.items()
    },
    "gates": affine("rnn_tanh", 1, gate_clip=1.0),
    "state": affine("lstm", 3, state_clip_min=-1.0, state_clip_max=1.0),
    "state and NaN": affine("lstm", 3, state_clip_min=-1.0, state_clip_max=1.0, state_clip_nan=True),
    "cell": RNNSpec(bounded, 1, 1, bias="none"),
}


@pytest.mark.parametrize("name", KINKS)
def test_derivatives_at_kinks_are_those_of_the_kernels(name):
    """So that second derivatives, and gradients on other devices, fit to the gradients of the kernels."""
    spec, x = KINKS[name], jnp.array([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])[None, :, None]
    kinds = spec.layout.kinds
    params = jnp.concatenate([
        jnp.full(spec.layout.entry(0, 0, kind).size, float(kind == "i2h_weight")) for kind in kinds
    ])  # fmt: skip
    kernels, scan = (jax.grad(lambda x, run=run: run(spec, params, x)[0].sum())(x) for run in (rnn, by_scan))
    np.testing.assert_allclose(scan.ravel(), kernels.ravel(), rtol=1e-6)


def test_the_second_derivative_of_softplus_at_zero():
    spec = RNNSpec("rnn_tanh", 1, 1, bias="none", activations=(Activation("softplus"),))
    params = jnp.array([1.0, 0.0])
    second = jax.grad(jax.grad(lambda x: rnn(spec, params, x.reshape(1, 1, 1))[0].sum()))
    np.testing.assert_allclose([second(0.0), second(1.0)], [0.25, 0.19661193], rtol=1e-6)


def test_vmap_over_the_batch_is_one_call(problem):
    xs = np.random.default_rng(2).standard_normal((3, *problem.x.shape)).astype(np.float32)
    mapped = jax.vmap(lambda x: rnn(SPEC, problem.params, x, problem.states, problem.lengths))
    assert str(jax.make_jaxpr(mapped)(xs)).count("fusedrnn[") == 1
    y, final = mapped(xs)
    for index, x in enumerate(xs):
        own_y, own_final = rnn(SPEC, problem.params, x, problem.states, problem.lengths)
        np.testing.assert_array_equal(y[index], own_y)
        for array, other in zip(final, own_final, strict=True):
            np.testing.assert_array_equal(array[index], other)


def test_vmap_over_nothing(problem):
    def run(x):
        return rnn(SPEC, problem.params, x, problem.states, problem.lengths)

    def total(x):
        return run(x)[0].sum()

    xs = jnp.zeros((0, *problem.x.shape))
    y, final = jax.vmap(run)(xs)
    assert (y.shape, final[0].shape) == ((0, 7, 4, SPEC.output_size), (0, 4, 4, 9))
    assert jax.vmap(jax.grad(total))(xs).shape == jax.grad(lambda xs: jax.vmap(total)(xs).sum())(xs).shape == xs.shape


def test_vmap_of_everything_in_any_axis(problem):
    rng = np.random.default_rng(3)
    params = rng.uniform(-0.3, 0.3, (SPEC.layout.size, 2)).astype(np.float32)
    xs = np.stack([problem.x, -problem.x], axis=2)
    lengths = np.stack([problem.lengths, problem.lengths[::-1]])
    mapped = jax.vmap(lambda p, x, n: rnn(SPEC, p, x, problem.states, n), in_axes=(1, 2, 0))(params, xs, lengths)
    for index in range(2):
        own = rnn(SPEC, params[:, index], xs[:, :, index], problem.states, lengths[index])
        for array, other in zip(jax.tree.leaves(mapped), jax.tree.leaves(own), strict=True):
            np.testing.assert_array_equal(array[index], other)


def test_grad_of_vmap_and_vmap_of_grad(problem):
    xs = np.stack([problem.x, 2 * problem.x, -problem.x])

    def total(params, states):
        return jax.vmap(lambda x: loss(problem, x, params, states))(xs).sum()

    one_by_one = [jax.grad(partial(loss, problem), (0, 1, 2))(x, problem.params, problem.states) for x in xs]
    _, dparams, dstates = jax.tree.map(lambda *leaves: sum(leaves), *one_by_one)
    joined = jax.grad(total, (0, 1))(problem.params, problem.states)
    assert_gradients((xs[0], *joined), (xs[0], dparams, dstates), shape=replace(SHAPE, N=12))
    each = jax.vmap(lambda x: jax.grad(partial(loss, problem), (0, 1, 2))(x, problem.params, problem.states))(xs)
    for index, other in enumerate(one_by_one):
        assert_same_bits(in_numpy(jax.tree.map(lambda leaf, index=index: leaf[index], each)), in_numpy(other))


def test_scan_around_the_call(problem):
    """A sequence in pieces of one step, its states carried by a scan, and the gradient through that."""
    shape = replace(SHAPE, bidirectional=False)
    spec = shape.spec("gru")
    whole = problem_of(spec, shape)

    def run(params, x):
        def step(states, piece):
            y, states = rnn(spec, params, piece[None], states)
            return states, y[0]

        final, y = jax.lax.scan(step, whole.states, x)
        return y, final

    expected = rnn(spec, whole.params, whole.x, whole.states)
    actual = jax.jit(run)(whole.params, whole.x)
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(array, other)
    gradients, other = (
        jax.grad(lambda x, params, f=f: (f(params, x)[0] * whole.dy).sum(), (0, 1))(whole.x, whole.params)
        for f in (run, lambda params, x: rnn(spec, params, x, whole.states))
    )
    assert_gradients((*gradients, whole.states), (*other, whole.states), spec, shape)


def test_checkpoint_and_donation(problem):
    arguments = problem.x, problem.params, problem.states
    plain, remat = (
        jax.jit(jax.grad(f, (0, 1, 2)))(*arguments)
        for f in (partial(loss, problem), jax.checkpoint(partial(loss, problem)))
    )
    assert_same_bits(in_numpy(remat), in_numpy(plain))

    def update(params):
        return params - 0.1 * jax.grad(lambda p: loss(problem, problem.x, p, None))(params)

    kept, donated = jnp.asarray(problem.params), jnp.array(problem.params)
    for _ in range(3):
        kept, donated = jax.jit(update)(kept), jax.jit(update, donate_argnums=0)(donated)
    np.testing.assert_array_equal(kept, donated)


def test_disabled_jit():
    """The kernels are compiled nonetheless; vmap and the second derivative are operations of JAX."""
    spec = RNNSpec("gru", 3, 4)
    problem = problem_of(spec, Shape(3, 2, 3, 4))

    def total(params):
        return (rnn(spec, params, problem.x)[0] ** 2).sum()

    def curvature(params):
        return (jax.grad(total)(params) ** 2).sum()

    params = np.stack([problem.params, -problem.params])
    functions = total, jax.grad(total), jax.grad(curvature), lambda _: jax.vmap(total)(params)
    expected = [function(params[0]) for function in functions]
    with jax.disable_jit():
        actual = [function(params[0]) for function in functions]
    for array, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-4, atol=1e-5)


def test_two_python_threads_dispatch_at_once(problem):
    run = jax.jit(jax.value_and_grad(partial(loss, problem)))
    expected = run(problem.x, problem.params, problem.states)
    errors = []

    def loop():
        try:
            for _ in range(20):
                actual = run(problem.x, problem.params, problem.states)
                for array, other in zip(actual, expected, strict=True):
                    np.testing.assert_array_equal(array, other)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=loop) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors


def test_number_of_threads_of_the_process_counts(problem, use_all_threads):
    """It may change between calls of a compiled function; the bits stay."""
    run = jax.jit(partial(rnn, SPEC))
    expected = run(problem.params, problem.x)
    before = fusedrnn.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            fusedrnn.set_num_threads(threads)
            for array, other in zip(
                jax.tree.leaves(run(problem.params, problem.x)), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_array_equal(array, other)
    finally:
        fusedrnn.set_num_threads(before)


def test_more_shapes_than_are_kept():
    from fusedrnn.jax import call_table

    spec = RNNSpec("rnn_tanh", 2, 3)
    params = jnp.ones(spec.layout.size)
    rnn(spec, params, jnp.ones((1, 1, 2)))
    (table,) = call_table._immortal
    for steps in range(1, call_table._MAX_CALLS + 20):
        table._prepare_call(*_described(spec), steps, 1)
    assert len(table._calls) <= call_table._MAX_CALLS
    y, _ = rnn(spec, params, jnp.ones((3, 1, 2)))
    np.testing.assert_array_equal(y, RNNOp(spec).forward(np.ones((3, 1, 2), "f4"), np.asarray(params))[0])


def _described(spec):
    from fusedrnn.jax.calls import Call, NetworkJob, describe

    return describe(NetworkJob(Call(spec), "forward", None))


def in_process(code, *arguments):
    """What Python prints that runs this code."""
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=SOURCE)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


EXPORTED = """
import sys
import numpy as np
from jax import export
with open(sys.argv[1], "rb") as file:
    exported = export.deserialize(bytearray(file.read()))
import fusedrnn.jax
from fusedrnn import RNNOp, RNNSpec
spec = RNNSpec("gru", 3, 5)
rng = np.random.default_rng(0)
params = rng.uniform(-1, 1, spec.layout.size).astype("f4")
for shape in ((4, 2, 3), (9, 1, 3)):
    x = rng.standard_normal(shape).astype("f4")
    np.testing.assert_array_equal(exported.call(params, x), RNNOp(spec).forward(x, params)[0])
print("equal")
"""


def test_export_to_another_process(tmp_path):
    """With symbolic sizes; the call names its network, not an address."""
    spec = RNNSpec("gru", 3, 5)
    shape = export.symbolic_shape("t, n, 3")
    function = exported(lambda params, x: rnn(spec, params, x)[0], ((spec.layout.size,), "f4"), (shape, "f4"))
    file = tmp_path / "exported"
    file.write_bytes(function.serialize())
    assert in_process(EXPORTED, str(file)) == "equal"


def exported(function, *shapes):
    from fusedrnn.jax.call_table import TARGET_NAME

    checks = [export.DisabledSafetyCheck.custom_call(TARGET_NAME)]
    return export.export(jax.jit(function), disabled_checks=checks)(*(jax.ShapeDtypeStruct(*own) for own in shapes))


@pytest.mark.parametrize("spec", [
    RNNSpec("lstm", 8, 5), RNNSpec("gru", 8, 40, 2, bidirectional=True), RNNSpec(cells.layer_norm_lstm, 3, 17),
    RNNSpec(cells.slstm, 3, 33, dtype="float64"), RNNSpec("lstm", 3, 70, projection_size=9, compute="bfloat16"),
], ids=lambda spec: spec.mode_name)  # fmt: skip
def test_an_exported_gradient_has_a_reserve_for_any_processor(spec):
    """The size in the program is that of the widest target, and the processor that runs it may be any."""
    for steps, batch in ((1, 1), (7, 3), (100, 16)):
        size = reserve_size(Call(spec), steps, batch)
        for target in (*target_module._X86, *target_module._ARM):
            assert ReserveLayout.of(Tiling(spec, target), steps, batch, "gates").size <= size, target


def test_export_of_gradients_with_symbolic_sizes():
    spec = RNNSpec("gru", 3, 5, 2)
    rng = np.random.default_rng(0)
    params = rng.uniform(-1, 1, spec.layout.size).astype("f4")

    def loss(params, x, lengths):
        y, (h_n,) = rnn(spec, params, x, lengths=lengths)
        return (y**2).sum() + (h_n**3).sum()

    gradients = jax.grad(loss, (0, 1))
    t, n = export.symbolic_shape("t, n")
    restored = export.deserialize(
        exported(gradients, (params.shape, "f4"), ((t, n, 3), "f4"), ((n,), "i4")).serialize()
    )
    for steps, batch in ((1, 1), (6, 4), (40, 33)):
        x = rng.standard_normal((steps, batch, 3)).astype("f4")
        lengths = rng.integers(0, steps + 1, batch).astype("i4")
        for array, other in zip(restored.call(params, x, lengths), gradients(params, x, lengths), strict=True):
            np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5)


def test_export_of_constant_lengths_with_a_symbolic_number_of_steps():
    """The call compares them with the number of steps, the export with 0 alone."""
    spec = RNNSpec("gru", 3, 5)
    params = np.full(spec.layout.size, 0.1, "f4")
    (t,) = export.symbolic_shape("t")

    def run(lengths):
        return exported(
            lambda params, x: rnn(spec, params, x, lengths=lengths)[0], (params.shape, "f4"), ((t, 2, 3), "f4")
        )

    for lengths in (jnp.array([4, 0]), np.array([4, 0])):
        function = run(lengths)
        for steps in (4, 9):
            x = np.ones((steps, 2, 3), "f4")
            np.testing.assert_array_equal(function.call(params, x), rnn(spec, params, x, lengths=lengths)[0])
        with pytest.raises(jax.errors.JaxRuntimeError, match="lengths must be from 0 to the number of steps"):
            jax.block_until_ready(function.call(params, np.ones((3, 2, 3), "f4")))
    with pytest.raises(ValueError, match=r"each of lengths must be from 0 to t; got \[-1  4\]"):
        run(np.array([-1, 4]))


PMAP = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from fusedrnn import RNNOp, RNNSpec
from fusedrnn.jax import rnn
assert jax.device_count() == 2
spec = RNNSpec("lstm", 8, 24, num_layers=2)
rng = np.random.default_rng(0)
params = rng.uniform(-1, 1, spec.layout.size).astype("f4")
xs = rng.standard_normal((2, 9, 4, 8)).astype("f4")
run = jax.pmap(jax.value_and_grad(lambda p, x: rnn(spec, p, x)[0].sum()), in_axes=(None, 0))
for _ in range(5):
    values, gradients = run(params, xs)
for x, gradient in zip(xs, gradients):
    np.testing.assert_array_equal(gradient, jax.grad(lambda p: rnn(spec, p, x)[0].sum())(params))
print("equal")
"""


def test_pmap_on_two_devices():
    assert in_process(PMAP) == "equal"


@pytest.mark.parametrize("cell", ["layer_norm_lstm", "slstm", "sru", "min_gru_log", "ind_rnn", "zoneout_gru", "ran"])
def test_catalogue_against_the_scan(cell):
    """Cells with reductions, heads, raw input, three states, diagonal recurrence, masks and an output of their own."""
    spec = RNNSpec(getattr(cells, cell), 16, 16, num_layers=2)
    shape = Shape(5, 3, 16, 16, layers=2, lengths="edges")
    problem = problem_of(spec, shape)
    arguments = problem.x, problem.params, problem.states
    actual, expected = (
        jax.jit(jax.grad(partial(loss, problem, run=run), (0, 1, 2)))(*arguments) for run in (rnn, by_scan)
    )
    assert_gradients(actual, expected, spec, shape)


@pytest.mark.parametrize("spec", [
    RNNSpec("rnn_tanh", 5, 9, 2, dropout=0.5), RNNSpec("gru", 5, 9, input_dropout=0.5),
    RNNSpec(cells.zoneout_lstm.with_rates(c=0.5, h=0.2), 5, 9),
], ids=["between", "input", "two masks of a cell"])  # fmt: skip
def test_dropout_masks_are_those_of_the_scan(spec):
    problem = problem_of(spec, Shape(6, 3, 5, 9, layers=2))
    key = jax.random.key(3)
    seed = jax.random.bits(key, (2,), "uint32")

    def run_rnn(params, x):
        return rnn(spec, params, x, key=key)

    @jax.jit
    def run_scan(params, x):
        y, *final = composed.forward(spec, x, params, seed=seed)
        return y, tuple(final)

    y, final = in_numpy(run_rnn(problem.params, problem.x))
    assert_close((y, final), in_numpy(run_scan(problem.params, problem.x)), "float32", spec)
    gradients, expected = (
        jax.grad(lambda x, params, run=run: (run(params, x)[0] * problem.dy).sum(), (0, 1))(problem.x, problem.params)
        for run in (run_rnn, run_scan)
    )
    shape = Shape(6, 3, 5, 9)
    assert_gradients((*gradients, problem.states), (*expected, problem.states), spec, shape)
    without = rnn(spec, problem.params, problem.x)[0]
    assert np.abs(y - without).max() > 0.01


def test_bfloat16_and_integer_formats():
    shape = Shape(6, 3, 24, 40)
    for compute in ("bfloat16", "int8", "int8_weights"):
        spec = replace(shape.spec("lstm"), compute=compute)
        problem = problem_of(spec, shape)
        y, _ = jax.jit(partial(rnn, spec))(problem.params, problem.x)
        np.testing.assert_array_equal(y, RNNOp(spec).forward(problem.x, problem.params)[0])
    with pytest.raises(NotImplementedError, match=r"compute='int8_weights'.*no gradients"):
        jax.grad(lambda p: rnn(spec, p, problem.x)[0].sum())(problem.params)


def test_other_devices_get_a_scan():
    """The lowering for a platform without our kernels has no call of ours."""
    function = export.export(jax.jit(partial(rnn, SPEC)), platforms=["cuda"])(
        jax.ShapeDtypeStruct((SPEC.layout.size,), "f4"), jax.ShapeDtypeStruct((7, 4, 5), "f4")
    )
    text = function.mlir_module()
    assert "stablehlo.while" in text and "custom_call" not in text


def test_the_primitive_is_named():
    assert rnn_p.name == "fusedrnn"
