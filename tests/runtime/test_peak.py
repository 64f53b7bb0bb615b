"""The measured peak: threads that run at once, the best sample, rates that make sense."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from fusedrnn import env
from fusedrnn.jit.compiler import assembly
from fusedrnn.jit.host import current_target, emulated
from fusedrnn.jit.target import is_x86, known_targets
from fusedrnn.runtime import peak, peak_instructions
from fusedrnn.runtime.buffers import aligned_empty
from fusedrnn.runtime.peak import PEAK, RESULT_BYTES, PeakSample, is_spread, measure_peak, measure_reading, sample_peak
from fusedrnn.runtime.peak_instructions import (
    FMA,
    INT16_PAIRS,
    TDPBF16PS,
    TDPBUSD,
    VDPBF16PS,
    VPDPBUSD,
)


class Samples:
    """Samples in a given order, the last again and again, and a count of those that were taken."""

    def __init__(self, *samples: PeakSample) -> None:
        self.samples, self.taken = samples, 0

    def __call__(self, dtype: str, threads: int) -> PeakSample:
        assert (dtype, threads) == ("float32", 2)
        self.taken += 1
        return self.samples[min(self.taken, len(self.samples)) - 1]


def test_peak_is_the_best_sample():
    samples = Samples(PeakSample(120.0, True), PeakSample(200.0, True), PeakSample(90.0, True))
    assert measure_peak("float32", 2, samples) == 200.0
    assert samples.taken == peak._SAMPLES


def test_samples_of_threads_that_share_a_processor_do_not_count():
    """However many samples begin so, and however fast they seem."""
    shared = [PeakSample(300.0, False)] * (peak._SAMPLES + 3)
    samples = Samples(*shared, PeakSample(190.0, True))
    assert measure_peak("float32", 2, samples) == 190.0
    assert samples.taken == len(shared) + 1


def test_samples_of_threads_that_never_spread_out_count():
    samples = Samples(PeakSample(90.0, False), PeakSample(100.0, False))
    assert measure_peak("float32", 2, samples) == 100.0
    assert samples.taken == peak._MAX_SAMPLES


@pytest.mark.parametrize(
    ("processors", "available", "spread"),
    [
        ([[0, 0], [1, 1]], 2, True),
        ([[0, 1], [1, 0]], 2, True),
        ([[0, 0], [0, 1]], 2, False),
        ([[0, 1], [1, 1]], 2, False),
        ([[0, 0], [0, 0]], 1, True),
        ([[0, 0], [0, 0], [1, 1]], 2, True),
        ([[0, 0], [0, 0], [1, 1]], 3, False),
        ([[-1, -1], [-1, -1]], 2, True),
    ],
)
def test_spread_means_different_processors(monkeypatch, processors, available, spread):
    """At the beginning and at the end; where there are fewer processors than threads, all have to be in use."""
    monkeypatch.setattr(env, "processors", lambda: available)
    assert is_spread(np.array(processors, np.int64), len(processors)) is spread


_TOGETHER = """
import json
import numpy as np
from fusedrnn.jit.host import current_target, emulated
from fusedrnn.runtime import peak

seen = []
known = peak.is_spread
peak.is_spread = lambda processors, threads: seen.append(processors.tolist()) or known(processors, threads)
samples = [peak.sample_peak("float32", 2) for _ in range(30)]
print(json.dumps({"seen": seen, "spread": [sample.spread for sample in samples]}))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or env.processors() < 2, reason="needs two processors with known numbers"
)
def test_two_threads_of_a_new_process_run_on_two_processors():
    result = subprocess.run([sys.executable, "-c", _TOGETHER], capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    numbers = {number for processors in report["seen"] for of_thread in processors for number in of_thread}
    assert min(numbers) >= 0 and len(numbers) >= 2
    # Other processes may take a processor away at any time, but not all the time.
    assert any(report["spread"])


def test_threads_wait_for_one_another():
    """Threads that the system has put on one processor would else work one after the other, at half the rate."""
    results = aligned_empty((3 * RESULT_BYTES,), np.uint8)
    results[:] = 0
    timed = peak._TimedJob(PEAK, 2, results=results.ctypes.data)
    job = peak._load_peak(FMA, "float32", current_target())
    first = threading.Thread(target=job, args=(timed._arguments.ctypes.data, 0))
    first.start()
    first.join(0.3)
    waiting = first.is_alive()
    job(timed._arguments.ctypes.data, 1)
    first.join(60)
    assert waiting and not first.is_alive()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("number_format", ["float32", "float64", "bfloat16", "int8"])
def test_sample_is_a_plausible_rate(number_format, threads):
    assert 0.0 < sample_peak(number_format, threads).gflops < 1e5


LOOPS = [
    (FMA, "avx512", "vfmadd...ps .*zmm", 12, 2 * 16),
    (FMA, "avx2", "vfmadd...ps .*ymm", 12, 2 * 8),
    (INT16_PAIRS, "avx512", "vpmaddwd .*zmm", 13, 4 * 16),
    (INT16_PAIRS, "avx2", "vpmaddwd .*ymm", 13, 4 * 8),
    (INT16_PAIRS, "generic", "pmaddwd .*xmm", 13, 4 * 4),
    (VDPBF16PS, "avx512-bf16", "vdpbf16ps .*zmm", 12, 4 * 16),
    (VPDPBUSD, "avx512-vnni", "vpdpbusd .*zmm", 12, 8 * 16),
    (VPDPBUSD, "avx2-vnni", "vpdpbusd .*ymm", 12, 8 * 8),
    (TDPBF16PS, "avx512-amx", "tdpbf16ps .*tmm", 6, 2 * 16 * 16 * 32),
    (TDPBUSD, "avx512-amx", "tdpbusd .*tmm", 6, 2 * 16 * 16 * 64),
]


@pytest.mark.skipif(not is_x86(), reason="these are instructions of x86")
@pytest.mark.parametrize(("instruction", "target", "pattern", "count", "operations"), LOOPS)
def test_the_loop_holds_the_instruction_and_no_memory(instruction, target, pattern, count, operations):
    """Each as often as it is counted, with that many operations: multiplications and additions."""
    (compiled_for,) = (known for known in known_targets() if known.name == target)
    module = peak.build_peak("peak", instruction, "float32", compiled_for)
    loop = innermost_loop(assembly(module, compiled_for))
    assert sum(re.search(pattern, line) is not None for line in loop) == count, loop
    assert not [line for line in loop if "(" in line], loop
    assert instruction.operations(compiled_for, "float32") == count * operations


def innermost_loop(text: str) -> list[str]:
    """The lines from the last label to a jump back to it, with tabs as spaces."""
    lines = text.split("\npeak:")[1].replace("\t", " ").splitlines()
    jumps = [(number, match[1]) for number, line in enumerate(lines) if (match := re.search(r" j\w+ (\.L\w+)", line))]
    for number, label in jumps:
        begin = next(index for index, line in enumerate(lines) if line.startswith(f"{label}:"))
        if begin < number:
            return lines[begin + 1 : number]
    raise AssertionError("no loop")


@pytest.mark.skipif(not is_x86(), reason="these are instructions of x86")
def test_tiles_are_released():
    (target,) = (known for known in known_targets() if known.has_tiles)
    text = assembly(peak.build_peak("peak", TDPBUSD, "float32", target), target)
    assert text.index("ldtilecfg") < text.index("tdpbusd") < text.rindex("tilerelease")


_PERMISSION = """
from fusedrnn.jit import amx
from fusedrnn.jit.host import dot_product_sets
before = amx.has_permission()
print(before, amx.request_permission(), amx.has_permission(), dot_product_sets()["AMX-INT8"])
"""


def test_permission_is_had_only_on_request():
    """A processor without AMX refuses, and an old system has no such call."""
    result = subprocess.run([sys.executable, "-c", _PERMISSION], capture_output=True, text=True, check=True)
    before, requested, after, present = (word == "True" for word in result.stdout.split())
    assert requested is after and not before and (present or not after)


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_is_a_plausible_rate(threads):
    assert 0.0 < measure_reading(1 << 14, threads, 1 << 20, 3) < 1e5


def test_the_peak_of_a_format_is_that_of_the_kernels_instruction():
    """Dot products where the target has them; an emulated one runs other instructions."""
    targets = {target.name: target for target in known_targets()}
    if not is_x86():
        return
    of = peak_instructions.instruction_of
    assert (of("int8", targets["avx512-bf16"]), of("bfloat16", targets["avx512-bf16"])) == (VPDPBUSD, VDPBF16PS)
    assert (of("int8", targets["avx512-amx"]), of("bfloat16", targets["avx512-amx"])) == (TDPBUSD, TDPBF16PS)
    assert (of("int8", targets["avx2-vnni"]), of("bfloat16", targets["avx2-vnni"])) == (VPDPBUSD, FMA)
    assert (of("int8", targets["avx2"]), of("float32", targets["avx512-bf16"])) == (INT16_PAIRS, FMA)
    assert of("int8", emulated(targets["avx2-vnni"])) == INT16_PAIRS
