"""Gradients of layers shaped like those of MXNet's gluon.rnn: requests, buffers, errors."""

import numpy as np
import pytest

from mxnet_calls import LAYOUTS, flat_gradients, layer_of, to_layout
from oracles import training_problem
from problems import Shape, assert_same_bits

pytestmark = pytest.mark.usefixtures("poisoned")


class TestGradients:
    """Each parameter has its own grad_req; those of inputs and states are arguments of the call."""

    problem = training_problem("lstm", Shape(4, 3, 5, 6, layers=2))

    def trained(self, layout="TNC"):
        layer = layer_of(self.problem, layout)
        _, backward = layer.train(to_layout(self.problem.x, layout), list(self.problem.states))
        return layer, backward, (to_layout(self.problem.dy, layout), list(self.problem.dstates))

    def test_zero_before_backward(self):
        layer, _, _ = self.trained()
        assert not flat_gradients(layer, self.problem.spec).any()

    def test_write_overwrites(self):
        layer, backward, out_grads = self.trained()
        backward(out_grads)
        once = flat_gradients(layer, self.problem.spec)
        backward(out_grads)
        assert_same_bits(flat_gradients(layer, self.problem.spec), once)
        layer.collect_params().zero_grad()
        assert not flat_gradients(layer, self.problem.spec).any()

    def test_add(self):
        layer, backward, out_grads = self.trained()
        backward(out_grads)
        once = flat_gradients(layer, self.problem.spec)
        layer.collect_params().setattr("grad_req", "add")
        for _ in range(3):
            backward(out_grads)
        np.testing.assert_array_equal(flat_gradients(layer, self.problem.spec), once + once + once)

    def test_null(self):
        layer, backward, out_grads = self.trained()
        layer.collect_params().setattr("grad_req", "null")
        assert set(backward(out_grads)) == {"data", "state", "state_cell"}
        with pytest.raises(ValueError, match=r"^grad_req of lstm\d+_l0_i2h_weight must be 'write' or 'add'"):
            layer.l0_i2h_weight.grad()
        layer.l0_i2h_weight.grad_req = "write"
        assert not layer.l0_i2h_weight.grad().any()

    def test_parameters_with_different_requests(self):
        layer, backward, out_grads = self.trained()
        backward(out_grads)
        once = {parameter.name: parameter.grad().copy() for parameter in layer.params.values()}
        layer.l0_i2h_weight.grad_req, layer.l1_h2h_bias.grad_req = "add", "null"
        backward(out_grads)
        backward(out_grads)
        for parameter in layer.params.values():
            if parameter.grad_req != "null":
                times = 2 if parameter.grad_req == "add" else 1
                np.testing.assert_array_equal(parameter.grad(), times * once[parameter.name])

    @pytest.mark.parametrize("between", ["null", "add", "write"])
    def test_a_change_of_the_request_clears_the_gradient(self, between):
        layer, backward, out_grads = self.trained()
        parameter = layer.l1_h2h_bias
        backward(out_grads)
        once = parameter.grad().copy()
        parameter.grad_req = between
        parameter.grad_req = "write"
        assert np.array_equal(parameter.grad(), once) == (between == "write")
        parameter.grad_req = "add"
        assert not parameter.grad().any()
        backward(out_grads)
        assert_same_bits(parameter.grad(), once)

    def test_initialization_clears_gradients_and_loading_keeps_them(self):
        layer, backward, out_grads = self.trained()
        backward(out_grads)
        once = flat_gradients(layer, self.problem.spec)
        layer.load_parameters(layer.save_parameters())
        assert_same_bits(flat_gradients(layer, self.problem.spec), once)
        layer.initialize(force_reinit=True)
        assert not flat_gradients(layer, self.problem.spec).any()

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_requests_for_inputs_and_states(self, layout):
        _, backward, out_grads = self.trained(layout)
        all_gradients = backward(out_grads)
        assert list(backward(out_grads, "null")) == []
        assert list(backward(out_grads, {"state_cell": "write"})) == ["state_cell"]
        assert list(backward(out_grads, ["write", "null", "null"])) == ["data"]
        buffers = {name: np.ones_like(gradient) for name, gradient in all_gradients.items()}
        grad_reqs = {"data": "add", "state": "write", "state_cell": "add"}
        gradients = backward(out_grads, grad_reqs, buffers)
        assert np.shares_memory(gradients["data"], buffers["data"])
        for name, gradient in all_gradients.items():
            np.testing.assert_array_equal(buffers[name], gradient + (1 if grad_reqs[name] == "add" else 0))

    def test_forwards_before_their_backwards(self):
        layer, backward, out_grads = self.trained()
        backward(out_grads)
        once = flat_gradients(layer, self.problem.spec)
        _, other_backward = layer.train(self.problem.x[:2] + 1)
        other_backward(out_grads[0][:2])
        backward(out_grads)
        assert_same_bits(flat_gradients(layer, self.problem.spec), once)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (lambda y, s: y, TypeError, "out_grads must be a pair: the output's, and a list of the states'; got"),
            (lambda y, s: (y, *s), ValueError, "out_grads must be a pair.*got 3"),
            (lambda y, s: (y[1:], s), ValueError, r"out_grads\[0\] must have shape \(3, 4, 6\), as layout NTC has it"),
            (lambda y, s: (y, s[:1]), ValueError, r"out_grads\[1\] must be a list of 2 arrays; got 1"),
            (lambda y, s: (y, s[0]), ValueError, r"out_grads\[1\] must be a list of 2 arrays; got 1"),
            (lambda y, s: (y, 3), TypeError, r"out_grads\[1\] must be a list of 2 arrays; got int"),
            (lambda y, s: (y, [s[0], s[1][:1]]), ValueError, r"out_grads\[2\] must have shape \(2, 3, 6\)"),
        ],
    )
    def test_bad_out_grads(self, change, error, message):
        _, backward, out_grads = self.trained("NTC")
        with pytest.raises(error, match=f"^{message}"):
            backward(change(*out_grads))

    def test_bad_arguments(self):
        _, backward, out_grads = self.trained()
        for options, error, message in (
            ({"grad_req": "wrote"}, ValueError, "grad_req: data must be one of write, add, null; got 'wrote'"),
            ({"grad_req": {"parameters": "add"}}, ValueError, "grad_req must have keys among data, state, state_cell"),
            ({"grad_req": ["write"]}, ValueError, "grad_req must be .* a list or a dict .* got 1"),
            ({"args_grad": 3}, TypeError, "args_grad must be None, or a list or a dict"),
            ({"args_grad": {"data": np.ones((3, 4, 5), "f4")}}, ValueError, r"args_grad: data must have shape"),
            ({"args_grad": {"data": [1.0]}}, TypeError, "args_grad: data must be a NumPy array; got list"),
        ):
            with pytest.raises(error, match=f"^{message}"):
                backward(out_grads, **options)

    def test_a_cast_before_backward(self):
        layer, backward, out_grads = self.trained()
        before = backward(out_grads)
        layer.cast("float64")
        for requests in ("write", "add", "write and null"):
            layer.collect_params().setattr("grad_req", requests.split()[0])
            layer.l0_i2h_bias.grad_req = requests.split()[-1]
            with pytest.raises(TypeError, match=r"^the layer must have dtype float32, as in .*it was cast to float64"):
                backward(out_grads)
        layer.collect_params().setattr("grad_req", "null")
        assert_same_bits(tuple(backward(out_grads).values()), tuple(before.values()))

    def test_bad_requests_of_parameters(self):
        layer, _, _ = self.trained()
        with pytest.raises(ValueError, match=r"^grad_req must be one of write, add, null; got 'no'"):
            layer.l0_i2h_bias.grad_req = "no"
        with pytest.raises(TypeError, match=r"^grad_req must be one of write, add, null; got None"):
            layer.l0_i2h_bias.grad_req = None
        with pytest.raises(ValueError, match=r"^name must be 'grad_req'; got 'lr_mult'"):
            layer.collect_params().setattr("lr_mult", "write")
