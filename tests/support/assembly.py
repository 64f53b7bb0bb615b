"""The assembly of emitted modules, taken apart."""

import re
from functools import cache

from fusedrnn.engines.cpu.kernels.common_kernels import build_common, build_common_training
from fusedrnn.jit import compiler
from fusedrnn.jit.target import is_x86, known_targets

TARGETS = [target for target in known_targets() if target.base is None] if is_x86() else []
"""The targets of kernels in float32 and float64."""
COMMON = {"nn": build_common, "tn": build_common_training}


@cache
def common_functions(kind, dtype, target):
    """The assembly of the common module with the micro-kernels of that kind."""
    return parsed(COMMON[kind](dtype, target), target)


def parsed(module, target):
    text = compiler.assembly(module, target)
    bodies = re.findall(r"^(\w+):\n(.*?)^\.Lfunc_end\d+:$", text, re.MULTILINE | re.DOTALL)
    return {name: [line.strip() for line in body.splitlines()] for name, body in bodies}


def loops(lines):
    """The innermost loops: the lines between a label and the jump back to it, without another label."""
    bodies, label, body = [], None, []
    for line in lines:
        if match := re.fullmatch(r"(\.LBB\d+_\d+):.*", line):
            label, body = match[1], []
        elif label and re.fullmatch(rf"j\w+\s+{re.escape(label)}", line):
            bodies.append(body)
            label, body = None, []
        else:
            body.append(line)
    return bodies
