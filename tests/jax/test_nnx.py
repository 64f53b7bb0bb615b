"""``fusedrnn.jax.nnx`` and ``accelerate`` against flax's own layers: outputs, carries, gradients, random state."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason="flax needs Python 3.11")

from flax import nnx

import fusedrnn.jax
from fusedrnn.jax import accelerate, conversion, nnx_cells, restore
from fusedrnn.jax import nnx as ours
from fusedrnn.testing.tolerance import difference, gradient_tolerance, longest_sum, tolerance
from jax_versions import enable_x64

T, N, I, H = 6, 4, 3, 5
CELLS = [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]
LENGTHS = jnp.array([6, 1, 4, 3])
VALID = np.arange(T) < np.asarray(LENGTHS)[:, None]  # (N, T)


def random(*shape, seed=1, dtype=jnp.float32):
    """Numbers of NumPy, since JAX compiles a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make_cell(cls=nnx.GRUCell, inputs=I, param_dtype=jnp.float32, seed=0, **options):
    """A cell with random parameters."""
    options = {"dtype": param_dtype, **options}
    graph, state = nnx.split(
        nnx.eval_shape(lambda: cls(inputs, H, param_dtype=param_dtype, rngs=nnx.Rngs(0), **options))
    )
    leaves, structure = jax.tree.flatten(state)
    leaves = [0.5 * random(*leaf.shape, seed=seed + n, dtype=leaf.dtype) for n, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(structure, leaves))


def random_carry(cls, *batch, dtype=jnp.float32):
    is_lstm = cls in CELLS[:2]
    c, h = random(2, *batch, H, seed=2, dtype=dtype)
    return (c, h) if is_lstm else h


@pytest.fixture
def runs(monkeypatch):
    """The networks that the layers of ours run on the operator."""
    seen = []

    def recorded(spec, *operands, **options):
        seen.append(spec)
        return call(spec, *operands, **options)

    call = ours.rnn
    monkeypatch.setattr(ours, "rnn", recorded)
    return seen


def assert_close(actual, expected, spec):
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert array.dtype == other.dtype == spec.dtype
        message = difference(np.asarray(array), np.asarray(other), *tolerance(spec.dtype, longest_sum(spec)))
        assert message is None, message


@nnx.jit(static_argnames=("return_carry", "time_major", "reverse", "keep_order"))
def run(layer, x, **arguments):
    return layer(x, **arguments)


CALLS = {
    "plain": {},
    "lengths": {"seq_lengths": LENGTHS, "return_carry": True},
    "kept": {"seq_lengths": LENGTHS, "return_carry": True, "reverse": True, "keep_order": True},
    "flipped": {"seq_lengths": LENGTHS, "return_carry": True, "reverse": True, "time_major": True},
}


@pytest.mark.parametrize(
    ("cls", "call"),
    [(nnx.LSTMCell, "flipped"), (nnx.OptimizedLSTMCell, "kept"), (nnx.GRUCell, "plain"), (nnx.SimpleCell, "lengths")],
)
def test_outputs_and_carries(cls, call, runs):
    arguments, cell = CALLS[call], make_cell(cls)
    is_time_major = "time_major" in arguments
    x = random(T, N, I) if is_time_major else random(N, T, I)
    if call != "plain":
        arguments = {**arguments, "initial_carry": random_carry(cls, N)}
    expected, actual = (run(layer(cell), x, **arguments) for layer in (nnx.RNN, ours.RNN))
    (spec,) = runs
    if "seq_lengths" in arguments:
        carry, y = expected
        valid = VALID.T if is_time_major else VALID
        assert not np.asarray(actual[1])[~valid].any()
        expected = carry, jnp.where(valid[:, :, None], y, 0)
    assert_close(actual, expected, spec)


@pytest.mark.parametrize("cls", CELLS)
def test_gradients_of_everything(cls, runs):
    """In float64, through nnx.jit and nnx.grad; the loss reads valid steps only."""
    with enable_x64():
        cell = make_cell(cls, param_dtype=jnp.float64)
        x, carry = random(N, T, I, dtype=jnp.float64), random_carry(cls, N, dtype=jnp.float64)
        dy = random(N, T, H, seed=3, dtype=jnp.float64) * VALID[:, :, None]

        @nnx.jit
        def gradients(layer, x, carry):
            def loss(layer, x, carry):
                final, y = layer(x, initial_carry=carry, seq_lengths=LENGTHS, return_carry=True)
                return (y * dy).sum() + sum((state**2).sum() for state in jax.tree.leaves(final))

            return nnx.grad(loss, argnums=(0, 1, 2))(layer, x, carry)

        expected, actual = (gradients(layer(cell), x, carry) for layer in (nnx.RNN, ours.RNN))
    (spec,) = runs
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for array, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        limits = gradient_tolerance(spec.dtype, spec, T, N, float(np.abs(np.asarray(other)).max()))
        message = difference(np.asarray(array), np.asarray(other), *limits)
        assert array.dtype == spec.dtype and message is None, message


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=["none", "two"])
def test_batch_axes(batch, runs):
    cell, x = make_cell(nnx.OptimizedLSTMCell), random(*batch, T, I)
    expected, actual = (run(layer(cell, return_carry=True), x) for layer in (nnx.RNN, ours.RNN))
    assert_close(actual, expected, *runs)


@pytest.mark.parametrize("function", nnx_cells.ACTIVATIONS, ids=lambda function: function.__name__)
def test_activations(function, runs):
    """One step against the cell itself."""
    x = 3 * random(N, 1, I)
    for cls in (nnx.SimpleCell, nnx.LSTMCell):
        gates = {"gate_fn": function} if cls is nnx.LSTMCell else {}
        cell, carry = make_cell(cls, activation_fn=function, **gates), random_carry(cls, N)
        expected_carry, y = cell(carry, x[:, 0])
        actual = ours.RNN(cell, return_carry=True)(x, initial_carry=carry)
        assert_close(actual, (expected_carry, y[:, None]), runs[-1])
    assert len(runs) == 2


@pytest.mark.parametrize("function", nnx_cells.ACTIVATIONS, ids=lambda function: function.__name__)
def test_derivatives_at_kinks(function, runs):
    """Zeros, as those of a padded input or of a new state, are among the kinks."""
    cell = nnx.SimpleCell(1, 1, activation_fn=function, rngs=nnx.Rngs(0))
    cell.dense_i.kernel[...], cell.dense_h.kernel[...] = jnp.ones((1, 1)), jnp.zeros((1, 1))
    x = jnp.array([[-6.0, -3.0, -1.0, 0.0], [1.0, 3.0, 6.0, 0.0]])[:, :, None]
    gradient = nnx.grad(lambda layer, x: layer(x).sum(), argnums=1)
    actual, expected = (gradient(layer(cell), x).ravel() for layer in (ours.RNN, nnx.RNN))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert len(runs) == 1


class Own(nnx.GRUCell):
    """A cell of a user's."""


def with_lora():
    cell = make_cell()
    cell.dense_i = nnx.eval_shape(lambda: nnx.LoRALinear(I, 3 * H, lora_rank=2, rngs=nnx.Rngs(0)))
    return nnx.RNN(cell)


def with_precision():
    cell = make_cell()
    cell.dense_h.precision = "high"
    return nnx.RNN(cell)


REFUSED = {
    "cell": (lambda: nnx.RNN(make_cell(Own)), "Own, a subclass of GRUCell"),
    "activation": (lambda: nnx.RNN(make_cell(gate_fn=jnp.sin)), "its gate_fn is sin, which the operator does not have"),
    "leaky_relu": (
        lambda: nnx.RNN(make_cell(nnx.SimpleCell, activation_fn=nnx.leaky_relu)),
        "its activation_fn is leaky_relu, whose derivative at 0 differs from the operator's",
    ),
    "hard_sigmoid": (lambda: nnx.RNN(make_cell(gate_fn=nnx.hard_sigmoid)), "whose derivative at -3 and 3 differs"),
    "residual": (lambda: nnx.RNN(make_cell(nnx.SimpleCell, residual=True)), r"residual=True"),
    "linear": (with_lora, "its cell's dense_i is LoRALinear, not nnx.Linear"),
    "precision": (with_precision, "its cell's dense_h is not the linear layer that flax makes there by default"),
    "bfloat16": (lambda: nnx.RNN(make_cell(dtype="bfloat16")), "computes in bfloat16"),
    "state": (lambda: nnx.RNN(make_cell(), state_axes={...: 0}), "its cell has other state at each step (state_axes)"),
    "random": (lambda: nnx.RNN(make_cell(), broadcast_rngs="dropout"), "broadcast_rngs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_flax_runs(case, runs):
    make, message = REFUSED[case]
    layer = make()
    (report,) = accelerate(layer).unchanged
    assert type(layer) is nnx.RNN and message in str(report)
    own = ours.RNN(layer.cell, broadcast_rngs=layer.broadcast_rngs, state_axes=layer.state_axes)
    assert message in own.refusal
    if case == "residual":
        np.testing.assert_array_equal(run(own, random(N, T, I)), run(layer, random(N, T, I)))
        assert not runs


def test_calls_that_flax_runs(runs):
    """What the operator does not take, and what flax has its own error for."""
    layer, theirs = ours.RNN(make_cell()), nnx.RNN(make_cell())
    assert layer(random(N, 0, I)).shape == theirs(random(N, 0, I)).shape
    half = jnp.zeros((N, H), jnp.bfloat16)
    for x, arguments in ((random(N, T, I + 1), {}), (random(N, T, I), {"initial_carry": half})):
        errors = []
        for each in (layer, theirs):
            with pytest.raises((TypeError, ValueError)) as caught:
                each(x, **arguments)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    assert not runs
    # Mixed formats that promote to one of ours are computed in it.
    x = random(N, T, I).astype(jnp.bfloat16)
    default = make_cell(dtype=None)
    assert_close(ours.RNN(default)(x), nnx.RNN(default)(x), nnx_cells.spec_of(default, "float32"))
    assert len(runs) == 1


def test_a_single_step_in_a_graph_is_flax_s(runs):
    layer, x = ours.RNN(make_cell()), random(N, 1, I)
    carry = jnp.zeros((N, H))
    graph, state = nnx.split(layer)
    inside = jax.jit(lambda x: nnx.merge(graph, state, copy=True)(x, initial_carry=carry))(x)
    assert not runs
    np.testing.assert_array_equal(inside, nnx.RNN(make_cell())(x))
    assert_close(layer(x), inside, nnx_cells.spec_of(layer.cell, "float32"))
    assert len(runs) == 1


def by_cell(cell, x, carry, lengths, reverse=False):
    """The carry and the output (N, T, H) of a cell, run on each sequence by itself."""
    finals, outputs = [], []
    for row, length in enumerate(lengths):
        own = jax.tree.map(lambda state, row=row: state[row], carry)
        y = np.zeros((x.shape[1], H), np.float32)
        for step in range(length)[:: -1 if reverse else 1]:
            own, output = cell(own, x[row, step])
            y[step] = output
        finals.append(own)
        outputs.append(y)
    return jax.tree.map(lambda *rows: jnp.stack(rows), *finals), np.stack(outputs)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("is_refused", [False, True], ids=["operator", "flax"])
def test_ends_of_sequences(steps, is_refused, runs):
    """Whatever runs: zeros after the end, and the initial carry for a length of 0."""
    pair = [make_cell(nnx.LSTMCell, seed=n, **({"activation_fn": nnx.gelu} if is_refused else {})) for n in range(2)]
    x, carry, lengths = random(N, steps, I), random_carry(nnx.LSTMCell, N), np.array([steps, 0, 1, 0])
    spec = nnx_cells.spec_of(make_cell(nnx.LSTMCell), "float32")
    arguments = {"seq_lengths": jnp.asarray(lengths), "return_carry": True}
    forward, backward = (by_cell(cell, x, carry, lengths, n == 1) for n, cell in enumerate(pair))
    assert_close(run(ours.RNN(pair[0]), x, initial_carry=carry, **arguments), forward, spec)
    flipped = run(ours.RNN(pair[0]), x.swapaxes(0, 1), initial_carry=carry, time_major=True, **arguments)
    assert_close((flipped[0], flipped[1].swapaxes(0, 1)), forward, spec)
    kept = run(ours.RNN(pair[1]), x, initial_carry=carry, reverse=True, keep_order=True, **arguments)
    assert_close(kept, backward, spec)
    y = jnp.concatenate([forward[1], backward[1]], axis=-1)
    for layer in (nnx.RNN, ours.RNN):
        both = ours.Bidirectional(*map(layer, pair))
        actual = run(both, x, initial_carry=(carry, carry), **arguments)
        assert_close(actual, ((forward[0], backward[0]), y), spec)
    assert bool(runs) != is_refused


@pytest.mark.parametrize("cls", [nnx.LSTMCell, nnx.GRUCell])
@pytest.mark.parametrize("arguments", [{}, {"reverse": True, "keep_order": True}, {"time_major": True}], ids=str)
def test_batch_axes_and_lengths_of_calls_that_flax_runs(cls, arguments, runs):
    cell = make_cell(cls, activation_fn=nnx.gelu)
    x, carry, lengths = random(2, 2, T, I), random_carry(cls, 2, 2), np.array([[6, 0], [1, 4]])
    rows = jax.tree.map(lambda leaf: leaf.reshape(4, *leaf.shape[2:]), (x, carry))
    expected = by_cell(cell, *rows, lengths.ravel(), "reverse" in arguments)
    if "time_major" in arguments:
        x = jnp.moveaxis(x, 2, 0)
    layer = ours.RNN(cell, return_carry=True)
    final, y = run(layer, x, initial_carry=carry, seq_lengths=jnp.asarray(lengths), **arguments)
    assert y.shape == (*x.shape[:-1], H) and not runs
    if "time_major" in arguments:
        y = jnp.moveaxis(y, 0, 2)
    actual = jax.tree.map(lambda leaf: leaf.reshape(4, *leaf.shape[2:]), (final, y))
    assert_close(actual, expected, nnx_cells.spec_of(make_cell(cls), "float32"))
    for batch in ((2, 2), (0, 2)):
        one_for_all, _ = layer(random(*batch, T, I), seq_lengths=4)
        assert jax.tree.leaves(one_for_all)[0].shape == (*batch, H)


@pytest.mark.parametrize("arguments", [{}, {"reverse": True}, {"reverse": True, "keep_order": True}], ids=str)
@pytest.mark.parametrize("function", [nnx.tanh, nnx.gelu], ids=["operator", "flax"])
def test_lengths_in_a_list(function, arguments):
    pair, x = [make_cell(seed=seed, activation_fn=function) for seed in (0, 1)], random(N, T, I)
    layer, both = ours.RNN(pair[0], return_carry=True), ours.Bidirectional(*map(nnx.RNN, pair), return_carry=True)
    for each in (layer, both):
        actual = each(x, seq_lengths=LENGTHS.tolist(), **arguments)
        jax.tree.map(np.testing.assert_array_equal, actual, each(x, seq_lengths=LENGTHS, **arguments))


@pytest.mark.parametrize("function", [nnx.tanh, nnx.gelu], ids=["operator", "flax"])
def test_no_promotion_of_ranks(function):
    pair = [make_cell(seed=seed, activation_fn=function) for seed in (0, 1)]
    both = ours.Bidirectional(*map(ours.RNN, pair), return_carry=True)
    with jax.numpy_rank_promotion("raise"):
        for x, lengths in ((random(N, T, I), LENGTHS), (random(N, 1, T, I), LENGTHS[:, None])):
            assert run(both, x)[1].shape == run(both, x, seq_lengths=lengths)[1].shape == (*x.shape[:-1], 2 * H)
            layer = ours.RNN(pair[0], reverse=True, keep_order=True)
            assert nnx.grad(lambda layer, x=x, lengths=lengths: layer(x, seq_lengths=lengths).sum())(layer)


def test_one_length_for_all_sequences():
    """As flax broadcasts it."""
    layer, x = ours.RNN(make_cell(), return_carry=True), random(N, T, I)
    expected = layer(x, seq_lengths=np.full(N, 3))
    for lengths in (np.array([3]), 3):
        carry, y = layer(x, seq_lengths=lengths)
        spec = nnx_cells.spec_of(make_cell(), "float32")
        assert_close((carry, y), expected, spec)
        assert not np.any(y[:, 3:])


@pytest.mark.parametrize("function", [nnx.tanh, nnx.gelu], ids=["operator", "flax"])
def test_lengths_out_of_range(function):
    """Those of 64 bits are not cut."""
    pair = [make_cell(seed=seed, activation_fn=function) for seed in (0, 1)]
    for lengths in (np.full(N, 2**32 + 1), [9, 1, 1, 1], jnp.array([1, -1, 1, 1]), 7):
        for layer in (ours.RNN(pair[0]), ours.Bidirectional(*map(nnx.RNN, pair))):
            with pytest.raises(ValueError, match="lengths must be from 0 to 6; got"):
                layer(random(N, T, I), seq_lengths=lengths)


def test_random_state_of_calls_that_flax_runs():
    """With lengths, which need the initial carry, and without."""
    for arguments in ({}, {"seq_lengths": LENGTHS}):
        cell = make_cell(nnx.LSTMCell, activation_fn=nnx.gelu)
        cell.carry_init = lambda key, shape, dtype: jnp.full(shape, jax.random.key_data(key)[0] % 8, dtype)
        layers = nnx.RNN(cell, rngs=nnx.Rngs(7)), ours.RNN(cell, rngs=nnx.Rngs(7))
        for _ in range(2):
            expected, actual = (layer(random(N, T, I), **arguments) for layer in layers)
            valid = VALID[:, :, None] if arguments else True
            assert_close(actual, jnp.where(valid, expected, 0), nnx_cells.spec_of(make_cell(), "float32"))
        assert int(layers[0].rngs.count[...]) == int(layers[1].rngs.count[...]) > 0


def test_both_directions_are_one_call(runs):
    cls = nnx.LSTMCell
    pair = [nnx.RNN(make_cell(cls, seed=seed)) for seed in (0, 1)]
    theirs, own = nnx.Bidirectional(*pair), ours.Bidirectional(*pair)
    arguments = {"seq_lengths": LENGTHS, "initial_carry": (random_carry(cls, N), None), "return_carry": True}
    carries, y = run(theirs, random(N, T, I), **arguments)
    actual = run(own, random(N, T, I), **arguments)
    (spec,) = runs
    assert spec.bidirectional
    assert_close(actual, (carries, jnp.where(VALID[:, :, None], y, 0)), spec)
    own.merge_fn = jnp.subtract
    forward, backward = jnp.split(actual[1], 2, axis=-1)
    np.testing.assert_array_equal(own(random(N, T, I), **arguments)[1], forward - backward)


@pytest.mark.parametrize("as_array", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("function", [nnx.tanh, nnx.gelu], ids=["operator", "flax"])
def test_the_carries_of_both_directions_in_one_array(function, as_array):
    pair = [make_cell(seed=seed, activation_fn=function) for seed in (0, 1)]
    carries, x = as_array(random(2, N, H, seed=2)), random(N, T, I)
    layer = ours.Bidirectional(*map(nnx.RNN, pair), return_carry=True)
    for arguments in ({}, {"seq_lengths": LENGTHS}):
        expected = layer(x, initial_carry=tuple(carries), **arguments)
        actual = layer(x, initial_carry=carries, **arguments)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_directions_that_differ_run_one_by_one(runs):
    pair = ours.RNN(make_cell()), ours.RNN(make_cell(nnx.SimpleCell))
    own, theirs = (cls(*pair) for cls in (ours.Bidirectional, nnx.Bidirectional))
    assert own.refusal == "its directions have different cells"
    np.testing.assert_array_equal(own(random(N, T, I)), theirs(random(N, T, I)))
    assert [spec.mode for spec in runs] == 2 * ["gru", "rnn_tanh"]


def test_random_carries_and_random_state_are_those_of_flax():
    cell = make_cell(nnx.LSTMCell)
    cell.carry_init = lambda key, shape, dtype: jnp.full(shape, jax.random.key_data(key)[0] % 8, dtype)
    layers = nnx.RNN(cell, rngs=nnx.Rngs(7)), ours.RNN(cell, rngs=nnx.Rngs(7))
    for _ in range(2):
        expected, actual = (layer(random(N, 1, I)) for layer in layers)
        assert_close(actual, expected, nnx_cells.spec_of(cell, "float32"))
    assert int(layers[0].rngs.count[...]) == int(layers[1].rngs.count[...]) > 0


def test_vmap_is_one_call_and_an_ensemble_is_mapped():
    graph, state = nnx.split(ours.RNN(make_cell()))
    xs, carry = random(3, N, T, I), jnp.zeros((N, H))

    def run(x):
        return nnx.merge(graph, state)(x, initial_carry=carry)

    assert str(jax.make_jaxpr(jax.vmap(run))(xs)).count("fusedrnn[") == 1
    np.testing.assert_array_equal(jax.vmap(run)(xs)[2], run(xs[2]))

    cells = [make_cell(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, cells))
    ensemble = nnx.RNN(nnx.merge(nnx.graphdef(cells[0]), stacked), rngs=False)
    call = nnx.jit(nnx.vmap(lambda layer, x: layer(x, initial_carry=carry)))
    expected = call(ensemble, xs)
    assert accelerate(ensemble)
    assert_close(call(ensemble, xs), expected, nnx_cells.spec_of(ensemble.cell, "float32"))


class Tagger(nnx.Module):
    """A model with layers of all kinds."""

    def __init__(self):
        self.embedding = nnx.Param(random(20, I))
        self.encoder = nnx.Bidirectional(nnx.RNN(make_cell()), nnx.RNN(make_cell(seed=1)))
        self.layers = nnx.List([
            nnx.RNN(make_cell(nnx.OptimizedLSTMCell, 2 * H)), nnx.RNN(make_cell(nnx.SimpleCell, H, residual=True)),
        ])  # fmt: skip

    def __call__(self, tokens):
        y = self.encoder(self.embedding[tokens])
        for layer in self.layers:
            y = layer(y)
        return y


REPORT = """\
4 replaced, 1 unchanged
  replaced   encoder: Bidirectional
  replaced   encoder.backward_rnn: RNN
  replaced   encoder.forward_rnn: RNN
  replaced   layers.0: RNN
  unchanged  layers.1: RNN, its cell adds the state within the activation (residual=True)"""


def test_accelerate_and_restore(runs):
    import optax

    model, tokens = Tagger(), np.arange(N * T).reshape(N, T) % 20
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    parameters = _parameters(model)
    state = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    original = run(model, tokens)
    assert str(accelerate(model)) == REPORT
    assert len(accelerate(model)) == 0
    accelerated = run(model, tokens)
    assert_close(accelerated, original, runs[0])
    assert [(spec.mode, spec.bidirectional) for spec in runs] == [("gru", True), ("lstm", False)]
    assert all(map(lambda a, b: a is b, _parameters(model), parameters))
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(state)
    # An optimizer and a checkpoint from before.
    optimizer.update(model, state)  # some gradient
    assert float(jnp.abs(run(model, tokens) - accelerated).max()) > 1e-3
    nnx.update(model, state)
    copy = nnx.merge(*nnx.split(model))
    np.testing.assert_array_equal(run(copy, tokens), accelerated)
    assert len(restore(model)) == 4
    assert not [layer for _, layer in nnx.iter_modules(model) if type(layer) in conversion.FLAXS]
    np.testing.assert_array_equal(run(model, tokens), original)


def _parameters(model):
    return [variable for _, variable in nnx.iter_graph(model) if isinstance(variable, nnx.Param)]


def test_a_model_without_numbers_is_accelerated():
    """As one makes it to load a checkpoint into."""
    model = nnx.eval_shape(lambda: nnx.RNN(nnx.GRUCell(I, H, rngs=nnx.Rngs(0))))
    assert len(accelerate(model)) == 1


@pytest.mark.parametrize("as_array", [jnp.asarray, np.asarray])
def test_a_model_whose_parameters_are_arrays(as_array, runs):
    as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # the former name
    layer = nnx.RNN(make_cell(nnx.LSTMCell, dtype=None), rngs=False, return_carry=True)
    x, carry = random(N, T, I), random_carry(nnx.LSTMCell, N)
    expected = layer(x, initial_carry=carry)
    pure, converted = as_pure(layer), nnx.clone(layer)
    accelerate(converted)
    accelerated_before, accelerated_after = as_pure(converted), jax.tree.map(as_array, pure)
    assert len(accelerate(accelerated_after)) == 1
    for own in (accelerated_before, accelerated_after):
        assert_close(own(x, initial_carry=carry), expected, nnx_cells.spec_of(own.cell, "float32"))
        actual = jax.jit(lambda own: own(x, initial_carry=carry))(own)
        assert_close(actual, expected, nnx_cells.spec_of(own.cell, "float32"))
    assert len(runs) == 4


def test_subclasses_are_left_and_other_objects_refused():
    class Mine(nnx.RNN):
        pass

    class Further(ours.RNN):
        pass

    assert accelerate(Mine(make_cell())).unchanged[0].reason == "it is a subclass of RNN"
    assert restore(Further(make_cell())).unchanged[0].reason == "it is a subclass of RNN"
    with pytest.raises(TypeError, match=r"model must be a flax\.nnx\.Module; got int"):
        accelerate(3)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        fusedrnn.jax.absent  # noqa: B018
