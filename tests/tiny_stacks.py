"""A module of experts whose matrices are stacked, as transformers has them."""

import torch
from torch import nn

from utils.models.decoder import Component

EXPERTS, WIDTH, INNER = 3, 4, 5
UP, DOWN = Component("up", "experts", "up_proj"), Component("down", "experts", "down_proj")


class Experts(nn.Module):
    """A mixture as transformers stacks it; `transposed`: matrices are [in, out]."""

    def __init__(self, transposed=False):
        super().__init__()
        self.transposed = transposed
        shapes = ((WIDTH, INNER), (INNER, WIDTH)) if transposed else ((INNER, WIDTH), (WIDTH, INNER))
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(EXPERTS, *shape)) for shape in shapes)

    def product(self, x, matrix):
        return x @ matrix if self.transposed else nn.functional.linear(x, matrix)

    def forward(self, hidden, chosen, gates):
        out = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            place, token = torch.where(expert == chosen.T)
            inner = torch.relu(self.product(hidden[token], self.up_proj[expert]))
            out.index_add_(0, token, self.product(inner, self.down_proj[expert]) * gates[token, place, None])
        return out
