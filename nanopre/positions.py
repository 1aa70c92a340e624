"""Where a token is: rotary positions, which turn queries and keys, and relative ones, which add to scores.

Letters as in model.py: B rows, H heads of width D, T queries, S keys.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nanopre.model import ModelConfig


def rotary_table(length: int, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of rotary positions, (2, length, head_dim / 2) (Su et al., 2021, section 3.2.2)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of (B, H, T, D) by their position's angles, from a table of (2, T, D/2)."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class RelativeBias(nn.Module):
    """A number for each head and distance between query and key, which is added to the score. Near distances have one
    each, far ones share logarithmic buckets (Raffel et al., 2020, section 2.1)."""

    def __init__(self, config: ModelConfig, bidirectional: bool):
        super().__init__()
        self.bidirectional, self.distance = bidirectional, config.relative_distance
        self.weight = nn.Parameter(torch.zeros(config.relative_buckets, config.n_heads))

    def bucket(self, offset: Tensor) -> Tensor:
        """The bucket of each offset, which is a key's position less the query's."""
        n = self.weight.shape[0]
        first = torch.zeros_like(offset)
        if self.bidirectional:  # half of the buckets for keys behind the query
            n //= 2
            first = (offset > 0) * n
            distance = offset.abs()
        else:  # what lies behind is not seen
            distance = (-offset).clamp(min=0)
        near = n // 2  # distances 0 .. near - 1 have a bucket each, those up to self.distance share the others
        far = (distance.clamp(min=1) / near).log() / math.log(self.distance / near) * (n - near)
        return first + torch.where(distance < near, distance, (near + far.long()).clamp(max=n - 1))

    def forward(self, T: int, S: int) -> Tensor:
        """(H, T, S): the queries are the last T of S positions. Only 2S - 1 offsets differ, and each row of a head's
        matrix is a window on them, one further left than the row before."""
        offsets = self.bucket(torch.arange(1 - S, S, device=self.weight.device))
        return self.weight[offsets].T.unfold(1, S, 1)[:, :T].flip(1)
