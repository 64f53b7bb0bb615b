"""The named workloads."""

from __future__ import annotations

from fusedrnn.testing.cases import CASES, ODD_SIZES


def test_the_cases_are_the_published_workloads():
    ds2, deep = CASES["ds2"], CASES["ds2-5bi"]
    assert (ds2.T, ds2.N, ds2.I, ds2.H, ds2.layers, ds2.bidirectional) == (300, 20, 800, 800, 1, False)
    assert (deep.T, deep.N, deep.I, deep.H, deep.layers, deep.bidirectional) == (300, 20, 800, 800, 5, True)
    assert all(name == case.name and case.who for name, case in CASES.items())
    assert 1 in ODD_SIZES


def test_a_case_makes_the_spec_of_its_sizes():
    spec = CASES["bi2"].spec("gru", "float64")
    assert (spec.mode, spec.dtype) == ("gru", "float64")
    assert (spec.input_size, spec.hidden_size, spec.num_layers, spec.num_directions) == (256, 256, 2, 2)
