"""Networks as one job: the bits of one RNNOp after the other, for any options, plan and number of threads."""

from dataclasses import replace

import numpy as np
import pytest

from fusedrnn import NetworkOp, frozen, thread_limits
from fusedrnn.engines.cpu import cached_network, tuning
from fusedrnn.engines.cpu.network import CPUNetwork
from networks import NETWORKS, assert_same, chained, flat, make_network_problem, run

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


@pytest.fixture
def cached_calls(monkeypatch):
    """The number of calls that were cached calls."""
    counts = {"forward": 0, "backward": 0}
    kinds = {"forward": cached_network.CachedNetworkForward, "backward": cached_network.CachedNetworkBackward}
    for name, kind in kinds.items():
        plain = kind.__call__

        def counted(self, *arguments, plain=plain, name=name):
            result = plain(self, *arguments)
            counts[name] += result is not None
            return result

        monkeypatch.setattr(kind, "__call__", counted)
    return counts


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["packed", "unpacked", "frozen"])
@pytest.mark.parametrize("options", [(), ("resets",)], ids=["plain", "resets"])
@pytest.mark.usefixtures("poisoned")
def test_cached_calls(cached_calls, name, kind, options):
    """They have the same bits, whatever the parameters are, and read parameters that have changed anew."""
    problem = make_network_problem(NETWORKS[name], 3, 2, options)
    params = frozen(problem.params) if kind == "frozen" else problem.params
    problem = replace(problem, params=params)
    work = 1 << 40 if kind == "unpacked" else 0
    with tuning.tuned(max_unpacked_work=work, max_unpacked_work_training=work), thread_limits(2):
        op = NetworkOp(problem.spec)
        for number in range(4):
            expected, trained = chained(problem, training=False), chained(problem)
            assert_same(run(op, problem, training=False), expected)
            _, _, reserve = op.forward(problem.x, params, problem.states, training=True, seed=3, **problem.options)
            assert_same(op.backward(problem.dy, problem.dstates, reserve), trained[2])
            y, final, reserve = op.forward(problem.x, params, problem.states, training=True, **problem.options)
            gradients = op.backward(problem.dy, problem.dstates, reserve)
            seeded = chained(problem, seed=reserve.seed)
            assert_same((y, final, gradients), seeded)
            if kind != "frozen":
                params += np.asarray(0.01, params.dtype)
            assert number < 2 or (cached_calls["forward"] >= 2 and cached_calls["backward"] >= 1)


def test_what_differs_is_a_checked_call(cached_calls):
    """Other shapes, states, buffers; errors are those of checked calls."""
    problem = make_network_problem(NETWORKS["sizes"], 4, 2)
    op, other = NetworkOp(problem.spec), NetworkOp(problem.spec)
    arrays = problem.x, problem.params, problem.states
    for _ in range(3):
        y, _, reserve = op.forward(*arrays, training=True)
        op.forward(*arrays)
        gradients = op.backward(problem.dy, problem.dstates, reserve)
    assert cached_calls == {"forward": 2, "backward": 1}
    assert op.forward(*arrays, out=y)[0] is y
    written = op.backward(problem.dy, problem.dstates, reserve, out=gradients)
    assert written[0] is gradients[0] and all(a is b for a, b in zip(flat(written), flat(gradients), strict=True))
    assert cached_calls == {"forward": 3, "backward": 2}
    for changed in (
        (problem.x[:3], *arrays[1:]),
        (problem.x, problem.params, None),
        (problem.x, problem.params, (None, *problem.states[1:])),
        (problem.x.astype("d").astype("f")[::-1], *arrays[1:]),
    ):
        results = op.forward(*changed)
        assert_same(results[:2], other.forward(*changed)[:2])
    assert_same(op.backward(problem.dy, None, reserve), other.backward(problem.dy, None, reserve))
    assert_same(
        op.backward(problem.dy, problem.dstates, reserve, grad_req={"params": "null"})[::2],
        (gradients[0], gradients[2]),
    )
    with pytest.raises(ValueError, match=r"^out must not share memory with states$"):
        op.forward(*arrays[:2], (None, None, (y[:1], None)), out=y)
    with pytest.raises(ValueError, match=r"^states\[1\]: h0 must have shape"):
        op.forward(*arrays[:2], (problem.states[0], problem.states[2], problem.states[1]))
    with pytest.raises(ValueError, match=r"^params must have shape"):
        op.forward(problem.x, problem.params[1:], problem.states)
    with pytest.raises(TypeError, match=r"^training must be True or False; got 1$"):
        op.forward(*arrays, training=1)


@pytest.mark.parametrize("options", [(), ("lengths",)], ids=["plain", "lengths"])
def test_layers_divide_their_work_in_different_ways(options):
    """Some threads have nothing to do in some layers, and their groups of rows differ."""
    problem = make_network_problem(NETWORKS["cells"], 6, 7, options)
    expected, trained = chained(problem, training=False), chained(problem)

    def choose(own, grids):
        wanted = {20: (1, 2, 1), 33: (2, 1, 1), 4: (1, 3, 1)}.get(own.spec.hidden_size, (1, 1, 2))
        return next((grid for grid in grids if tuple(grid) == wanted), grids[0])

    with tuning.tuned(max_unpacked_work=0, max_unpacked_work_training=0, choose_grid=choose), thread_limits(3):
        op = NetworkOp(problem.spec)
        assert_same(run(op, problem, training=False), expected)
        assert_same(run(op, problem), trained)
        planned = op._engine.executor._planned
    for name, job in planned.items():
        assert job.args.num_threads == 3, name
        assert len({len(layer.args.plan.row_starts) for layer in job.args.jobs}) == 3, name
