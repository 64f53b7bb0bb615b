"""What tests of benchmarks share: a small case, rows with given times, contenders that go wrong, a clock."""

from __future__ import annotations

from fusedrnn.bench import contenders
from fusedrnn.bench.contenders import FUSED, PHASES
from fusedrnn.bench.rows import BenchConfig, Row
from fusedrnn.bench.timing import Timing
from fusedrnn.testing.cases import Case

SMALL = Case("small-test", 6, 3, 5, 7, 2, True)


def measured(case: Case, mode: str, seconds: dict[str, tuple[float, ...]], phase: str = "inference") -> Row:
    flops = case.spec(mode).flops(case.T, case.N, training=PHASES[phase].training)
    timings = {name: Timing(values) for name, values in seconds.items()}
    return Row(case, mode, phase, "float32", 2, flops, peak=200.0, timings=timings)


def small_config(modes=("lstm",), phase="inference", **options) -> BenchConfig:
    return BenchConfig([SMALL], modes, [PHASES[phase]], budget=0.0, pause=0.0, **options)


def spoiled(monkeypatch, spoil, calls_before: int = 0, phase="inference", make=contenders.non_fused) -> None:
    """Replace the fused contender of a phase by one whose results are wrong after ``calls_before`` calls."""
    makers = PHASES[phase].makers

    def wrong_maker(work):
        run, calls = make(work), iter(range(10**9))

        def wrong(batch):
            results = {name: array.copy() for name, array in run(batch)().items()}
            if next(calls) >= calls_before:
                spoil(results)
            return lambda: results

        return wrong

    monkeypatch.setitem(makers, FUSED, wrong_maker)


def set_element(name: str, value: float):
    def spoil(results) -> None:
        results[name].flat[-1] = value

    return spoil


class Clock:
    """A clock that only calls advance."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def call(self, name: str, seconds: float):
        def run() -> int:
            self.now += seconds
            self.log.append(name)
            return len(self.log)

        return run

    def __call__(self) -> float:
        return self.now
