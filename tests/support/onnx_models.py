"""Models of one recurrent node, ONNX's equations for them, and the outputs of other runtimes.

The limits of those runtimes, which tests must avoid:

- onnx's ReferenceEvaluator ignores sequence_lens, clip, input_forget and the activations of LSTM and GRU, and fails
  if output_sequence is set; of RNN it supports Tanh and Affine, and opset 7 and later.
- onnxruntime has no layout 1, no float64, no opset below 7; final states of a sequence of length 0 are zero; without
  a value in activation_alpha, ThresholdedRelu's alpha is 0, where ONNX's operator has 1.
"""

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import fusedrnn.onnx
from fusedrnn.testing.tolerance import difference, tolerance

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FUNCTIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
STATES = {"LSTM": "hc", "GRU": "h", "RNN": "h"}
ORDER = {
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
}
ALL = ("B", "initial_h", "initial_c", "P")
# How many of alpha and beta each activation has.
NUM_PARAMETERS = {
    "Relu": 0, "Tanh": 0, "Sigmoid": 0, "Softsign": 0, "Softplus": 0,
    "LeakyRelu": 1, "ThresholdedRelu": 1, "Elu": 1,
    "Affine": 2, "ScaledTanh": 2, "HardSigmoid": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A node with random arrays; of the inputs in ``optional`` it has those that the operator has."""

    kind: str
    T: int = 5
    N: int = 3
    I: int = 4
    H: int = 6
    dtype: str = "float32"
    opset: int = 14  # every runtime supports it; later ones only add bfloat16
    optional: tuple = ALL
    lengths: tuple | None = None
    weights_inside: bool = False
    outputs: tuple | None = None
    name: str = "node"
    attributes: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.kind}-{self.attributes}"

    @property
    def D(self):
        return 2 if self.attributes.get("direction") == "bidirectional" else 1

    @property
    def batch_first(self):
        return self.attributes.get("layout", 0) == 1

    @property
    def output_names(self):
        return self.outputs or ("Y", "Y_h", "Y_c")[: len(STATES[self.kind]) + 1]

    def arrays(self, seed=0):
        """The inputs by name, in the node's number format and layout; float32 represents them exactly."""
        rng = np.random.default_rng([seed, self.T, self.N, self.I, self.H])
        D, H, G = self.D, self.H, GATES[self.kind]
        bound = H**-0.5

        def uniform(size, *shape):
            return rng.uniform(-size, size, shape).astype(np.float32).astype(self.dtype)

        arrays = {
            "X": uniform(min(1.7, 1.7 * (H / self.I) ** 0.5), self.T, self.N, self.I),
            "W": uniform(bound, D, G * H, self.I),
            "R": uniform(bound, D, G * H, H),
            "B": uniform(bound, D, 2 * G * H),
            "initial_h": uniform(1, D, self.N, H),
            "initial_c": uniform(1, D, self.N, H),
            "P": uniform(1, D, 3 * H),
        }
        if self.lengths is not None:
            arrays["sequence_lens"] = np.array(self.lengths, np.int32)
        names = {"X", "W", "R", "sequence_lens", *self.optional}
        if self.batch_first:
            for name in ("X", "initial_h", "initial_c"):
                arrays[name] = np.ascontiguousarray(arrays[name].swapaxes(0, 1))
        return {name: arrays[name] for name in ORDER[self.kind] if name in names and name in arrays}

    def node(self, arrays):
        names = [name if name in arrays else "" for name in ORDER[self.kind]]
        while not names[-1]:
            names.pop()
        attributes = {"hidden_size": self.H} | self.attributes
        return helper.make_node(self.kind, names, list(self.output_names), name=self.name, **attributes)

    def model(self, arrays):
        node = self.node(arrays)
        weights = [name for name in ("W", "R", "B", "P") if name in arrays and self.weights_inside]
        inputs = [info(name, array) for name, array in arrays.items() if name not in weights]
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(arrays["X"].dtype))
        outputs = [
            helper.make_tensor_value_info(name, kind, [None] * (4 if index == 0 else 3))
            for index, name in enumerate(self.output_names)
            if name
        ]
        initializers = [numpy_helper.from_array(arrays[name], name) for name in weights]
        return model_of([node], inputs, outputs, initializers, self.opset)

    def inputs(self, arrays):
        """The arrays that are inputs of the model."""
        return {name: a for name, a in arrays.items() if not (self.weights_inside and name in ("W", "R", "B", "P"))}


def info(name, array):
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def model_of(nodes, inputs, outputs, initializers=(), opset=14):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def computed(arrays):
    """Nodes and initializers that compute each array exactly, as ``name/out``, as exporters emit them."""
    nodes, initializers = [], []
    for name, array in arrays.items():
        flat = array.reshape(-1, array.shape[-1])
        half = max(1, len(flat) // 2)
        numbers = {"zero": [0], "half": [half], "end": [len(flat)], "shape": array.shape}
        data = np.ascontiguousarray(flat.T.astype(np.float64))
        initializers += [numpy_helper.from_array(data, f"{name}/data")]
        initializers += [numpy_helper.from_array(np.array(v, np.int64), f"{name}/{n}") for n, v in numbers.items()]
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        for operator, inputs, output, attributes in (
            ("Cast", ["data"], "cast", {"to": kind}),
            ("Transpose", ["cast"], "transposed", {}),
            ("Slice", ["transposed", "zero", "half", "zero"], "first", {}),
            ("Slice", ["transposed", "half", "end", "zero"], "second", {}),
            ("Concat", ["first", "second"], "joined", {"axis": 0}),
            ("Unsqueeze", ["joined", "zero"], "unsqueezed", {}),
            ("Reshape", ["unsqueezed", "shape"], "out", {}),
        ):
            nodes.append(
                helper.make_node(operator, [f"{name}/{n}" for n in inputs], [f"{name}/{output}"], **attributes)
            )
    return nodes, initializers


# ---- the runtimes


def run_fusedrnn(case, arrays):
    """The outputs of the reference engine, with which other tests compare the kernels of every variant."""
    return fusedrnn.onnx.prepare(case.model(arrays), backend="reference").run(case.inputs(arrays))


def run_onnxruntime(case, arrays):
    content = case.model(arrays).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, case.inputs(arrays))


def run_reference_evaluator(case, arrays):
    return ReferenceEvaluator(case.model(arrays)).run(None, case.inputs(arrays))


# ---- the standard's equations


def _functions(case):
    """The activations of each direction, with alpha and beta taken from the lists in order."""
    names = list(case.attributes.get("activations") or FUNCTIONS[case.kind] * case.D)
    alphas = iter([float(np.float32(a)) for a in case.attributes.get("activation_alpha", ())])
    betas = iter([float(np.float32(b)) for b in case.attributes.get("activation_beta", ())])
    defaults = {"LeakyRelu": (0.01,), "ThresholdedRelu": (1.0,), "Elu": (1.0,), "HardSigmoid": (0.2, 0.5)}
    functions = []
    for name in names:
        default = (*defaults.get(name, ()), None, None)
        alpha = next(alphas, default[0]) if NUM_PARAMETERS[name] else None
        beta = next(betas, default[1]) if NUM_PARAMETERS[name] > 1 else None
        functions.append(lambda x, name=name, a=alpha, b=beta: _function(name, x, a, b))
    count = len(FUNCTIONS[case.kind])
    return [functions[first : first + count] for first in range(0, case.D * count, count)]


def _function(name, x, a, b):
    with np.errstate(over="ignore"):
        return {
            "Relu": lambda: np.maximum(0, x),
            "Tanh": lambda: np.tanh(x),
            "Sigmoid": lambda: 1 / (1 + np.exp(-x)),
            "Affine": lambda: a * x + b,
            "LeakyRelu": lambda: np.where(x >= 0, x, a * x),
            "ThresholdedRelu": lambda: np.where(x > a, x, 0),
            "ScaledTanh": lambda: a * np.tanh(b * x),
            "HardSigmoid": lambda: np.minimum(np.maximum(a * x + b, 0), 1),
            "Elu": lambda: np.where(x >= 0, x, a * (np.exp(np.minimum(x, 0)) - 1)),
            "Softsign": lambda: x / (1 + np.abs(x)),
            "Softplus": lambda: np.log1p(np.exp(x)),
        }[name]()


class RoundingMatrix(np.ndarray):
    """A matrix whose products round the vector to bfloat16 first."""

    def __matmul__(self, vector):
        return np.asarray(self) @ vector.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def expected(case, arrays):
    """The outputs as the standard's equations give them, in float64, step by step.

    In a case in bfloat16, each vector is rounded to bfloat16 before a matrix multiplies it.
    """
    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    if arrays["W"].dtype.name == "bfloat16":
        a |= {name: a[name].view(RoundingMatrix) for name in ("W", "R")}
    if case.batch_first:
        a |= {name: a[name].swapaxes(0, 1) for name in ("X", "initial_h", "initial_c") if name in a}
    T, N, H, G = case.T, case.N, case.H, GATES[case.kind]
    lengths = arrays.get("sequence_lens", np.full(N, T))
    Y, last = np.zeros((T, case.D, N, H)), []
    for d, functions in enumerate(_functions(case)):
        bias = a["B"][d] if "B" in a else np.zeros(2 * G * H)
        w = [a["W"][d], a["R"][d], bias[: G * H], bias[G * H :], a["P"][d] if "P" in a else np.zeros(3 * H)]
        for n in range(N):
            state = [a[f"initial_{s}"][d, n] if f"initial_{s}" in a else np.zeros(H) for s in STATES[case.kind]]
            backwards = d == 1 or case.attributes.get("direction") == "reverse"
            steps = range(lengths[n])
            for t in reversed(steps) if backwards else steps:
                state = _STEPS[case.kind](case.attributes, functions, a["X"][t, n], state, *w)
                Y[t, d, n] = state[0]
            last.append(state)
    finals = [np.stack([state[s] for state in last]).reshape(case.D, N, H) for s in range(len(STATES[case.kind]))]
    outputs = [Y.transpose(2, 0, 1, 3), *(f.swapaxes(0, 1) for f in finals)] if case.batch_first else [Y, *finals]
    return [array for array, name in zip(outputs, case.output_names, strict=False) if name]


def _clipped(attributes, x):
    bound = float(np.float32(attributes.get("clip", np.inf)))
    return np.clip(x, -bound, bound)


def _rnn(attributes, functions, x, state, W, R, Wb, Rb, P):
    return [functions[0](_clipped(attributes, W @ x + R @ state[0] + Wb + Rb))]


def _gru(attributes, functions, x, state, W, R, Wb, Rb, P):
    f, g = functions
    (h,) = state
    (Wz, Wr, Wh), (Rz, Rr, Rh) = np.split(W, 3), np.split(R, 3)
    (Wbz, Wbr, Wbh), (Rbz, Rbr, Rbh) = np.split(Wb, 3), np.split(Rb, 3)
    z = f(_clipped(attributes, Wz @ x + Rz @ h + Wbz + Rbz))
    r = f(_clipped(attributes, Wr @ x + Rr @ h + Wbr + Rbr))
    linear = attributes.get("linear_before_reset", 0) != 0
    n = Wh @ x + r * (Rh @ h + Rbh) + Wbh if linear else Wh @ x + Rh @ (r * h) + Rbh + Wbh
    return [(1 - z) * g(_clipped(attributes, n)) + z * h]


def _lstm(attributes, functions, x, state, W, R, Wb, Rb, P):
    f, g, h = functions
    H, C = state
    (Pi, Po, Pf), (ai, ao, af, ac) = np.split(P, 3), np.split(W @ x + R @ H + Wb + Rb, 4)
    i = f(_clipped(attributes, ai + Pi * C))
    forget = 1 - i if attributes.get("input_forget") else f(_clipped(attributes, af + Pf * C))
    C = forget * C + i * g(_clipped(attributes, ac))
    return [f(_clipped(attributes, ao + Po * C)) * h(C), C]


_STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


# ---- comparing


def assert_same(actual, reference, case, dtype=None):
    """Check the number of outputs, their number formats and their values within the tolerance."""
    dtype = dtype or case.dtype
    assert len(actual) == len(reference)
    scale = max(1.0, *(float(np.abs(array).max(initial=0)) for array in reference))
    for number, (array, other) in enumerate(zip(actual, reference, strict=True)):
        assert array.dtype == np.dtype(case.dtype)
        message = difference(array, other, *tolerance(dtype, case.I + case.H + 2, scale))
        assert message is None, f"output {number}{message}"


def drop_empty_sequences(results, case):
    """The results without the final states of sequences of length 0."""
    if case.lengths is None or 0 not in case.lengths:
        return results
    nonempty = np.flatnonzero(case.lengths)
    has_y = next(filter(None, case.output_names)) == "Y"
    return [array if has_y and index == 0 else array[:, nonempty] for index, array in enumerate(results)]
