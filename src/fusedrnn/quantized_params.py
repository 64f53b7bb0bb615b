"""Parameters whose matrices are int8 with a scale for each row. They take a quarter of the bytes, and cannot change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusedrnn.arrays import Array, check_is_array, is_masked
from fusedrnn.cell.trace import traced_cell
from fusedrnn.frozen_array import FrozenParams, frozen_copy
from fusedrnn.layout import Naming, Parameter, check_names
from fusedrnn.number_formats import dequantize_rows, quantize_rows
from fusedrnn.spec import QUANTIZED, RNNSpec


def is_matrix(entry: Parameter) -> bool:
    """Whether a parameter is quantized; biases and peephole weights are not."""
    return len(entry.shape) == 2


def num_operands(spec: RNNSpec) -> int:
    """The number of operands that weights multiply in a layer-direction: the input, and one for each recurrent product.

    The first product multiplies h; a later one multiplies the operand of a projection, or the reset state of a GRU.
    """
    return 1 + len(traced_cell(spec.variant).products)


@dataclass(frozen=True, eq=False)
class QuantizedParams(FrozenParams):
    """The parameters of a network with int8 matrices. :meth:`RNNOp.quantize` makes them from float32 parameters.

    They replace the flat vector in calls of an op whose ``compute`` is ``"int8"`` or ``"int8_weights"``; the results
    have the same bits. They cannot change, so an op does not check them for changes. They can be pickled; to store them
    without pickle, see :meth:`arrays`.

    The constructor takes the integers and scales of a model that was quantized elsewhere; see also :meth:`pack`. It
    copies the arrays.

    Attributes:
        spec: The network; its ``compute`` is ``"int8"`` or ``"int8_weights"``.
        integers: The elements of all matrices in the order of ``spec.layout``, int8 (M,).
        scales: The scales of all rows of these matrices, float32 (R,).
        vectors: The elements of all biases and peephole weights, float32 (V,).
        ranges: For ``"int8"``, the largest magnitude of each operand, float32 (L·D, operands), from
            :meth:`RNNOp.quantize` with ``calibration``. The scale of an operand then comes from its range, for all
            rows, and values beyond the range saturate. With None, each row of each step has its own scale.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an array has the wrong shape, a scale or range is negative or not finite, or the spec's
            ``compute`` is neither of the two.
    """

    spec: RNNSpec
    integers: Array
    scales: Array
    vectors: Array
    ranges: Array | None = None

    def __post_init__(self) -> None:
        spec = self.spec
        check_quantized(spec)
        matrices = [entry for entry in spec.layout if is_matrix(entry)]
        num_integers = sum(entry.size for entry in matrices)
        shapes = {
            "integers": ("int8", (num_integers,)),
            "scales": ("float32", (sum(entry.shape[0] for entry in matrices),)),
            "vectors": ("float32", (spec.layout.size - num_integers,)),
            "ranges": ("float32", (spec.num_layers * spec.num_directions, num_operands(spec))),
        }
        for name, (dtype, shape) in shapes.items():
            if name != "ranges" or self.ranges is not None:
                object.__setattr__(self, name, frozen_copy(_checked(name, getattr(self, name), dtype, shape)))
                if name in ("scales", "ranges"):
                    check_magnitudes(name, getattr(self, name))

    @classmethod
    def quantize(cls, spec: RNNSpec, params: Array, ranges: Array | None = None) -> QuantizedParams:
        """Quantize the flat vector ``params``. Each row is symmetric about zero, and its largest magnitude becomes 127.

        Raises:
            ValueError: If a matrix holds NaN or infinity; the message names it.
        """
        integers, scales, vectors = [], [], []
        for entry, values, row_scales in quantized_entries(spec, params):
            if row_scales is None:
                vectors.append(values)
                continue
            if not np.isfinite(row_scales).all():
                row = int(np.argmin(np.isfinite(row_scales)))
                raise ValueError(f"params must be finite to be quantized; row {row} of {entry.name} is not")
            integers.append(values.ravel())
            scales.append(row_scales)
        return cls(spec, np.concatenate(integers), np.concatenate(scales), _joined(vectors), ranges)

    @classmethod
    def pack(
        cls, spec: RNNSpec, arrays: Mapping[str, Any], *, names: Naming = "mxnet", ranges: Array | None = None
    ) -> QuantizedParams:
        """Make parameters from integers and scales by name, for a model that was quantized elsewhere.

        Args:
            spec: The network.
            arrays: A mapping from the names of ``spec.layout.unpack(names=names)``. For a matrix, it has the pair of
                integers, int8 (rows, columns), and scales, float32 (rows,), or one scale for all rows. For another
                parameter, it has the float32 elements.
            names: ``"mxnet"`` or ``"torch"``.
            ranges: As in the constructor.

        Raises:
            TypeError: If a matrix is not given as a pair, or an array has the wrong dtype.
            ValueError: If a parameter is missing or unknown or has the wrong shape, or a scale is negative or not
                finite.
        """
        entries = spec.layout.unpack(np.arange(spec.layout.size), names=names)
        check_names(entries, arrays)
        integers, scales, vectors = [], [], []
        for name, positions in entries.items():
            if positions.ndim == 2:
                if not isinstance(arrays[name], Sequence) or len(arrays[name]) != 2:
                    raise TypeError(f"{name} must be a pair of integers and scales; got {type(arrays[name]).__name__}")
                matrix, row_scales = arrays[name]
                integers.append(_checked(name, matrix, "int8", positions.shape).ravel())
                scales.append(_checked_scales(f"the scales of {name}", row_scales, len(matrix)))
            else:
                vectors.append(_checked(name, arrays[name], "float32", positions.shape))
        return cls(spec, np.concatenate(integers), np.concatenate(scales), _joined(vectors), ranges)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, Array]:
        """The arrays by name, to store them: ``np.savez(path, **params.arrays())``.

        ``QuantizedParams(spec, **np.load(path))`` reads them.
        """
        arrays = {"integers": self.integers, "scales": self.scales, "vectors": self.vectors}
        return arrays if self.ranges is None else {**arrays, "ranges": self.ranges}

    def entries(self) -> Iterator[tuple[Parameter, Array, Array | None]]:
        """Each parameter in the order of the layout, its elements in its shape, and the scales of a matrix's rows."""
        integer = row = element = 0
        for entry in self.spec.layout:
            if is_matrix(entry):
                rows = entry.shape[0]
                matrix = self.integers[integer : integer + entry.size].reshape(entry.shape)
                yield entry, matrix, self.scales[row : row + rows]
                integer, row = integer + entry.size, row + rows
            else:
                yield entry, self.vectors[element : element + entry.size].reshape(entry.shape), None
                element += entry.size

    def dequantize(self) -> Array:
        """The flat float32 vector of the values of these parameters."""
        flat = np.empty(self.spec.layout.size, np.float32)
        for entry, values, scales in self.entries():
            entry.view(flat)[...] = values if scales is None else dequantize_rows(values, scales)
        return flat

    def fits(self, spec: RNNSpec) -> bool:
        """Whether they are parameters for a spec, with either of the formats that have int8 weights."""
        return spec.compute in QUANTIZED and replace(self.spec, compute=spec.compute) == spec

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedParams, (self.spec, self.integers, self.scales, self.vectors, self.ranges)


Params = Array | QuantizedParams
"""The parameters of a network, as calls take them."""


def check_quantized(spec: object) -> None:
    """Raise an error unless a spec's weights are int8."""
    if not isinstance(spec, RNNSpec):
        raise TypeError(f"spec must be an RNNSpec; got {type(spec).__name__}")
    if spec.compute not in QUANTIZED:
        raise ValueError(f"quantized parameters need compute {' or '.join(map(repr, QUANTIZED))}; got {spec.compute!r}")


def _checked(name: str, array: object, dtype: str, shape: tuple[int, ...]) -> Array:
    array = check_is_array(name, array)
    if array.dtype != np.dtype(dtype):
        raise TypeError(f"{name} must have dtype {dtype}; got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {array.shape}")
    return array


def _checked_scales(name: str, scales: object, rows: int) -> Array:
    """A scale for each row, from one scale for each or one for all."""
    if is_masked(scales):
        raise TypeError(f"{name} must be numbers without a mask; got {type(scales).__name__}")
    array = np.asarray(scales)
    if array.dtype != np.float32:
        raise TypeError(f"{name} must have dtype float32; got {array.dtype}")
    if array.shape not in ((), (rows,)):
        raise ValueError(f"{name} must have shape ({rows},), or () for all rows; got {array.shape}")
    check_magnitudes(name, array)
    return np.broadcast_to(array, (rows,))


def check_magnitudes(name: str, values: Array) -> None:
    """Refuse scales or ranges that are negative or not finite.

    Raises:
        ValueError: If there is such a value; the message has the name and the first such value.
    """
    is_magnitude = np.isfinite(values) & ~np.signbit(values)  # kernels take the sign bit for "no range"
    if not is_magnitude.all():
        raise ValueError(f"{name} must be finite and not negative; got {values[~is_magnitude].flat[0]}")


def quantized_entries(spec: RNNSpec, params: Array) -> Iterator[tuple[Parameter, Array, Array | None]]:
    """Like :meth:`QuantizedParams.entries`, for a flat float32 vector. Rows with NaN or infinity have the scale NaN."""
    for entry in spec.layout:
        values = entry.view(params)
        yield entry, *(quantize_rows(values) if is_matrix(entry) else (values, None))


def _joined(vectors: Sequence[Array]) -> Array:
    return np.concatenate([np.empty(0, np.float32), *vectors])
