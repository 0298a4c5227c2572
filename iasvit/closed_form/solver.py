"""GPTQ (arXiv:2210.17323) and GPTAQ (arXiv:2504.02692): columns rounded in turn, the others make up for the error."""

from __future__ import annotations

import torch
from torch import Tensor

from iasvit.errors import IasvitError

BLOCK = 128  # columns whose updates of all later ones are one product; changes nothing but the time it takes
TRIES = 8  # of ten times the damping each


def gptq(
    weight: Tensor,
    moments: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    n_bits: int,
    *,
    damping: float,
    act_order: bool = True,
    asymmetry: Tensor | None = None,
    alpha: float = 0.25,
    block: int = BLOCK,
) -> Tensor:
    """Codes' values for a weight, column by column; each column's error is spread over those still to come.

    With H = Σ x̂ x̂ᵀ + λI and U the upper Cholesky factor of H⁻¹, column j is rounded to q_j and

        W[:, j+1:] -= (w_j - q_j) / U_jj · U[j, j+1:]                                       (GPTQ, equation 3)
        W[:, j+1:] += w_j · P[j, j+1:],  P = α · triu(D Uᵀ, 1) U,  D = Σ (x - x̂) x̂ᵀ         (GPTAQ, equation 13)

    where w_j is the column as it is when its turn comes. The factor of the least row scale cancels, so H need not be
    normalised. A singular H is damped ten times more until it has a factor.

    Args:
        weight: W, (rows, C).
        moments: Σ x̂ x̂ᵀ, float64 (C, C).
        scale, zero_point: a row's, (rows,).
        n_bits: b.
        damping: λ as a part of H's mean diagonal.
        act_order: take columns in the order of falling diagonal.
        asymmetry: D for GPTAQ, float64 (C, C); None for GPTQ.
        alpha: α; the paper's code has 0.25.
        block: columns at once.

    Returns:
        Values of codes, float64 (rows, C).

    Raises:
        IasvitError: a moment is NaN or Inf, or no damping makes H positive definite.
    """
    if not torch.isfinite(moments).all() or (asymmetry is not None and not torch.isfinite(asymmetry).all()):
        raise IasvitError("its Hessian holds NaN or Inf; check the images and the layers before it")
    w = weight.double()
    diagonal = moments.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(w.device)
    w, hessian = w[:, order].clone(), moments[order][:, order]
    upper = _inverse_factor(hessian, damping)
    pull = None
    if asymmetry is not None:
        pull = alpha * torch.triu(asymmetry[order][:, order] @ upper.T, 1) @ upper
    s, z = scale.double(), zero_point.double()
    result = torch.empty_like(w)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors, before = torch.empty_like(w[:, start:stop]), torch.empty_like(w[:, start:stop])
        for j in range(start, stop):
            column = w[:, j].clone()
            result[:, j] = ((column / s).round() + z).clamp(0, 2**n_bits - 1).sub(z).mul(s)
            error = (column - result[:, j]) / upper[j, j]
            w[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
            if pull is not None:
                w[:, j + 1 : stop] += column[:, None] * pull[j, j + 1 : stop]
            errors[:, j - start], before[:, j - start] = error, column
        w[:, stop:] -= errors @ upper[start:stop, stop:]
        if pull is not None:
            w[:, stop:] += before @ pull[start:stop, stop:]
    return result[:, torch.argsort(order)]


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with UᵀU = (H + λI)⁻¹: a row of it says how later columns make up for an earlier one."""
    mean = hessian.diagonal().mean()
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # inputs that are zero throughout
    for attempt in range(TRIES):
        damped = hessian + max(damping, 1e-12) * 10**attempt * mean * eye
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper
    raise IasvitError("its Hessian is singular beyond any damping; give more images or a larger damping")
