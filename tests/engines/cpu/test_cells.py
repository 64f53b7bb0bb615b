"""The catalogue of cells: the kernels and the reference against the papers' equations in torch, in float64."""

import ast
import inspect
import re

import pytest

import fusedrnn
from fusedrnn import cells
from fusedrnn.jit.host import available_targets
from oracles import reference_results
from paper_cells import ALL_CELLS, KERNEL_CELLS, cell_problem, check_training
from problems import Shape, assert_close, assert_gradients_close

pytestmark = pytest.mark.usefixtures("poisoned", "use_all_threads")

SHAPE = Shape(5, 3, 7, 17, layers=2, bidirectional=True, lengths="edges")


@pytest.mark.parametrize("name", ALL_CELLS)
def test_reference(name):
    problem, oracle = cell_problem(name, SHAPE)
    problem = problem.typed("float64")
    actual = reference_results(problem)
    assert_close(actual.forward, oracle.forward, "float64", problem.spec)
    assert_gradients_close(actual.gradients, oracle.gradients, "float64", problem.spec, SHAPE.T, SHAPE.N)


@pytest.mark.parametrize("name", KERNEL_CELLS)
def test_kernels(name, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_TARGET", available_targets()[0].name)
    for shape in (SHAPE, Shape(1, 1, 1, 2, states=False)):
        with fusedrnn.thread_limits(2):
            check_training(*cell_problem(name, shape))


def test_every_cell_is_short_and_names_its_paper():
    catalogue = {getattr(cells, name) for name in cells.__all__}
    assert len(catalogue) == len(cells.__all__)
    for cell in catalogue:
        assert re.search(r"https://(arxiv\.org/abs/|doi\.org/10\.|proceedings\.mlr\.press/v)\d", cell.__doc__)
        source = ast.parse(inspect.getsource(cell.equations)).body[0]
        assert sum(statement.end_lineno - statement.lineno + 1 for statement in source.body[1:]) <= 15
