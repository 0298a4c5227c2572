"""ERQ (ICML 2024; IEEE TPAMI 2025, doi 10.1109/TPAMI.2025.3528042): ridge regression against quantization errors."""

from __future__ import annotations

import torch
from torch import Tensor

from iasvit.closed_form.moments import Moments
from iasvit.errors import IasvitError


def correct(weight: Tensor, bias: Tensor | None, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
    """A weight and bias that answer quantized inputs x̂ as the given ones answer x: activation quantization error
    reduction (equation 7).

    With a column of ones in x and x̂ where there is a bias, V = [W b] and R the mean squares of Δ and the fit,

        min over Δ of Σ ‖V x - (V + Δ) x̂‖² + λ‖Δ‖²  →  Δ = V (Σ x x̂ᵀ - Σ x̂ x̂ᵀ) (Σ x̂ x̂ᵀ + λI)⁻¹.

    Args:
        weight: (rows, C).
        bias: (rows,), or None.
        moments: with `mixed`.
        ridge: λ.

    Returns:
        Weight and bias, float64.

    Raises:
        IasvitError: as `_solve`.
    """
    quantized, mixed = moments.quantized, moments.mixed
    assert mixed is not None
    values = weight.double()
    if bias is not None:
        ours, wanted = moments.sums
        count = ours.new_full((1, 1), moments.tokens)
        quantized = torch.cat([torch.cat([quantized, ours[:, None]], 1), torch.cat([ours[None], count], 1)])
        mixed = torch.cat([torch.cat([mixed, ours[:, None]], 1), torch.cat([wanted[None], count], 1)])
        values = torch.cat([values, bias.double()[:, None]], dim=1)
    delta = _solve(quantized, (mixed - quantized) @ values.T, ridge).T
    values = values + delta
    return (values, None) if bias is None else (values[:, :-1], values[:, -1])


def _solve(moments: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(M + λI)⁻¹ right, all in float64.

    Raises:
        IasvitError: a moment is NaN or Inf, or M + λI is singular.
    """
    if not (torch.isfinite(moments).all() and torch.isfinite(right).all()):
        raise IasvitError("its moments hold NaN or Inf; check the images and the layers before it")
    damped = moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        raise IasvitError("its ridge regression is singular; give more images or a larger ridge")
    return torch.cholesky_solve(right, factor)


def round_with_correction(
    weight: Tensor, moments: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int, *, ridge: float, flips: int
) -> Tensor:
    """Codes' values for a weight: half of the columns left is rounded, the other half makes up for it, and so on
    (weight quantization error reduction).

    The half is the first one in the order of the columns, as in the public code; the paper takes the half of the
    larger error. Roundings of a half are refined (`refined`), and the columns r that are left get, with the error e of
    those rounded, the ridge solution δ = e M_sr (M_rr + λI)⁻¹.

    Args:
        weight: (rows, C).
        moments: M = Σ x̂ x̂ᵀ, float64 (C, C).
        scale, zero_point: a row's, (rows,).
        n_bits: b.
        ridge: λ.
        flips: of a row, in each half, at most.

    Returns:
        Values of codes, float64 (rows, C).

    Raises:
        IasvitError: as `_solve`.
    """
    w = weight.double().clone()
    start, columns = 0, w.shape[1]
    while start < columns:
        stop = columns if columns - start == 1 else start + (columns - start) // 2
        rounded = refined(w[:, start:stop], moments[start:stop, start:stop], scale, zero_point, n_bits, flips)
        error = w[:, start:stop] - rounded
        w[:, start:stop] = rounded
        if stop < columns:
            w[:, stop:] += _solve(moments[stop:, stop:], moments[stop:, start:stop] @ error.T, ridge).T
        start = stop
    return w


def refined(weight: Tensor, moments: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int, flips: int) -> Tensor:
    """Round to nearest, then turn single roundings the other way while that lowers eᵀ M e, e = w - q, of a row.

    Each time the entry is taken whose derivative is largest among those whose rounding may go towards w, and the row is
    done when the turn does not help or it has had `flips` of them.

    Args:
        weight: (rows, k).
        moments: M, float64 (k, k).
        scale, zero_point: a row's, (rows,).
        n_bits: b.
        flips: at most.

    Returns:
        Values of codes, float64 (rows, k).
    """
    s, z = scale.double()[:, None], zero_point.double()[:, None]
    w = weight.double()
    codes = ((w / s).round() + z).clamp(0, 2**n_bits - 1)
    error = w - (codes - z) * s
    slope = error @ moments  # half the derivative
    rows = torch.arange(len(w), device=w.device)
    active = torch.ones(len(w), dtype=torch.bool, device=w.device)
    for _ in range(flips):
        direction = error.sign()
        room = (codes + direction >= 0) & (codes + direction <= 2**n_bits - 1) & (error != 0)
        gain = torch.where(room & (slope * error > 0), slope.abs(), -1.0)
        best, column = gain.max(dim=1)
        step = -direction[rows, column] * s[:, 0]  # what the turn adds to the error
        change = 2 * step * slope[rows, column] + step.square() * moments[column, column]
        active &= (best >= 0) & (change < 0)
        if not active.any():
            break
        step = torch.where(active, step, 0.0)
        codes[rows, column] += torch.where(active, direction[rows, column], 0.0)
        error[rows, column] += step
        slope += step[:, None] * moments[column]
    return (codes - z) * s
