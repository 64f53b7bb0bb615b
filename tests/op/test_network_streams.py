"""Streams of networks have the bits of one call of NetworkOp on the whole; see also test_streams.py, for both ops."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import fusedrnn
from fusedrnn import NetworkOp, NetworkSpec, RNNOp, RNNSpec, cells, frozen
from fusedrnn.engines.cpu import cached_network
from fusedrnn.runtime import fingerprint
from fusedrnn.testing.tolerance import longest_sum, tolerance
from networks import NETWORKS, flat
from problems import assert_same_bits
from stream_sequences import Sequences, T, random_params, random_states, rows_of, written


def forward_alone(spec):
    """The chain without reverse directions."""
    layers = []
    for layer in spec.layers:
        size = layers[-1].output_size if layers else layer.input_size
        layers.append(replace(layer, input_size=size, bidirectional=False, reverse=False))
    return NetworkSpec(layers)


SEVERAL_STATES = cells.slstm.with_heads(2), cells.scrn, cells.nas, cells.co_rnn, cells.lem
SPECS = {name: forward_alone(spec) for name, spec in NETWORKS.items() if name != "cells"} | {
    "cells": NetworkSpec([
        RNNSpec("gru", 6, 40), RNNSpec(cells.sru, 40, 40), RNNSpec("lstm", 40, 33, 2), RNNSpec("rnn_tanh", 33, 4),
    ]),
    "several states": NetworkSpec([RNNSpec(cell, 32, 32) for cell in SEVERAL_STATES]),
    "written cell": NetworkSpec.stack(written, 6, (12, 12, 7), residual="projection"),
    "written cell, formats": NetworkSpec([
        RNNSpec(written, 6, 33, compute="bfloat16"), RNNSpec(written, 33, 20, compute="int8_weights"),
        RNNSpec("lstm", 20, 20, residual="identity", compute="int8"),
    ]),
    "written cell, float64": NetworkSpec.stack(written, 6, (9, 5), dtype="float64"),
    "identity": NetworkSpec.stack("gru", 12, (12, 12, 6, 6), residual="identity"),
    "projected lstm": NetworkSpec.stack("lstm", 5, (12, 12, 7), residual="projection"),
    "int8": NetworkSpec.stack("lstm", 10, (33, 20), compute="int8"),
    "int8_weights": NetworkSpec.stack("gru", 10, (33, 20), compute="int8_weights"),
}  # fmt: skip
SPEC = NetworkSpec([RNNSpec("lstm", 6, 9), RNNSpec("gru", 9, 11, 2)])
PARAMS = random_params(SPEC)
ZEROS = tuple(np.zeros((1, 1, 9), np.float32) for _ in "hc"), (np.zeros((2, 1, 11), np.float32),)


def inputs(spec, count, steps=1, seed=1):
    return np.random.default_rng(seed).standard_normal((steps, count, spec.input_size)).astype(spec.dtype)


@pytest.mark.parametrize("name", SPECS)
def test_bits_of_the_whole(name):
    op = NetworkOp(SPECS[name])
    streams = op.streams(random_params(op.spec), 25)
    sequences = Sequences(op, streams, 3, 30)
    sequences.run()
    sequences.check()
    assert len(streams) == 0


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 1, 1, 7, 8]], ids=["steps", "chunks"])
def test_chunks_of_a_batch(name, chunks):
    """A batch that stays, from random states; the states then are those of the whole."""
    op, spec = NetworkOp(SPECS[name]), SPECS[name]
    x, params, initial = inputs(spec, 3, T), random_params(spec), random_states(np.random.default_rng(2), spec, 3)
    y, final, _ = op.forward(x, params, initial)
    stream = op.stream(params, 3, initial)
    ends = np.cumsum(chunks)
    parts = [stream(x[end - steps : end]) for end, steps in zip(ends, chunks, strict=True)]
    assert_same_bits(np.concatenate(parts), y)
    assert type(stream.states) is tuple
    assert_same_bits(stream.states, final)
    out = np.empty_like(y)
    stream.reset(initial)
    assert stream(x, out=out) is out
    assert_same_bits(out, y)


def test_an_engine_that_caches_no_calls():
    op = NetworkOp(SPEC, "reference")
    sequences = Sequences(op, op.streams(PARAMS, 4), 3, 6)
    sequences.run()
    rtol, atol = tolerance("float32", max(map(longest_sum, SPEC.layers)))
    sequences.check(lambda y, expected: np.testing.assert_allclose(y, expected, rtol, atol))


def test_short_steps_take_the_cached_call(monkeypatch):
    counts, plain = [], cached_network.CachedFlatForward.__call__

    def counted(*arguments):
        result = plain(*arguments)
        counts.append(result is not None)
        return result

    monkeypatch.setattr(cached_network.CachedFlatForward, "__call__", counted)
    streams = NetworkOp(SPEC).streams(PARAMS, 5)
    ids, x = [streams.join() for _ in range(3)], inputs(SPEC, 3)
    with fusedrnn.thread_limits(1):
        for _ in range(4):
            streams.step(ids, x)
            streams.step(ids[:1], x[:, :1], resets=[[True]])
    assert counts == [True] * 6


def test_states_are_those_of_the_network():
    op = NetworkOp(SPEC)
    streams, x = op.streams(PARAMS, 5), inputs(SPEC, 3, 4)
    ids = [streams.join() for _ in range(3)]
    streams.step(ids, x)
    final = op.forward(x, PARAMS)[1]
    assert_same_bits(streams.states(ids), final)
    assert_same_bits(streams.states(ids[::-1]), rows_of(final, slice(None, None, -1)))
    # None stands for zeros, in a layer or in a state.
    partial = streams.join((None, [final[1][0][:, :1]]))
    given = (ZEROS[0], (final[1][0][:, :1],))
    assert_same_bits(streams.states([partial]), given)
    streams.reset([ids[0]], [(None, final[0][1][:, :1]), None])
    assert_same_bits(streams.states([ids[0]]), ((ZEROS[0][0], final[0][1][:, :1]), ZEROS[1]))
    streams.reset(ids, (None, None))
    assert not any(state.any() for state in flat(streams.states(ids)))
    stream = op.stream(PARAMS, 1, (None, given[1]))
    assert_same_bits(stream.states, given)
    copies = stream.states
    stream.reset((None, None))
    assert copies[1][0].any() and not any(state.any() for state in flat(stream.states))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("reset_layers", [(), (1,), (0, 1)], ids=str)
def test_resets_of_a_batch(steps, reset_layers):
    """To zeros, and to states of some layers."""
    op, rng = NetworkOp(SPEC), np.random.default_rng(0)
    x, marks, initial = inputs(SPEC, 3, steps), rng.random((steps, 3)) < 0.5, random_states(rng, SPEC, 3)
    to = random_states(rng, SPEC, 3)
    to = tuple(states if index in reset_layers else None for index, states in enumerate(to)) if reset_layers else None
    stream = op.stream(PARAMS, 3, initial)
    y, final, _ = op.forward(x, PARAMS, initial, resets=marks, reset_states=to)
    assert_same_bits(stream(x, resets=marks, reset_states=to), y)
    assert_same_bits(stream.states, final)


def test_parameters_cannot_change(monkeypatch):
    """They are copied; frozen ones are shared, packed once, and not compared for further shapes."""
    op, x, params = NetworkOp(SPEC), inputs(SPEC, 2, 4), PARAMS.copy()
    expected = op.forward(x, params)[0]
    stream, streams = op.stream(params, 2), op.streams(params, 2)
    ids = [streams.join(), streams.join()]
    params[:] = 0
    assert_same_bits(stream(x), expected)
    assert_same_bits(streams.step(ids, x), expected)
    op, shared = NetworkOp(SPEC), frozen(PARAMS)
    several = [op.stream(shared, 2) for _ in range(4)]
    streams = op.streams(shared, 2)
    assert streams.params is shared
    ids = [streams.join(), streams.join()]
    for steps in (1, 1, 2):
        for stream in several:
            stream(x[:steps])
        streams.step(ids, x[:steps])
    assert [layer.weight_cache.num_packed for layer in op._engine.executor.layers] == [1, 1]
    monkeypatch.setattr(fingerprint, "fingerprint_of", None)
    assert_same_bits(op.stream(shared, 2)(x), expected)
    streams.reset(ids)
    assert_same_bits(streams.step(ids, x), expected)


ERRORS = [
    (lambda streams, a, x: streams.step([a, a], x), "ids must have each stream once; got 0 twice"),
    (lambda streams, a, x: streams.step([a], x), "x must have shape (T, 1, 6), with a sequence for each of the ids; "
     "got (1, 2, 6)"),
    (lambda streams, a, x: streams.step([a], x[:, :1, :5]), "x must have shape (T, N, 6); got (1, 1, 5)"),
    (lambda streams, a, x: streams.step([a], x.astype("d")), "x must have dtype float32; got float64"),
    (lambda streams, a, x: streams.join(ZEROS[0]), "states[0] must be a tuple of 2: h0 (1, 1, 9), c0 (1, 1, 9); "
     "got ndarray"),
    (lambda streams, a, x: streams.join(ZEROS[:1]),
     "states must be None or a tuple of 2: states[0], states[1]; got a sequence of 1"),
    (lambda streams, a, x: streams.reset([a], (None, ZEROS[0][:1])), "states[1]: h0 must have shape (2, 1, 11); "
     "got (1, 1, 9)"),
    (lambda streams, a, x: streams.step([a], x[:, :1], resets=[[False]], reset_states=(None, ZEROS[0][:1])),
     "reset_states[1]: reset h must have shape (2, 1, 11); got (1, 1, 9)"),
    (lambda streams, a, x: streams.op.stream(PARAMS, 2)(x[:, :1]), "x must have shape (T, 2, 6), with the stream's "
     "2 sequences; got (1, 1, 6)"),
    (lambda streams, a, x: streams.op.stream(PARAMS, 2, ZEROS), "states[0]: h0 must have shape (1, 2, 9); "
     "got (1, 1, 9)"),
    (lambda streams, a, x: streams.op.stream(PARAMS[1:]), f"params must have shape ({SPEC.layout.size},), as the "
     f"network's layout has it; got ({SPEC.layout.size - 1},)"),
    (lambda streams, a, x: streams.op.streams(PARAMS, 0), "capacity must be at least 1; got 0"),
    (lambda streams, a, x: streams.op.streams(PARAMS, 1 << 45), "capacity must make arrays of at most "),
    (lambda streams, a, x: streams.op.stream(PARAMS, 2.0), "batch must be an integer; got 2.0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_change_nothing(call, message):
    streams = NetworkOp.get(SPEC).streams(PARAMS, 2)
    id, x = streams.join(), inputs(SPEC, 2)
    streams.step([id], x[:, :1])
    before = streams.states([id])
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        call(streams, id, x)
    assert_same_bits(streams.states([id]), before)
    assert streams.ids == [id]
    streams.step([id], x[:, :1])


def test_what_networks_do_not_take():
    """Quantized parameters, and arrays of bfloat16."""
    int8 = NetworkOp(SPECS["int8_weights"])
    first = int8.spec.layers[0]
    quantized = RNNOp(first).quantize(random_params(first))
    for make in (int8.stream, int8.streams):
        with pytest.raises(TypeError, match=r"^params must be a NumPy array, which .*; got QuantizedParams$"):
            make(quantized, 2)
    op = NetworkOp(SPECS["bfloat16"])
    params, x = random_params(op.spec), inputs(op.spec, 1).astype(ml_dtypes.bfloat16)
    streams = op.streams(params, 2)
    for call in (lambda: streams.step([streams.join()], x), lambda: op.stream(params)(x)):
        with pytest.raises(TypeError, match=r"^x must have dtype float32; got bfloat16"):
            call()


@pytest.mark.parametrize("name", ["bidirectional", "reverse"])
def test_a_reverse_direction_is_refused(name):
    """In any layer."""
    op = NetworkOp(NetworkSpec([RNNSpec("gru", 3, 4), RNNSpec("gru", 4, 5, **{name: True})]))
    for make in (op.stream, op.streams):
        with pytest.raises(ValueError, match=rf"runs forward alone; got layers\[1\]\.{name}=True$"):
            make(random_params(op.spec), 3)


OTHERS = [
    (NetworkSpec([SPEC.layers[0], RNNSpec("gru", 9, 12, 2)]),
     "snapshot must be of this spec: layers[1].hidden_size is 12 in the snapshot and 11 here"),
    (NetworkSpec([RNNSpec("lstm", 7, 9), RNNSpec(cells.slstm, 9, 11, 2)]),
     "snapshot must be of this spec: layers[0].input_size is 7 in the snapshot and 6 here; layers[1].mode is cell sl"),
    (NetworkSpec([*SPEC.layers, RNNSpec("gru", 11, 4)]),
     "snapshot must be of a spec of this kind: NetworkSpec, len(layers)=2; got one of NetworkSpec, len(layers)=3"),
    (SPEC.layers[0],
     "snapshot must be of a spec of this kind: NetworkSpec, len(layers)=2; got one of RNNSpec"),
]  # fmt: skip


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_a_snapshot_of_another_network(other, message):
    streams = NetworkOp.get(SPEC).streams(PARAMS, 2)
    op = NetworkOp.get(other) if isinstance(other, NetworkSpec) else RNNOp.get(other)
    others = op.streams(random_params(other), 2)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        streams.restore(others.snapshot(others.join()))
    assert len(streams) == 0
    if isinstance(other, RNNSpec):
        with pytest.raises(ValueError, match=r"^snapshot must be of a spec of this kind: RNNSpec; got one of Network"):
            others.restore(streams.snapshot(streams.join()))


def test_a_damaged_snapshot():
    streams = NetworkOp.get(SPEC).streams(PARAMS, 1)
    id = streams.join()
    content = streams.snapshot(id)
    for other, message in (
        (content[:-1], "snapshot must have 160 bytes of states; got 159"),
        (content[:-1] + b"\1", "snapshot must have the checksum of its header; its states are damaged"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            streams.restore(other, id)
