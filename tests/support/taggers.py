"""A model with a recurrent layer in it, for the tests that look at whole models."""

import torch
from torch import nn

I, H = 5, 4


class Tagger(nn.Module):
    """A layer among others."""

    def __init__(self, net):
        super().__init__()
        self.embed, self.net, self.head = nn.Linear(3, I), net, nn.Linear(H * (1 + net.bidirectional), 2)

    def forward(self, x, hx=None):
        y, final = self.net(torch.relu(self.embed(x)), hx)
        return self.head(y), final
