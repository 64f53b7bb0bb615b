"""Streams that come and go have the bits of one call each, whoever steps them with whom."""

import copy
import json
import pickle
import signal
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import fusedrnn
from forks import FORK_WARNING, FORKS, in_child
from fusedrnn import NetworkSpec, RNNOp, RNNSpec, cells, frozen
from fusedrnn.op import inference_calls, snapshot
from fusedrnn.runtime import slot_kernel, slots
from fusedrnn.testing.tolerance import longest_sum, tolerance
from networks import flat
from problems import assert_same_bits
from stream_sequences import Sequences, op_of, random_params, random_states, rows_of, written

I, H = 6, 11
SPECS = {
    "lstm": RNNSpec("lstm", I, H, 2),
    "gru-float64": RNNSpec("gru", I, H, 2, dtype="float64"),
    "projection": RNNSpec("lstm", I, H, 2, projection_size=5),
    "relu": RNNSpec("rnn_relu", I, H, 1),
    "bfloat16": RNNSpec("gru", I, H, 2, compute="bfloat16"),
    "int8": RNNSpec("lstm", I, H, 1, compute="int8"),
    "int8_weights": RNNSpec("gru", I, H, 1, compute="int8_weights"),
    "three states": RNNSpec(cells.slstm, I, H, 2),
    "written cell": RNNSpec(written, I, H, 2, residual="projection"),
    "written cell, int8": RNNSpec(written, I, 40, compute="int8"),
    "network": NetworkSpec([RNNSpec("lstm", I, 9), RNNSpec(cells.slstm, 9, H, 2), RNNSpec("gru", H, 7)]),
}
BOTH_OPS = pytest.mark.parametrize("name", ["lstm", "network"])
"""An RNNOp, and a NetworkOp, whose states are nested tuples."""


def network(spec=SPECS["lstm"], capacity=25, backend=None):
    op, params = op_of(spec, backend), random_params(spec)
    if isinstance(spec, RNNSpec) and spec.compute == "int8_weights":
        params = op.quantize(params)
    return op, op.streams(params, capacity)


def inputs(count, steps=1, seed=1):
    return np.random.default_rng(seed).standard_normal((steps, count, I)).astype(np.float32)


@pytest.mark.parametrize("name", SPECS)
def test_bits_of_the_whole(name):
    op, streams = network(SPECS[name])
    sequences = Sequences(op, streams, 3, 30)
    sequences.run()
    sequences.check()
    assert len(streams) == 0


def test_an_engine_that_caches_no_calls():
    op, streams = network(replace(SPECS["lstm"], num_layers=1), backend="reference")
    sequences = Sequences(op, streams, 3, 5)
    sequences.run()
    rtol, atol = tolerance("float32", longest_sum(op.spec))
    sequences.check(lambda y, expected: np.testing.assert_allclose(y, expected, rtol, atol))


@BOTH_OPS
def test_where_objects_cannot_be_read(name, monkeypatch):
    monkeypatch.setattr(slots, "object_layout", lambda: None)
    op, streams = network(SPECS[name])
    sequences = Sequences(op, streams, 3, 20)
    sequences.run()
    sequences.check()


@BOTH_OPS
@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads(name, threads, use_all_threads):
    """There are fewer slots than sequences, and with two threads a call the others find the pool taken."""
    interval = sys.getswitchinterval()
    op, streams = network(SPECS[name], capacity=50)
    groups, errors = [Sequences(op, streams, seed, 12) for seed in range(8)], []

    def work(group):
        try:
            with fusedrnn.thread_limits(threads):
                group.run()
        except BaseException as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=work, args=(group,)) for group in groups]
    try:
        sys.setswitchinterval(1e-5)
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    for group in groups:
        group.check()
    assert streams.ids == []


def test_ids_are_never_used_again():
    _, streams = network(capacity=2)
    seen = set()
    for _ in range(5):
        pair = [streams.join(), streams.join()]
        assert streams.ids == sorted(pair, key=lambda id: id % 2)
        seen.update(pair)
        for id in pair:
            streams.leave(id)
    assert len(seen) == 10
    for id in seen:
        with pytest.raises(ValueError, match=f"ids must be of streams that have joined and not left; got {id}$"):
            streams.step([id], inputs(1))


def test_a_full_server_says_so():
    _, streams = network(capacity=3)
    ids = [streams.join() for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"^all 3 slots are taken: a stream must leave before another one joins$"):
        streams.join()
    streams.leave(ids[1])
    assert len(streams) == 2
    assert streams.join() not in ids


def test_errors_change_nothing():
    op, streams = network()
    a, b = streams.join(), streams.join()
    streams.step([a, b], inputs(2))
    before = streams.states([a, b])
    for ids, x, words in (
        ([], inputs(1), "ids must have at least one stream"),
        ([a, a], inputs(2), f"ids must have each stream once; got {a} twice"),
        ([a, 999], inputs(2), "joined and not left; got 999"),
        ([a, -1], inputs(2), "joined and not left; got -1"),
        ([a, 1 << 63], inputs(2), f"joined and not left; got {1 << 63}"),
        ([a, 0.5], inputs(2), "ids must be a sequence of integers"),
        ([True, False], inputs(2), "ids must be a sequence of integers"),
        (a, inputs(1), "ids must be a sequence of integers"),
        ([[a], [b, a]], inputs(1), "ids must be a sequence of integers"),
        ([a, b], inputs(3), r"x must have shape \(T, 2, 6\), with a sequence for each of the ids; got \(1, 3, 6\)"),
        ([a, b], inputs(2)[..., :5], r"x must have shape \(T, N, 6\); got \(1, 2, 5\)"),
        ([a, b], inputs(2)[0], r"x must have shape \(T, N, 6\); got \(2, 6\)"),
        ([a, b], inputs(2)[:0], "x must have at least one step"),
        ([a, b], inputs(2).astype(np.float64), "x must have dtype float32; got float64"),
        ([a, b], inputs(2).tolist(), "x must be a NumPy array; got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            streams.step(ids, x)
    for options, words in (({"resets": [[1, 0]]}, "resets must be bools"), ({"reset_states": ()}, "reset_states must")):
        with pytest.raises((TypeError, ValueError), match=words):
            streams.step([a, b], inputs(2), **options)
    for call, words in (
        (lambda: streams.join([np.zeros((2, 1, H), np.float32)]), "states must be a tuple of 2"),
        (lambda: streams.reset([a], [np.zeros((2, 2, H), np.float32), None]), "states: h0 must have shape"),
        (lambda: streams.leave("a"), "id must be an integer; got 'a'"),
        (lambda: streams.leave(1.5), "id must be an integer; got 1.5"),
        (lambda: streams.leave(1 << 70), f"joined and not left; got {1 << 70}"),
        (lambda: op.streams(streams.params, 0), "capacity must be"),
        (lambda: op.streams(streams.params, 1 << 60), "capacity must be at most"),
        (lambda: op.streams(streams.params[:-1], 3), "params must have shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()
    backwards = RNNSpec("gru", 3, 4, bidirectional=True)
    with pytest.raises(ValueError, match="runs forward alone; got bidirectional=True"):
        RNNOp(backwards).streams(np.zeros(backwards.layout.size, np.float32), 3)
    assert_same_bits(streams.states([a, b]), before)
    streams.step([b, a], inputs(2))


@BOTH_OPS
def test_a_stream_is_in_one_call_at_a_time(name, monkeypatch):
    """The second one raises an error, and the first one goes on; others may join, leave and step meanwhile."""
    op, streams = network(SPECS[name])
    a, b = streams.join(), streams.join()
    run, other = streams._calls.run, []

    def run_with_others_at_it(*arguments):
        monkeypatch.setattr(streams._calls, "run", run)
        for call in (
            lambda: streams.step([b, a], inputs(2)),
            lambda: streams.leave(a),
            lambda: streams.reset([a]),
            lambda: streams.snapshot(a),
        ):
            with pytest.raises(RuntimeError, match=f"stream {a} is in another call that is running"):
                call()
        other.append(streams.join())
        streams.step([b, *other], inputs(2))
        streams.leave(b)
        return run(*arguments)

    monkeypatch.setattr(streams._calls, "run", run_with_others_at_it)
    y = streams.step([a], inputs(1))
    assert_same_bits(y, op.forward(inputs(1), streams.params)[0])
    assert streams.ids == [a, *other]
    streams.leave(a)


def three_streams(name):
    """Streams that have made a step, and their ids."""
    _, streams = network(SPECS[name])
    ids = [streams.join() for _ in range(3)]
    streams.step(ids, inputs(3))
    return streams, ids


@BOTH_OPS
def test_a_failed_step_leaves_the_states(name, monkeypatch):
    streams, ids = three_streams(name)
    before = streams.states(ids)
    with monkeypatch.context() as patch:
        patch.setattr(streams._calls, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streams.step(ids, inputs(3))
    assert_same_bits(streams.states(ids), before)


def interrupted_after(actions, use, meanwhile=lambda: None):
    """``use`` of slots, interrupted right after its first call with one of the actions, as a signal's handler may do.

    Something else happens before, as in another thread.
    """
    calls = []

    def use_and_raise(*arguments):
        result = use(*arguments)
        calls.extend([arguments] * bool(arguments[1] & actions))
        if len(calls) == 1 and arguments is calls[0]:
            meanwhile()
            raise KeyboardInterrupt
        return result

    return use_and_raise


@BOTH_OPS
@pytest.mark.parametrize("action", [slot_kernel.GATHER, slot_kernel.SCATTER])
def test_interrupt_between_two_calls_of_machine_code(name, action, monkeypatch):
    """The states are as before, even if the new ones had been written."""
    _, streams = network(SPECS[name])
    ids, x = [streams.join() for _ in range(3)], inputs(3)
    streams.step(ids, x)
    before = streams.states(ids)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(streams._slots, "use", interrupted_after(action, streams._slots.use))
        streams.step(ids, x)
    assert_same_bits(streams.states(ids), before)
    streams.step(ids, x)


CHANGES = {
    "step": lambda streams, ids: streams.step(ids, inputs(len(ids))),
    "step, resets": lambda streams, ids: streams.step(ids, inputs(len(ids), 2), resets=np.ones((2, len(ids)), bool)),
    "reset": lambda streams, ids: streams.reset(ids),
    "reset to states": lambda streams, ids: streams.reset(ids, streams.states(ids[::-1])),
    "restore": lambda streams, ids: streams.restore(streams.snapshot(ids[1]), ids[0]),
    "leave": lambda streams, ids: streams.leave(ids[0]),
}


def interrupted(streams, change, ids, meanwhile=lambda: None):
    """Make a change, interrupted right after the machine code that makes it; first something else happens."""
    changing = slot_kernel.SCATTER | slot_kernel.CLEAR | slot_kernel.FREE
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(streams._slots, "use", interrupted_after(changing, streams._slots.use, meanwhile))
        change(streams, ids)


@BOTH_OPS
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_interrupted_change_is_undone(name, change):
    streams, ids = three_streams(name)
    before = streams.states(ids)
    interrupted(streams, change, ids)
    assert streams.ids == ids
    assert_same_bits(streams.states(ids), before)
    streams.step(ids, inputs(3))


@BOTH_OPS
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_others_did_is_not_undone(name, change):
    """Another thread may use a stream between the end of an interrupted call and its handler."""
    streams, ids = three_streams(name)
    others = []

    def meanwhile():
        if ids[0] not in streams.ids:
            others.append(streams.join())  # in the slot that is free
            streams.step(others, inputs(1))
        else:
            streams.reset(ids[:1])
        others.append(streams.states(others or ids[:1]))

    interrupted(streams, change, ids, meanwhile)
    *other, states = others
    assert streams.ids == ([*other, *ids[1:]] if other else ids)
    assert_same_bits(streams.states(other or ids[:1]), states)


@BOTH_OPS
def test_a_failed_step_keeps_its_claim_until_the_end(name, monkeypatch):
    """No other call can come between the release of a claim and the states that the failed call writes back."""
    _, streams = network(SPECS[name])
    ids, actions = [streams.join() for _ in range(3)], []
    use = streams._slots.use
    monkeypatch.setattr(streams._slots, "use", lambda *arguments: actions.append(arguments[1]) or use(*arguments))
    with pytest.raises(ValueError, match="resets"):
        streams.step(ids, inputs(3, 2), resets=np.zeros((3, 3), bool))
    assert [bool(action & slot_kernel.CLAIM) for action in actions] == [True, False]


def test_join_takes_the_first_free_slot():
    _, streams = network(capacity=9)
    ids = [streams.join() for _ in range(9)]
    for left in ([7, 2, 4], [0], [8, 0]):
        for slot in left:
            (id,) = (id for id in ids if id % 9 == slot)
            streams.leave(id)
            ids.remove(id)
        for slot in sorted(left):
            ids.append(streams.join())
            assert ids[-1] % 9 == slot
        with pytest.raises(RuntimeError, match="all 9 slots are taken"):
            streams.join()


@BOTH_OPS
def test_an_interrupted_join_takes_no_slot(name, monkeypatch):
    _, streams = network(SPECS[name], capacity=2)
    other = streams.join()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(streams._slots, "use", interrupted_after(slot_kernel.JOIN, streams._slots.use))
        streams.join()
    assert streams.ids == [other]
    streams.step([streams.join(), other], inputs(2))


@BOTH_OPS
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_interrupts(name, monkeypatch):
    """A step that is interrupted has advanced all of its streams or none, and leaves no stream taken."""
    # An interrupt that falls into a callback of the garbage collector is lost, which is no fault of a step.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    _, streams = network(SPECS[name])
    ids, x, rng = [streams.join() for _ in range(3)], np.repeat(inputs(1), 3, axis=1), np.random.default_rng(0)
    trajectory = [streams.states(ids)]
    for _ in range(400):
        streams.step(ids, x)
        trajectory.append(streams.states(ids))

    def make_steps(done):  # a function, as Python 3.13 may not catch what a signal raises between the turns of a loop
        while done[0] < len(trajectory) - 2:
            streams.step(ids, x)
            done[0] += 1

    handler, caught = signal.signal(signal.SIGALRM, signal.default_int_handler), 0
    try:
        for _ in range(300):
            streams.reset(ids)
            done = [0]
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 2e-4))
                make_steps(done)
            except KeyboardInterrupt:
                caught += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            states = streams.states(ids)
            h = flat(states)[0]
            step = next(step for step in (done[0], done[0] + 1) if np.array_equal(h, flat(trajectory[step])[0]))
            assert_same_bits(states, trajectory[step])
        assert caught > 250
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@BOTH_OPS
@FORKS
@FORK_WARNING
def test_a_fork_inside_a_step(name, monkeypatch):
    """In the child that call does not run: its streams can be stepped."""
    _, streams = network(SPECS[name])
    id = streams.join()
    run, content = streams._calls.run, []

    def run_and_fork(*arguments):
        monkeypatch.setattr(streams._calls, "run", run)
        content.append(in_child(lambda: streams.step([id], inputs(1)).tobytes()))
        return run(*arguments)

    monkeypatch.setattr(streams._calls, "run", run_and_fork)
    assert content == [] and streams.step([id], inputs(1)).tobytes() == content[0]


@BOTH_OPS
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("has_states", [False, True])
def test_resets(name, steps, has_states):
    op, streams = network(SPECS[name], capacity=20)
    ids, rng = [streams.join() for _ in range(18)], np.random.default_rng(2)
    streams.step(ids, inputs(18, 3))
    states, x, marks = streams.states(ids), inputs(18, steps, 7), rng.random((steps, 18)) < 0.4
    replaced = random_states(rng, op.spec, 18) if has_states else None
    expected, final, _ = op.forward(x, streams.params, states, resets=marks, reset_states=replaced)
    assert_same_bits(streams.step(ids, x, resets=marks, reset_states=replaced), expected)
    assert_same_bits(streams.states(ids), final)


@BOTH_OPS
def test_reset_of_some(name):
    _, streams = network(SPECS[name])
    ids = np.array([streams.join() for _ in range(4)])
    streams.step(ids, inputs(4, 3))
    before = streams.states(ids)
    streams.reset(ids[[3, 1]], rows_of(before, slice(2)))
    streams.reset(ids[[2]])
    after = streams.states(ids)
    assert_same_bits(rows_of(after, [3, 1, 0]), rows_of(before, [0, 1, 0]))
    assert not any(state.any() for state in flat(rows_of(after, [2])))


@pytest.mark.parametrize("name", ["bfloat16", "network"])
def test_any_input_array(name, monkeypatch):
    """Of any strides and byte alignment."""
    op, streams = network(SPECS[name])
    ids, x = [streams.join() for _ in range(3)], inputs(3, 2)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    expected = op.forward(x, streams.params)[0]
    for variant in (x, x.transpose(1, 0, 2).copy().transpose(1, 0, 2), np.repeat(x, 2, axis=2)[..., ::2], unaligned):
        for _ in range(2):
            streams.reset(ids)
            assert_same_bits(streams.step(ids, variant), expected)
    with monkeypatch.context() as patch:  # no call is checked and cached again
        patch.setattr(streams._calls._engine, "forward", None)
        streams.step(ids, unaligned)


def test_arrays_of_bfloat16():
    """In a network that multiplies bfloat16."""
    op, streams = network(SPECS["bfloat16"])
    ids, narrow = [streams.join() for _ in range(3)], inputs(3, 2).astype(ml_dtypes.bfloat16)
    y = streams.step(ids, narrow)
    assert y.dtype == narrow.dtype
    assert_same_bits(y.view(np.uint16), op.forward(narrow, streams.params)[0].view(np.uint16))


def test_states_and_parameters_of_bfloat16():
    """They are held in float32, which is exact."""
    spec = SPECS["bfloat16"]
    op, params = RNNOp(spec), network(spec)[1].params.astype(ml_dtypes.bfloat16)
    x = inputs(2, 3).astype(ml_dtypes.bfloat16)
    states = (np.linspace(-1, 1, 2 * 2 * H).reshape(2, 2, H).astype(ml_dtypes.bfloat16),)
    expected, final, _ = op.forward(x, params, states)
    assert_same_bits(op.forward(x, frozen(params), states)[0].view(np.uint16), expected.view(np.uint16))
    stream = op.stream(params, 2, states)
    assert_same_bits(stream(x).view(np.uint16), expected.view(np.uint16))
    streams = op.streams(params, 2)
    ids = [streams.join(tuple(state[:, [row]] for state in states)) for row in range(2)]
    assert_same_bits(streams.step(ids, x).view(np.uint16), expected.view(np.uint16))
    streams.reset(ids, states)
    assert_same_bits(streams.step(ids, x).view(np.uint16), expected.view(np.uint16))
    assert_same_bits(streams.states(ids)[0].astype(ml_dtypes.bfloat16).view(np.uint16), final[0].view(np.uint16))


@BOTH_OPS
def test_no_pickling(name):
    streams = network(SPECS[name])[1]
    for function in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="Streams cannot be pickled or copied: take snapshots of the streams"):
            function(streams)


@BOTH_OPS
def test_memory_is_steady(name):
    _, streams = network(SPECS[name], capacity=100)
    ids, x = np.array([streams.join() for _ in range(100)]), inputs(100, 4)

    def vary():
        for count in range(1, 101, 3):
            for steps in (1, 2, 3, 4):
                streams.step(ids[:count], x[:steps, :count])

    vary()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        vary()
        first = tracemalloc.get_traced_memory()[0] - before
        vary()
        assert tracemalloc.get_traced_memory()[0] - before < 1.2 * first + 100_000
    finally:
        tracemalloc.stop()
    assert len(streams._calls.batches) == inference_calls.MAX_SHAPES


def edited(content, **changes):
    """A snapshot with another header."""
    header, data = snapshot._split(content)
    text = json.dumps({**header, **changes}).encode()
    return snapshot.MAGIC + len(text).to_bytes(4, "little") + text + data


CHILD = """
import pickle, sys
import numpy as np
op, content, params, x = (sys.stdin.buffer.read(int(size)) for size in sys.argv[1:])
streams = pickle.loads(op).streams(np.frombuffer(params, np.float32), 7)
streams.join()
id = streams.restore(content)
sys.stdout.buffer.write(streams.step([id], np.frombuffer(x, np.float32).reshape(-1, 1, 6)).tobytes())
"""


@pytest.mark.parametrize("name", ["three states", "network"])
def test_a_snapshot_goes_to_another_process(name):
    op, streams = network(SPECS[name])
    ids, x = [streams.join() for _ in range(2)], inputs(2, 8)
    streams.step(ids, x[:5])
    content = streams.snapshot(ids[1])
    assert type(content) is bytes
    parts = pickle.dumps(op), content, streams.params.tobytes(), x[5:, 1].tobytes()
    sizes = [str(len(part)) for part in parts]
    child = subprocess.run([sys.executable, "-c", CHILD, *sizes], input=b"".join(parts), capture_output=True)
    assert child.returncode == 0, child.stderr.decode()
    expected = op.forward(x, streams.params)[0][5:, 1]
    assert child.stdout == expected.tobytes()
    assert streams.restore(content, ids[0]) == ids[0]
    assert streams.step([ids[0]], x[5:, [1]]).tobytes() == expected.tobytes()


@BOTH_OPS
def test_a_snapshot_of_another_byte_order(name):
    _, streams = network(SPECS[name])
    id = streams.join()
    streams.step([id], inputs(1))
    header, data = snapshot._split(streams.snapshot(id))
    swapped = np.frombuffer(data, "<f4").astype(">f4").tobytes()
    other = edited(streams.snapshot(id)[: -len(data)] + swapped, byte_order="big", crc32=snapshot.zlib.crc32(swapped))
    assert header["byte_order"] == "little"
    assert_same_bits(streams.states([streams.restore(other)]), streams.states([id]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 12}, "snapshot must be of this spec: hidden_size is 12 in the snapshot and 11 here$"),
        ({"mode": "gru", "num_layers": 1}, "mode is 'gru' in the snapshot and 'lstm' here; num_layers is 1 in"),
        ({"dtype": "float64"}, "dtype is 'float64' in the snapshot and 'float32' here"),
        ({"mode": cells.slstm}, "mode is cell slstm [0-9a-f]+ in the snapshot"),
    ],
)
def test_a_snapshot_of_another_spec(change, words):
    _, streams = network()
    _, others = network(replace(SPECS["lstm"], **change))
    with pytest.raises(ValueError, match=words):
        streams.restore(others.snapshot(others.join()))
    assert len(streams) == 0


@pytest.mark.parametrize("name", ["lstm", "network"])
def test_a_snapshot_of_an_earlier_version(name):
    """An option that did not exist yet has its default; one without a default must be there."""
    _, streams = network(SPECS[name])
    id = streams.join()
    streams.step([id], inputs(1))
    content = streams.snapshot(id)
    spec = snapshot._split(content)[0]["spec"]
    old = edited(content, spec={field: text for field, text in spec.items() if "input_dropout" not in field})
    assert_same_bits(streams.states([streams.restore(old)]), streams.states([id]))
    damaged = edited(content, spec={field: text for field, text in spec.items() if "hidden_size" not in field})
    with pytest.raises(ValueError, match="hidden_size is missing in the snapshot"):
        streams.restore(damaged)


def test_snapshots_that_are_none():
    _, streams = network(capacity=1)
    id = streams.join()
    content = streams.snapshot(id)
    for other, words in (
        (content[:-1], "snapshot must have 176 bytes of states; got 175"),
        (content[:-1] + b"\1", "its states are damaged"),
        (b"", "snapshot must be what Streams.snapshot returned"),
        (b"fusedrnn state\r\n" + (1 << 20).to_bytes(4, "little") + b"[" * (1 << 20), "snapshot must be what"),
        (content[:30], "snapshot must be what Streams.snapshot returned"),
        (b"x" + content, "snapshot must be what Streams.snapshot returned"),
        (edited(content, spec=3), "snapshot must be what Streams.snapshot returned"),
        (edited(content, version=2), "snapshot must have version 1; got version 2"),
        (edited(content, byte_order="middle"), "byte order little or big; got 'middle'"),
        (edited(content, states={}), "snapshot must have states"),
        (content.decode("latin1"), "snapshot must be bytes; got str"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            streams.restore(other, id)
    with pytest.raises(RuntimeError, match="all 1 slots are taken"):
        streams.restore(content)
    with pytest.raises(ValueError, match="joined and not left; got 7"):
        streams.restore(content, 7)
