"""The oracles: what each stage of one head should hold, in float64, by the numbers that the kernel itself gave the stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from flashcore.debug import bounds
from flashcore.debug.conventions import Convention
from flashcore.debug.record import Head, written
from flashcore.debug.views import View


@dataclass(frozen=True)
class Operands:
    """One head's q (Sq, D), k (Sk, D), v (Sk, Dv) as the kernel got them, and which key each row may attend (Sq, Sk)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attended: torch.Tensor


@dataclass(frozen=True)
class Part:
    """A part of a view, (rows, columns): how far each number is from its oracle, infinity where it is none or should not be
    there, and how far it may be. `tile`: rows, and columns, of the kernel's tiles; `keys`: how many keys a column stands for, 0
    where a column is no key; `last_first`: whether the kernel takes its tiles of keys from the last to the first."""

    name: str
    error: torch.Tensor
    bound: torch.Tensor
    tile: tuple[int, int]
    keys: int
    last_first: bool


def judge(view: View, head: Head, given: Operands, convention: Convention) -> list[Part]:
    """The parts of a view of one head."""
    oracles: dict[View, Callable[[Head, Operands, Convention], list[Part]]] = {
        "scores": _scores,
        "softmax": _softmax,
        "pv": _output,
    }
    parts = oracles[view](head, given, convention)
    return [replace(part, last_first=convention.running == "descending") for part in parts]


def _part(name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, tile: tuple[int, int], keys: int = 0) -> Part:
    error = torch.where(got == want, 0.0, (got.double() - want).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    return Part(name, error, bound.nan_to_num(nan=0.0, posinf=0.0), tile, keys, last_first=False)


def _scores(head: Head, given: Operands, convention: Convention) -> list[Part]:
    """The scores by q and k: every key that a row may attend has one, and any other has -inf, or none where no tile went."""
    q, k, factor = given.q.double(), given.k.double(), convention.score_factor
    want = torch.where(given.attended, factor * (q @ k.T), -math.inf)
    got = torch.where(~given.attended & ~written(head.scores), -math.inf, head.scores)
    bound = bounds.score(q.shape[1], abs(factor) * (q.abs() @ k.abs().T))
    return [_part("scores", got, want, bound, convention.tiles.scores, 1)]


def _softmax(head: Head, given: Operands, convention: Convention) -> list[Part]:
    """Maxima and weights by the recorded scores, and sums by the recorded weights."""
    scored = written(head.scores)
    scores = torch.where(scored, head.scores, -math.inf).double()
    weights, sums = _weights_and_sums(head, scores, convention)
    return [*_maxima(head, scored, scores, convention), weights, sums]


def _maxima(head: Head, scored: torch.Tensor, scores: torch.Tensor, convention: Convention) -> tuple[Part, Part]:
    """Of the tiles that have scores, each of those that its weights are relative to; and of the rows."""
    (rows, keys), factor = convention.tiles.weights, convention.maximum_factor
    visited, recorded = _by_tile(scored, keys).any(2), _recorded_maxima(head, convention)
    want = torch.where(visited, factor * _running(_by_tile(scores, keys).amax(2), convention), -math.inf)
    # what no tile wrote is as good as -inf
    got = torch.where(~visited & ~written(recorded), -math.inf, recorded)
    of_rows = factor * scores.amax(1, keepdim=True)
    return (
        _part("tile maxima", got, want, bounds.maximum(want, factor), (rows, 1), keys),
        _part("row maxima", head.maximum[:, None], of_rows, bounds.maximum(of_rows, factor), (rows, 1)),
    )


def _weights_and_sums(head: Head, scores: torch.Tensor, convention: Convention) -> tuple[Part, Part]:
    """Weights relative to the recorded maxima, and their sums relative to the rows'."""
    tile, divided = convention.tiles.weights, convention.normalised == "weights"
    pivot = convention.pivot_factor * _finite(_relative_to(head, convention))
    x = convention.exponent * scores - pivot
    undivided = torch.exp2(x)
    total = _or_one(head.total.double())[:, None] if divided else torch.ones_like(undivided[:, :1])
    bound = bounds.weight(undivided / total, (convention.exponent * scores, pivot, x), convention.exp2_error, divided)
    got = torch.where(~written(head.scores) & ~written(head.weights), 0.0, head.weights)
    weights = _part("weights", got, undivided / total, bound, tile, 1)

    if divided:
        # the sum is of what the weights were divided from, which nobody recorded: it may be as far off as they
        want, of_terms = undivided.sum(1, keepdim=True), (bound * total).nan_to_num(nan=0.0).sum(1, keepdim=True)
    else:
        want = (_weights(head) * _to_final(head, convention)).sum(1, keepdim=True)
        of_terms = torch.zeros_like(want)
    relative = bounds.rescaled_sum(tile[1], -(-scores.shape[1] // tile[1]), *_rescalings(head, convention))
    sums = _part("row sums", head.total[:, None], want, want * relative + of_terms + bounds.TINY, (tile[0], 1))
    return weights, sums


def _output(head: Head, given: Operands, convention: Convention) -> list[Part]:
    """The weighted sum of the values by the recorded weights, maxima and sums."""
    weights = _weights(head)
    if convention.rounds_weights:
        weights = weights.half().double()
    if convention.normalised != "weights":
        weights = weights * _to_final(head, convention)
    if convention.normalised == "output":
        weights = weights / _or_one(head.total.double())[:, None]
    values, block_n = given.v.double(), convention.tiles.weights[1]
    want, magnitude = weights @ values, weights @ values.abs()
    keys = weights.shape[1]
    relative = bounds.rescaled_sum(keys, -(-keys // block_n), *_rescalings(head, convention))
    if convention.normalised == "output":
        relative = relative + bounds.DIVISION
    shape = (convention.tiles.output_rows, want.shape[1])
    return [_part("output", head.output, want, magnitude * relative + bounds.TINY, shape)]


def _by_tile(x: torch.Tensor, block_n: int) -> torch.Tensor:
    """(rows, keys) as (rows, tiles, keys of a tile); keys past the end are never attended."""
    missing = -x.shape[1] % block_n
    padding = torch.full((x.shape[0], missing), False if x.dtype == torch.bool else -math.inf, dtype=x.dtype, device=x.device)
    return torch.cat([x, padding], 1).view(x.shape[0], -1, block_n)


def _running(tile_max: torch.Tensor, convention: Convention) -> torch.Tensor:
    """(rows, tiles): the maximum that each tile's weights are relative to."""
    if convention.running == "ascending":
        return tile_max.cummax(1).values
    if convention.running == "descending":
        return tile_max.flip(1).cummax(1).values.flip(1)
    return tile_max.amax(1, keepdim=True).expand_as(tile_max) if convention.running == "row" else tile_max


def _recorded_maxima(head: Head, convention: Convention) -> torch.Tensor:
    """(rows, tiles): the maxima at the first keys of the tiles."""
    return head.tile_maxima[:, :: convention.tiles.weights[1]]


def _relative_to(head: Head, convention: Convention) -> torch.Tensor:
    """(rows, keys), float64: the recorded maximum that each weight is relative to, NaN where there is none."""
    each = _recorded_maxima(head, convention).double().repeat_interleave(convention.tiles.weights[1], 1)
    return each[:, : head.weights.shape[1]]


def _rescalings(head: Head, convention: Convention) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, 1) each: how often what was summed up is rescaled, and the magnitude of the largest maximum, in base 2."""
    recorded = _recorded_maxima(head, convention)
    largest = (_finite(recorded.double()) * convention.pivot_factor).abs().amax(1, keepdim=True)
    if convention.running in ("row", "tile"):
        return torch.full_like(largest, recorded.shape[1]), largest
    both = written(recorded[:, 1:]) & written(recorded[:, :-1])
    return (both & (recorded[:, 1:] != recorded[:, :-1])).sum(1, keepdim=True).double(), largest


def _to_final(head: Head, convention: Convention) -> torch.Tensor:
    """(rows, keys): what each weight must be multiplied by to be relative to the row's maximum."""
    relative_to = _relative_to(head, convention)
    difference = _finite(relative_to) - _finite(head.maximum.double())[:, None]
    return torch.where(torch.isfinite(relative_to), torch.exp2(convention.pivot_factor * difference), 0.0)


def _weights(head: Head) -> torch.Tensor:
    """The recorded weights, 0 where there are none."""
    return torch.where(written(head.weights), head.weights, 0.0).double()


def _finite(x: torch.Tensor) -> torch.Tensor:
    """The maximum that exponents are relative to: of a row that attends nothing, and where nothing was written, 0."""
    return torch.where(torch.isfinite(x), x, 0.0)


def _or_one(total: torch.Tensor) -> torch.Tensor:
    """A sum to divide by: of a row that attends nothing, 1."""
    return torch.where(total == 0, 1.0, total)
