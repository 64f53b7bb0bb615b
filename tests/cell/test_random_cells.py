"""Random cells from the language: the reference, and of some the kernels, against torch's autograd on the same program.

A cell is a list of operations on values by number; torch's functions and the language's interpret it. Operations keep
values between -2 and 2, so that no derivative grows with the depth of a program.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fusedrnn import RNNSpec
from fusedrnn import cell as language
from oracles import reference_results
from paper_cells import check_training
from problems import Shape, assert_close, assert_gradients_close, problem_of
from variants import Steps, variant_results

UNARY = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": lambda a: torch.nn.functional.softplus(a, threshold=40),
    "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "relu": torch.relu, "absolute": torch.abs,
}  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "maximum", "minimum", "where")
REDUCTIONS = ("mean", "variance", "layer_norm")
SHAPE = Shape(4, 3, 3, 5, layers=2, bidirectional=True, lengths="edges")


def draw(rng, elementwise):
    """The names of a random cell and its program: the gates of each recurrent product, and the operations after it.

    The operations of the first entry are before the first product, which without any is of the output. Some gates have
    no part from the input, and some are in the operand of their own product. An elementwise cell has no products, and
    operations once.
    """
    products = 0 if elementwise else int(rng.integers(1, 4))
    groups = [[f"g{product}{number}" for number in range(rng.integers(1, 3))] for product in range(products)]
    inputs = [f"x{number}" for number in range(elementwise + rng.integers(0, 2))]
    states = [f"s{number}" for number in range(rng.integers(1, 4))]
    vectors, scalars = (["v"] * int(rng.integers(0, 2)), ["t"] * int(rng.integers(0, 2)))
    operations = [*UNARY, *BINARY, *REDUCTIONS]
    lengths = [int(rng.integers(0, 3)) if products else 0, *(int(rng.integers(1, 5)) for _ in range(products or 1))]
    steps = [[(str(rng.choice(operations)), *map(float, rng.random(3))) for _ in range(length)] for length in lengths]
    gates = [gate for group in groups for gate in group]
    kinds = rng.choice(["both", "both", "without input", "in its operand"], len(gates))
    inputs = inputs or ["x0"] * all(kinds == "without input")
    return SimpleNamespace(
        groups=groups, inputs=inputs, states=states, vectors=vectors, scalars=scalars, steps=steps,
        kinds=dict(zip(gates, kinds, strict=True)), output="y" if rng.random() < 0.3 else None,
    )  # fmt: skip


def apply(op, a, b, c, on):
    """An operation whose result is between -2 and 2 and has bounded derivatives; ``on`` has the functions."""
    if op == "log":
        return on.log(1.0 + abs(a))
    if op == "sqrt":
        return on.sqrt(0.5 + abs(a))
    if op in ("exp", "softplus"):
        return getattr(on, op)(0.5 * on.tanh(a))
    if op in UNARY:
        return getattr(on, op)(a) if op in ("tanh", "sigmoid") else on.tanh(getattr(on, op)(a))
    if op in ("mean", "variance"):
        return on.tanh(c + getattr(on, op)(a, b))
    if op == "layer_norm":
        first, second = on.layer_norm(a, b, epsilon=0.5)
        return on.tanh(first * c - second)
    if op in ("maximum", "minimum"):
        return on.tanh(getattr(on, op)(a, b))
    if op == "where":
        return on.tanh(on.where(a < b, a * c, c - 0.25 * b))
    result = {"add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "div": lambda: a / (1.5 + abs(b))}
    return on.tanh(result[op]())


def run_program(program, x, recurrent, states, parameters, on):
    """One step: the output if it is no state, then the new states."""
    values = [*states, *(x(name) for name in program.inputs), *parameters]

    def operate(steps):
        for op, *positions in steps:
            values.append(apply(op, *(values[int(position * len(values))] for position in positions), on))

    operate(program.steps[0])
    for product, (gates, steps) in enumerate(zip(program.groups or [[]], program.steps[1:], strict=True)):
        operand = values[-1] if product or program.steps[0] else states[0]
        for gate in (gate for gate in gates if program.kinds[gate] == "in its operand"):
            operand = on.tanh(operand + x(gate))
        for number, (gate, part) in enumerate(zip(gates, recurrent(operand, gates) if gates else [], strict=True)):
            if program.kinds[gate] == "without input":
                values.append(part * values[0])
            else:  # sums that a kernel may fuse, and products that it may not
                values.append(x(gate) + part if number else x(gate) * 0.5 + part * values[0])
        operate(steps)
    total = values[0]
    for value in values[1:]:
        total = total + 0.3 * value  # every gate and parameter has an effect
    output = [on.tanh(total - 0.5 * values[-1])] if program.output else []
    others = (on.tanh(total * 0.5 + value) for value in values[-len(states) + 1 :][: len(states) - 1])
    return [*output, on.tanh(total), *others]


def as_cell(program, name):
    """The program as a cell of the language."""
    gates = [gate for group in program.groups for gate in group]

    def equations(x, recurrent, s, *own):
        def product(operand, names):
            result = recurrent(operand)
            return [getattr(result, gate) for gate in names]

        parameters = [getattr(own[0], parameter) for parameter in (*program.vectors, *program.scalars)]
        states = [getattr(s, state) for state in program.states]
        new = run_program(program, lambda gate: getattr(x, gate), product, states, parameters, language)
        return tuple(new)

    names = {"gates": [*gates, *program.inputs], "states": program.states}
    names |= {"vectors": program.vectors, "scalars": program.scalars}
    texts = {kind: " ".join(of_kind) for kind, of_kind in names.items()}
    return language.cell(name=name, output=program.output, **texts)(equations)


def tensor_functions(shape):
    """The language's functions on tensors, of rows of this shape."""

    def row(values):
        return torch.cat([value.expand(shape) for value in values], dim=1)

    def layer_norm(*values, epsilon):
        joined = row(values)
        return torch.nn.functional.layer_norm(joined, joined.shape[1:], eps=epsilon).chunk(len(values), dim=1)

    return SimpleNamespace(
        **UNARY, where=torch.where, maximum=torch.maximum, minimum=torch.minimum, layer_norm=layer_norm,
        mean=lambda *values: row(values).mean(dim=1, keepdim=True),
        variance=lambda *values: row(values).var(dim=1, correction=0, keepdim=True),
    )  # fmt: skip


def as_steps(program):
    """The program on tensors: the oracle's step."""
    h_gates = [gate for group in program.groups for gate in group]
    x_gates = [gate for gate in h_gates if program.kinds[gate] != "without input"] + program.inputs

    class ProgramSteps(Steps):
        def __init__(self, spec, weights):
            self.spec, self.w, self.margin = spec, weights, np.inf

        def __call__(self, x, states):
            H = self.spec.hidden_size
            on = tensor_functions((len(x), H))

            def part(kind, gates, gate, operand):
                rows = slice(gates.index(gate) * H, (gates.index(gate) + 1) * H)
                return operand @ self.w[f"{kind}_weight"][rows].T + self.w[f"{kind}_bias"][rows]

            def from_x(gate):
                return part("i2h", x_gates, gate, x)

            def product(operand, names):
                full = operand.expand(len(x), H)  # also if it depends on parameters alone
                return [part("h2h", h_gates, gate, full) for gate in names]

            parameters = [self.w[name] for name in (*program.vectors, *program.scalars)]
            new = run_program(program, from_x, product, list(states), parameters, on)
            return tuple(state.expand(len(x), H) for state in new)

    return ProgramSteps


def problem(seed):
    """A random cell's problem, and the oracle's results; below zero of a cell without recurrent products."""
    program = draw(np.random.default_rng(abs(seed)), elementwise=seed < 0)
    spec = RNNSpec(as_cell(program, f"random{abs(seed)}"), SHAPE.I, SHAPE.H, SHAPE.layers, True, dtype="float64")
    of_cell = problem_of(spec, SHAPE, abs(seed))
    return of_cell, variant_results(of_cell, steps=as_steps(program))


@pytest.mark.parametrize("seed", range(-4, 12))
def test_reference(seed):
    of_cell, oracle = problem(seed)
    actual = reference_results(of_cell)
    assert_close(actual.forward, oracle.forward, "float64", of_cell.spec)
    assert_gradients_close(actual.gradients, oracle.gradients, "float64", of_cell.spec, SHAPE.T, SHAPE.N)


@pytest.mark.parametrize("seed", [-4, 3, 6, 12])
def test_kernels(seed):
    """Of none, two and three products, beginning with one of the output or not, one to three states, parameters."""
    check_training(*problem(seed))
