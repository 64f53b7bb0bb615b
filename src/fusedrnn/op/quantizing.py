"""The method of an operator that quantizes parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from fusedrnn.arrays import Array
from fusedrnn.op import validation
from fusedrnn.quantized_params import Params, QuantizedParams, check_quantized
from fusedrnn.spec import RNNSpec


class QuantizesParams:
    """An operator with the method :meth:`quantize`."""

    spec: RNNSpec

    def quantize(self, params: Params, calibration: Array | Iterable[Array] | None = None) -> QuantizedParams:
        """Parameters with int8 matrices, for an op whose ``compute`` is ``"int8"`` or ``"int8_weights"``.

        Quantized parameters take about a quarter of the bytes. Without ``calibration``, calls with them have the bits
        of calls with ``params``.

        Args:
            params: The flat parameter vector.
            calibration: For ``"int8"``, typical inputs: x (T, N, I) as in :meth:`RNNOp.forward`, or an iterable of
                them. The network runs over each of them in float32, from zero states, and keeps the largest magnitude
                of each operand in each layer and direction: of the input, of h, and of the operand of a projection or a
                reset-before GRU. Calls with the result have one scale for each operand; values beyond its largest
                magnitude saturate. Without calibration, each row of each step has its own scale.

        Raises:
            TypeError: If an argument has the wrong type; the message names it, what was given and what was expected.
            ValueError: If an argument has the wrong shape or value; if the spec's ``compute`` is another; or if a
                matrix, an input of the calibration or an operand that the network computes from it is not finite.
        """
        spec = self.spec
        check_quantized(spec)
        checked = validation.check_params(params, spec)
        quantized = checked if isinstance(checked, QuantizedParams) else QuantizedParams.quantize(spec, checked)
        if calibration is None:
            return quantized
        if spec.compute != "int8":
            raise ValueError(f"calibration needs compute 'int8'; got {spec.compute!r}")
        from fusedrnn.engines.reference.calibration import operand_ranges  # few programs need it

        flat = checked.dequantize() if isinstance(checked, QuantizedParams) else checked
        ranges = operand_ranges(spec, flat, _checked_inputs(calibration, spec))
        if not np.isfinite(ranges).all():
            raise ValueError("calibration must keep every operand of the network finite; got NaN or infinity in one")
        return replace(quantized, spec=spec, ranges=ranges)


def _checked_inputs(calibration: object, spec: RNNSpec) -> Iterator[Array]:
    """The inputs one by one: an iterable may fill the same array with each."""
    if isinstance(calibration, np.ndarray):
        calibration = (calibration,)
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be an array or an iterable of arrays; got {type(calibration).__name__}")
    number = -1
    for number, x in enumerate(calibration):  # its own errors pass unchanged
        with validation.renamed({"x": "calibration"}):
            checked = validation.check_x(x, spec)
        if not np.isfinite(checked).all():
            raise ValueError(f"calibration must be finite; got NaN or infinity in input {number}")
        yield checked
    if number < 0:
        raise ValueError("calibration must hold at least one input; got none")
