"""The description of an RNN: frozen, hashable and validated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusedrnn import scalars
from fusedrnn.cell.activations import Activation, check_activations
from fusedrnn.cell.cells import FAMILIES, Cell, Variant, make_cell, variant_of
from fusedrnn.cell.trace import traced_cell
from fusedrnn.layout import Kind, ParameterLayout, Shapes
from fusedrnn.lazy import cached_property
from fusedrnn.spec_sizes import check_sizes, num_weights, parameter_shapes

MODES = tuple(FAMILIES)
DTYPES = ("float32", "float64")
COMPUTE = ("bfloat16", "int8", "int8_weights")
"""Formats of GEMM operands other than the dtype's."""
QUANTIZED = ("int8", "int8_weights")
"""The formats in which weights are integers with a scale for each row. They are for inference only."""
BIASES = ("double", "single", "none")
RESIDUALS = ("identity", "projection")
OPTIONS = (
    "projection_size", "state_clip_min", "reset_after", "peepholes", "coupled_gates", "gate_clip", "activations",
    "bias", "reverse", "compute", "residual",
)  # fmt: skip
"""The fields beyond the four cells in one or two directions. An engine may lack support for any of them."""
_CHECKS: dict[Callable[[str, object], object], tuple[str, ...]] = {
    scalars.positive_int: ("input_size", "hidden_size", "num_layers", "projection_size"),
    scalars.as_bool: ("bidirectional", "state_clip_nan", "reset_after", "peepholes", "coupled_gates", "reverse"),
    scalars.as_number: ("state_clip_min", "state_clip_max"),
    scalars.positive_number: ("gate_clip",),
    scalars.probability: ("dropout", "input_dropout"),
}
_MODE_OF_OPTION = {
    "projection_size": "lstm", "state_clip_min": "lstm", "reset_after": "gru", "peepholes": "lstm",
    "coupled_gates": "lstm",
}  # fmt: skip


@dataclass(frozen=True)
class RNNSpec:
    """A recurrent network: its cell, its sizes and its options.

    Attributes:
        mode: ``"rnn_relu"``, ``"rnn_tanh"``, ``"lstm"`` or ``"gru"``; or a cell from :func:`fusedrnn.cell.cell`.
        input_size: I, at least 1.
        hidden_size: H, at least 1; the parameters must take fewer than 2**48 bytes.
        num_layers: L, from 1 to 4096. Layer l > 0 reads the output of layer l - 1.
        bidirectional: Whether each layer runs over the sequence in both directions and concatenates the outputs.
        dropout: Probability in [0, 1) with which training drops elements between layers. Inference ignores it.
        projection_size: P, the size to which an LSTM projects its output, less than H; None for no projection.
        dtype: ``"float32"`` or ``"float64"``.
        state_clip_min: Lower bound of an LSTM's cell state after each step. Give both bounds or neither.
        state_clip_max: Upper bound of the cell state, at least the lower bound.
        state_clip_nan: Whether clipping also replaces NaN in the cell state by the lower bound, as MXNet does.
        reset_after: Whether a GRU's r multiplies the recurrent product: n = tanh(W x + b + r·(U h + c)), as in cuDNN
            and PyTorch. If False, r multiplies the state: n = tanh(W x + b + U (r·h) + c), as in Cho et al. (2014).
        peepholes: Whether an LSTM's gates read the cell state (Gers and Schmidhuber, 2000), each through a weight
            vector (H,). i and f read the state before the step, o reads the state after it.
        coupled_gates: Whether an LSTM's f is 1 - i; it then has the gates i, g, o.
        gate_clip: Pre-activations are clipped to [-gate_clip, gate_clip]; above 0, or None for no clipping.
        activations: The cell's activations, each an :class:`Activation` or its name. An LSTM has one for the gates, one
            for g and one for the cell state; a GRU has one for the gates and one for n; a vanilla RNN has one. None for
            the defaults.
        bias: ``"double"`` for biases of the input and of the recurrent product, ``"single"`` for those of the input
            only, ``"none"`` for no biases.
        reverse: Whether a network of one direction runs from the end of each sequence to its beginning.
        compute: The format of the operands of GEMMs. None means ``dtype``. With dtype float32, it may be
            ``"bfloat16"``, rounded to nearest even; or, in inference, ``"int8"``, with a scale for each row of an
            operand, or ``"int8_weights"``, with weights alone in int8. Sums, the cell's maths and the arrays of callers
            are float32; with ``"bfloat16"`` the arrays may be ``ml_dtypes.bfloat16`` too.
        residual: What each layer adds to its output. None: nothing. ``"identity"``: its input, after dropout, in the
            layers whose input and output have the same size D·S. ``"projection"``: W x + b of its input x, after
            dropout, in all layers; W and b are rows of the input weights and biases, after those of the gates.
        input_dropout: Probability in [0, 1) with which training drops elements of the input of the first layer.

    Raises:
        TypeError: If a field has the wrong type; the message names the field, its value and what is expected.
        ValueError: If a field has an invalid value; the message is of the same form.
    """

    mode: str | Cell
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    projection_size: int | None = None
    dtype: str = "float32"
    state_clip_min: float | None = None
    state_clip_max: float | None = None
    state_clip_nan: bool = False
    reset_after: bool = True
    peepholes: bool = False
    coupled_gates: bool = False
    gate_clip: float | None = None
    activations: tuple[Activation, ...] | None = None
    bias: str = "double"
    reverse: bool = False
    compute: str | None = None
    residual: str | None = None
    input_dropout: float = 0.0

    def __post_init__(self) -> None:
        mode: object = self.mode
        if callable(mode) and not isinstance(mode, Cell):
            name = getattr(mode, "__name__", None) or scalars.shown(mode)
            raise TypeError(f"{name} is no cell: decorate the function of its equations with @cell(gates=...)")
        if not isinstance(self.mode, Cell):
            self._set("mode", scalars.check_choice("mode", self.mode, MODES))
        elif options := [option for option in ("activations", "gate_clip") if self.asks_for(option)]:
            raise ValueError(f"{options[0]} needs one of the modes {', '.join(MODES)}: write it in {self.mode!r}")
        self._set("bias", scalars.check_choice("bias", self.bias, BIASES))
        for check, names in _CHECKS.items():
            for name in names:
                value = getattr(self, name)
                if value is not None or self._default(name) is not None:
                    self._set(name, check(name, value))
        self._set("dtype", scalars.dtype_name(self.dtype, DTYPES))
        if self.activations is not None and not isinstance(self.mode, Cell):
            default = FAMILIES[self.mode].default.activations
            self._set("activations", check_activations(self.activations, default, self.mode))
        for name, mode in _MODE_OF_OPTION.items():
            if self.asks_for(name) and self.mode != mode:
                got = f"{getattr(self, name)!r} in mode {self.mode!r}"
                raise ValueError(f"{name} needs mode {mode!r}; got {got}")
        if self.residual is not None:
            self._set("residual", scalars.check_choice("residual", self.residual, RESIDUALS))
        if self.compute == self.dtype:
            self._set("compute", None)
        if self.compute is not None:
            self._set("compute", scalars.check_choice("compute", self.compute, (self.dtype, *COMPUTE)))
            if self.dtype != "float32":
                raise ValueError(f"compute={self.compute!r} needs dtype 'float32'; got {self.dtype!r}")
        if self.reverse and self.bidirectional:
            raise ValueError("reverse must be False in a bidirectional network; got True")
        scalars.check_bounds("state_clip_min", self.state_clip_min, "state_clip_max", self.state_clip_max)
        if self.state_clip_nan and self.state_clip_min is None:
            raise ValueError("state_clip_nan needs state_clip_min and state_clip_max; got neither")
        check_sizes(self)

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return f"RNNSpec({', '.join(f'{k}={v!r}' for k, v in values.items() if v != self._default(k))})"

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def _default(cls, name: str) -> object:
        return cls.__dataclass_fields__[name].default

    @cached_property
    def variant(self) -> Variant:
        """The cell with its options."""
        return variant_of(self)

    @property
    def operand_format(self) -> str:
        """The format of GEMM operands: :attr:`compute`, or :attr:`dtype` if ``compute`` is None."""
        return self.compute or self.dtype

    @property
    def is_trainable(self) -> bool:
        """Whether the format of GEMM operands has gradients. The integer formats are for inference only."""
        return self.compute not in QUANTIZED

    @cached_property
    def gates(self) -> tuple[str, ...]:
        """The gates in the order in which weights stack them."""
        return make_cell(self.variant).gates

    @property
    def heads(self) -> int:
        """The number of blocks of block-diagonal recurrent weights; 1 for full weights."""
        return self.mode.heads if isinstance(self.mode, Cell) else 1

    @property
    def num_directions(self) -> int:
        """D: 2 if bidirectional, else 1."""
        return 1 + self.bidirectional

    @property
    def num_gates(self) -> int:
        """G, the number of gates of the cell: 4 in an LSTM (3 if coupled), 3 in a GRU, 1 in a vanilla RNN."""
        return len(self.gates)

    @cached_property
    def num_input_gates(self) -> int:
        """The number of gates with a part from the input: all gates in the four modes."""
        return len(traced_cell(self.variant).x_gates)

    @cached_property
    def num_recurrent_gates(self) -> int:
        """The number of gates with recurrent weights: all gates in the four modes."""
        return len(traced_cell(self.variant).h_gates)

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """The states of the cell, the output first: ``("h",)`` or ``("h", "c")`` in the four modes."""
        return make_cell(self.variant).states

    @property
    def other_states(self) -> tuple[str, ...]:
        """The states that are not the output."""
        return self.state_names[self.output_is_state :]

    @property
    def mode_name(self) -> str:
        """The mode, or the name of the cell."""
        return self.mode.name if isinstance(self.mode, Cell) else self.mode

    @cached_property
    def vector_kinds(self) -> tuple[Kind, ...]:
        """The parameters of the cell that are vectors: each (H,), but all peephole weights are one parameter."""
        return ("peephole_weight",) if self.peepholes else make_cell(self.variant).vectors

    @cached_property
    def scalar_kinds(self) -> tuple[Kind, ...]:
        """The parameters of the cell that are one number, each (1,)."""
        return make_cell(self.variant).scalars

    @property
    def state_size(self) -> int:
        """S, the size of the output of one direction: P with a projection, else H."""
        return self.projection_size or self.hidden_size

    @property
    def output_size(self) -> int:
        """D·S, the features of the output at each step."""
        return self.num_directions * self.state_size

    @property
    def drops_inputs(self) -> bool:
        """Whether training applies dropout to the input of a layer."""
        return self.input_dropout > 0 or (self.dropout > 0 and self.num_layers > 1)

    @cached_property
    def drops(self) -> bool:
        """Whether training draws random numbers: for dropout of a layer's input, or for masks inside the cell."""
        return self.drops_inputs or bool(traced_cell(self.variant).masks)

    def layer_input_size(self, layer: int) -> int:
        """The features that a layer reads at each step: I in layer 0, D·S in the others."""
        return self.input_size if layer == 0 else self.output_size

    def adds_input(self, layer: int) -> bool:
        """Whether a layer adds its input to its output."""
        return self.residual == "identity" and self.layer_input_size(layer) == self.output_size

    @cached_property
    def output_is_state(self) -> bool:
        """Whether the output of a layer is the first state of each step."""
        return self.residual is None and traced_cell(self.variant).output is None

    def dropout_of(self, layer: int) -> float:
        """The probability with which training drops elements of a layer's input."""
        return self.dropout if layer else self.input_dropout

    def asks_for(self, option: str) -> bool:
        """Whether one of :data:`OPTIONS` differs from its default."""
        return bool(getattr(self, option) != self._default(option))

    def reverses(self, direction: int) -> bool:
        """Whether direction 0 or 1 runs from the end of each sequence to its beginning."""
        return direction == 1 or self.reverse

    def state_shape(self, batch: int) -> tuple[tuple[int, int, int], ...]:
        """The shape (L·D, N, size) of each state for N sequences; the first index is layer·D + direction."""
        return tuple((self.num_layers * self.num_directions, batch, self.size_of(name)) for name in self.state_names)

    @property
    def other_state_features(self) -> tuple[int, ...]:
        """D·size of each of :attr:`other_states`."""
        return tuple(self.num_directions * self.size_of(name) for name in self.other_states)

    def size_of(self, state: str) -> int:
        """The number of elements of a state: S for the output, H for the others."""
        return self.state_size if state == self.state_names[0] else self.hidden_size

    def flops(self, steps: int, batch: int, *, training: bool = False) -> int:
        """Floating-point operations of the GEMMs of T steps of N sequences; training counts as three forward passes."""
        return 2 * steps * batch * num_weights(self) * (3 if training else 1)

    def parameter_shapes(self, layer: int) -> Shapes:
        """The shapes of the parameters of each direction of a layer, the weights before the biases."""
        return parameter_shapes(self, layer)

    @cached_property
    def layout(self) -> ParameterLayout:
        """The position of each weight and bias in the flat parameter vector."""
        return ParameterLayout(self)
