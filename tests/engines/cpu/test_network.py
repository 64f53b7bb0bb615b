"""Networks as one job: the bits of one RNNOp after the other, for any options, plan and number of threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from fences import AVAILABLE, fenced
from fusedrnn import NetworkOp, NetworkSpec, RNNOp, frozen, init_params, thread_limits
from fusedrnn.engines.cpu import cached_network, tuning
from fusedrnn.engines.cpu.network_engine import CPUNetwork
from fusedrnn.runtime import buffers
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


@pytest.mark.one_value("options")
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
    with tuning.tuned(max_unpacked_floats=work, max_unpacked_floats_training=work, max_own_work=work), thread_limits(2):
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

    packed = {"max_unpacked_floats": 0, "max_unpacked_floats_training": 0}
    with tuning.tuned(**packed, choose_grid=choose), thread_limits(3):
        op = NetworkOp(problem.spec)
        assert_same(run(op, problem, training=False), expected)
        assert_same(run(op, problem), trained)
        planned = op._engine.executor._planned
    for name, job in planned.items():
        assert job.args.num_threads == 3, name
        assert len({len(layer.args.plan.row_starts) for layer in job.args.jobs}) == 3, name


@pytest.mark.parametrize("compute", ["int8", "int8_weights"])
def test_integer_weights(compute):
    """Of few and of many sequences, whose weights may be in different formats."""
    spec = NetworkSpec.stack("lstm", 24, (40, 17), compute=compute)
    params = init_params(spec, np.random.default_rng(0))
    op, layers = NetworkOp(spec), [RNNOp(layer) for layer in spec.layers]
    for batch in (1, 70, 1):
        x = np.random.default_rng(batch).standard_normal((3, batch, 24)).astype(np.float32)
        expected = x
        for layer, part in zip(layers, spec.layout.split(params), strict=True):
            expected, _, _ = layer.forward(expected, part)
        for _ in range(3):
            np.testing.assert_array_equal(op.forward(x, params)[0], expected)


@pytest.mark.skipif(not AVAILABLE, reason="needs mprotect")
@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("name", ["cells", "residual"])
def test_guard_pages(name, side, monkeypatch):
    """What layers leave to one another, and all else, is read and written inside its memory alone."""
    problem = make_network_problem(NETWORKS[name], 3, 5, ("lengths",))
    expected, plain = chained(problem), np.empty

    def empty(shape, dtype=float, **options):
        return plain(shape, dtype, **options) if np.dtype(dtype).kind != "f" else fenced(shape, dtype, side)

    monkeypatch.setattr(buffers, "aligned_empty", lambda shape, dtype: fenced(shape, dtype, side))
    monkeypatch.setattr(np, "empty", empty)
    with thread_limits(2):
        assert_same(run(NetworkOp(problem.spec), problem), expected)


def test_calls_at_the_same_time():
    """Any number of threads call one op; those that do not get the pool have the same bits."""
    problem = make_network_problem(NETWORKS["drops"], 5, 4)
    expected = chained(problem)
    op = NetworkOp(problem.spec)
    inferred = chained(problem, training=False)

    def call(number):
        with thread_limits(1 + number % 2):
            for _ in range(5):
                assert_same(run(op, problem), expected)
                assert_same(run(op, problem, training=False), inferred)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(8)))
