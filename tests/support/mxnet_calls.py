"""Problems as calls of ``fusedrnn.mxnet``: arguments of the operator, layers with their parameters."""

import numpy as np

from fusedrnn import mxnet as mx

LAYOUTS = ("TNC", "NTC")
RNN, LSTM, GRU = mx.gluon.rnn.RNN, mx.gluon.rnn.LSTM, mx.gluon.rnn.GRU
CLASSES = {"lstm": LSTM, "gru": GRU}


def layer_of(problem, layout="TNC", backend=None, **options):
    """A layer with a problem's parameters."""
    spec = problem.spec
    options |= {"num_layers": spec.num_layers, "bidirectional": spec.bidirectional, "layout": layout,
                "dtype": spec.dtype, "dropout": spec.dropout, "backend": backend,
                "use_sequence_length": problem.lengths is not None}  # fmt: skip
    if spec.mode.startswith("rnn"):
        options["activation"] = spec.mode[4:]
    if spec.mode == "lstm":
        options |= {"projection_size": spec.projection_size, "state_clip_nan": spec.state_clip_nan,
                    "state_clip_min": spec.state_clip_min, "state_clip_max": spec.state_clip_max}  # fmt: skip
    layer = CLASSES.get(spec.mode, RNN)(spec.hidden_size, **options)
    layer.load_parameters(spec.layout.unpack(problem.params))
    return layer


def to_layout(array, layout):
    """An array (T, N, C) converted to that layout, or back."""
    return array if layout == "TNC" else np.ascontiguousarray(array.swapaxes(0, 1))


def flat_gradients(layer, spec):
    """The gradients of all parameters as one vector."""
    return spec.layout.pack({parameter.short_name: parameter.grad() for parameter in layer.collect_params().values()})


def arguments(problem, backend=None):
    """A problem as arguments of MXNet's operator."""
    spec = problem.spec
    kwargs = {"data": problem.x, "parameters": problem.params, "state": problem.states[0]}
    if len(problem.states) == 2:
        kwargs["state_cell"] = problem.states[1]
    if problem.lengths is not None:
        kwargs |= {"sequence_length": problem.lengths, "use_sequence_length": True}
    for end in ("min", "max", "nan"):
        kwargs[f"lstm_state_clip_{end}"] = getattr(spec, f"state_clip_{end}")
    return kwargs | {
        "state_size": spec.hidden_size, "num_layers": spec.num_layers, "mode": spec.mode,
        "bidirectional": spec.bidirectional, "p": spec.dropout, "projection_size": spec.projection_size,
        "state_outputs": True, "backend": backend,
    }  # fmt: skip
