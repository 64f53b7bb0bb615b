"""Networks as one job: the bits of one RNNOp after the other, for any options, plan and number of threads."""

import pytest

from fusedrnn import NetworkOp, thread_limits
from fusedrnn.engines.cpu.network import CPUNetwork
from networks import NETWORKS, assert_same, chained, make_network_problem, run

OPTIONS = [
    (), ("lengths",), ("resets",), ("resets", "reset_states", "reserve"), ("lengths", "all_states"),
    ("lengths", "resets", "reset_states", "all_states", "reserve"),
]  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.usefixtures("poisoned")
def test_bits(name, options):
    """Of outputs, states and all gradients."""
    problem = make_network_problem(NETWORKS[name], 5, 6, options)
    op = NetworkOp.get(problem.spec)
    assert type(op._engine) is CPUNetwork
    with thread_limits(1):
        expected, trained = chained(problem, training=False), chained(problem)
    for threads in (1, 3):
        with thread_limits(threads):
            assert_same(run(op, problem, training=False), expected)
            assert_same(run(op, problem), trained)
