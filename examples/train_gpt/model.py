"""A small GPT over bytes, as plain as it gets; how attention is computed is given to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 256
# q, k, v of (B, H, S, D) to o of the same shape, causal
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """Defaults: 10.8 million parameters, head dim 64."""

    layers: int = 6
    heads: int = 6
    width: int = 384
    context: int = 1024


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a residual."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = size.heads, attention
        self.norm_1, self.norm_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width, bias=False), nn.GELU(), nn.Linear(4 * size.width, size.width, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        # (B, S, 3, H, D) to three of (B, H, S, D): views, which the kernels take as they lie
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Next-byte prediction; the embedding is also the output's matrix."""

    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList([Block(size, attention) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss of (B, S) tokens whose next bytes are `targets`."""
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.bytes.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
