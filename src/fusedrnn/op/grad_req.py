"""What a backward call goes with: the reserve of its forward call, and which gradients are wanted and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fusedrnn.engines.grad_buffers import Gradients, clear_padding
from fusedrnn.engines.operand_table import BACKWARD, REQUESTS, Request, is_sequence, misplaced
from fusedrnn.engines.registry import Engine, Keep, Kept
from fusedrnn.op import validation as arguments
from fusedrnn.spec import RNNSpec

Array = NDArray[Any]
Requests = dict[str, Request]
# What has gradients, by its name in a request, and what its gradient is called.
GRADIENTS = {"x": "dx", "params": "dparams", "states": "dstates"}


@dataclass(frozen=True, eq=False, repr=False)
class Reserve:
    """What one forward call in training kept for its backward: get it from :meth:`RNNOp.forward`, hand it back.

    It belongs to that call alone: nothing that happens later to the call's arrays or the op changes it, backward does
    not either, and any number of backward calls may use it, also at once. Its memory goes when it goes.

    Attributes:
        steps: T.
        batch: N.
        keep: ``"gates"`` or ``"states"``, as ``reserve`` asked for.
        seed: What says which elements dropout drops.
        spec: What ran.
        backend: The name of the engine that ran it.
    """

    steps: int
    batch: int
    keep: Keep
    seed: int
    spec: RNNSpec
    backend: str
    _engine: Engine
    _kept: Kept
    _lengths: Array | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        return self._kept.nbytes

    def __repr__(self) -> str:
        return (
            f"Reserve(steps={self.steps}, batch={self.batch}, keep={self.keep!r}, seed={self.seed}, "
            f"nbytes={self.nbytes}, backend={self.backend!r})"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Reserve cannot be pickled or copied: it holds the memory of one forward call")

    def backward(self, dy: Array | None, dstates: Sequence[Array | None], gradients: Gradients) -> None:
        """Have the engine that ran forward write or add the gradients, on arguments that have been checked."""
        dx = gradients.x
        if dx is not None and not gradients.add_x:
            clear_padding(dx, self._lengths)
        if any(wanted is not None for wanted in (dx, gradients.params, gradients.states)):
            self._engine.backward(self._kept, dy, dstates, gradients)


def reserve_of(value: object, spec: RNNSpec, backends: Sequence[str]) -> Reserve:
    """``value`` if it is the reserve of an op of that spec that ran on one of these engines."""
    if value is None:
        raise TypeError("reserve must be what forward returned with training=True; got None")
    if not isinstance(value, Reserve):
        raise TypeError(f"reserve must be the Reserve that forward returned; got {type(value).__name__}")
    if value.spec != spec:
        raise ValueError(f"reserve must come from an op of {spec}; got one of {value.spec}")
    if value.backend not in backends:
        raise ValueError(f"reserve must come from backend {' or '.join(backends)}; got one from {value.backend}")
    return value


def parse(grad_req: object) -> Requests:
    """One request for each of x, params and states."""
    if isinstance(grad_req, str):
        return dict.fromkeys(GRADIENTS, _request("grad_req", grad_req))
    if not isinstance(grad_req, Mapping):
        raise TypeError(
            f"grad_req must be one of {', '.join(REQUESTS)}, or a mapping from {', '.join(GRADIENTS)} to these; "
            f"got {type(grad_req).__name__}"
        )
    if unknown := [key for key in grad_req if key not in GRADIENTS]:
        raise ValueError(f"grad_req must have keys among {', '.join(GRADIENTS)}; got {unknown[0]!r}")
    return {name: _request(f"grad_req: {name}", grad_req.get(name, "write")) for name in GRADIENTS}


def _request(name: str, value: object) -> Request:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(REQUESTS)}; got {type(value).__name__}")
    if value not in REQUESTS:
        raise ValueError(f"{name} must be one of {', '.join(REQUESTS)}; got {value!r}")
    return value


def gradients(
    requests: Requests,
    out: object,
    spec: RNNSpec,
    steps: int,
    batch: int,
    given: Mapping[str, Sequence[Array]],
) -> Gradients:
    """Where the gradients go: the buffers in ``out``, or new arrays for those to be written that have none.

    Args:
        requests: What :func:`parse` returned.
        out: None, or a triple of a buffer or None for each gradient.
        spec: What ran.
        steps: T.
        batch: N.
        given: Arrays, by name, whose memory no buffer may share.

    Raises:
        TypeError: Naming the buffer, what was given and what was expected.
        ValueError: Likewise.
    """
    buffers = _buffers(requests, out)
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "x": ((steps, batch, spec.input_size),),
        "params": ((spec.layout.size,),),
        "states": spec.state_shape(batch),
    }
    names = {"x": ["dx"], "params": ["dparams"], "states": [f"d{name}0" for name in spec.state_names]}
    wanted = [name for name, request in requests.items() if request != "null"]
    into: dict[str, tuple[Array, ...]] = {}
    taken = dict(given)
    for name in wanted:
        value = buffers[name]
        if value is not None:
            into[name] = _checked(value if name == "states" else (value,), names[name], shapes[name], spec, taken)
    # Only now that all is known to be right is memory touched.
    for name in wanted:
        if name not in into:
            into[name] = tuple(np.empty(shape, spec.dtype) for shape in shapes[name])
    x, params = (into[name][0] if name in into else None for name in ("x", "params"))
    adding = (requests[name] == "add" for name in GRADIENTS)
    return Gradients(x, params, into.get("states"), *adding)


def _buffers(requests: Requests, out: object) -> dict[str, object]:
    """The buffer of each gradient, or None, in accordance with what is wanted."""
    if out is None:
        out = (None,) * len(GRADIENTS)
    wanted = f"None or a tuple of {len(GRADIENTS)}: {', '.join(GRADIENTS.values())}"
    if not is_sequence(out):
        raise TypeError(f"out must be {wanted}; got {type(out).__name__}")
    buffers: tuple[object, ...] = tuple(out)
    if len(buffers) != len(GRADIENTS):
        raise ValueError(f"out must be {wanted}; got {len(buffers)}")
    number = misplaced([requests[name] for name in GRADIENTS], buffers)
    if number is not None:
        gradient, buffer = tuple(GRADIENTS.values())[number], buffers[number]
        if buffer is None:
            raise ValueError(f"out: {gradient} must be given where grad_req is 'add'; got None")
        raise ValueError(f"out: {gradient} must be None where grad_req is 'null'; got {type(buffer).__name__}")
    return dict(zip(GRADIENTS, buffers, strict=True))


def _checked(
    buffers: object,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    spec: RNNSpec,
    taken: dict[str, Sequence[Array]],
) -> tuple[Array, ...]:
    """The buffers of one gradient, if they can be written; adds them to the memory that is taken."""
    found = []
    values = arguments.one_each("out: dstates", buffers, names, shapes)
    for name, shape, value in zip(names, shapes, values, strict=True):
        checked = arguments.buffer(f"out: {name}", value, spec, shape)
        if BACKWARD[name].contiguous and not checked.flags.c_contiguous:
            raise ValueError(f"out: {name} must be contiguous; got strides {checked.strides}")
        arguments.apart(f"out: {name}", checked, taken)
        taken[f"out: {name}"] = (checked,)
        found.append(checked)
    return tuple(found)
