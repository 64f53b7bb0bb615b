"""Workers for peers: one behaves well, and each of the others misbehaves in one way."""

from __future__ import annotations

from fusedrnn.testing.cases import Case

SMALL = Case("small-test", 5, 3, 4, 6)


# A worker like that of a library, for one layer of rnn_tanh in one direction, inference only.
RIGHT = """
import numpy as np

def facts():
    return {"fake": "1.0"}

def prepare(work):
    if work.training:
        work.refuse("inference only")
    print("what a library prints")
    w_x, w_h, b_x, b_h = work.weights(0, "l")

    def run():
        h, y = work.states[0][0], []
        for x in work.x:
            h = np.tanh(x @ w_x.T + b_x + h @ w_h.T + b_h)
            y.append(h)
        return np.array(y), [h[None]]

    return run, lambda result: work.outputs(*result)
"""


WRONG = RIGHT.replace("h @ w_h.T + b_h", "h @ w_h.T")


DEAD = RIGHT.replace(
    'print("what a library prints")', 'import os, sys\n    print("no more", file=sys.stderr, flush=True); os._exit(3)'
)


SLOW = RIGHT.replace('print("what a library prints")', "import time; time.sleep(60)")


FAILING = RIGHT.replace('print("what a library prints")', 'raise KeyError("no such\\nlayer")')


# The first two calls, which load makes, are right.
MORTAL = RIGHT.replace("h, y =", "calls.append(0); assert len(calls) < 3, 'worn out'; h, y =").replace(
    "    def run", "    calls = []\n    def run"
)


# Computes in bfloat16 too, where weights and inputs are rounded to their upper 16 bits.
ROUNDING = RIGHT.replace(
    """    def run""",
    """
    def rounded(array):
        if work.compute != "bfloat16":
            return array
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32) + np.uint32(0x8000)
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)

    w_x, w_h, work.x = rounded(w_x), rounded(w_h), rounded(work.x)

    def run""",
)
