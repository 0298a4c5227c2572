"""Ranges by percentile: the search that every quantizer's initial range comes from (METHODS: Uniform quantizer)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ACTIVATION_PERCENTILES = (0.999, 0.9999, 0.99999)
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)


def by_channel(x: Tensor, channel_dim: int | None) -> Tensor:
    """x as a contiguous channels × values matrix; one row for a per-tensor quantizer (channel_dim None)."""
    if channel_dim is None:
        return x.reshape(1, -1)
    return x.movedim(channel_dim, 0).reshape(x.shape[channel_dim], -1).contiguous()


def upper_quantiles(x: Tensor, percentiles: Sequence[float]) -> Tensor:
    """Quantiles of each row, linearly interpolated as numpy's default: percentiles × rows.

    Args:
        x: rows × values.
        percentiles: in [0, 1]; the nearer to 1 the cheaper, because only that tail is sorted.
    """
    n = x.shape[1]
    ranks = [p * (n - 1) for p in percentiles]
    tail = n - math.floor(min(ranks))
    top = torch.topk(x, tail, dim=1).values  # descending: rank r is at n - 1 - r
    result = []
    for rank in ranks:
        low, high = math.floor(rank), math.ceil(rank)
        below, above = top[:, n - 1 - low], top[:, n - 1 - high]
        result.append(below + (above - below) * (rank - low))
    return torch.stack(result)


def percentile_ranges(x: Tensor, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Lower and upper range of each row for each pair (p, 1 - p): two percentiles × rows tensors."""
    return -upper_quantiles(-x, percentiles), upper_quantiles(x, percentiles)


def best_candidate(
    x: Tensor, candidates: Sequence[tuple[Tensor, ...]], fake_quantize: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """For each row, the candidate parameters of least mean squared error; of equals, the first.

    Args:
        x: rows × values.
        candidates: each a tuple of tensors with one entry a row.
        fake_quantize: (x, *one candidate's tensors as rows × 1) -> x's shape.
    """
    errors = torch.stack(
        [
            (fake_quantize(x, *(t[:, None] for t in c)) - x).square_().mean(dim=1, dtype=torch.float64)
            for c in candidates
        ]
    )
    best = errors.argmin(dim=0)
    rows = torch.arange(x.shape[0], device=x.device)
    return tuple(torch.stack(tensors)[best, rows] for tensors in zip(*candidates, strict=True))
