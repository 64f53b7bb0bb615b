"""stream_server: outputs over a socket are those of the operator, and every end of a connection is clear."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from typer.testing import CliRunner

from examples.stream_server import limits, load, protocol, schedule
from examples.stream_server.__main__ import app
from examples.stream_server.connection import MAX_QUEUED, end_when_silent
from examples.stream_server.load import Client
from examples.stream_server.protocol import ProtocolError
from examples.stream_server.server import Server
from examples.stream_server.settings import Settings
from fusedrnn import NetworkSpec, RNNSpec

SMALL = Settings(features=5, hidden=(7, 7), capacity=4)
HOST = "127.0.0.1"


def serve(work, settings=SMALL, **options):
    """Run ``work(server, port)`` in a thread beside a server, and stop that."""

    async def run():
        server = Server(settings.streams(), **options)
        port = await server.start(HOST, 0)
        try:
            return await asyncio.wait_for(asyncio.to_thread(work, server, port), 60)
        finally:
            await server.stop()

    return asyncio.run(run())


def inputs(steps, seed=0):
    return np.random.default_rng(seed).standard_normal((steps, SMALL.features)).astype(np.float32)


def expected(x):
    streams = SMALL.streams()
    return streams.step([streams.join()], x[:, None])[:, 0]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def received(client):
    """The kinds and payloads of what the server sends until it closes the connection."""
    messages = []
    try:
        while True:
            messages += client.receive()
    except ConnectionError:
        return messages


@pytest.mark.parametrize("window", [0.0, 0.002])
def test_outputs_are_those_of_the_operator(window):
    """Of clients that come, go, and begin a new sequence."""

    def work(server, port):
        x = [inputs(steps, steps) for steps in (3, 6, 9)]
        clients, outputs = [Client(HOST, port) for _ in x], [[], [], []]
        for step in range(9):
            for client, frames, rows in zip(clients, x, outputs, strict=True):
                if step < len(frames):
                    rows.append(client.step(frames[step]))
                elif step == len(frames):
                    client.socket.close()
        for frames, rows in zip(x, outputs, strict=True):
            np.testing.assert_array_equal(rows, expected(frames))
        clients[2].socket.sendall(protocol.message(protocol.RESET))
        np.testing.assert_array_equal([clients[2].step(frame) for frame in x[0]], expected(x[0]))
        clients[2].socket.close()
        wait_until(lambda: len(server.streams) == 0)
        assert len(server.latencies) == sum(server.batches) == 21

    serve(work, window=window)


CELL = """
from fusedrnn.cell import cell, tanh


@cell(gates="n", states="h")
def leaky(x, recurrent, s):
    return 0.75 * tanh(x.n + recurrent(s.h).n) + 0.25 * s.h


halves = leaky.with_heads(2)
"""


@pytest.fixture
def leaky(tmp_path):
    """A cell that a user has written, as --cell names it."""
    path = tmp_path / "leaky.py"
    path.write_text(CELL)
    return f"{path}:leaky"


NETWORKS = {
    "a list of sizes": ("lstm", "7,7,6", None),
    "a projected residual": ("gru", "7,6", "projection"),
    "a user's cell": ("leaky", "7,6", "projection"),
    "a cell of the catalogue": ("fusedrnn.cells:slstm", "7", None),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_served(name, leaky):
    cell, hidden, residual = NETWORKS[name]
    settings = Settings.parse(leaky if cell == "leaky" else cell, SMALL.features, hidden, None, residual, 3)

    def work(server, port):
        x, streams = inputs(8).reshape(4, 2, SMALL.features), settings.streams()
        clients = [Client(HOST, port) for _ in range(2)]
        outputs = np.array([[client.step(frame) for client, frame in zip(clients, row, strict=True)] for row in x])
        expected, _, _ = streams.op.forward(x, streams.params)
        np.testing.assert_array_equal(outputs, expected)
        for client in clients:
            client.socket.close()

    serve(work, settings)


def test_a_client_that_does_not_read_is_not_read():
    """It gets all outputs in the end, in their order; others are served meanwhile."""

    def work(server, port):
        x = inputs(4000)
        with socket.socket() as fast:
            fast.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            fast.connect((HOST, port))
            fast.setblocking(False)
            content = memoryview(b"".join(protocol.message(protocol.FRAME, row.tobytes()) for row in x))
            other, outputs, most, got = Client(HOST, port), bytearray(), 0, []
            while len(got) < len(x):
                with contextlib.suppress(BlockingIOError):
                    content = content[fast.send(content) :] if content else content
                other.step(x[0])
                most = max(most, *(len(connection._frames) for connection in list(server.connections)))
                try:
                    outputs += fast.recv(2048)
                except BlockingIOError:
                    continue
                limit = {protocol.OUTPUT: 100, protocol.WELCOME: 100}
                got += [payload for kind, payload in protocol.messages(outputs, limit) if kind == protocol.OUTPUT]
        assert b"".join(got) == expected(x).tobytes()
        assert most <= 2 * MAX_QUEUED
        other.socket.close()

    serve(work)


def test_messages_in_pieces():
    def work(server, port):
        client, x = Client(HOST, port), inputs(2)
        content = b"".join(protocol.message(protocol.FRAME, row.tobytes()) for row in x)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for index in range(0, len(content), 7):
            client.socket.sendall(content[index : index + 7])
        got = []
        while len(got) < 2:
            got += client.receive()
        assert b"".join(payload for _, payload in got) == expected(x).tobytes()
        client.socket.close()

    serve(work)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (protocol.message(protocol.FRAME, bytes(16)), "FRAME must have 20 bytes; got 16"),
        (protocol.HEADER.pack(1 << 31, protocol.FRAME), "FRAME must have at most 20 bytes; got 2147483648"),
        (protocol.message(protocol.RESET, b"x"), "RESET must have at most 0 bytes; got 1"),
        (protocol.message(77), "a message must be FRAME or RESET; got one of kind 77"),
        (protocol.message(protocol.OUTPUT), "a message must be FRAME or RESET; got one of kind OUTPUT"),
        (b"GET / HTTP/1.1\r\n\r\n", "got one of kind 47"),
    ],
)
def test_bad_messages(content, words):
    def work(server, port):
        client, other = Client(HOST, port), Client(HOST, port)
        client.socket.sendall(content)
        ((kind, payload),) = received(client)
        assert kind == protocol.ERROR
        assert words in payload.decode()
        wait_until(lambda: len(server.streams) == 1)
        np.testing.assert_array_equal([other.step(row) for row in inputs(2)], expected(inputs(2)))
        for each in (client, other):
            each.socket.close()

    serve(work)


def test_a_refused_client_that_does_not_read_frees_its_stream():
    """At once; its outputs wait in the transport, which is closed some time later."""

    def work(server, port):
        client = Client(HOST, port)
        wait_until(lambda: len(server.streams) == 1)
        (connection,) = server.connections
        connection._transport.set_write_buffer_limits(1 << 30)
        connection._transport.write(bytes(64 << 20))  # more than the socket takes
        client.socket.sendall(protocol.HEADER.pack(1 << 30, protocol.FRAME))
        wait_until(lambda: len(server.streams) == 0)
        wait_until(lambda: not server.connections)
        client.socket.close()

    serve(work)


def test_a_full_server_and_a_shutdown():
    clients = []

    def work(server, port):
        clients.extend(Client(HOST, port) for _ in range(SMALL.capacity))
        with pytest.raises(ProtocolError, match=r"^the server says: all 4 slots are taken"):
            Client(HOST, port)
        clients.pop().socket.close()
        wait_until(lambda: len(server.streams) == 3)
        clients.append(Client(HOST, port))
        return server

    server = serve(work)
    for client in clients:
        assert received(client) == [(protocol.ERROR, b"the server shuts down")]
        client.socket.close()
    assert len(server.streams) == 0 and not server.connections


def test_the_machine_of_an_idle_client_is_asked_whether_it_is_there():
    """Only a network that loses everything shows the effect: then the stream becomes free."""

    def work(server, port):
        with contextlib.closing(Client(HOST, port).socket):
            (connection,) = server.connections
            accepted = connection._transport.get_extra_info("socket")
            return accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    assert serve(work)


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system has no times for it")
def test_a_silent_machine_is_given_half_a_minute():
    with socket.socket() as connected:
        end_when_silent(connected)
        idle, interval, count = (
            connected.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
            for name in ("IDLE", "INTVL", "CNT")
        )
    assert idle + interval * count == 30


def test_a_client_that_goes_during_its_step():
    def work(server, port):
        step = server.streams.step
        client = Client(HOST, port)

        def step_and_lose(*arguments, **options):
            client.socket.close()
            wait_until(lambda: not server.connections)
            return step(*arguments, **options)

        server.streams.step = step_and_lose
        client.send(protocol.message(protocol.FRAME, inputs(1).tobytes()))
        wait_until(lambda: len(server.streams) == 0)
        server.streams.step = step
        other = Client(HOST, port)
        np.testing.assert_array_equal([other.step(row) for row in inputs(2)], expected(inputs(2)))
        other.socket.close()

    serve(work)


def test_a_server_that_dies_during_a_load():
    """Each connection ends with an error, whether sending or receiving notices it first."""
    with socket.create_server((HOST, 0)) as listener:
        clients = []
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.callback((server := _accepted(listener, clients)).close)
                # No linger: closing resets the connection.
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        frame = protocol.message(protocol.FRAME, inputs(1).tobytes())
        result = load._measure(clients, [frame] * 9, period=0.001, seconds=0.05)
    assert len(result.errors) == 3 and result.lost >= 1 and not result.latencies
    assert all(client.socket.fileno() < 0 for client in clients)


def _accepted(listener, clients):
    """The server's end of a new connection, whose client is added to the list."""
    with ThreadPoolExecutor(1) as executor:
        client = executor.submit(Client, *listener.getsockname())
        server = listener.accept()[0]
        server.sendall(protocol.welcome(5, 7))
        clients.append(client.result())
    return server


def test_the_schedule_steps_every_stream_in_every_period():
    streams = SMALL.streams()
    result = schedule.run(streams, 4, period=0.02, seconds=0.1)
    assert sum(result.batches) == len(result.latencies) == 20
    assert min(result.latencies) > 0
    assert len(streams) == 0


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_options_of_the_network():
    """A server in another process gets them as the command line has them."""
    settings = Settings.parse("lstm", 5, "7, 7,6", None, "identity", 3)
    assert settings == Settings("lstm", 5, (7, 7, 6), "identity", 3)
    assert settings.options()[-4:] == ["--hidden", "7,7,6", "--residual", "identity"]
    assert settings.spec == NetworkSpec.stack("lstm", 5, (7, 7, 6), residual="identity")
    assert Settings.parse("gru", 5, "7", 3, None, 3).spec == RNNSpec("gru", 5, 7, 3)
    assert Settings.parse("gru", 5, "7", None, None, 3).options()[-2:] == ["--hidden", "7,7"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": ""}, "--hidden must be a number, or one for each layer, separated by commas; got ''"),
        ({"hidden": "7,-1"}, "--hidden must be positive numbers up to"),
        ({"hidden": "7,6", "layers": 2}, "--layers needs a single number of hidden units; got --layers 2 with "
         "--hidden 7,6"),
        ({"residual": "sum"}, "--cell gru: residual must be one of identity, projection; got 'sum'"),
        ({"cell": "fusedrnn.cells:sru"}, "--cell fusedrnn.cells:sru: input_size must have the size of hidden_size"),
        ({"cell": "fusedrnn.cells:none"}, "fusedrnn.cells has no cell 'none'; its cells: "),
        ({"cell": "no_file.py:cell"}, "--cell no_file.py:cell: FileNotFoundError"),
        ({"features": 0}, "--features must be 1 or more; got 0"),
    ],
)  # fmt: skip
def test_errors_of_the_network(options, words):
    defaults = {"cell": "gru", "features": 5, "hidden": "7", "layers": None, "residual": None, "capacity": 3}
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        Settings.parse(**{**defaults, **options})


def test_a_cell_that_no_engine_runs(leaky):
    cell = leaky.replace(":leaky", ":halves")
    with pytest.raises(ValueError, match=rf"^--cell {re.escape(cell)}: a head must have a multiple of .*; got 5 in"):
        Settings.parse(cell, 5, "10", None, None, 3)


def test_the_commands(tmp_path, leaky):
    sizes = ["--features", 5, "--hidden", "7,6", "--streams", 3, "--seconds", 0.3, "--cell", leaky]
    sizes += ["--residual", "projection"]
    result = run("test", *sizes, "--period", 20, "--plot", tmp_path / "latency.png")
    assert result.exit_code == 0, result.output
    for words in ("server", "end to end", "frame sent late by", "p99", "µs of processor time"):
        assert words in result.output
    assert "without an output" not in result.output
    assert (tmp_path / "latency.png").stat().st_size > 0
    result = run("schedule", *sizes, "--plot", tmp_path / "operator.svg")
    assert result.exit_code == 0, result.output
    assert re.search(r"operator +\d+", result.output)


def test_errors_of_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "processors", lambda: [0])
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, words in (
            (["serve", "--port", port, "--capacity", 2, "--hidden", 7], "address already in use"),
            (["serve", "--cell", "transformer"], "--cell must be one of gru, lstm, rnn_tanh, rnn_relu"),
            (["serve", "--processor", 4000], "--processor must be one of 0; got 4000"),
            (["schedule", "--period", 1e300], "is more than 1000000"),
            (["schedule", "--streams", 10**9, "--hidden", 2048], "Unable to allocate"),
            (["serve", "--capacity", 2, "--hidden", 10**6], "Unable to allocate"),
            (["schedule", "--plot", tmp_path / "a.txt"], "its ending must be one of"),
            (["test", "--pin"], "--pin needs two processors; this process may run on 1"),
        ):
            result = run(*arguments)
            assert result.exit_code != 0
            assert words in result.output.replace("\n", " "), result.output
    for option in ("--seconds", "--period"):
        assert "inf is not a finite number" in run("load", option, "inf").output
    assert "refused" in run("load", "--port", port, "--streams", 1).output.lower()


def test_the_limit_of_open_files(monkeypatch):
    resource = pytest.importorskip("resource")
    new = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 500))
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: new.append(values))
    limits.allow_connections(60)
    assert new == []
    limits.allow_connections(400)
    assert new == [(432, 500)]
    with pytest.raises(ValueError, match=r"^1000 connections need 1032 open files, and this system allows 500"):
        limits.allow_connections(1000)
