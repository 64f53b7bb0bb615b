"""Random sequences that run as streams, and their oracle: one call on each whole sequence."""

import numpy as np

from fusedrnn import NetworkOp, NetworkSpec, RNNOp
from fusedrnn.cell import cell, layer_norm, sigmoid, tanh
from problems import assert_same_bits

T = 23


@cell(gates="z n o", states="h m", vectors="decay", output="y")
def written(x, recurrent, s, p):
    """A cell as users write them: an output that is no state, normalization, two products."""
    a = recurrent(s.h)
    z, n = layer_norm(x.z + a.z, x.n + a.n)
    h = s.h + sigmoid(z) * (tanh(n) - s.h)
    m = 0.5 * (sigmoid(p.decay) * s.m + h)
    return tanh(x.o + recurrent(m * s.h).o) * h, h, m


class Sequences:
    """Random sequences, whose streams join, advance in chunks and leave; ``outputs`` are joined in the end."""

    def __init__(self, op, streams, seed, count):
        self.op, self.streams, self.rng = op, streams, np.random.default_rng(seed)
        spec = op.spec
        self.params = streams.params
        self.x = self.rng.standard_normal((T, count, spec.input_size)).astype(spec.dtype)
        self.initial = random_states(self.rng, spec, count)
        self.ids, self.done, self.outputs = {}, np.zeros(count, int), [[] for _ in range(count)]

    def turn(self):
        """Join, step and leave a few."""
        rng = self.rng
        for index in rng.permutation(np.flatnonzero(self.done == 0)):
            if index not in self.ids:
                try:
                    self.ids[index] = self.streams.join(rows_of(self.initial, [index]))
                except RuntimeError:
                    break
        steps = int(rng.choice([1, 1, 1, 2, 5]))
        ready = [index for index in self.ids if self.done[index] + steps <= T]
        if ready:
            chosen = rng.permutation(ready)[: rng.integers(1, len(ready) + 1)]
            x = np.stack([self.x[self.done[index] : self.done[index] + steps, index] for index in chosen], axis=1)
            y = self.streams.step([self.ids[index] for index in chosen], x)
            for row, index in enumerate(chosen):
                self.outputs[index].append(y[:, row])
            self.done[chosen] += steps
        for index in [index for index in self.ids if self.done[index] == T]:
            self.streams.leave(self.ids.pop(index))

    def run(self):
        """All of them, to the end."""
        while (self.done < T).any():
            self.turn()

    def check(self, compare=assert_same_bits):
        expected = self.op.forward(self.x, self.params, self.initial)[0]
        compare(np.stack([np.concatenate(parts) for parts in self.outputs], axis=1), expected)


def op_of(spec, backend=None):
    """An op of an RNNSpec or a NetworkSpec."""
    return (NetworkOp if isinstance(spec, NetworkSpec) else RNNOp)(spec, backend)


def random_params(spec, seed=5):
    return (np.random.default_rng(seed).standard_normal(spec.layout.size) * 0.3).astype(spec.dtype)


def random_states(rng, spec, count):
    """Initial states of so many sequences, as an op of that spec takes them."""
    if isinstance(spec, NetworkSpec):
        return tuple(random_states(rng, layer, count) for layer in spec.layers)
    return tuple(rng.uniform(-1, 1, shape).astype(spec.dtype) for shape in spec.state_shape(count))


def rows_of(states, index):
    """These rows of all states (L, N, size), which may be nested tuples."""
    if isinstance(states, (tuple, list)):
        return tuple(rows_of(entry, index) for entry in states)
    return states[:, index]
