"""The workspace of a plan: regions do not overlap, and the kernels' struct has every field. The tuning of plans."""

import pytest

from fusedrnn import RNNSpec
from fusedrnn.engines.cpu import tuning
from fusedrnn.engines.cpu.kernels import backward_emitter, forward
from fusedrnn.engines.cpu.kernels.workspace import (
    BACKWARD_REGIONS,
    FORWARD_REGIONS,
    Arena,
    WorkspaceRegions,
)
from fusedrnn.engines.cpu.plan.plans import make_plan
from fusedrnn.runtime.buffers import pad_against_conflicts, round_up_to_cache_line


def test_regions_follow_one_another():
    arena = Arena("stride", first=lambda s: s, second=lambda s: 3 * s, third=lambda s: 0)
    assert arena.fields == ("first_offset", "second_offset", "third_offset", "stride")
    for size in (0, 1, 63, 64, 65, 1000):
        offsets = arena.place(size)
        assert offsets == [0, round_up_to_cache_line(size), offsets[2], offsets[2]]
        assert offsets[2] - offsets[1] >= 3 * size and not any(offset % 64 for offset in offsets)
        assert arena.size(size) == offsets[-1]


def test_rows_do_not_share_cache_sets():
    for size in range(1, 1000):
        padded = pad_against_conflicts(size)
        assert size <= padded < size + 128 and padded // 64 % 2 == 1 and padded % 64 == 0


def test_layout_has_a_value_for_every_field():
    inner = Arena("stride", a=lambda s: s, b=lambda s: s)
    workspace = Arena("size", barriers=lambda s: 64, progress=lambda s: 64, inner=lambda s: 2 * inner.size(s))
    regions = WorkspaceRegions(workspace, inner, strides=("real",))
    layout = regions.lay_out(5)
    assert {*layout.offsets, *layout.fields} == set(regions.fields)
    assert layout.size == 128 + 4 * 64 and layout.zeroed == 128
    assert layout.fields == {"a_offset": 0, "b_offset": 64, "stride": 128, "real": 5}


@pytest.mark.parametrize("spec", [
    RNNSpec("lstm", 3, 40, num_layers=2, bidirectional=True, projection_size=7, dropout=0.5),
    RNNSpec("gru", 70, 100, reset_after=False),
    RNNSpec("rnn_tanh", 5, 16, num_layers=3),
], ids=str)  # fmt: skip
def test_plan_has_the_fields_of_the_struct(spec, target):
    plans = [
        (FORWARD_REGIONS, forward.CALL, make_plan(spec, target, 7, 5, 4)),
        (FORWARD_REGIONS, forward.CALL, make_plan(spec, target, 7, 5, 4, "training")),
        (BACKWARD_REGIONS, backward_emitter.CALL, make_plan(spec, target, 7, 5, 4, "backward", recompute=True)),
    ]
    for regions, call, plan in plans:
        layout = plan.workspace
        assert {*layout.offsets, *layout.fields} == set(regions.fields) <= set(call.names)
        offsets = [*layout.offsets.values(), layout.size]
        assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[2] == layout.zeroed
        assert offsets[4] - offsets[3] == plan.num_threads * layout.fields["scratch_stride"]


def test_tuned_installs_a_tuning_for_its_block(target):
    """A plan takes the installed one, or the one it is given."""
    spec, before = RNNSpec("gru", 16, 32), tuning.current()
    chunk = make_plan(spec, target, 50, 4, 1).share.chunk
    with tuning.tuned(min_chunk_rows=8, max_chunk_rows=8) as small:
        assert tuning.current() is small and small.block_rows == before.block_rows
        assert make_plan(spec, target, 50, 4, 1).share.chunk == 2 < chunk
        with pytest.raises(TypeError, match="no_such_threshold"), tuning.tuned(no_such_threshold=1):
            pass
        assert tuning.current() is small
    assert tuning.current() is before
    assert make_plan(spec, target, 50, 4, 1, tuning=small).share.chunk == 2
