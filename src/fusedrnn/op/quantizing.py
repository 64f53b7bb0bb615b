"""The method of an operator that quantizes parameters."""

from __future__ import annotations

from fusedrnn.op import validation
from fusedrnn.quantized_params import QuantizedParams, check_quantized
from fusedrnn.spec import Array, RNNSpec


class QuantizesParams:
    """An operator with the method :meth:`quantize`."""

    spec: RNNSpec

    def quantize(self, params: Array | QuantizedParams) -> QuantizedParams:
        """Parameters with int8 matrices, for an op whose ``compute`` is ``"int8"`` or ``"int8_weights"``.

        They take about a quarter of the bytes, and calls with them have the bits of calls with ``params``.

        Args:
            params: The flat parameter vector.

        Raises:
            TypeError: Naming the argument, what was given and what was expected.
            ValueError: Likewise; also if the spec's ``compute`` is another.
        """
        check_quantized(self.spec)
        checked = validation.check_params(params, self.spec)
        return checked if isinstance(checked, QuantizedParams) else QuantizedParams.quantize(self.spec, checked)
