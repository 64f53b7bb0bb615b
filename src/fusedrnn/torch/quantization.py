"""``quantize``: a model whose recurrent layers run in an integer format."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch.nn import Module

from fusedrnn.conversion_report import Report
from fusedrnn.torch.class_map import OURS
from fusedrnn.torch.conversion import convert_all
from fusedrnn.torch.formats import HasCompute, checked_compute, freeze, is_inference_only


class Quantized(NamedTuple):
    """The result of :func:`quantize`.

    Attributes:
        model: The model, in evaluation mode.
        report: Which recurrent layers now run in the format (``replaced``), and which do not, with the reason
            (``unchanged``).
    """

    model: Module
    report: Report


def quantize(model: Module, compute: str = "int8", *, inplace: bool = False, subclasses: bool = False) -> Quantized:
    """Let the recurrent layers and cells of a model run in int8. It replaces PyTorch's ``quantize_dynamic``.

    Weights are quantized for each row, activations for each row and step while the model runs. Layers of torch.nn
    become ours. Their parameters stay in float32 under the same names, so ``state_dict`` does not change, but they
    require no gradient until :func:`restore`. The model is put into evaluation mode. ``train()`` is allowed, as for
    PyTorch's quantized modules, and changes nothing for these layers.

    A call of such a layer raises an error if its input requires a gradient, which is so after trainable layers outside
    of ``torch.no_grad()``. It also raises an error in training mode if the layer has dropout between its layers.

    Args:
        model: Any module; it may be a recurrent layer itself.
        compute: A format for inference only, as in :class:`fusedrnn.RNNSpec`.
        inplace: Whether to change the model itself instead of a copy.
        subclasses: As in :func:`accelerate`.

    Returns:
        The model and the report. Layers in float64, and layers that :func:`accelerate` does not replace, stay
        unchanged.

    Raises:
        TypeError: If ``model`` is no torch.nn.Module.
        ValueError: If ``compute`` is no format for inference only.

    Example:
        >>> model, report = quantize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GRU(8, 16)))
        >>> print(report)
        1 replaced, 0 unchanged
          replaced   1: GRU
    """
    if not is_inference_only(checked_compute(compute)):
        raise ValueError(f"compute must be a format for inference only, such as 'int8'; got {compute!r}")
    if isinstance(model, Module) and not inplace:
        model = copy.deepcopy(model)
    report = convert_all(model, OURS, subclasses, compute)
    model.eval()
    freeze(module for module in model.modules() if isinstance(module, HasCompute) and module.compute == compute)
    return Quantized(model, report)
