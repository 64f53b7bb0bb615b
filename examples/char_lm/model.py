"""The model: an embedding, recurrent layers, and a linear layer. It is written with torch.nn, then accelerated."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from examples.char_lm.settings import Settings
from fusedrnn.torch import accelerate

State: TypeAlias = "Tensor | tuple[Tensor, Tensor] | None"

TORCH, FUSED = "torch.nn", "fused"
CONTENDERS = (TORCH, FUSED)


class CharacterModel(nn.Module):
    """Predicts the next character at every step.

    Args:
        symbols: The size of the alphabet.
        settings: Cell, sizes and dropout.
    """

    def __init__(self, symbols: int, settings: Settings) -> None:
        super().__init__()
        H = settings.hidden
        layers: type[nn.GRU | nn.LSTM] = {"gru": nn.GRU, "lstm": nn.LSTM}[settings.cell]
        self.embedding = nn.Embedding(symbols, H)
        self.rnn = layers(H, H, settings.layers, dropout=settings.dropout)
        self.linear = nn.Linear(H, symbols)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Predict the character after each character of ``x``.

        Args:
            x: Character codes, int64 (T, N).
            state: The state that the previous call returned; None at the start of the text.

        Returns:
            Logits (T, N, symbols) and the state after the last step.
        """
        y, state = self.rnn(self.embedding(x), state)
        return self.linear(y), state


def build(contender: str, symbols: int, settings: Settings) -> CharacterModel:
    """The model with its initial parameters, which are the same for both contenders.

    Raises:
        RuntimeError: If a layer of the fused model was not replaced.
    """
    torch.manual_seed(settings.seed)
    model = CharacterModel(symbols, settings)
    if contender == FUSED:
        report = accelerate(model)
        if report.unchanged:
            raise RuntimeError(f"the fused model still has layers of torch.nn: {report}")
    return model


def detached(state: State) -> State:
    """The state without its graph, so that no gradient flows back through it."""
    if isinstance(state, tuple):
        return state[0].detach(), state[1].detach()
    return None if state is None else state.detach()
