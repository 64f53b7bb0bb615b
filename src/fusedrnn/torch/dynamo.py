"""torch.compile traces our layers, although it breaks the graph at every RNN, GRU and LSTM.

Dynamo breaks the graph at any instance of ``torch.nn.RNN``, ``GRU`` and ``LSTM``, including ours, because tracing
unrolls torch's own layers step by step. ``torch._dynamo.config.allow_rnn`` disables this, but for torch's own layers
too, so we set it only while Dynamo wraps one of our layers. Importing Dynamo takes longer than importing torch, so this
module does not import it; it waits until something else does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedrnn.torch import autocast, plan
from fusedrnn.torch.eligibility import MODULE_DTYPES
from fusedrnn.torch.imports import after_import

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)


def trace(*classes: type[torch.nn.Module]) -> None:
    """Let torch.compile trace instances of these classes and their subclasses.

    If Dynamo of this version of torch works differently, the graph breaks at our layers as at torch's own.
    """
    after_import("torch._dynamo", lambda dynamo: _patch(dynamo, classes))


def breaks_graph() -> bool:
    """Whether PyTorch's own operations would be unrolled in a graph, so that :func:`eager_forward` must run them."""
    return torch.compiler.is_dynamo_compiling() and not _is_exporting()


def eager_forward(layer: Any, *args: Any) -> Any:
    """The forward of one of our layers by PyTorch's own operations. Dynamo does not trace it, once it is imported."""
    return layer.composed_forward(*args)


def _patch(dynamo: Any, classes: tuple[type[torch.nn.Module], ...]) -> None:
    global eager_forward
    from torch._dynamo import config
    from torch._dynamo.variables.builder import VariableBuilder

    eager_forward = dynamo.disable(eager_forward)
    dynamo.assume_constant_result(plan.layer_plan)
    dynamo.assume_constant_result(plan.user_layer_plan)
    dynamo.assume_constant_result(plan.cell_plan)
    dynamo.assume_constant_result(autocast.has_onednn)
    dynamo.assume_constant_result(autocast.has_half_precision_instructions)
    wrapped = getattr(VariableBuilder, "wrap_module", None)
    if wrapped is None or not hasattr(config, "allow_rnn"):
        return

    def wrap_module(self: Any, value: torch.nn.Module) -> Any:
        if not isinstance(value, classes) or any(
            parameter.device.type != "cpu" or parameter.dtype not in MODULE_DTYPES for parameter in value.parameters()
        ):
            return wrapped(self, value)  # runs torch's forward, which must not be unrolled
        with config.patch(allow_rnn=True):
            return wrapped(self, value)

    VariableBuilder.wrap_module = wrap_module  # type: ignore[method-assign]
