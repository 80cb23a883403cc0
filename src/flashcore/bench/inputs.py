"""Inputs that contenders share: drawn once from a seed, q, k and v independently, and further sets for cold caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.bench.shapes import Shape


@dataclass(frozen=True)
class Inputs:
    """q (B, Hq, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), contiguous, with the shape they were drawn for."""

    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class InputSets:
    """Sets of inputs by number, drawn when first asked for; set 0 is the one every contender is verified on."""

    def __init__(self, shape: Shape, device: torch.device, seed: int) -> None:
        self._shape = shape
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._sets: list[Inputs] = []

    def __getitem__(self, number: int) -> Inputs:
        while len(self._sets) <= number:
            self._sets.append(self._draw())
        return self._sets[number]

    def _draw(self) -> Inputs:
        shape = self._shape
        q = self._normal(shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim)
        k = self._normal(shape.batch, shape.heads_k, shape.seqlen_k, shape.head_dim)
        v = self._normal(shape.batch, shape.heads_k, shape.seqlen_k, shape.head_dim_v)
        return Inputs(shape, q, k, v)

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._generator, device=self._device, dtype=self._shape.torch_dtype)
