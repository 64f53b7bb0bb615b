"""The operator in several formats of GEMM operands, as contenders of one row."""

from __future__ import annotations

from collections.abc import Sequence

from fusedrnn.bench.contenders import Phase
from fusedrnn.bench.data import FUSED, IN_FORMAT, Contender, Workload
from fusedrnn.bench.rows import BenchConfig

Group = tuple[Workload, dict[str, Contender]]
"""Contenders, and the workload that they run."""


def format_fields(formats: Sequence[str]) -> dict[str, object]:
    """The fields of BenchConfig for these formats; none for float32 alone, which needs no comparison."""
    if list(formats) == ["float32"]:
        return {}
    contenders = {IN_FORMAT[number_format]: number_format for number_format in formats}
    return {"contenders": tuple(contenders), "formats": contenders}


def make_contenders(config: BenchConfig, phase: Phase, work: Workload) -> tuple[list[Group], dict[str, str]]:
    """A group for each format, and the reasons why other formats have no group."""
    groups: list[Group] = []
    failures = {}
    for name, number_format in config.formats.items():
        in_format = work.in_format(number_format)
        if phase.training and not in_format.spec.is_trainable:
            failures[name] = f"{number_format} is a format of inference"
            continue
        groups.append((in_format, {name: phase.makers[FUSED](in_format)}))
    return groups, failures
