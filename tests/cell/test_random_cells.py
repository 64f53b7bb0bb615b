"""Random cells from the language: the reference, and of some the kernels, against torch's autograd on the same program.

The cells are other ones each day; ``FUSEDRNN_TEST_SEED`` chooses the first one instead. ``FUSEDRNN_TEST_CELLS`` is the
number of cells whose derivatives are tested.
"""

import datetime
import os

import numpy as np
import pytest
import torch

from fusedrnn import RNNSpec
from fusedrnn.cell import cell, mask, maximum, mean, sigmoid, softplus, tanh, variance, where
from fusedrnn.torch.double_backward import _TENSORS
from paper_cells import check_training
from problems import Shape, problem_of
from random_cells import OPERATIONS, SHAPE, check_composed, check_reference, draw, random_problem
from variants import Steps, variant_results

CELLS_OF_A_PART = 20
CELLS_OF_A_DAY = 240
PARTS = -(-int(os.environ.get("FUSEDRNN_TEST_CELLS", CELLS_OF_A_DAY)) // CELLS_OF_A_PART)
KERNEL_SHAPE = Shape(4, 3, 3, 5, lengths="edges")


def first_seed():
    """Of this run: from the environment, or from the date."""
    return int(os.environ.get("FUSEDRNN_TEST_SEED", datetime.date.today().toordinal() * CELLS_OF_A_DAY))


def check_derivatives(problem, steps):
    """The reference forward and backward, and PyTorch's operations differentiated twice."""
    check_reference(problem, steps)
    check_composed(problem, steps)


@pytest.mark.parametrize("part", range(PARTS))
def test_derivatives(part):
    """Of random cells, against autograd on the same programs."""
    first = first_seed() + part * CELLS_OF_A_PART
    for seed in range(first, first + CELLS_OF_A_PART):
        problem, steps = random_problem(seed)
        try:
            check_derivatives(problem, steps)
        except Exception as error:
            equations = problem.spec.mode.explain()
            pytest.fail(f"FUSEDRNN_TEST_SEED={seed}, {problem.spec}: {type(error).__name__}: {error}\n{equations}")


@pytest.mark.parametrize("seed", [14, 24, 43, 7])
def test_kernels(seed):
    """Of no, one, two and three products, beginning with a state or not, with outputs that are no states."""
    problem, steps = random_problem(seed, KERNEL_SHAPE)
    check_training(problem, variant_results(problem, steps=steps))


def test_two_products_of_equal_operands():
    """They are one product. Of 7,000 programs, that of this seed has them."""
    problem, steps = random_problem(2012161)
    assert problem.spec.mode.gates == ("g00", "g20", "g21", "g10", "g11", "x0")
    check_derivatives(problem, steps)


def test_comparison_of_equal_values():
    """Two expressions for tanh of the same number: the oracle rounds as the cell does, and decides as it does."""
    check_derivatives(*random_problem(2076999))


def test_terms_that_cancel():
    """All gradients of one direction are small, and their rounding errors are not."""
    check_derivatives(*random_problem(2067598))


def test_programs_cover_the_language():
    programs = [draw(np.random.default_rng(seed)) for seed in range(100)]
    assert {op for program in programs for section in program.sections for op, *_ in section} == set(OPERATIONS)
    assert {len(program.groups) for program in programs} == {0, 1, 2, 3}
    kinds = {str(kind) for program in programs for kind in program.kinds.values()}
    assert kinds == {"both", "without input", "in its operand"}
    assert {len(program.states) for program in programs} == {1, 2, 3}
    for name, values in (("output", {None, "y"}), ("raw", {False, True}), ("heads", {1, 2}), ("layers", {1, 2})):
        assert {getattr(program, name) for program in programs} == values


@cell(gates="a b c", states="h m", vectors="v")
def alike(x, recurrent, s, p):
    """Operands, a state and what is reduced are the same for all units, or a mask, which is a number in inference."""
    kept = mask("kept", 0.25)
    a = tanh(x.a + recurrent(softplus(1.0 - kept)).a)
    b = recurrent(mean(s.h)).b + x.b
    new = a * s.m + sigmoid(b) * recurrent(p.v).c + (1.0 - kept) * variance(kept, s.h)
    return new, where(kept < 0.5, maximum(kept, 0.0) * p.v, kept) + where(kept < 0.25, kept, s.m)


class AlikeSteps(Steps):
    def __init__(self, spec, weights):
        self.spec, self.w, self.margin = spec, weights, np.inf

    def __call__(self, x, states):
        (h, m), H, ones = states, self.spec.hidden_size, torch.ones_like(states[0])
        rows = [slice(number * H, (number + 1) * H) for number in range(3)]
        a, b = (x @ self.w["i2h_weight"][own].T + self.w["i2h_bias"][own] for own in rows[:2])
        operands = float(np.logaddexp(0, 0.75)) * ones, h.mean(dim=1, keepdim=True) * ones, self.w["v"] * ones
        parts = [
            operand @ self.w["h2h_weight"][own].T + self.w["h2h_bias"][own]
            for operand, own in zip(operands, rows, strict=True)
        ]
        spread = torch.cat([0.25 * ones, h], dim=1).var(dim=1, correction=0, keepdim=True)
        new = torch.tanh(a + parts[0]) * m + torch.sigmoid(b + parts[1]) * parts[2] + 0.75 * spread
        return new, 0.25 * self.w["v"] + m


def test_what_is_the_same_for_all_units():
    spec = RNNSpec(alike.expectation, SHAPE.I, SHAPE.H, dtype="float64")
    problem = problem_of(spec, SHAPE)
    check_reference(problem, AlikeSteps)
    check_composed(problem, AlikeSteps)
    check_training(problem, variant_results(problem, steps=AlikeSteps))


def test_softplus_of_large_numbers():
    """PyTorch's own takes x itself above 20, which is wrong in the tenth digit."""
    x = torch.tensor([-30.0, 19.9, 20.1, 30.0, 50.0], dtype=torch.float64)
    expected = torch.logaddexp(x, torch.zeros_like(x))
    torch.testing.assert_close(_TENSORS.apply("softplus", x), expected, rtol=1e-14, atol=0)
