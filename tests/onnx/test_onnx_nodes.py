"""Every attribute and input of ONNX's LSTM, GRU and RNN, against ONNX's equations and other runtimes."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import fusedrnn.onnx
from onnx_models import (
    ALL,
    FUNCTIONS,
    NUM_PARAMETERS,
    Case,
    assert_same,
    drop_empty_sequences,
    expected,
    run_fusedrnn,
    run_onnxruntime,
    run_reference_evaluator,
)

KINDS = ("LSTM", "GRU", "RNN")
DIRECTIONS = ("forward", "reverse", "bidirectional")
kinds = pytest.mark.parametrize("kind", KINDS)

needs_complete_evaluator = pytest.mark.skipif(
    tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23),
    reason="the ReferenceEvaluator of this onnx package lacks directions, layout 1 or Y_c",
)

LSTM_ONLY = (
    {"input_forget": 1},
    {"input_forget": 1, "clip": 0.4, "direction": "bidirectional"},
    {
        "activations": ["HardSigmoid", "Softsign", "ScaledTanh"],
        "activation_alpha": [0.3, 1.4],
        "activation_beta": [0.4, 0.6],
    },
    {
        "direction": "bidirectional",
        "activations": ["Sigmoid", "Tanh", "Tanh", "HardSigmoid", "LeakyRelu", "ScaledTanh"],
        "activation_alpha": [0.3, 0.1, 1.4],
        "activation_beta": [0.4, 0.6],
    },
)  # fmt: skip
GRU_ONLY = (
    {"linear_before_reset": 1},
    {"linear_before_reset": 1, "clip": 0.4, "direction": "bidirectional"},
    {"linear_before_reset": 1, "activations": ["HardSigmoid", "Elu"]},
    {"direction": "bidirectional", "activations": ["Sigmoid", "Tanh", "Sigmoid", "Affine"], "activation_alpha": [0.5],
     "activation_beta": [0.1]},
)  # fmt: skip
RNN_ONLY = (
    {"activations": ["Relu"]},
    {"activations": ["Relu", "Relu"], "direction": "bidirectional"},
    {"activations": ["Relu", "Tanh"], "direction": "bidirectional"},
    {"activations": ["Tanh", "Tanh"]},  # the schema's default
    {"activations": ["ThresholdedRelu"], "activation_alpha": [0.2], "direction": "reverse"},
    {"activations": ["Softplus"], "clip": 0.5},
)
MIXED = {"activations": ["Tanh", "LeakyRelu"], "activation_alpha": [0.3], "direction": "bidirectional"}
"""Not run on onnxruntime: some of its releases read alpha beyond the end of the list."""
ANY = ({}, {"direction": "reverse"}, {"direction": "bidirectional"}, {"clip": 0.3})
OWN = {"LSTM": LSTM_ONLY, "GRU": GRU_ONLY, "RNN": RNN_ONLY}
ATTRIBUTES = [(kind, attributes) for kind in KINDS for attributes in (*ANY, *OWN[kind])]
OPTIONAL_INPUTS = [(), ("B",), ("initial_h",), ("initial_c",), ("P",), ("B", "P"), ALL]


@pytest.mark.parametrize(("kind", "attributes"), ATTRIBUTES, ids=str)
@pytest.mark.parametrize("lengths", [None, (5, 1, 3), (2, 0, 4)], ids=["full", "some", "edges"])
def test_attributes_against_onnxruntime(kind, attributes, lengths):
    case = Case(kind, lengths=lengths, attributes=attributes)
    arrays = case.arrays()
    actual = run_fusedrnn(case, arrays)
    assert_same(actual, expected(case, arrays), case)
    reference = drop_empty_sequences(run_onnxruntime(case, arrays), case)
    assert_same(drop_empty_sequences(actual, case), reference, case)


def test_final_states_of_empty_sequence():
    """They are the initial states; onnxruntime returns zeros, and the standard does not say."""
    case = Case("LSTM", lengths=(2, 0, 4))
    arrays = case.arrays()
    _, *final = run_fusedrnn(case, arrays)
    _, *reference = run_onnxruntime(case, arrays)
    for name, state, zero in zip(("initial_h", "initial_c"), final, reference, strict=True):
        np.testing.assert_array_equal(state[:, 1], arrays[name][:, 1])
        assert not zero[:, 1].any()


@pytest.mark.parametrize(("kind", "attributes"), [*ATTRIBUTES, ("RNN", MIXED)], ids=str)
@pytest.mark.parametrize("layout", [0, 1])
def test_attributes_in_float64(kind, attributes, layout):
    """onnxruntime supports neither float64 nor layout 1."""
    case = Case(kind, dtype="float64", lengths=(2, 0, 4), attributes=attributes | {"layout": layout})
    arrays = case.arrays()
    assert_same(run_fusedrnn(case, arrays), expected(case, arrays), case)


@kinds
@pytest.mark.parametrize("optional", OPTIONAL_INPUTS, ids="-".join)
@pytest.mark.parametrize("weights_inside", [False, True], ids=["inputs", "initializers"])
def test_optional_inputs(kind, optional, weights_inside):
    attributes = {"direction": "bidirectional"}
    case = Case(kind, optional=optional, weights_inside=weights_inside, attributes=attributes)
    arrays = case.arrays()
    actual = run_fusedrnn(case, arrays)
    assert_same(actual, expected(case, arrays), case)
    assert_same(actual, run_onnxruntime(case, arrays), case)


@needs_complete_evaluator
@kinds
@pytest.mark.parametrize("optional", OPTIONAL_INPUTS, ids="-".join)
def test_optional_inputs_against_the_reference_evaluator(kind, optional):
    case = Case(kind, optional=optional, attributes={"direction": "bidirectional"})
    arrays = case.arrays()
    assert_same(run_fusedrnn(case, arrays), run_reference_evaluator(case, arrays), case)


@needs_complete_evaluator
@kinds
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_against_the_reference_evaluator(kind, direction, layout, dtype):
    case = Case(kind, dtype=dtype, attributes={"direction": direction, "layout": layout})
    arrays = case.arrays()
    assert_same(run_fusedrnn(case, arrays), run_reference_evaluator(case, arrays), case)


@kinds
@pytest.mark.parametrize("opset", [*range(1, 23), onnx.defs.onnx_opset_version()])
def test_every_opset(kind, opset):
    attributes = {"clip": 0.6} | ({"output_sequence": 1} if opset < 7 else {"direction": "bidirectional"})
    if opset >= 14:
        attributes["layout"] = 1
    case = Case(kind, opset=opset, lengths=(5, 1, 3), attributes=attributes)
    arrays = case.arrays()
    assert_same(run_fusedrnn(case, arrays), expected(case, arrays), case)


@needs_complete_evaluator
@pytest.mark.parametrize("opset", [1, 3])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_old_opsets_against_the_reference_evaluator(kind, opset):
    """The evaluator lacks output_sequence, which changes nothing if Y has a name, and RNN before opset 7."""
    case = Case(kind, opset=opset)
    arrays = case.arrays()
    reference = run_reference_evaluator(case, arrays)
    for attributes in ({}, {"output_sequence": 0}, {"output_sequence": 1}):
        assert_same(run_fusedrnn(replace(case, attributes=attributes), arrays), reference, case)


def test_misspelled_direction_of_first_gru_version():
    case = Case("GRU", opset=1, attributes={"direction": "foward"})
    arrays = case.arrays()
    assert_same(run_fusedrnn(case, arrays), expected(replace(case, attributes={}), arrays), case)


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_every_activation(name):
    """As f of an RNN, and as g and h of an LSTM and a GRU, whose f must be bounded."""
    num_parameters = NUM_PARAMETERS[name]
    for kind in KINDS:
        count = len(FUNCTIONS[kind])
        names = [name] if kind == "RNN" else ["Sigmoid", *[name] * (count - 1)]
        uses = names.count(name)
        attributes = {"activations": names}
        if num_parameters > 0:
            attributes["activation_alpha"] = [0.3, 0.7][:uses]
        if num_parameters > 1:
            attributes["activation_beta"] = [0.4, 0.2][:uses]
        case = Case(kind, T=3, attributes=attributes)
        arrays = case.arrays()
        actual = run_fusedrnn(case, arrays)
        assert_same(actual, expected(case, arrays), case)
        assert_same(actual, run_onnxruntime(case, arrays), case)


@pytest.mark.parametrize("name", ["LeakyRelu", "Elu", "HardSigmoid", "ThresholdedRelu"])
def test_default_activation_parameters(name):
    """They are those of ONNX's operators of these names; some releases of onnxruntime have others."""
    case = Case("RNN", attributes={"activations": [name]})
    arrays = case.arrays()
    assert_same(run_fusedrnn(case, arrays), expected(case, arrays), case)


def test_thresholded_relu_at_threshold():
    """The result is 0, as in ONNX's operator ThresholdedRelu; the text of the recurrent operators says x."""
    case = Case("RNN", attributes={"activations": ["ThresholdedRelu"], "activation_alpha": [0.25], "clip": 0.25})
    arrays = case.arrays()
    for outputs in (run_fusedrnn(case, arrays), run_onnxruntime(case, arrays)):
        assert not outputs[0].any()


def test_activation_names_ignore_case():
    case = Case("LSTM", attributes={"activations": ["HardSigmoid", "LeakyRelu", "Softsign"]})
    other_case = replace(case, attributes={"activations": ["hardsigmoid", "LEAKYRELU", "SoftSign"]})
    arrays = case.arrays()
    for output, reference in zip(run_fusedrnn(other_case, arrays), run_fusedrnn(case, arrays), strict=True):
        np.testing.assert_array_equal(output, reference)


@kinds
def test_float16_is_computed_in_float32(kind):
    """Outputs are rounded once."""
    case = Case(kind, lengths=(5, 1, 3), attributes={"direction": "bidirectional"}, weights_inside=True)
    arrays = {name: a if name == "sequence_lens" else a.astype(np.float16) for name, a in case.arrays().items()}
    single = {name: a if name == "sequence_lens" else a.astype(np.float32) for name, a in arrays.items()}
    for rounded, exact in zip(run_fusedrnn(case, arrays), run_fusedrnn(case, single), strict=True):
        assert rounded.dtype == np.float16
        np.testing.assert_array_equal(rounded, exact.astype(np.float16))


BFLOAT16_CASES = [(kind, attributes) for kind in KINDS for attributes in (ANY[2], OWN[kind][0], OWN[kind][1])]


@pytest.mark.parametrize(("kind", "attributes"), BFLOAT16_CASES, ids=str)
@pytest.mark.parametrize("weights_inside", [False, True], ids=["inputs", "initializers"])
@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_bfloat16(kind, attributes, weights_inside, engine):
    """Vectors are rounded as they enter a product, sums are in float32, and outputs are rounded once."""
    needs_bfloat16_arrays()
    case = Case(
        kind, H=24, dtype="bfloat16", opset=22, lengths=(5, 1, 3), attributes=attributes, weights_inside=weights_inside
    )
    arrays = case.arrays()
    outputs = fusedrnn.onnx.prepare(case.model(arrays), backend=engine).run(case.inputs(arrays))
    for output, exact in zip(outputs, expected(case, arrays), strict=True):
        assert output.dtype == ml_dtypes.bfloat16
        # Half a step of the output. In a few elements float32 and float64 round an h to different neighbours.
        error = np.abs(output.astype(np.float64) - exact) / np.maximum(np.abs(exact), 2.0**-6)
        assert (error <= 1.05 * 2.0**-8).mean() >= 0.98
        assert error.max() <= 2.0**-6


@needs_complete_evaluator
def test_bfloat16_against_the_reference_evaluator():
    """Of one step, it rounds each result to bfloat16: a dozen of rounded numbers of magnitude up to 4."""
    needs_bfloat16_arrays()
    case = Case("LSTM", T=1, dtype="bfloat16", opset=22, attributes={"direction": "bidirectional"})
    arrays = case.arrays()
    for output, reference in zip(run_fusedrnn(case, arrays), run_reference_evaluator(case, arrays), strict=True):
        np.testing.assert_allclose(output.astype(np.float64), reference.astype(np.float64), rtol=0, atol=12 * 2.0**-7)


def needs_bfloat16_arrays():
    if helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16) == np.float32:
        pytest.skip("this onnx package has no arrays of bfloat16")


@kinds
def test_float16_against_onnxruntime(kind):
    case = Case(kind, dtype="float16")
    arrays = case.arrays()
    assert_same(run_fusedrnn(case, arrays), run_onnxruntime(case, arrays), case)


def test_float16_overflow():
    case = Case("RNN", T=1, N=1, I=1, H=1, dtype="float16", optional=(), attributes={"activations": ["Relu"]})
    arrays = {name: np.full_like(a, 300) for name, a in case.arrays().items()}
    Y, Y_h = run_fusedrnn(case, arrays)
    assert np.isinf(Y).all()
    assert np.isinf(Y_h).all()


# ---- random nodes

FLOATS = st.sampled_from([0.1, 0.25, 0.6, 1.3])
BOUNDED = ("Sigmoid", "HardSigmoid", "Tanh", "Softsign", "ScaledTanh")


@st.composite
def cases(draw):
    """A node with random attributes, sizes and inputs; f is bounded, so that states stay finite."""
    kind = draw(st.sampled_from(KINDS))
    T, N, I, H = (draw(st.integers(1, size)) for size in (5, 4, 5, 7))
    attributes = {"direction": draw(st.sampled_from(DIRECTIONS)), "layout": draw(st.sampled_from([0, 1]))}
    D = 2 if attributes["direction"] == "bidirectional" else 1
    if draw(st.booleans()):
        names = [draw(st.sampled_from(tuple(NUM_PARAMETERS))) for _ in range(len(FUNCTIONS[kind]) * D)]
        if kind != "RNN":
            for index in range(0, len(names), len(FUNCTIONS[kind])):
                names[index] = draw(st.sampled_from(BOUNDED))
        attributes["activations"] = names
        for parameter, count in (("alpha", 1), ("beta", 2)):
            values = [draw(FLOATS) for name in names if NUM_PARAMETERS[name] >= count]
            if values:
                attributes[f"activation_{parameter}"] = values
    if draw(st.booleans()):
        attributes["clip"] = draw(FLOATS)
    if kind == "LSTM":
        attributes["input_forget"] = draw(st.sampled_from([0, 1]))
    if kind == "GRU":
        attributes["linear_before_reset"] = draw(st.sampled_from([0, 1]))
    lengths = draw(st.none() | st.tuples(*[st.integers(0, T)] * N))
    optional = tuple(name for name in ALL if draw(st.booleans()))
    dtype = draw(st.sampled_from(["float32", "float64"]))
    weights_inside = draw(st.booleans())
    return Case(kind, T, N, I, H, dtype, 14, optional, lengths, weights_inside, attributes=attributes)


def has_mixed_parameters(case):
    """Whether the activations of an RNN's directions have different numbers of parameters, see :data:`MIXED`."""
    return case.kind == "RNN" and len({NUM_PARAMETERS[name] for name in case.attributes.get("activations", ())}) > 1


@given(cases(), st.integers(0, 1000))
@settings(max_examples=60)
def test_random_nodes(case, seed):
    arrays = case.arrays(seed)
    actual = run_fusedrnn(case, arrays)
    assert_same(actual, expected(case, arrays), case)
    if case.dtype == "float32" and not case.batch_first and not has_mixed_parameters(case):
        reference = run_onnxruntime(case, arrays)
        assert_same(drop_empty_sequences(actual, case), drop_empty_sequences(reference, case), case)
