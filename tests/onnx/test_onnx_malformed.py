"""Randomly mutated models: each call succeeds or raises a documented error that names a node or a constant."""

import random
import re

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from onnx import helper, numpy_helper

from fusedrnn.onnx import prepare, read, write
from onnx_models import Case, computed, info, model_of

MUTATIONS = 250
INTEGERS = (0, 1, -1, 2, 3, 7, 14, 22, 100, 2**31 - 1, -(2**31), 2**40, 2**62)
FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e30, 0.5)
TEXTS = (
    "", "nothing", "X", "LSTM", "Constant", "ConstantOfShape", "Expand", "Tile", "Split", "Loop", "If", "MatMul",
    "com.microsoft", "ai.onnx", "reverse", "value", "value_floats", "sparse_value", "axis", "layout", "to",
)  # fmt: skip
BYTES = (b"", b"forward", b"\xff\xfe", b"Gelu", b"x" * 16)
ENUMS = (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 25, 99)
NAMES_NODE = r"node '|the node of '|^names of nodes or of their outputs must differ"
NAMES_NODE_OR_PART = rf"{NAMES_NODE}|^model must |^constant '|^initializer '|^inputs must be "

# ---- the models


def with_stored_weights(kind):
    """A model with every attribute and input, in which all inputs but X are initializers; and its arrays."""
    count = {"LSTM": 3, "GRU": 2, "RNN": 1}[kind]
    attributes = {
        "direction": "bidirectional",
        "clip": 3.0,
        "activations": ["Elu"] * 2 * count,
        "activation_alpha": [1.0] * 2 * count,
    }
    case = Case(kind, T=3, N=2, I=3, H=4, lengths=(3, 1), weights_inside=True, attributes=attributes)
    arrays = case.arrays()
    model = case.model(arrays)
    del model.graph.input[1:]
    stored = {tensor.name for tensor in model.graph.initializer}
    for name, array in arrays.items():
        if name not in stored and name != "X":
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model, arrays


def with_computed_weights(kind):
    model, arrays = with_stored_weights(kind)
    weights = {name: arrays[name] for name in ("W", "R", "B", "initial_h")}
    nodes, initializers = computed(weights)
    node = model.graph.node[0]
    for index, name in enumerate(node.input):
        if name in weights:
            node.input[index] = f"{name}/out"
    remaining = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
    x = info("X", arrays["X"])
    return model_of([*nodes, node], [x], model.graph.output, [*remaining, *initializers])


def in_a_branch(kind):
    model = with_computed_weights(kind)
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.input[:], graph.initializer[:]
    names = [output.name for output in graph.output]
    constants = [*model.graph.initializer, numpy_helper.from_array(np.array(True), "condition")]
    branch = helper.make_node("If", ["condition"], names, name="branch", then_branch=graph, else_branch=graph)
    return model_of([branch], model.graph.input, model.graph.output, constants)


def in_a_function(kind):
    model, _ = with_stored_weights(kind)
    node = model.graph.node[0]
    inputs = [name for name in node.input if name]
    next(entry for entry in node.attribute if entry.name == "direction").ref_attr_name = "way"
    opsets = [helper.make_opsetid("", 14)]
    function = helper.make_function("local", "encode", inputs, list(node.output), [node], opsets, ["way"])
    function.node[0].attribute[-1].ClearField("s")
    call = helper.make_node("encode", inputs, list(node.output), name="call", domain="local", way="bidirectional")
    model = model_of([call], model.graph.input, model.graph.output, model.graph.initializer)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.append(function)
    return model


def models():
    for kind in ("LSTM", "GRU", "RNN"):
        yield f"{kind}, stored", with_stored_weights(kind)[0]
        yield f"{kind}, computed", with_computed_weights(kind)
        yield f"{kind}, in a branch", in_a_branch(kind)
        yield f"{kind}, in a function", in_a_function(kind)


MODELS = dict(models())

# ---- mutations


def messages(message):
    """The message and all messages nested in it."""
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "DESCRIPTOR") else value:
                yield from messages(inner)


def random_value(field, old, names, rng):
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice((*TEXTS, *names))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice((*BYTES, old[:-1], old[: len(old) // 2], old + bytes(4)) if old else BYTES)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice(ENUMS)
    return rng.choice(FLOATS if field.type == FieldDescriptor.TYPE_FLOAT else INTEGERS)


def change_elements(elements, field, names, rng):
    """Remove, repeat or replace an element, add one, or reverse the order."""
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    action = rng.choice(("remove", "repeat", "reverse", "replace", "add"))
    if action == "add" or not elements:
        elements.add() if is_message else elements.append(random_value(field, None, names, rng))
        return
    index = rng.randrange(len(elements))
    if action == "remove":
        del elements[index]
    elif action == "repeat":
        elements.append(elements[index])
    elif action == "reverse":
        elements.reverse()
    elif is_message:
        elements[index].Clear()
    else:
        elements[index] = random_value(field, elements[index], names, rng)


def change(message, field, names, rng):
    value = getattr(message, field.name)
    if not isinstance(value, (str, bytes, int, float)) and not hasattr(value, "DESCRIPTOR"):
        change_elements(value, field, names, rng)
    elif rng.random() < 0.25:
        message.ClearField(field.name)
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        value.SetInParent()
    else:
        setattr(message, field.name, random_value(field, value, names, rng))


def mutate(model, rng):
    """Change one field of a random message."""
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    message = rng.choice(list(messages(model)))
    present = [field for field, _ in message.ListFields()]
    field = rng.choice(present if present and rng.random() < 0.8 else message.DESCRIPTOR.fields)
    try:
        change(message, field, names, rng)
    except ValueError:  # the field's type cannot hold the number
        message.ClearField(field.name)


def mutated(seed):
    rng = random.Random(seed)
    name = rng.choice(list(MODELS))
    model = onnx.ModelProto()
    model.CopyFrom(MODELS[name])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate(model, rng)
    return model


def succeeds(call, pattern):
    """Whether the call succeeds; if not, its error must be of a documented type and its message match the pattern."""
    try:
        call()
    except (TypeError, ValueError, NotImplementedError) as error:
        assert re.search(pattern, str(error)), error
        return False
    return True


# ---- the tests


@pytest.mark.parametrize("name", MODELS)
def test_unmutated_models(name):
    layers = read(MODELS[name])
    assert len(layers) == (2 if "branch" in name else 1)
    for layer in layers.values():
        assert layer.spec.bidirectional
        if "function" not in name and "branch" not in name:
            write(MODELS[name], layer.name, layer.params)
            prepare(MODELS[name], backend="reference").run([np.zeros((3, 2, 3), np.float32)])


def test_mutated_models():
    """Reading, writing and running succeed or raise documented errors."""
    x = np.zeros((3, 2, 3), np.float32)
    counts = {"read": 0, "write": 0, "run": 0}
    for seed in range(MUTATIONS):
        model = mutated(seed)
        counts["run"] += succeeds(lambda model=model: prepare(model, backend="reference").run([x]), NAMES_NODE_OR_PART)
        if not succeeds(lambda model=model: read(model), NAMES_NODE):
            continue
        counts["read"] += 1
        for name, layer in read(model).items():
            parts = [part.params for part in layer.parts]
            counts["write"] += succeeds(lambda m=model, n=name, p=parts: write(m, n, p), NAMES_NODE)
    assert all(MUTATIONS // 20 < count < MUTATIONS for count in counts.values()), counts
