"""How a member of a foreign team of threads runs its part of a job."""

from __future__ import annotations

from llvmlite import ir

from fusedrnn.jit.builder import I32, I64, Function, Module, Value
from fusedrnn.jit.struct import Struct

TEAM = Struct("job", "call", "members", "number_of_threads", "thread_number", "failed")
"""A job, its arguments and how many it is for; functions that tell how many threads there are, and which one this is;
whether there were not as many."""


def build_member() -> Module:
    """The module of ``member(team)``, which every thread of the team calls."""
    module = Module("member")
    f = Function(module, "member", ["team"], exported=True)
    (team,) = f.arguments
    t = TEAM.read(f, team)
    with f.if_else(_asked(f, t.number_of_threads).equals(t.members)) as (all_there, too_few):
        with all_there:
            f.call_address(t.job, t.call, _asked(f, t.thread_number))
        with too_few:
            f.store(1, team + 8 * TEAM.index["failed"])
    f.ret()
    return module


def _asked(f: Function, function: Value) -> Value:
    """What a C function without arguments says, an int."""
    kind = ir.FunctionType(I32, [])
    handle = f.builder.inttoptr(function.ir, kind.as_pointer())
    return Value(f, f.builder.sext(f.builder.call(handle, []), I64))
