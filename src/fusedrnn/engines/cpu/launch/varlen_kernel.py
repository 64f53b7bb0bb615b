"""The machine code that computes the tables of :class:`fusedrnn.engines.cpu.varlen.VarLen` from lengths."""

from __future__ import annotations

from fusedrnn.jit.builder import I32, I64, Function, Module, Value


def emit_fill_tables(module: Module) -> Function:
    """Emit ``fill_tables(lengths, steps, batch, row_starts, num_groups, unsorted_indices, tables)``.

    ``lengths`` are 32-bit integers; ``row_starts`` has the first row of each group, and the end of the last one;
    ``unsorted_indices`` depend on those alone. After the tables there must be room for T + 1 integers. It returns 1,
    or 0 if a length is not from 0 to T.
    """
    names = ["lengths", "steps", "batch", "row_starts", "num_groups", "unsorted_indices", "tables"]
    f = Function(module, "fill_tables", names, returns=True)
    lengths, steps, batch, row_starts, num_groups, unsorted_indices, tables = f.arguments
    sorted_indices, batch_sizes = tables + batch * 16, tables + batch * 32
    active_rows = batch_sizes + steps * 8
    counts = active_rows + num_groups * steps * 8
    valid = f.var(_count(f, lengths, steps, batch, counts))
    with f.if_(valid.get().is_set):
        _sort(f, lengths, steps, batch, counts, batch_sizes, sorted_indices)
        with f.loop(0, batch) as row:
            unsorted = f.load(unsorted_indices + row * 8)
            sequence = f.load(sorted_indices + unsorted * 8)
            for number, value in ((0, sequence), (1, unsorted), (3, _length(f, lengths, sequence))):
                f.store(value, tables + (batch * number + row) * 8)
        _count_active_rows(f, steps, row_starts, num_groups, unsorted_indices, batch_sizes, active_rows)
    f.ret(valid.get())
    return f


def _length(f: Function, lengths: Value, sequence: Value) -> Value:
    return f.load(lengths + sequence * 4, I32, 4).sext(I64)


def _count(f: Function, lengths: Value, steps: Value, batch: Value, counts: Value) -> Value:
    """Count the sequences of each length from 0 to T; return whether there are no other lengths."""
    valid = f.var(1)
    f.fill_zero(counts, (steps + 1) * 8)
    with f.loop(0, batch) as sequence:
        length = _length(f, lengths, sequence)
        with f.if_else((length >= 0) & (length <= steps)) as (inside, outside):
            with inside:
                f.store(f.load(counts + length * 8) + 1, counts + length * 8)
            with outside:
                valid.set(0)
    return valid.get()


def _sort(
    f: Function, lengths: Value, steps: Value, batch: Value, counts: Value, batch_sizes: Value, sorted_indices: Value
) -> None:
    """Sort the sequences by falling length, those of equal length in their order; ``counts`` are overwritten."""
    active = f.var(batch)
    with f.loop(0, steps) as step:
        active.set(active.get() - f.load(counts + step * 8))
        f.store(active.get(), batch_sizes + step * 8)
        # The sequences of this length follow all longer ones.
        f.store(active.get(), counts + step * 8)
    f.store(0, counts + steps * 8)
    with f.loop(0, batch) as sequence:
        next_of_length = counts + _length(f, lengths, sequence) * 8
        place = f.load(next_of_length)
        f.store(place + 1, next_of_length)
        f.store(sequence, sorted_indices + place * 8)


def _count_active_rows(
    f: Function, steps: Value, row_starts: Value, num_groups: Value, unsorted_indices: Value, batch_sizes: Value,
    active_rows: Value,
) -> None:  # fmt: skip
    """Store how many rows of each group are active at each step: its sorted indices rise, so active ones come first."""
    with f.loop(0, num_groups) as group:
        first = f.load(row_starts + group * 8)
        rows = f.var(f.load(row_starts + group * 8 + 8) - first)
        with f.loop(0, steps) as step:
            batch_size = f.load(batch_sizes + step * 8)
            with f.forever() as loop:
                f.break_if(loop, rows.get().is_zero)
                f.break_if(loop, f.load(unsorted_indices + (first + rows.get() - 1) * 8) < batch_size)
                rows.set(rows.get() - 1)
            f.store(rows.get(), active_rows + (group * steps + step) * 8)
