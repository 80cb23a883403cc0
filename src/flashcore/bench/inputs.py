"""Inputs that contenders share: drawn once from a seed, q, k and v independently, and further sets for cold caches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore.bench.shapes import Shape


@dataclass(frozen=True)
class Inputs:
    """q (B, Hq, Sq, D), k (B, Hk, Sk, D), v (B, Hk, Sk, Dv), mask (B, 1, Sq, Sk) or None, with the shape they are for.

    do (B, Hq, Sq, Dv), the gradient of the output: where there is one, q, k and v are leaves that require a gradient.
    """

    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    do: torch.Tensor | None = None

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v


class InputSets:
    """Sets of inputs by number, drawn when first asked for; set 0 is the one every contender is verified on."""

    def __init__(self, shape: Shape, device: torch.device, seed: int, *, gradients: bool = False) -> None:
        self._shape = shape
        self._gradients = gradients
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
        mask = self._mask()
        if not self._gradients:
            return Inputs(shape, q, k, v, mask)
        do = self._normal(shape.batch, shape.heads_q, shape.seqlen_q, shape.head_dim_v)
        return Inputs(shape, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), mask, do)

    def _mask(self) -> torch.Tensor | None:
        """Additive: standard normal. Bool: seven keys in ten attend, the first always, so that no row is empty."""
        shape = self._shape
        if shape.mask == "none":
            return None
        drawn = self._normal(shape.batch, 1, shape.seqlen_q, shape.seqlen_k)
        if shape.mask == "additive":
            return drawn
        attends = drawn > -0.5244  # the normal distribution's 0.3 quantile
        attends[..., 0] = True
        return attends

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._generator, device=self._device, dtype=self._shape.torch_dtype)
