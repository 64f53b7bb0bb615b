"""Random cells from the whole language, and the same programs on torch's tensors as their oracle.

A cell is a list of operations on values by number; the language's functions and torch's interpret it. Operations keep
values between -2 and 2, so that no derivative grows with the depth of a program.
"""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from fusedrnn import RNNSpec
from fusedrnn import cell as language
from fusedrnn.cell import Activation
from fusedrnn.testing.tolerance import difference, gradient_tolerance
from fusedrnn.torch import composed
from oracles import reference_results
from problems import Shape, assert_close, gradient_parts, problem_of
from variants import FUNCTIONS, Steps, recorded, variant_results

UNARY = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": lambda a: F.softplus(a, threshold=40),
    "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "relu": torch.relu, "absolute": torch.abs,
}  # fmt: skip
COMPARISONS = ("lt", "le", "gt", "ge")
OPERATIONS = (
    *UNARY, *COMPARISONS, "add", "sub", "mul", "div", "maximum", "minimum", "power", "affine", "clip", "activation",
    "mean", "variance", "layer_norm", "mask", "masked", "dropout", "zoneout",
)  # fmt: skip
SHAPE = Shape(3, 3, 3, 4, lengths="edges")


def draw(rng):
    """A random program: names of all kinds, up to three products, and three to twelve operations around them.

    The operand of the first product is a state or the result of operations before it. A gate may lack a part from the
    input, and its part from the input may be in the operand of its own product.
    """
    products = int(rng.integers(0, 4))
    groups = [[f"g{product}{number}" for number in range(rng.integers(1, 3))] for product in range(products)]
    gates = [gate for group in groups for gate in group]
    kinds = rng.choice(["both", "both", "without input", "in its operand"], len(gates))
    inputs = [f"x{number}" for number in range(rng.integers(0, 2))]
    if all(kinds == "without input"):  # which also holds if there are no products
        inputs = ["x0", *inputs[1:]]
    sections = [[] for _ in range(products + 1)]
    for number in range(rng.integers(3, 13)):
        of = number if 0 < number <= products else rng.integers(0, products + 1)
        sections[of].append((str(rng.choice(OPERATIONS)), *map(float, rng.random(4))))
    return SimpleNamespace(
        groups=groups, inputs=inputs, states=[f"s{number}" for number in range(rng.integers(1, 4))],
        vectors=["v", "w"][: rng.integers(0, 3)], scalars=["t"][: rng.integers(0, 2)], sections=sections,
        kinds=dict(zip(gates, kinds, strict=True)), output=[None, None, "y"][rng.integers(0, 3)],
        first=float(rng.random()), raw=rng.random() < 0.15, heads=1 + int(products and rng.random() < 0.15),
        bias=str(rng.choice(["double", "double", "single", "none"])),
        layers=1 + int(rng.random() < 0.2), bidirectional=rng.random() < 0.3,
    )  # fmt: skip


def apply(op, a, b, c, r, number, on):
    """An operation whose result is between -2 and 2 and has bounded derivatives; ``on`` has the functions."""
    if op in UNARY:
        inner = {"log": lambda: 1.0 + abs(a), "sqrt": lambda: 0.5 + abs(a), "exp": lambda: 0.5 * on.tanh(a)}
        return on.tanh(getattr(on, op)(inner.get(op, lambda: a)()))
    if op in COMPARISONS:
        return on.tanh(on.where(getattr(a, f"__{op}__")(b), a * c, c - r * b))
    if op == "layer_norm":
        first, second = on.layer_norm(a, b, epsilon=0.5)
        return on.tanh(first * c - second)
    if op == "mask":
        return on.mask(f"m{number}", 0.1 + 0.9 * r)
    if op == "zoneout":
        return on.zoneout(f"m{number}", a, on.tanh(b), 0.9 * r)
    if op == "dropout":
        return on.tanh(on.dropout(f"m{number}", a, 0.9 * r, per="sequence" if r < 0.5 else "step"))
    result = {
        "add": lambda: a + b, "sub": lambda: a - b, "mul": lambda: a * b, "div": lambda: a / (1.5 + abs(b)),
        "maximum": lambda: on.maximum(a, b), "minimum": lambda: on.minimum(a, b),
        "power": lambda: -(a ** (1 + int(3 * r))), "clip": lambda: on.clip(a + b, -r, 1 - r),
        "affine": lambda: (r - a) / 2 + (1 - r) * b,
        "activation": lambda: on.activation(sorted(FUNCTIONS)[int(r * len(FUNCTIONS))], a),
        "mean": lambda: c + on.mean(a, b), "variance": lambda: c + on.variance(a, b),
        "masked": lambda: a * on.mask(f"m{number}", 0.1 + 0.9 * r) + b,
    }  # fmt: skip
    return on.tanh(result[op]())


def run_program(program, x, recurrent, states, parameters, on):
    """One step: the output if it is no state, and the new states."""
    values = [*states, *(x(name) for name in program.inputs), *parameters]
    if program.raw:
        values.append(on.tanh(x("raw")))
    counter = iter(range(100))

    def operate(steps):
        for op, *positions, r in steps:
            operands = [values[int(position * len(values))] for position in positions]
            values.append(apply(op, *operands, r, next(counter), on))

    operate(program.sections[0])
    for product, gates in enumerate(program.groups):
        operand = values[-1] if product or program.sections[0] else states[int(program.first * len(states))]
        for gate in (gate for gate in gates if program.kinds[gate] == "in its operand"):
            operand = on.tanh(operand + x(gate))
        for number, (gate, part) in enumerate(zip(gates, recurrent(operand, gates), strict=True)):
            if program.kinds[gate] == "without input":
                values.append(part * values[0])
            else:  # sums that a kernel may fuse, and products that it may not
                values.append(x(gate) + part if number else x(gate) * 0.5 + part * values[0])
        operate(program.sections[product + 1])
    total = values[0]
    for value in values[1:]:
        total = total + 0.3 * value  # every gate and parameter has an effect
    count = len(states) - (program.output is None)
    return [on.tanh(total), *(on.tanh(total * 0.5 + value) for value in values[len(values) - count :])]


def as_cell(program, name):
    """The program as a cell of the language."""
    gates = [gate for group in program.groups for gate in group]
    on = SimpleNamespace(
        **{name: getattr(language, name) for name in language.__all__}, activation=lambda name, a: Activation(name)(a)
    )

    def equations(x, recurrent, s, *own):
        def product(operand, names):
            result = recurrent(operand)
            return [getattr(result, gate) for gate in names]

        parameters = [getattr(own[0], parameter) for parameter in (*program.vectors, *program.scalars)]
        states = [getattr(s, state) for state in program.states]
        return tuple(run_program(program, partial(getattr, x), product, states, parameters, on))

    names = {"gates": [*gates, *program.inputs], "states": program.states}
    names |= {"vectors": program.vectors, "scalars": program.scalars}
    texts = {kind: " ".join(of_kind) for kind, of_kind in names.items()}
    define = partial(language.cell, name=name, output=program.output)
    try:
        cell = define(**texts)(equations)
    except ValueError as error:
        # Products of equal operands are one product, whose gates must come together. The error says in which order.
        order = re.search("write gates='(.*)'$", str(error))
        if order is None:
            raise
        cell = define(**texts | {"gates": order[1]})(equations)
    return cell if program.heads == 1 else cell.with_heads(program.heads)


def tensor_functions(shape):
    """The language's functions on tensors, of rows of this shape; random masks are their expectations."""

    def row(values):
        return torch.cat([value.expand(shape) for value in values], dim=1)

    def layer_norm(*values, epsilon):
        joined = row(values)
        return F.layer_norm(joined, joined.shape[1:], eps=epsilon).chunk(len(values), dim=1)

    def activation(name, a):
        of_name = Activation(name)
        return FUNCTIONS[name](a, of_name.alpha, of_name.beta)

    return SimpleNamespace(
        **UNARY, where=torch.where, maximum=torch.maximum, minimum=torch.minimum, layer_norm=layer_norm,
        clip=torch.clamp, activation=activation, dropout=lambda name, a, rate, per: a,
        mask=lambda name, keep: torch.full(shape, keep, dtype=torch.float64),
        zoneout=lambda name, old, new, rate: rate * old + (1 - rate) * new,
        mean=lambda *values: row(values).mean(dim=1, keepdim=True),
        variance=lambda *values: row(values).var(dim=1, correction=0, keepdim=True),
    )  # fmt: skip


def as_steps(program, gates):
    """The program on tensors: the oracle's step, with the weights of its gates in that order."""
    h_gates = [gate for gate in gates if gate not in program.inputs]
    x_gates = [gate for gate in h_gates if program.kinds[gate] != "without input"] + program.inputs

    class ProgramSteps(Steps):
        def __init__(self, spec, weights):
            self.spec, self.w, self.margin = spec, weights, np.inf

        def part(self, kind, rows, operand):
            bias = self.w.get(f"{kind}_bias")
            weight = self.w[f"{kind}_weight"][rows]
            if kind == "h2h":
                weight = torch.block_diag(*weight.split(len(weight) // program.heads))
            return operand @ weight.T + (0 if bias is None else bias[rows])

        def __call__(self, x, states):
            H = self.spec.hidden_size
            on = tensor_functions((len(x), H))

            def rows(gates, gate):
                return slice(gates.index(gate) * H, (gates.index(gate) + 1) * H)

            def from_x(gate):
                return x if gate == "raw" else self.part("i2h", rows(x_gates, gate), x)

            def product(operand, names):
                full = operand.expand(len(x), H)  # also if it depends on parameters alone
                return [self.part("h2h", rows(h_gates, gate), full) for gate in names]

            parameters = [self.w[name] for name in (*program.vectors, *program.scalars)]
            new = run_program(program, from_x, product, list(states), parameters, on)
            return tuple(state.expand(len(x), H) for state in new)

    return ProgramSteps


def random_problem(seed, shape=SHAPE):
    """A random cell's problem in float64, each head of ``shape.H`` units, and the oracle's step."""
    program = draw(np.random.default_rng(seed))
    shape = replace(shape, H=shape.H * program.heads, layers=program.layers, bidirectional=program.bidirectional)
    if program.raw:
        shape = replace(shape, I=shape.H, bidirectional=program.bidirectional and program.layers == 1)
    cell = as_cell(program, f"random{seed}").expectation
    spec = RNNSpec(cell, shape.I, shape.H, shape.layers, shape.bidirectional, dtype="float64", bias=program.bias)
    return problem_of(spec, shape, seed), as_steps(program, cell.gates)


def check_reference(problem, steps):
    """The reference, forward and backward, against autograd."""
    oracle = variant_results(problem, steps=steps)
    actual, (T, N, _) = reference_results(problem), problem.x.shape
    assert_close(actual.forward, oracle.forward, "float64", problem.spec)
    # The terms of a gradient may cancel, in all parameters of a direction. What the backward pass adds up is still as
    # large as the largest gradient.
    parts = [gradient_parts(problem.spec, results.gradients) for results in (actual, oracle)]
    scale = max(float(np.abs(array).max(initial=0)) for group in parts[1] for array in group.values())
    bounds = gradient_tolerance("float64", problem.spec, T, N, scale)
    for one, other in zip(*parts, strict=True):
        for name, exact in other.items():
            error = difference(one[name], exact, *bounds)
            assert error is None, f"{name}{error}"


def derivatives(results, leaves, problem):
    """The gradients of the results, and the gradients of these, both in random directions."""
    directions = [torch.tensor(array) for array in (problem.dy, *problem.dstates)]
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(results, leaves, directions, create_graph=True, **options)
    generator = torch.Generator().manual_seed(0)
    total = sum((one * torch.randn(one.shape, generator=generator, dtype=one.dtype)).sum() for one in first)
    return *first, *torch.autograd.grad(total, leaves, **options)


def check_composed(problem, steps):
    """The operations of PyTorch that a layer is composed of, differentiated twice, against autograd of the program."""
    spec = problem.spec
    leaves, results, _ = recorded(problem, steps)
    expected = [*results, *derivatives(results, leaves, problem)]
    x, params, *states = leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    weights = [params[one.offset : one.offset + one.size].view(one.shape) for one in spec.layout.by_layer_direction]
    lengths = None if problem.lengths is None else torch.from_numpy(problem.lengths)
    y, final = composed.run(spec, x, states, weights, lengths=lengths)
    actual = [y, *final, *derivatives((y, *final), leaves, problem)]
    for number, pair in enumerate(zip(actual, expected, strict=True)):
        one, other = (tensor.detach() for tensor in pair)
        error, largest = float((one - other).abs().max()), float(other.abs().max())
        assert error <= 1e-9 * (1 + largest), f"result {number} differs by {error} of {largest}"
