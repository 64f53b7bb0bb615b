"""The report of an adapter: which recurrent layers of a model it has replaced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """A recurrent layer of a model.

    Attributes:
        name: Its name in the model; empty for the model itself.
        kind: The name of its class.
        reason: Why it is unchanged; empty if it was replaced.
        note: If it was replaced, which of its calls the framework still runs; empty for none.
    """

    name: str
    kind: str
    reason: str = ""
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.name or '(the model itself)'}: {self.kind}"
        return ", ".join(part for part in (text, self.reason, self.note) if part)


@dataclass(frozen=True)
class Report:
    """Which recurrent layers were replaced. Its length is the number of replaced layers; it is true if there is one."""

    replaced: tuple[LayerReport, ...] = ()
    unchanged: tuple[LayerReport, ...] = ()

    @classmethod
    def of(cls, layers: Iterable[LayerReport | None]) -> Report:
        """The report of these layers; None stands for a module that is not recurrent."""
        recurrent = [layer for layer in layers if layer is not None]
        return cls(
            tuple(layer for layer in recurrent if not layer.reason), tuple(layer for layer in recurrent if layer.reason)
        )

    def __len__(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        if not (self.replaced or self.unchanged):
            return "the model has no recurrent layer"
        lines = [f"{len(self.replaced)} replaced, {len(self.unchanged)} unchanged"]
        lines += [f"  replaced   {layer}" for layer in self.replaced]
        lines += [f"  unchanged  {layer}" for layer in self.unchanged]
        return "\n".join(lines)
