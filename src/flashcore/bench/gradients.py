"""What is timed of a backward pass: the gradients of an attention call, with the call or without it.

Autograd runs a backward pass on the stream of its forward pass, and has the streams wait for one another on which its leaves
were first used. No stream can wait for another one that is being captured; so each stream has leaves of its own (the same
memory), made by the first call on it, which is a warm-up's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from flashcore.bench.contender import Attention, Run
from flashcore.bench.inputs import Inputs
from flashcore.bench.work import Direction

Prepare = Callable[[Inputs], Attention]
Gradients = tuple[torch.Tensor, ...]


def run_of(direction: Direction, prepare: Prepare, inputs: Inputs) -> Run:
    """What is timed in this direction of a contender's call; of gradients it returns (dq, dk, dv)."""
    if direction == "fwd":
        return prepare(inputs)
    return (_ForwardBackward if direction == "fwdbwd" else _Backward)(prepare, inputs)


def peak_bytes(prepare: Prepare, inputs: Inputs) -> int:
    """Device memory that one forward and backward pass takes at most beside its inputs, what they return included."""
    device = inputs.q.device
    step = _ForwardBackward(prepare, inputs)
    step()  # what a library allocates once for all its calls is no part of it
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class _ForwardBackward:
    """A forward pass and its backward pass."""

    def __init__(self, prepare: Prepare, inputs: Inputs) -> None:
        self._prepare = prepare
        self._inputs = inputs
        self._bound: dict[torch.cuda.Stream | None, tuple[Inputs, Attention]] = {}

    def _on_this_stream(self) -> tuple[Inputs, Attention]:
        """The inputs with this stream's leaves, and the call bound to them."""
        stream = _stream(self._inputs)
        if stream not in self._bound:
            q, k, v = (x.detach().requires_grad_() for x in self._inputs.leaves)
            inputs = replace(self._inputs, q=q, k=k, v=v)
            self._bound[stream] = inputs, self._prepare(inputs)
        return self._bound[stream]

    def __call__(self) -> Gradients:
        inputs, attention = self._on_this_stream()
        with torch.enable_grad():
            o = attention()
        return torch.autograd.grad(o, inputs.leaves, inputs.do)


class _Backward(_ForwardBackward):
    """The backward pass of a forward pass that was done before, once on each stream."""

    def __init__(self, prepare: Prepare, inputs: Inputs) -> None:
        super().__init__(prepare, inputs)
        self._outputs: dict[torch.cuda.Stream | None, torch.Tensor] = {}

    def __call__(self) -> Gradients:
        inputs, attention = self._on_this_stream()
        stream = _stream(inputs)
        if stream not in self._outputs:
            with torch.enable_grad():
                self._outputs[stream] = attention()
        return torch.autograd.grad(self._outputs[stream], inputs.leaves, inputs.do, retain_graph=True)


def _stream(inputs: Inputs) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(inputs.q.device) if inputs.q.is_cuda else None
