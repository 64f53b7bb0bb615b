"""``jax.shard_map``: gradients are those of the scan and of one device, and results vary as the operands do.

Each test is a process of its own, since JAX has two devices only if a flag was set before it started.
"""

import os
import subprocess
import sys

import jax
import pytest

pytestmark = pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no types that vary")

BEGIN = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.export, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from fusedrnn import RNNSpec
from fusedrnn.jax import composed, rnn

jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,))
T, N, I, H = 5, 4, 3, 4
spec = RNNSpec("gru", I, H, dtype="float64", bidirectional=True)
params, x = rng.uniform(-0.5, 0.5, spec.layout.size), rng.standard_normal((T, N, I))
states = rng.standard_normal((2, N, H))
lengths = np.array([5, 0, 3, 1])
COLUMNS = P(None, "b")

def sharded(function, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))

def assert_close(actual, expected):
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-9, atol=1e-11)
"""


def run(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_gradients_of_operands_that_do_not_vary():
    """Parameters and states have one value, the input has a part on each device."""
    run("""
def by_scan(spec, params, x, states=None, lengths=None):
    y, *final = composed.forward(spec, x, params, states, lengths)
    return y, tuple(final)

def loss(run):
    def of_part(params, x, h, lengths):
        y, (h_n,) = run(spec, params, x, (jnp.broadcast_to(h, (2, x.shape[1], H)),), lengths)
        return (y**2).sum() + (h_n**3).sum()
    return of_part

h = states[:, :1]
expected = jax.jit(jax.grad(loss(by_scan), (0, 1, 2)))(params, x, h, lengths)
in_specs = P(), COLUMNS, P(), P("b")
inside = sharded(jax.grad(loss(rnn), (0, 1, 2)), in_specs, (P(), COLUMNS, P()))
assert_close(inside(params, x, h, lengths), expected)
parts = sharded(lambda *operands: loss(rnn)(*operands)[None], in_specs, P("b"))
assert_close(jax.grad(lambda *floats: parts(*floats, lengths).sum(), (0, 1, 2))(params, x, h), expected)
# On other devices.
exported = jax.export.export(inside, platforms=["cuda"])(params, x, h, lengths)
assert "custom_call @fusedrnn" not in exported.mlir_module()
""")


def test_which_operands_vary():
    """Any one of them: the results vary, and are not taken for replicated ones."""
    run("""
def results(params, x, states, lengths):
    return rnn(spec, params, x, (states,), lengths)[0]

several = [
    np.stack([array, array[::-1]]) if array is lengths else np.stack([array, 2 * array])
    for array in (params, x, states, lengths)
]
ones = [array[0] for array in several]
for varying in range(4):
    operands = [array if index == varying else ones[index] for index, array in enumerate(several)]
    in_specs = tuple(P("b") if index == varying else P() for index in range(4))

    def part(*operands):
        return results(*[array[0] if index == varying else array for index, array in enumerate(operands)])[None]

    expected = [results(*[a[d] if i == varying else a for i, a in enumerate(operands)]) for d in range(2)]
    assert_close(sharded(part, in_specs, P("b"))(*operands), np.stack(expected))
    try:
        sharded(part, in_specs, P())(*operands)
    except ValueError:
        continue
    raise AssertionError(varying)
sharded(results, (P(),) * 4, P())(*ones)  # nothing varies

if hasattr(jax.lax, "pcast"):
    def of_terms(params, x):
        return rnn(spec, params, jax.lax.pcast(x, "b", to="unreduced"))[0]

    try:
        sharded(of_terms, (P(), COLUMNS), P())(params, x)
    except ValueError as error:
        assert "an operand is unreduced" in str(error)
    else:
        raise AssertionError
""")


def test_derivatives_of_derivatives_and_vmap():
    run("""
def squares(params, x):
    return (rnn(spec, params, x, lengths=jnp.full(x.shape[1], 4))[0] ** 2).sum()

def curvature(params, x):
    return (jax.grad(squares)(params, x) ** 2).sum()

expected = jax.jit(jax.grad(curvature))(params, x)
assert_close(sharded(jax.grad(curvature), (P(), COLUMNS), P())(params, x), expected)

several = np.stack([params, 0.5 * params])
xs = np.stack([x, -x, 2 * x])
in_specs, out_specs = (P(), P(None, None, "b")), P()
over_x = jax.grad(lambda params, xs: jax.vmap(squares, (None, 0))(params, xs).sum())
assert_close(sharded(over_x, in_specs, out_specs)(params, xs), jax.jit(over_x)(params, xs))
over_params = jax.grad(lambda several, x: jax.vmap(squares, (0, None))(several, x).sum())
assert_close(sharded(over_params, (P(), COLUMNS), P())(several, x), jax.jit(over_params)(several, x))
each = jax.vmap(jax.grad(squares), (None, 0))
assert_close(sharded(each, in_specs, out_specs)(params, xs), jax.jit(each)(params, xs))
outside = jax.vmap(sharded(jax.grad(squares), (P(), COLUMNS), P()), (None, 0))
assert_close(outside(params, xs), jax.jit(each)(params, xs))
""")


def test_a_scan_around_the_call_and_dropout():
    run("""
spec = RNNSpec("lstm", I, H, 2, dtype="float64", dropout=0.5)
params = rng.uniform(-0.5, 0.5, spec.layout.size)

def loss(params, x, h, c, key=None):
    def step(states, piece):
        y, states = rnn(spec, params, piece[None], states, key=key)
        return states, y
    final, y = jax.lax.scan(jax.checkpoint(step), (h, c), x)
    return (y**2).sum() + sum((state**2).sum() for state in final)

h = c = rng.standard_normal((2, N, H))
gradients = jax.grad(loss, (0, 2))
inside = sharded(gradients, (P(), COLUMNS, COLUMNS, COLUMNS), (P(), COLUMNS))
assert_close(inside(params, x, h, c), jax.jit(gradients)(params, x, h, c))

def dropped(params, x, states, key):
    return jax.grad(lambda params: (rnn(spec, params, x, states, key=key)[0] ** 2).sum())(params)

key, zeros = jax.random.key(0), (h[:, :2], c[:, :2])
parts = [dropped(params, x[:, part], zeros, key) for part in (slice(0, 2), slice(2, 4))]
actual = sharded(lambda params, x: dropped(params, x, zeros, key), (P(), COLUMNS), P())(params, x)
assert_close(actual, sum(parts))
""")


def test_layers_of_equinox():
    run("""
import equinox as eqx
from fusedrnn.jax.eqx import GRU

layer = GRU(I, H, key=jax.random.key(0), dtype=jnp.float64)
arrays, static = eqx.partition(layer, eqx.is_array)

def loss(arrays, x):
    return (jax.vmap(eqx.combine(arrays, static), 1)(x)[0] ** 2).sum()

def curvature(arrays, x):
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(jax.grad(loss)(arrays, x)))

for function in (loss, curvature):
    gradients = jax.grad(function)
    assert_close(sharded(gradients, (P(), COLUMNS), P())(arrays, x), jax.jit(gradients)(arrays, x))
""")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="flax needs Python 3.11")
def test_layers_of_flax():
    run("""
from flax import nnx
from fusedrnn.jax.nnx import RNN, Bidirectional

cells = [nnx.OptimizedLSTMCell(I, H, param_dtype=jnp.float64, rngs=nnx.Rngs(seed)) for seed in range(2)]
for layer in (RNN(cells[0]), Bidirectional(*map(nnx.RNN, cells))):
    graph, state = nnx.split(layer)

    params, others = nnx.split_state(state, nnx.Param, ...)

    def of_params(params, x, lengths):
        copy = nnx.merge(graph, params, others, copy=True)
        carry = (jnp.zeros((len(x), H)),) * 2
        carry = carry if isinstance(copy, RNN) else (carry, carry)
        return (copy(x, initial_carry=carry, seq_lengths=lengths) ** 2).sum()

    columns = x.swapaxes(0, 1)
    gradients = jax.grad(of_params)
    expected = jax.jit(gradients)(params, columns, lengths)
    assert_close(sharded(gradients, (P(), P("b"), P("b")), P())(params, columns, lengths), expected)

    # A single step is flax's.
    def of_step(params, x):
        return (nnx.merge(graph, params, others, copy=True)(x) ** 2).sum()

    step = columns[:, :1]
    assert_close(
        sharded(jax.grad(of_step), (P(), P("b")), P())(params, step), jax.jit(jax.grad(of_step))(params, step)
    )
""")


def test_a_mesh_of_which_one_axis_is_manual():
    run("""
mesh = jax.make_mesh((2, 1), ("b", "other"), axis_types=(AxisType.Auto,) * 2)

def squares(params, x):
    return (rnn(spec, params, x)[0] ** 2).sum()

part = jax.shard_map(jax.grad(squares), mesh=mesh, in_specs=(P(), COLUMNS), out_specs=P(), axis_names={"b"})
assert_close(jax.jit(part)(params, x), jax.grad(squares)(params, x))
""")


def test_operands_of_which_some_are_on_a_mesh():
    """Also outside of jit, and of a context that sets the mesh."""
    run("""
mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Explicit,))
spec = RNNSpec("gru", I, H)
params = rng.uniform(-0.5, 0.5, spec.layout.size).astype("f4")
x, lengths = np.ones((4, 8, I), "f4"), np.array([4, 3, 2, 1, 4, 3, 2, 1])
expected = rnn(spec, params, x, lengths=lengths)[0]
on_mesh = jax.device_put(x, NamedSharding(mesh, P(None, "b")))
lengths_on_mesh = jax.device_put(lengths, NamedSharding(mesh, P("b")))
for operands in ((on_mesh, lengths), (x, lengths_on_mesh), (on_mesh, lengths_on_mesh)):
    y = rnn(spec, params, operands[0], lengths=operands[1])[0]
    assert jax.typeof(y).sharding.spec == P(None, "b", None)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(expected))
""")


def test_explicit_axes():
    """The types of results say how they are sharded, and gradients have the shardings of the operands."""
    run("""
mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Explicit,))
spec = RNNSpec("lstm", I, H, dtype="float64", bidirectional=True)
params, c = rng.uniform(-0.5, 0.5, spec.layout.size), 2 * states

def results(params, x, h, c, **options):
    return rnn(spec, params, x, (h, c), **options)

def loss(*operands, **options):
    y, final = results(*operands, **options)
    return (y**2).sum() + sum((state**3).sum() for state in final)

def curvature(*operands):
    return sum((gradient**2).sum() for gradient in jax.grad(loss, (0, 1))(*operands))

everywhere = tuple(map(jnp.asarray, (params, x, states, c)))
expected = results(*everywhere)
gradients = jax.grad(loss, (0, 1, 2, 3))
expected_gradients = jax.jit(gradients)(*everywhere)
expected_second = jax.jit(jax.grad(curvature, (0, 1)))(*everywhere)

def carried(params, xs, h, c):
    step = lambda states, x: rnn(spec, params, x, states)[::-1]
    final, y = jax.lax.scan(step, (h, c), xs)
    return (y**2).sum()

xs = jnp.stack([everywhere[1], -everywhere[1]])
expected_scan = jax.jit(jax.grad(carried, (0, 1)))(params, xs, *everywhere[2:])
mapped = jax.vmap(lambda x: results(everywhere[0], x, *everywhere[2:]))
expected_mapped = mapped(xs)

def of_sample(x):  # gradients are one call for each sample, as is the backward call
    dparams, dx = jax.grad(lambda params, x: (rnn(spec, params, x)[0] ** 2).sum(), (0, 1))(everywhere[0], x)
    return dparams, dx * x

expected_samples = jax.jit(jax.vmap(of_sample))(xs)
drops = RNNSpec("gru", I, H, dtype="float64", input_dropout=0.5)
few = everywhere[0][: drops.layout.size]
dropped = lambda x: rnn(drops, few, x, key=jax.random.key(0))
expected_dropped = dropped(everywhere[1])

def spec_of(array):
    return jax.typeof(array).sharding.spec

SHARDINGS = [
    (P(), COLUMNS, COLUMNS, P()),
    (P(), P(), COLUMNS, P()),
    (P("b"), P(), P(), P()),
    (P("b"), COLUMNS, P("b"), P(None, None, "b")),
]
with jax.set_mesh(mesh):
    for specs in SHARDINGS:
        operands = [jax.device_put(array, NamedSharding(mesh, s)) for array, s in zip(everywhere, specs)]
        batch = "b" if COLUMNS in specs else None
        y, final = results(*operands) if batch else jax.jit(results)(*operands)
        assert_close((y, final), expected)
        assert [spec_of(array) for array in (y, *final)] == [P(None, batch, None)] * 3, specs
        actual = jax.jit(gradients)(*operands)
        assert_close(actual, expected_gradients)
        assert list(map(spec_of, actual)) == list(map(spec_of, operands)), specs
    assert_close(jax.jit(jax.grad(curvature, (0, 1)))(*operands), expected_second)
    for s in (P(None, None, "b"), P("b")):
        sharded_xs = jax.device_put(xs, NamedSharding(mesh, s))
        assert_close(jax.jit(mapped)(sharded_xs), expected_mapped)
        actual = jax.jit(jax.vmap(of_sample))(sharded_xs)
        assert_close(actual, expected_samples)
        assert spec_of(actual[1])[0] == s[0]
    operands = [jax.device_put(array, NamedSharding(mesh, COLUMNS)) for array in everywhere[2:]]
    sharded_xs = jax.device_put(xs, NamedSharding(mesh, P(None, None, "b")))
    assert_close(jax.jit(jax.grad(carried, (0, 1)))(params, sharded_xs, *operands), expected_scan)
    y, final = jax.jit(dropped)(jax.device_put(everywhere[1], NamedSharding(mesh, COLUMNS)))
    assert_close((y, final), expected_dropped)
    assert spec_of(y) == P(None, "b", None)
""")
