"""Training on the reference: all gradients against torch's in float64 and against finite differences."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn.spec
from fusedrnn import dropout
from fusedrnn.cell.cells import FAMILIES, Cell, Family, Variant
from fusedrnn.cell.primitives import relu, tanh
from fusedrnn.engines.reference import forward as reference
from fusedrnn.engines.reference.backward import backward
from fusedrnn.spec import MODES, RNNSpec
from fusedrnn.testing.tolerance import longest_sum, tolerance
from toy_cells import TWO_STAGES

T, N, I, H = 5, 4, 3, 6
LENGTHS = np.array([3, 5, 1, 4])
SEED = 2**40 + 9
DIRECTIONS = 6
LONG = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps


@dataclass
class Problem:
    """The arguments of a training step; ``states``, ``lengths``, ``dy`` and ``dstates`` may be None."""

    spec: RNNSpec
    x: np.ndarray
    params: np.ndarray
    states: tuple | None
    lengths: np.ndarray | None
    dy: np.ndarray | None
    dstates: tuple | None

    def run(self):
        """All results of training, by name."""
        y, states, tape = reference.train(
            self.spec, self.x, self.params, self.states, self.lengths, seed=SEED
        )
        dx, dparams, dinitial = backward(self.spec, tape, self.dy, self.dstates)
        return named(self.spec, y, states, dx, dparams, dinitial)

    def astype(self, dtype):
        def convert(value):
            if isinstance(value, tuple):
                return tuple(map(convert, value))
            return value if value is None else value.astype(dtype)

        names = ("x", "params", "states", "dy", "dstates")
        return replace(self, **{name: convert(getattr(self, name)) for name in names})


def named(spec, y, states, dx, dparams, dinitial):
    results = {"y": y, "dx": dx}
    for name, state, gradient in zip(spec.state_names, states, dinitial, strict=True):
        results |= {f"{name}_n": state, f"d{name}0": gradient}
    return results | {f"d{name}": gradient for name, gradient in spec.layout.unpack(dparams).items()}


def problem(spec, lengths=None, with_states=True, seed=0):
    rng = np.random.default_rng([seed, spec.num_layers])
    bound = spec.hidden_size**-0.5
    shapes = spec.state_shape(N)
    return Problem(
        spec,
        x=rng.standard_normal((T, N, spec.input_size)),
        params=rng.uniform(-bound, bound, spec.layout.size),
        states=tuple(rng.uniform(-1, 1, shape) for shape in shapes) if with_states else None,
        lengths=lengths,
        dy=rng.standard_normal((T, N, spec.output_size)),
        dstates=tuple(rng.standard_normal(shape) for shape in shapes),
    )


def torch_layer(spec, layer, weights):
    """One layer as a module of torch, with our weights."""
    kind = torch.nn.RNN if spec.mode.startswith("rnn") else getattr(torch.nn, spec.mode.upper())
    options = {"nonlinearity": spec.mode[4:]} if kind is torch.nn.RNN else {}
    size = spec.layer_input_size(layer)
    module = kind(size, spec.hidden_size, bidirectional=spec.bidirectional, dtype=torch.float64, **options)
    own = {name.replace(f"_l{layer}", "_l0"): value for name, value in weights.items() if f"_l{layer}" in name}
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in own.items()})
    return module


def torch_run(task):
    """The same as :meth:`Problem.run`, by torch's layers with our masks between them, and its autograd."""
    spec, lengths = task.spec, task.lengths
    weights = spec.layout.unpack(task.params, names="torch")
    modules = [torch_layer(spec, layer, weights) for layer in range(spec.num_layers)]
    states = task.states or tuple(np.zeros(shape) for shape in spec.state_shape(N))
    x, *initial = (torch.tensor(array, requires_grad=True) for array in (task.x, *states))
    y, last, D = x, [], spec.num_directions
    for layer, module in enumerate(modules):
        own = tuple(state[layer * D : (layer + 1) * D] for state in initial)
        data = y if lengths is None else pack_padded_sequence(y, torch.from_numpy(lengths), enforce_sorted=False)
        y, after = module(data, own if len(own) > 1 else own[0])
        if lengths is not None:
            y, _ = pad_packed_sequence(y, total_length=T)
        last.append(after if isinstance(after, tuple) else (after,))
        if spec.dropout and layer < spec.num_layers - 1:
            mask = dropout.mask(SEED, spec.dropout, layer, *y.shape)
            y = y * torch.from_numpy(mask) * (1 / (1 - spec.dropout))
    final = [torch.cat(column) for column in zip(*last, strict=True)]
    dstates = task.dstates or (None,) * len(final)
    pairs = [(a, b) for a, b in zip((y, *final), (task.dy, *dstates), strict=True) if b is not None]
    sum((a * torch.from_numpy(b)).sum() for a, b in pairs).backward()
    gradients = {
        name.replace("_l0", f"_l{layer}"): value.grad.numpy()
        for layer, module in enumerate(modules)
        for name, value in module.named_parameters()
    }
    dparams = spec.layout.pack(gradients, names="torch")
    outputs = [value.detach().numpy() for value in (y, *final)]
    return named(spec, outputs[0], outputs[1:], x.grad.numpy(), dparams, [state.grad.numpy() for state in initial])


def assert_same(actual, expected, spec, dtype="float64"):
    """Compare by name. A gradient is a sum over steps and sequences of sums over all gates."""
    terms = longest_sum(spec) + spec.num_directions * spec.num_gates * spec.hidden_size + T * N
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        rtol, atol = tolerance(dtype, terms, float(np.abs(value).max()))
        assert actual[name].shape == value.shape
        np.testing.assert_allclose(actual[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_against_torch(mode, layers, bidirectional, lengths, with_states):
    spec = RNNSpec(mode, I, H, layers, bidirectional, dtype="float64")
    task = problem(spec, lengths, with_states)
    assert_same(task.run(), torch_run(task), spec)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_dropout_against_torch(mode, layers, bidirectional, lengths):
    spec = RNNSpec(mode, I, H, layers, bidirectional, dropout=0.4, dtype="float64")
    task = problem(spec, lengths)
    actual = task.run()
    assert_same(actual, torch_run(task), spec)
    without = replace(task, spec=replace(spec, dropout=0.0)).run()
    assert np.array_equal(actual["y"], without["y"]) == (layers == 1)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("mode", MODES)
def test_absent_gradients_are_zeros(mode, lengths):
    spec = RNNSpec(mode, I, H, 2, True, dropout=0.3, dtype="float64")
    task = problem(spec, lengths)
    count = len(spec.state_names)
    absent = [replace(task, dy=None), replace(task, dstates=None)]
    absent += [
        replace(task, dstates=tuple(None if k == skipped else d for k, d in enumerate(task.dstates)))
        for skipped in range(count)
    ]
    zeros = tuple(np.zeros(shape) for shape in spec.state_shape(N))
    for partial in absent:
        dstates = partial.dstates or (None,) * count
        full = replace(
            partial,
            dy=np.zeros_like(task.dy) if partial.dy is None else partial.dy,
            dstates=tuple(z if d is None else d for d, z in zip(dstates, zeros, strict=True)),
        )
        actual = partial.run()
        assert_same(actual, torch_run(full), spec)
        assert actual["dx"].any()
    nothing = replace(task, dy=None, dstates=None).run()
    assert not any(nothing[name].any() for name in nothing if name.startswith("d"))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("mode", MODES)
def test_sequences_of_no_steps(mode, bidirectional):
    """Their states' gradients pass through; the other sequences' gradients are those without them."""
    spec = RNNSpec(mode, I, H, 3, bidirectional, dtype="float64")
    task = problem(spec, np.array([0, T, 0, 2]))
    actual = task.run()
    for name, dstate in zip(spec.state_names, task.dstates, strict=True):
        np.testing.assert_array_equal(actual[f"d{name}0"][:, [0, 2]], dstate[:, [0, 2]])
    assert not actual["dx"][:, [0, 2]].any()
    alone = replace(
        task,
        x=task.x[:, [1, 3]],
        states=tuple(state[:, [1, 3]] for state in task.states),
        lengths=task.lengths[[1, 3]],
        dy=task.dy[:, [1, 3]],
        dstates=tuple(dstate[:, [1, 3]] for dstate in task.dstates),
    ).run()
    by_sequence = {"y", "dx", *(part for name in spec.state_names for part in (f"{name}_n", f"d{name}0"))}
    others = {name: value[:, [1, 3]] if name in by_sequence else value for name, value in actual.items()}
    assert_same(others, alone, spec)


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_never_read(mode):
    """Nor are the input and dy after a sequence's end, nor the states of a sequence without steps."""
    spec = RNNSpec(mode, I, H, 2, True, dropout=0.3, dtype="float64")
    task = problem(spec, np.array([3, 0, 1, 4]))
    expected = task.run()
    behind = np.arange(T)[:, None] >= task.lengths
    task.x[behind] = np.nan
    task.dy[behind] = np.nan
    actual = task.run()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    assert not actual["dx"][behind].any()
    for state, dstate in zip(task.states, task.dstates, strict=True):
        state[:, 1] = np.nan
        dstate[:, 1] = np.inf
    with np.errstate(invalid="ignore"):
        actual = task.run()
    for name, value in expected.items():
        if name.startswith("d") and not name.endswith("0"):
            np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("mode", MODES)
def test_without_dropout_the_outputs_are_those_of_inference(mode, lengths):
    task = problem(RNNSpec(mode, I, H, 2, True, dtype="float64"), lengths)
    arguments = (task.spec, task.x, task.params, task.states, lengths)
    y, states, _ = reference.train(*arguments)
    expected = reference.forward(*arguments)
    for array, other in zip((y, *states), (expected[0], *expected[1]), strict=True):
        np.testing.assert_array_equal(array, other)


def test_the_seed_determines_the_mask():
    task = problem(RNNSpec("lstm", I, H, 2, dropout=0.5, dtype="float64"))
    outputs = [reference.train(task.spec, task.x, task.params, seed=seed)[0] for seed in (0, 0, 1)]
    assert np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


def test_a_tape_can_be_used_twice():
    task = problem(RNNSpec("gru", I, H, 2, True, dropout=0.5, dtype="float64"), LENGTHS)
    _, _, tape = reference.train(task.spec, task.x, task.params, task.states, LENGTHS)
    copies = [array.copy() for array in (task.dy, *task.dstates, *task.states)]
    runs = [backward(task.spec, tape, task.dy, task.dstates) for _ in range(2)]
    for first, second in zip(*((dx, dparams, *dinitial) for dx, dparams, dinitial in runs), strict=True):
        np.testing.assert_array_equal(first, second)
        assert not np.shares_memory(first, second)
    for array, before in zip((task.dy, *task.dstates, *task.states), copies, strict=True):
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(("mode", "arrays"), [("rnn_tanh", 1), ("rnn_relu", 1), ("lstm", 2 + 5), ("gru", 1 + 5)])
def test_the_memory_of_a_tape(mode, arrays):
    """The arrays (N, H) that a layer saves for each step: the states, and the values that gradients use."""
    for layers in (1, 2):
        task = problem(RNNSpec(mode, I, H, layers, dropout=0.5, dtype="float64"))
        _, _, tape = reference.train(task.spec, task.x, task.params, task.states)
        inputs = (layers - 1) * T * N * H * (8 + 1)  # the second layer's input, and the mask
        assert tape.nbytes == layers * arrays * T * N * H * 8 + inputs
        # No view that keeps a larger array in memory.
        assert all(array.base is None for trail in tape.directions for step in trail.saved for array in step)


def check_by_differences(task, names):
    """All gradients against central differences of the loss, in directions that change all elements of an array."""
    dtype = np.longdouble if LONG else np.float64
    task = task.astype(dtype)
    step = np.cbrt(np.finfo(dtype).eps)

    def loss():
        y, states, _ = reference.train(
            task.spec, task.x, task.params, task.states, task.lengths, seed=SEED
        )
        behind = np.zeros((T, N), bool) if task.lengths is None else np.arange(T)[:, None] >= task.lengths
        pairs = zip((np.where(behind[..., None], 0, y), *states), (task.dy, *task.dstates), strict=True)
        return sum((value * gradient).sum() for value, gradient in pairs)

    _, _, tape = reference.train(task.spec, task.x, task.params, task.states, task.lengths, seed=SEED)
    dx, dparams, dinitial = backward(task.spec, tape, task.dy, task.dstates)
    rng = np.random.default_rng(1)
    inputs = (task.x, task.params, *task.states)
    for name, array, gradient in zip(names, inputs, (dx, dparams, *dinitial), strict=True):
        assert gradient.dtype == dtype
        before = array.copy()
        for _ in range(DIRECTIONS):
            direction = rng.standard_normal(array.shape).astype(dtype)
            direction /= np.sqrt((direction**2).sum())
            array[...] = before + step * direction
            above = loss()
            array[...] = before - step * direction
            slope = (above - loss()) / (2 * step)
            # The error is step² from the third derivative and eps / step from rounding: the same size.
            error = abs(slope - (gradient * direction).sum())
            assert error <= 1000 * step**2 * (1 + abs(slope)), name
        array[...] = before


@pytest.mark.parametrize("lengths", [None, np.array([3, 0, 1, T])], ids=["full", "lengths"])
@pytest.mark.parametrize("mode", MODES)
def test_by_finite_differences(mode, lengths):
    task = problem(RNNSpec(mode, I, H, 2, True, dropout=0.3, dtype="float64"), lengths)
    check_by_differences(task, ("dx", "dparams", *(f"d{name}0" for name in task.spec.state_names)))


def relay(x, recurrent, s):
    """Two stages; the second multiplies a result of the first, and b's input is used before b's stage."""
    h = recurrent(s.h)
    middle = tanh(x.a + h.a) * x.b
    return tanh(recurrent(middle).b + s.c) + s.h, middle - s.c * h.c


def idle(x, recurrent, s):
    """x.b, h.c and the state c are not used; one output is a previous state."""
    h = recurrent(s.h)
    return relu(x.a + h.a) + h.b * 0.5 + x.c, s.h


@pytest.mark.parametrize(
    "cell",
    [TWO_STAGES, Cell("relay", tuple("abc"), ("h", "c"), relay), Cell("idle", tuple("abc"), ("h", "c"), idle)],
    ids=lambda cell: cell.name,
)
@pytest.mark.parametrize("lengths", [None, np.array([3, 0, 1, T])], ids=["full", "lengths"])
def test_other_cells_by_finite_differences(monkeypatch, cell, lengths):
    equations = lambda x, recurrent, s, v: cell.equations(x, recurrent, s)  # noqa: E731
    family = Family(cell.gates, cell.states, Variant(cell.name, ()), equations)
    monkeypatch.setitem(FAMILIES, cell.name, family)
    monkeypatch.setattr(fusedrnn.spec, "MODES", (*MODES, cell.name))
    task = problem(RNNSpec(cell.name, I, H, 2, True, dtype="float64"), lengths)
    check_by_differences(task, ("dx", "dparams", *(f"d{name}0" for name in cell.states)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.longdouble])
@pytest.mark.parametrize("mode", MODES)
def test_any_float_type(mode, dtype):
    spec = RNNSpec(mode, I, H, 2, True, dropout=0.3, dtype="float64")
    # Numbers that every type represents exactly.
    task = problem(spec, LENGTHS, seed=3).astype(np.float16).astype(np.float64)
    actual = task.astype(dtype).run()
    assert {value.dtype for value in actual.values()} == {np.dtype(dtype)}
    assert_same(actual, task.run(), spec, np.float64 if dtype is np.longdouble else dtype)


@pytest.mark.skipif(not LONG, reason="longdouble is float64 here")
@pytest.mark.parametrize("mode", MODES)
def test_longdouble_is_more_exact(mode):
    task = problem(RNNSpec(mode, I, H, dtype="float64")).astype(np.longdouble)
    for name, value in task.run().items():
        assert np.any(value != value.astype(np.float64)), name


def test_the_slope_of_relu():
    gate = np.array([-1.0, -0.0, 0.0, 1e-300, np.inf, np.nan])
    value = np.array([1.0, 2.0, np.nan, 4.0, 5.0, 6.0])
    np.testing.assert_array_equal(reference.NUMPY.apply("relu_grad", gate, value), [0, 0, 0, 4, 5, 6])
    assert reference.NUMPY.apply("relu_grad", gate, value.astype(np.float16)).dtype == np.float16
