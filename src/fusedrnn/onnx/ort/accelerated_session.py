"""Runs a whole model in ONNX Runtime, with recurrent nodes on the fused operator where that is faster."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import isinf
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from fusedrnn.extras import needed_by
from fusedrnn.onnx.graph import first_line
from fusedrnn.onnx.ort import interrupts
from fusedrnn.onnx.ort.choosing import choose
from fusedrnn.onnx.ort.feeds import Feeds, check_feeds, checked_feeds
from fusedrnn.onnx.ort.report import Report
from fusedrnn.onnx.ort.sessions import Sessions
from fusedrnn.runtime.thread_pool import get_num_threads
from fusedrnn.scalars import check_choice, positive_int, positive_number

_POLICIES = ("auto", "always")


class AcceleratedSession:
    """A model that is ready to run, with the interface of ``onnxruntime.InferenceSession``.

    :func:`accelerate` makes it. Any number of threads may call :meth:`run` at once.

    Attributes:
        report: Which recurrent nodes were replaced, which were not, and why.
        session: The ``onnxruntime.InferenceSession``, for whatever this class lacks.
    """

    def __init__(self, session: Any, report: Report) -> None:
        self.session, self.report = session, report

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[Any]:
        """Compute outputs of the model.

        Args:
            output_names: Their names; None for all.
            input_feed: The inputs by name, as ONNX Runtime takes them.
            run_options: ``onnxruntime.RunOptions``.

        Returns:
            The outputs, in the order of ``output_names``, as ONNX Runtime returns them.

        Raises:
            TypeError: If an input has the wrong dtype; the message names the input, its dtype and what was expected.
            ValueError: If a name is missing or unknown, or a shape is wrong; the message names it.
        """
        interrupts.keep(None)
        try:
            outputs: list[Any] = self.session.run(output_names, input_feed, run_options)
            return outputs
        except Exception as error:
            interrupts.raise_interrupt(error)
            self._check(output_names, input_feed)  # raises an error that says more than ONNX Runtime's
            raise

    def _check(self, output_names: Sequence[str] | None, input_feed: object) -> None:
        check_feeds(input_feed, self.get_inputs(), self.get_overridable_initializers())
        names = [entry.name for entry in self.get_outputs()]
        for name in output_names or ():
            if name not in names:
                raise ValueError(f"output_names must be of {', '.join(map(repr, names))}; got {name!r}")

    def get_inputs(self) -> list[Any]:
        """The inputs, each with ``name``, ``type`` and ``shape``."""
        inputs: list[Any] = self.session.get_inputs()
        return inputs

    def get_outputs(self) -> list[Any]:
        """The outputs, each with ``name``, ``type`` and ``shape``."""
        outputs: list[Any] = self.session.get_outputs()
        return outputs

    def get_overridable_initializers(self) -> list[Any]:
        """The initializers that a call may replace, each with ``name``, ``type`` and ``shape``."""
        initializers: list[Any] = self.session.get_overridable_initializers()
        return initializers

    def get_modelmeta(self) -> Any:
        """The model's metadata."""
        return self.session.get_modelmeta()

    def get_providers(self) -> list[str]:
        """The execution providers of ONNX Runtime."""
        providers: list[str] = self.session.get_providers()
        return providers


def accelerate(
    model: ModelProto | bytes | str | os.PathLike[str],
    *,
    feeds: Feeds | Sequence[Feeds] | None = None,
    replace: str = "auto",
    num_threads: int | None = None,
    sess_options: Any = None,
    providers: Sequence[Any] | None = None,
    provider_options: Sequence[Any] | None = None,
    calibration_seconds: float = 1.0,
) -> AcceleratedSession:
    """Make a session of ONNX Runtime that runs recurrent nodes on the fused operator.

    LSTM, GRU, RNN and com.microsoft.DynamicQuantizeLSTM nodes whose weights are constants become custom operators of
    ONNX Runtime, in the model's graph and in the bodies of If, Loop and Scan. All other nodes stay unchanged. The model
    is measured first: if replaced nodes do not make it faster, ONNX Runtime runs the whole model.

    Args:
        model: The model, its bytes, or its file.
        feeds: Inputs to measure with, by name, similar to those of later calls; a list of several if sizes vary. None
            for inputs that are made from the model's shapes: normal numbers, ones for integers. There an unknown batch
            size is 1, and other unknown sizes are 100, or 512 or 4096 if the model needs that.
        replace: ``"auto"`` to replace nodes where that is faster, ``"always"`` to replace all possible nodes without
            measuring.
        num_threads: The most threads of a call, in ONNX Runtime and in the fused operator. None for the number in
            ``sess_options``, or else for the defaults of both.
        sess_options: ``onnxruntime.SessionOptions``; the operators are added to them.
        providers: The execution providers; None for the CPU.
        provider_options: The options of the providers.
        calibration_seconds: How long to measure, approximately. A few calls are made in any case, for large models at
            least two of each kind; they take at most four times as long.

    Returns:
        The session. Its ``report`` says what was replaced.

    Raises:
        ImportError: If ONNX Runtime is not installed.
        FileNotFoundError: If there is no such file.
        TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
        ValueError: If an argument has the wrong shape or value, the file holds no model, or ONNX Runtime refuses it.
        NotImplementedError: With ``replace="always"``, if this system cannot load custom operators.

    Example:
    >>> import numpy as np
    >>> from onnx.parser import parse_model
    >>> model = parse_model('''<ir_version: 8, opset_import: ["": 14]> g (float[T, N, 1] X) => (float[T, 1, N, 1] Y)
    ...     <float[1, 1, 1] W = {2}, float[1, 1, 1] R = {3}> { Y = RNN <hidden_size = 1> (X, W, R) }''')
    >>> session = accelerate(model, replace="always")
    >>> session.run(None, {"X": np.zeros((5, 1, 1), np.float32)})[0].shape
    (5, 1, 1, 1)
    >>> session.report.num_replaced
    1
    """
    onnxruntime = _import_onnxruntime()
    policy = check_choice("replace", replace, _POLICIES)
    seconds = positive_number("calibration_seconds", calibration_seconds)
    if isinf(seconds):
        raise ValueError("calibration_seconds must be finite; got inf")
    proto = _load(model)
    if sess_options is not None and not isinstance(sess_options, onnxruntime.SessionOptions):
        raise TypeError(f"sess_options must be onnxruntime.SessionOptions; got {type(sess_options).__name__}")
    before = 0 if sess_options is None else sess_options.intra_op_num_threads
    intra_op_threads = before if num_threads is None else positive_int("num_threads", num_threads)
    threads = intra_op_threads or get_num_threads()
    arguments = {"providers": list(providers or ["CPUExecutionProvider"]), "provider_options": provider_options}
    try:
        if sess_options is not None:
            sess_options.intra_op_num_threads = intra_op_threads
        sessions = Sessions(onnxruntime, proto, sess_options, intra_op_threads, arguments, threads)
        plain = sessions.plain()
        inputs, optional = plain.get_inputs(), plain.get_overridable_initializers()
        samples = None if feeds is None else checked_feeds(feeds, inputs, optional)
        chosen = choose(onnxruntime, sessions, plain, policy, samples, threads, seconds)
        return AcceleratedSession(*chosen)
    finally:
        if sess_options is not None:
            sess_options.intra_op_num_threads = before


def _import_onnxruntime() -> Any:
    with needed_by("fusedrnn.onnx.accelerate", "onnxruntime"):
        import onnxruntime
    return onnxruntime


def _load(model: object) -> ModelProto:
    """The model, with its weights in the same object."""
    try:
        if isinstance(model, ModelProto):
            proto = model
        elif isinstance(model, bytes):
            proto = onnx.load_from_string(model)
        elif isinstance(model, (str, os.PathLike)):
            proto = onnx.load(Path(model))
        else:
            raise TypeError(f"model must be an onnx.ModelProto, its bytes or a path; got {type(model).__name__}")
    except (OSError, TypeError):
        raise
    except Exception as error:  # of many types
        reason = f"which onnx cannot load: {first_line(error) or type(error).__name__}"
        raise ValueError(f"model must be an ONNX model; got {_described(model)}, {reason}") from error
    if not proto.opset_import or not proto.HasField("graph"):
        raise ValueError(f"model must be an ONNX model; got {_described(model)}, which has no graph or no opset")
    return proto


def _described(model: object) -> str:
    return repr(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else type(model).__name__
