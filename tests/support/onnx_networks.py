"""Small models, built like those that Python packages ship: with recurrent nodes among others, and inside bodies.

Each function returns a model and a function from (T, N) to its inputs.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)


def value(name, kind=FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


def tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def weights(kind, I, H, D=1, prefix="", peepholes=False):
    """Initializers W, R, B and perhaps P of a node."""
    G = GATES[kind]
    shapes = {"W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H)} | ({"P": (D, 3 * H)} if peepholes else {})
    size = H**-0.5
    return [tensor(prefix + name, rng.uniform(-size, size, s).astype(np.float32)) for name, s in shapes.items()]


def model_of(nodes, inputs, outputs, initializers=(), *, ir_version=8, opset=17, domains=(), functions=()):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))


def conv_lstm_in_if():
    """A convolution, then one of two LSTMs in the branches of an If, with states that are inputs."""

    def branch(name, H):
        nodes = [
            helper.make_node("LSTM", ["steps", f"{name}W", f"{name}R", f"{name}B", "", "h0", "c0"],
                             [f"{name}Y", f"{name}h", f"{name}c"], name="lstm", hidden_size=H),
            helper.make_node("Squeeze", [f"{name}Y", "one"], [f"{name}y"]),
        ]  # fmt: skip
        outputs = [value(f"{name}{end}") for end in ("y", "h", "c")]
        return helper.make_graph(nodes, name, [], outputs, weights("LSTM", 6, H, prefix=name))

    nodes = [
        helper.make_node("Conv", ["X", "kernel"], ["features"], pads=[1, 1]),
        helper.make_node("Relu", ["features"], ["positive"]),
        helper.make_node("Transpose", ["positive"], ["steps"], perm=[2, 0, 1]),
        helper.make_node("Equal", ["rate", "sixteen"], ["is_sixteen"]),
        helper.make_node("If", ["is_sixteen"], ["y", "h_n", "c_n"], name="rate_if",
                         then_branch=branch("then", 8), else_branch=branch("else", 8)),
        helper.make_node("Sigmoid", ["y"], ["p"]),
    ]  # fmt: skip
    constants = [tensor("kernel", normal(6, 3, 3)), tensor("one", np.array([1])), tensor("sixteen", np.array(16000))]
    inputs = [value("X", shape=["N", 3, "T"]), value("rate", INT64, []), value("h0"), value("c0")]
    model = model_of(nodes, inputs, [value("p"), value("h_n"), value("c_n")], constants)

    def feeds(T, N):
        rate = np.array((16000, 8000)[T % 2])
        return {"X": normal(N, 3, T), "rate": rate, "h0": normal(1, N, 8), "c0": normal(1, N, 8)}

    return model, feeds


def gru_in_loop():
    """A Loop whose body is a GRU with a state, and whose weights are outside of it."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("GRU", ["X", "W", "R", "B", "", "h"], ["Y", "h_next"], hidden_size=5),
            helper.make_node("ReduceMax", ["Y"], ["largest"], axes=[0, 1]),
        ],
        "body",
        [value("number", INT64, []), value("go_on", BOOL, []), value("h", shape=[1, "N", 5])],
        [value("still", BOOL, []), value("h_next", shape=[1, "N", 5]), value("largest")],
    )
    nodes = [
        helper.make_node("Mul", ["input", "half"], ["X"]),
        helper.make_node("Loop", ["count", "", "h0"], ["h_n", "all_largest"], body=body),
    ]
    constants = [*weights("GRU", 4, 5), tensor("half", np.float32(0.5)), tensor("count", np.array(3))]
    inputs = [value("input", shape=["T", "N", 4]), value("h0", shape=[1, "N", 5])]
    model = model_of(nodes, inputs, [value("h_n"), value("all_largest")], constants)
    return model, lambda T, N: {"input": normal(T, N, 4), "h0": normal(1, N, 5)}


def rnn_in_scan():
    """A Scan over chunks of a sequence, whose body is an RNN that carries its state."""
    body = helper.make_graph(
        [helper.make_node("RNN", ["chunk", "W", "R", "B", "", "h"], ["Y", "h_next"], hidden_size=7)],
        "body",
        [value("h", shape=[1, "N", 7]), value("chunk", shape=["T", "N", 3])],
        [value("h_next", shape=[1, "N", 7]), value("Y")],
        weights("RNN", 3, 7),
    )
    nodes = [helper.make_node("Scan", ["h0", "X"], ["h_n", "Y_all"], body=body, num_scan_inputs=1)]
    inputs = [value("h0", shape=[1, "N", 7]), value("X", shape=[4, "T", "N", 3])]
    model = model_of(nodes, inputs, [value("h_n"), value("Y_all")])
    return model, lambda T, N: {"h0": normal(1, N, 7), "X": normal(4, T, N, 3)}


def gru_stack():
    """Two bidirectional GRUs with lengths, and between them exporters' nodes that concatenate the directions."""
    nodes = [helper.make_node("Transpose", ["X"], ["x0"], perm=[1, 0, 2])]
    for layer in range(2):
        names = [f"{layer}{name}" for name in ("W", "R", "B")]
        nodes += [
            helper.make_node("GRU", [f"x{layer}", *names, "lengths"], [f"Y{layer}", f"h{layer}"], hidden_size=6,
                             direction="bidirectional", linear_before_reset=1, name=f"gru{layer}"),
            helper.make_node("Transpose", [f"Y{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"t{layer}", "shape"], [f"x{layer + 1}"]),
        ]  # fmt: skip
    nodes += [
        helper.make_node("Concat", ["h0", "h1"], ["h_n"], axis=0),
        helper.make_node("Transpose", ["x2"], ["Y"], perm=[1, 0, 2]),
    ]
    constants = [*weights("GRU", 4, 6, 2, "0"), *weights("GRU", 12, 6, 2, "1"), tensor("shape", np.array([0, 0, -1]))]
    inputs = [value("X", shape=["N", "T", 4]), value("lengths", INT32, ["N"])]
    model = model_of(nodes, inputs, [value("Y"), value("h_n")], constants)

    def feeds(T, N):
        # All lengths are T, as they mostly are in use, or any.
        lengths = np.full(N, T) if T % 2 else rng.integers(0, T + 1, N)
        return {"X": normal(N, T, 4), "lengths": lengths.astype(np.int32)}

    return model, feeds


def lstm_variants():
    """Outputs left out, peepholes, the reverse direction, and directions whose activations differ."""
    functions = ["Sigmoid", "Tanh", "Tanh", "HardSigmoid", "Softsign", "Relu"]
    nodes = [
        helper.make_node("LSTM", ["X", "aW", "aR", "aB"], ["", "a_h"], hidden_size=5, name="last"),
        helper.make_node("LSTM", ["X", "bW", "bR", "bB", "", "", "", "bP"], ["b"], hidden_size=5, direction="reverse"),
        helper.make_node("LSTM", ["b_steps", "cW", "cR", "cB"], ["c", "", "c_c"], hidden_size=3, name="unlike",
                         direction="bidirectional", activations=functions, activation_alpha=[0.3],
                         activation_beta=[0.4]),
        helper.make_node("Squeeze", ["b", "one"], ["b_steps"]),
    ]  # fmt: skip
    nodes[2], nodes[3] = nodes[3], nodes[2]
    constants = [
        *weights("LSTM", 4, 5, prefix="a"), *weights("LSTM", 4, 5, prefix="b", peepholes=True),
        *weights("LSTM", 5, 3, 2, "c"), tensor("one", np.array([1])),
    ]  # fmt: skip
    outputs = [value("a_h"), value("b"), value("c"), value("c_c")]
    model = model_of(nodes, [value("X", shape=["T", "N", 4])], outputs, constants)
    return model, lambda T, N: {"X": normal(T, N, 4)}


def function_and_folded_weights():
    """An RNN in a function of the model, and one whose weight is computed from constants."""
    function = helper.make_function(
        "local", "encode", ["x", "w", "r"], ["y"],
        [helper.make_node("RNN", ["x", "w", "r"], ["y"], hidden_size=5)], [helper.make_opsetid("", 17)],
    )  # fmt: skip
    nodes = [
        helper.make_node("encode", ["X", "aW", "aR"], ["a"], domain="local", name="call"),
        helper.make_node("Transpose", ["bW_t"], ["bW"], perm=[0, 2, 1]),
        helper.make_node("Squeeze", ["a", "one"], ["steps"]),
        helper.make_node("RNN", ["steps", "bW", "bR"], ["b"], hidden_size=6, activations=["Relu"]),
    ]
    constants = [*weights("RNN", 4, 5, prefix="a"), *weights("RNN", 5, 6, prefix="b"), tensor("one", np.array([1]))]
    W = numpy_helper.to_array(constants[3])
    constants[3] = tensor("bW_t", np.ascontiguousarray(W.swapaxes(1, 2)))
    inputs = [value("X", shape=["T", "N", 4])]
    model = model_of(nodes, inputs, [value("b")], constants, domains=["local"], functions=[function])
    return model, lambda T, N: {"X": normal(T, N, 4)}


NETWORKS = {
    function.__name__: function
    for function in (
        conv_lstm_in_if, gru_in_loop, rnn_in_scan, gru_stack, lstm_variants, function_and_folded_weights,
    )
}  # fmt: skip
