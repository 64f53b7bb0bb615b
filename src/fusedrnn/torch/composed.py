"""A call of the operator by PyTorch's own operations, which run on any device and in any transform."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedrnn.spec import RNNSpec
from fusedrnn.torch import double_backward
from fusedrnn.torch.double_backward import Extent
from fusedrnn.torch.eager import draw_seed
from fusedrnn.torch.network import Results, Tensors


def run(
    spec: RNNSpec, x: Tensor, states: Sequence[Tensor] | None, weights: Tensors, *,
    lengths: Tensor | None = None, batch_sizes: Tensor | None = None, seed: int | None = None,
    resets: Tensor | None = None, all_states: bool = False,
) -> Results:  # fmt: skip
    """:func:`fusedrnn.torch.eager.run` for tensors of any kind, step by step.

    Dropout masks are the same as there; they do not depend on the device.

    Raises:
        RuntimeError: If the format of GEMM operands is for inference only, since PyTorch's operations lack these
            formats; or if a random mask must differ between the members of torch.vmap.
    """
    if not spec.is_trainable and x.numel():  # without sequences, nothing is in any format
        raise RuntimeError(
            f"compute={spec.compute!r} runs on plain tensors on the CPU alone, outside of tracing and transforms; "
            f"got {x.dtype} on {x.device}"
        )
    if seed is None:
        seed = _draw_seed() if spec.drops else 0
    initial = states or (None,) * len(spec.state_names)
    extent = Extent.of_tensors(x, lengths, batch_sizes, resets, all_states)
    y, *final = double_backward.forward(spec, extent, seed, x, initial, weights)
    return y, tuple(final)


def _draw_seed() -> int:
    """A seed, which must be a number: the masks are computed outside of PyTorch."""
    try:
        return draw_seed()
    except RuntimeError as error:
        if ".item()" not in str(error):
            raise
        raise RuntimeError(
            "randomness of torch.vmap must be 'same' for a module that drops something; got 'different'"
        ) from error
