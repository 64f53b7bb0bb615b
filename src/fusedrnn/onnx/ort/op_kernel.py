"""The machine code of a custom operator of ONNX Runtime: functions that describe it, and the kernel of a layer.

The kernel reads its inputs through ONNX Runtime's C API. If their shapes are those of the previous call, it binds the
kernel arguments and runs the job, without the interpreter. Otherwise it calls Python, which checks the shapes, and
prepares the next calls or runs the job itself.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedrnn.engines.cpu.launch.call_kernel import emit_bind
from fusedrnn.jit.builder import I32, I64, Function, Module, Value, Variable
from fusedrnn.jit.host import current_target
from fusedrnn.jit.loader import LoadedObject, load, load_once
from fusedrnn.jit.struct import Fields, Struct
from fusedrnn.jit.sync import try_lock, unlock
from fusedrnn.onnx.ort.c_api import FAIL, OPERATOR_FIELDS, function_offset

MAX_INPUTS, MAX_OUTPUTS, MAX_AXES = 4, 3, 3
"""Inputs are X, the lengths and two states; outputs are Y and two states. Inputs of more axes are errors."""
_SHAPE_WORDS = 1 + MAX_AXES

CALL = Struct(
    *(f"{field} of {number}" for number in range(MAX_INPUTS) for field in ("ndim", "size0", "size1", "size2")),
    *(f"input{number}" for number in range(MAX_INPUTS)), *(f"output{number}" for number in range(MAX_OUTPUTS)),
    "has_slot", "status", "result",
)  # fmt: skip
"""A call: the shape of each input, the addresses of inputs and outputs, whether it has the slot, an error, and the
result of :data:`OnCall`."""
_STEPS, _BATCH = CALL.offset("size0 of 0"), CALL.offset("size1 of 0")
_NUM_SHAPE_WORDS = MAX_INPUTS * _SHAPE_WORDS

OPERATOR = Struct(
    *OPERATOR_FIELDS, "name", "api", "on_call", "interrupted", "layer", "num_inputs", "num_outputs",
    *(f"input_type{number}" for number in range(MAX_INPUTS)), *(f"is_state{number}" for number in range(MAX_OUTPUTS)),
    "directions", "hidden", "lengths", "busy", "mode", *(f"known {name}" for name in CALL.names[:_NUM_SHAPE_WORDS]),
    *(f"input_symbol{number}" for number in range(MAX_INPUTS)),
    *(f"output_symbol{number}" for number in range(MAX_OUTPUTS)),
    "min_steps", "max_steps", "steps_at", "scratch", "relocs", "num_fields", "args", "job",
)  # fmt: skip
"""An operator: ONNX Runtime's struct, the layer, and from ``busy`` on the *slot*: the data to repeat the last call.

``interrupted`` is the address of the text of an error. ``lengths`` is the offset, within a call, of the address of the
lengths; 0 if there are none. Only one call at a time has the slot; ``busy`` is set meanwhile. The slot is for calls
whose sequences all have T steps, with T from ``min_steps`` to ``max_steps``; the kernel writes T to ``steps_at``.
``mode`` is one of :data:`MODES`. ``scratch`` begins with the values of the symbols of kernel arguments;
``input_symbol`` and ``output_symbol`` are the numbers of symbols. ``args`` is the address where the arguments are
bound, ``job`` the function that runs on them.
"""
FAILED, IN_MACHINE_CODE, IN_PYTHON = MODES = range(3)
"""How a call continues: with an error, by the slot, or in Python."""
CHECK, RUN = range(2)
"""What Python does when the kernel calls it: check and prepare, or run."""

_CONSTANT_RESULTS = {
    "GetExecutionProviderType": 0, "GetInputCharacteristic": 0, "GetOutputCharacteristic": 0, "GetInputMemoryType": 0,
}  # fmt: skip
"""The operator runs on the CPU; its inputs and outputs are required; its inputs are in the CPU's memory."""


@load_once()
def load_operator_functions() -> dict[str, int]:
    """The addresses of the functions of an operator, by the names of their fields. They live as long as the process."""
    code = load("onnxruntime_operator", current_target(), build_operator_functions)
    _immortal.append(code)
    names = {*_CONSTANT_RESULTS, *_GETTERS, "GetInputType", "KernelDestroy", "CreateKernelV2", "KernelComputeV2"}
    return {name: code.address(name) for name in names}


_immortal: list[LoadedObject] = []
# Each of these functions returns a field of the operator.
_GETTERS = {
    "GetName": "name", "GetInputTypeCount": "num_inputs", "GetOutputTypeCount": "num_outputs",
    "GetOutputType": "input_type0",
}  # fmt: skip


def build_operator_functions() -> Module:
    """The module of all functions of an operator."""
    module = Module("onnxruntime_operator")
    for name, value in _CONSTANT_RESULTS.items():
        f = Function(module, name, ["operator", "index"], exported=True, returns=True)
        f.ret(f.constant(value))
    for name, field in _GETTERS.items():
        f = Function(module, name, ["operator", "index"], exported=True, returns=True)
        f.ret(f.load(f.arguments[0] + OPERATOR.offset(field)))
    f = Function(module, "GetInputType", ["operator", "index"], exported=True, returns=True)
    operator, index = f.arguments
    f.ret(f.load(operator + OPERATOR.offset("input_type0") + index * 8))
    f = Function(module, "KernelDestroy", ["kernel"], exported=True)
    f.ret()
    f = Function(module, "CreateKernelV2", ["operator", "api", "info", "kernel"], exported=True, returns=True)
    f.store(f.arguments[0], f.arguments[3])  # the operator is its own kernel
    f.ret(f.constant(0))
    _emit_compute(module)
    return module


class _ApiCalls:
    """Calls of ONNX Runtime's functions; after an error, no further call is made."""

    def __init__(self, f: Function, api: Value) -> None:
        self._function, self._api, self.status = f, api, f.var(0)

    def __call__(self, name: str, *arguments: Value) -> None:
        f = self._function
        with f.if_(self.status.get().is_zero):
            address = f.load(self._api + function_offset(name))
            self.status.set(f.call_address(address, *arguments, returns=I64))

    def release_shape(self, info: Value) -> None:
        """Free a shape; this function returns nothing."""
        f = self._function
        with f.if_(self.status.get().is_zero):
            f.call_address(f.load(self._api + function_offset("ReleaseTensorTypeAndShapeInfo")), info)


def _emit_compute(module: Module) -> None:
    """``KernelComputeV2(operator, context)``: the address of an error, or 0."""
    bind = emit_bind(module)
    f = Function(module, "KernelComputeV2", ["operator", "context"], exported=True, returns=True)
    operator, context = f.arguments
    o, call = OPERATOR.read(f, operator), f.alloca(CALL.size)
    f.fill_zero(call, f.constant(CALL.size))
    api = _ApiCalls(f, o.api)
    _read_inputs(f, api, context, o.num_inputs, call)
    busy = operator + OPERATOR.offset("busy")
    has_slot = try_lock(f, busy)
    f.store(has_slot.zext(I64), call + CALL.offset("has_slot"))
    mode = f.var(FAILED)
    with f.if_(has_slot & _same_shapes(f, operator, call)):
        mode.set(o.mode)

    def call_python(purpose: int) -> Value:
        f.store(FAILED, call + CALL.offset("result"))
        f.call_address(o.on_call, o.layer, call, f.constant(purpose))
        api.status.set(f.load(call + CALL.offset("status")))
        result = f.load(call + CALL.offset("result"))
        with f.if_(result.equals(FAILED)):  # without a status, if a signal handler has raised before the first line
            api("CreateStatus", f.constant(FAIL), o.interrupted)
        return result

    with f.if_(api.status.get().is_zero & mode.get().equals(FAILED)):
        mode.set(call_python(CHECK))
    with f.if_(mode.get().equals(IN_MACHINE_CODE) & o.lengths.is_set):
        _unless_full_length(f, f.load(call + o.lengths), call, mode)
    _allocate_outputs(f, api, context, operator, call)
    with f.if_(api.status.get().is_zero):
        with f.if_(mode.get().equals(IN_MACHINE_CODE)):
            _run_slot(f, operator, o, call, bind)
        with f.if_(mode.get().equals(IN_PYTHON)):
            call_python(RUN)
    with f.if_(has_slot):
        unlock(f, busy)
    f.ret(api.status.get())


def _read_inputs(f: Function, api: _ApiCalls, context: Value, count: Value, call: Value) -> None:
    """Write the shapes and addresses of the inputs into the call."""
    slot = f.alloca(8)
    with f.loop(0, count) as number:
        shape = call + number * (8 * _SHAPE_WORDS)
        api("KernelContext_GetInput", context, number, slot)
        value = f.load(slot)
        api("GetTensorMutableData", value, call + CALL.offset("input0") + number * 8)
        api("GetTensorTypeAndShape", value, slot)
        info = f.load(slot)
        api("GetDimensionsCount", info, shape)
        api("GetDimensions", info, shape + 8, f.load(shape).at_most(MAX_AXES))
        api.release_shape(info)


def _same_shapes(f: Function, operator: Value, call: Value) -> Value:
    """Whether the slot is for calls of such shapes."""
    o, steps = OPERATOR.read(f, operator), f.load(call + _STEPS)
    same = f.var(((steps >= o.min_steps) & (steps <= o.max_steps)).select(f.constant(1), 0))
    known = operator + OPERATOR.offset("known ndim of 0")
    with f.loop(0, _NUM_SHAPE_WORDS) as word:
        is_same = (word * 8).equals(_STEPS) | f.load(known + word * 8).equals(f.load(call + word * 8))
        same.set(is_same.select(same.get(), 0))
    return same.get().is_set


def _unless_full_length(f: Function, lengths: Value, call: Value, mode: Variable) -> None:
    """Set the mode to Python if a sequence is shorter than T."""
    steps, batch = f.load(call + _STEPS), f.load(call + _BATCH)
    with f.loop(0, batch) as number:
        length = f.load(lengths + number * 4, I32, 4).sext(I64)
        mode.set(length.equals(steps).select(mode.get(), IN_PYTHON))


def _allocate_outputs(f: Function, api: _ApiCalls, context: Value, operator: Value, call: Value) -> None:
    """Let ONNX Runtime allocate the outputs: Y (T, D, N, H), states (D, N, H)."""
    o = OPERATOR.read(f, operator)
    slot, shape = f.alloca(8), f.alloca(8 * 4)
    steps, batch = f.load(call + _STEPS), f.load(call + _BATCH)
    for axis, size in enumerate((steps, o.directions, batch, o.hidden)):
        f.store(size, shape + 8 * axis)
    with f.loop(0, o.num_outputs) as number:
        is_state = f.load(operator + OPERATOR.offset("is_state0") + number * 8)
        api("KernelContext_GetOutput", context, number, shape + is_state * 8, f.constant(4) - is_state, slot)
        api("GetTensorMutableData", f.load(slot), call + CALL.offset("output0") + number * 8)


def _run_slot(f: Function, operator: Value, o: Fields, call: Value, bind: Function) -> None:
    """Run the job of the slot on the arrays of this call."""
    for kind, most in (("input", MAX_INPUTS), ("output", MAX_OUTPUTS)):
        for number in range(most):
            symbol = f.load(operator + OPERATOR.offset(f"{kind}_symbol{number}"))
            f.store(f.load(call + CALL.offset(f"{kind}{number}")), o.scratch + symbol * 8)
    f.store(f.load(call + _STEPS), o.steps_at)
    f.call(bind, o.relocs, o.num_fields, o.scratch, o.args)
    f.call_address(o.job, o.args, f.constant(0))


OnCall = Callable[[int, int, int], None]
"""The function that the kernel calls in Python.

Its arguments are a layer's number, the address of a :data:`CALL`, and :data:`CHECK` or :data:`RUN`. Its last action is
to write one of :data:`MODES` as the call's ``result``; after :data:`RUN` all but :data:`FAILED` are alike. It does not
return it, since Python runs signal handlers before the function's first line, and what ctypes returns after an
exception there is undefined.
"""
