"""A small language over LLVM IR: values with operators, loops and branches as ``with`` blocks.

Addresses are 64-bit integers. Loads and stores name the type they access. Only an ``f.var`` is assigned repeatedly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from llvmlite import ir

I1, I8, I32, I64, VOID, POINTER = *map(ir.IntType, (1, 8, 32, 64)), ir.VoidType(), ir.PointerType()
Module = ir.Module
_NOT_VOLATILE = I1(0)
_Case = TypeVar("_Case")


def is_float(kind: ir.Type) -> bool:
    """Whether a scalar or vector type holds floating-point numbers."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return isinstance(element, (ir.FloatType, ir.DoubleType))


def _operator(on_integers: str, on_floats: str, swap: bool = False) -> Callable[[Value, Operand], Value]:
    """A binary operator from the names of LLVM's instructions for integers and for floating-point numbers."""

    def operate(value: Value, other: Operand) -> Value:
        left, right = value.ir, value.function.as_value(other, value.type).ir
        instruction = getattr(value.function.builder, on_floats if is_float(value.type) else on_integers)
        return Value(value.function, instruction(right, left) if swap else instruction(left, right))

    return operate


def _comparison(relation: str) -> Callable[[Value, Operand], Value]:
    return lambda value, other: value.compare(relation, other)


def _conversion(instruction: str) -> Callable[[Value, ir.Type], Value]:
    return lambda value, kind: Value(value.function, getattr(value.function.builder, instruction)(value.ir, kind))


class Value:
    """A value in a function under construction, with the arithmetic of its type; integers are signed.

    ``//`` and ``%`` are for integers that are not negative. Conversions to another type are named as in LLVM.
    """

    def __init__(self, function: Function, handle: ir.Value) -> None:
        self.function, self.ir = function, handle

    @property
    def type(self) -> ir.Type:
        """Its LLVM type."""
        return self.ir.type

    __add__ = __radd__ = _operator("add", "fadd")
    __sub__ = _operator("sub", "fsub")
    __rsub__ = _operator("sub", "fsub", swap=True)
    __mul__ = __rmul__ = _operator("mul", "fmul")
    __truediv__ = _operator("sdiv", "fdiv")
    __rtruediv__ = _operator("sdiv", "fdiv", swap=True)
    __floordiv__ = _operator("udiv", "fdiv")
    __mod__ = _operator("urem", "frem")
    __and__ = _operator("and_", "and_")
    __or__ = _operator("or_", "or_")
    __xor__ = _operator("xor", "xor")
    __lshift__ = _operator("shl", "shl")
    __rshift__ = _operator("ashr", "ashr")
    __lt__ = _comparison("<")
    __le__ = _comparison("<=")
    __gt__ = _comparison(">")
    __ge__ = _comparison(">=")
    equals = _comparison("==")

    def compare(self, relation: str, other: Operand) -> Value:
        """A truth value, or a vector of them; floating-point comparisons with NaN are false."""
        builder = self.function.builder
        test = builder.fcmp_ordered if is_float(self.type) else builder.icmp_signed
        return Value(self.function, test(relation, self.ir, self.function.as_value(other, self.type).ir))

    @property
    def is_zero(self) -> Value:
        """Whether it is 0."""
        return self.compare("==", 0)

    @property
    def is_set(self) -> Value:
        """Whether it is not 0."""
        return self.compare("!=", 0)

    def select(self, yes: Operand, no: Operand) -> Value:
        """``yes`` where this truth value holds, else ``no``; one of the two must be a Value."""
        model = yes if isinstance(yes, Value) else no
        assert isinstance(model, Value)
        values = (self.function.as_value(value, model.type).ir for value in (yes, no))
        return Value(self.function, self.function.builder.select(self.ir, *values))

    def at_most(self, limit: Operand) -> Value:
        """The lesser of this integer and the limit."""
        return (self > limit).select(limit, self)

    bitcast = _conversion("bitcast")
    zext = _conversion("zext")
    sext = _conversion("sext")
    trunc = _conversion("trunc")
    sitofp = _conversion("sitofp")
    fptosi = _conversion("fptosi")


Operand = Value | int | float


class Variable:
    """A variable of a function under construction. LLVM turns it back into registers."""

    def __init__(self, function: Function, initial: Value) -> None:
        self._function, self._type = function, initial.type
        with function.builder.goto_entry_block():
            self._slot = function.builder.alloca(initial.type)
        self.set(initial)

    def get(self) -> Value:
        """Its value now."""
        return Value(self._function, self._function.builder.load(self._slot, typ=self._type))

    def set(self, value: Operand) -> None:
        """Give it a new value."""
        self._function.builder.store(self._function.as_value(value, self._type).ir, self._slot)


@dataclass(frozen=True)
class Signature:
    """A function that a module exports: its name and the names of its arguments."""

    name: str
    arguments: tuple[str, ...]


class Declared:
    """A function of another module, declared in ``module`` to be called there. The loader links the two."""

    def __init__(self, module: ir.Module, signature: Signature) -> None:
        self.handle = _declared(module, signature.name, ir.FunctionType(VOID, [I64] * len(signature.arguments)))


def _declared(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    """The module's function of that name; it is declared if the module does not have it yet."""
    known = module.globals.get(name)
    return ir.Function(module, kind, name) if known is None else known


class Function:
    """A function under construction in ``module``. Its arguments, and its result if it has one, are of type ``kind``.

    Only ``exported`` functions can be called from other modules and from Python.
    """

    def __init__(
        self, module: ir.Module, name: str, arguments: Sequence[str], *, exported: bool = False, returns: bool = False,
        kind: ir.Type = I64,
    ) -> None:  # fmt: skip
        self.module = module
        self.handle = ir.Function(module, ir.FunctionType(kind if returns else VOID, [kind] * len(arguments)), name)
        if not exported:
            self.handle.linkage = "internal"
        for attribute in ("nounwind", "noinline"):
            self.handle.attributes.add(attribute)
        self.builder = ir.IRBuilder(self.handle.append_basic_block("entry"))
        self.arguments = [Value(self, argument) for argument in self.handle.args]
        for argument, label in zip(self.handle.args, arguments, strict=True):
            argument.name = label

    @classmethod
    def of(cls, module: ir.Module, signature: Signature) -> Function:
        """A function that other modules may call."""
        return cls(module, signature.name, signature.arguments, exported=True)

    def constant(self, value: int | float, kind: ir.Type = I64) -> Value:
        """A constant, in every lane if the type is a vector."""
        return Value(self, ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value))

    def as_value(self, value: Operand, kind: ir.Type = I64) -> Value:
        """``value`` as a constant of that type, unless it is a Value already."""
        return value if isinstance(value, Value) else self.constant(value, kind)

    def var(self, initial: Operand) -> Variable:
        """A variable with that initial value."""
        return Variable(self, self.as_value(initial))

    def alloca(self, size: int) -> Value:
        """The address of ``size`` bytes on the stack; ``size`` is a multiple of 8."""
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(I64, size // 8)
            return Value(self, self.builder.ptrtoint(slot, I64))

    def pointer(self, address: Value) -> ir.Value:
        """An address as an LLVM pointer."""
        return self.builder.inttoptr(address.ir, POINTER)

    def load(self, address: Value, kind: ir.Type = I64, align: int = 8) -> Value:
        """The value at an address."""
        return Value(self, self.builder.load(self.pointer(address), align=align, typ=kind))

    def store(self, value: Operand, address: Value, align: int = 8) -> None:
        """Write a value to an address."""
        self.builder.store(self.as_value(value).ir, self.pointer(address), align=align)

    def copy(self, into: Value, source: Value, size: Value) -> None:
        """Copy ``size`` bytes; the two ranges must not overlap."""
        self.intrinsic("llvm.memcpy.p0.p0.i64", VOID, [self.pointer(into), self.pointer(source), size, _NOT_VOLATILE])

    def fill_zero(self, into: Value, size: Value) -> None:
        """Set ``size`` bytes to zero."""
        self.intrinsic("llvm.memset.p0.i64", VOID, [self.pointer(into), I8(0), size, _NOT_VOLATILE])

    def prefetch(self, address: Value, cache: int = 1) -> None:
        """Prefetch the cache line of an address into that level of cache; the address may be invalid."""
        flags = [ir.Constant(I32, flag) for flag in (0, 4 - cache, 1)]
        self.intrinsic("llvm.prefetch.p0", VOID, [self.pointer(address), *flags])

    def opaque(self, value: Value) -> Value:
        """The same integer. The compiler does not know how it was computed, so it cannot compute it anew in loops."""
        return Value(self, self.builder.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [value.ir], side_effect=False))

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[Any]) -> Value:
        """Call an LLVM intrinsic or a C function by name; it is declared at first use."""
        handles = [argument.ir if isinstance(argument, Value) else argument for argument in arguments]
        callee = _declared(self.module, name, ir.FunctionType(result, [handle.type for handle in handles]))
        return Value(self, self.builder.call(callee, handles))

    def call(self, function: Function | Declared, *arguments: Operand) -> Value:
        """Call another function, and return what it returns."""
        return Value(self, self.builder.call(function.handle, [self.as_value(argument).ir for argument in arguments]))

    def call_address(self, address: Value, *arguments: Value, returns: ir.Type = VOID) -> Value:
        """Call a function of 64-bit integers by its address."""
        kind = ir.FunctionType(returns, [I64] * len(arguments))
        handle = self.builder.inttoptr(address.ir, kind.as_pointer())
        return Value(self, self.builder.call(handle, [argument.ir for argument in arguments]))

    @contextmanager
    def loop(self, start: Operand, stop: Operand, step: Operand = 1) -> Iterator[Value]:
        """``for i in range(start, stop, step)`` with a positive step; yields i."""
        first, last, stride = (self.as_value(bound) for bound in (start, stop, step))
        before = self.builder.block
        head, body, done = (self.builder.append_basic_block(name) for name in ("loop", "body", "done"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.phi(I64)
        index.add_incoming(first.ir, before)
        self.builder.cbranch(self.builder.icmp_signed("<", index, last.ir), body, done)
        self.builder.position_at_end(body)
        yield Value(self, index)
        index.add_incoming(self.builder.add(index, stride.ir), self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(done)

    @contextmanager
    def forever(self) -> Iterator[ir.Block]:
        """``while True``; yields what :meth:`break_if` needs to leave the loop."""
        body, done = self.builder.append_basic_block("forever"), self.builder.append_basic_block("left")
        self.builder.branch(body)
        self.builder.position_at_end(body)
        yield done
        self.builder.branch(body)
        self.builder.position_at_end(done)

    def break_if(self, loop: ir.Block, when: Value) -> None:
        """Leave a :meth:`forever` loop if the truth value holds."""
        rest = self.builder.append_basic_block("rest")
        self.builder.cbranch(when.ir, loop, rest)
        self.builder.position_at_end(rest)

    def if_(self, condition: Value) -> Any:
        """``with f.if_(condition):``."""
        return self.builder.if_then(condition.ir)

    def if_else(self, condition: Value) -> Any:
        """``with f.if_else(condition) as (then, otherwise):``, two ``with`` blocks."""
        return self.builder.if_else(condition.ir)

    def switch(self, value: Value, cases: Mapping[int, _Case]) -> Iterator[_Case]:
        """``for case in f.switch(value, cases):`` emits the code of each case; for other values no code runs."""
        done = self.builder.append_basic_block("switched")
        switch = self.builder.switch(value.ir, done)
        for number, case in cases.items():
            block = self.builder.append_basic_block(f"case{number}")
            switch.add_case(number, block)
            self.builder.position_at_end(block)
            yield case
            self.builder.branch(done)
        self.builder.position_at_end(done)

    def ret(self, result: Value | None = None) -> None:
        """Return from the function, and end its construction."""
        self.builder.ret_void() if result is None else self.builder.ret(result.ir)
