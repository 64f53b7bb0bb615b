"""Custom operators of ONNX Runtime for recurrent layers: one operator for each layer, whose weights it holds."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.jit.loader import load_once
from fusedrnn.onnx.ort import interrupts
from fusedrnn.onnx.ort.c_api import API_VERSION, FLOAT, INT32, Api
from fusedrnn.onnx.ort.layer_runner import LayerRunner
from fusedrnn.onnx.ort.op_kernel import CALL, CHECK, FAILED, IN_PYTHON, OPERATOR, load_operator_functions
from fusedrnn.onnx.ort.shared_object import load_shared_object

_numbers = count(1)
_immortal: list[object] = []
_ENTRY_NAME = "RegisterCustomOps"
_c_interrupted = ctypes.create_string_buffer(interrupts.SIGNALLED.encode())
_Register = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_OnCall = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


# In each thread: the action of the function that ONNX Runtime calls, and the error of that action.
_registration = threading.local()


def _register(options: int, api_base: int) -> int:
    try:
        _registration.register(options, Api(api_base))
    except BaseException as error:  # an exception must not pass through C
        _registration.error = error
    return 0


_entry = _Register(_register)


@load_once()
def _entry_path() -> str:
    """The path of the shared object in which ONNX Runtime finds :func:`_register`."""
    return load_shared_object(_ENTRY_NAME, ctypes.cast(_entry, ctypes.c_void_p).value or 0)


class OpLibrary:
    """The operators of a session's layers. The session calls this object's layers.

    Args:
        runners: The runner of each layer.
        names: The name of each operator.

    Attributes:
        domain: The name of the operators' domain, unique to this library.
        names: The name of each operator.
    """

    def __init__(self, runners: Sequence[LayerRunner], names: Sequence[str]) -> None:
        self.domain, self.names = f"fusedrnn.{next(_numbers)}", tuple(names)
        self._c_names = [name.encode() for name in names]
        self._calls = _Calls(runners)
        self._on_call = _OnCall(self._calls)
        for number, runner in enumerate(runners):
            self._calls.operators.append(self._operator(number, runner))
        self._has_domain = False

    def forget_calls(self) -> None:
        """Empty the slots of all operators. No call may run meanwhile."""
        for operator in self._calls.operators:
            operator[OPERATOR.index["known ndim of 0"]] = 0

    def register(self, options: Any) -> None:
        """Add the operators to ``onnxruntime.SessionOptions``, for sessions with these options. Call this only once.

        Raises:
            RuntimeError: If ONNX Runtime does not take the operators.
        """
        # A caller's options, or what a session has given out, such as its inputs, may refer to the structs of operators
        # after the session. So these are never freed. The layers are: no session calls the operators then.
        _immortal.append((self._calls.operators, self._c_names))
        _registration.register = self._add_to
        try:
            options.register_custom_ops_library(_entry_path())
        finally:
            error = vars(_registration).pop("error", None)
            vars(_registration).clear()
        if error is not None:
            raise error
        if not self._has_domain:
            raise RuntimeError(f"ONNX Runtime has no operators: {interrupts.SIGNALLED}")

    def _add_to(self, options: int, api: Api) -> None:
        self._calls.api = api
        domain = api.new_domain(self.domain.encode())
        for operator in self._calls.operators:
            operator[OPERATOR.index["api"]] = api.address
            api.add_operator(domain, operator.ctypes.data)
        api.add_domain(options, domain)
        self._has_domain = True

    def _operator(self, number: int, runner: LayerRunner) -> Array:
        """The struct of an operator."""
        types = [INT32 if name == "sequence_lens" else FLOAT for name in runner.inputs]
        fields = {
            **load_operator_functions(), "version": API_VERSION, "layer": number,
            "name": ctypes.cast(ctypes.c_char_p(self._c_names[number]), ctypes.c_void_p).value or 0,
            "interrupted": ctypes.addressof(_c_interrupted),
            "on_call": ctypes.cast(self._on_call, ctypes.c_void_p).value or 0,
            "num_inputs": len(types), "num_outputs": len(runner.outputs),
            **{f"input_type{index}": kind for index, kind in enumerate(types)},
            **{f"is_state{index}": int(name != "Y") for index, name in enumerate(runner.outputs)},
            "directions": runner.directions, "hidden": runner.hidden_size,
            "lengths": CALL.offset(f"input{types.index(INT32)}") if INT32 in types else 0,
        }  # fmt: skip
        operator = np.zeros(len(OPERATOR), np.int64)
        for name, value in fields.items():
            operator[OPERATOR.index[name]] = value
        return operator


class _Calls:
    """The function for :data:`fusedrnn.onnx.ort.op_kernel.OnCall`. It does not refer to the library."""

    def __init__(self, runners: Sequence[LayerRunner]) -> None:
        self._runners, self.operators = runners, list[Array]()
        self.api: Api | None = None

    def __call__(self, number: int, call: int, purpose: int) -> None:
        mode = FAILED
        try:
            if purpose == CHECK:
                mode = self._runners[number].check(call, self.operators[number])
            else:
                self._runners[number].run(call)
                mode = IN_PYTHON
        except BaseException as error:  # an exception must not pass through C
            interrupts.keep(error)
            assert self.api is not None
            status = self.api.new_status(f"{type(error).__name__}: {error}")
            ctypes.c_int64.from_address(call + CALL.offset("status")).value = status
        ctypes.c_int64.from_address(call + CALL.offset("result")).value = mode
