"""Runs one job in MXNet; started by make_mxnet.py with the interpreter of MXNet's environment.

``mxnet_worker.py JOB RESULT``: both are .npz files. ``job`` in the first is JSON that says what to do, the rest are its
arrays. Results that are arrays go under their names, facts as JSON under ``facts``.
"""

import json
import os
import sys
import tempfile

import mxnet as mx
import numpy as np

ARGUMENTS = ("data", "parameters", "state", "state_cell")
OUTPUTS = ("y", "h_n", "c_n")
STATES = {"lstm": 2}


def array(value, dtype="float32"):
    return mx.nd.array(value, dtype=dtype)


def operator(job, given):
    """One call of the operator: outputs, final states and the gradients that were asked for."""
    dtype, options = job["dtype"], job["options"]
    names = [name for name in ARGUMENTS if name in given]
    arrays = {name: array(given[name], dtype) for name in names}
    operands = list(arrays.values())
    if "sequence_length" in given:
        operands.append(array(given["sequence_length"], "int32"))
    requests = job["grad_req"]
    if requests is None:
        made = mx.nd.RNN(*operands, state_outputs=True, **options)
    else:
        for name, one in arrays.items():
            if requests[name] != "null":
                one.attach_grad(requests[name])
                one.grad[:] = array(given[f"held_{name}"], dtype)
        with mx.autograd.record():
            made = mx.nd.RNN(*operands, state_outputs=True, **options)
        mx.autograd.backward(made, [array(given[f"d{name}"], dtype) for name in OUTPUTS[: len(made)]])
    found = {name: one.asnumpy() for name, one in zip(OUTPUTS, made, strict=False)}
    if requests is not None:
        found.update({f"d{name}": one.grad.asnumpy() for name, one in arrays.items() if requests[name] != "null"})
    return found


def layer(job, given):
    """A layer of gluon with these parameters: what it saves, computes, and the gradients if it can train."""
    network = getattr(mx.gluon.rnn, job["class"])(prefix="net_", **job["options"])
    network.initialize()
    params = network.collect_params()
    for name, one in params.items():
        one.set_data(array(given[name]))
    with tempfile.TemporaryDirectory() as folder:
        network.save_parameters(os.path.join(folder, "saved"))
        saved = mx.nd.load(os.path.join(folder, "saved"))
    x = array(given["x"])
    states = [array(given[name]) for name in ("h0", "c0") if name in given]
    found = {f"saved:{name}": one.asnumpy() for name, one in saved.items()}
    if job["trains"]:
        x.attach_grad()
        with mx.autograd.record():
            y, final = network(x, states)
        mx.autograd.backward([y, *final], [array(given[f"d{name}"]) for name in OUTPUTS[: 1 + len(final)]])
        found["dx"] = x.grad.asnumpy()
        found.update({f"grad:{name}": one.grad().asnumpy() for name, one in params.items()})
    else:
        y, final = network(x, states)
    found.update({name: one.asnumpy() for name, one in zip(OUTPUTS, [y, *final], strict=False)})
    return found


class Executor:
    """The operator as a symbol, bound: its state outlives a call."""

    def __init__(self, mode, batch):
        self.mode, self.states = mode, STATES.get(mode, 1)
        inputs = [mx.sym.var(name) for name in ARGUMENTS[: 2 + self.states]]
        symbol = mx.sym.RNN(
            *inputs, state_size=4, num_layers=3, mode=mode, bidirectional=True, state_outputs=True
        )
        self.bound = symbol.simple_bind(mx.cpu(), grad_req="write", **self.shapes(batch))

    def shapes(self, batch):
        return {"data": (6, batch, 3), **{name: (6, batch, 4) for name in ARGUMENTS[2 : 2 + self.states]}}

    def fill(self, rng):
        for one in self.bound.arg_dict.values():
            one[:] = array(rng.uniform(-0.5, 0.5, one.shape))
        return self

    def reshaped(self, batch):
        self.bound = self.bound.reshape(allow_up_sizing=True, **self.shapes(batch))
        return self

    def run(self, training):
        made = [one.asnumpy() for one in self.bound.forward(is_train=training)]
        if training:
            self.bound.backward([mx.nd.ones(one.shape) for one in self.bound.outputs])
            made += [one.asnumpy() for one in self.bound.grad_arrays]
        return made

    def difference(self, training=True):
        """How far what it computes is from what one made anew computes of the same."""
        mine = self.run(training)
        fresh = Executor(self.mode, self.bound.arg_dict["data"].shape[1])
        for name, one in self.bound.arg_dict.items():
            fresh.bound.arg_dict[name][:] = one
        return largest_difference(mine, fresh.run(training))


def largest_difference(ones, others):
    return max(float(np.abs(one - other).max()) for one, other in zip(ones, others, strict=True))


def other_batches(mode):
    """Batches of 8, 3, 8 and 1 in turn, forward and backward."""
    rng = np.random.default_rng(0)
    executor = Executor(mode, 8).fill(rng)
    found = [executor.difference()]
    return max(found + [executor.reshaped(batch).fill(rng).difference() for batch in (3, 8, 1)])


def updated_weights(mode):
    """The parameters are overwritten between calls, in inference and in training."""
    executor = Executor(mode, 2).fill(np.random.default_rng(0))
    found = []
    for factor in (0.5, 1.5, 0.7):
        found += [executor.difference(False), executor.difference(True)]
        executor.bound.arg_dict["parameters"][:] *= factor
    return max(found)


def two_forwards(mode):
    """Two forward calls of a hybridized layer before their backwards."""
    rng = np.random.default_rng(0)
    kind = {"lstm": "LSTM", "gru": "GRU"}.get(mode, "RNN")
    options = {"activation": mode[4:]} if kind == "RNN" else {}
    network = getattr(mx.gluon.rnn, kind)(4, 3, bidirectional=True, input_size=3, **options)
    network.initialize(mx.init.Uniform(0.5))
    network.hybridize(static_alloc=True, static_shape=True)
    inputs = [array(rng.standard_normal((5, 2, 3))) for _ in range(3)]

    def gradients(losses):
        found = []
        for loss in losses:
            loss.backward()
            found += [one.grad().asnumpy() for one in network.collect_params().values()]
        return found

    def losses(inputs):
        with mx.autograd.record():
            return [(one * one).sum() for one in [network(x) for x in inputs]]

    together = gradients(losses(inputs))
    one_by_one = [one for x in inputs for one in gradients(losses([x]))]
    return largest_difference(together, one_by_one)


def dropout(mode):
    """How far an output of training with p = 0.5 is from that of inference: 0 would be that nothing is dropped."""
    rng = np.random.default_rng(0)
    bound = Executor(mode, 3).fill(rng).bound.arg_dict
    operands = list(bound.values())
    options = {"state_size": 4, "num_layers": 3, "mode": mode, "bidirectional": True, "p": 0.5}
    calm = mx.nd.RNN(*operands, **options).asnumpy()
    bound["parameters"].attach_grad()
    with mx.autograd.record():
        made = mx.nd.RNN(*operands, **options)
    return largest_difference([made.asnumpy()], [calm])


HISTORIES = {one.__name__: one for one in (other_batches, updated_weights, two_forwards, dropout)}


def main():
    given = dict(np.load(sys.argv[1]))
    job = json.loads(str(given.pop("job")))
    if job["kind"] == "history":
        found = {"facts": json.dumps({"difference": HISTORIES[job["name"]](job["mode"])})}
    else:
        found = {"operator": operator, "layer": layer}[job["kind"]](job, given)
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
