"""A small language over llvmlite: values with operators, loops and branches as ``with`` blocks.

All addresses are 64-bit integers; loads and stores say the type they mean. ``f.var`` makes a variable, which LLVM
turns back into registers; everything else is single assignment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

I1, I32, I64, VOID = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.VoidType()
POINTER = ir.PointerType()
Module = ir.Module


def is_float(kind: ir.Type) -> bool:
    """Whether a scalar or vector type holds floating-point numbers."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    return isinstance(element, (ir.FloatType, ir.DoubleType))


class Value:
    """A value in a function under construction, with the arithmetic of its type (signed, for integers)."""

    def __init__(self, function: Function, handle: ir.Value) -> None:
        self.function, self.ir = function, handle

    @property
    def type(self) -> ir.Type:
        """Its LLVM type."""
        return self.ir.type

    def _operate(self, whole: str, real: str, other: Operand, swap: bool = False) -> Value:
        left, right = self.ir, self.function.like(self, other).ir
        operation = getattr(self.function.builder, real if is_float(self.type) else whole)
        return Value(self.function, operation(right, left) if swap else operation(left, right))

    def __add__(self, other: Operand) -> Value:
        return self._operate("add", "fadd", other)

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Value:
        return self._operate("sub", "fsub", other)

    def __rsub__(self, other: Operand) -> Value:
        return self._operate("sub", "fsub", other, swap=True)

    def __mul__(self, other: Operand) -> Value:
        return self._operate("mul", "fmul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> Value:
        return self._operate("sdiv", "fdiv", other)

    def __rtruediv__(self, other: Operand) -> Value:
        return self._operate("sdiv", "fdiv", other, swap=True)

    def __floordiv__(self, other: Operand) -> Value:
        """Division of integers that are not negative."""
        return self._operate("udiv", "fdiv", other)

    def __mod__(self, other: Operand) -> Value:
        """Remainder of integers that are not negative."""
        return self._operate("urem", "frem", other)

    def __and__(self, other: Operand) -> Value:
        return self._operate("and_", "and_", other)

    def __or__(self, other: Operand) -> Value:
        return self._operate("or_", "or_", other)

    def __xor__(self, other: Operand) -> Value:
        return self._operate("xor", "xor", other)

    def __lshift__(self, other: Operand) -> Value:
        return self._operate("shl", "shl", other)

    def __rshift__(self, other: Operand) -> Value:
        return self._operate("ashr", "ashr", other)

    def compare(self, relation: str, other: Operand) -> Value:
        """A truth value, or a vector of them; floating-point comparisons with NaN are false."""
        builder = self.function.builder
        test = builder.fcmp_ordered if is_float(self.type) else builder.icmp_signed
        return Value(self.function, test(relation, self.ir, self.function.like(self, other).ir))

    def __lt__(self, other: Operand) -> Value:
        return self.compare("<", other)

    def __le__(self, other: Operand) -> Value:
        return self.compare("<=", other)

    def __gt__(self, other: Operand) -> Value:
        return self.compare(">", other)

    def __ge__(self, other: Operand) -> Value:
        return self.compare(">=", other)

    def equals(self, other: Operand) -> Value:
        """Whether both are the same number."""
        return self.compare("==", other)

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
        if isinstance(yes, Value):
            chosen, other = yes, self.function.like(yes, no)
        else:
            assert isinstance(no, Value)
            chosen, other = self.function.like(no, yes), no
        return Value(self.function, self.function.builder.select(self.ir, chosen.ir, other.ir))

    def at_most(self, limit: Operand) -> Value:
        """This integer, or the limit if that is less."""
        return (self > limit).select(limit, self)

    def bitcast(self, kind: ir.Type) -> Value:
        """The same bits as another type."""
        return Value(self.function, self.function.builder.bitcast(self.ir, kind))


Operand = Value | int | float


class Variable:
    """A mutable local."""

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
        if not isinstance(value, Value):
            value = self._function.constant(value, self._type)
        self._function.builder.store(value.ir, self._slot)


@dataclass(frozen=True)
class Signature:
    """The name of a function that a module exports, and those of its arguments."""

    name: str
    arguments: tuple[str, ...]


class Declared:
    """A function that another module exports, as one to call from ``module``: it is found when code is loaded."""

    def __init__(self, module: ir.Module, signature: Signature) -> None:
        kind = ir.FunctionType(VOID, [I64] * len(signature.arguments))
        self.handle = _declared(module, signature.name, kind)


def _declared(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    """A module's function of that name, declared if it is not there yet."""
    known = module.globals.get(name)
    return ir.Function(module, kind, name) if known is None else known


class Function:
    """A function under construction in ``module``; ``with`` blocks of it nest as the code they emit does."""

    def __init__(
        self,
        module: ir.Module,
        name: str,
        arguments: Sequence[str],
        *,
        exported: bool = False,
        inline: bool = False,
        returns: bool = False,
    ) -> None:
        self.module = module
        self.handle = ir.Function(module, ir.FunctionType(I64 if returns else VOID, [I64] * len(arguments)), name)
        if not exported:
            self.handle.linkage = "internal"
        self.handle.attributes.add("nounwind")
        self.handle.attributes.add("alwaysinline" if inline else "noinline")
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
        if isinstance(kind, ir.VectorType):
            return Value(self, ir.Constant(kind, [value] * kind.count))
        return Value(self, ir.Constant(kind, value))

    def like(self, model: Value, value: Operand) -> Value:
        """``value`` as a constant of the model's type, unless it is a Value already."""
        return value if isinstance(value, Value) else self.constant(value, model.type)

    def var(self, initial: Operand) -> Variable:
        """A mutable local with that value."""
        return Variable(self, initial if isinstance(initial, Value) else self.constant(initial))

    def alloca(self, size: int) -> Value:
        """Where so many bytes are that go with the function's return, a multiple of 8."""
        with self.builder.goto_entry_block():
            slot = self.builder.alloca(I64, size // 8)
            return Value(self, self.builder.ptrtoint(slot, I64))

    def pointer(self, address: Value) -> ir.Value:
        """An address as an LLVM pointer."""
        return self.builder.inttoptr(address.ir, POINTER)

    def load(self, address: Value, kind: ir.Type = I64, align: int = 8) -> Value:
        """What lies at the address."""
        return Value(self, self.builder.load(self.pointer(address), align=align, typ=kind))

    def store(self, value: Operand, address: Value, align: int = 8) -> None:
        """Write a value to the address."""
        if not isinstance(value, Value):
            value = self.constant(value)
        self.builder.store(value.ir, self.pointer(address), align=align)

    def copy(self, into: Value, source: Value, size: Value) -> None:
        """Copy bytes between places that do not overlap."""
        false = ir.Constant(I1, 0)
        arguments = [self.pointer(into), self.pointer(source), size, false]
        self.intrinsic("llvm.memcpy.p0.p0.i64", VOID, arguments)

    def fill_zero(self, into: Value, size: Value) -> None:
        """Set bytes to zero."""
        zero, false = ir.Constant(ir.IntType(8), 0), ir.Constant(I1, 0)
        self.intrinsic("llvm.memset.p0.i64", VOID, [self.pointer(into), zero, size, false])

    def prefetch(self, address: Value, cache: int = 1) -> None:
        """Ask for the cache line of an address, into that level of cache; the address may be invalid."""
        flags = [ir.Constant(I32, flag) for flag in (0, 4 - cache, 1)]
        self.intrinsic("llvm.prefetch.p0", VOID, [self.pointer(address), *flags])

    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[Any]) -> Value:
        """Call an LLVM intrinsic or a C function by name, declaring it at first use."""
        handles = [argument.ir if isinstance(argument, Value) else argument for argument in arguments]
        callee = _declared(self.module, name, ir.FunctionType(result, [handle.type for handle in handles]))
        return Value(self, self.builder.call(callee, handles))

    def call(self, function: Function | Declared, *arguments: Operand) -> None:
        """Call another function."""
        self.result(function, *arguments)

    def result(self, function: Function | Declared, *arguments: Operand) -> Value:
        """Call another function; what it returns, if it returns anything."""
        values = [a if isinstance(a, Value) else self.constant(a) for a in arguments]
        return Value(self, self.builder.call(function.handle, [value.ir for value in values]))

    def call_address(self, address: Value, *arguments: Value) -> None:
        """Call a function of integers by its address."""
        kind = ir.FunctionType(VOID, [I64] * len(arguments))
        handle = self.builder.inttoptr(address.ir, kind.as_pointer())
        self.builder.call(handle, [argument.ir for argument in arguments])

    @contextmanager
    def loop(self, start: Operand, stop: Operand, step: Operand = 1) -> Iterator[Value]:
        """``for i in range(start, stop, step)`` with a positive step; yields i."""
        first, last, stride = (v if isinstance(v, Value) else self.constant(v) for v in (start, stop, step))
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
        """``while True``; yields the block to which :meth:`break_if` jumps out."""
        body, done = self.builder.append_basic_block("forever"), self.builder.append_basic_block("left")
        self.builder.branch(body)
        self.builder.position_at_end(body)
        yield done
        self.builder.branch(body)
        self.builder.position_at_end(done)

    def break_if(self, loop: ir.Block, when: Value) -> None:
        """Jump out of a :meth:`forever` loop if the truth value holds."""
        onward = self.builder.append_basic_block("onward")
        self.builder.cbranch(when.ir, loop, onward)
        self.builder.position_at_end(onward)

    @contextmanager
    def if_(self, condition: Value) -> Iterator[None]:
        """``if condition:``."""
        with self.builder.if_then(condition.ir):
            yield

    @contextmanager
    def if_else(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """``if condition: ... else: ...``; yields the two ``with`` blocks."""
        with self.builder.if_else(condition.ir) as branches:
            yield branches

    @contextmanager
    def switch(self, value: Value, cases: Sequence[int]) -> Iterator[list[AbstractContextManager[None]]]:
        """A ``with`` block for each case of an integer; other values do nothing."""
        done = self.builder.append_basic_block("switched")
        switch = self.builder.switch(value.ir, done)

        @contextmanager
        def branch(number: int) -> Iterator[None]:
            block = self.builder.append_basic_block(f"case{number}")
            switch.add_case(number, block)
            self.builder.position_at_end(block)
            yield
            self.builder.branch(done)

        yield [branch(number) for number in cases]
        self.builder.position_at_end(done)

    def ret(self, result: Value | None = None) -> None:
        """Return from the function, with an integer if it returns one; its construction is over."""
        if result is None:
            self.builder.ret_void()
        else:
            self.builder.ret(result.ir)
