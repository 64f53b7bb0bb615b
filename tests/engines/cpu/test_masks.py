"""Random masks inside a step: the kernels and the reference against loops of torch, with masks by their definition."""

import numpy as np
import pytest
import torch

import fusedrnn
from fusedrnn import RNNOp, RNNSpec, cells
from fusedrnn.cell import cell, dropout, mask, sigmoid, tanh, zoneout
from fusedrnn.dropout import step_mask
from fusedrnn.engines.cpu.plan.partition import force_grid
from fusedrnn.engines.interface import SAVE_POLICIES
from fusedrnn.jit.host import available_targets
from problems import Shape, assert_close, assert_gradients_close, assert_same_bits, problem_of

pytestmark = pytest.mark.usefixtures("poisoned", "use_all_threads")

SHAPE = Shape(5, 3, 7, 17, layers=2, bidirectional=True)
SEED = 2**40 + 7


@pytest.fixture(autouse=True)
def native(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_TARGET", available_targets()[0].name)


@cell(gates="i f g o", states="h c")
def masked(x, recurrent, s):
    """A mask of each kind, one of them in the first operand, one in a second one and in another place."""
    h = recurrent(dropout("u", s.h, 0.4))
    c = sigmoid(x.f + h.f) * s.c + sigmoid(x.i + h.i) * dropout("g", tanh(x.g + h.g), 0.25, per="sequence")
    shared = mask("o", keep=0.6)
    new = sigmoid(x.o + recurrent(shared * c).o) * tanh(c)
    return zoneout("h", s.h, new, 0.3) - shared * c, c


def step_of_masked(x, h, states, draw):
    old, c = states
    kept = draw(3, 0.6) * old / 0.6
    i, f, g = (torch.sigmoid(x[0] + h(0, kept)), torch.sigmoid(x[1] + h(1, kept)), torch.tanh(x[2] + h(2, kept)))
    c = f * c + i * g * draw(0, 0.75, None) / 0.75
    new = torch.sigmoid(x[3] + h(3, draw(2, 0.6) * c)) * torch.tanh(c)
    return torch.where(draw(1, 0.7) > 0, new, old) - draw(2, 0.6) * c, c


def step_of_zoneout(x, h, states, draw):
    old, c = states
    i, f, g, o = (x[gate] + h(gate, old) for gate in range(4))
    new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h_new = torch.sigmoid(o) * torch.tanh(new_c)
    return torch.where(draw(1, 0.95) > 0, h_new, old), torch.where(draw(0, 0.5) > 0, new_c, c)


def step_of_dropout_gru(x, h, states, draw):
    (old,) = states
    r, z = (torch.sigmoid(x[gate] + h(gate, old)) for gate in (0, 1))
    n = torch.tanh(x[2] + r * h(2, old))
    return ((1 - z) * n * draw(0, 0.6) / 0.6 + z * old,)


def step_of_variational_lstm(x, h, states, draw):
    old, c = states
    kept = draw(0, 0.75, None) * old / 0.75
    i, f, g, o = (x[gate] + h(gate, kept) for gate in range(4))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def step_of_variational_gru(x, h, states, draw):
    (old,) = states
    kept = draw(0, 0.75, None) * old / 0.75
    r, z = (torch.sigmoid(x[gate] + h(gate, kept)) for gate in (0, 1))
    return ((1 - z) * torch.tanh(x[2] + r * h(2, kept)) + z * old,)


STEPS = {
    masked: step_of_masked, cells.zoneout_lstm: step_of_zoneout,
    cells.dropout_gru.with_rates(n=0.4): step_of_dropout_gru,
    cells.variational_lstm: step_of_variational_lstm, cells.variational_gru: step_of_variational_gru,
}  # fmt: skip


def oracle(problem, step):
    """The output, the final states and all gradients, in float64."""
    spec, H = problem.spec, problem.spec.hidden_size
    params = torch.tensor(problem.params, dtype=torch.float64, requires_grad=True)
    x = torch.tensor(problem.x, dtype=torch.float64, requires_grad=True)
    states = [torch.tensor(state, dtype=torch.float64, requires_grad=True) for state in problem.states]
    y, final = x, []
    for layer in range(spec.num_layers):
        outputs = []
        for direction in range(spec.num_directions):
            index = layer * spec.num_directions + direction
            w = {
                kind: params[entry.offset : entry.offset + entry.size].reshape(entry.shape)
                for kind, entry in ((kind, spec.layout.entry(layer, direction, kind)) for kind in spec.layout.kinds)
            }
            own, row = [state[index] for state in states], [None] * len(y)
            for t in reversed(range(len(y))) if direction else range(len(y)):
                x_gates = (y[t] @ w["i2h_weight"].T + w["i2h_bias"]).split(H, dim=1)

                def product(gate, operand, w=w):
                    rows = slice(gate * H, (gate + 1) * H)
                    return operand @ w["h2h_weight"][rows].T + w["h2h_bias"][rows]

                def draw(number, keep, time=t, index=index):
                    kept = step_mask(SEED, keep, number, index, time, problem.x.shape[1], H)
                    return torch.from_numpy(kept).double()

                own = step(x_gates, product, own, draw)
                row[t] = own[0]
            outputs.append(torch.stack(row))
            final.append(own)
        y = torch.cat(outputs, dim=2)
    final = [torch.stack(column) for column in zip(*final, strict=True)]
    cotangents = [torch.tensor(d, dtype=torch.float64) for d in (problem.dy, *problem.dstates)]
    dx, dparams, *dstates = torch.autograd.grad([y, *final], [x, params, *states], cotangents)
    forward = y.detach().numpy(), tuple(state.detach().numpy() for state in final)
    return forward, (dx.numpy(), dparams.numpy(), tuple(d.numpy() for d in dstates))


@pytest.mark.parametrize("of_cell", STEPS, ids=lambda of_cell: of_cell.name)
def test_training(of_cell):
    problem = problem_of(SHAPE.spec(of_cell), SHAPE)
    forward, gradients = oracle(problem, STEPS[of_cell])
    results = []
    for engine, dtype in (("reference", "float64"), ("cpu", "float32")):
        typed = problem.typed(dtype)
        for keep in SAVE_POLICIES:
            op = RNNOp(typed.spec, engine)
            options = {"training": True, "seed": SEED, "reserve": keep}
            y, final, reserve = op.forward(typed.x, typed.params, typed.states, **options)
            assert_close((y, final), forward, dtype, typed.spec)
            actual = op.backward(typed.dy, typed.dstates, reserve)
            assert_gradients_close(actual, gradients, dtype, typed.spec, SHAPE.T, SHAPE.N)
            results.append((y, final, actual))
    assert_same_bits(results[-1], results[-2])


def test_bits_depend_on_neither_threads_nor_batch():
    problem = problem_of(SHAPE.spec(masked), SHAPE)
    results = []
    for grid in ((1, 1, 1), (2, 1, 2), (1, 2, 1), (1, 1, 3)):
        with fusedrnn.thread_limits(int(np.prod(grid))), force_grid(grid):
            op = RNNOp(problem.spec)
            y, final, reserve = op.forward(problem.x, problem.params, problem.states, training=True, seed=SEED)
            results.append((y, final, op.backward(problem.dy, problem.dstates, reserve)))
    for result in results[1:]:
        assert_same_bits(result, results[0])
    fewer = tuple(state[:, :2] for state in problem.states)
    y, _, _ = RNNOp(problem.spec).forward(problem.x[:, :2], problem.params, fewer, training=True, seed=SEED)
    assert_same_bits(y, results[0][0][:, :2])


@cell(gates="a")
def drawn(x, recurrent, s):
    """The sum of two masks in different digits; the gate has no effect with weights of zero."""
    return mask("step", 0.3) + 10.0 * mask("sequence", 0.8, per="sequence") + 0.0 * (x.a + recurrent(s.h).a)


def test_rates_and_expectations():
    spec = RNNSpec(drawn, 1, 100, num_layers=2)
    x, params = np.zeros((50, 20, 1), np.float32), np.zeros(spec.layout.size, np.float32)
    y, _, _ = RNNOp(spec).forward(x, params)
    np.testing.assert_allclose(y, 8.3, rtol=1e-6)
    y, _, reserve = RNNOp(spec).forward(x, params, training=True)
    per_step, per_sequence = y % 10, y // 10
    assert set(np.unique(per_step)) == set(np.unique(per_sequence)) == {0, 1}
    assert abs(per_step.mean() - 0.3) < 6 * np.sqrt(0.21 / y.size)
    assert (per_sequence == per_sequence[0]).all()
    assert abs(per_sequence[0].mean() - 0.8) < 6 * np.sqrt(0.16 / per_sequence[0].size)
    assert abs(np.corrcoef(per_step[1:].ravel(), per_step[:-1].ravel())[0, 1]) < 6 / np.sqrt(y.size)
    again, _, other = RNNOp(spec).forward(x, params, training=True)
    assert other.seed != reserve.seed
    assert (again != y).any()
    same, _, _ = RNNOp(spec).forward(x, params, training=True, seed=reserve.seed)
    assert_same_bits(same, y)


def test_expectation_is_the_cell_of_inference():
    problem = problem_of(SHAPE.spec(masked), SHAPE)
    expected, _, _ = RNNOp(problem.spec).forward(problem.x, problem.params, problem.states)
    op = RNNOp(SHAPE.spec(masked.expectation))
    y, _, _ = op.forward(problem.x, problem.params, problem.states, training=True)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert masked.expectation.expectation is masked.expectation
    assert cells.janet.expectation is cells.janet
