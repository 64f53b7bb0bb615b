"""The catalogue against the package torchrecurrent: its cells with the same weights, in float64, with autograd.

Where it computes in another way than the papers the rest is compared: LEM, where y reads the z of the step before. Not
compared are NAS, where a product of the paper is a sum; SCRN, whose output there has a layer of its own that is
recurrent; and what is not in the catalogue: MiRU2, and tauGRU, which remembers states of many steps before.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from fusedrnn import RNNSpec, cells
from oracles import reference_results
from problems import Problem

torchrecurrent = pytest.importorskip("torchrecurrent", reason="needs torchrecurrent, of the extra test")

T, N, I, H = 4, 3, 5, 6
NOT_COMPARED = {"NAS", "SCRN", "MiRU2", "tauGRU"}


class HardSigmoid(torch.nn.Module):
    """With Theano's slope, which the paper's code has; torch's is 1 / 6."""

    def forward(self, x):
        return torch.clamp(0.2 * x + 0.5, 0, 1)


@dataclass
class Case:
    """A cell of theirs.

    Attributes:
        name: Of their class, without Cell.
        x: Their blocks of input weights in the order of our gates, as ``name:number``.
        h: The same of recurrent weights.
        own: From their parameters to those of ours that are not such blocks.
        options: Of their class.
        theirs: From our states to theirs.
        ours: From their states to ours.
        fixed: Values for their parameters that ours has not, or where it computes in another way.
    """

    name: str
    x: str
    h: str = ""
    own: object = lambda p: {}
    options: dict = field(default_factory=dict)
    theirs: object = lambda *states: states
    ours: object = lambda *states: states
    fixed: dict = field(default_factory=dict)


def summed_bias(p):
    return {"i2h_bias": p["bias_ih"] + p["bias_hh"]}


def constants(**values):
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}


def scaled_candidate(p):
    """Their candidate is tanh(g), that of the paper 2 tanh(g / 2)."""
    scale = torch.ones(3 * H, dtype=torch.float64)
    scale[H : 2 * H] = 2
    return {
        "i2h_weight": p["weight_ih"] * scale[:, None], "h2h_weight": p["weight_hh"] * scale[:, None],
        "i2h_bias": p["bias_ih"] * scale, "h2h_bias": p["bias_hh"] * scale,
    }  # fmt: skip


def previous_input(p):
    return {"i2h_weight": torch.cat([p["weight_ih"], p["weight_hh"]], dim=1), **summed_bias(p)}


EPSILON, STEP = {"epsilon": 0.3, "gamma": 0.2}, {"dt": 0.4, "gamma": 0.7, "epsilon": 1.3}
CASES = {
    "antisymmetric_rnn": Case(
        "AntisymmetricRNN", "ih:0", "hh:0", options=EPSILON,
        own=lambda p: {"h2h_weight": p["weight_hh"] - p["weight_hh"].T, **constants(**EPSILON)},
    ),
    "gated_antisymmetric_rnn": Case(
        "GatedAntisymmetricRNN", "ih:1 ih:0", "hh:0", options=EPSILON,
        own=lambda p: {
            "h2h_weight": p["weight_hh"] - p["weight_hh"].T, "h2h_bias": torch.zeros(H),
            "i2h_bias": torch.cat([p["bias_ih"][H:] + p["bias_hh"], p["bias_ih"][:H]]), **constants(**EPSILON),
        },
    ),
    "atr": Case("ATR", "ih:0", "hh:0"),
    "brc": Case(
        "BR", "ih:0 ih:1 ih:2",
        own=lambda p: {
            "w_a": p["weight_hh"][:H], "w_c": p["weight_hh"][H:],
            "i2h_bias": p["bias_ih"] + torch.cat([p["bias_hh"], torch.zeros(H)]),
        },
    ),
    "nbrc": Case("NBR", "ih:0 ih:1 ih:2", "hh:0 hh:1"),
    "chaos_free_network": Case("CFN", "ih:0 ih:1 ih:2", "hh:0 hh:1"),
    "co_rnn": Case("coRNN", "ih:0", "hh:0 ch:0", options=STEP, own=lambda p: constants(**STEP)),
    "fast_rnn": Case("FastRNN", "ih:0", "hh:0", own=lambda p: {"alpha": p["alpha"], "beta": p["beta"]}),
    "fast_grnn": Case(
        "FastGRNN", "ih:0", "hh:0", options={"nonlinearity": "sigmoid"},
        own=lambda p: {
            "i2h_bias": torch.zeros(H), "h2h_bias": torch.zeros(H), "zeta": p["zeta"], "nu": p["nu"],
            "bias_z": p["bias_ih"][:H] + p["bias_hh"][:H], "bias_h": p["bias_ih"][H:] + p["bias_hh"][H:],
        },
    ),
    "ind_rnn": Case(
        "IndRNN", "ih:0", options={"nonlinearity": "relu"}, own=lambda p: {"u": p["vector_u"], **summed_bias(p)}
    ),
    "intersection_rnn": Case("IntersectionRNN", "ih:0 ih:1 ih:2 ih:3", "hh:0 hh:1 hh:2 hh:3"),
    "janet": Case(
        "JANET", "ih:0 ih:1", "hh:0 hh:1", theirs=lambda h: (h, h), ours=lambda h, c: (h,), fixed={"beta": 1.0}
    ),
    "lem": Case("LEM", "ih:1 ih:0 ih:2 ih:3", "hh:1 hh:0 hh:2 ch:0", fixed={"weight_ch": 0.0}),
    "li_gru": Case("LiGRU", "ih:0 ih:1", "hh:0 hh:1"),
    "light_ru": Case("LightRU", "ih:1 ih:0", "hh:0"),
    "mc_lstm": Case("MCLSTM", "ih:0 ih:1 ih:2 ih:3 ih:4", "hh:0 hh:1 hh:2 hh:3 hh:4"),
    "minimal_gated_unit": Case("MGU", "ih:0 ih:1", "hh:0 hh:1"),
    "minimal_rnn": Case("MinimalRNN", "ih:0", "hh:0 mm:0"),
    "mi_ru": Case(
        "MiRU1", "ih:0 ih:1", "hh:0 hh:1", options={"update_coefficient": 0.3}, own=lambda p: constants(rate=0.3)
    ),
    "multiplicative_lstm": Case("MultiplicativeLSTM", "ih:0 ih:1 ih:2 ih:3 ih:4", "hh:0 mh:0 mh:1 mh:2 mh:3"),
    "mut1": Case("MUT1", "ih:1 ih:2 ih:0", "hh:0 hh:1"),
    "mut2": Case("MUT2", "ih:0 ih:1 ih:2", "hh:0 hh:1 hh:2"),
    "mut3": Case("MUT3", "ih:1 ih:0 ih:2", "hh:1 hh:0 hh:2"),
    "original_lstm": Case(
        "OriginalLSTM", "ih:0 ih:1 ih:2", "hh:0 hh:1 hh:2", own=scaled_candidate,
        theirs=lambda h, c: (h, c / 2), ours=lambda h, c: (h, 2 * c),
    ),
    "lstm": Case(
        "PeepholeLSTM", "ih:0 ih:1 ih:2 ih:3", "hh:0 hh:1 hh:2 hh:3", own=lambda p: {"peephole_weight": p["weight_ph"]}
    ),
    "ran": Case(
        "RAN", "ih:1 ih:2 ih:0", "hh:0 hh:1", own=lambda p: {"i2h_bias": torch.cat([p["bias_ih"], torch.zeros(H)])}
    ),
    "res_lstm": Case(
        "ResLSTM", "ih:0 ih:1 ih:2 ih:3 res:0", "hh:0 hh:1 hh:2 hh:3 proj:0",
        own=lambda p: dict(zip(("v_i", "v_f", "v_o"), p["weight_ph"].split(H), strict=True)),
    ),
    "sgrn": Case("SGRN", "ih:0", "hh:0"),
    "sgu": Case("SGU", "ih:0 ih:1", "hh:0 hh:1", options={"gate_nonlinearity": HardSigmoid()}),
    "dsgu": Case("DSGU", "ih:0 ih:1", "hh:0 hh:1 ho:0", options={"gate_nonlinearity": HardSigmoid()}),
    "star": Case("STAR", "ih:1 ih:0", "hh:0"),
    "t_rnn": Case("TRNN", "ih:0 ih:1"),
    "t_gru": Case("TGRU", "ih:0 ih:1 ih:2", own=previous_input),
    "t_lstm": Case("TLSTM", "ih:0 ih:1 ih:2", own=previous_input),
    "ugrnn": Case("UGRNN", "ih:1 ih:0", "hh:1 hh:0"),
    "unicornn": Case(
        "UnICORNN", "ih:0", options={"dt": 0.3, "alpha": 1.5, "recurrent_bias": True},
        own=lambda p: {"w": p["weight_hh"], "c": p["weight_ch"], **summed_bias(p), **constants(dt=0.3, alpha=1.5)},
    ),
    "wmc_lstm": Case("WMCLSTM", "ih:0 ih:1 ih:2 ih:3", "hh:0 hh:1 hh:2 hh:3 mh:0 mh:1 mh:2"),
}  # fmt: skip


def test_every_cell_of_theirs_is_known():
    theirs = {name.removesuffix("Cell") for name in torchrecurrent.__all__}
    assert theirs == {case.name for case in CASES.values()} | NOT_COMPARED


def random_tensor(rng, shape):
    return torch.tensor(rng.uniform(-0.8, 0.8, shape), requires_grad=True)


def stacked(p, kind, blocks):
    """Blocks of their weights or biases one below the other; zeros where they have no bias."""
    parts = []
    for block in blocks.split():
        name, number = block.split(":")
        tensor = p.get(f"{kind}_{name}")
        parts.append(torch.zeros(H) if tensor is None else tensor.split(H)[int(number)])
    return torch.cat(parts)


def flat_parameters(case, p, layout):
    """Ours, as functions of theirs."""
    parts, blocks = case.own(p), {"i2h": case.x, "h2h": case.h}
    for entry in layout:
        if entry.kind not in parts:
            side, kind = entry.kind.split("_")
            parts[entry.kind] = stacked(p, kind, blocks[side])
    return torch.cat([parts[entry.kind].reshape(-1).double() for entry in layout])


def their_run(cell, x, states):
    """The output of every step, and the final states as a tuple."""
    has_own_output = any(base.__name__.startswith("Decoupled") for base in type(cell).__mro__)
    outputs, state = [], states if len(states) > 1 else states[0]
    for inputs in x:
        result = cell(inputs, state)
        if has_own_output:
            output, state = result
        else:
            output, state = result[0] if isinstance(result, tuple) else result, result
        outputs.append(output)
    return torch.stack(outputs), state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("name", CASES)
def test_against_torchrecurrent(name):
    case, rng = CASES[name], np.random.default_rng([*name.encode()])
    pairs_of_inputs = case.own is previous_input
    features = H if name == "intersection_rnn" else I
    cell = getattr(torchrecurrent, f"{case.name}Cell")(features, H, **case.options).double()
    mode, options = ("lstm", {"peepholes": True}) if name == "lstm" else (getattr(cells, name), {})
    spec = RNNSpec(mode, features * (1 + pairs_of_inputs), H, dtype="float64", **options)
    p = dict(cell.named_parameters())
    with torch.no_grad():
        for label, parameter in p.items():
            fixed = case.fixed.get(label)
            parameter.copy_(torch.tensor(fixed) if fixed is not None else random_tensor(rng, parameter.shape))
    x, states = random_tensor(rng, (T, N, features)), [random_tensor(rng, (N, H)) for _ in spec.state_names]
    before = [torch.zeros(N, features).double()] * pairs_of_inputs

    y, final = their_run(cell, x, (*case.theirs(*states), *before))
    results = [y, *case.ours(*final[: len(final) - pairs_of_inputs])]
    directions = [torch.tensor(rng.standard_normal(result.shape)) for result in results]
    leaves = [x, *states, *(parameter for label, parameter in p.items() if label not in case.fixed)]
    expected = [*results, *torch.autograd.grad(results, leaves, directions, retain_graph=True)]

    inputs = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=2) if pairs_of_inputs else x
    params = flat_parameters(case, p, spec.layout)
    own_leaves = [inputs, params, *states]
    arrays = [tensor.detach().numpy() for tensor in (*own_leaves, *directions)]
    own_x, own_params, *own_states = arrays[: len(own_leaves)]
    dy, *dstates = arrays[len(own_leaves) :]
    problem = Problem(
        spec, own_x, own_params, tuple(one[None] for one in own_states), None, dy, tuple(one[None] for one in dstates)
    )
    actual = reference_results(problem)
    dx, dparams, dinitial = actual.gradients
    own_gradients = [torch.tensor(array) for array in (dx, dparams, *(one[0] for one in dinitial))]
    through_own = torch.autograd.grad(own_leaves, leaves, own_gradients)
    actual = [*map(torch.tensor, (actual.y, *(one[0] for one in actual.states))), *through_own]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-11)
