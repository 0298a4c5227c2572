"""Ranges by percentile: the search that every quantizer's initial range comes from (METHODS: Uniform quantizer)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from iasvit.quantizers.pool import Pool

ACTIVATION_PERCENTILES = (0.999, 0.9999, 0.99999)
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999)


def upper_quantiles(pool: Pool, percentiles: Sequence[float], sign: int = 1) -> Tensor:
    """Quantiles of each row, linearly interpolated as numpy's default: percentiles × rows.

    Args:
        pool: the values.
        percentiles: in [0, 1]; the nearer to 1 the cheaper, because only that tail is sorted.
        sign: -1 for the quantiles of the values times -1.
    """
    n = pool.count
    ranks = [p * (n - 1) for p in percentiles]
    tail = n - math.floor(min(ranks))
    top: Tensor | None = None  # the largest so far, descending
    for values in pool.slices():
        values = values if sign > 0 else -values
        if top is not None:
            if pool.rows == 1 and top.shape[1] == tail:
                values = values[:, values[0] > top[0, -1]]
            values = torch.cat([top, values], dim=1)
        top = torch.topk(values, min(tail, values.shape[1]), dim=1).values
    result = []
    for rank in ranks:
        low, high = math.floor(rank), math.ceil(rank)
        below, above = top[:, n - 1 - low], top[:, n - 1 - high]  # rank r is at n - 1 - r
        result.append(below + (above - below) * (rank - low))
    return torch.stack(result)


def percentile_ranges(pool: Pool, percentiles: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Lower and upper range of each row for each pair (p, 1 - p): two percentiles × rows tensors."""
    return -upper_quantiles(pool, percentiles, -1), upper_quantiles(pool, percentiles)


def best_candidate(
    pool: Pool, candidates: Sequence[tuple[Tensor, ...]], fake_quantize: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """For each row, the candidate parameters of least mean squared error; of equals, the first.

    Args:
        pool: the values.
        candidates: each a tuple of tensors with one entry a row.
        fake_quantize: (x, *one candidate's tensors as rows × 1) -> x's shape, x being rows × some values.
    """
    if len(candidates) == 1:
        return candidates[0]
    errors = torch.zeros(len(candidates), pool.rows, dtype=torch.float64, device=pool.device)
    for x in pool.slices():
        for error, candidate in zip(errors, candidates, strict=True):
            difference = fake_quantize(x, *(t[:, None] for t in candidate)) - x
            error += difference.square_().sum(dim=1, dtype=torch.float64)
    best = errors.argmin(dim=0)
    rows = torch.arange(pool.rows, device=pool.device)
    return tuple(torch.stack(tensors)[best, rows] for tensors in zip(*candidates, strict=True))
