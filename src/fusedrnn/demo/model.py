"""The model: embedding, recurrent layers, linear; as one writes it with PyTorch, and accelerated."""

from __future__ import annotations

from typing import TypeAlias

import torch
from fusedrnn.demo.settings import Settings
from fusedrnn.torch import accelerate
from torch import Tensor, nn

State: TypeAlias = "Tensor | tuple[Tensor, Tensor] | None"

TORCH, FUSED = "torch.nn", "fused"
CONTENDERS = (TORCH, FUSED)


class CharacterModel(nn.Module):
    """Predicts the next character at every step.

    Args:
        symbols: Size of the alphabet.
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
        """Scores of the characters that may come next.

        Args:
            x: Codes of characters, int64 (T, N).
            state: What the call before returned, for text that runs on; None at its beginning.

        Returns:
            Scores before the softmax (T, N, symbols), and the state behind the last step.
        """
        y, state = self.rnn(self.embedding(x), state)
        return self.linear(y), state


def build(contender: str, symbols: int, settings: Settings) -> CharacterModel:
    """The model with its initial parameters, which depend on the settings only and not on the contender.

    Raises:
        RuntimeError: If the fused layers did not take the place of torch.nn's.
    """
    torch.manual_seed(settings.seed)
    model = CharacterModel(symbols, settings)
    if contender == FUSED:
        swapped = accelerate(model)
        if swapped.left:
            raise RuntimeError(f"a demo of torch.nn against itself: {swapped}")
    return model


def detached(state: State) -> State:
    """The state as a beginning: no gradient flows back through it."""
    if isinstance(state, tuple):
        return state[0].detach(), state[1].detach()
    return None if state is None else state.detach()
