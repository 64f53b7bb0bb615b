"""Sessions of ONNX Runtime for one model, in which any of its recurrent nodes are replaced."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onnx import ModelProto

from fusedrnn.onnx.ort.layer_runner import LayerRunner
from fusedrnn.onnx.ort.op_library import OpLibrary
from fusedrnn.onnx.ort.rewriting import RewritableModel

_LARGEST = (1 << 31) - 1
"""Bytes of the largest message of protobuf."""
_NODE = "fusedrnn_node_"
# ONNX Runtime may add a prefix or a suffix to the name of a node that it moves out of a body.
_EVENT = re.compile(rf".*{_NODE}(\d+)\D.*kernel_time$")


class Sessions:
    """Makes sessions of one model.

    Args:
        onnxruntime: The module ``onnxruntime``.
        model: The model.
        options: ``onnxruntime.SessionOptions`` of the caller; None if there are none.
        intra_op_threads: The number of threads for options that this class makes.
        arguments: Further arguments of ``onnxruntime.InferenceSession``.
        num_threads: The most threads of a replaced node.

    Attributes:
        nodes: The recurrent nodes of the model.
        replaceable: The numbers of the nodes that can be replaced.
    """

    def __init__(
        self, onnxruntime: Any, model: ModelProto, options: Any, intra_op_threads: int, arguments: Mapping[str, Any],
        num_threads: int,
    ) -> None:  # fmt: skip
        self._onnxruntime, self._arguments, self._model = onnxruntime, arguments, model
        self._options, self._plain_options = options, options
        if options is None:
            # A session keeps its options, so those of a session without replaced nodes must not refer to operators.
            self._options, self._plain_options = (onnxruntime.SessionOptions() for _ in range(2))
            for own in (self._options, self._plain_options):
                own.intra_op_num_threads = intra_op_threads
        self._rewritable = RewritableModel(model)
        self.nodes = self._rewritable.nodes
        self.replaceable = [number for number, node in enumerate(self.nodes) if node.layer is not None]
        self._num_threads = num_threads
        self._runners: dict[int, LayerRunner] = {}
        self._library: OpLibrary | None = None

    def plain(self) -> Any:
        """A session in which no node is replaced.

        Raises:
            ValueError: If ONNX Runtime refuses the model.
        """
        try:
            return self._session(self._model, self._plain_options)
        except Exception as error:  # of many types
            raise ValueError(f"model must be one that ONNX Runtime runs: {error}") from error

    def replaced(self, numbers: Sequence[int]) -> Any:
        """A session in which the nodes with these numbers, from :attr:`replaceable`, are replaced.

        Raises:
            RuntimeError: If ONNX Runtime does not take the operators.
        """
        return self._replaced(numbers, ())

    def _replaced(self, numbers: Sequence[int], names: Sequence[str]) -> Any:
        library = self._load_library()
        operators = [library.names[self.replaceable.index(number)] for number in numbers]
        model = self._rewritable.replace(numbers, library.domain, operators, names)
        # No other process could load a file with the operators. That of the plain session stays.
        with _set(self._options, optimized_model_filepath=""):
            session = self._session(model, self._options)
        session.fusedrnn_library = library  # lives as long as the session
        return session

    def set_num_threads(self, threads: Mapping[int, int]) -> None:
        """Set the most threads of replaced nodes, by their numbers."""
        library = self._load_library()
        for number, count in threads.items():
            self._runners[number].set_num_threads(count)
        library.forget_calls()

    def _load_library(self) -> OpLibrary:
        """The operators of all nodes that can be replaced, registered for sessions with the options."""
        if self._library is None:
            for number in self.replaceable:
                node = self.nodes[number]
                assert node.layer is not None
                self._runners[number] = LayerRunner(node.layer, node.inputs, node.outputs, self._num_threads)
            names = [f"{self.nodes[number].operator.rpartition('.')[2]}_{number}" for number in self.replaceable]
            library = OpLibrary([*self._runners.values()], names)
            library.register(self._options)
            self._library = library
        return self._library

    def _session(self, model: ModelProto, options: Any) -> Any:
        if model.ByteSize() > _LARGEST:
            raise ValueError("model must have at most 2 GiB with its weights")
        content = model.SerializeToString()
        return self._onnxruntime.InferenceSession(content, options, **self._arguments)

    # ---- profiles

    def profiled(self, numbers: Sequence[int], folder: Path) -> Any:
        """A session like :meth:`replaced` that writes a profile into the folder, for :meth:`node_times`."""
        names = [f"{_NODE}{number}" for number in range(len(self.nodes))]
        with _set(self._options, enable_profiling=True, profile_file_prefix=str(folder / "profile")):
            return self._replaced(numbers, names)


@contextmanager
def _set(options: Any, **values: Any) -> Iterator[None]:
    """Set session options while the ``with`` block runs."""
    before = {name: getattr(options, name) for name in values}
    try:
        for name, value in values.items():
            setattr(options, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(options, name, value)


def node_times(session: Any) -> list[dict[int, float]]:
    """The seconds of each recurrent node, by number, in each run of a profiled session. This ends its profile."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")
    starts = [start for start, _ in runs]
    times: list[dict[int, float]] = [{} for _ in runs]
    for event in events:
        match = _EVENT.match(event["name"])
        run = bisect_right(starts, event["ts"]) - 1
        if match is not None and run >= 0:
            number = int(match[1])
            times[run][number] = times[run].get(number, 0.0) + event["dur"] * 1e-6
    return times
