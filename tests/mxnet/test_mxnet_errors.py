"""MXNet's operator as a function: errors by MXNet's names."""

import numpy as np
import pytest

from fusedrnn import cells
from fusedrnn import mxnet as mx
from mxnet_calls import arguments
from oracles import training_problem
from problems import Shape

pytestmark = pytest.mark.usefixtures("poisoned")


class TestErrors:
    """Every error names the argument as MXNet does."""

    problem = training_problem("lstm", Shape(4, 3, 5, 6))

    @property
    def backward(self):
        return mx.nd.train_rnn(**arguments(self.problem))[1]

    @property
    def out_grads(self):
        return self.problem.dy, *self.problem.dstates

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"projection_size": 6}, ValueError, r"projection_size must be smaller than state_size \(6\); got 6"),
            ({"projection_size": 2}, ValueError, r"parameters must have shape \(\d+,\)"),
            ({"projection_size": 2.0}, TypeError, "projection_size must be an integer"),
            ({"lstm_state_clip_min": 1}, ValueError, "lstm_state_clip_max must be given when the other bound is"),
            ({"lstm_state_clip_nan": True}, ValueError, "lstm_state_clip_nan needs lstm_state_clip_min and"),
            ({"lstm_state_clip_min": 1, "lstm_state_clip_max": 0}, ValueError, "lstm_state_clip_min must not exceed"),
            ({"state": np.zeros((2, 3, 6), "f4")}, ValueError, r"state must have shape \(1, 3, 6\); got \(2, 3, 6\)"),
            ({"backend": "none"}, ValueError, "backend must be one of"),
            ({"seed": -1}, ValueError, "seed must be from 0"),
            ({"mode": cells.ran}, TypeError, "mode must be one of rnn_relu, rnn_tanh, lstm, gru; got"),
            ({"mode": "elman"}, ValueError, "mode must be one of rnn_relu, rnn_tanh, lstm, gru; got 'elman'"),
            ({"state_size": None}, TypeError, "state_size must be an integer"),
            ({"sequence_length": np.array([1.0, 2, 3]), "use_sequence_length": True}, TypeError,
             "sequence_length must be integers; got float64"),
        ],
    )  # fmt: skip
    def test_call(self, changes, error, message):
        with pytest.raises(error, match=f"^{message}"):
            mx.nd.train_rnn(**{**arguments(self.problem, "reference"), **changes})

    def test_lstm_options_of_a_gru(self):
        kwargs = arguments(training_problem("gru", Shape(4, 3, 5, 6)), "reference")
        with pytest.raises(ValueError, match=r"^projection_size needs mode 'lstm'; got . in mode 'gru'"):
            mx.nd.RNN(**kwargs | {"projection_size": 2})
        with pytest.raises(ValueError, match=r"^lstm_state_clip_min needs mode 'lstm'"):
            mx.nd.RNN(**kwargs | {"lstm_state_clip_min": -1, "lstm_state_clip_max": 1})

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda g: g[0], TypeError, "out_grads must be a sequence of 3: those of the output, state, state_cell"),
            (lambda g: g[:2], ValueError, "out_grads must be a sequence of 3.*got 2"),
            (lambda g: (g[0][1:], *g[1:]), ValueError, r"out_grads\[0\] must have shape \(4, 3, 6\); got \(3, 3, 6\)"),
            (lambda g: (g[0], g[1][:, 1:], g[2]), ValueError, r"out_grads\[1\] must have shape \(1, 3, 6\)"),
            (lambda g: (*g[:2], g[2].tolist()), TypeError, r"out_grads\[2\] must be a NumPy array; got list"),
            (lambda g: (*g[:2], g[2].astype("f8")), TypeError, r"out_grads\[2\] must have dtype float32; got float64"),
        ],
    )
    def test_out_grads(self, change, error, message):
        with pytest.raises(error, match=f"^{message}"):
            self.backward(change(self.out_grads))

    def test_out_grads_without_state_outputs(self):
        _, backward = mx.nd.train_rnn(**arguments(self.problem) | {"state_outputs": False})
        with pytest.raises(ValueError, match=r"^out_grads must have shape \(4, 3, 6\); got \(3, 3, 6\)"):
            backward(self.problem.dy[1:])
        with pytest.raises(TypeError, match=r"^out_grads must be a NumPy array; got tuple"):
            backward(self.out_grads)

    @pytest.mark.parametrize(
        ("grad_req", "error", "message"),
        [
            ("wrote", ValueError, "grad_req must be one of write, add, null; got 'wrote'"),
            (None, TypeError, "grad_req must be one of write, add, null, or a list or a dict of one for each of data"),
            (["write"], ValueError, "grad_req must be .*one for each of data, parameters, state, state_cell; got 1"),
            ({"x": "write"}, ValueError, "grad_req must have keys among data, parameters, state, state_cell; got 'x'"),
            ({"sequence_length": "null"}, ValueError, "grad_req must have keys among .*; got 'sequence_length'"),
            ({"state": 1}, TypeError, "grad_req: state must be one of write, add, null; got 1"),
            ({"state_cell": "Add"}, ValueError, "grad_req: state_cell must be one of write, add, null; got 'Add'"),
            ("add", ValueError, "args_grad: data must be given where grad_req is 'add'; got None"),
        ],
    )
    def test_requests(self, grad_req, error, message):
        with pytest.raises(error, match=f"^{message}"):
            self.backward(self.out_grads, grad_req)

    @pytest.mark.parametrize("mixed", [False, True])
    @pytest.mark.parametrize(
        ("name", "buffer", "error", "message"),
        [
            ("data", np.zeros((4, 3, 6), "f4"), ValueError, r"must have shape \(4, 3, 5\)"),
            ("parameters", np.zeros(7, "f4"), ValueError, "must have shape"),
            ("state", np.zeros((1, 3, 5), "f4"), ValueError, r"must have shape \(1, 3, 6\); got \(1, 3, 5\)"),
            ("state", [0.0], TypeError, "must be a NumPy array; got list"),
            ("state_cell", np.zeros((1, 3, 6)), TypeError, "must have dtype float32; got float64"),
            ("state_cell", np.zeros((1, 6, 6), "f4")[:, ::2], ValueError, "must be contiguous"),
            ("state_cell", np.broadcast_to(np.zeros(6, "f4"), (1, 3, 6)), ValueError, "must be writable"),
        ],
    )
    def test_buffers(self, name, buffer, error, message, mixed):
        grad_reqs = dict.fromkeys(self.backward.arguments, "write")
        if mixed:
            grad_reqs |= {"state": "add"} if name != "state" else {"state_cell": "null"}
        buffers = {name: buffer}
        if mixed and name == "state_cell":
            buffers["state"] = np.zeros((1, 3, 6), "f4")
        elif mixed and name != "state":
            grad_reqs["state"] = "null"
        elif not mixed and name.startswith("state"):
            buffers = {"state": np.zeros((1, 3, 6), "f4"), "state_cell": np.zeros((1, 3, 6), "f4")} | buffers
        with pytest.raises(error, match=f"^args_grad: {name} {message}"):
            self.backward(self.out_grads, grad_reqs, buffers)

    def test_unexpected_buffers(self):
        with pytest.raises(ValueError, match=r"^args_grad: data must be None where grad_req is 'null'; got ndarray"):
            self.backward(self.out_grads, "null", {"data": np.empty_like(self.problem.x)})
        with pytest.raises(ValueError, match=r"^args_grad must have keys among data, .*got 'dx'"):
            self.backward(self.out_grads, args_grad={"dx": None})
        with pytest.raises(TypeError, match=r"^args_grad must be None, or a list or a dict"):
            self.backward(self.out_grads, args_grad=np.empty(3))

    @pytest.mark.parametrize("grad_req", ["write", {"state": "write", "state_cell": "add"}])
    def test_states_share_memory(self, grad_req):
        buffer = np.zeros((1, 3, 6), np.float32)
        with pytest.raises(ValueError, match=r"^args_grad: state_cell must not share memory with args_grad: state"):
            self.backward(self.out_grads, grad_req, {"state": buffer, "state_cell": buffer})
        with pytest.raises(ValueError, match=r"^args_grad: state must not share memory with out_grads"):
            self.backward(self.out_grads, grad_req, {"state": self.out_grads[1], "state_cell": buffer})

    def test_data_shares_memory_with_a_state(self):
        memory = np.zeros((1, 3, 6), np.float32)
        grad_reqs = {"data": "write", "state": "write", "state_cell": "add"}
        small = training_problem("lstm", Shape(1, 3, 6, 6))
        backward = mx.nd.train_rnn(**arguments(small))[1]
        buffers = {"data": memory, "state": memory, "state_cell": np.zeros((1, 3, 6), np.float32)}
        with pytest.raises(ValueError, match=r"^args_grad: state must not share memory with args_grad: data"):
            backward((small.dy, *small.dstates), grad_reqs, buffers)
