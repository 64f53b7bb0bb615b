"""``compute``: the format in which a module's GEMMs read their operands, as an attribute of our modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Module

from fusedrnn.spec import QUANTIZED, RNNSpec


class HasCompute(Module):
    """Base of our modules, before torch.nn's class. It adds the argument and the attribute ``compute``.

    Attributes:
        compute: As in :class:`fusedrnn.RNNSpec`; None for the format of the parameters.
    """

    compute: str | None = None
    _frozen_by_quantize: tuple[str, ...] = ()
    """The names of the parameters that required gradients before :meth:`freeze`."""

    def __init__(self, *args: Any, compute: str | None = None, **options: Any) -> None:
        """Construct torch.nn's module.

        Args:
            args: The arguments of torch.nn's class.
            compute: The attribute.
            options: The keyword arguments of torch.nn's class.

        Raises:
            ValueError: If ``compute`` is no format, or the parameters are float64; or as torch.nn raises it.
        """
        super().__init__(*args, **options)
        if compute is not None:
            dtype = next(self.parameters()).dtype
            self.compute = checked_compute(compute, "float64" if dtype.itemsize > 4 else "float32")

    def extra_repr(self) -> str:
        """The text of torch.nn, and ``compute`` if it is set."""
        return super().extra_repr() + (f", compute={self.compute}" if self.compute is not None else "")


def freeze(modules: Iterable[HasCompute]) -> None:
    """Let no parameter of these modules require a gradient; see :func:`unfreeze`. Modules may share parameters."""
    modules = list(modules)
    for module in modules:
        trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        if trainable:
            module._frozen_by_quantize = tuple(dict.fromkeys((*module._frozen_by_quantize, *trainable)))
    for module in modules:
        module.requires_grad_(False)


def unfreeze(module: Module) -> None:
    """Let parameters that :func:`freeze` froze require a gradient again, if they still exist."""
    names = vars(module).pop("_frozen_by_quantize", ())
    for name, parameter in module.named_parameters():
        if name in names:
            parameter.requires_grad_()


def checked_compute(compute: str | None, dtype: str = "float32") -> str | None:
    """A format, checked for parameters of this dtype; None if the format is that dtype.

    Raises:
        ValueError: If there is no such format, or it needs other parameters.
    """
    return RNNSpec("rnn_tanh", 1, 1, dtype=dtype, compute=compute).compute


def is_inference_only(compute: str | None) -> bool:
    """Whether a format has no gradients."""
    return compute in QUANTIZED


def no_dropout(compute: str | None) -> str:
    """The error message of a module in training mode with dropout."""
    return f"compute={compute!r} is for inference only, without dropout; the module is in training mode: call eval()"
